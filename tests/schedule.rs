//! The order of an executor's calls by a [`Schedule`].

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};
use support::ms;
use tokio::time::{Instant, sleep};
use tower_outbound::{Call, Executor, Limits, Rate, Schedule, Shutdown, schedule::Level};

mod support;

type Request = http::Request<u64>;
type Response = http::Response<()>;

/// When each call reached the client, with the number in its body.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<(u64, Instant)>>>);

impl Log {
    fn at(&self) -> Vec<(u64, Instant)> {
        self.0.lock().unwrap().clone()
    }
}

/// Returns an executor whose calls take `takes`.
fn executor(schedule: Schedule, limits: Limits, permits: usize, takes: Duration) -> (Executor<u64, ()>, Log) {
    let log = Log::default();
    let client = {
        let log = log.clone();
        tower::service_fn(move |request: Request| {
            let log = log.clone();
            async move {
                log.0.lock().unwrap().push((*request.body(), Instant::now()));
                sleep(takes).await;
                Ok::<_, std::io::Error>(Response::new(()))
            }
        })
    };
    let executor = Executor::builder()
        .concurrency_limit(permits)
        .limits(limits)
        .schedule(schedule)
        .build(client)
        .unwrap();
    executor.start().unwrap();
    (executor, log)
}

fn call(number: u64) -> Call<u64> {
    Call::from(http::Request::post("http://localhost/").body(number).unwrap())
}

#[tokio::test(start_paused = true)]
async fn one_flow_is_first_in_first_out() {
    let (executor, log) = executor(
        Schedule::new(),
        Limits::new().requests(Rate::per_second(10).burst(1)),
        3,
        ms(500),
    );
    let start = Instant::now();
    let mut handles = Vec::new();
    for number in 0..20 {
        handles.push(executor.submit(call(number)).await.unwrap());
    }
    for handle in handles {
        handle.await.unwrap();
    }
    let log = log.at();
    assert!(log.iter().map(|(number, _)| *number).eq(0..20), "{log:?}");
    // Three calls at once, half a second each: three of each half second.
    let at: Vec<_> = log.iter().map(|(_, at)| (*at - start).as_millis()).collect();
    assert_eq!(&at[..6], [0, 100, 200, 500, 600, 700]);
    executor.stop(Shutdown::Graceful).await;
}

#[tokio::test(start_paused = true)]
async fn ten_calls_beside_the_ten_thousand_of_another_tenant_end_in_seconds() {
    let schedule = Schedule::new().level(Level::by("tenant"));
    let limits = Limits::new().requests(Rate::per_second(10).burst(1));
    let (executor, log) = executor(schedule.clone(), limits, 10, ms(500));
    let flood = {
        let executor = executor.clone();
        tokio::spawn(async move {
            let submit = |number| {
                let executor = executor.clone();
                async move { executor.submit(call(number).flow("flood")).await.unwrap().await }
            };
            futures_util::future::join_all((0..10_000).map(submit)).await
        })
    };
    sleep(ms(1_000)).await;
    let start = Instant::now();
    let mut handles = Vec::new();
    for number in 0..10 {
        handles.push(executor.submit(call(100_000 + number).flow("trickle")).await.unwrap());
    }
    for handle in handles {
        handle.await.unwrap();
    }
    let took = start.elapsed();
    assert!(took <= ms(5_000), "{took:?}");
    assert!(log.at().len() > 20);
    flood.abort();
    executor.stop(Shutdown::Immediate).await;
    assert_eq!(schedule.waiting(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_key_has_at_most_its_number_of_calls_in_flight_and_delays_no_other() {
    let schedule = Schedule::new().level(Level::by("host").concurrency(|host| (host != "free").then_some(2)));
    let (executor, log) = executor(schedule, Limits::new(), 100, ms(100));
    let start = Instant::now();
    let mut handles = Vec::new();
    for number in 0..30 {
        let host = ["a", "b", "free"][number as usize % 3];
        handles.push(executor.submit(call(number).flow(host)).await.unwrap());
    }
    for handle in handles {
        handle.await.unwrap();
    }
    // Ten calls of each host, two at a time, in five rounds.
    assert_eq!(start.elapsed(), ms(500));
    for (number, at) in log.at() {
        let round = if number % 3 == 2 { 0 } else { number / 6 };
        assert_eq!(at - start, ms(100 * round), "{number}");
    }
    executor.stop(Shutdown::Graceful).await;
}

#[tokio::test(start_paused = true)]
async fn a_flow_without_calls_is_not_shown_while_its_limits_are_not_full() {
    let hourly = |_: &str| Some(Limits::new().requests(Rate::per_hour(1)));
    let schedule = Schedule::new().level(Level::by("host").limits(hourly));
    let (executor, _) = executor(schedule.clone(), Limits::new(), 10, ms(100));
    executor.submit(call(0).flow("a")).await.unwrap().await.unwrap();
    let waits = executor.submit(call(1).flow("a")).await.unwrap();
    executor.submit(call(2).flow("b")).await.unwrap().await.unwrap();
    let shown: Vec<_> = schedule.flows(10).iter().map(|flow| flow.keys[0].to_string()).collect();
    assert_eq!(shown, ["a"]);
    drop(waits);
    executor.stop(Shutdown::Immediate).await;
}
