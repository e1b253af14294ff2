//! Tests of shared rates that refuse calls, count by the calendar or are strict, over a real Redis server.

use std::{
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};
use support::{ms, redis::Server};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep},
};
use tower_outbound::{
    Cost, Limits, Rate, RateLimiter,
    error::{AcquireError, Exhausted},
    rate::redis,
};

mod support;

const DAY: u64 = 24 * 60 * 60;

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

fn members<const N: usize>(server: &Server, limits: &Limits) -> [RateLimiter; N] {
    [0; N].map(|_| redis::connect(&server.url(), "quota", limits.clone()).unwrap())
}

#[tokio::test]
#[ignore = "needs redis-server"]
async fn a_cap_is_counted_over_all_members_and_refuses_without_taking_anything_else() {
    let server = Server::start();
    let limits = Limits::new()
        .tokens(Rate::per_hour(1_000))
        .budget("cents", Rate::per_hour(100).refuse());
    let members = members::<3>(&server, &limits);
    let cost = || Cost::tokens(10).with("cents", 15);
    let mut admitted = 0;
    let mut refused = None;
    for member in members.iter().cycle().take(12) {
        match member.acquire(cost()).await {
            Ok(()) => admitted += 1,
            Err(error) => refused = Some(exhausted(error)),
        }
    }
    assert_eq!(admitted, 6);
    let refused = refused.unwrap();
    assert_eq!((refused.budget(), refused.cost(), refused.left()), ("cents", 15, 10));
    // 36 s bring one cent, of which 5 are missing.
    assert!((170..=180).contains(&refused.retry_after().as_secs()), "{refused}");
    // 6 admitted calls took 60 tokens, and a call that costs no cents is not refused.
    members[0].acquire(Cost::tokens(900)).await.unwrap();
    assert_eq!(members[0].available().tokens, Some(40));
}

#[tokio::test]
#[ignore = "needs redis-server"]
async fn a_day_that_begins_while_members_are_at_work_is_counted_once() {
    let server = Server::start();
    // A day that begins in 2 to 3 s from now.
    let since_midnight = SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs() % DAY;
    let starts = Duration::from_secs((since_midnight + 3) % DAY);
    let limits = Limits::new().budget("cents", Rate::utc_day(300).starting_at(starts).refuse());
    let members = members::<4>(&server, &limits);
    let (admitted, resets) = (Arc::new(Mutex::new(0)), Arc::new(Mutex::new(Vec::new())));
    let begun = Instant::now();
    let mut tasks = JoinSet::new();
    for member in members {
        let (admitted, resets) = (admitted.clone(), resets.clone());
        tasks.spawn(async move {
            while begun.elapsed() < ms(4_000) {
                match member.acquire(cents(1)).await {
                    Ok(()) => *admitted.lock().unwrap() += 1,
                    Err(error) => {
                        resets.lock().unwrap().push(exhausted(error).resets_at());
                        sleep(ms(3)).await;
                    }
                }
            }
        });
    }
    while let Some(task) = tasks.join_next().await {
        task.unwrap();
    }
    assert_eq!(*admitted.lock().unwrap(), 600);
    let seconds = |time: &SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let mut resets: Vec<_> = resets.lock().unwrap().iter().map(seconds).collect();
    resets.sort_unstable();
    resets.dedup();
    // To the microsecond: the start of the day, and of the next one.
    let first = Duration::from_secs(SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs() / DAY * DAY) + starts;
    assert_eq!(resets, [first, first + Duration::from_secs(DAY)]);
}

#[tokio::test]
#[ignore = "needs redis-server"]
async fn the_calls_of_all_members_of_a_strict_rate_are_never_closer_than_it_says() {
    let server = Server::start();
    let limits = Limits::new().requests(Rate::per_second(20).burst(1).strict());
    let members = members::<3>(&server, &limits);
    let times = Arc::new(Mutex::new(Vec::new()));
    let mut tasks = JoinSet::new();
    for member in members {
        let times = times.clone();
        tasks.spawn(async move {
            for _ in 0..20 {
                member.acquire(Cost::request()).await.unwrap();
                times.lock().unwrap().push(Instant::now());
            }
        });
    }
    while let Some(task) = tasks.join_next().await {
        task.unwrap();
    }
    let times = times.lock().unwrap();
    // The members read the server's clock to about a millisecond.
    let closest = times.windows(2).map(|pair| pair[1] - pair[0]).min().unwrap();
    assert!(closest >= ms(48), "{closest:?}");
    let rate = 59.0 / (times[59] - times[0]).as_secs_f64();
    println!("closest {closest:?}, {rate:.1} a second");
    assert!(rate > 15.0, "{rate}");
}
