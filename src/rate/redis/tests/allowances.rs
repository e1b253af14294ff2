//! Tests of shared rates that refuse calls, count by the calendar, or are strict.

use super::*;
use crate::error::Exhausted;
use std::time::SystemTime;

const SECOND: i64 = 1_000_000;
/// Midnight UTC of January 1, 2027, in microseconds since 1970.
const NEW_YEAR: i64 = 1_798_761_600 * SECOND;
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Returns the cost of one request and so many cents.
fn cents(cents: u64) -> Cost {
    Cost::request().with("cents", cents)
}

fn exhausted(error: AcquireError) -> Exhausted {
    match error {
        AcquireError::Exhausted(exhausted) => exhausted,
        other => panic!("{other}"),
    }
}

/// Returns the wall-clock time so long after new year.
fn new_year(after: Duration) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_micros(NEW_YEAR.unsigned_abs()) + after
}

#[tokio::test(start_paused = true)]
async fn a_cap_refuses_the_calls_of_all_members_and_takes_nothing_from_any_other_budget() {
    let server = Server::new();
    let limits = Limits::new()
        .requests(Rate::per_second(10))
        .budget("cents", Rate::per_hour(3_600).burst(100).refuse());
    let (one, other) = (server.member(limits.clone()), server.member(limits));
    one.acquire(cents(70)).await.unwrap();
    let start = Instant::now();
    let refused = exhausted(other.acquire(cents(60)).await.unwrap_err());
    assert_eq!((refused.budget(), refused.cost(), refused.left()), ("cents", 60, 30));
    // The bucket lacks 30 cents, which are there 30 s after the first call was charged: its reply took 1 ms, and the
    // refusal 2 ms.
    assert_eq!(refused.retry_after(), ms(30_000 - 3));
    assert_eq!(start.elapsed(), ms(2));
    assert_eq!(other.available().requests, Some(9));
    sleep(refused.retry_after()).await;
    other.acquire(cents(60)).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_calls_behind_a_refused_one_are_served_in_the_same_round_trip() {
    let server = Server::new();
    let limits = Limits::new()
        .requests(Rate::per_second(1_000))
        .budget("cents", Rate::per_hour(100).refuse());
    let limiter = server.member(limits);
    let calls = [90, 20, 5, 20, 5].map(|cost| {
        let limiter = limiter.clone();
        tokio::spawn(async move { limiter.acquire(cents(cost)).await })
    });
    let mut left = Vec::new();
    for call in calls {
        left.push(call.await.unwrap().map_err(|error| exhausted(error).left()));
    }
    assert_eq!(left, [Ok(()), Err(10), Ok(()), Err(5), Ok(())]);
    let costs: Vec<_> = server.requests().iter().map(|request| request.costs.len()).collect();
    assert_eq!(costs, [5]);
}

#[tokio::test(start_paused = true)]
async fn a_call_is_refused_also_while_a_call_before_it_waits_for_another_rate() {
    let server = Server::new();
    let limits = Limits::new()
        .tokens(Rate::per_second(10).burst(100))
        .budget("cents", Rate::per_hour(10).refuse());
    let (one, other) = (server.member(limits.clone()), server.member(limits));
    one.acquire(Cost::tokens(100).with("cents", 10)).await.unwrap();
    let waiting = tokio::spawn({
        let one = one.clone();
        async move { one.acquire(Cost::tokens(100)).await }
    });
    sleep(ms(100)).await;
    let start = Instant::now();
    exhausted(other.acquire(cents(1)).await.unwrap_err());
    assert_eq!(start.elapsed(), ms(2));
    assert!(!waiting.is_finished());
    waiting.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_day_that_begins_between_two_members_is_counted_once() {
    let server = Server::with_clock(NEW_YEAR - 5 * SECOND);
    let limits = Limits::new()
        .requests(Rate::per_second(1_000))
        .budget("cents", Rate::utc_day(500).refuse());
    let members = [0; 8].map(|_| server.member(limits.clone()));
    let start = Instant::now();
    let admitted = Arc::new(Mutex::new([0_u64; 2]));
    let refused = Arc::new(Mutex::new(Vec::new()));
    let mut tasks = JoinSet::new();
    for member in members {
        let (admitted, refused) = (admitted.clone(), refused.clone());
        tasks.spawn(async move {
            while start.elapsed() < ms(10_000) {
                match member.acquire(cents(1)).await {
                    // A call is admitted up to a millisecond after the server has charged it.
                    Ok(()) => admitted.lock().unwrap()[usize::from(start.elapsed() > ms(5_001))] += 1,
                    Err(error) => {
                        refused.lock().unwrap().push(exhausted(error));
                        sleep(ms(7)).await;
                    }
                }
            }
        });
    }
    while let Some(task) = tasks.join_next().await {
        task.unwrap();
    }
    assert_eq!(*admitted.lock().unwrap(), [500, 500]);
    let refused = refused.lock().unwrap();
    let before = refused
        .iter()
        .filter(|refused| refused.resets_at() == new_year(Duration::ZERO));
    let after = refused.iter().filter(|refused| refused.resets_at() == new_year(DAY));
    assert!(before.clone().count() > 100);
    assert_eq!(before.count() + after.count(), refused.len());
}

#[tokio::test(start_paused = true)]
async fn a_call_waits_for_the_next_day_and_no_call_is_admitted_as_of_the_day_before() {
    let server = Server::with_clock(NEW_YEAR - 60 * SECOND);
    let limiter = server.member(Limits::new().requests(Rate::utc_day(3)));
    for _ in 0..3 {
        limiter.acquire(Cost::request()).await.unwrap();
    }
    let start = server.epoch;
    assert_eq!(
        limiter.wait(&Cost::request(), &Default::default()),
        ms(60_000) - start.elapsed()
    );
    assert_eq!(at(&limiter, Cost::request(), start).await, 60_000);
    assert_eq!(limiter.available().requests, Some(2));
    limiter.acquire(Cost::request()).await.unwrap();
    limiter.acquire(Cost::request()).await.unwrap();
    let next_day = ms(60_000) + DAY - start.elapsed();
    assert_eq!(limiter.wait(&Cost::request(), &Default::default()), next_day);
}

#[tokio::test(start_paused = true)]
async fn months_and_days_that_begin_later_have_the_same_windows_as_in_one_process() {
    let hours = |hours: u64| Duration::from_secs(hours * 60 * 60);
    let server = Server::with_clock(NEW_YEAR - 4 * 3_600 * SECOND);
    let limits = Limits::new()
        .budget("cents", Rate::utc_month(10).refuse())
        .requests(Rate::utc_day(5).starting_at(hours(8)));
    let limiter = server.member(limits);
    limiter.acquire(cents(10)).await.unwrap();
    let refused = exhausted(limiter.acquire(cents(1)).await.unwrap_err());
    assert_eq!(refused.resets_at(), new_year(Duration::ZERO));
    sleep(hours(4)).await;
    limiter.acquire(cents(10)).await.unwrap();
    // The day of the requests begins at 8:00.
    assert_eq!(limiter.available().requests, Some(3));
    sleep(hours(8)).await;
    limiter.acquire(cents(0)).await.unwrap();
    assert_eq!(limiter.available().requests, Some(4));
    let refused = exhausted(limiter.acquire(cents(1)).await.unwrap_err());
    assert_eq!(refused.resets_at(), new_year(DAY * 31));
}

#[tokio::test(start_paused = true)]
async fn calls_of_a_strict_rate_are_never_closer_than_the_rate_says_however_late_they_are() {
    let server = Server::new();
    let limits = Limits::new().requests(Rate::per_second(20).burst(1).strict());
    let members = [0; 3].map(|_| server.member(limits.clone()));
    let times = Arc::new(Mutex::new(Vec::new()));
    let mut tasks = JoinSet::new();
    for member in members {
        let times = times.clone();
        tasks.spawn(async move {
            for _ in 0..40 {
                let mut admission = member.admission(false);
                std::future::poll_fn(|cx| admission.poll(Cost::request(), cx))
                    .await
                    .unwrap();
                times.lock().unwrap().push(Instant::now());
            }
        });
    }
    // The clock of this process stands still for up to 5 ms again and again, so that calls are late.
    let mut rng = fastrand::Rng::with_seed(5);
    while !tasks.is_empty() {
        sleep(ms(rng.u64(1..9))).await;
        tokio::time::advance(ms(rng.u64(0..5))).await;
        while tasks.try_join_next().is_some() {}
    }
    let times = times.lock().unwrap();
    assert_eq!(times.len(), 120);
    let gaps = times.windows(2).map(|pair| pair[1] - pair[0]);
    assert!(gaps.clone().all(|gap| gap >= ms(50)), "{:?}", gaps.min());
    // Each wait is 5 ms longer than the rate says. Some reservations were given back, because they were too late.
    assert!(times[119] - times[0] < ms(119 * 75), "{:?}", times[119] - times[0]);
}

#[tokio::test(start_paused = true)]
async fn a_strict_rate_with_a_burst_above_what_it_brings_in_5_ms_loses_no_throughput() {
    let server = Server::new();
    let limiter = server.member(Limits::new().requests(Rate::per_second(1_000).burst(50).strict()));
    let start = Instant::now();
    let mut tasks = JoinSet::new();
    for _ in 0..50 {
        let limiter = limiter.clone();
        tasks.spawn(async move {
            for _ in 0..41 {
                limiter.acquire(Cost::request()).await.unwrap();
            }
        });
    }
    while let Some(task) = tasks.join_next().await {
        task.unwrap();
    }
    assert!(
        (1_990..2_020).contains(&start.elapsed().as_millis()),
        "{:?}",
        start.elapsed()
    );
}

#[tokio::test(start_paused = true)]
async fn a_member_without_the_store_admits_its_share_of_what_is_left_of_a_cap_and_refuses_the_rest() {
    let server = Server::with_clock(NEW_YEAR - 30 * SECOND);
    let limits = Limits::new()
        .requests(Rate::per_second(1_000))
        .budget("cents", Rate::utc_day(100).refuse());
    let members = [0; 4].map(|_| server.member(limits.clone()));
    for member in &members {
        member.acquire(cents(5)).await.unwrap();
    }
    sleep(ms(6_000)).await;
    server.set(Network::Refuses);
    let mut admitted = 0;
    for member in &members {
        // Until the store counts as lost, a call waits for it.
        while member.acquire(cents(1)).await.is_ok() {
            admitted += 1;
        }
        let refused = exhausted(member.acquire(cents(1)).await.unwrap_err());
        assert_eq!((refused.left(), refused.resets_at()), (0, new_year(Duration::ZERO)));
    }
    assert_eq!(admitted, 80);
    // The next day, each member has a share of the whole amount.
    sleep_until(server.epoch + ms(31_000)).await;
    for member in &members {
        while member.acquire(cents(5)).await.is_ok() {
            admitted += 5;
        }
    }
    assert_eq!(admitted, 80 + 100);
    // What was admitted without the store is charged to the day when the store is back.
    server.set(Network::Works);
    sleep(ms(5_000)).await;
    let refused = exhausted(members[0].acquire(cents(1)).await.unwrap_err());
    assert_eq!((refused.left(), refused.resets_at()), (0, new_year(DAY)));
}

#[tokio::test(start_paused = true)]
async fn a_short_loss_of_the_store_does_not_use_up_what_is_left_of_a_day() {
    let server = Server::with_clock(NEW_YEAR);
    let limits = Limits::new()
        .requests(Rate::per_second(100))
        .budget("cents", Rate::utc_day(100).refuse());
    let limiter = server.member(limits);
    limiter.acquire(cents(20)).await.unwrap();
    server.set(Network::Refuses);
    let start = Instant::now();
    // Local shares begin 1 s after the loss.
    limiter.acquire(cents(30)).await.unwrap();
    assert!(start.elapsed() < ms(1_300), "{:?}", start.elapsed());
    server.set(Network::Works);
    sleep(ms(5_000)).await;
    limiter.acquire(cents(50)).await.unwrap();
    assert_eq!(exhausted(limiter.acquire(cents(1)).await.unwrap_err()).left(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_day_goes_on_with_what_was_left_of_it_when_the_store_has_lost_its_state() {
    let server = Server::with_clock(NEW_YEAR);
    let limits = Limits::new()
        .requests(Rate::per_second(100))
        .budget("cents", Rate::utc_day(100).refuse());
    let (one, other) = (server.member(limits.clone()), server.member(limits));
    one.acquire(cents(20)).await.unwrap();
    other.acquire(cents(30)).await.unwrap();
    server.lose_state();
    // The member that finds the store empty knows of 80 that are left, and the other one of 50.
    let start = Instant::now();
    one.acquire(cents(20)).await.unwrap();
    assert!(start.elapsed() > ms(1_000));
    sleep(ms(5_000)).await;
    assert_eq!(exhausted(one.acquire(cents(90)).await.unwrap_err()).left(), 30);
    other.acquire(cents(30)).await.unwrap();
    assert_eq!(exhausted(one.acquire(cents(1)).await.unwrap_err()).left(), 0);
}
