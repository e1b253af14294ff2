//! Tiers, limits that are changed, and rates whose keys cannot be at rest in cells.

use crate::{ONE, requests, secs, support::ms};
use allocation_counter::measure;
use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};
use tokio::time::{Instant, advance};
use tokio_test::{assert_pending, assert_ready_err, assert_ready_ok, task};
use tower_outbound::{Cost, KeyedRateLimiter, Limits, Rate, error::AcquireError};

#[tokio::test(start_paused = true)]
async fn each_key_has_the_limits_of_its_tier() {
    let tiers = [1, 10, 100].map(|burst| Limits::new().requests(Rate::per_second(burst)));
    let limiter = KeyedRateLimiter::with_tiers(tiers, |key: &u64| (key % 4) as usize).unwrap();
    for (key, burst) in [(0, 1), (1, 10), (2, 100), (3, 100)] {
        assert_eq!(limiter.available(&key).requests, Some(burst));
        limiter.try_acquire(&key, ONE.with("requests", burst)).unwrap();
        let wait = limiter.try_acquire(&key, ONE).unwrap_err().retry_after();
        assert_eq!(wait, Some(secs(1) / burst as u32));
    }
    assert_eq!(limiter.set_limits(Limits::new()).unwrap_err().field(), "tier");
    assert_eq!(limiter.set_tier_limits(3, Limits::new()).unwrap_err().field(), "tier");
    limiter
        .set_tier_limits(1, Limits::new().requests(Rate::per_second(1).burst(10)))
        .unwrap();
    assert_eq!(limiter.wait_for(&1, ONE), secs(1));
    assert_eq!(limiter.wait_for(&2, ONE), ms(10));
}

#[tokio::test(start_paused = true)]
async fn tiers_may_limit_different_budgets() {
    let tiers = [
        Limits::new(),
        Limits::new()
            .tokens(Rate::per_second(5))
            .requests(Rate::per_minute(1))
            .budget("images", Rate::per_hour(3)),
    ];
    let limiter = KeyedRateLimiter::with_tiers(tiers, |key: &String| usize::from(key.starts_with('b'))).unwrap();
    limiter.try_acquire("a", Cost::tokens(u64::MAX)).unwrap();
    limiter.try_acquire("b", Cost::tokens(5)).unwrap();
    assert_eq!(limiter.wait_for("b", ONE), secs(60));
    assert_eq!(limiter.available("a").tokens, None);
    assert_eq!(limiter.len(), 1);
    assert_eq!(
        limiter.check("b", ONE.with("images", 4)).unwrap_err().budget(),
        "images"
    );
}

#[test]
fn a_tier_function_that_panics_fails_its_own_call_only() {
    let tiers = [Limits::new().requests(Rate::per_hour(2))];
    let tier_of = |key: &u64| if *key == 13 { panic!("no tier") } else { 0 };
    let limiter = KeyedRateLimiter::with_tiers(tiers, tier_of)
        .unwrap()
        .max_keys(1_000)
        .unwrap();
    for key in 0..500 {
        let call = std::panic::AssertUnwindSafe(|| limiter.try_acquire(&key, ONE));
        assert_eq!(std::panic::catch_unwind(call).is_err(), key == 13);
    }
    limiter
        .set_tier_limits(0, Limits::new().requests(Rate::per_hour(3)))
        .unwrap();
    assert_eq!((limiter.len(), limiter.available(&7).requests), (499, Some(1)));
}

#[tokio::test(start_paused = true)]
async fn changed_limits_apply_at_once_to_keys_at_rest_and_to_waiting_calls() {
    let limiter = requests(Rate::per_minute(60).burst(10));
    limiter.try_acquire(&1, ONE.with("requests", 10)).unwrap();
    limiter.try_acquire(&2, ONE.with("requests", 10)).unwrap();
    let mut first = task::spawn(limiter.acquire(&2, ONE));
    let mut second = task::spawn(limiter.acquire(&2, ONE.with("requests", 5)));
    assert_pending!(first.poll());
    assert_pending!(second.poll());
    limiter
        .set_limits(Limits::new().requests(Rate::per_minute(600).burst(4)))
        .unwrap();
    assert_eq!(limiter.wait_for(&1, ONE), ms(100));
    assert!(matches!(
        assert_ready_err!(second.poll()),
        AcquireError::CostExceedsBurst(_)
    ));
    advance(ms(100)).await;
    assert_ready_ok!(first.poll());
    // A key that owes nothing is full under the new limits; one that owes keeps what it holds.
    assert_eq!(limiter.available(&3).requests, Some(4));
    limiter
        .set_limits(Limits::new().requests(Rate::per_minute(600).burst(40)))
        .unwrap();
    let held = [1, 2, 3].map(|key| limiter.available(&key).requests);
    assert_eq!(held, [Some(1), Some(0), Some(40)]);
    assert!(limiter.set_limits(Limits::new().requests(Rate::per_second(0))).is_err());
    assert_eq!(limiter.available(&3).requests, Some(40));
}

#[tokio::test(start_paused = true)]
async fn a_rate_by_the_calendar_holds_a_key_until_its_window_ends() {
    let limits = Limits::new().requests(Rate::utc_day(10));
    let limiter = KeyedRateLimiter::<u64>::new(limits).unwrap();
    assert_eq!(limiter.available(&1).requests, Some(10));
    assert!(limiter.wait_for(&1, ONE.with("requests", 11)) > Duration::ZERO);
    limiter.try_acquire(&1, ONE.with("requests", 7)).unwrap();
    let wait = limiter
        .try_acquire(&1, ONE.with("requests", 7))
        .unwrap_err()
        .retry_after()
        .unwrap();
    assert!(wait <= secs(24 * 3_600) && wait > Duration::ZERO);
    assert_eq!((limiter.available(&1).requests, limiter.len()), (Some(3), 1));
    advance(wait - Duration::from_nanos(1)).await;
    assert_eq!((limiter.available(&1).requests, limiter.len()), (Some(3), 1));
    advance(Duration::from_nanos(1)).await;
    assert_eq!((limiter.available(&1).requests, limiter.len()), (Some(10), 0));
}

