//! Limits that were set or reported wrongly and are corrected: pauses and debts that end, rates that change, reports of
//! a provider that are old when they arrive, and clocks that step back.

mod support;

use std::time::Duration;
use support::{ms, pass};
use tokio::time::{Instant, advance, sleep};
use tokio_test::{assert_pending, assert_ready_ok, task};
use tower_outbound::{
    Call, CallHandle, Cost, Executor, Limits, Rate, RateLimiter,
    rate::{Budget, PauseSource},
};

const ONE: Cost = Cost::request();
const MINUTE: Duration = Duration::from_secs(60);

fn requests(rate: Rate) -> RateLimiter {
    RateLimiter::new(Limits::new().requests(rate)).unwrap()
}

fn tokens(rate: Rate) -> RateLimiter {
    RateLimiter::new(Limits::new().tokens(rate)).unwrap()
}

fn cost(requests: u64) -> Cost {
    Cost::request().with("requests", requests)
}

// === Pauses ===

#[tokio::test(start_paused = true)]
async fn a_pause_that_is_set_again_ends_when_the_new_one_does() {
    let limiter = requests(Rate::per_second(10));
    let start = Instant::now();
    limiter.pause_for(Duration::MAX);
    assert_eq!(limiter.paused().unwrap().source(), PauseSource::User);
    let mut waiting = task::spawn(limiter.acquire(ONE));
    assert_pending!(waiting.poll());
    sleep(ms(100)).await;
    limiter.pause_for(ms(400));
    assert_eq!(limiter.paused().unwrap().until(), start + ms(500));
    assert!(!waiting.is_woken());
    limiter.pause_until(start + ms(300));
    pass(ms(199)).await;
    assert!(!waiting.is_woken());
    pass(ms(1)).await;
    assert!(waiting.is_woken());
    assert_ready_ok!(waiting.poll());
    assert_eq!(limiter.paused(), None);
}

#[tokio::test(start_paused = true)]
async fn every_way_to_end_a_pause_wakes_the_first_waiter_at_once() {
    let ways: [fn(&RateLimiter); 4] = [
        RateLimiter::resume,
        |limiter| limiter.pause_for(Duration::ZERO),
        |limiter| limiter.pause_until(Instant::now()),
        |limiter| limiter.pause_until(Instant::now() - ms(1)),
    ];
    for end in ways {
        let limiter = requests(Rate::per_second(10).burst(1));
        limiter.pause_for(MINUTE);
        let mut waiting = task::spawn(limiter.acquire(ONE));
        assert_pending!(waiting.poll());
        pass(ms(1_000)).await;
        end(&limiter);
        assert!(waiting.is_woken());
        assert_ready_ok!(waiting.poll());
        // The call was not admitted as of an instant within the pause: the next one waits the whole interval.
        let begun = Instant::now();
        limiter.acquire(ONE).await.unwrap();
        assert_eq!(begun.elapsed(), ms(100));
    }
}

#[tokio::test(start_paused = true)]
async fn ending_a_pause_that_is_over_changes_nothing() {
    let limiter = requests(Rate::per_second(10).burst(1));
    limiter.acquire(ONE).await.unwrap();
    limiter.resume();
    limiter.pause_for(Duration::ZERO);
    let begun = Instant::now();
    limiter.acquire(ONE).await.unwrap();
    assert_eq!(begun.elapsed(), ms(100));
}

/// Waits for the end of a call, and returns the notes in its event.
async fn notes<B>(call: CallHandle<B, String>) -> Vec<String> {
    let event = call.event().clone();
    call.await.unwrap();
    event.snapshot().logs.into_iter().map(|log| log.message).collect()
}

#[tokio::test(start_paused = true)]
async fn the_event_of_a_call_that_waits_for_a_pause_says_so() {
    let limiter = requests(Rate::per_second(100));
    let executor = Executor::builder()
        .limiter(limiter.clone())
        .build_for_closures::<String>()
        .unwrap();
    executor.start().unwrap();
    let call = || Call::new(async || Ok::<_, std::io::Error>((200, String::new())));
    limiter.pause_for(ms(300));
    assert_eq!(executor.monitor().paused().unwrap().source(), PauseSource::User);
    let paused = executor.submit(call()).await.unwrap();
    assert_eq!(
        notes(paused).await,
        ["Waits for a pause of the rate limiter that the user has begun and that ends in 300ms"]
    );
    // This call waits already when the pause begins.
    limiter.acquire(cost(100)).await.unwrap();
    let waiting = executor.submit(call()).await.unwrap();
    sleep(ms(5)).await;
    limiter.pause_for(ms(300));
    assert_eq!(
        notes(waiting).await,
        ["Waited for a pause of the rate limiter that the user had begun"]
    );
    let unpaused = executor.submit(call()).await.unwrap();
    assert_eq!(notes(unpaused).await, [""; 0]);
}

// === Debts ===

