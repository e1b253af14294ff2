//! Members of one quota on the paused clock. Their store is the model of the script, over a wire that takes a
//! millisecond each way and can be cut; so every time is exact.

use super::{
    driver::Backend,
    loss::OnStoreLoss,
    shared::SharedRateLimiter,
    store::StoreError,
    virtual_schedule::VirtualSchedule,
    wire::{StoreReply, StoreRequest},
};
use crate::{
    error::AcquireError,
    rate::{
        buckets::Available,
        limits::{Budget, Cost, Limits, Rate},
    },
};
use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, sleep_until, timeout},
};

/// A server, and the wire to it.
#[derive(Clone)]
struct Server {
    state: Arc<Mutex<State>>,
    epoch: Instant,
}

struct State {
    frontier: VirtualSchedule,
    wire: Wire,
    asks: Vec<StoreRequest>,
}

#[derive(Clone, Copy, PartialEq)]
enum Wire {
    Works,
    /// Answers with an error, at once.
    Refuses,
    /// Takes and never answers.
    Frozen,
    /// The script runs, the answer is lost.
    LosesAnswers,
}

impl Server {
    fn new() -> Self {
        let state = State {
            frontier: VirtualSchedule::default(),
            wire: Wire::Works,
            asks: Vec::new(),
        };
        Self {
            state: Arc::new(Mutex::new(state)),
            epoch: Instant::now(),
        }
    }

    fn set(&self, wire: Wire) {
        self.state.lock().unwrap().wire = wire;
    }

    fn forgets(&self) {
        self.state.lock().unwrap().frontier = VirtualSchedule::default();
    }

    fn asks(&self) -> Vec<StoreRequest> {
        self.state.lock().unwrap().asks.clone()
    }

    fn member(&self, limits: Limits) -> SharedRateLimiter {
        self.member_with(SharedRateLimiter::builder(limits))
    }

    fn member_with(&self, builder: super::Builder) -> SharedRateLimiter {
        let server = self.clone();
        SharedRateLimiter::new(builder.office(Box::new(move || Box::new(server.clone()))).unwrap())
    }
}

impl Backend for Server {
    fn call<'a>(
        &'a mut self,
        ask: &'a StoreRequest,
    ) -> Pin<Box<dyn Future<Output = Result<StoreReply, StoreError>> + Send + 'a>> {
        Box::pin(async {
            let wire = self.state.lock().unwrap().wire;
            match wire {
                Wire::Refuses => return Err(StoreError::new("it refused the connection")),
                Wire::Frozen => std::future::pending().await,
                Wire::Works | Wire::LosesAnswers => sleep(ms(1)).await,
            }
            let now = 1 + i64::try_from(self.epoch.elapsed().as_micros()).unwrap();
            let answer = {
                let mut state = self.state.lock().unwrap();
                state.asks.push(ask.clone());
                state.frontier.call(ask, now)
            };
            if wire == Wire::LosesAnswers {
                std::future::pending().await
            }
            sleep(ms(1)).await;
            Ok(answer)
        })
    }
}

const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn ten_a_second() -> Limits {
    Limits::new().requests(Rate::per_second(10).burst(1))
}

async fn at(limiter: &SharedRateLimiter, cost: Cost, start: Instant) -> u128 {
    limiter.acquire(cost).await.unwrap();
    start.elapsed().as_millis()
}

#[tokio::test(start_paused = true)]
async fn a_member_waits_for_its_moment_and_no_longer() {
    let limiter = Server::new().member(ten_a_second());
    let start = Instant::now();
    // There and back, and then every 100 ms by the server's clock; what it grants is used a way back later.
    assert_eq!(at(&limiter, Cost::request(), start).await, 2);
    assert_eq!(at(&limiter, Cost::request(), start).await, 102);
    assert_eq!(at(&limiter, Cost::request(), start).await, 202);
}

#[tokio::test(start_paused = true)]
async fn those_who_wait_go_in_order_and_in_one_round_trip() {
    let server = Server::new();
    let limiter = server.member(Limits::new().requests(Rate::per_second(1_000).burst(1)));
    let start = Instant::now();
    let mut calls = JoinSet::new();
    for number in 0..20_u128 {
        let limiter = limiter.clone();
        calls.spawn(async move { (number, at(&limiter, Cost::request(), start).await) });
    }
    let mut went = calls.join_all().await;
    went.sort_unstable();
    let expected: Vec<_> = (0..20).map(|number| (number, 2 + number)).collect();
    assert_eq!(went, expected);
    assert_eq!(server.asks()[0].costs.len(), 20);
}

