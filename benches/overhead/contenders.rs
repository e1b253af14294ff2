//! The contenders that are measured: the layers and stacks of tower-outbound, and the nearest equivalents of its peers.
//!
//! All limits are so high that no call ever waits for one. Each stack is built as its users would build it.

use crate::measure::{Run, calls, repeated, repeated_async};
use governor::{Quota, RateLimiter as Governor};
use http::{Request, Response};
use http_body_util::Empty;
use leaky_bucket::RateLimiter as LeakyBucket;
use std::{
    convert::Infallible,
    future::{Future, Ready, ready},
    hint::black_box,
    iter::repeat_n,
    num::NonZeroU32,
    time::Duration,
};
use tokio::time::Instant;
use tower::{Layer, Service, ServiceBuilder, limit::GlobalConcurrencyLimitLayer, service_fn, util::ServiceFn};
use tower_http::trace::TraceLayer;
use tower_outbound::{
    ConcurrencyLimitLayer, Cost, EventLayer, Executor, Limits, QueueLayer, Rate, RateLimitLayer, RateLimiter,
};
use tower_resilience::{bulkhead::BulkheadLayer, ratelimiter::RateLimiterLayer};

/// A layer, stack or limiter that is measured.
pub(crate) struct Contender {
    pub(crate) name: &'static str,
    /// Makes [`CALLS`](crate::measure::CALLS) calls with this number of callers, and returns nanoseconds per call.
    pub(crate) run: fn(usize) -> Run,
}

/// The capacity of the queues and the limit of concurrency. It is larger than the number of callers, so no call waits.
const CAPACITY: usize = 1_024;
/// A rate per second that is never reached.
const UNREACHED: u64 = 1_000_000_000;

const SECOND: Duration = Duration::from_secs(1);

// === Whole stacks ===

pub(crate) const EXECUTOR: Contender = Contender {
    name: "executor",
    run: |callers| {
        Box::pin(async move {
            let executor = Executor::builder()
                .queue_capacity(CAPACITY)
                .concurrency_limit(CAPACITY)
                .requests(Rate::per_second(UNREACHED))
                .tokens(Rate::per_second(UNREACHED))
                .build(client())
                .expect("the settings are valid");
            executor.start().expect("the executor is not running yet");
            calls(clones(executor, callers), request).await
        })
    },
};

pub(crate) const STACK_WITH_EVENTS: Contender = Contender {
    name: "stack-with-events",
    run: |callers| {
        Box::pin(async move {
            let stack = ServiceBuilder::new()
                .layer(EventLayer::queued())
                .layer(queue())
                .layer(EventLayer::processing())
                .layer(concurrency())
                .layer(rate())
                .layer(EventLayer::calling())
                .service(client());
            calls(clones(stack, callers), request).await
        })
    },
};

pub(crate) const STACK_WITHOUT_EVENTS: Contender = Contender {
    name: "stack-without-events",
    run: |callers| {
        Box::pin(async move {
            let stack = ServiceBuilder::new()
                .layer(queue())
                .layer(concurrency())
                .layer(rate())
                .service(client());
            calls(clones(stack, callers), request).await
        })
    },
};

pub(crate) const TOWER_STACK: Contender = Contender {
    name: "tower-stack",
    run: |callers| {
        Box::pin(async move {
            let stack = ServiceBuilder::new()
                .buffer(CAPACITY)
                .concurrency_limit(CAPACITY)
                .rate_limit(UNREACHED, SECOND)
                .service(client());
            calls(clones(stack, callers), request).await
        })
    },
};

pub(crate) const RESILIENCE_STACK: Contender = Contender {
    name: "tower-resilience-stack",
    run: |callers| {
        Box::pin(async move {
            let stack = ServiceBuilder::new()
                .buffer(CAPACITY)
                .layer(bulkhead())
                .layer(token_bucket())
                .service(client());
            calls(clones(stack, callers), request).await
        })
    },
};

// === Layers ===

pub(crate) const QUEUE: Contender = Contender {
    name: "queue",
    run: |callers| Box::pin(async move { layer(queue(), callers).await }),
};

pub(crate) const TOWER_BUFFER: Contender = Contender {
    name: "tower-buffer",
    run: |callers| Box::pin(async move { layer(tower::buffer::BufferLayer::new(CAPACITY), callers).await }),
};

pub(crate) const CONCURRENCY: Contender = Contender {
    name: "concurrency",
    run: |callers| Box::pin(layer(concurrency(), callers)),
};

pub(crate) const TOWER_CONCURRENCY: Contender = Contender {
    name: "tower-concurrency",
    run: |callers| Box::pin(layer(GlobalConcurrencyLimitLayer::new(CAPACITY), callers)),
};

pub(crate) const RESILIENCE_BULKHEAD: Contender = Contender {
    name: "tower-resilience-bulkhead",
    run: |callers| Box::pin(layer(bulkhead(), callers)),
};

