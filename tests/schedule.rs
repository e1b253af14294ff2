//! Executors and Tower stacks whose calls a [`Schedule`] orders: who goes next, and that nothing is lost or left.

#[path = "schedule/attempts.rs"]
mod attempts;
#[path = "schedule/chosen.rs"]
mod chosen;
#[path = "schedule/deadlines.rs"]
mod deadlines;
#[path = "schedule/estimates.rs"]
mod estimates;
#[path = "schedule/faults.rs"]
mod faults;
#[path = "schedule/places.rs"]
mod places;
#[path = "schedule/settings.rs"]
mod settings;
#[cfg(feature = "redis")]
#[path = "schedule/shared.rs"]
mod shared;
#[path = "schedule/shutdown.rs"]
mod shutdown;
#[path = "schedule/spawned.rs"]
mod spawned;
#[path = "schedule/storm.rs"]
mod storm;
mod support;
#[path = "schedule/tower_stack.rs"]
mod tower_stack;
#[path = "schedule/wire.rs"]
mod wire;

use std::{
    io,
    sync::{Arc, Mutex},
    time::Duration,
};
use support::ms;
use tokio::time::{Instant, sleep};
use tower::{Layer, Service, util::BoxCloneSyncService};
use tower_outbound::{
    Call, CallHandle, Executor, ExecutorBuilder, Limits, Rate, Schedule, Shutdown, error::Error, schedule::Level,
};

type Request = http::Request<u64>;
type Response = http::Response<()>;
type Client = BoxCloneSyncService<Request, Response, io::Error>;
type TestExecutor = Executor<u64, ()>;

/// When each attempt reached the client, counted from the creation of this log, with the number in its body.
#[derive(Clone)]
struct Log {
    start: Instant,
    arrivals: Arc<Mutex<Vec<(u64, Duration)>>>,
}

impl Log {
    fn new() -> Self {
        Self {
            start: Instant::now(),
            arrivals: Arc::default(),
        }
    }

    fn add(&self, number: u64) {
        let at = self.start.elapsed();
        self.arrivals.lock().unwrap().push((number, at));
    }

    fn arrivals(&self) -> Vec<(u64, Duration)> {
        self.arrivals.lock().unwrap().clone()
    }

    fn numbers(&self) -> Vec<u64> {
        self.arrivals().into_iter().map(|(number, _)| number).collect()
    }

    /// Returns the numbers and the times in milliseconds.
    fn millis(&self) -> Vec<(u64, u128)> {
        let arrivals = self.arrivals().into_iter();
        arrivals.map(|(number, at)| (number, at.as_millis())).collect()
    }

    /// Returns how often a number has arrived.
    fn count(&self, number: u64) -> usize {
        self.numbers().into_iter().filter(|of| *of == number).count()
    }
}

/// Returns a client whose calls take `takes`.
fn client(takes: Duration) -> (Client, Log) {
    failing_client(takes, |_| 0)
}

/// Returns a client that responds with the status 503 to as many of the first attempts of each number as `fails` says.
fn failing_client(takes: Duration, fails: fn(u64) -> usize) -> (Client, Log) {
    let log = Log::new();
    let logged = log.clone();
    let service = tower::service_fn(move |request: Request| {
        let log = logged.clone();
        async move {
            let number = *request.body();
            log.add(number);
            let fails = log.count(number) <= fails(number);
            if !takes.is_zero() {
                sleep(takes).await;
            }
            let status = if fails { 503 } else { 200 };
            Ok::<_, io::Error>(http::Response::builder().status(status).body(()).unwrap())
        }
    });
    (BoxCloneSyncService::new(service), log)
}

fn unlimited() -> ExecutorBuilder {
    Executor::builder().limits(Limits::new())
}

/// Returns a started executor whose calls take `takes`.
fn executor(schedule: Schedule, limits: Limits, permits: usize, takes: Duration) -> (TestExecutor, Log) {
    let (client, log) = client(takes);
    let executor = Executor::builder()
        .concurrency_limit(permits)
        .limits(limits)
        .schedule(schedule)
        .build(client)
        .unwrap();
    executor.start().unwrap();
    (executor, log)
}

fn per_second(amount: u64) -> Limits {
    Limits::new().requests(Rate::per_second(amount).burst(1))
}

fn tenants() -> Schedule {
    Schedule::new().level(Level::by("tenant"))
}

fn request(number: u64) -> Request {
    http::Request::post("http://localhost/").body(number).unwrap()
}

fn call(number: u64) -> Call<u64> {
    Call::from(request(number))
}