#[tokio::test(start_paused = true)]
async fn two_members_share_and_each_gets_half() {
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
    let all: i32 = counts.iter().sum();
    assert!((1_990..=2_001).contains(&all), "{counts:?}");
    assert!(counts.iter().all(|count| (850..=1_150).contains(count)), "{counts:?}");
    // Not a round trip for each call.
    assert!(server.asks().len() < 1_500, "{}", server.asks().len());
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
    // Waits 500 ms for its tokens; by then both requests are there again.
    assert_eq!(at(&limiter, Cost::tokens(50), start).await, 502);
    assert_eq!(limiter.available().requests, Some(1));
    assert_eq!(at(&limiter, Cost::tokens(0), start).await, 504);
}

#[tokio::test(start_paused = true)]
async fn what_can_never_pass_is_refused_at_once_and_without_the_store() {
    let server = Server::new();
    let limiter = server.member(ten_a_second().tokens(Rate::per_second(100)));
    let error = limiter.acquire(Cost::tokens(101)).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "the call costs 101 tokens, more than the burst of 100"
    );
    assert!(server.asks().is_empty());
}

#[tokio::test(start_paused = true)]
async fn who_leaves_gives_back_what_was_reserved_for_it() {
    let server = Server::new();
    let limiter = server.member(Limits::new().requests(Rate::per_second(10).burst(5)));
    let start = Instant::now();
    for _ in 0..5 {
        limiter.acquire(Cost::request()).await.unwrap();
    }
    // Reserves the moment at 100 ms.
    let (leaves, stays) = (limiter.clone(), limiter.clone());
    let leaves = tokio::spawn(async move { leaves.acquire(Cost::request()).await });
    let stays = tokio::spawn(async move { at(&stays, Cost::request(), start).await });
    sleep(ms(20)).await;
    leaves.abort();
    // It is free again.
    assert_eq!(stays.await.unwrap(), 102);
    assert_eq!(at(&limiter, Cost::request(), start).await, 202);
}

#[tokio::test(start_paused = true)]
async fn a_reservation_that_nobody_polls_for_is_given_back_and_holds_up_nobody() {
    let limiter = Server::new().member(ten_a_second());
    let start = Instant::now();
    limiter.acquire(Cost::request()).await.unwrap();
    let mut silent = tokio_test::task::spawn(limiter.acquire(Cost::request()));
    assert!(silent.poll().is_pending());
    // A little after 100 ms, when it is clear that nobody comes.
    let first = at(&limiter, Cost::request(), start).await;
    assert!((106..=130).contains(&first), "{first}");
    assert_eq!(at(&limiter, Cost::request(), start).await, first + 100);
    assert_eq!(limiter.store().late, 1);
    // Its moment is over; what it had is back, and it has to ask again.
    for _ in 0..120 {
        if silent.poll().is_ready() {
            return;
        }
        sleep(ms(1)).await;
    }
    panic!("it is starved");
}

#[tokio::test(start_paused = true)]
async fn estimates_are_settled_for_everybody() {
    let server = Server::new();
    let limits = Limits::new().tokens(Rate::per_second(100).burst(1_000));
    let (one, other) = (server.member(limits.clone()), server.member(limits));
    let start = Instant::now();
    let estimate = one.acquire_estimate(Cost::tokens(1_000)).await.unwrap();
    // 300 were used: 700 come back within 20 ms.
    estimate.settle(Cost::tokens(300));
    sleep(ms(30)).await;
    assert_eq!(at(&other, Cost::tokens(700), start).await, 34);
    // More was used than estimated: it is paid for before anybody goes.
    let estimate = one.acquire_estimate(Cost::tokens(1)).await.unwrap();
    let begun = start.elapsed();
    estimate.settle(Cost::tokens(101));
    sleep(ms(30)).await;
    other.acquire(Cost::tokens(1)).await.unwrap();
    let waited = (start.elapsed() - begun).as_millis();
    assert!((1_000..1_030).contains(&waited), "{waited}");
}

