//! Tests members of one quota on Tokio's paused clock. Their store is a `VirtualSchedule` in place of a server, behind
//! a simulated network that takes a millisecond each way and can fail. So all times are exact.

mod allowances;
mod shares;
mod store_loss;

use super::{
    builder::Builder,
    driver::{Backend, ReplyFuture},
    loss::OnStoreLoss,
    problem::StoreError,
    shared::SharedLimiter,
    virtual_schedule::VirtualSchedule,
    wire::StoreRequest,
};
use crate::{
    error::{AcquireError, StoreProblem},
    rate::{
        budget::Budget,
        cost::Cost,
        limits::{Limits, Rate},
        pause::PauseSource,
    },
};
use std::{
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, sleep_until, timeout},
};

/// A simulated store, and the network to it.
#[derive(Clone)]
struct Server {
    state: Arc<Mutex<ServerState>>,
    epoch: Instant,
    /// What the server's clock showed at `epoch`, in microseconds since 1970.
    clock: i64,
    /// How long a request takes to the server, and a reply back.
    delay: Duration,
}

struct ServerState {
    schedule: VirtualSchedule,
    network: Network,
    requests: Vec<StoreRequest>,
}

#[derive(Clone, Copy, PartialEq)]
enum Network {
    Works,
    /// Requests to the store fail at once.
    Refuses,
    /// Requests do not reach the store, and there is no reply.
    Frozen,
    /// The store serves requests, but its replies are lost.
    LosesReplies,
}

impl Server {
    fn new() -> Self {
        let state = ServerState {
            schedule: VirtualSchedule::default(),
            network: Network::Works,
            requests: Vec::new(),
        };
        Self {
            state: Arc::new(Mutex::new(state)),
            epoch: Instant::now(),
            clock: 1,
            delay: ms(1),
        }
    }

    /// Returns a new server whose clock shows so many microseconds since 1970.
    fn with_clock(clock: i64) -> Self {
        Self { clock, ..Self::new() }
    }

    fn set(&self, network: Network) {
        self.state.lock().unwrap().network = network;
    }

    fn lose_state(&self) {
        self.state.lock().unwrap().schedule.lose_state();
    }

    fn requests(&self) -> Vec<StoreRequest> {
        self.state.lock().unwrap().requests.clone()
    }

    /// Returns the same server, seen from a place from which requests and replies take this long.
    fn at_a_distance(&self, delay: Duration) -> Self {
        Self { delay, ..self.clone() }
    }

    fn member(&self, limits: Limits) -> SharedLimiter {
        self.member_with(Builder::new(limits))
    }

    fn member_with(&self, builder: Builder) -> SharedLimiter {
        let server = self.clone();
        let connect = Box::new(move || Arc::new(server.clone()) as Arc<dyn Backend>);
        builder.build_with(connect, Arc::default()).unwrap()
    }
}

impl Backend for Server {
    fn call<'a>(&'a self, request: &'a StoreRequest) -> ReplyFuture<'a> {
        Box::pin(async {
            let network = self.state.lock().unwrap().network;
            match network {
                Network::Refuses => return Err(StoreError::new(StoreProblem::Refused)),
                Network::Frozen => std::future::pending().await,
                Network::Works | Network::LosesReplies => sleep(self.delay).await,
            }
            let now = self.clock + i64::try_from(self.epoch.elapsed().as_micros()).unwrap();
            let reply = {
                let mut state = self.state.lock().unwrap();
                state.requests.push(request.clone());
                state.schedule.handle(request, now)
            };
            if network == Network::LosesReplies {
                std::future::pending().await
            }
            sleep(self.delay).await;
            Ok(reply)
        })
    }
}

const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn ten_a_second() -> Limits {
    Limits::new().requests(Rate::per_second(10).burst(1))
}

/// Waits until `cost` is admitted. Returns how many milliseconds after `start` that is.
async fn at(limiter: &SharedLimiter, cost: Cost, start: Instant) -> u128 {
    limiter.acquire(cost).await.unwrap();
    start.elapsed().as_millis()
}

#[tokio::test(start_paused = true)]
async fn a_call_is_admitted_at_the_time_of_its_reservation_and_not_later() {
    let limiter = Server::new().member(ten_a_second());
    let start = Instant::now();
    // The first call is reserved for the time when the request reaches the server, after 1 ms, and is admitted when the
    // reply arrives. From that time on, by the server's clock, one call is admitted every 100 ms.
    assert_eq!(at(&limiter, Cost::request(), start).await, 2);
    assert_eq!(at(&limiter, Cost::request(), start).await, 101);
    assert_eq!(at(&limiter, Cost::request(), start).await, 201);
}

