//! Rates that refuse calls, and rates by the calendar, on Tokio's paused clock.

mod support;

use std::time::{Duration, SystemTime};
use support::{ms, pass};
use tokio_test::{assert_pending, assert_ready_err, assert_ready_ok, task};
use tower::{ServiceExt, service_fn};
use tower_outbound::{
    Cost, Executor, Limits, Rate, RateLimiter,
    error::{AcquireError, Exhausted},
};

const HOUR: Duration = Duration::from_secs(60 * 60);

/// Returns the cost of one request and so many cents.
fn cents(cents: u64) -> Cost {
    Cost::request().with("cents", cents)
}

/// 20:00 UTC on December 31, 2026.
fn new_years_eve() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_798_747_200)
}

fn exhausted(error: AcquireError) -> Exhausted {
    match error {
        AcquireError::Exhausted(exhausted) => exhausted,
        other => panic!("{other}"),
    }
}

#[tokio::test(start_paused = true)]
async fn a_cap_refuses_at_once_and_takes_nothing_from_any_other_budget() {
    let limits = Limits::new()
        .requests(Rate::per_second(10))
        .budget("cents", Rate::per_hour(100).refuse());
    let limiter = RateLimiter::new(limits).unwrap();
    limiter.acquire(cents(70)).await.unwrap();
    let refused = exhausted(assert_ready_err!(task::spawn(limiter.acquire(cents(60))).poll()));
    assert_eq!((refused.budget(), refused.cost(), refused.left()), ("cents", 60, 30));
    assert_eq!(refused.retry_after(), HOUR * 30 / 100);
    assert_eq!(limiter.available().requests, Some(9));
    assert_eq!(
        refused.to_string(),
        "the call costs 60 cents, of which 30 are left: retry in 1080s"
    );
    assert_eq!(limiter.try_acquire(cents(60)), Err(AcquireError::Exhausted(refused)));
    assert_eq!(
        limiter.try_acquire(cents(60)).unwrap_err().retry_after(),
        Some(HOUR * 30 / 100)
    );
    assert!(matches!(
        limiter.try_acquire(cents(101)),
        Err(AcquireError::CostExceedsBurst(_))
    ));
    pass(HOUR * 30 / 100).await;
    limiter.acquire(cents(60)).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_call_that_waits_for_another_rate_is_refused_when_its_turn_has_come_and_the_cap_is_used_up() {
    let limits = Limits::new()
        .requests(Rate::per_second(1).burst(1))
        .budget("cents", Rate::utc_day(100).refuse());
    let limiter = RateLimiter::new(limits).unwrap();
    limiter.acquire(cents(0)).await.unwrap();
    let mut calls: Vec<_> = (0..3).map(|_| task::spawn(limiter.acquire(cents(60)))).collect();
    calls.iter_mut().for_each(|call| assert_pending!(call.poll()));
    pass(ms(1_000)).await;
    assert_ready_ok!(calls[0].poll());
    // The others need not wait for a request of their own.
    pass(ms(1_000)).await;
    for call in &mut calls[1..] {
        assert_eq!(exhausted(assert_ready_err!(call.poll())).left(), 40);
    }
    assert_eq!(limiter.available().requests, Some(1));
}

#[tokio::test(start_paused = true)]
async fn what_calls_use_above_their_estimates_exceeds_the_cap_by_no_more_than_that() {
    let limiter = RateLimiter::new(Limits::new().budget("cents", Rate::utc_day(100).refuse())).unwrap();
    let mut in_flight = Vec::new();
    while let Ok(estimate) = limiter.try_acquire_estimate(cents(30)) {
        in_flight.push(estimate);
    }
    assert_eq!(in_flight.len(), 3);
    in_flight.into_iter().for_each(|estimate| estimate.settle(cents(50)));
    assert_eq!(limiter.available().of("cents"), Some(0));
    let refused = exhausted(limiter.try_acquire(cents(1)).unwrap_err());
    assert_eq!(refused.left(), 0);
    assert_eq!(limiter.try_acquire(cents(0)), Ok(()));
}

#[tokio::test(start_paused = true)]
async fn a_day_of_the_calendar_begins_at_midnight_with_the_whole_amount() {
    let limits = Limits::new().requests(Rate::utc_day(3));
    let limiter = RateLimiter::at(limits, new_years_eve()).unwrap();
    for _ in 0..3 {
        limiter.acquire(Cost::request()).await.unwrap();
    }
    pass(HOUR).await;
    assert_eq!(limiter.available().requests, Some(0));
    assert_eq!(limiter.wait_for(Cost::request()), HOUR * 3);
    let mut next = task::spawn(limiter.acquire(Cost::request()));
    assert_pending!(next.poll());
    pass(HOUR * 3 - ms(1)).await;
    assert_pending!(next.poll());
    pass(ms(1)).await;
    assert_ready_ok!(next.poll());
    assert_eq!(limiter.available().requests, Some(2));
    assert_eq!(
        limiter.try_acquire(Cost::request().with("requests", 3)),
        Err(AcquireError::NotYet(HOUR * 24))
    );
}

#[tokio::test(start_paused = true)]
async fn a_cap_by_the_calendar_tells_when_it_is_reset() {
    let limits = Limits::new()
        .budget("cents", Rate::utc_month(10).refuse())
        .requests(Rate::utc_day(5).starting_at(HOUR * 8));
    let limiter = RateLimiter::at(limits, new_years_eve()).unwrap();
    limiter.acquire(cents(10)).await.unwrap();
    let refused = exhausted(limiter.try_acquire(cents(1)).unwrap_err());
    assert_eq!(refused.retry_after(), HOUR * 4);
    assert_eq!(refused.resets_at(), new_years_eve() + HOUR * 4);
    pass(HOUR * 4).await;
    assert_eq!(limiter.available().of("cents"), Some(10));
    // The day of the requests begins at 8:00.
    assert_eq!(limiter.available().requests, Some(4));
    pass(HOUR * 8).await;
    assert_eq!(limiter.available().requests, Some(5));
}

#[tokio::test(start_paused = true)]
async fn a_refund_of_a_call_of_yesterday_does_not_count_today() {
    let limiter = RateLimiter::at(Limits::new().requests(Rate::utc_day(10)), new_years_eve()).unwrap();
    let yesterday = limiter
        .acquire_estimate(Cost::request().with("requests", 8))
        .await
        .unwrap();
    pass(HOUR * 5).await;
    limiter.acquire(Cost::request().with("requests", 7)).await.unwrap();
    yesterday.settle(Cost::none());
    assert_eq!(limiter.available().requests, Some(3));
}

#[tokio::test(start_paused = true)]
async fn what_was_used_of_a_day_stays_used_when_the_limits_are_set_again() {
    let day = || Rate::utc_day(500);
    let limits = Limits::new().requests(Rate::per_minute(1_000)).requests(day().refuse());
    let limiter = RateLimiter::at(limits, new_years_eve()).unwrap();
    limiter.acquire(Cost::request().with("requests", 499)).await.unwrap();
    limiter.set_limits(Limits::new().requests(day())).unwrap();
    assert_eq!(limiter.available().requests, Some(1));
    let other_order = Limits::new().requests(day()).requests(Rate::per_minute(1_000));
    limiter.set_limits(other_order).unwrap();
    assert_eq!(limiter.available().requests, Some(1));
}

#[tokio::test(start_paused = true)]
async fn a_debt_of_a_day_ends_with_it_so_that_no_call_waits_for_longer() {
    let limiter = RateLimiter::at(Limits::new().requests(Rate::utc_day(100)), new_years_eve()).unwrap();
    let first = limiter.try_acquire_estimate(Cost::request()).unwrap();
    first.settle(Cost::request().with("requests", 150));
    let most = Cost::request().with("requests", 100);
    assert_eq!(limiter.wait_for(most), HOUR * 4);
    assert_eq!(limiter.try_acquire(most), Err(AcquireError::NotYet(HOUR * 4)));
    let mut next = task::spawn(limiter.acquire(most));
    assert_pending!(next.poll());
    pass(HOUR * 4).await;
    assert_ready_ok!(next.poll());
}

#[test]
fn settings_that_do_not_fit_a_calendar_are_errors_that_name_them() {
    let field = |rate| {
        RateLimiter::new(Limits::new().requests(rate))
            .unwrap_err()
            .field()
            .to_owned()
    };
    assert_eq!(field(Rate::utc_day(5).burst(2)), "requests.burst");
    assert_eq!(field(Rate::utc_day(5).starting_at(HOUR * 24)), "requests.starting_at");
    assert_eq!(field(Rate::per_day(5).starting_at(HOUR)), "requests.starting_at");
    assert_eq!(field(Rate::utc_day(0)), "requests.amount");
}

#[tokio::test(start_paused = true)]
async fn an_executor_tells_which_budget_is_exhausted() {
    let limiter = RateLimiter::new(Limits::new().budget("cents", Rate::utc_day(50).refuse())).unwrap();
    let client = service_fn(async |_: http::Request<()>| Ok::<_, tower::BoxError>(http::Response::new(())));
    let executor = Executor::builder()
        .limiter(limiter)
        .cost(|_: &http::Request<()>| cents(30))
        .build(client)
        .unwrap();
    executor.start().unwrap();
    executor.clone().oneshot(http::Request::new(())).await.unwrap();
    let error = executor.clone().oneshot(http::Request::new(())).await.unwrap_err();
    assert!(error.is_exhausted());
    assert_eq!(error.find::<Exhausted>().unwrap().left(), 20);
}