#[tokio::test(start_paused = true)]
async fn a_pause_holds_everybody_and_gives_back_what_was_reserved() {
    let server = Server::new();
    let (one, other) = (server.member(ten_a_second()), server.member(ten_a_second()));
    let start = Instant::now();
    one.acquire(Cost::request()).await.unwrap();
    let waits = tokio::spawn({
        let one = one.clone();
        async move { at(&one, Cost::request(), start).await }
    });
    sleep(ms(10)).await;
    one.pause_for(ms(1_000));
    sleep(ms(10)).await;
    // The other hears of it with its first answer.
    assert_eq!(at(&other, Cost::request(), start).await, 1_014);
    // It had the moment at 102 ms.
    assert!((1_014..=1_116).contains(&waits.await.unwrap()));
    assert!(one.available().paused_until.is_none());
    // Only ever extends.
    one.pause_for(ms(500));
    one.pause_for(ms(100));
    let begun = Instant::now();
    one.acquire(Cost::request()).await.unwrap();
    assert!(begun.elapsed() >= ms(500));
}

#[tokio::test(start_paused = true)]
async fn limits_that_one_sets_hold_for_all() {
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
    // Who comes later with the old configuration takes over what was set.
    let late = server.member(ten_a_second());
    late.acquire(Cost::request()).await.unwrap();
    assert_eq!(late.limits(), faster);
    // And who comes with another one, brings it.
    let other_limits = Limits::new().requests(Rate::per_second(20).burst(2));
    let new = server.member(other_limits.clone());
    new.acquire(Cost::request()).await.unwrap();
    late.acquire(Cost::request()).await.unwrap();
    assert_eq!(late.limits(), other_limits);
}

#[tokio::test(start_paused = true)]
async fn who_waits_is_refused_when_limits_become_too_small_for_it() {
    let server = Server::new();
    let limits = Limits::new().tokens(Rate::per_second(100));
    let (one, other) = (server.member(limits.clone()), server.member(limits));
    one.acquire(Cost::tokens(100)).await.unwrap();
    // Beyond what may be reserved ahead.
    let waiting: Vec<_> = (0..5)
        .map(|_| {
            let other = other.clone();
            tokio::spawn(async move { other.acquire(Cost::tokens(100)).await })
        })
        .collect();
    sleep(ms(10)).await;
    one.set_limits(Limits::new().tokens(Rate::per_second(10))).unwrap();
    let mut refused = 0;
    for call in waiting {
        let result = timeout(Duration::from_secs(60), call).await.unwrap().unwrap();
        refused += usize::from(matches!(result, Err(AcquireError::CostExceedsBurst(_))));
    }
    assert!((1..5).contains(&refused), "{refused}");
}

