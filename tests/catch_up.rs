//! Which lateness a limiter makes up for, and which it does not, on Tokio's paused clock.

mod support;

use std::time::Duration;
use support::{ms, settle};
use tokio::time::{Instant, advance};
use tokio_test::{assert_pending, assert_ready_ok, task};
use tower_outbound::{Cost, Limits, Rate, RateLimiter};

/// Returns the largest sum of costs in any window, less what `per_second` adds in that window.
fn burst_seen(admitted: &[(Duration, u64)], per_second: f64) -> f64 {
    let (mut sum, mut lowest, mut highest) = (0.0, f64::MAX, 0.0_f64);
    for (at, cost) in admitted {
        let added = per_second * at.as_secs_f64();
        lowest = f64::min(lowest, sum - added);
        sum += *cost as f64;
        highest = highest.max(sum - added - lowest);
    }
    highest
}

/// Makes calls of these costs one after another. The clock moves in steps of 5 ms only, so most calls are woken late.
async fn admitted(limiter: &RateLimiter, costs: impl Iterator<Item = Cost>) -> Vec<(Duration, Cost)> {
    let start = Instant::now();
    let mut admitted = Vec::new();
    for cost in costs {
        let mut call = task::spawn(limiter.acquire(cost));
        while call.poll().is_pending() {
            advance(ms(5)).await;
            settle().await;
        }
        admitted.push((start.elapsed(), cost));
    }
    admitted
}

#[tokio::test(start_paused = true)]
async fn a_budget_that_was_full_meanwhile_is_not_credited_for_the_lateness_of_another() {
    // Light calls wait for their request, while the bucket of tokens fills up and overflows. Then heavy ones take it.
    let limits = Limits::new()
        .requests(Rate::new(1, ms(11)).burst(1))
        .tokens(Rate::per_second(50_000).burst(5_000));
    let limiter = RateLimiter::new(limits).unwrap();
    let costs = (0..2_000).map(|call| Cost::tokens(if call % 40 < 20 { 1 } else { 1_250 }));
    let admitted = admitted(&limiter, costs).await;
    let tokens: Vec<_> = admitted.iter().map(|(at, cost)| (*at, cost.tokens)).collect();
    let seen = burst_seen(&tokens, 50_000.0);
    assert!(seen <= 5_000.001, "a burst of {seen}");
    // The requests, which made the calls wait, are credited.
    let requests: Vec<_> = admitted.iter().map(|(at, _)| (*at, 1)).collect();
    let seen = burst_seen(&requests, 1_000.0 / 11.0);
    assert!((1.2..=1.0 + 5.0 / 11.0 + 0.001).contains(&seen), "a burst of {seen}");
}

#[tokio::test(start_paused = true)]
async fn a_strict_rate_never_admits_two_calls_closer_to_each_other_than_it_says() {
    let gaps = async |rate: Rate| {
        let limiter = RateLimiter::new(Limits::new().requests(rate)).unwrap();
        let admitted = admitted(&limiter, (0..50).map(|_| Cost::request())).await;
        let gaps = admitted.windows(2).map(|pair| pair[1].0 - pair[0].0);
        gaps.min().unwrap()
    };
    let rate = Rate::new(1, ms(203)).burst(1);
    assert_eq!(gaps(rate).await, ms(200));
    assert_eq!(gaps(rate.strict()).await, ms(205));
}

#[tokio::test(start_paused = true)]
async fn a_strict_rate_is_strict_also_for_a_call_that_is_made_when_another_was_late() {
    let limiter = RateLimiter::new(Limits::new().requests(Rate::per_second(100).burst(1).strict())).unwrap();
    limiter.acquire(Cost::request()).await.unwrap();
    let mut late = task::spawn(limiter.acquire(Cost::request()));
    assert_pending!(late.poll());
    advance(ms(14)).await;
    assert_ready_ok!(late.poll());
    let mut next = task::spawn(limiter.acquire(Cost::request()));
    assert_pending!(next.poll());
    advance(ms(9)).await;
    assert_pending!(next.poll());
    advance(ms(1)).await;
    assert_ready_ok!(next.poll());
}

#[tokio::test(start_paused = true)]
async fn two_rates_with_small_bursts_are_both_reached() {
    // Both buckets hold one call only, and the rates are nearly the same.
    let limits = Limits::new()
        .requests(Rate::per_second(5_000).burst(1))
        .tokens(Rate::per_second(510_000).burst(100));
    let limiter = RateLimiter::new(limits).unwrap();
    let start = Instant::now();
    for _ in 0..5_000 {
        limiter.acquire(Cost::tokens(100)).await.unwrap();
    }
    assert!(start.elapsed() < ms(1_005), "{:?}", start.elapsed());
}

#[tokio::test(start_paused = true)]
async fn headroom_is_a_part_of_the_amount_that_is_not_used() {
    let rate = Rate::per_second(100).headroom(0.05);
    let limiter = RateLimiter::new(Limits::new().requests(rate)).unwrap();
    assert_eq!(limiter.available().requests, Some(95));
    let start = Instant::now();
    for _ in 0..190 {
        limiter.acquire(Cost::request()).await.unwrap();
    }
    assert_eq!(start.elapsed(), ms(1_000));
    for invalid in [1.0, -0.1, f64::NAN] {
        let error = RateLimiter::new(Limits::new().requests(rate.headroom(invalid))).unwrap_err();
        assert_eq!(error.field(), "requests.headroom");
    }
}