#[tokio::test(start_paused = true)]
async fn waiting_calls_are_admitted_in_order_and_share_one_round_trip() {
    let server = Server::new();
    let limiter = server.member(Limits::new().requests(Rate::per_second(1_000).burst(1)));
    let start = Instant::now();
    let mut calls = JoinSet::new();
    for number in 0..20_u128 {
        let limiter = limiter.clone();
        calls.spawn(async move { (number, at(&limiter, Cost::request(), start).await) });
    }
    let mut admitted = calls.join_all().await;
    admitted.sort_unstable();
    let expected: Vec<_> = (0..20).map(|number| (number, (1 + number).max(2))).collect();
    assert_eq!(admitted, expected);
    assert_eq!(server.requests()[0].costs.len(), 20);
}

#[tokio::test(start_paused = true)]
async fn two_members_get_half_of_the_quota_each() {
    let server = Server::new();
    let limits = Limits::new().requests(Rate::per_second(100).burst(1));
    let members = [server.member(limits.clone()), server.member(limits)];
    let counts = [Arc::new(Mutex::new(0)), Arc::new(Mutex::new(0))];
    let mut tasks = JoinSet::new();
    let start = Instant::now();
    for (member, count) in members.iter().zip(&counts) {
        for _ in 0..200 {
            let (member, count) = (member.clone(), count.clone());
            tasks.spawn(async move {
                while start.elapsed() < Duration::from_secs(20) {
                    member.acquire(Cost::request()).await.unwrap();
                    *count.lock().unwrap() += 1;
                }
            });
        }
    }
    sleep_until(start + Duration::from_secs(20)).await;
    tasks.abort_all();
    let counts = counts.map(|count| *count.lock().unwrap());
    let sum: i32 = counts.iter().sum();
    assert!((1_990..=2_001).contains(&sum), "{counts:?}");
    assert!(counts.iter().all(|count| (850..=1_150).contains(count)), "{counts:?}");
    // There are fewer round trips than calls, because waiting calls share them.
    assert!(server.requests().len() < 1_500, "{}", server.requests().len());
}

#[tokio::test(start_paused = true)]
async fn requests_and_tokens_are_taken_both_or_neither() {
    let server = Server::new();
    let limits = Limits::new()
        .requests(Rate::per_second(10).burst(2))
        .tokens(Rate::per_second(100).burst(100));
    let limiter = server.member(limits);
    let start = Instant::now();
    assert_eq!(at(&limiter, Cost::tokens(100), start).await, 2);
    // The call waits 500 ms for its tokens. By then the bucket of requests is full again, with two.
    assert_eq!(at(&limiter, Cost::tokens(50), start).await, 501);
    assert_eq!(limiter.available().requests, Some(1));
    assert_eq!(at(&limiter, Cost::tokens(0), start).await, 503);
}

