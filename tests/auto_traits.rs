//! Which types of the crate are `Send`, `Sync` and `Clone`, and that a glob import of the crate hides no other crate.

use http::{Request, Response};
use tower::{Service, service_fn};
use tower_outbound::{
    Call, CallHandle, Concurrency, ConcurrencyLimit, ConcurrencyLimitLayer, Cost, EventHandle, EventLayer,
    EventService, Events, Executor, InvalidConfig, KeyedRateLimiter, Limits, NetworkRequestEvent, Queue, QueueLayer,
    Rate, RateLimit, RateLimitLayer, RateLimiter,
    error::{AcquireError, Cancelled, Closed, CostExceedsBurst, Error, Panicked, Refused, TooManyKeys},
    event::{Lagged, ParseStatusError, Subscription},
    executor::{Closure, Monitor, TrySubmitError},
    rate::{Available, Budget, BudgetName, Estimate, Pause, Plan},
};

fn send<T: Send>() {}
fn sync<T: Sync>() {}
fn clone<T: Clone>() {}
fn unpin<T: Unpin>() {}
fn all<T: Clone + Send + Sync + Unpin + 'static>() {}

/// A body that is `Send` and not `Sync`: the crate does not require `Sync` of the bodies of requests and responses.
type Body = std::cell::Cell<u8>;

#[test]
fn services_layers_and_handles_are_clone_send_and_sync() {
    all::<Executor<Body, Body>>();
    all::<Queue<Body, Body>>();
    all::<QueueLayer<Body>>();
    all::<ConcurrencyLimitLayer>();
    all::<RateLimitLayer>();
    all::<EventLayer>();
    all::<ConcurrencyLimit<()>>();
    all::<RateLimit<()>>();
    all::<EventService<()>>();
    all::<RateLimiter>();
    all::<KeyedRateLimiter<String>>();
    all::<Concurrency>();
    all::<EventHandle>();
    all::<Events>();
    all::<Monitor>();
    all::<NetworkRequestEvent>();
    all::<Closure<Body>>();
    all::<(Cost, Limits, Rate, Budget, BudgetName, Available, Pause, Plan)>();
}

#[cfg(feature = "full")]
#[test]
fn types_of_the_feature_http_are_clone_send_and_sync() {
    use tower_outbound::{
        ApiTokensUsed,
        body::*,
        client::{self, Reqwest},
        deadline::{Deadline, DeadlineLayer, DeadlineService},
        error::{BadResponse, BodyFailed, BodyTooLarge, DeadlineExceeded, RetryAfterTooLong},
        provider::*,
        rate::ByUsage,
        retry::{ByClone, ByWholeBody, Delay, RetryPolicy},
    };
    fn error<T: std::error::Error + Clone + Send + Sync + 'static>() {}
    all::<Executor<Body, StreamBody<Body>>>();
    all::<(DeadlineLayer, DeadlineService<()>, Deadline)>();
    all::<(BodyLayer, BodyService<()>, StreamLayer, StreamService<()>)>();
    all::<(CollectLayer, Collect<()>, UsageLayer, Usage<()>)>();
    all::<(CheckLayer, Check<()>)>();
    all::<(FeedbackLayer, Feedback<()>, RateLimitInfo, Provider)>();
    all::<(
        RetryPolicy,
        CharacterEstimate,
        AverageEstimate,
        QuantileEstimate,
        ByUsage,
        ApiTokensUsed,
    )>();
    all::<(ByClone, ByWholeBody)>();
    all::<Reqwest>();
    send::<(stream::ResponseFuture<Body>, client::ResponseFuture, Delay)>();
    // `reqwest::Body::wrap` accepts only bodies that are `Send` and `Sync`.
    sync::<StreamBody<MeteredBody<reqwest::Body>>>();
    send::<StreamBody<MeteredBody<reqwest::Body>>>();
    error::<DeadlineExceeded>();
    error::<RetryAfterTooLong>();
    error::<BodyFailed>();
    error::<BodyTooLarge>();
    error::<BadResponse>();
    error::<ParseProviderError>();
    error::<InvalidKeyError>();
}

