//! What is refused, by name; and what is shown.

use crate::{ONE, requests, secs};
use tokio::time::advance;
use tower_outbound::{
    Cost, KeyedRateLimiter, Limits, Rate,
    error::{AcquireError, InvalidConfig},
};

fn refused(limits: Limits) -> InvalidConfig {
    KeyedRateLimiter::<u64>::new(limits).unwrap_err()
}

#[test]
fn limits_that_cannot_be_kept_by_key_are_refused_by_name() {
    let initial = refused(
        Limits::new()
            .requests(Rate::per_second(5))
            .tokens(Rate::per_second(5).initial(1)),
    );
    assert_eq!(initial.field(), "tokens.initial");
    assert_eq!(
        refused(Limits::new().requests(Rate::per_second(0))).field(),
        "requests.amount"
    );
    let no_tiers = KeyedRateLimiter::<u64>::with_tiers([], |_| 0).unwrap_err();
    assert_eq!(no_tiers.field(), "tiers");
    let no_keys = requests(Rate::per_second(1)).max_keys(0).unwrap_err();
    assert_eq!(no_keys.field(), "max_keys");
}

#[tokio::test(start_paused = true)]
async fn a_cost_that_never_fits_is_refused_at_once_and_holds_no_key() {
    let limits = Limits::new()
        .requests(Rate::per_second(5))
        .tokens(Rate::per_minute(100));
    let limiter = KeyedRateLimiter::<u64>::new(limits).unwrap();
    for cost in [
        Cost::tokens(101),
        Cost::tokens(u64::MAX),
        ONE.with("requests", u64::MAX),
    ] {
        let refusals = [
            limiter.try_acquire(&1, cost).unwrap_err(),
            limiter.acquire(&1, cost).await.unwrap_err(),
            limiter.try_acquire_estimate(&1, cost).unwrap_err(),
            limiter.acquire_estimate(&1, cost).await.unwrap_err(),
            limiter.check(&1, cost).unwrap_err().into(),
        ];
        for refusal in refusals {
            assert!(matches!(refusal, AcquireError::CostExceedsBurst(_)), "{refusal}");
            assert_eq!(refusal.retry_after(), None);
        }
        assert!(limiter.wait_for(&1, cost) > secs(0));
    }
    limiter.check(&1, Cost::tokens(100)).unwrap();
    assert!(limiter.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_call_that_lacks_one_budget_is_charged_to_none() {
    let limits = Limits::new()
        .requests(Rate::per_second(5))
        .tokens(Rate::per_minute(600).burst(100))
        .budget("images", Rate::per_hour(2).refuse());
    let limiter = KeyedRateLimiter::<u64>::new(limits).unwrap();
    limiter.try_acquire(&1, Cost::tokens(80).with("images", 1)).unwrap();
    let before = limiter.available(&1);
    let late = limiter.try_acquire(&1, Cost::tokens(21).with("images", 1)).unwrap_err();
    assert_eq!(late, AcquireError::NotYet(std::time::Duration::from_millis(100)));
    let capped = limiter.try_acquire(&1, Cost::tokens(21).with("images", 2)).unwrap_err();
    assert!(matches!(capped, AcquireError::Exhausted(cap) if (cap.cost(), cap.left()) == (2, 1)));
    assert_eq!(capped.retry_after(), Some(secs(1_800)));
    assert_eq!(limiter.available(&1), before);
    assert_eq!(
        (before.requests, before.tokens, before.of("images")),
        (Some(4), Some(20), Some(1))
    );
}

#[tokio::test(start_paused = true)]
async fn a_cost_of_nothing_and_limits_of_nothing_hold_no_key() {
    let limiter = requests(Rate::per_second(1));
    limiter.try_acquire(&1, Cost::none()).unwrap();
    limiter.acquire(&1, Cost::tokens(5).with("requests", 0)).await.unwrap();
    assert!(limiter.is_empty());
    let unlimited = KeyedRateLimiter::<u64>::new(Limits::new()).unwrap();
    unlimited.try_acquire(&1, ONE.with("requests", u64::MAX)).unwrap();
    let estimate = unlimited.acquire_estimate(&1, ONE).await.unwrap();
    assert_eq!(unlimited.len(), 1);
    estimate.settle(ONE);
    unlimited.pause(&1, tokio::time::Instant::now() + secs(1)).unwrap();
    assert!(unlimited.try_acquire(&1, ONE).is_err());
    advance(secs(1)).await;
    unlimited.try_acquire(&1, ONE).unwrap();
    assert!(unlimited.is_empty());
}

#[tokio::test(start_paused = true)]
async fn debug_shows_numbers_and_no_key() {
    let limiter = KeyedRateLimiter::<String>::new(Limits::new().requests(Rate::per_second(1)))
        .unwrap()
        .max_keys(10)
        .unwrap();
    limiter.try_acquire("sk-secret", ONE).unwrap();
    let shown = format!("{limiter:?} {:?}", limiter.try_acquire("sk-secret", ONE));
    assert!(shown.contains("keys: 1, max_keys: Some(10)"), "{shown}");
    assert!(!shown.contains("sk-"), "{shown}");
}
