//! Who is measured: our layers and stacks, and the peers' that come nearest.
//!
//! Limits are so wide that nobody ever waits for one. Each stack is the one its users would build.

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

pub(crate) struct Contender {
    pub(crate) name: &'static str,
    /// Nanoseconds a call, with so many callers.
    pub(crate) run: fn(usize) -> Run,
}

/// Places and permits: more than there are callers.
const ROOM: usize = 1_024;
/// A rate that is never reached.
const PLENTY: u64 = 1_000_000_000;

const SECOND: Duration = Duration::from_secs(1);

// === Whole stacks ===

pub(crate) const EXECUTOR: Contender = Contender {
    name: "executor",
    run: |callers| {
        Box::pin(async move {
            let executor = Executor::builder()
                .queue_capacity(ROOM)
                .concurrency_limit(ROOM)
                .requests(Rate::per_second(PLENTY))
                .tokens(Rate::per_second(PLENTY))
                .build(client())
                .expect("the settings make sense");
            executor.start().expect("it is not running");
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
                .buffer(ROOM)
                .concurrency_limit(ROOM)
                .rate_limit(PLENTY, SECOND)
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
                .buffer(ROOM)
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
    run: |callers| Box::pin(async move { layer(tower::buffer::BufferLayer::new(ROOM), callers).await }),
};

pub(crate) const CONCURRENCY: Contender = Contender {
    name: "concurrency",
    run: |callers| Box::pin(layer(concurrency(), callers)),
};

pub(crate) const TOWER_CONCURRENCY: Contender = Contender {
    name: "tower-concurrency",
    run: |callers| Box::pin(layer(GlobalConcurrencyLimitLayer::new(ROOM), callers)),
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
            let layer = tower::limit::RateLimitLayer::new(PLENTY, SECOND);
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
            let plenty = usize::try_from(PLENTY).expect("a usize");
            let bucket = LeakyBucket::builder()
                .initial(plenty)
                .max(plenty)
                .refill(plenty)
                .build();
            repeated_async(async || bucket.acquire_one().await).await
        })
    },
};

// === Parts ===

type Body = Empty<&'static [u8]>;
type Client = ServiceFn<fn(Request<Body>) -> Ready<Result<Response<Body>, Infallible>>>;

/// Does nothing, at once.
fn client() -> Client {
    service_fn(|_| ready(Ok(Response::new(Empty::new()))))
}

fn request() -> Request<Body> {
    Request::new(Empty::new())
}

fn queue() -> QueueLayer<Request<Body>> {
    QueueLayer::new(ROOM).expect("a capacity")
}

fn concurrency() -> ConcurrencyLimitLayer {
    ConcurrencyLimitLayer::new(ROOM).expect("a limit")
}

fn rate() -> RateLimitLayer {
    RateLimitLayer::new(limiter())
}

/// Two budgets.
fn limiter() -> RateLimiter {
    let plenty = Rate::per_second(PLENTY);
    RateLimiter::new(Limits::new().requests(plenty).tokens(plenty)).expect("the rates make sense")
}

fn quota() -> Quota {
    Quota::per_second(NonZeroU32::new(1_000_000_000).expect("above zero"))
}

fn bulkhead() -> BulkheadLayer {
    let bulkhead = BulkheadLayer::builder().max_concurrent_calls(ROOM).build();
    bulkhead.expect("the settings make sense")
}

fn token_bucket() -> RateLimiterLayer {
    let plenty = usize::try_from(PLENTY).expect("a usize");
    let limiter = RateLimiterLayer::builder()
        .limit_for_period(plenty)
        .refresh_period(SECOND)
        .burst_size(0)
        .build();
    limiter.expect("the settings make sense")
}

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
