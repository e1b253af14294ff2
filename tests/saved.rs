//! Saving what the buckets of a limiter hold, and restoring it, on Tokio's paused clock.

mod support;

use std::time::{Duration, SystemTime};
use support::{ms, pass};
use tokio_test::{assert_pending, assert_ready_ok, task};
use tower_outbound::{Cost, Limits, Rate, RateLimiter, rate::SavedLimits};

const HOUR: Duration = Duration::from_secs(60 * 60);

/// 20:00 UTC on December 31, 2026.
fn new_years_eve() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_798_747_200)
}

fn cents(cents: u64) -> Cost {
    Cost::request().with("cents", cents)
}

/// Saves a limiter of these limits from which `used` was taken at 20:00, an hour later.
async fn saved_after_an_hour(limits: Limits, used: Cost) -> SavedLimits {
    let limiter = RateLimiter::at(limits, new_years_eve()).unwrap();
    limiter.acquire(used).await.unwrap();
    pass(HOUR).await;
    limiter.save().unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_restored_bucket_holds_what_was_left_and_what_was_added_since() {
    let limits = || {
        Limits::new()
            .requests(Rate::per_day(240))
            .tokens(Rate::per_minute(1_000))
    };
    let saved = saved_after_an_hour(limits(), Cost::tokens(700).with("requests", 100)).await;
    for (later, requests) in [(Duration::ZERO, 150), (HOUR * 2, 170), (HOUR * 30, 240)] {
        let limiter = RateLimiter::at(limits(), new_years_eve() + HOUR + later).unwrap();
        limiter.restore(&saved).unwrap();
        assert_eq!(limiter.available().requests, Some(requests), "{later:?} later");
        assert_eq!(limiter.available().tokens, Some(1_000));
    }
}

#[tokio::test(start_paused = true)]
async fn a_day_of_the_calendar_stays_used_up_to_its_end() {
    let limits = || Limits::new().budget("cents", Rate::utc_day(100).refuse());
    let saved = saved_after_an_hour(limits(), cents(70)).await;
    for (at, left) in [(HOUR, 30), (HOUR * 4 - ms(1), 30), (HOUR * 4, 100), (HOUR * 40, 100)] {
        let limiter = RateLimiter::at(limits(), new_years_eve() + at).unwrap();
        limiter.restore(&saved).unwrap();
        assert_eq!(
            limiter.available().of("cents"),
            Some(left),
            "restored {at:?} after 20:00"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn estimates_that_are_not_settled_are_saved_as_used_and_debts_as_debts() {
    let limits = || Limits::new().tokens(Rate::per_hour(60));
    let limiter = RateLimiter::at(limits(), new_years_eve()).unwrap();
    let settled = limiter.acquire_estimate(Cost::tokens(10)).await.unwrap();
    let unsettled = limiter.acquire_estimate(Cost::tokens(20)).await.unwrap();
    settled.settle(Cost::tokens(70));
    let saved = limiter.save().unwrap();
    drop(unsettled);

    let restored = RateLimiter::at(limits(), new_years_eve()).unwrap();
    restored.restore(&saved).unwrap();
    // A debt of 30, filled at one token a minute.
    assert_eq!(restored.wait_for(Cost::tokens(1)), HOUR * 31 / 60);
}

#[tokio::test(start_paused = true)]
async fn restoring_acts_on_a_call_that_waits() {
    let limits = || Limits::new().requests(Rate::per_hour(2));
    let full = RateLimiter::at(limits(), new_years_eve()).unwrap().save().unwrap();
    let limiter = RateLimiter::at(limits(), new_years_eve()).unwrap();
    limiter.acquire(Cost::request().with("requests", 2)).await.unwrap();
    let mut waiting = task::spawn(limiter.acquire(Cost::request()));
    assert_pending!(waiting.poll());
    limiter.restore(&full).unwrap();
    assert!(waiting.is_woken());
    assert_ready_ok!(waiting.poll());
}

#[tokio::test(start_paused = true)]
async fn rates_are_restored_by_budget_and_period_whatever_their_order() {
    let minute = || Rate::per_minute(60);
    let day = || Rate::per_day(1_000);
    let limits = Limits::new().requests(minute()).requests(day()).budget("cents", day());
    let limiter = RateLimiter::at(limits, new_years_eve()).unwrap();
    limiter.acquire(cents(900).with("requests", 50)).await.unwrap();
    let saved = limiter.save().unwrap();
    let other = Limits::new()
        .budget("cents", day())
        .budget("images", day())
        .requests(day());
    let limiter = RateLimiter::at(other, new_years_eve()).unwrap();
    limiter.restore(&saved).unwrap();
    assert_eq!(limiter.available().requests, Some(950));
    assert_eq!(limiter.available().of("cents"), Some(100));
    assert_eq!(limiter.available().of("images"), Some(1_000));
}

#[tokio::test(start_paused = true)]
async fn saved_limits_of_another_limiter_are_an_error_and_change_nothing() {
    let saved = saved_after_an_hour(Limits::new().requests(Rate::per_day(10)), Cost::request()).await;
    for limits in [
        Limits::new().requests(Rate::per_hour(10)),
        Limits::new().requests(Rate::utc_day(10)),
        Limits::new().tokens(Rate::per_day(10)),
    ] {
        let limiter = RateLimiter::new(limits).unwrap();
        let before = limiter.available();
        assert_eq!(limiter.restore(&saved).unwrap_err().field(), "saved.rates");
        assert_eq!(limiter.available(), before);
    }
}

#[cfg(feature = "serde")]
#[tokio::test(start_paused = true)]
async fn saved_limits_are_written_as_json_with_a_version() {
    let limits = || Limits::new().budget("cents", Rate::utc_day(100));
    let saved = saved_after_an_hour(limits(), cents(70)).await;
    let mut json = serde_json::to_value(&saved).unwrap();
    assert_eq!(json["version"], 1);
    assert_eq!(
        (&json["rates"][0]["budget"], &json["rates"][0]["held"]),
        (&"cents".into(), &30.into())
    );
    assert_eq!(serde_json::from_value::<SavedLimits>(json.clone()).unwrap(), saved);

    json["version"] = 2.into();
    let newer = serde_json::from_value::<SavedLimits>(json).unwrap();
    let limiter = RateLimiter::new(limits()).unwrap();
    assert_eq!(limiter.restore(&newer).unwrap_err().field(), "saved.version");
    assert!(serde_json::from_str::<SavedLimits>("{\"requests\": 5}").is_err());
}