#[tokio::test(start_paused = true)]
async fn limits_may_change_between_the_calendar_and_continuous_rates() {
    let continuous = || Limits::new().requests(Rate::per_day(10));
    let calendar = || Limits::new().requests(Rate::utc_day(10));
    let limiter = KeyedRateLimiter::<u64>::new(continuous()).unwrap();
    for key in 0..100 {
        limiter.try_acquire(&key, ONE.with("requests", key % 11)).unwrap();
    }
    let held =
        |limiter: &KeyedRateLimiter<u64>| (0..100).map(|key| limiter.available(&key).requests).collect::<Vec<_>>();
    let before = held(&limiter);
    for limits in [calendar(), continuous(), calendar(), continuous()] {
        limiter.set_limits(limits).unwrap();
        assert_eq!(held(&limiter), before);
    }
    advance(secs(24 * 3_600)).await;
    assert_eq!(limiter.len(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_rate_too_fast_for_a_cell_is_exact_too() {
    // Adds 2^40 units in each nanosecond.
    let limiter = requests(Rate::new(2_u64.pow(40), Duration::from_nanos(3)).burst(2_u64.pow(40)));
    limiter.try_acquire(&1, ONE.with("requests", 2_u64.pow(40))).unwrap();
    assert_eq!(limiter.len(), 1);
    let wait = limiter
        .try_acquire(&1, ONE.with("requests", 2_u64.pow(40)))
        .unwrap_err();
    assert_eq!(wait.retry_after(), Some(Duration::from_nanos(3)));
    advance(Duration::from_nanos(3)).await;
    assert_eq!(limiter.len(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_debt_that_is_full_only_after_centuries_is_kept() {
    let rate = Rate::new(1, secs(3_600 * 24 * 365 * 290)).max_debt(1_000_u64);
    let limiter = requests(rate);
    let estimate = limiter.try_acquire_estimate(&1, ONE).unwrap();
    estimate.settle(ONE.with("requests", 1_001));
    advance(secs(3_600 * 24 * 365)).await;
    assert_eq!((limiter.available(&1).requests, limiter.len()), (Some(0), 1));
    assert!(limiter.try_acquire(&1, ONE).is_err());
}

#[test]
fn a_limiter_that_is_kept_over_several_runtimes_admits_calls_in_each() {
    let limiter = requests(Rate::per_second(10).burst(1));
    let runtime = || {
        tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap()
    };
    runtime().block_on(async {
        advance(secs(3_600)).await;
        limiter.acquire(&1, ONE).await.unwrap();
    });
    // The clock of the second runtime is an hour behind that of the first one.
    runtime().block_on(async {
        let start = Instant::now();
        limiter.acquire(&1, ONE).await.unwrap();
        limiter.acquire(&1, ONE).await.unwrap();
        assert_eq!(start.elapsed(), ms(200));
    });
}

#[test]
fn changed_limits_reach_a_key_when_it_is_met_so_the_change_itself_looks_at_none() {
    const HELD: u64 = 50_000;
    let looks = Arc::new(AtomicUsize::new(0));
    let counted = looks.clone();
    let tier_of = move |_: &u64| {
        counted.fetch_add(1, Relaxed);
        0
    };
    let limits = |burst: u64| Limits::new().requests(Rate::per_hour(10).burst(burst));
    let limiter = KeyedRateLimiter::with_tiers([limits(5)], tier_of).unwrap();
    (0..HELD).for_each(|key| limiter.try_acquire(&key, ONE.with("requests", 4)).unwrap());
    let change = measure(|| {
        looks.store(0, Relaxed);
        limiter.set_limits(limits(3)).unwrap();
        assert_eq!(looks.load(Relaxed), 0);
    });
    assert!(change.bytes_max < 1_000_000, "{change:?}");
    let mut most = 0;
    for key in 0..HELD {
        looks.store(0, Relaxed);
        assert_eq!(limiter.available(&key).requests, Some(1));
        most = most.max(looks.load(Relaxed));
    }
    // Its own key, with one look to move it and one to read it, and some others.
    assert!((3..=130).contains(&most), "{most}");
    assert_eq!(limiter.len(), HELD as usize);
    // All keys have been met: a call looks at its own again, and the tables that were put aside are gone.
    looks.store(0, Relaxed);
    (0..HELD).for_each(|key| limiter.try_acquire(&key, ONE).unwrap());
    assert_eq!(looks.load(Relaxed), HELD as usize);
    assert_eq!(limiter.len(), HELD as usize);
}

#[tokio::test(start_paused = true)]
async fn limits_that_are_changed_again_and_again_without_a_call_leave_nothing() {
    let limits = |burst: u64| Limits::new().requests(Rate::per_hour(10).burst(burst));
    let limiter = KeyedRateLimiter::<u64>::new(limits(5)).unwrap();
    (0..1_000).for_each(|key| limiter.try_acquire(&key, ONE).unwrap());
    let change = || (0..100).for_each(|change| limiter.set_limits(limits(5 + change % 2)).unwrap());
    change();
    let later = measure(change);
    assert!(later.bytes_current.abs() < 500_000, "{later:?}");
    advance(secs(3_600)).await;
    assert_eq!(limiter.len(), 0);
}