#[cfg(feature = "redis")]
#[test]
fn types_of_the_feature_redis_are_clone_send_and_sync() {
    use tower_outbound::{
        error::{AcquireError, StoreUnavailable},
        rate::redis::{Builder, OnStoreLoss, StoreStatus},
    };
    fn error<T: std::error::Error + Clone + Send + Sync + 'static>() {}
    all::<(Builder, OnStoreLoss, StoreStatus)>();
    error::<AcquireError>();
    error::<StoreUnavailable>();
}

#[test]
fn futures_and_calls_can_be_sent() {
    send::<CallHandle<Body, Body>>();
    sync::<CallHandle<u8, u8>>();
    unpin::<CallHandle<Body, Body>>();
    send::<tower_outbound::queue::ResponseFuture<Body, Body>>();
    send::<tower_outbound::executor::ResponseFuture<Body, Body>>();
    send::<Call<Body>>();
    send::<Estimate>();
    unwind_safe::<Estimate>();
    send::<Subscription>();
    clone::<Closure<u8>>();
}

fn unwind_safe<T: std::panic::UnwindSafe + std::panic::RefUnwindSafe>() {}

#[test]
fn errors_are_errors_that_can_be_sent_and_shared() {
    fn error<T: std::error::Error + Send + Sync + 'static>() {}
    error::<Error>();
    error::<InvalidConfig>();
    error::<Closed>();
    error::<CostExceedsBurst>();
    error::<TooManyKeys>();
    error::<Panicked>();
    error::<Cancelled>();
    error::<Lagged>();
    error::<ParseStatusError>();
    error::<AcquireError>();
    // The errors that give a refused request back to the caller are errors for any request, even one without `Debug`.
    struct Plain;
    error::<Refused<Plain>>();
    error::<TrySubmitError<Plain>>();
}

/// A struct that holds an executor. The type of the executor does not contain the type of its client.
struct Api {
    executor: Executor<String, String>,
}

#[tokio::test]
async fn an_executor_fits_into_a_struct_and_a_spawned_task() {
    let client = service_fn(async |req: Request<String>| Ok::<_, std::io::Error>(Response::new(req.into_body())));
    let api = Api {
        executor: Executor::builder().build(client).unwrap(),
    };
    api.executor.start().unwrap();
    let mut service = api.executor.clone();
    let response = tokio::spawn(async move {
        std::future::poll_fn(|cx| service.poll_ready(cx)).await.unwrap();
        service
            .call(Request::new("hello".to_owned()))
            .await
            .unwrap()
            .into_body()
    });
    assert_eq!(response.await.unwrap(), "hello");
    let submitted = tokio::spawn(async move {
        api.executor
            .submit(Request::new("again".to_owned()))
            .await
            .unwrap()
            .await
            .unwrap()
            .into_body()
    });
    assert_eq!(submitted.await.unwrap(), "again");
}

/// A glob import of the crate must not import a module that has the name of another crate: it would hide that crate, or
/// make its name ambiguous, and the test would not compile.
#[cfg(feature = "full")]
mod glob_import {
    use tower_outbound::*;

    #[test]
    fn a_glob_import_hides_no_crate() {
        let request: http::Request<bytes::Bytes> = http::Request::new(bytes::Bytes::new());
        let _: fn() -> tokio::time::Instant = tokio::time::Instant::now;
        let _ = tracing::Span::none();
        let _ = serde_json::Value::Null;
        let _ = fastrand::Rng::with_seed(1);
        let _: Option<(hyper::Version, reqwest::Version, redis::Value)> = None;
        fn body<B: http_body::Body>(_: &B) {}
        body(&http_body_util::Empty::<bytes::Bytes>::new());
        fn service<S: tower::Service<http::Request<bytes::Bytes>>>(_: &S) {}
        service(&tower::service_fn(async |request: http::Request<bytes::Bytes>| {
            Ok::<_, BoxError>(http::Response::new(request.into_body()))
        }));
        assert_eq!(Call::from(request).into_request().unwrap().into_body().len(), 0);
    }
}