#[tokio::test(start_paused = true)]
async fn a_cost_above_a_burst_is_rejected_at_once_and_without_the_store() {
    let server = Server::new();
    let limiter = server.member(ten_a_second().tokens(Rate::per_second(100)));
    let error = limiter.acquire(Cost::tokens(101)).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "the call costs 101 tokens, more than the burst of 100: raise the burst or split the call"
    );
    assert!(server.requests().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_dropped_waiter_gives_back_its_reservation() {
    let server = Server::new();
    let limiter = server.member(Limits::new().requests(Rate::per_second(10).burst(5)));
    let start = Instant::now();
    for _ in 0..5 {
        limiter.acquire(Cost::request()).await.unwrap();
    }
    // The first waiter gets the reservation that is due 101 ms after the start.
    let (first, second) = (limiter.clone(), limiter.clone());
    let first = tokio::spawn(async move { first.acquire(Cost::request()).await });
    let second = tokio::spawn(async move { at(&second, Cost::request(), start).await });
    sleep(ms(20)).await;
    first.abort();
    // The second waiter is admitted at the time that the first one has given back.
    assert_eq!(second.await.unwrap(), 101);
    assert_eq!(at(&limiter, Cost::request(), start).await, 201);
}

#[tokio::test(start_paused = true)]
async fn a_reservation_that_is_not_polled_for_is_given_back() {
    let limiter = Server::new().member(ten_a_second());
    let start = Instant::now();
    limiter.acquire(Cost::request()).await.unwrap();
    let mut unpolled = tokio_test::task::spawn(limiter.acquire(Cost::request()));
    assert!(unpolled.poll().is_pending());
    // The call that is not polled holds the reservation that is due 102 ms after the start. The reservation is taken
    // back 6 ms later, and the next call cannot be admitted before that.
    let first = at(&limiter, Cost::request(), start).await;
    assert!((106..=130).contains(&first), "{first}");
    // The first call was reserved for when its request reached the server, and admitted when the reply arrived.
    let second = at(&limiter, Cost::request(), start).await;
    assert!((99..=100).contains(&(second - first)), "{first} {second}");
    assert_eq!(limiter.store_status().expired_reservations, 1);
    // When the first call is polled again, it gets another reservation.
    for _ in 0..120 {
        if unpolled.poll().is_ready() {
            return;
        }
        sleep(ms(1)).await;
    }
    panic!("the waiter is starved");
}

#[tokio::test(start_paused = true)]
async fn estimates_are_settled_for_all_members() {
    let server = Server::new();
    let limits = Limits::new().tokens(Rate::per_second(100).burst(1_000));
    let (one, other) = (server.member(limits.clone()), server.member(limits));
    let start = Instant::now();
    let estimate = one.acquire_estimate(Cost::tokens(1_000)).await.unwrap();
    // 300 of the estimated 1,000 tokens were used: 700 are given back within 20 ms.
    estimate.settle(Cost::tokens(300));
    sleep(ms(30)).await;
    assert_eq!(at(&other, Cost::tokens(700), start).await, 34);
    // The call uses 100 tokens more than estimated: this debt is paid off before the next call is admitted.
    let estimate = one.acquire_estimate(Cost::tokens(1)).await.unwrap();
    let begun = start.elapsed();
    estimate.settle(Cost::tokens(101));
    sleep(ms(30)).await;
    other.acquire(Cost::tokens(1)).await.unwrap();
    let waited = (start.elapsed() - begun).as_millis();
    assert!((1_000..1_030).contains(&waited), "{waited}");
}

#[tokio::test(start_paused = true)]
async fn a_pause_holds_all_members_and_gives_back_reservations() {
    let server = Server::new();
    let (one, other) = (server.member(ten_a_second()), server.member(ten_a_second()));
    let start = Instant::now();
    one.acquire(Cost::request()).await.unwrap();
    let waiting = tokio::spawn({
        let one = one.clone();
        async move { at(&one, Cost::request(), start).await }
    });
    sleep(ms(10)).await;
    one.pause_for(ms(1_000));
    sleep(ms(10)).await;
    // The other member learns of the pause with the store's first reply to it.
    assert_eq!(at(&other, Cost::request(), start).await, 1_013);
    // The waiting call had a reservation that was due 102 ms after the start, that is, within the pause.
    assert!((1_013..=1_116).contains(&waiting.await.unwrap()));
    assert!(one.available().paused_until.is_none());
}

#[tokio::test(start_paused = true)]
async fn a_pause_of_one_member_is_shortened_or_ended_by_another() {
    for is_resumed in [false, true] {
        let server = Server::new();
        let (one, other) = (server.member(ten_a_second()), server.member(ten_a_second()));
        one.acquire(Cost::request()).await.unwrap();
        other.acquire(Cost::request()).await.unwrap();
        let start = Instant::now();
        one.pause_for_provider(ms(60_000));
        one.pause_for(ms(90_000));
        sleep(ms(10)).await;
        let waiting = tokio::spawn({
            let one = one.clone();
            async move { at(&one, Cost::request(), start).await }
        });
        sleep(ms(500)).await;
        // The server announces no pauses in this test, so the other member learns of this one with its next request.
        sleep(ms(5_000)).await;
        let pause = other.paused().unwrap();
        assert_eq!(pause.source(), PauseSource::User);
        assert!((89_990..90_020).contains(&(pause.until() - start).as_millis()));
        other.pause_for(ms(1_000));
        sleep(ms(10)).await;
        let pause = other.paused().unwrap();
        assert_eq!(pause.source(), PauseSource::Provider);
        assert!((59_990..60_020).contains(&(pause.until() - start).as_millis()));
        if is_resumed {
            other.resume();
        }
        let waited = waiting.await.unwrap();
        if is_resumed {
            // The member that waits sends a request every 5 s at least.
            assert!((5_500..10_700).contains(&waited), "{waited}");
        } else {
            assert!((59_990..60_200).contains(&waited), "{waited}");
        }
        assert_eq!((one.paused(), other.paused()), (None, None));
    }
}

#[tokio::test(start_paused = true)]
async fn an_absurd_usage_is_bounded_and_can_be_forgiven() {
    let limits = || Limits::new().tokens(Rate::per_second(10).max_debt(20));
    for is_forgiven in [false, true] {
        let server = Server::new();
        let limiter = server.member(limits());
        let estimate = limiter.acquire_estimate(Cost::tokens(10)).await.unwrap();
        let start = Instant::now();
        estimate.settle(Cost::tokens(2_147_483_647));
        if is_forgiven {
            limiter.forgive_debts();
        }
        sleep(ms(50)).await;
        let waited = at(&limiter, Cost::tokens(10), start).await;
        let expected = if is_forgiven { 1_000 } else { 3_000 };
        assert!((expected..expected + 50).contains(&waited), "{waited}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_state_is_not_taken_for_kept_when_it_may_have_expired() {
    let server = Server::new();
    let limiter = server.member(ten_a_second());
    limiter.acquire(Cost::request()).await.unwrap();
    let losses = || limiter.store_status().state_losses;
    // The process stands still for longer than the store keeps the state for certain, and the state expires.
    server.lose_state();
    tokio::time::advance(ms(31_500)).await;
    sleep(ms(6_000)).await;
    assert_eq!(losses(), 0);
    server.lose_state();
    sleep(ms(6_000)).await;
    assert_eq!(losses(), 1);
}

#[tokio::test(start_paused = true)]
async fn limits_that_one_member_sets_apply_to_all() {
    let server = Server::new();
    let (one, other) = (server.member(ten_a_second()), server.member(ten_a_second()));
    one.acquire(Cost::request()).await.unwrap();
    other.acquire(Cost::request()).await.unwrap();
    let faster = Limits::new().requests(Rate::per_second(100).burst(5));
    one.set_limits(faster.clone()).unwrap();
    sleep(ms(10)).await;
    other.acquire(Cost::request()).await.unwrap();
    assert_eq!(other.limits(), faster);
    let begun = Instant::now();
    for _ in 0..100 {
        other.acquire(Cost::request()).await.unwrap();
    }
    let took = begun.elapsed().as_millis();
    assert!((950..=1_010).contains(&took), "{took}");
    // A member that starts with the same limits as the members before it does not undo the change: it takes over the
    // limits that were set since.
    let late = server.member(ten_a_second());
    late.acquire(Cost::request()).await.unwrap();
    assert_eq!(late.limits(), faster);
    // A member that starts with other limits than the members before it replaces the limits in force, for all members.
    let other_limits = Limits::new().requests(Rate::per_second(20).burst(2));
    let new = server.member(other_limits.clone());
    new.acquire(Cost::request()).await.unwrap();
    late.acquire(Cost::request()).await.unwrap();
    assert_eq!(late.limits(), other_limits);
}

#[tokio::test(start_paused = true)]
async fn a_waiting_call_is_rejected_when_the_limits_become_too_small_for_it() {
    let server = Server::new();
    let limits = Limits::new().tokens(Rate::per_second(100));
    let (one, other) = (server.member(limits.clone()), server.member(limits));
    one.acquire(Cost::tokens(100)).await.unwrap();
    // The five calls need more than may be reserved in advance, so some of them have no reservation when the limits
    // change.
    let waiting: Vec<_> = (0..5)
        .map(|_| {
            let other = other.clone();
            tokio::spawn(async move { other.acquire(Cost::tokens(100)).await })
        })
        .collect();
    sleep(ms(10)).await;
    one.set_limits(Limits::new().tokens(Rate::per_second(10))).unwrap();
    let mut rejected = 0;
    for call in waiting {
        let result = timeout(Duration::from_secs(60), call).await.unwrap().unwrap();
        rejected += usize::from(matches!(result, Err(AcquireError::CostExceedsBurst(_))));
    }
    assert!((1..5).contains(&rejected), "{rejected}");
}

#[tokio::test(start_paused = true)]
async fn what_a_provider_reports_as_remaining_counts_if_it_is_less() {
    let server = Server::new();
    let limits = Limits::new().tokens(Rate::per_second(100).burst(1_000));
    let (one, other) = (server.member(limits.clone()), server.member(limits));
    one.acquire(Cost::tokens(0)).await.unwrap();
    one.lower(Budget::Tokens, None, 10);
    one.lower(Budget::Tokens, None, 100_000);
    sleep(ms(5)).await;
    let begun = Instant::now();
    other.acquire(Cost::tokens(110)).await.unwrap();
    let waited = begun.elapsed().as_millis();
    assert!((990..=1_002).contains(&waited), "{waited}");
}

#[tokio::test(start_paused = true)]
async fn members_are_counted_until_they_leave() {
    let server = Server::new();
    let (one, other) = (server.member(ten_a_second()), server.member(ten_a_second()));
    assert_eq!((one.store_status().members, one.store_status().is_up), (1, false));
    other.acquire(Cost::request()).await.unwrap();
    one.acquire(Cost::request()).await.unwrap();
    assert_eq!((one.store_status().members, one.store_status().is_up), (2, true));
    drop(other);
    sleep(Duration::from_secs(6)).await;
    assert_eq!(one.store_status().members, 1);
    // A member without calls is still counted, because it sends heartbeats.
    let idle = server.member(ten_a_second());
    idle.acquire(Cost::request()).await.unwrap();
    sleep(Duration::from_secs(6)).await;
    assert_eq!(one.store_status().members, 2);
}

#[tokio::test(start_paused = true)]
async fn an_idle_member_sends_heartbeats_and_nothing_else() {
    let server = Server::new();
    let limiter = server.member(ten_a_second());
    limiter.acquire(Cost::request()).await.unwrap();
    sleep(Duration::from_secs(100)).await;
    // In 100 s the member sends its first request, perhaps a report that its call was settled, and a heartbeat every
    // five seconds.
    let requests = server.requests().len();
    assert!((20..=22).contains(&requests), "{requests}");
    let available = limiter.available();
    assert_eq!(
        (available.requests, available.tokens, available.paused_until),
        (Some(1), None, None)
    );
    drop(limiter);
    sleep(ms(10)).await;
    assert!(server.requests().last().unwrap().is_leaving);
    assert_eq!(server.requests().len(), requests + 1);
}

#[test]
fn a_limiter_outlives_the_runtime_that_it_was_used_in() {
    let server = {
        let runtime = runtime();
        runtime.block_on(async { Server::new() })
    };
    let limiter = server.member(ten_a_second());
    for _ in 0..3 {
        let runtime = runtime();
        runtime.block_on(async {
            limiter.acquire(Cost::request()).await.unwrap();
        });
        drop(runtime);
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

#[tokio::test(start_paused = true)]
async fn budgets_of_any_name_are_shared_in_whatever_order_members_name_them() {
    let server = Server::new();
    let limits = Limits::new()
        .budget("images", Rate::per_second(10).burst(4))
        .output_tokens(Rate::per_second(1_000).burst(500))
        .requests(Rate::per_second(100));
    let one = server.member(limits);
    let start = Instant::now();
    let estimate = one.acquire_estimate(Cost::input_output_tokens(9, 500).with("images", 3));
    let estimate = estimate.await.unwrap();
    assert_eq!(one.available().of("images"), Some(1));
    assert_eq!(one.available().output_tokens, Some(0));
    // The other member names the same rates in another order, which changes nothing about what is in the buckets.
    let limits = Limits::new()
        .requests(Rate::per_second(100))
        .output_tokens(Rate::per_second(1_000).burst(500))
        .budget("images", Rate::per_second(10).burst(4));
    let other = server.member(limits);
    assert_eq!(at(&other, Cost::request().with("images", 2), start).await, 101);
    // 400 of the output tokens and 3 images were not used. Without them, the bucket of images would have lost one.
    estimate.settle(Cost::input_output_tokens(9, 100));
    sleep(ms(30)).await;
    other
        .acquire(Cost::input_output_tokens(0, 450).with("images", 2))
        .await
        .unwrap();
    assert_eq!(start.elapsed(), ms(152));
}

#[tokio::test(start_paused = true)]
async fn a_budget_that_another_member_adds_is_charged_from_the_next_call_on() {
    let server = Server::new();
    let requests = || Limits::new().requests(Rate::per_second(1_000));
    let (one, other) = (server.member(requests()), server.member(requests()));
    one.acquire(Cost::request()).await.unwrap();
    other.acquire(Cost::request()).await.unwrap();
    one.set_limits(requests().budget("images", Rate::per_second(1).burst(2)))
        .unwrap();
    sleep(ms(10)).await;
    // The other member does not know of the new limit when it sends its first request.
    let start = Instant::now();
    let mut times = Vec::new();
    for _ in 0..4 {
        times.push(at(&other, Cost::request().with("images", 1), start).await / 1_000);
    }
    assert_eq!(times, [0, 0, 1, 2]);
}
