//! Retries and hedged attempts of calls that a schedule has chosen.

use super::*;
use crate::support::{pass, settle};
use std::{
    future::{Future, Ready, poll_fn, ready},
    sync::atomic::{AtomicBool, Ordering},
    task::{Context, Poll, Waker, ready},
};
use tower::retry::{Policy, RetryLayer};
use tower_outbound::{
    Concurrency, ConcurrencyLimitLayer, RateLimitLayer, RateLimiter, error::Exhausted, schedule::Flow,
};

/// Tries a call with the status 503 again at once.
#[derive(Clone)]
struct AtOnce;

impl<E> Policy<Request, Response, E> for AtOnce {
    type Future = Ready<()>;

    fn retry(&mut self, _: &mut Request, result: &mut Result<Response, E>) -> Option<Ready<()>> {
        let is_unavailable = matches!(result, Ok(response) if response.status() == 503);
        is_unavailable.then(|| ready(()))
    }

    fn clone_request(&mut self, request: &Request) -> Option<Request> {
        Some(request.clone())
    }
}

/// Returns a started executor that retries, with a client that fails the first attempts of some numbers.
fn retrying(schedule: &Schedule, limits: Limits, permits: usize, fails: fn(u64) -> usize) -> (TestExecutor, Log) {
    let (client, log) = failing_client(Duration::ZERO, fails);
    let executor = Executor::builder()
        .concurrency_limit(permits)
        .limits(limits)
        .schedule(schedule.clone())
        .layer(RetryLayer::new(AtOnce))
        .build(client)
        .unwrap();
    executor.start().unwrap();
    (executor, log)
}

/// A schedule whose tenants have one request a second each.
fn one_a_second_each() -> Schedule {
    Schedule::new().level(Level::by("tenant").limits(|_| Some(per_second(1))))
}

#[tokio::test(start_paused = true)]
async fn a_retry_keeps_the_place_that_its_call_had() {
    let schedule = tenants();
    let (executor, log) = retrying(&schedule, per_second(1), 5, |number| if number == 0 { 2 } else { 0 });
    all_end_well(submit_all(&executor, (0..4).map(call)).await).await;
    let expected = [(0, 0), (0, 1_000), (0, 2_000), (1, 3_000), (2, 4_000), (3, 5_000)];
    assert_eq!(log.millis(), expected);
    settle().await;
    assert_nothing_is_left(&executor, &schedule);
}

#[tokio::test(start_paused = true)]
async fn a_retry_is_charged_to_all_limits_again() {
    let schedule = one_a_second_each();
    let limits = Limits::new().requests(Rate::per_hour(100));
    let (executor, log) = retrying(&schedule, limits, 5, |_| 2);
    all_end_well(submit_all(&executor, [flow_call("a", 0)]).await).await;
    assert_eq!(log.millis(), [(0, 0), (0, 1_000), (0, 2_000)]);
    assert_eq!(executor.monitor().available().of("requests"), Some(97));
    settle().await;
    assert_nothing_is_left(&executor, &schedule);
}

#[tokio::test(start_paused = true)]
async fn a_retry_holds_nothing_while_it_waits() {
    let schedule = one_a_second_each();
    let (executor, log) = retrying(&schedule, per_second(10), 1, |number| usize::from(number == 0));
    let first = submit_all(&executor, [flow_call("a", 0)]).await;
    pass(ms(100)).await;
    assert_eq!(
        (executor.monitor().in_flight(), executor.monitor().queue_depth()),
        (0, 0)
    );
    assert_eq!(schedule.waiting(), 1);
    all_end_well(submit_all(&executor, [flow_call("b", 1)]).await).await;
    all_end_well(first).await;
    assert_eq!(log.millis(), [(0, 0), (1, 100), (0, 1_000)]);
    settle().await;
    assert_nothing_is_left(&executor, &schedule);
}

#[tokio::test(start_paused = true)]
async fn a_retry_that_is_cancelled_while_it_waits_leaves_and_is_charged_nothing() {
    let schedule = one_a_second_each();
    let limits = Limits::new().requests(Rate::per_hour(100));
    let (executor, log) = retrying(&schedule, limits, 1, |number| usize::from(number == 0));
    let handle = executor.submit(flow_call("a", 0)).await.unwrap();
    pass(ms(500)).await;
    assert_eq!(schedule.waiting(), 1);
    handle.cancel();
    assert!(handle.await.unwrap_err().is_cancelled());
    settle().await;
    assert_nothing_is_left(&executor, &schedule);
    assert_eq!(executor.monitor().available().of("requests"), Some(99));
    all_end_well(submit_all(&executor, [flow_call("a", 1)]).await).await;
    assert_eq!(log.millis(), [(0, 0), (1, 1_000)]);
}

