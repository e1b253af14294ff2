//! The layers and stacks of tower-outbound that are measured, and the nearest equivalents of its peers.
//!
//! All limits are so high that no call ever waits for one. Each stack is built as its users would build it. What the
//! calls send and receive is the parameter `T`: see [`Traffic`].

use crate::{
    measure::{Run, calls},
    traffic::Traffic,
};
use http::{Request, Response};
use http_body_util::BodyExt;
use metrics::{Counter, Gauge, Histogram, HistogramFn, Key, KeyName, Metadata, Recorder, SharedString, Unit};
use metrics_exporter_prometheus::PrometheusBuilder;
use std::{
    convert::Infallible,
    future::{Future, Ready, ready},
    iter::repeat_n,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tower::{
    Layer, Service, ServiceBuilder, limit::GlobalConcurrencyLimitLayer, retry::RetryLayer, service_fn, util::ServiceFn,
};
use tower_http::trace::TraceLayer;
use tower_outbound::{
    ConcurrencyLimitLayer, Cost, EventLayer, Executor, Limits, QueueLayer, Rate, RateLimitLayer, RateLimiter, Schedule,
    body::CollectLayer,
    metrics::Metrics,
    provider::{FeedbackLayer, Provider, UsageLayer},
    rate::ByUsage,
    retry::RetryPolicy,
    schedule::{Flow, Level},
};
use tower_resilience::{bulkhead::BulkheadLayer, ratelimiter::RateLimiterLayer};

/// A layer, stack or limiter that is measured.
pub(crate) struct Contender {
    pub(crate) name: &'static str,
    /// Makes [`CALLS`](crate::measure::CALLS) calls with this number of callers, and returns nanoseconds per call.
    pub(crate) run: fn(usize) -> Run,
}

/// The capacity of the queues and the limit of concurrency. It is larger than the number of callers, so no call waits.
pub(crate) const CAPACITY: usize = 1_024;
/// A rate per second that is never reached.
pub(crate) const UNREACHED: u64 = 1_000_000_000;
/// The number of flows where there is a schedule.
const FLOWS: u64 = 10;

const SECOND: Duration = Duration::from_secs(1);

// === Whole stacks ===

/// The client alone.
pub(crate) const fn bare<T: Traffic>(name: &'static str) -> Contender {
    Contender {
        name,
        run: |callers| Box::pin(calls(clones(client::<T>(), callers), T::request)),
    }
}

pub(crate) const fn executor<T: Traffic>(name: &'static str) -> Contender {
    Contender {
        name,
        run: |callers| {
            Box::pin(async move {
                let executor = Executor::builder()
                    .queue_capacity(CAPACITY)
                    .concurrency_limit(CAPACITY)
                    .requests(Rate::per_second(UNREACHED))
                    .tokens(Rate::per_second(UNREACHED))
                    .build(client::<T>())
                    .expect("the settings are valid");
                executor.start().expect("the executor is not running yet");
                calls(clones(executor, callers), T::request).await
            })
        },
    }
}

/// The body of a request to the [executor with metrics](executor_with_metrics). A type of its own, as [`OfFlow`] is.
struct Observed<B>(B);

/// The [executor] with metrics, which a recorder gets that adds them up and keeps nothing.
pub(crate) const fn executor_with_metrics<T: Traffic>(name: &'static str) -> Contender {
    Contender {
        name,
        run: |callers| Box::pin(with_metrics::<T>(callers, Metrics::new().recorder(Sums))),
    }
}

/// The [executor] with metrics for Prometheus. What is recorded is never read, as if the page were never scraped.
pub(crate) const fn executor_with_prometheus<T: Traffic>(name: &'static str) -> Contender {
    Contender {
        name,
        run: |callers| {
            let recorder = PrometheusBuilder::new().build_recorder();
            Box::pin(with_metrics::<T>(callers, Metrics::new().recorder(recorder)))
        },
    }
}

async fn with_metrics<T: Traffic>(callers: usize, metrics: Metrics) -> f64 {
    let client = ServiceBuilder::new()
        .map_request(|request: Request<Observed<T::Body>>| request.map(|Observed(body)| body))
        .service(client::<T>());
    let executor = Executor::builder()
        .queue_capacity(CAPACITY)
        .concurrency_limit(CAPACITY)
        .requests(Rate::per_second(UNREACHED))
        .tokens(Rate::per_second(UNREACHED))
        .observe(metrics)
        .build(client)
        .expect("the settings are valid");
    executor.start().expect("the executor is not running yet");
    let services = (0..callers).map(|_| {
        let executor = executor.clone();
        service_fn(move |request: Request<T::Body>| executor.clone().call(request.map(Observed)))
    });
    calls(services.collect(), T::request).await
}

/// A recorder whose metrics are a number each.
struct Sums;

struct Sum(AtomicU64);

impl Recorder for Sums {
    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn register_counter(&self, _: &Key, _: &Metadata<'_>) -> Counter {
        Counter::from_arc(Arc::new(AtomicU64::new(0)))
    }

    fn register_gauge(&self, _: &Key, _: &Metadata<'_>) -> Gauge {
        Gauge::noop()
    }

    fn register_histogram(&self, _: &Key, _: &Metadata<'_>) -> Histogram {
        Histogram::from_arc(Arc::new(Sum(AtomicU64::new(0))))
    }
}

impl HistogramFn for Sum {
    fn record(&self, value: f64) {
        self.0.fetch_add(value as u64, Ordering::Relaxed);
    }
}

/// The body of a request to the [executor with a schedule](executor_with_schedule). A type of its own, so that this executor
/// and the one without share no code: a function that both call may not be inlined, and then both would seem to cost more.
struct OfFlow<B>(B);

/// The [executor] with a schedule. Its callers are those of [`FLOWS`] flows, in turns.
pub(crate) const fn executor_with_schedule<T: Traffic>(name: &'static str) -> Contender {
    Contender {
        name,
        run: |callers| {
            Box::pin(async move {
                let client = ServiceBuilder::new()
                    .map_request(|request: Request<OfFlow<T::Body>>| request.map(|OfFlow(body)| body))
                    .service(client::<T>());
                let executor = Executor::builder()
                    .queue_capacity(CAPACITY)
                    .concurrency_limit(CAPACITY)
                    .requests(Rate::per_second(UNREACHED))
                    .tokens(Rate::per_second(UNREACHED))
                    .schedule(Schedule::new().level(Level::by("tenant")))
                    .build(client)
                    .expect("the settings are valid");
                executor.start().expect("the executor is not running yet");
                let services = (0..callers as u64).map(|caller| {
                    let executor = executor.clone();
                    let flow = Flow::from(caller % FLOWS);
                    service_fn(move |request: Request<T::Body>| {
                        let mut request = request.map(OfFlow);
                        request.extensions_mut().insert(flow.clone());
                        executor.clone().call(request)
                    })
                });
                calls(services.collect(), T::request).await
            })
        },
    }
}

pub(crate) const fn stack_with_events<T: Traffic>(name: &'static str) -> Contender {
    Contender {
        name,
        run: |callers| {
            Box::pin(async move {
                let stack = ServiceBuilder::new()
                    .layer(EventLayer::queued())
                    .layer(queue())
                    .layer(EventLayer::processing())
                    .layer(concurrency())
                    .layer(rate())
                    .layer(EventLayer::calling())
                    .service(client::<T>());
                calls(clones(stack, callers), T::request).await
            })
        },
    }
}

pub(crate) const fn stack_without_events<T: Traffic>(name: &'static str) -> Contender {
    Contender {
        name,
        run: |callers| {
            Box::pin(async move {
                let stack = ServiceBuilder::new()
                    .layer(queue())
                    .layer(concurrency())
                    .layer(rate())
                    .service(client::<T>());
                calls(clones(stack, callers), T::request).await
            })
        },
    }
}

pub(crate) const fn tower_stack<T: Traffic>(name: &'static str) -> Contender {
    Contender {
        name,
        run: |callers| {
            Box::pin(async move {
                let stack = ServiceBuilder::new()
                    .buffer(CAPACITY)
                    .concurrency_limit(CAPACITY)
                    .rate_limit(UNREACHED, SECOND)
                    .service(client::<T>());
                calls(clones(stack, callers), T::request).await
            })
        },
    }
}

pub(crate) const fn resilience_stack<T: Traffic>(name: &'static str) -> Contender {
    Contender {
        name,
        run: |callers| {
            Box::pin(async move {
                let stack = ServiceBuilder::new()
                    .buffer(CAPACITY)
                    .layer(bulkhead())
                    .layer(token_bucket())
                    .service(client::<T>());
                calls(clones(stack, callers), T::request).await
            })
        },
    }
}

/// An executor with all that a metered API needs: the body is collected, the provider's headers are applied to the
/// limiter, the tokens that were used settle the charge, failures are retried, and each call has a deadline.
pub(crate) const fn metered_executor<T: Traffic>(name: &'static str) -> Contender {
    Contender {
        name,
        run: |callers| {
            Box::pin(async move {
                // The provider's limits are per minute: only then are its headers applied to these rates.
                let rate = Rate::per_minute(60 * UNREACHED);
                let limits = Limits::new().requests(rate).tokens(rate);
                let limiter = RateLimiter::new(limits).expect("the rates are valid");
                let client = ServiceBuilder::new()
                    .layer(CollectLayer::new(1 << 20))
                    .layer(FeedbackLayer::new(limiter.clone(), Provider::OpenAi))
                    .layer(UsageLayer::new())
                    .service(client::<T>());
                let executor = Executor::builder()
                    .queue_capacity(CAPACITY)
                    .concurrency_limit(CAPACITY)
                    .timeout(600 * SECOND)
                    .limiter(limiter)
                    .cost(|_: &Request<T::Body>| Cost::tokens(400))
                    .settle(ByUsage::default())
                    .layer(RetryLayer::new(RetryPolicy::new().provider(Provider::OpenAi)))
                    .build(client)
                    .expect("the settings are valid");
                executor.start().expect("the executor is not running yet");
                calls(clones(executor, callers), T::request).await
            })
        },
    }
}

/// The client alone, with its body collected by the caller: what [`metered_executor`] is compared with.
pub(crate) const fn bare_collected<T: Traffic>(name: &'static str) -> Contender {
    Contender {
        name,
        run: |callers| {
            Box::pin(async move {
                let client = service_fn(async |request| {
                    let (head, body) = client::<T>().call(request).await?.into_parts();
                    let body = body.collect().await.expect("the body does not fail").to_bytes();
                    Ok::<_, Infallible>(Response::from_parts(head, body))
                });
                calls(clones(client, callers), T::request).await
            })
        },
    }
}

// === Layers ===

pub(crate) const fn queue_layer<T: Traffic>(name: &'static str) -> Contender {
    Contender {
        name,
        run: |callers| Box::pin(async move { layer::<T, _, _>(queue(), callers).await }),
    }
}

pub(crate) const fn tower_buffer<T: Traffic>(name: &'static str) -> Contender {
    Contender {
        name,
        run: |callers| {
            Box::pin(async move { layer::<T, _, _>(tower::buffer::BufferLayer::new(CAPACITY), callers).await })
        },
    }
}

pub(crate) const fn concurrency_layer<T: Traffic>(name: &'static str) -> Contender {
    Contender {
        name,
        run: |callers| Box::pin(layer::<T, _, _>(concurrency(), callers)),
    }
}

pub(crate) const fn tower_concurrency<T: Traffic>(name: &'static str) -> Contender {
    Contender {
        name,
        run: |callers| Box::pin(layer::<T, _, _>(GlobalConcurrencyLimitLayer::new(CAPACITY), callers)),
    }
}

pub(crate) const fn resilience_bulkhead<T: Traffic>(name: &'static str) -> Contender {
    Contender {
        name,
        run: |callers| Box::pin(layer::<T, _, _>(bulkhead(), callers)),
    }
}

pub(crate) const fn rate_layer<T: Traffic>(name: &'static str) -> Contender {
    Contender {
        name,
        run: |callers| Box::pin(layer::<T, _, _>(rate(), callers)),
    }
}

pub(crate) const fn tower_rate<T: Traffic>(name: &'static str) -> Contender {
    Contender {
        name,
        run: |_| {
            Box::pin(async {
                let layer = tower::limit::RateLimitLayer::new(UNREACHED, SECOND);
                calls(vec![layer.layer(client::<T>())], T::request).await
            })
        },
    }
}

pub(crate) const fn resilience_rate<T: Traffic>(name: &'static str) -> Contender {
    Contender {
        name,
        run: |callers| Box::pin(layer::<T, _, _>(token_bucket(), callers)),
    }
}

pub(crate) const fn event<T: Traffic>(name: &'static str) -> Contender {
    Contender {
        name,
        run: |callers| Box::pin(layer::<T, _, _>(EventLayer::calling(), callers)),
    }
}

pub(crate) const fn tower_http_trace<T: Traffic>(name: &'static str) -> Contender {
    Contender {
        name,
        run: |callers| Box::pin(layer::<T, _, _>(TraceLayer::new_for_http(), callers)),
    }
}

// === Parts ===

type Client<T> =
    ServiceFn<fn(Request<<T as Traffic>::Body>) -> Ready<Result<Response<<T as Traffic>::Body>, Infallible>>>;

/// A service that returns a response at once.
fn client<T: Traffic>() -> Client<T> {
    service_fn(|_| ready(Ok(T::response())))
}

pub(crate) fn queue<Req>() -> QueueLayer<Req> {
    QueueLayer::new(CAPACITY).expect("the capacity is valid")
}

pub(crate) fn concurrency() -> ConcurrencyLimitLayer {
    ConcurrencyLimitLayer::new(CAPACITY).expect("the limit is valid")
}

pub(crate) fn rate() -> RateLimitLayer {
    RateLimitLayer::new(limiter())
}

/// A limiter with two budgets: requests and tokens.
pub(crate) fn limiter() -> RateLimiter {
    let rate = Rate::per_second(UNREACHED);
    RateLimiter::new(Limits::new().requests(rate).tokens(rate)).expect("the rates are valid")
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

/// Measures a layer around the client.
fn layer<T, L, S>(layer: L, callers: usize) -> impl Future<Output = f64>
where
    T: Traffic,
    L: Layer<Client<T>, Service = S>,
    S: Service<Request<T::Body>, Future: Send, Response: Send, Error: std::fmt::Debug + Send> + Clone + Send + 'static,
{
    calls(clones(layer.layer(client::<T>()), callers), T::request)
}

pub(crate) fn clones<S: Clone>(service: S, callers: usize) -> Vec<S> {
    repeat_n(service, callers).collect()
}
