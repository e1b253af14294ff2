//! What can be sent, shared and cloned.

use http::{Request, Response};
use tower::{Service, service_fn};
use tower_outbound::{
    Call, CallHandle, Concurrency, ConcurrencyLimit, ConcurrencyLimitLayer, EventHandle, EventLayer, Executor,
    NetworkRequestEvent, Queue, QueueLayer, RateLimit, RateLimitLayer, RateLimiter,
    error::{Cancelled, Closed, CostExceedsBurst, Error, InvalidConfig, Panicked, Refused},
    event::{EventService, Events, Lagged, ParseStatusError, Subscription},
    executor::{Closure, Monitor, TrySubmitError},
    rate::{Estimate, TryAcquireError},
};

fn send<T: Send>() {}
fn sync<T: Sync>() {}
fn clone<T: Clone>() {}
fn unpin<T: Unpin>() {}
fn all<T: Clone + Send + Sync + Unpin + 'static>() {}

/// Neither `Sync` nor anything more than a request has to be.
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
    all::<Concurrency>();
    all::<EventHandle>();
    all::<Events>();
    all::<Monitor>();
    all::<NetworkRequestEvent>();
    all::<Closure<Body>>();
}

#[cfg(feature = "full")]
#[test]
fn what_is_there_for_http_is_so_too() {
    use tower_outbound::{
        ApiTokensUsed,
        body::*,
        client::{self, Reqwest},
        deadline::{Deadline, DeadlineLayer, DeadlineService},
        error::{BodyFailed, BodyTooLarge, DeadlineExceeded, RetryAfterTooLong},
        provider::*,
        rate::ByUsage,
        retry::{Delay, RetryPolicy},
    };
    fn error<T: std::error::Error + Clone + Send + Sync + 'static>() {}
    all::<Executor<Body, StreamBody<Body>>>();
    all::<(DeadlineLayer, DeadlineService<()>, Deadline)>();
    all::<(BodyLayer, BodyService<()>, StreamLayer, StreamService<()>)>();
    all::<(CollectLayer, Collect<()>, UsageLayer, Usage<()>)>();
    all::<(FeedbackLayer, Feedback<()>, RateLimitInfo, Provider)>();
    all::<(RetryPolicy, CharacterEstimate, AverageEstimate, ByUsage, ApiTokensUsed)>();
    all::<Reqwest>();
    send::<(stream::StreamFuture<Body>, client::ResponseFuture, Delay)>();
    // As reqwest wants the bodies it is given.
    sync::<StreamBody<MeteredBody<reqwest::Body>>>();
    send::<StreamBody<MeteredBody<reqwest::Body>>>();
    error::<DeadlineExceeded>();
    error::<RetryAfterTooLong>();
    error::<BodyFailed>();
    error::<BodyTooLarge>();
    error::<ParseProviderError>();
}

#[cfg(feature = "redis")]
#[test]
fn what_is_shared_by_processes_is_so_too() {
    use tower_outbound::{
        error::{AcquireError, StoreUnavailable},
        rate::{
            Limiter,
            redis::{Builder, OnStoreLoss, SharedRateLimiter, StoreStatus},
        },
    };
    fn error<T: std::error::Error + Clone + Send + Sync + 'static>() {}
    all::<(SharedRateLimiter, Builder, OnStoreLoss, StoreStatus, Limiter)>();
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
    send::<Subscription>();
    clone::<Closure<u8>>();
}

#[test]
fn errors_are_errors_that_can_be_sent_and_shared() {
    fn error<T: std::error::Error + Send + Sync + 'static>() {}
    error::<Error>();
    error::<InvalidConfig>();
    error::<Closed>();
    error::<CostExceedsBurst>();
    error::<Panicked>();
    error::<Cancelled>();
    error::<Lagged>();
    error::<ParseStatusError>();
    error::<TryAcquireError>();
    // Whatever the body: it need not be `Debug`.
    struct Plain;
    error::<Refused<Plain>>();
    error::<TrySubmitError<Plain>>();
}

/// In a struct field, without naming the client's type.
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
    let answer = tokio::spawn(async move {
        std::future::poll_fn(|cx| service.poll_ready(cx)).await.unwrap();
        service
            .call(Request::new("hello".to_owned()))
            .await
            .unwrap()
            .into_body()
    });
    assert_eq!(answer.await.unwrap(), "hello");
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
