//! Tests of what observers are told of the attempts of a call: retries and hedges.

mod support;

use http::{Request, Response};
use std::{
    sync::{Arc, Mutex},
    task::{Context, Poll},
    time::Duration,
};
use support::{client, ms, request, steps::Steps};
use tokio::time::sleep;
use tower::{BoxError, Service, ServiceBuilder, ServiceExt, retry::RetryLayer, service_fn};
use tower_outbound::{
    Call, ConcurrencyLimitLayer, EventLayer, Executor, Limits, Rate, RateLimitLayer, RateLimiter,
    event::{Events, WaitCause},
    retry::RetryPolicy,
};

/// A client whose attempts have these results, each after 100 ms: a status, and a delay that the server asks for in seconds.
/// Further attempts succeed.
fn answering(
    results: &[(u16, Option<&'static str>)],
) -> impl Service<Request<&'static str>, Response = Response<&'static str>, Error = BoxError, Future: Send>
+ Clone
+ Send
+ 'static {
    let results = Arc::new(Mutex::new(results.iter().rev().copied().collect::<Vec<_>>()));
    service_fn(move |_: Request<&'static str>| {
        let (status, retry_after) = results.lock().unwrap().pop().unwrap_or((200, None));
        async move {
            sleep(ms(100)).await;
            let mut response = Response::builder().status(status);
            if let Some(delay) = retry_after {
                response = response.header("retry-after", delay);
            }
            Ok::<_, BoxError>(response.body("")?)
        }
    })
}

