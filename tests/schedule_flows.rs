//! Limits of a schedule on calls in flight, and handles that are bound to a flow.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};
use support::ms;
use tokio::time::{Instant, sleep};
use tokio_test::{assert_pending, assert_ready_ok, task};
use tower::{Service, ServiceBuilder, ServiceExt};
use tower_outbound::{
    Call, Concurrency, ConcurrencyLimitLayer, Cost, Executor, Limits, QueueLayer, Schedule, Shutdown,
    schedule::{Flow, Level},
};

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
async fn a_handle_bound_to_a_flow_is_ready_when_its_flow_gets_a_place() {
    let schedule = Schedule::new().level(Level::by("tenant"));
    let service = tower::service_fn(|_: u64| async {
        sleep(ms(100)).await;
        Ok::<_, std::io::Error>(())
    });
    let concurrency = Concurrency::new(1).unwrap();
    let layer = QueueLayer::new(4)
        .unwrap()
        .schedule(
            schedule.concurrency(concurrency.clone()),
            |_: &u64| Flow::default(),
            |_: &u64| Cost::request(),
        )
        .unwrap();
    let queue = ServiceBuilder::new()
        .layer(layer)
        .layer(ConcurrencyLimitLayer::with_limit(concurrency))
        .service(service);
    let mut flood = queue.of("flood");
    let mut calls = Vec::new();
    for number in 0..5 {
        calls.push(flood.ready().await.unwrap().call(number));
        tokio::task::yield_now().await;
    }
    // Four calls wait, and one runs. Of those who want the next place, the flow with the fewest gets it.
    let mut waiting_flood = task::spawn(std::future::poll_fn(|cx| Service::<u64>::poll_ready(&mut flood, cx)));
    assert_pending!(waiting_flood.poll());
    let mut trickle = queue.of("trickle");
    let mut waiting_trickle = task::spawn(std::future::poll_fn(|cx| Service::<u64>::poll_ready(&mut trickle, cx)));
    assert_pending!(waiting_trickle.poll());
    sleep(ms(101)).await;
    assert!(waiting_trickle.is_woken());
    assert_ready_ok!(waiting_trickle.poll());
    assert_pending!(waiting_flood.poll());
    drop(waiting_trickle);
    // It is not called, so the place is offered to the next one.
    sleep(ms(5)).await;
    assert!(waiting_flood.is_woken());
    assert_ready_ok!(waiting_flood.poll());
    drop(waiting_flood);
    // A place that was offered can still be had by the first one.
    let late = trickle.call(7);
    assert!(late.is_accepted());
    for call in calls.into_iter().chain([late]) {
        call.await.unwrap();
    }
    queue.close();
    queue.ended().await;
}
