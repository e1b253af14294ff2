//! Tests of the guarantees of `RateLimiter`, on Tokio's paused clock.

mod support;

use futures_util::{StreamExt, stream::FuturesUnordered};
use std::{
    sync::{Arc, Mutex},
    time::Duration,
};
use support::{ms, pass, settle};
use tokio::time::{Instant, advance, sleep};
use tokio_test::{assert_pending, assert_ready, assert_ready_err, assert_ready_ok, task};
use tower_outbound::{
    Cost, Limits, Rate, RateLimiter,
    error::{AcquireError, CostExceedsBurst},
};

const ONE: Cost = Cost::request();

fn requests(rate: Rate) -> RateLimiter {
    RateLimiter::new(Limits::new().requests(rate)).unwrap()
}

fn tokens(rate: Rate) -> RateLimiter {
    RateLimiter::new(Limits::new().tokens(rate)).unwrap()
}

/// Returns the error of a cost that exceeds a burst.
fn exceeded(error: &AcquireError) -> CostExceedsBurst {
    match error {
        AcquireError::CostExceedsBurst(error) => *error,
        other => panic!("{other}"),
    }
}

/// Runs `callers` loops that each call `acquire` again as soon as a call is admitted, for the time `run`. Returns for
/// each admitted call the time of its admission and its cost.
async fn run_callers(
    limiter: &RateLimiter,
    callers: usize,
    run: Duration,
    cost: impl Fn(usize) -> Cost,
) -> Vec<(Duration, Cost)> {
    let start = Instant::now();
    let admitted = Mutex::new(Vec::new());
    let callers: FuturesUnordered<_> = (0..callers)
        .map(|caller| {
            let (admitted, cost) = (&admitted, cost(caller));
            async move {
                while start.elapsed() < run {
                    limiter.acquire(cost).await.unwrap();
                    admitted.lock().unwrap().push((start.elapsed(), cost));
                    tokio::task::yield_now().await;
                }
            }
        })
        .collect();
    let _: Vec<()> = callers.collect().await;
    let mut admitted = admitted.into_inner().unwrap();
    admitted.retain(|(at, _)| *at <= run);
    admitted
}

/// Returns the largest value of `admitted - rate x T` over all windows of any length T. This is the burst that a
/// limiter allowed, as observed from outside.
fn empirical_burst(admitted: &[(Duration, u64)], per_second: f64) -> f64 {
    let mut sum = 0.0;
    let mut min = f64::MAX;
    let mut max: f64 = 0.0;
    for (at, cost) in admitted {
        let filled = per_second * at.as_secs_f64();
        min = f64::min(min, sum - filled);
        sum += *cost as f64;
        max = max.max(sum - filled - min);
    }
    max
}

#[tokio::test(start_paused = true)]
async fn a_burst_is_admitted_at_once_and_the_rest_at_the_rate() {
    let limiter = requests(Rate::per_second(10).burst(3));
    let start = Instant::now();
    let mut times = Vec::new();
    for _ in 0..6 {
        limiter.acquire(ONE).await.unwrap();
        times.push(start.elapsed());
    }
    assert_eq!(times, [ms(0), ms(0), ms(0), ms(100), ms(200), ms(300)]);
}

#[tokio::test(start_paused = true)]
async fn the_initial_fill_can_be_less_than_the_burst() {
    let limiter = requests(Rate::per_second(10).burst(3).initial(0));
    let start = Instant::now();
    limiter.acquire(ONE).await.unwrap();
    assert_eq!(start.elapsed(), ms(100));
    sleep(ms(10_000)).await;
    assert_eq!(limiter.available().requests, Some(3));
}