#[tokio::test(start_paused = true)]
async fn hedged_attempts_each_take_a_permit_and_pay_and_the_loser_leaves_nothing() {
    let schedule = tenants();
    let (client, log) = client(ms(500));
    let executor = Executor::builder()
        .concurrency_limit(2)
        .limits(per_second(10))
        .schedule(schedule.clone())
        .layer(Around {
            before: Duration::ZERO,
            times: 3,
        })
        .build(client)
        .unwrap();
    executor.start().unwrap();
    let handle = executor.submit(call(0)).await.unwrap();
    pass(ms(150)).await;
    assert_eq!(executor.monitor().in_flight(), 2);
    assert_eq!(schedule.waiting(), 1);
    handle.await.unwrap();
    // There was no permit for the third one.
    assert_eq!(log.millis(), [(0, 0), (0, 100)]);
    settle().await;
    assert_nothing_is_left(&executor, &schedule);
}

/// A service that is ready while no call of it runs, as Tower's limit of one call at a time is.
#[derive(Clone)]
struct OneAtATime<S> {
    inner: S,
    state: Arc<Mutex<(bool, Vec<Waker>)>>,
}

struct Busy(Arc<Mutex<(bool, Vec<Waker>)>>);

impl Drop for Busy {
    fn drop(&mut self) {
        let wakers = {
            let mut state = self.0.lock().unwrap();
            state.0 = false;
            std::mem::take(&mut state.1)
        };
        wakers.into_iter().for_each(Waker::wake);
    }
}

impl<S: Service<Request, Future: Send + 'static>> Service<Request> for OneAtATime<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = futures_util::future::BoxFuture<'static, Result<S::Response, S::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        let mut state = self.state.lock().unwrap();
        if state.0 {
            state.1.push(cx.waker().clone());
            return Poll::Pending;
        }
        drop(state);
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request) -> Self::Future {
        self.state.lock().unwrap().0 = true;
        let busy = Busy(self.state.clone());
        let future = self.inner.call(request);
        Box::pin(async move {
            let result = future.await;
            drop(busy);
            result
        })
    }
}

#[tokio::test(start_paused = true)]
async fn a_retry_does_not_wait_until_the_service_is_ready_for_the_next_call() {
    let schedule = tenants();
    let (client, log) = failing_client(Duration::ZERO, |number| usize::from(number == 0));
    let one_at_a_time = tower::layer::layer_fn(|inner| OneAtATime {
        inner,
        state: Arc::default(),
    });
    let executor = Executor::builder()
        .concurrency_limit(5)
        .limits(per_second(1))
        .schedule(schedule.clone())
        .layer(one_at_a_time)
        .layer(RetryLayer::new(AtOnce))
        .build(client)
        .unwrap();
    executor.start().unwrap();
    let calls = [flow_call("a", 0), flow_call("b", 1), flow_call("b", 2)];
    let handles = submit_all(&executor, calls).await;
    tokio::time::timeout(ms(100_000), all_end_well(handles)).await.unwrap();
    assert_eq!(log.millis(), [(0, 0), (0, 1_000), (1, 2_000), (2, 3_000)]);
    settle().await;
    assert_nothing_is_left(&executor, &schedule);
}

#[tokio::test(start_paused = true)]
async fn a_graceful_stop_waits_for_the_retry_of_a_call() {
    let schedule = one_a_second_each();
    let (executor, log) = retrying(&schedule, per_second(10), 1, |_| 3);
    let handles = submit_all(&executor, [flow_call("a", 0)]).await;
    pass(ms(500)).await;
    let report = executor.stop(Shutdown::Graceful).await;
    assert_eq!((report.completed, report.left), (1, 0));
    all_end_well(handles).await;
    assert_eq!(log.millis(), [(0, 0), (0, 1_000), (0, 2_000), (0, 3_000)]);
    assert_nothing_is_left(&executor, &schedule);
}

#[tokio::test(start_paused = true)]
async fn without_a_concurrency_limit_an_attempt_is_charged_to_the_limiter_again() {
    let limiter = RateLimiter::new(per_second(10)).unwrap();
    let schedule = tenants().limiter(limiter.clone());
    let (client, log) = failing_client(Duration::ZERO, |number| usize::from(number == 0));
    let mut queue = tower::ServiceBuilder::new()
        .layer(tower_stack::layer(10, &schedule))
        .layer(RetryLayer::new(AtOnce))
        .layer(tower_outbound::RateLimitLayer::new(limiter))
        .service(client);
    let responses = [queue.call(request(0)), queue.call(request(1))];
    futures_util::future::try_join_all(responses).await.unwrap();
    let mut numbers = log.numbers();
    numbers.sort_unstable();
    assert_eq!(numbers, [0, 0, 1]);
    assert_eq!(log.millis().last().unwrap().1, 200);
    settle().await;
    assert_none_waits(&schedule);
}