pub(crate) const RATE: Contender = Contender {
    name: "rate",
    run: |callers| Box::pin(layer(rate(), callers)),
};

pub(crate) const TOWER_RATE: Contender = Contender {
    name: "tower-rate",
    run: |_| {
        Box::pin(async {
            let layer = tower::limit::RateLimitLayer::new(UNREACHED, SECOND);
            calls(vec![layer.layer(client())], request).await
        })
    },
};

pub(crate) const RESILIENCE_RATE: Contender = Contender {
    name: "tower-resilience-rate",
    run: |callers| Box::pin(layer(token_bucket(), callers)),
};

pub(crate) const EVENT: Contender = Contender {
    name: "event",
    run: |callers| Box::pin(layer(EventLayer::calling(), callers)),
};

pub(crate) const TOWER_HTTP_TRACE: Contender = Contender {
    name: "tower-http-trace",
    run: |callers| Box::pin(layer(TraceLayer::new_for_http(), callers)),
};

// === Limiters ===

pub(crate) const TRY_ACQUIRE: Contender = Contender {
    name: "try-acquire",
    run: |_| {
        let limiter = limiter();
        Box::pin(async move {
            repeated(|| {
                black_box(limiter.try_acquire(Cost::tokens(3)).is_ok());
            })
        })
    },
};

pub(crate) const GOVERNOR_CHECK: Contender = Contender {
    name: "governor-check",
    run: |_| {
        let governor = Governor::direct(quota());
        Box::pin(async move {
            repeated(|| {
                black_box(governor.check().is_ok());
            })
        })
    },
};

pub(crate) const INSTANT_NOW: Contender = Contender {
    name: "tokio-instant-now",
    run: |_| {
        Box::pin(async {
            repeated(|| {
                black_box(Instant::now());
            })
        })
    },
};

pub(crate) const ACQUIRE: Contender = Contender {
    name: "acquire",
    run: |_| {
        let limiter = limiter();
        Box::pin(async move {
            repeated_async(async || {
                black_box(limiter.acquire(Cost::tokens(3)).await.is_ok());
            })
            .await
        })
    },
};

pub(crate) const GOVERNOR_UNTIL_READY: Contender = Contender {
    name: "governor-until-ready",
    run: |_| {
        let governor = Governor::direct(quota());
        Box::pin(async move { repeated_async(async || governor.until_ready().await).await })
    },
};

pub(crate) const LEAKY_BUCKET_ACQUIRE: Contender = Contender {
    name: "leaky-bucket-acquire",
    run: |_| {
        Box::pin(async {
            let rate = usize::try_from(UNREACHED).expect("a usize has 64 bits");
            let bucket = LeakyBucket::builder().initial(rate).max(rate).refill(rate).build();
            repeated_async(async || bucket.acquire_one().await).await
        })
    },
};

// === Parts ===

type Body = Empty<&'static [u8]>;
type Client = ServiceFn<fn(Request<Body>) -> Ready<Result<Response<Body>, Infallible>>>;

/// A service that does nothing and is ready at once.
fn client() -> Client {
    service_fn(|_| ready(Ok(Response::new(Empty::new()))))
}

fn request() -> Request<Body> {
    Request::new(Empty::new())
}

fn queue() -> QueueLayer<Request<Body>> {
    QueueLayer::new(CAPACITY).expect("the capacity is valid")
}

fn concurrency() -> ConcurrencyLimitLayer {
    ConcurrencyLimitLayer::new(CAPACITY).expect("the limit is valid")
}

fn rate() -> RateLimitLayer {
    RateLimitLayer::new(limiter())
}

/// A limiter with two budgets: requests and tokens.
fn limiter() -> RateLimiter {
    let rate = Rate::per_second(UNREACHED);
    RateLimiter::new(Limits::new().requests(rate).tokens(rate)).expect("the rates are valid")
}

fn quota() -> Quota {
    Quota::per_second(NonZeroU32::new(1_000_000_000).expect("above zero"))
}

fn bulkhead() -> BulkheadLayer {
    let bulkhead = BulkheadLayer::builder().max_concurrent_calls(CAPACITY).build();
    bulkhead.expect("the settings are valid")
}

fn token_bucket() -> RateLimiterLayer {
    let rate = usize::try_from(UNREACHED).expect("a usize has 64 bits");
    let limiter = RateLimiterLayer::builder()
        .limit_for_period(rate)
        .refresh_period(SECOND)
        .burst_size(0)
        .build();
    limiter.expect("the settings are valid")
}

/// Measures a layer around the client that does nothing.
fn layer<L, S>(layer: L, callers: usize) -> impl Future<Output = f64>
where
    L: Layer<Client, Service = S>,
    S: Service<Request<Body>, Future: Send, Response: Send, Error: std::fmt::Debug + Send> + Clone + Send + 'static,
{
    calls(clones(layer.layer(client()), callers), request)
}

fn clones<S: Clone>(service: S, callers: usize) -> Vec<S> {
    repeat_n(service, callers).collect()
}
