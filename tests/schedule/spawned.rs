//! Attempts that a layer makes in tasks of its own.

use super::*;
use crate::support::{pass, settle};
use std::task::{Context, Poll};
use tower_outbound::{
    Concurrency, ConcurrencyLimitLayer, RateLimitLayer, RateLimiter,
    error::Exhausted,
    schedule::{self, Flow},
};

/// A layer that makes each call, and a second attempt of it in a task, and waits for both.
#[derive(Clone)]
struct Twice {
    /// Whether the task is told whose attempt it makes.
    is_told: bool,
}

#[derive(Clone)]
struct TwiceService<S> {
    inner: S,
    is_told: bool,
}

impl<S> Layer<S> for Twice {
    type Service = TwiceService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        let is_told = self.is_told;
        TwiceService { inner, is_told }
    }
}

impl<S> Service<Request> for TwiceService<S>
where
    S: Service<Request, Response = Response, Error: Into<tower::BoxError> + Send, Future: Send>
        + Clone
        + Send
        + 'static,
{
    type Response = Response;
    type Error = tower::BoxError;
    type Future = futures_util::future::BoxFuture<'static, Result<Response, tower::BoxError>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, request: Request) -> Self::Future {
        let first = self.inner.call(request.clone());
        let mut inner = self.inner.clone();
        let second = async move {
            std::future::poll_fn(|cx| inner.poll_ready(cx)).await?;
            inner.call(request).await
        };
        let second = match schedule::current().filter(|_| self.is_told) {
            Some(call) => tokio::spawn(call.instrument(second)),
            None => tokio::spawn(second),
        };
        Box::pin(async move {
            first.await.map_err(Into::into)?;
            second.await?.map_err(Into::into)
        })
    }
}

/// A schedule whose tenants have one request a second each.
fn one_a_second_each() -> Schedule {
    Schedule::new().level(Level::by("tenant").limits(|_| Some(per_second(1))))
}

fn twice(schedule: &Schedule, is_told: bool) -> (TestExecutor, Log) {
    let (client, log) = client(Duration::ZERO);
    let executor = Executor::builder()
        .limits(Limits::new().requests(Rate::per_hour(100)))
        .schedule(schedule.clone())
        .layer(Twice { is_told })
        .build(client)
        .unwrap();
    executor.start().unwrap();
    (executor, log)
}

#[tokio::test(start_paused = true)]
async fn an_attempt_in_a_task_that_is_told_its_call_waits_in_its_flow_and_is_charged_to_all_limits() {
    let schedule = one_a_second_each();
    let (executor, log) = twice(&schedule, true);
    all_end_well(submit_all(&executor, [flow_call("a", 0), flow_call("a", 1), flow_call("b", 2)]).await).await;
    let expected = [(0, 0), (2, 0), (0, 1_000), (2, 1_000), (1, 2_000), (1, 3_000)];
    assert_eq!(log.millis(), expected);
    assert_eq!(executor.monitor().available().of("requests"), Some(94));
    settle().await;
    assert_nothing_is_left(&executor, &schedule);
}

#[tokio::test(start_paused = true)]
async fn an_attempt_in_a_task_that_is_not_told_is_charged_to_the_limiter_alone() {
    let schedule = one_a_second_each();
    let (executor, log) = twice(&schedule, false);
    all_end_well(submit_all(&executor, [flow_call("a", 0)]).await).await;
    assert_eq!(log.millis(), [(0, 0), (0, 0)]);
    assert_eq!(executor.monitor().available().of("requests"), Some(98));
    settle().await;
    assert_nothing_is_left(&executor, &schedule);
}

#[tokio::test(start_paused = true)]
async fn without_a_concurrency_limit_an_attempt_in_a_task_waits_at_the_rate_limit() {
    let limiter = RateLimiter::new(Limits::new().requests(Rate::per_hour(100))).unwrap();
    let schedule = one_a_second_each().limiter(limiter.clone());
    let (client, log) = client(Duration::ZERO);
    let mut queue = tower::ServiceBuilder::new()
        .layer(tower_stack::layer(10, &schedule))
        .layer(Twice { is_told: true })
        .layer(RateLimitLayer::new(limiter.clone()))
        .service(client);
    queue.call(request(0)).await.unwrap();
    assert_eq!(log.millis(), [(0, 0), (0, 1_000)]);
    settle().await;
    assert_none_waits(&schedule);
    assert_eq!(limiter.available().of("requests"), Some(98));
}

#[tokio::test(start_paused = true)]
async fn a_call_whose_attempt_in_a_task_is_refused_fails_with_the_reason() {
    let permits = Concurrency::new(2).unwrap();
    let once = |_: &str| Some(Limits::new().requests(Rate::per_hour(1).refuse()));
    let schedule = Schedule::new()
        .level(Level::by("tenant").limits(once))
        .concurrency(permits.clone());
    let (client, log) = client(Duration::ZERO);
    let mut queue = tower::ServiceBuilder::new()
        .layer(tower_stack::layer(10, &schedule))
        .layer(Twice { is_told: true })
        .layer(ConcurrencyLimitLayer::with_limit(permits.clone()))
        .service(client);
    let refused = tokio::time::timeout(ms(100), queue.call(request(0))).await.unwrap();
    assert!(refused.unwrap_err().is::<Exhausted>());
    assert_eq!(log.numbers(), [0]);
    pass(ms(10)).await;
    assert_eq!(permits.in_flight(), 0);
    assert_none_waits(&schedule);
}

#[tokio::test(start_paused = true)]
async fn there_is_no_current_call_outside_and_without_a_schedule() {
    assert!(schedule::current().is_none());
    let seen = |request: Request| async move {
        let flow = Flow::of(&request);
        assert_eq!(schedule::current().is_some(), flow != Flow::default());
        Ok::<_, io::Error>(http::Response::new(()))
    };
    let plain = unlimited().build(tower::service_fn(seen)).unwrap();
    plain.start().unwrap();
    all_end_well(submit_all(&plain, [call(0)]).await).await;
    let scheduled = unlimited().schedule(tenants()).build(tower::service_fn(seen)).unwrap();
    scheduled.start().unwrap();
    all_end_well(submit_all(&scheduled, [flow_call("a", 0)]).await).await;
    assert!(schedule::current().is_none());
}