#[tokio::test(start_paused = true)]
async fn an_attempt_that_the_limits_of_its_key_refuse_by_now_fails_with_the_reason() {
    let schedule = one_a_second_each();
    let (executor, log) = retrying(&schedule, per_second(10), 1, |_| 5);
    let handle = executor.submit(flow_call("a", 0).tokens(7)).await.unwrap();
    pass(ms(500)).await;
    assert_eq!(schedule.waiting(), 1);
    let smaller = Limits::new().tokens(Rate::per_second(1).burst(5));
    schedule.set_limits("a", &smaller).unwrap();
    let error = handle.await.unwrap_err();
    assert!(error.is_cost_exceeds_burst(), "{error}");
    assert_eq!(log.count(0), 1);
    settle().await;
    assert_nothing_is_left(&executor, &schedule);
}

fn of_flow(flow: &'static str, number: u64) -> Request {
    let mut request = request(number);
    request.extensions_mut().insert(Flow::from(flow));
    request
}

/// Returns a queue with a rate limit, but no concurrency limit, that retries.
fn without_permits(
    schedule: &Schedule,
    limiter: &RateLimiter,
    client: Client,
) -> tower_outbound::Queue<Request, Response> {
    tower::ServiceBuilder::new()
        .layer(tower_stack::layer(10, schedule))
        .layer(RetryLayer::new(AtOnce))
        .layer(RateLimitLayer::new(limiter.clone()))
        .service(client)
}

#[tokio::test(start_paused = true)]
async fn without_a_concurrency_limit_a_retry_waits_in_its_flow_and_is_charged_to_the_limits_of_its_keys() {
    let limiter = RateLimiter::new(Limits::new().requests(Rate::per_hour(100))).unwrap();
    let schedule = one_a_second_each().limiter(limiter.clone());
    let (client, log) = failing_client(Duration::ZERO, |number| if number == 0 { 2 } else { 0 });
    let mut queue = without_permits(&schedule, &limiter, client);
    let first = queue.call(of_flow("a", 0));
    let second = queue.call(of_flow("a", 1));
    let other = queue.call(of_flow("b", 10));
    pass(ms(500)).await;
    // The retry waits before the next call of its flow, and has not been charged.
    assert_eq!((schedule.waiting(), limiter.available().of("requests")), (2, Some(98)));
    futures_util::future::try_join_all([first, second, other])
        .await
        .unwrap();
    assert_eq!(log.millis(), [(0, 0), (10, 0), (0, 1_000), (0, 2_000), (1, 3_000)]);
    assert_eq!(limiter.available().of("requests"), Some(95));
    settle().await;
    assert_none_waits(&schedule);
}

#[tokio::test(start_paused = true)]
async fn without_a_concurrency_limit_a_retry_does_not_wait_for_the_end_of_its_own_first_attempt() {
    let limiter = RateLimiter::new(per_second(10)).unwrap();
    let level = Level::by("tenant").concurrency(|_| Some(1));
    let schedule = Schedule::new().level(level).limiter(limiter.clone());
    let (client, log) = failing_client(ms(1_000), |number| usize::from(number == 0));
    let mut queue = without_permits(&schedule, &limiter, client);
    let calls = [of_flow("a", 0), of_flow("a", 1), of_flow("b", 2)].map(|request| queue.call(request));
    tokio::time::timeout(ms(10_000), futures_util::future::try_join_all(calls))
        .await
        .unwrap()
        .unwrap();
    // One at once of each tenant, and the retry before the next call.
    assert_eq!(log.millis(), [(0, 0), (2, 100), (0, 1_000), (1, 2_000)]);
    settle().await;
    assert_none_waits(&schedule);
}

#[tokio::test(start_paused = true)]
async fn without_a_concurrency_limit_a_retry_that_is_cancelled_or_refused_is_charged_nothing() {
    let limiter = RateLimiter::new(Limits::new().requests(Rate::per_hour(100))).unwrap();
    let schedule = one_a_second_each().limiter(limiter.clone());
    let (client, log) = failing_client(Duration::ZERO, |_| 9);
    let mut queue = without_permits(&schedule, &limiter, client);
    let cancelled = queue.call(of_flow("a", 0));
    let refused = queue.call(of_flow("b", 1));
    pass(ms(500)).await;
    assert_eq!(schedule.waiting(), 2);
    drop(cancelled);
    let none = Limits::new().requests(Rate::per_second(1).refuse());
    schedule.set_limits("b", &none).unwrap();
    let error = refused.await.unwrap_err();
    assert!(error.is::<Exhausted>(), "{error:?}");
    settle().await;
    assert_none_waits(&schedule);
    assert_eq!(log.numbers(), [0, 1]);
    assert_eq!(limiter.available().of("requests"), Some(98));
}