#[tokio::test(start_paused = true)]
async fn the_largest_debt_is_ten_minutes_a_period_or_a_burst() {
    let cases = [
        (Rate::per_second(10), 600),
        (Rate::per_minute(600), 600),
        (Rate::per_hour(36_000), 3_600),
        (Rate::per_day(864_000), 86_400),
        (Rate::per_second(10).burst(20_000), 2_000),
        (Rate::per_minute(600).max_debt(50), 5),
        (Rate::per_minute(600).max_debt(0), 0),
    ];
    for (rate, seconds) in cases {
        let limiter = tokens(rate);
        let burst = limiter.available().tokens.unwrap();
        let estimate = limiter.acquire_estimate(Cost::tokens(burst)).await.unwrap();
        estimate.settle(Cost::tokens(u64::MAX));
        let begun = Instant::now();
        limiter.acquire(Cost::tokens(1)).await.unwrap();
        let expected = Duration::from_secs(seconds) + ms(100);
        assert_eq!(begun.elapsed(), expected, "{rate:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_debt_within_the_bound_is_filled_in_full() {
    let limiter = tokens(Rate::per_second(10).max_debt(100));
    let estimate = limiter.acquire_estimate(Cost::tokens(10)).await.unwrap();
    estimate.settle(Cost::tokens(110));
    let begun = Instant::now();
    limiter.acquire(Cost::tokens(1)).await.unwrap();
    assert_eq!(begun.elapsed(), ms(10_100));
}

#[tokio::test(start_paused = true)]
async fn a_forgiven_debt_admits_waiters_after_their_own_cost_only() {
    let limits = Limits::new()
        .tokens(Rate::per_second(10))
        .tokens(Rate::per_day(1_000_000));
    let limiter = RateLimiter::new(limits).unwrap();
    let estimate = limiter.acquire_estimate(Cost::tokens(10)).await.unwrap();
    let mut waiting = task::spawn(limiter.acquire(Cost::tokens(5)));
    assert_pending!(waiting.poll());
    estimate.settle(Cost::tokens(5_000));
    pass(ms(10_000)).await;
    assert!(!waiting.is_woken());
    limiter.forgive_debts();
    pass(ms(500)).await;
    assert!(waiting.is_woken());
    assert_ready_ok!(waiting.poll());
    // What is no debt stays charged; 10.5 s have added 121.
    limiter
        .set_limits(Limits::new().tokens(Rate::per_day(1_000_000)))
        .unwrap();
    assert_eq!(limiter.available().tokens, Some(1_000_000 - 5_005 + 121));
}

#[tokio::test(start_paused = true)]
async fn a_forgiven_debt_is_not_given_back_again_by_a_refund() {
    let limiter = tokens(Rate::per_hour(10));
    let (unused, used) = (
        limiter.acquire_estimate(Cost::tokens(5)).await.unwrap(),
        limiter.acquire_estimate(Cost::tokens(5)).await.unwrap(),
    );
    used.settle(Cost::tokens(9));
    // A debt of 4, of which a refund of 5 would leave 1.
    limiter.forgive_debts();
    unused.settle(Cost::tokens(0));
    assert_eq!(limiter.available().tokens, Some(1));
}

#[tokio::test(start_paused = true)]
async fn what_is_cut_off_from_a_debt_is_not_given_back_by_a_refund() {
    let limiter = tokens(Rate::per_hour(10).max_debt(3));
    let (unused, used) = (
        limiter.acquire_estimate(Cost::tokens(5)).await.unwrap(),
        limiter.acquire_estimate(Cost::tokens(5)).await.unwrap(),
    );
    // The debt would be 7, of which 4 are forgotten.
    used.settle(Cost::tokens(12));
    unused.settle(Cost::tokens(0));
    let begun = Instant::now();
    limiter.acquire(Cost::tokens(1)).await.unwrap();
    // Had the true costs been charged, a debt of 2 would be left: 3 tokens to fill, which take 6 minutes each.
    assert_eq!(begun.elapsed(), 3 * 6 * MINUTE);
}

// === Rates that change ===

#[tokio::test(start_paused = true)]
async fn a_rate_keeps_its_bucket_by_its_period_wherever_it_stands() {
    let (second, minute, day) = (Rate::per_second(50), Rate::per_minute(100), Rate::per_day(200));
    let limiter = RateLimiter::new(Limits::new().requests(second).requests(minute).requests(day)).unwrap();
    limiter.acquire(cost(50)).await.unwrap();
    let left = |rate| {
        limiter
            .set_limits(
                Limits::new()
                    .requests(day)
                    .tokens(second)
                    .requests(minute)
                    .requests(second),
            )
            .unwrap();
        let all = Limits::new().requests(second).requests(rate);
        limiter.set_limits(all).unwrap();
        limiter.available().requests
    };
    assert_eq!(left(minute), Some(0));
    sleep(ms(1_000)).await;
    assert_eq!(left(minute), Some(50));
    limiter.acquire(cost(50)).await.unwrap();
    sleep(ms(1_000)).await;
    // The minute has 100 - 50 - 50 and what two seconds have added, 3 whole ones.
    assert_eq!(left(minute), Some(3));
}

#[tokio::test(start_paused = true)]
async fn a_day_that_is_used_up_stays_used_up_when_other_rates_come_and_go() {
    let day = Rate::per_day(100);
    let limiter = RateLimiter::new(Limits::new().requests(Rate::per_minute(500)).requests(day)).unwrap();
    limiter.acquire(cost(100)).await.unwrap();
    let all = [
        Limits::new().requests(day),
        Limits::new().requests(Rate::per_hour(300)).requests(day),
        Limits::new().requests(day).requests(Rate::per_second(5)),
        Limits::new().requests(Rate::per_day(1_000)).tokens(Rate::per_day(7)),
    ];
    for limits in all {
        limiter.set_limits(limits.clone()).unwrap();
        assert_eq!(limiter.available().requests, Some(0), "{limits:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_rate_whose_period_changes_keeps_what_is_left() {
    let limiter = requests(Rate::per_minute(60));
    limiter.acquire(cost(58)).await.unwrap();
    limiter
        .set_limits(Limits::new().requests(Rate::per_hour(3_600)))
        .unwrap();
    assert_eq!(limiter.available().requests, Some(2));
}

// === Clocks that step back ===

/// Returns a runtime with a paused clock, or one with the real clock.
fn runtime(is_paused: bool) -> tokio::runtime::Runtime {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_all().start_paused(is_paused).build().unwrap()
}

#[test]
fn a_limiter_used_with_a_clock_that_is_behind_goes_on_and_gets_nothing_for_free() {
    for is_built_ahead in [false, true] {
        let mut limiter = requests(Rate::per_second(20).burst(2));
        runtime(true).block_on(async {
            advance(Duration::from_secs(3_600)).await;
            if is_built_ahead {
                limiter = requests(Rate::per_second(20).burst(2));
            }
            limiter.acquire(cost(2)).await.unwrap();
            limiter.pause_for(ms(100));
        });
        runtime(false).block_on(async {
            let begun = Instant::now();
            limiter.acquire(cost(2)).await.unwrap();
            // The bucket was empty, and the pause had just begun: 100 ms for both, at the same time.
            assert!(
                begun.elapsed() >= ms(100) && begun.elapsed() < ms(1_500),
                "{:?}",
                begun.elapsed()
            );
            assert!(limiter.try_acquire(cost(2)).is_err());
            limiter.acquire(ONE).await.unwrap();
            assert!(begun.elapsed() < ms(3_000));
        });
    }
}

#[test]
fn a_waiter_is_admitted_after_the_clock_has_stepped_back() {
    let limiter = requests(Rate::per_second(20).burst(1));
    runtime(true).block_on(async {
        limiter.acquire(ONE).await.unwrap();
        sleep(MINUTE).await;
        limiter.acquire(ONE).await.unwrap();
    });
    runtime(false).block_on(async {
        let begun = Instant::now();
        for _ in 0..3 {
            limiter.acquire(ONE).await.unwrap();
        }
        assert!(
            begun.elapsed() >= ms(145) && begun.elapsed() < ms(2_000),
            "{:?}",
            begun.elapsed()
        );
    });
}

// === Reports ===

#[tokio::test(start_paused = true)]
async fn a_lowered_bucket_fills_again_from_what_was_reported() {
    let limiter = tokens(Rate::per_minute(60));
    limiter.lower(Budget::Tokens, None, 10);
    limiter.lower(Budget::Tokens, Some(MINUTE), 20);
    sleep(ms(5_000)).await;
    assert_eq!(limiter.available().tokens, Some(15));
    // A report does not make a debt, and does not end one.
    let estimate = limiter.acquire_estimate(Cost::tokens(15)).await.unwrap();
    estimate.settle(Cost::tokens(20));
    limiter.lower(Budget::Tokens, None, 0);
    let begun = Instant::now();
    limiter.acquire(Cost::tokens(1)).await.unwrap();
    assert_eq!(begun.elapsed(), ms(6_000));
}

#[tokio::test(start_paused = true)]
async fn what_is_left_of_a_day_is_the_same_without_the_rate_of_the_minute_and_in_another_order() {
    for budget in ["requests", "images"] {
        let minute = || Rate::per_minute(500);
        let day = || Rate::per_day(500);
        let take = |amount| Cost::none().with(budget, amount);
        let limiter = RateLimiter::new(Limits::new().budget(budget, minute()).budget(budget, day())).unwrap();
        limiter.acquire(take(499)).await.unwrap();
        limiter
            .set_limits(Limits::new().budget(budget, day()).budget(budget, minute()))
            .unwrap();
        assert_eq!(limiter.available().of(budget), Some(1));
        limiter.set_limits(Limits::new().budget(budget, day())).unwrap();
        assert_eq!(
            limiter.available().of(budget),
            Some(1),
            "without the rate of the minute"
        );
        // Another budget of the same period is another bucket.
        limiter
            .set_limits(Limits::new().budget("seconds", day()).budget(budget, day()))
            .unwrap();
        assert_eq!(limiter.available().of(budget), Some(1));
        assert_eq!(limiter.available().of("seconds"), Some(500));
    }
}
