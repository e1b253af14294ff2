//! Members of one quota on the paused clock. Their store is the model of the script, behind a network that takes a
//! millisecond each way and can fail. So all times are exact.

use super::{
    driver::{Backend, ReplyFuture},
    loss::OnStoreLoss,
    shared::SharedRateLimiter,
    virtual_schedule::VirtualSchedule,
    wire::{StoreError, StoreRequest},
};
use crate::{
    error::AcquireError,
    rate::{
        buckets::Available,
        limits::{Budget, Cost, Limits, Rate},
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

/// A server, and the network to it.
#[derive(Clone)]
struct Server {
    state: Arc<Mutex<State>>,
    epoch: Instant,
}

struct State {
    schedule: VirtualSchedule,
    network: Network,
    requests: Vec<StoreRequest>,
}

#[derive(Clone, Copy, PartialEq)]
enum Network {
    Works,
    /// Requests fail at once.
    Refuses,
    /// Requests do not arrive, and there is no reply.
    Frozen,
    /// Requests are served, but the replies are lost.
    LosesReplies,
}

impl Server {
    fn new() -> Self {
        let state = State {
            schedule: VirtualSchedule::default(),
            network: Network::Works,
            requests: Vec::new(),
        };
        Self {
            state: Arc::new(Mutex::new(state)),
            epoch: Instant::now(),
        }
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

    fn member(&self, limits: Limits) -> SharedRateLimiter {
        self.member_with(SharedRateLimiter::builder(limits))
    }

    fn member_with(&self, builder: super::Builder) -> SharedRateLimiter {
        let server = self.clone();
        builder.build_with(Box::new(move || Box::new(server.clone()))).unwrap()
    }
}

impl Backend for Server {
    fn call<'a>(&'a mut self, request: &'a StoreRequest) -> ReplyFuture<'a> {
        Box::pin(async {
            let network = self.state.lock().unwrap().network;
            match network {
                Network::Refuses => return Err(StoreError::new("connection refused")),
                Network::Frozen => std::future::pending().await,
                Network::Works | Network::LosesReplies => sleep(ms(1)).await,
            }
            let now = 1 + i64::try_from(self.epoch.elapsed().as_micros()).unwrap();
            let reply = {
                let mut state = self.state.lock().unwrap();
                state.requests.push(request.clone());
                state.schedule.handle(request, now)
            };
            if network == Network::LosesReplies {
                std::future::pending().await
            }
            sleep(ms(1)).await;
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

/// Milliseconds from `start` until `cost` is admitted.
async fn at(limiter: &SharedRateLimiter, cost: Cost, start: Instant) -> u128 {
    limiter.acquire(cost).await.unwrap();
    start.elapsed().as_millis()
}

#[tokio::test(start_paused = true)]
async fn a_call_is_admitted_at_the_time_of_its_reservation_and_not_later() {
    let limiter = Server::new().member(ten_a_second());
    let start = Instant::now();
    // A round trip, and then one call every 100 ms.
    assert_eq!(at(&limiter, Cost::request(), start).await, 2);
    assert_eq!(at(&limiter, Cost::request(), start).await, 102);
    assert_eq!(at(&limiter, Cost::request(), start).await, 202);
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
    let expected: Vec<_> = (0..20).map(|number| (number, 2 + number)).collect();
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
    // Fewer round trips than calls.
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
    // Waits 500 ms for its tokens. By then both requests are back in their bucket.
    assert_eq!(at(&limiter, Cost::tokens(50), start).await, 502);
    assert_eq!(limiter.available().requests, Some(1));
    assert_eq!(at(&limiter, Cost::tokens(0), start).await, 504);
}

#[tokio::test(start_paused = true)]
async fn a_cost_above_a_burst_is_rejected_at_once_and_without_the_store() {
    let server = Server::new();
    let limiter = server.member(ten_a_second().tokens(Rate::per_second(100)));
    let error = limiter.acquire(Cost::tokens(101)).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "the call costs 101 tokens, more than the burst of 100"
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
    // Has the reservation for 102 ms.
    let (first, second) = (limiter.clone(), limiter.clone());
    let first = tokio::spawn(async move { first.acquire(Cost::request()).await });
    let second = tokio::spawn(async move { at(&second, Cost::request(), start).await });
    sleep(ms(20)).await;
    first.abort();
    // The second waiter takes its time.
    assert_eq!(second.await.unwrap(), 102);
    assert_eq!(at(&limiter, Cost::request(), start).await, 202);
}

#[tokio::test(start_paused = true)]
async fn a_reservation_that_is_not_polled_for_is_given_back() {
    let limiter = Server::new().member(ten_a_second());
    let start = Instant::now();
    limiter.acquire(Cost::request()).await.unwrap();
    let mut unpolled = tokio_test::task::spawn(limiter.acquire(Cost::request()));
    assert!(unpolled.poll().is_pending());
    // The reservation for 102 ms expires a little after its time.
    let first = at(&limiter, Cost::request(), start).await;
    assert!((106..=130).contains(&first), "{first}");
    assert_eq!(at(&limiter, Cost::request(), start).await, first + 100);
    assert_eq!(limiter.store().late, 1);
    // Once it is polled again, the waiter gets another reservation.
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
    // 300 were used: 700 are given back within 20 ms.
    estimate.settle(Cost::tokens(300));
    sleep(ms(30)).await;
    assert_eq!(at(&other, Cost::tokens(700), start).await, 34);
    // More was used than estimated: the debt is paid off before the next call is admitted.
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
    // The other member learns of the pause with its first reply.
    assert_eq!(at(&other, Cost::request(), start).await, 1_014);
    // The waiting call had a reservation for 102 ms.
    assert!((1_014..=1_116).contains(&waiting.await.unwrap()));
    assert!(one.available().paused_until.is_none());
    // A shorter pause does not end a longer one.
    one.pause_for(ms(500));
    one.pause_for(ms(100));
    let begun = Instant::now();
    one.acquire(Cost::request()).await.unwrap();
    assert!(begun.elapsed() >= ms(500));
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
    // A member that starts later with the old configuration takes over what was set.
    let late = server.member(ten_a_second());
    late.acquire(Cost::request()).await.unwrap();
    assert_eq!(late.limits(), faster);
    // A member that starts with another configuration replaces it.
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
    // More than may be reserved ahead.
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
async fn what_a_provider_reports_as_left_counts_if_it_is_less() {
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
    assert_eq!((one.store().members, one.store().is_up), (1, false));
    other.acquire(Cost::request()).await.unwrap();
    one.acquire(Cost::request()).await.unwrap();
    assert_eq!((one.store().members, one.store().is_up), (2, true));
    drop(other);
    sleep(Duration::from_secs(6)).await;
    assert_eq!(one.store().members, 1);
    // An idle member still counts.
    let idle = server.member(ten_a_second());
    idle.acquire(Cost::request()).await.unwrap();
    sleep(Duration::from_secs(6)).await;
    assert_eq!(one.store().members, 2);
}

#[tokio::test(start_paused = true)]
async fn closed_waits_for_the_store_and_admits_no_call_meanwhile() {
    let server = Server::new();
    let builder = SharedRateLimiter::builder(ten_a_second()).on_store_loss(OnStoreLoss::Closed);
    let limiter = server.member_with(builder);
    let start = Instant::now();
    limiter.acquire(Cost::request()).await.unwrap();
    server.set(Network::Refuses);
    let waiting = tokio::spawn({
        let limiter = limiter.clone();
        async move { at(&limiter, Cost::request(), start).await }
    });
    sleep(Duration::from_secs(5)).await;
    let status = limiter.store();
    assert!(!status.is_up && status.losses == 1 && !waiting.is_finished());
    server.set(Network::Works);
    // The store is probed once a second.
    let admitted = waiting.await.unwrap();
    assert!((5_000..6_010).contains(&admitted), "{admitted}");
    assert!(limiter.store().is_up);
    assert_eq!(limiter.store().degraded, 0);
}

#[tokio::test(start_paused = true)]
async fn closed_with_patience_fails_with_a_reason() {
    let server = Server::new();
    server.set(Network::Refuses);
    let builder = SharedRateLimiter::builder(ten_a_second()).on_store_loss(OnStoreLoss::Closed);
    let limiter = server.member_with(builder.patience(ms(300)));
    let begun = Instant::now();
    let error = limiter.acquire(Cost::request()).await.unwrap_err();
    assert_eq!(begun.elapsed(), ms(300));
    assert_eq!(
        error.to_string(),
        "the store of the shared limits is unavailable (connection refused); the call waited 300ms for it"
    );
}

#[tokio::test(start_paused = true)]
async fn open_admits_every_call_and_charges_it_afterwards() {
    let server = Server::new();
    let builder = SharedRateLimiter::builder(ten_a_second()).on_store_loss(OnStoreLoss::Open);
    let limiter = server.member_with(builder);
    limiter.acquire(Cost::request()).await.unwrap();
    server.set(Network::Refuses);
    let begun = Instant::now();
    for _ in 0..50 {
        limiter.acquire(Cost::request()).await.unwrap();
    }
    // The first call waits for the third failure.
    assert!(begun.elapsed() < ms(100), "{:?}", begun.elapsed());
    assert_eq!(limiter.store().degraded, 50);
    server.set(Network::Works);
    sleep(Duration::from_secs(1)).await;
    let begun = Instant::now();
    limiter.acquire(Cost::request()).await.unwrap();
    // 50 calls at ten a second, less what the rate has brought meanwhile.
    assert!(
        (3_500..5_100).contains(&begun.elapsed().as_millis()),
        "{:?}",
        begun.elapsed()
    );
}

#[tokio::test(start_paused = true)]
async fn a_pause_also_holds_calls_that_are_admitted_without_the_store() {
    let server = Server::new();
    server.set(Network::Refuses);
    let limiter = server.member_with(SharedRateLimiter::builder(ten_a_second()).on_store_loss(OnStoreLoss::Open));
    limiter.acquire(Cost::request()).await.unwrap();
    let begun = Instant::now();
    limiter.pause_for(ms(700));
    limiter.acquire(Cost::request()).await.unwrap();
    assert!(
        (700..=701).contains(&begun.elapsed().as_millis()),
        "{:?}",
        begun.elapsed()
    );
}

#[tokio::test(start_paused = true)]
async fn a_client_that_panics_counts_as_a_lost_store() {
    struct Panics;
    impl Backend for Panics {
        fn call<'a>(&'a mut self, _: &'a StoreRequest) -> ReplyFuture<'a> {
            panic!("there is no reactor running")
        }
    }
    let builder = SharedRateLimiter::builder(ten_a_second());
    let limiter = builder.build_with(Box::new(|| Box::new(Panics))).unwrap();
    let begun = Instant::now();
    for _ in 0..3 {
        limiter.acquire(Cost::request()).await.unwrap();
    }
    assert!(begun.elapsed() < ms(2_000), "{:?}", begun.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_local_share_is_the_rate_divided_by_the_members_and_has_no_burst() {
    let server = Server::new();
    let limits = Limits::new().requests(Rate::per_second(100).burst(50));
    let members = [0; 4].map(|_| server.member(limits.clone()));
    for member in &members {
        member.acquire(Cost::request()).await.unwrap();
    }
    sleep(Duration::from_secs(6)).await;
    assert!(members.iter().all(|member| member.store().members == 4));
    server.set(Network::Frozen);
    let begun = Instant::now();
    let mut times = Vec::new();
    for _ in 0..50 {
        members[0].acquire(Cost::request()).await.unwrap();
        times.push(begun.elapsed().as_millis());
    }
    // Three timeouts of 500 ms until the store is lost. From then on one call every 40 ms.
    assert!((1_600..1_800).contains(&times[0]), "{times:?}");
    assert!(
        times.windows(2).all(|pair| (39..=41).contains(&(pair[1] - pair[0]))),
        "{times:?}"
    );
    assert_eq!(members[0].store().degraded, 50);
    // Nothing is saved up while the member is idle.
    sleep(Duration::from_secs(10)).await;
    let begun = Instant::now();
    for _ in 0..5 {
        members[0].acquire(Cost::request()).await.unwrap();
    }
    assert!(
        (199..=205).contains(&begun.elapsed().as_millis()),
        "{:?}",
        begun.elapsed()
    );
}

#[tokio::test(start_paused = true)]
async fn local_shares_stay_within_the_limits_if_all_members_have_lost_the_store() {
    let server = Server::new();
    let limits = Limits::new()
        .requests(Rate::per_second(100).burst(20))
        .tokens(Rate::per_second(10_000).burst(2_000));
    let members = [0; 3].map(|_| server.member(limits.clone()));
    let start = Instant::now();
    let admitted: Arc<Mutex<Vec<(Duration, u64)>>> = Arc::default();
    let mut tasks = JoinSet::new();
    for member in &members {
        for index in 0..40_u64 {
            let (member, admitted) = (member.clone(), admitted.clone());
            tasks.spawn(async move {
                for round in 0.. {
                    let tokens = 20 + (index * 37 + round * 61) % 300;
                    member.acquire(Cost::tokens(tokens)).await.unwrap();
                    admitted.lock().unwrap().push((start.elapsed(), tokens));
                }
            });
        }
    }
    sleep(Duration::from_secs(5)).await;
    server.set(Network::Refuses);
    sleep(Duration::from_secs(5)).await;
    server.set(Network::Works);
    sleep(Duration::from_secs(5)).await;
    server.set(Network::LosesReplies);
    sleep(Duration::from_secs(5)).await;
    server.set(Network::Works);
    sleep(Duration::from_secs(5)).await;
    tasks.abort_all();
    let admitted = admitted.lock().unwrap().clone();
    let degraded: u64 = members.iter().map(|member| member.store().degraded).sum();
    assert!(degraded > 100, "{degraded}");
    // Timers are a millisecond coarse, and the network takes one.
    let over = max_excess(&admitted, 10_000.0, 2_000.0, |tokens| tokens as f64);
    assert!(over <= 30.0, "{over} tokens over");
    let over = max_excess(&admitted, 100.0, 20.0, |_| 1.0);
    assert!(over <= 0.3, "{over} requests over");
    let sum: u64 = admitted.iter().map(|(_, tokens)| tokens).sum();
    // Some is wasted: the time until a loss is noticed, and reservations whose replies were lost.
    assert!(sum > 25 * 10_000 * 70 / 100, "{sum}");
}

/// By how much the admissions exceed an exact bucket of this rate and burst.
fn max_excess(admitted: &[(Duration, u64)], rate: f64, burst: f64, weight: impl Fn(u64) -> f64) -> f64 {
    let (mut level, mut last, mut worst) = (0.0_f64, Duration::ZERO, 0.0_f64);
    for (at, tokens) in admitted {
        level = (level - (*at - last).as_secs_f64() * rate).max(0.0) + weight(*tokens);
        last = *at;
        worst = worst.max(level - burst);
    }
    worst
}

#[tokio::test(start_paused = true)]
async fn a_store_that_has_lost_its_state_begins_empty() {
    let server = Server::new();
    let limits = Limits::new().requests(Rate::per_second(100).burst(100));
    let limiter = server.member(limits);
    limiter.acquire(Cost::request()).await.unwrap();
    server.lose_state();
    let begun = Instant::now();
    limiter.acquire(Cost::request()).await.unwrap();
    // A second for what other members may have reserved, and then the time for one request.
    assert_eq!(begun.elapsed().as_millis(), 1_012);
    assert_eq!(limiter.store().state_losses, 1);
    let begun = Instant::now();
    for _ in 0..50 {
        limiter.acquire(Cost::request()).await.unwrap();
    }
    assert!(
        (499..=503).contains(&begun.elapsed().as_millis()),
        "{:?}",
        begun.elapsed()
    );
}

#[tokio::test(start_paused = true)]
async fn a_store_that_is_down_at_the_start_is_found_later() {
    let server = Server::new();
    server.set(Network::Refuses);
    let limiter = server.member_with(SharedRateLimiter::builder(ten_a_second()).members(2));
    let begun = Instant::now();
    for _ in 0..5 {
        limiter.acquire(Cost::request()).await.unwrap();
    }
    // Half of the rate: one call every 200 ms.
    assert!(
        (1_000..1_300).contains(&begun.elapsed().as_millis()),
        "{:?}",
        begun.elapsed()
    );
    assert_eq!(limiter.store().degraded, 5);
    server.set(Network::Works);
    sleep(Duration::from_secs(2)).await;
    assert!(limiter.store().is_up);
    limiter.acquire(Cost::request()).await.unwrap();
    assert_eq!(limiter.store().degraded, 5);
}

#[tokio::test(start_paused = true)]
async fn no_call_waits_longer_than_its_deadline() {
    let server = Server::new();
    let limiter = server.member_with(SharedRateLimiter::builder(ten_a_second()).on_store_loss(OnStoreLoss::Closed));
    limiter.acquire(Cost::request()).await.unwrap();
    for network in [Network::Refuses, Network::Frozen, Network::LosesReplies] {
        server.set(network);
        let begun = Instant::now();
        assert!(timeout(ms(700), limiter.acquire(Cost::request())).await.is_err());
        assert_eq!(begun.elapsed(), ms(700));
        server.set(Network::Works);
        timeout(Duration::from_secs(5), limiter.acquire(Cost::request()))
            .await
            .unwrap()
            .unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn an_idle_member_sends_heartbeats_and_nothing_else() {
    let server = Server::new();
    let limiter = server.member(ten_a_second());
    limiter.acquire(Cost::request()).await.unwrap();
    sleep(Duration::from_secs(100)).await;
    // The first request, the settled estimate, and a heartbeat every five seconds.
    let requests = server.requests().len();
    assert!((20..=22).contains(&requests), "{requests}");
    assert_eq!(
        limiter.available(),
        Available {
            requests: Some(1),
            tokens: None,
            paused_until: None
        }
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