#[tokio::test(start_paused = true)]
async fn what_a_provider_says_is_left_is_believed_if_it_is_less() {
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
async fn members_are_counted_and_who_leaves_is_none() {
    let server = Server::new();
    let (one, other) = (server.member(ten_a_second()), server.member(ten_a_second()));
    assert_eq!((one.store().members, one.store().is_up), (1, false));
    other.acquire(Cost::request()).await.unwrap();
    one.acquire(Cost::request()).await.unwrap();
    assert_eq!((one.store().members, one.store().is_up), (2, true));
    drop(other);
    sleep(Duration::from_secs(6)).await;
    assert_eq!(one.store().members, 1);
    // Who says nothing any more is forgotten after a while.
    let silent = server.member(ten_a_second());
    silent.acquire(Cost::request()).await.unwrap();
    sleep(Duration::from_secs(6)).await;
    assert_eq!(one.store().members, 2);
}

#[tokio::test(start_paused = true)]
async fn closed_waits_for_the_store_and_takes_nothing_meanwhile() {
    let server = Server::new();
    let builder = SharedRateLimiter::builder(ten_a_second()).on_store_loss(OnStoreLoss::Closed);
    let limiter = server.member_with(builder);
    let start = Instant::now();
    limiter.acquire(Cost::request()).await.unwrap();
    server.set(Wire::Refuses);
    let waits = tokio::spawn({
        let limiter = limiter.clone();
        async move { at(&limiter, Cost::request(), start).await }
    });
    sleep(Duration::from_secs(5)).await;
    let status = limiter.store();
    assert!(!status.is_up && status.losses == 1 && !waits.is_finished());
    server.set(Wire::Works);
    // The probe comes once a second.
    let went = waits.await.unwrap();
    assert!((5_000..6_010).contains(&went), "{went}");
    assert!(limiter.store().is_up);
    assert_eq!(limiter.store().degraded, 0);
}

#[tokio::test(start_paused = true)]
async fn closed_with_patience_fails_with_a_reason() {
    let server = Server::new();
    server.set(Wire::Refuses);
    let builder = SharedRateLimiter::builder(ten_a_second()).on_store_loss(OnStoreLoss::Closed);
    let limiter = server.member_with(builder.patience(ms(300)));
    let begun = Instant::now();
    let error = limiter.acquire(Cost::request()).await.unwrap_err();
    assert_eq!(begun.elapsed(), ms(300));
    assert_eq!(
        error.to_string(),
        "the store of the shared limits is lost (it refused the connection), and was waited for 300ms"
    );
}

#[tokio::test(start_paused = true)]
async fn open_admits_everybody_and_charges_it_afterwards() {
    let server = Server::new();
    let builder = SharedRateLimiter::builder(ten_a_second()).on_store_loss(OnStoreLoss::Open);
    let limiter = server.member_with(builder);
    limiter.acquire(Cost::request()).await.unwrap();
    server.set(Wire::Refuses);
    let begun = Instant::now();
    for _ in 0..50 {
        limiter.acquire(Cost::request()).await.unwrap();
    }
    // The first waits for the third failure.
    assert!(begun.elapsed() < ms(100), "{:?}", begun.elapsed());
    assert_eq!(limiter.store().degraded, 50);
    server.set(Wire::Works);
    sleep(Duration::from_secs(1)).await;
    let begun = Instant::now();
    limiter.acquire(Cost::request()).await.unwrap();
    // 50 at ten a second, less what came in meanwhile.
    assert!(
        (3_500..5_100).contains(&begun.elapsed().as_millis()),
        "{:?}",
        begun.elapsed()
    );
}

#[tokio::test(start_paused = true)]
async fn a_pause_holds_also_who_is_let_through_without_the_store() {
    let server = Server::new();
    server.set(Wire::Refuses);
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
async fn a_store_that_panics_is_a_store_that_is_lost() {
    struct Panics;
    impl Backend for Panics {
        fn call<'a>(
            &'a mut self,
            _: &'a StoreRequest,
        ) -> Pin<Box<dyn Future<Output = Result<StoreReply, StoreError>> + Send + 'a>> {
            panic!("there is no reactor running")
        }
    }
    let builder = SharedRateLimiter::builder(ten_a_second());
    let limiter = SharedRateLimiter::new(builder.office(Box::new(|| Box::new(Panics))).unwrap());
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
    server.set(Wire::Frozen);
    let begun = Instant::now();
    let mut times = Vec::new();
    for _ in 0..50 {
        members[0].acquire(Cost::request()).await.unwrap();
        times.push(begun.elapsed().as_millis());
    }
    // Three timeouts of 500 ms until it is lost; from then on, one in 40 ms.
    assert!((1_600..1_800).contains(&times[0]), "{times:?}");
    assert!(
        times.windows(2).all(|pair| (39..=41).contains(&(pair[1] - pair[0]))),
        "{times:?}"
    );
    assert_eq!(members[0].store().degraded, 50);
    // A rest saves up nothing.
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
async fn a_local_share_never_lets_through_more_than_the_limits_if_all_have_lost_the_store() {
    let server = Server::new();
    let limits = Limits::new()
        .requests(Rate::per_second(100).burst(20))
        .tokens(Rate::per_second(10_000).burst(2_000));
    let members = [0; 3].map(|_| server.member(limits.clone()));
    let start = Instant::now();
    let went: Arc<Mutex<Vec<(Duration, u64)>>> = Arc::default();
    let mut tasks = JoinSet::new();
    for member in &members {
        for index in 0..40_u64 {
            let (member, went) = (member.clone(), went.clone());
            tasks.spawn(async move {
                for round in 0.. {
                    let tokens = 20 + (index * 37 + round * 61) % 300;
                    member.acquire(Cost::tokens(tokens)).await.unwrap();
                    went.lock().unwrap().push((start.elapsed(), tokens));
                }
            });
        }
    }
    sleep(Duration::from_secs(5)).await;
    server.set(Wire::Refuses);
    sleep(Duration::from_secs(5)).await;
    server.set(Wire::Works);
    sleep(Duration::from_secs(5)).await;
    server.set(Wire::LosesAnswers);
    sleep(Duration::from_secs(5)).await;
    server.set(Wire::Works);
    sleep(Duration::from_secs(5)).await;
    tasks.abort_all();
    let went = went.lock().unwrap().clone();
    let degraded: u64 = members.iter().map(|member| member.store().degraded).sum();
    assert!(degraded > 100, "{degraded}");
    // Timers are a millisecond coarse, and the wire takes one.
    let over = worst(&went, 10_000.0, 2_000.0, |tokens| tokens as f64);
    assert!(over <= 30.0, "{over} tokens over");
    let over = worst(&went, 100.0, 20.0, |_| 1.0);
    assert!(over <= 0.3, "{over} requests over");
    let sum: u64 = went.iter().map(|(_, tokens)| tokens).sum();
    // What was lost: frozen phases until they were noticed, and answers that were lost with their reservations.
    assert!(sum > 25 * 10_000 * 70 / 100, "{sum}");
}

/// By how much a bucket that allows exactly this would have been exceeded.
fn worst(went: &[(Duration, u64)], rate: f64, burst: f64, weight: impl Fn(u64) -> f64) -> f64 {
    let (mut level, mut last, mut worst) = (0.0_f64, Duration::ZERO, 0.0_f64);
    for (at, tokens) in went {
        level = (level - (*at - last).as_secs_f64() * rate).max(0.0) + weight(*tokens);
        last = *at;
        worst = worst.max(level - burst);
    }
    worst
}

#[tokio::test(start_paused = true)]
async fn a_store_that_has_lost_its_state_begins_anew_and_empty() {
    let server = Server::new();
    let limits = Limits::new().requests(Rate::per_second(100).burst(100));
    let limiter = server.member(limits);
    limiter.acquire(Cost::request()).await.unwrap();
    server.forgets();
    let begun = Instant::now();
    limiter.acquire(Cost::request()).await.unwrap();
    // A second for what others may have reserved, and one request.
    assert_eq!(begun.elapsed().as_millis(), 1_012);
    assert_eq!(limiter.store().forgotten, 1);
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
async fn a_store_that_is_away_at_the_start_is_found_later() {
    let server = Server::new();
    server.set(Wire::Refuses);
    let limiter = server.member_with(SharedRateLimiter::builder(ten_a_second()).members(2));
    let begun = Instant::now();
    for _ in 0..5 {
        limiter.acquire(Cost::request()).await.unwrap();
    }
    // Half of the rate: one in 200 ms.
    assert!(
        (1_000..1_300).contains(&begun.elapsed().as_millis()),
        "{:?}",
        begun.elapsed()
    );
    assert_eq!(limiter.store().degraded, 5);
    server.set(Wire::Works);
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
    for wire in [Wire::Refuses, Wire::Frozen, Wire::LosesAnswers] {
        server.set(wire);
        let begun = Instant::now();
        assert!(timeout(ms(700), limiter.acquire(Cost::request())).await.is_err());
        assert_eq!(begun.elapsed(), ms(700));
        server.set(Wire::Works);
        timeout(Duration::from_secs(5), limiter.acquire(Cost::request()))
            .await
            .unwrap()
            .unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn an_idle_member_says_that_it_is_there_and_nothing_else() {
    let server = Server::new();
    let limiter = server.member(ten_a_second());
    limiter.acquire(Cost::request()).await.unwrap();
    sleep(Duration::from_secs(100)).await;
    // The first, that it was used, and every five seconds.
    let asks = server.asks().len();
    assert!((20..=22).contains(&asks), "{asks}");
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
    assert!(server.asks().last().unwrap().leaves);
    assert_eq!(server.asks().len(), asks + 1);
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