fn flow_call(flow: &'static str, number: u64) -> Call<u64> {
    call(number).flow(flow)
}

async fn submit_all(executor: &TestExecutor, calls: impl IntoIterator<Item = Call<u64>>) -> Vec<CallHandle<u64, ()>> {
    let mut handles = Vec::new();
    for call in calls {
        handles.push(executor.submit(call).await.unwrap());
    }
    handles
}

async fn all_end_well(handles: Vec<CallHandle<u64, ()>>) {
    for handle in handles {
        handle.await.unwrap();
    }
}

/// Submits a call in a task, and returns its result there, also if it gets no place.
fn spawn_call(executor: &TestExecutor, call: Call<u64>) -> tokio::task::JoinHandle<Result<Response, Error>> {
    let executor = executor.clone();
    tokio::spawn(async move { executor.submit(call).await?.await })
}

/// Asserts that no permit, no place and no call is left.
#[track_caller]
fn assert_nothing_is_left(executor: &TestExecutor, schedule: &Schedule) {
    assert_eq!(executor.monitor().in_flight(), 0, "permits");
    assert_eq!(executor.monitor().queue_depth(), 0, "places");
    assert_none_waits(schedule);
}

/// Asserts that no call waits, and that all that have begun are settled.
#[track_caller]
fn assert_none_waits(schedule: &Schedule) {
    assert_eq!(schedule.waiting(), 0, "calls that wait");
    for flow in schedule.flows(1_000) {
        assert_eq!((flow.waiting, flow.open), (0, 0), "{flow:?}");
    }
}

/// A layer that does `before` each call, and then makes it `times` times at once.
#[derive(Clone)]
struct Around {
    before: Duration,
    times: usize,
}

#[derive(Clone)]
struct AroundService<S> {
    inner: S,
    layer: Around,
}

impl<S> Layer<S> for Around {
    type Service = AroundService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        let layer = self.clone();
        AroundService { inner, layer }
    }
}

impl<S> Service<Request> for AroundService<S>
where
    S: Service<Request, Response = Response, Error: Into<tower::BoxError>, Future: Send> + Clone + Send + 'static,
{
    type Response = Response;
    type Error = tower::BoxError;
    type Future = futures_util::future::BoxFuture<'static, Result<Response, tower::BoxError>>;

    fn poll_ready(&mut self, cx: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, request: Request) -> Self::Future {
        let Around { before, times } = self.layer;
        let inner = self.inner.clone();
        Box::pin(async move {
            if !before.is_zero() {
                sleep(before).await;
            }
            let calls = (0..times).map(|_| {
                let (mut inner, request) = (inner.clone(), request.clone());
                Box::pin(async move {
                    std::future::poll_fn(|cx| inner.poll_ready(cx))
                        .await
                        .map_err(Into::into)?;
                    inner.call(request).await.map_err(Into::into)
                })
            });
            let calls: Vec<_> = calls.collect();
            if calls.is_empty() {
                return Ok(http::Response::new(()));
            }
            futures_util::future::select_all(calls).await.0
        })
    }
}

#[tokio::test(start_paused = true)]
async fn one_flow_is_first_in_first_out() {
    let (executor, log) = executor(Schedule::new(), per_second(10), 3, ms(500));
    all_end_well(submit_all(&executor, (0..20).map(call)).await).await;
    let arrivals = log.millis();
    assert!(arrivals.iter().map(|(number, _)| *number).eq(0..20), "{arrivals:?}");
    // Three calls at once, half a second each: three of each half second.
    let at: Vec<_> = arrivals.iter().map(|(_, at)| *at).collect();
    assert_eq!(&at[..6], [0, 100, 200, 500, 600, 700]);
    executor.stop(Shutdown::Graceful).await;
}

#[tokio::test(start_paused = true)]
async fn ten_calls_beside_the_ten_thousand_of_another_tenant_end_in_seconds() {
    let schedule = tenants();
    let (executor, log) = executor(schedule.clone(), per_second(10), 10, ms(500));
    for number in 0..10_000 {
        drop(spawn_call(&executor, flow_call("flood", number)));
    }
    sleep(ms(1_000)).await;
    let start = Instant::now();
    let trickle = (0..10).map(|number| flow_call("trickle", 100_000 + number));
    all_end_well(submit_all(&executor, trickle).await).await;
    let took = start.elapsed();
    assert!(took <= ms(5_000), "{took:?}");
    assert!(log.arrivals().len() > 20);
    executor.stop(Shutdown::Immediate).await;
    assert_nothing_is_left(&executor, &schedule);
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