#[tokio::test(start_paused = true)]
async fn without_a_rate_limit_a_retry_that_the_limits_of_its_key_refuse_is_not_made_and_the_call_fails_with_the_reason()
{
    let permits = Concurrency::new(1).unwrap();
    let level = Level::by("tenant").limits(|tenant| match tenant {
        "once" => Some(Limits::new().requests(Rate::per_hour(1).refuse())),
        _ => Some(per_second(1)),
    });
    let schedule = Schedule::new().level(level).concurrency(permits.clone());
    let (client, log) = failing_client(ms(10), |number| if number == 0 { 9 } else { 1 });
    let mut queue = tower::ServiceBuilder::new()
        .layer(tower_stack::layer(10, &schedule))
        .layer(RetryLayer::new(AtOnce))
        .layer(ConcurrencyLimitLayer::with_limit(permits.clone()))
        .service(client);
    let refused = queue.call(of_flow("once", 0));
    let error = tokio::time::timeout(ms(100), refused).await.unwrap().unwrap_err();
    assert!(error.is::<Exhausted>(), "{error:?}");
    assert_eq!((log.millis(), permits.in_flight()), (vec![(0, 0)], 0));
    // Others are not concerned.
    queue.call(of_flow("other", 1)).await.unwrap();
    assert_eq!(log.count(1), 2);
    settle().await;
    assert_eq!(permits.in_flight(), 0);
    assert_none_waits(&schedule);
}

/// Keeps a call from being polled while it is closed.
#[derive(Clone, Default)]
struct Gate(Arc<Mutex<(bool, Vec<Waker>)>>);

impl Gate {
    fn set(&self, is_closed: bool) {
        let wakers = {
            let mut state = self.0.lock().unwrap();
            state.0 = is_closed;
            std::mem::take(&mut state.1)
        };
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Polls the future of a call only while this is open, if the call `is_kept`.
    fn keep<F: Future>(self, is_kept: bool, future: F) -> impl Future<Output = F::Output> {
        let mut future = Box::pin(future);
        poll_fn(move |cx| {
            if is_kept {
                ready!(self.poll_open(cx));
            }
            future.as_mut().poll(cx)
        })
    }

    fn poll_open(&self, cx: &Context<'_>) -> Poll<()> {
        let mut state = self.0.lock().unwrap();
        if !state.0 {
            return Poll::Ready(());
        }
        state.1.push(cx.waker().clone());
        Poll::Pending
    }
}

#[tokio::test(start_paused = true)]
async fn a_retry_that_is_not_polled_in_time_loses_its_permit_and_is_charged_only_when_it_goes() {
    let schedule = one_a_second_each();
    let (client, log) = failing_client(Duration::ZERO, |number| usize::from(number == 0));
    let gate = Gate::default();
    let (of_first, is_later) = (gate.clone(), Arc::new(AtomicBool::new(false)));
    let at_gate = tower::util::MapFutureLayer::new(move |future| {
        let is_first = !is_later.swap(true, Ordering::Relaxed);
        of_first.clone().keep(is_first, future)
    });
    let executor = Executor::builder()
        .concurrency_limit(1)
        .limits(Limits::new().requests(Rate::per_hour(100)))
        .schedule(schedule.clone())
        .layer(RetryLayer::new(AtOnce))
        .layer(at_gate)
        .build(client)
        .unwrap();
    executor.start().unwrap();
    let first = submit_all(&executor, [flow_call("a", 0)]).await;
    pass(ms(500)).await;
    gate.set(true);
    // The retry is granted its permit after a second. Another call, which waits for it, has it some milliseconds later.
    pass(ms(510)).await;
    assert_eq!(executor.monitor().concurrency().in_flight(), 1);
    let second = submit_all(&executor, [flow_call("b", 1)]).await;
    pass(ms(100)).await;
    all_end_well(second).await;
    assert_eq!(log.count(1), 1);
    gate.set(false);
    all_end_well(first).await;
    assert_eq!(log.millis().last(), Some(&(0, 1_110)));
    assert_eq!(executor.monitor().available().of("requests"), Some(97));
    settle().await;
    assert_nothing_is_left(&executor, &schedule);
}
