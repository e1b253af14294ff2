//! A limit for the number of keys.

use crate::{ONE, requests, secs, support::ms};
use std::{collections::HashMap, time::Duration};
use tokio::time::{Instant, advance};
use tokio_test::{assert_pending, task};
use tower_outbound::{Limits, Rate, RateLimiter, error::AcquireError};

#[tokio::test(start_paused = true)]
async fn a_new_key_beyond_the_cap_is_refused_until_a_key_is_full() {
    let limiter = requests(Rate::per_second(1)).max_keys(100).unwrap();
    for key in 0..100 {
        limiter.try_acquire(&key, ONE).unwrap();
        advance(ms(1)).await;
    }
    let refused = limiter.try_acquire(&100, ONE).unwrap_err();
    assert!(matches!(refused, AcquireError::TooManyKeys(full) if full.max() == 100));
    assert_eq!(refused.retry_after(), Some(ms(900)));
    for error in [
        limiter.acquire(&100, ONE).await.unwrap_err(),
        limiter.try_acquire_estimate(&100, ONE).unwrap_err(),
        limiter.acquire_estimate(&100, ONE).await.unwrap_err(),
        limiter.pause(&100, Instant::now() + secs(1)).unwrap_err().into(),
    ] {
        assert_eq!(error, refused);
    }
    // The keys that are held go on.
    assert_eq!(limiter.try_acquire(&0, ONE), Err(AcquireError::NotYet(ms(900))));
    advance(ms(900)).await;
    limiter.try_acquire(&100, ONE).unwrap();
    assert_eq!(limiter.try_acquire(&101, ONE).unwrap_err().retry_after(), Some(ms(1)));
    limiter.try_acquire(&1, ONE).unwrap_err();
    assert_eq!(limiter.len(), 100);
}

#[tokio::test(start_paused = true)]
async fn the_time_to_retry_after_is_not_known_while_all_keys_have_open_estimates() {
    let limiter = requests(Rate::per_second(1)).max_keys(2).unwrap();
    let open = limiter.try_acquire_estimate(&1, ONE).unwrap();
    let mut waits = task::spawn(limiter.acquire(&1, ONE));
    assert_pending!(waits.poll());
    let estimate = limiter.try_acquire_estimate(&2, ONE).unwrap();
    let refused = limiter.try_acquire(&3, ONE).unwrap_err();
    assert!(matches!(refused, AcquireError::TooManyKeys(_)));
    assert_eq!(refused.retry_after(), None);
    // A refund may make a key full at once.
    estimate.settle(ONE.with("requests", 0));
    limiter.try_acquire(&3, ONE).unwrap();
    drop((waits, open));
    assert_eq!(limiter.try_acquire(&4, ONE).unwrap_err().retry_after(), Some(secs(1)));
}

#[tokio::test(start_paused = true)]
async fn under_churn_no_key_is_over_its_limit_and_none_is_refused_while_there_is_room() {
    const CAP: usize = 100;
    let limits = || Limits::new().requests(Rate::new(7, Duration::from_nanos(1_999_999_973)).burst(3));
    let limiter = requests(Rate::per_second(1)).max_keys(CAP).unwrap();
    limiter.set_limits(limits()).unwrap();
    let mut rng = fastrand::Rng::with_seed(3);
    let mut model: HashMap<u64, RateLimiter> = HashMap::new();
    let (mut refused, mut decided) = (0, 0);
    for _ in 0..30_000 {
        advance(Duration::from_nanos(rng.u64(0..=3_000_000))).await;
        let key = (rng.f64() * (5_000_f64).ln()).exp() as u64;
        let owes = |limiter: &RateLimiter| !limiter.wait_for(ONE.with("requests", 3)).is_zero();
        match limiter.try_acquire(&key, ONE) {
            Err(AcquireError::TooManyKeys(full)) => {
                refused += 1;
                model.retain(|_, limiter| owes(limiter));
                assert!(model.len() >= CAP && !model.contains_key(&key));
                let next = model
                    .values()
                    .map(|limiter| limiter.wait_for(ONE.with("requests", 3)))
                    .min();
                assert!(full.retry_after() <= next, "{full:?} {next:?}");
            }
            decision => {
                decided += 1;
                let limiter = model.entry(key).or_insert_with(|| RateLimiter::new(limits()).unwrap());
                assert_eq!(decision, limiter.try_acquire(ONE));
            }
        }
    }
    assert!(refused > 1_000 && decided > 1_000, "{refused} {decided}");
}

#[tokio::test(start_paused = true)]
async fn a_cap_below_the_keys_that_are_held_applies_to_new_ones() {
    let limiter = requests(Rate::per_second(2).burst(2));
    (0..10).for_each(|key| limiter.try_acquire(&key, ONE).unwrap());
    let limiter = limiter.max_keys(5).unwrap();
    assert!(limiter.try_acquire(&10, ONE).is_err());
    (0..10).for_each(|key| limiter.try_acquire(&key, ONE).unwrap());
    advance(secs(1)).await;
    (20..25).for_each(|key| limiter.try_acquire(&key, ONE).unwrap());
    assert!(limiter.try_acquire(&25, ONE).is_err());
}