#[tokio::test(start_paused = true)]
async fn no_window_admits_more_than_burst_and_rate_and_the_rate_is_reached() {
    for (per_second, burst) in [
        (100_u64, 1_u64),
        (100, 10),
        (1_000, 1),
        (1_000, 100),
        (20_000, 1),
        (20_000, 200),
    ] {
        let limiter = requests(Rate::per_second(per_second).burst(burst));
        let run = Duration::from_secs(4);
        let admitted = run_callers(&limiter, 64, run, |_| ONE).await;
        let counted: Vec<_> = admitted.iter().map(|(at, _)| (*at, 1)).collect();

        let achieved = admitted.len() as f64 / (burst as f64 + per_second as f64 * run.as_secs_f64());
        assert!(
            achieved > 0.995,
            "{per_second}/s, burst {burst}: reached {achieved:.4} of the rate"
        );
        let observed = empirical_burst(&counted, per_second as f64);
        let allowed = burst as f64 + 1.0 + per_second as f64 * 0.002;
        assert!(
            observed <= allowed,
            "{per_second}/s, burst {burst}: observed a burst of {observed:.1}, {allowed:.1} is allowed"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_few_callers_in_a_loop_reach_a_rate_finer_than_the_timer() {
    for callers in [1, 3, 10] {
        let limiter = requests(Rate::per_second(20_000).burst(1));
        let run = Duration::from_secs(1);
        let admitted = run_callers(&limiter, callers, run, |_| ONE).await;
        let achieved = admitted.len() as f64 / 20_000.0;
        assert!(achieved > 0.995, "{callers} callers reached {achieved:.4} of the rate");
        let counted: Vec<_> = admitted.iter().map(|(at, _)| (*at, 1)).collect();
        assert!(empirical_burst(&counted, 20_000.0) <= 1.0 + 1.0 + 20_000.0 * 0.002);
    }
}

#[tokio::test(start_paused = true)]
async fn both_budgets_hold_at_once_whichever_is_the_tighter() {
    // The request limit is 100 calls a second. The limit of 1,000 tokens a second is the tighter one when a call costs
    // more than 10 tokens.
    for cost in [1, 10, 37, 1_000] {
        let limiter = RateLimiter::new(
            Limits::new()
                .requests(Rate::per_second(100).burst(5))
                .tokens(Rate::per_second(1_000).burst(1_000)),
        )
        .unwrap();
        let run = Duration::from_secs(20);
        let admitted = run_callers(&limiter, 16, run, |_| Cost::tokens(cost)).await;
        let requests: Vec<_> = admitted.iter().map(|(at, _)| (*at, 1)).collect();
        let spent: Vec<_> = admitted.iter().map(|(at, cost)| (*at, cost.tokens)).collect();
        assert!(empirical_burst(&requests, 100.0) <= 5.0 + 1.0 + 0.2);
        assert!(empirical_burst(&spent, 1_000.0) <= 1_000.0 + cost as f64 + 2.0);
        let calls = admitted.len() as f64;
        let by_requests = calls / (5.0 + 2_000.0);
        let by_tokens = calls * cost as f64 / (1_000.0 + 20_000.0);
        assert!(
            f64::max(by_requests, by_tokens) > 0.98,
            "{cost} tokens a call: {by_requests:.3} of the requests and {by_tokens:.3} of the tokens"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_rate_per_second_and_one_per_day_hold_together() {
    let limiter = RateLimiter::new(
        Limits::new()
            .requests(Rate::per_second(2).burst(2))
            .requests(Rate::per_day(5)),
    )
    .unwrap();
    let start = Instant::now();
    for _ in 0..5 {
        limiter.acquire(ONE).await.unwrap();
    }
    assert_eq!(start.elapsed(), ms(1_500));
    limiter.acquire(ONE).await.unwrap();
    assert_eq!(start.elapsed(), Duration::from_secs(86_400) / 5);
}

#[tokio::test(start_paused = true)]
async fn a_call_that_waits_for_tokens_takes_no_request() {
    let limiter = RateLimiter::new(
        Limits::new()
            .requests(Rate::per_second(1).burst(5))
            .tokens(Rate::per_second(1).burst(10).initial(0)),
    )
    .unwrap();
    let mut waiting = task::spawn(limiter.acquire(Cost::tokens(10)));
    assert_pending!(waiting.poll());
    settle().await;
    assert_eq!(limiter.available().requests, Some(5));
}

#[tokio::test(start_paused = true)]
async fn admission_order_is_arrival_order() {
    let limiter = requests(Rate::per_second(100).burst(1));
    let order = Arc::new(Mutex::new(Vec::new()));
    let callers: Vec<_> = (0..50)
        .map(|caller| {
            let (limiter, order) = (limiter.clone(), order.clone());
            tokio::spawn(async move {
                limiter.acquire(ONE).await.unwrap();
                order.lock().unwrap().push(caller);
            })
        })
        .collect();
    for caller in callers {
        caller.await.unwrap();
    }
    assert_eq!(*order.lock().unwrap(), (0..50).collect::<Vec<_>>());
}

#[tokio::test(start_paused = true)]
async fn a_waiter_is_not_overtaken_by_newcomers_at_the_refill_instant() {
    for _ in 0..20 {
        let limiter = requests(Rate::per_second(10).burst(1));
        limiter.acquire(ONE).await.unwrap();
        let waiter = tokio::spawn({
            let limiter = limiter.clone();
            async move {
                limiter.acquire(ONE).await.unwrap();
                Instant::now()
            }
        });
        settle().await;
        let newcomers: Vec<_> = (0..8)
            .map(|_| {
                let limiter = limiter.clone();
                tokio::spawn(async move {
                    sleep(ms(100)).await;
                    limiter.acquire(ONE).await.unwrap();
                    Instant::now()
                })
            })
            .collect();
        let admitted = waiter.await.unwrap();
        for newcomer in newcomers {
            assert!(newcomer.await.unwrap() > admitted);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_heavy_call_is_admitted_in_order_among_endless_light_ones() {
    let limiter = tokens(Rate::per_second(10).burst(20));
    limiter.acquire(Cost::tokens(20)).await.unwrap();
    let start = Instant::now();
    let light = |limiter: RateLimiter| async move {
        loop {
            limiter.acquire(Cost::tokens(1)).await.unwrap();
        }
    };
    let before: Vec<_> = (0..4).map(|_| tokio::spawn(light(limiter.clone()))).collect();
    settle().await;
    // The four light calls that are queued before the heavy call take 0.4 s. Then the 20 tokens of the heavy call take
    // 2 s.
    limiter.acquire(Cost::tokens(20)).await.unwrap();
    assert_eq!(start.elapsed(), ms(2_400));
    before.iter().for_each(tokio::task::JoinHandle::abort);
}

#[tokio::test(start_paused = true)]
async fn a_dropped_waiter_has_taken_nothing_and_the_next_moves_up_at_once() {
    let limiter = tokens(Rate::per_second(10).burst(10));
    limiter.acquire(Cost::tokens(10)).await.unwrap();
    let start = Instant::now();
    let mut heavy = task::spawn(limiter.acquire(Cost::tokens(10)));
    let mut light = task::spawn(limiter.acquire(Cost::tokens(1)));
    assert_pending!(heavy.poll());
    assert_pending!(light.poll());
    pass(ms(300)).await;
    assert!(!light.is_woken());
    drop(heavy);
    assert!(light.is_woken(), "its token has been available since 100 ms");
    assert_ready_ok!(light.poll());
    assert_eq!(start.elapsed(), ms(300));
    assert_eq!(limiter.available().tokens, Some(2));
}

#[tokio::test(start_paused = true)]
async fn waiters_dropped_at_the_instant_of_their_admission_take_nothing() {
    let limiter = requests(Rate::per_second(10).burst(1));
    limiter.acquire(ONE).await.unwrap();
    let waiters: Vec<_> = (0..5)
        .map(|_| {
            let mut waiter = task::spawn(limiter.acquire(ONE));
            assert_pending!(waiter.poll());
            waiter
        })
        .collect();
    pass(ms(100)).await;
    assert!(waiters[0].is_woken());
    drop(waiters);
    assert_eq!(limiter.available().requests, Some(1));
    limiter.try_acquire(ONE).unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_waiter_that_is_not_polled_stalls_no_other() {
    let limiter = requests(Rate::per_second(10).burst(1));
    limiter.acquire(ONE).await.unwrap();
    let mut held: Vec<_> = (0..3).map(|_| task::spawn(limiter.acquire(ONE))).collect();
    for waiter in &mut held {
        assert_pending!(waiter.poll());
    }
    let start = Instant::now();
    limiter.acquire(ONE).await.unwrap();
    // The first request is available at 100 ms. The first waiter, which is not polled, is notified and gets 5 ms to take
    // it. Then all others are notified at once, and the fourth takes it.
    assert_eq!(start.elapsed(), ms(105));
    // The three waiters that were not polled in time are skipped from now on, and delay no other call.
    limiter.acquire(ONE).await.unwrap();
    assert_eq!(start.elapsed(), ms(200));
    // A skipped waiter keeps its place in the queue: when it is polled again, it is admitted before a new call.
    let mut newcomer = task::spawn(limiter.acquire(ONE));
    assert_pending!(newcomer.poll());
    assert_pending!(held[0].poll());
    pass(ms(100)).await;
    assert!(held[0].is_woken());
    assert_ready_ok!(held[0].poll());
    assert_pending!(newcomer.poll());
}

#[tokio::test(start_paused = true)]
async fn a_future_that_was_never_polled_is_not_in_the_queue() {
    let limiter = requests(Rate::per_second(10).burst(1));
    let _never = limiter.acquire(ONE);
    assert_eq!(limiter.try_acquire(ONE), Ok(()));
}

#[tokio::test(start_paused = true)]
async fn a_cost_above_the_burst_is_rejected_at_once_and_takes_nothing() {
    let limiter = RateLimiter::new(
        Limits::new()
            .requests(Rate::per_second(1))
            .tokens(Rate::per_second(10).burst(50)),
    )
    .unwrap();
    let mut waiting = task::spawn(limiter.acquire(Cost::tokens(50)));
    assert_ready_ok!(waiting.poll());
    let mut waiting = task::spawn(limiter.acquire(Cost::tokens(50)));
    assert_pending!(waiting.poll());
    // A cost above the burst is also rejected at once while another call waits for its tokens.
    let error = exceeded(&assert_ready_err!(
        task::spawn(limiter.acquire(Cost::tokens(51))).poll()
    ));
    assert_eq!((error.budget(), error.cost(), error.burst()), ("tokens", 51, 50));
    assert_eq!(
        error.to_string(),
        "the call costs 51 tokens, more than the burst of 50: raise the burst or split the call"
    );
    assert!(matches!(
        limiter.try_acquire(Cost::tokens(u64::MAX)),
        Err(AcquireError::CostExceedsBurst(_))
    ));
    let many = Cost::request().with("requests", 2);
    assert_eq!(limiter.check(many).unwrap_err().budget(), "requests");
}

#[tokio::test(start_paused = true)]
async fn a_rejection_has_the_time_to_retry_after() {
    let limiter = requests(Rate::per_second(10).burst(1));
    limiter.try_acquire(ONE).unwrap();
    assert_eq!(limiter.try_acquire(ONE), Err(AcquireError::NotYet(ms(100))));
    pass(ms(30)).await;
    let later = limiter.try_acquire(ONE).unwrap_err();
    assert_eq!(later.retry_after(), Some(ms(70)));
    assert_eq!(later.to_string(), "the rate limit is reached: retry in 70ms");
    let error = limiter.try_acquire(Cost::request().with("requests", 2)).unwrap_err();
    assert_eq!(error.retry_after(), None);
    assert_eq!(
        error.to_string(),
        "the call costs 2 requests, more than the burst of 1: raise the burst or split the call"
    );
    // `try_acquire` adds the costs of the calls that wait to the time to retry after, and is not admitted before them.
    let mut waiting = task::spawn(limiter.acquire(ONE));
    assert_pending!(waiting.poll());
    assert_eq!(limiter.try_acquire(ONE), Err(AcquireError::NotYet(ms(170))));
    pass(ms(70)).await;
    assert!(limiter.try_acquire(ONE).is_err());
    assert_ready_ok!(waiting.poll());
}

#[tokio::test(start_paused = true)]
async fn a_limiter_without_any_rate_can_be_paused() {
    let limiter = RateLimiter::new(Limits::new()).unwrap();
    limiter.acquire(Cost::tokens(7)).await.unwrap();
    limiter.pause_for(ms(30));
    let refused = limiter.try_acquire(Cost::tokens(7)).unwrap_err();
    assert_eq!(refused.retry_after(), Some(ms(30)));
    let start = Instant::now();
    limiter.acquire(Cost::tokens(7)).await.unwrap();
    assert_eq!(start.elapsed(), ms(30));
}

#[tokio::test(start_paused = true)]
async fn a_pause_holds_every_call_until_it_ends() {
    let limiter = requests(Rate::per_second(10).burst(2));
    let start = Instant::now();
    limiter.pause_for(ms(200));
    limiter.pause_for(ms(500));
    assert_eq!(limiter.available().paused_until, Some(start + ms(500)));
    limiter.acquire(ONE).await.unwrap();
    assert_eq!(start.elapsed(), ms(500));
    // A pause also holds calls that were waiting before the pause began.
    limiter.acquire(ONE).await.unwrap();
    let mut waiting = task::spawn(limiter.acquire(ONE));
    assert_pending!(waiting.poll());
    limiter.pause_until(start + ms(2_000));
    pass(ms(1_499)).await;
    assert!(!waiting.is_woken());
    pass(ms(1)).await;
    assert!(waiting.is_woken());
    assert_ready_ok!(waiting.poll());
    assert_eq!(limiter.available().paused_until, None);
}

#[tokio::test(start_paused = true)]
async fn new_limits_apply_at_once_to_waiters() {
    let limiter = requests(Rate::per_hour(1));
    limiter.acquire(ONE).await.unwrap();
    let start = Instant::now();
    let mut waiting = task::spawn(limiter.acquire(ONE));
    assert_pending!(waiting.poll());
    pass(ms(1_000)).await;
    limiter
        .set_limits(Limits::new().requests(Rate::per_second(2).burst(1)))
        .unwrap();
    assert!(waiting.is_woken());
    assert_pending!(waiting.poll());
    pass(ms(500)).await;
    assert!(waiting.is_woken());
    assert_ready_ok!(waiting.poll());
    assert_eq!(start.elapsed(), ms(1_500));
}

#[tokio::test(start_paused = true)]
async fn new_limits_reject_at_once_waiters_that_exceed_them() {
    let limiter = tokens(Rate::per_second(10).burst(100).initial(0));
    let mut heavy = task::spawn(limiter.acquire(Cost::tokens(100)));
    let mut behind = task::spawn(limiter.acquire(Cost::tokens(80)));
    assert_pending!(heavy.poll());
    assert_pending!(behind.poll());
    limiter
        .set_limits(Limits::new().tokens(Rate::per_second(10).burst(50)))
        .unwrap();
    for waiter in [&mut heavy, &mut behind] {
        assert!(waiter.is_woken());
        assert_eq!(exceeded(&assert_ready_err!(waiter.poll())).burst(), 50);
    }
}

#[tokio::test(start_paused = true)]
async fn new_limits_keep_what_the_buckets_hold() {
    let limiter = requests(Rate::per_second(10).burst(10));
    limiter.acquire(Cost::request().with("requests", 6)).await.unwrap();
    limiter
        .set_limits(Limits::new().requests(Rate::per_minute(7).burst(100)))
        .unwrap();
    assert_eq!(limiter.available().requests, Some(4));
    limiter
        .set_limits(Limits::new().requests(Rate::per_minute(7).burst(2)))
        .unwrap();
    assert_eq!(limiter.available().requests, Some(2));
    // Invalid limits return an error, and change nothing.
    limiter
        .set_limits(Limits::new().requests(Rate::per_minute(0)))
        .unwrap_err();
    assert_eq!(limiter.available().requests, Some(2));
    limiter.set_limits(Limits::new()).unwrap();
    assert_eq!(limiter.available().requests, None);
}

#[tokio::test(start_paused = true)]
async fn limits_that_change_every_second_lose_no_fraction() {
    let limiter = requests(Rate::per_minute(1).initial(0));
    let start = Instant::now();
    let acquire = tokio::spawn({
        let limiter = limiter.clone();
        async move { limiter.acquire(ONE).await }
    });
    for second in 0..60_u64 {
        let burst = 1 + second % 3;
        limiter
            .set_limits(Limits::new().requests(Rate::per_minute(1).burst(burst)))
            .unwrap();
        sleep(ms(1_000)).await;
    }
    acquire.await.unwrap().unwrap();
    assert_eq!(start.elapsed(), Duration::from_secs(60));
}

#[tokio::test(start_paused = true)]
async fn a_debit_can_leave_a_debt_that_is_filled_before_the_next_admission() {
    let limiter = tokens(Rate::per_second(10).burst(10));
    let estimate = limiter.acquire_estimate(Cost::tokens(10)).await.unwrap();
    let mut waiting = task::spawn(limiter.acquire(Cost::tokens(1)));
    assert_pending!(waiting.poll());
    estimate.settle(Cost::tokens(30));
    assert_eq!(limiter.available().tokens, Some(0));
    pass(ms(2_099)).await;
    assert!(!waiting.is_woken());
    pass(ms(1)).await;
    assert!(waiting.is_woken());
    assert_ready_ok!(waiting.poll());
}

#[tokio::test(start_paused = true)]
async fn a_refund_admits_waiters_at_once() {
    let limiter = tokens(Rate::per_second(10).burst(10));
    let estimate = limiter.acquire_estimate(Cost::tokens(10)).await.unwrap();
    let mut waiting = task::spawn(limiter.acquire(Cost::tokens(6)));
    assert_pending!(waiting.poll());
    limiter.settle(estimate, Cost::tokens(3));
    assert!(waiting.is_woken());
    assert_ready_ok!(waiting.poll());
    assert_eq!(limiter.available().tokens, Some(1));
}

#[tokio::test(start_paused = true)]
async fn a_refund_leaves_out_what_would_have_overflowed() {
    let limiter = tokens(Rate::per_second(10).burst(10));
    let estimate = limiter.acquire_estimate(Cost::tokens(8)).await.unwrap();
    // If the true cost of 0 had been charged instead of the estimate, the bucket would have been full during these 10
    // s. The refund would have overflowed, so it must not be added to the bucket afterwards.
    sleep(ms(10_000)).await;
    limiter.acquire(Cost::tokens(10)).await.unwrap();
    estimate.settle(Cost::tokens(0));
    assert_eq!(limiter.available().tokens, Some(0));
}

#[tokio::test(start_paused = true)]
async fn a_new_rate_refunds_no_estimate_that_it_did_not_charge() {
    let limiter = RateLimiter::new(Limits::new()).unwrap();
    let before = limiter.acquire_estimate(Cost::tokens(10)).await.unwrap();
    limiter
        .set_limits(Limits::new().tokens(Rate::per_hour(10).burst(10)))
        .unwrap();
    let after = limiter.acquire_estimate(Cost::tokens(10)).await.unwrap();
    before.settle(Cost::tokens(0));
    assert_eq!(limiter.available().tokens, Some(0));
    // The estimate that was charged under the new limits is still refunded.
    after.settle(Cost::tokens(0));
    assert_eq!(limiter.available().tokens, Some(10));
}

#[tokio::test(start_paused = true)]
async fn an_estimate_that_is_dropped_stays_charged() {
    let limiter = tokens(Rate::per_second(10).burst(10));
    drop(limiter.acquire_estimate(Cost::tokens(8)).await.unwrap());
    assert_eq!(limiter.available().tokens, Some(2));
}

#[tokio::test(start_paused = true)]
async fn after_a_year_at_an_odd_rate_the_count_is_exact() {
    let limiter =
        RateLimiter::new(Limits::new().requests(Rate::new(7, ms(13_003)).burst(100_000_000).initial(0))).unwrap();
    let year = Duration::from_secs(365 * 86_400);
    for _ in 0..1_000 {
        advance(year / 1_000).await;
        // Reading the available amount must not round anything away.
        let _ = limiter.available();
    }
    let expected = year.as_millis() * 7 / 13_003;
    assert_eq!(u128::from(limiter.available().requests.unwrap()), expected);
}

#[tokio::test(start_paused = true)]
async fn a_blocked_runtime_does_not_catch_up_with_a_burst() {
    let limiter = requests(Rate::per_second(1_000).burst(1));
    let admitted = Arc::new(Mutex::new(0));
    for _ in 0..64 {
        let (limiter, admitted) = (limiter.clone(), admitted.clone());
        tokio::spawn(async move {
            loop {
                limiter.acquire(ONE).await.unwrap();
                *admitted.lock().unwrap() += 1;
            }
        });
    }
    sleep(ms(10)).await;
    settle().await;
    *admitted.lock().unwrap() = 0;
    // Advances the clock by 200 ms at once, as if the runtime had been blocked and no task had run.
    advance(ms(200)).await;
    settle().await;
    let burst = *admitted.lock().unwrap();
    assert!(
        (5..=6).contains(&burst),
        "{burst} were admitted at once, but 5 ms are worth 5"
    );
}

#[tokio::test(start_paused = true)]
async fn only_the_first_waiter_is_woken_and_not_before_its_time() {
    let limiter = requests(Rate::per_second(1).burst(1));
    limiter.acquire(ONE).await.unwrap();
    let mut waiters: Vec<_> = (0..100).map(|_| task::spawn(limiter.acquire(ONE))).collect();
    for waiter in &mut waiters {
        assert_pending!(waiter.poll());
    }
    pass(ms(999)).await;
    assert!(waiters.iter().all(|waiter| !waiter.is_woken()));
    pass(ms(1)).await;
    let woken: Vec<_> = waiters.iter().map(|waiter| waiter.is_woken()).collect();
    assert!(woken[0] && !woken[1..].contains(&true));
}

#[tokio::test(start_paused = true)]
async fn without_limits_every_call_is_admitted() {
    let limiter = RateLimiter::new(Limits::new()).unwrap();
    for _ in 0..1_000 {
        limiter.try_acquire(Cost::tokens(u64::MAX)).unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn invalid_rates_are_rejected_by_field_name_when_built() {
    let second = Duration::from_secs(1);
    for (rate, field) in [
        (Rate::per_second(0), "amount"),
        (Rate::per_second(-1), "amount"),
        (Rate::per_second(f64::NAN), "amount"),
        (Rate::per_second(-0.5), "amount"),
        (Rate::per_second(f64::INFINITY), "amount"),
        (Rate::new(1, Duration::ZERO), "period"),
        (Rate::per_second(1e19), "amount"),
        (Rate::new(1, Duration::MAX), "period"),
        (Rate::per_second(1).burst(0), "burst"),
        (Rate::per_second(1).burst(0.9), "burst"),
        (Rate::per_second(1).burst(-2), "burst"),
        (Rate::per_second(1).initial(2), "initial"),
        (Rate::per_second(1).initial(-1), "initial"),
    ] {
        let error = RateLimiter::new(Limits::new().requests(rate)).unwrap_err();
        assert_eq!(error.field(), format!("requests.{field}"), "{rate:?}");
        let error = RateLimiter::new(Limits::new().requests(Rate::new(1, second)).tokens(rate)).unwrap_err();
        assert_eq!(error.field(), format!("tokens.{field}"), "{rate:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_largest_and_the_smallest_numbers_do_not_overflow() {
    let century = Duration::from_secs(100 * 365 * 86_400);
    for rate in [
        Rate::new(u64::MAX, Duration::from_nanos(1)),
        Rate::new(u64::MAX, century),
        Rate::new(1, Duration::from_nanos(1)),
        Rate::new(1, century),
        Rate::new(u64::MAX - 58, century - Duration::from_nanos(7)),
    ] {
        let limiter = RateLimiter::new(Limits::new().tokens(rate)).unwrap();
        let available = limiter.available().tokens.unwrap();
        limiter.try_acquire(Cost::tokens(available)).unwrap();
        advance(Duration::from_secs(1_000_000)).await;
        assert!(limiter.available().tokens.unwrap() <= available);
        let _ = limiter.try_acquire(Cost::tokens(available));
        limiter.set_limits(Limits::new().tokens(Rate::per_second(3))).unwrap();
        assert!(limiter.available().tokens.unwrap() <= 3);
    }
    let limiter = requests(Rate::new(1, century));
    limiter.acquire(ONE).await.unwrap();
    assert_eq!(limiter.try_acquire(ONE).unwrap_err().retry_after(), Some(century));
    limiter.pause_for(Duration::MAX);
    assert!(limiter.try_acquire(ONE).is_err());
}

#[tokio::test(start_paused = true)]
async fn an_amount_may_be_of_any_number_type() {
    for rate in [
        Rate::per_second(7_i32),
        Rate::per_second(7_u32),
        Rate::per_second(7_i64),
        Rate::per_second(7_u64),
        Rate::per_second(7_usize),
        Rate::per_second(7.0),
    ] {
        let limiter = requests(rate);
        assert_eq!(limiter.available().requests, Some(7));
        for _ in 0..8 {
            limiter.acquire(ONE).await.unwrap();
        }
        assert_eq!(limiter.available().requests, Some(0));
    }
}

#[tokio::test(start_paused = true)]
async fn fractions_of_a_request_are_exact() {
    let limiter = requests(Rate::per_second(0.5));
    let start = Instant::now();
    for _ in 0..3 {
        limiter.acquire(ONE).await.unwrap();
    }
    assert_eq!(start.elapsed(), ms(4_000));
}

#[test]
fn a_limiter_of_two_runtimes_serves_the_one_that_still_runs() {
    let limiter = requests(Rate::per_second(50).burst(1));
    let build = || {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
    };
    let (first, second) = (build(), build());
    // The first runtime spawns a task that waits for the limiter, and is never run again.
    first.block_on(async {
        limiter.acquire(ONE).await.unwrap();
        let limiter = limiter.clone();
        tokio::spawn(async move { limiter.acquire(ONE).await });
        settle().await;
    });
    second.block_on(async {
        limiter.acquire(ONE).await.unwrap();
        limiter.acquire(ONE).await.unwrap();
    });
    drop(first);
    second.block_on(async {
        limiter.acquire(ONE).await.unwrap();
        assert_ready!(task::spawn(async {}).poll());
    });
}

#[tokio::test(start_paused = true)]
async fn a_refund_raises_no_bucket_that_was_not_charged() {
    let limiter = RateLimiter::new(Limits::new()).unwrap();
    let estimate = limiter.acquire_estimate(Cost::tokens(800)).await.unwrap();
    limiter.set_limits(Limits::new().tokens(Rate::per_hour(1_000))).unwrap();
    limiter.try_acquire(Cost::tokens(1_000)).unwrap();
    estimate.settle(Cost::tokens(0));
    assert_eq!(limiter.available().tokens, Some(0));
}

#[test]
fn a_change_made_from_another_runtime_reaches_waiters() {
    let limiter = tokens(Rate::per_second(10).burst(10_000).initial(0));
    let build = || {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
    };
    build().block_on(async {
        // At the first limits, 100 tokens are available after 10 s.
        let mut waiting = task::spawn(limiter.acquire(Cost::tokens(100)));
        assert_pending!(waiting.poll());
        settle().await;
        let other = limiter.clone();
        std::thread::spawn(move || {
            build().block_on(async { other.set_limits(Limits::new().tokens(Rate::per_second(1_000).burst(10_000))) })
        })
        .join()
        .unwrap()
        .unwrap();
        tokio::time::timeout(Duration::from_secs(5), waiting)
            .await
            .expect("its tokens are available after 0.1 s")
            .unwrap();
    });
}

#[test]
fn waiting_without_a_timer_panics_in_the_caller() {
    let limiter = requests(Rate::per_hour(1));
    limiter.try_acquire(ONE).unwrap();
    let no_timer = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let wait = || no_timer.block_on(limiter.acquire(ONE));
    assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(wait)).is_err());
    let mut no_runtime = task::spawn(limiter.acquire(ONE));
    assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| no_runtime.poll().is_pending())).is_err());
}