#[tokio::test(start_paused = true)]
async fn the_waits_of_a_retried_call_are_added_up_over_its_attempts() {
    let steps = Arc::new(Steps::default());
    let retries = RetryPolicy::new().backoff(Duration::ZERO, Duration::ZERO);
    let executor = Executor::builder()
        .limits(Limits::new().tokens(Rate::per_second(10).burst(10)))
        .layer(RetryLayer::new(retries))
        .observe(steps.clone())
        .build(answering(&[(429, Some("3")), (503, None), (200, None)]))
        .unwrap();
    executor.start().unwrap();
    let call = Call::from(request("call")).tokens(10);
    executor.submit(call).await.unwrap().await.unwrap();
    // The 3 s that the server asks for refill the bucket. The second retry waits for the rest of its tokens: it begins 100 ms
    // after the attempt before it was charged.
    assert_eq!(
        steps.take(),
        [
            "opened http://localhost/",
            "queued",
            "started",
            "charged 1 requests, 10 tokens",
            "attempt 1",
            "attempt 1 ended after 100ms: 429",
            "charged 1 requests, 10 tokens",
            "attempt 2",
            "attempt 2 ended after 100ms: 503",
            "charged 1 requests, 10 tokens",
            "attempt 3",
            "attempt 3 ended after 100ms: 200",
            "COMPLETED after 4.2s, waited [backoff 3s, budget:tokens 900ms]",
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn each_backoff_is_a_wait_and_each_attempt_waits_for_its_own_permit() {
    let steps = Arc::new(Steps::default());
    // The first call gives its permit back for its backoff, and a call of 10 s takes it.
    let executor = Executor::builder()
        .concurrency_limit(1)
        .layer(RetryLayer::new(RetryPolicy::new().backoff(ms(400), ms(400))))
        .observe(steps.clone())
        .build(BySize(answering(&[(503, None)])))
        .unwrap();
    executor.start().unwrap();
    let first = executor.submit(request("short")).await.unwrap();
    let second = executor.submit(request("long")).await.unwrap();
    let event = first.event().clone();
    first.await.unwrap();
    second.await.unwrap();
    let event = event.finished().await;
    let backoff = event.time_waited_for(WaitCause::Backoff);
    let permit = event.time_waited_for(WaitCause::Permit);
    assert!(backoff > ms(0) && backoff <= ms(400), "{backoff:?}");
    // Two attempts of 100 ms. The second call holds the permit from 100 ms to 10.1 s.
    assert_eq!(backoff + permit, ms(10_000));
    assert_eq!(event.waits.len(), 2);
    assert_eq!(event.attempts.len(), 2);
}

/// A client for which a call named `long` takes 10 s.
#[derive(Clone)]
struct BySize<S>(S);

impl<S> Service<Request<&'static str>> for BySize<S>
where
    S: Service<Request<&'static str>, Response = Response<&'static str>, Error = BoxError, Future: Send + 'static>,
{
    type Response = Response<&'static str>;
    type Error = BoxError;
    type Future = futures_util::future::BoxFuture<'static, Result<Self::Response, BoxError>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, req: Request<&'static str>) -> Self::Future {
        if *req.body() == "long" {
            return Box::pin(async {
                sleep(ms(10_000)).await;
                Ok(Response::new(""))
            });
        }
        Box::pin(self.0.call(req))
    }
}

#[tokio::test(start_paused = true)]
async fn both_attempts_of_a_hedged_call_are_told_and_charged() {
    let events = Events::new();
    let steps = Arc::new(Steps::default());
    events.observe(steps.clone());
    let limiter = RateLimiter::new(Limits::new().requests(Rate::per_second(1).burst(1))).unwrap();
    let attempts = ServiceBuilder::new()
        .layer(RateLimitLayer::new(limiter))
        .layer(EventLayer::calling())
        .service(client(ms(5_000)).0);
    // A second attempt is made after 300 ms, and the first response is the call's.
    let hedge = service_fn(move |req: Request<&'static str>| {
        let first = attempts.clone().oneshot(req.clone());
        let second = attempts.clone().oneshot(req);
        async move {
            let second = async {
                sleep(ms(300)).await;
                second.await
            };
            tokio::select! {
                response = first => response,
                response = second => response,
            }
        }
    });
    let mut service = ServiceBuilder::new()
        .layer(EventLayer::processing().report_to(&events))
        .service(hedge);
    service.ready().await.unwrap().call(request("call")).await.unwrap();
    assert_eq!(
        steps.take(),
        [
            "opened http://localhost/",
            "started",
            "charged 1 requests, 0 tokens",
            "attempt 1",
            "charged 1 requests, 0 tokens",
            "attempt 2",
            "attempt 1 ended after 5s: 200",
            "attempt 2 ended after 4s: Some(\"Cancelled\")",
            "COMPLETED after 5s, waited [budget:requests 700ms]",
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn a_permit_below_the_rate_limit_is_a_wait_for_a_permit_and_is_warned_of_once() {
    let log = Arc::new(Mutex::new(Vec::new()));
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_writer(move || Log(writer.clone()))
        .finish();
    let _default = tracing::subscriber::set_default(subscriber);
    let events = Events::new();
    let steps = Arc::new(Steps::default());
    events.observe(steps.clone());
    let limiter = RateLimiter::new(Limits::new().requests(Rate::per_second(100))).unwrap();
    let service = ServiceBuilder::new()
        .layer(EventLayer::processing().report_to(&events))
        .layer(RateLimitLayer::new(limiter))
        .layer(ConcurrencyLimitLayer::new(1).unwrap())
        .service(client(ms(400)).0);
    let call = |name| service.clone().oneshot(request(name));
    let (one, two, three) = tokio::join!(call("one"), call("two"), call("three"));
    for result in [one, two, three] {
        result.unwrap();
    }
    let ends: Vec<_> = steps
        .take()
        .into_iter()
        .filter(|step| step.starts_with("COMPLETED"))
        .collect();
    assert_eq!(
        ends,
        [
            "COMPLETED after 400ms, waited []",
            "COMPLETED after 800ms, waited [permit 400ms]",
            "COMPLETED after 1.2s, waited [permit 800ms]",
        ]
    );
    let log = String::from_utf8(log.lock().unwrap().clone()).unwrap();
    assert_eq!(log.matches("place the concurrency limit outside").count(), 1, "{log}");
}

/// Collects the log.
struct Log(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Log {
    fn write(&mut self, text: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(text);
        Ok(text.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
