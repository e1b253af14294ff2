//! [`ExecutorBuilder`]: the defaults and the checks.

use super::{
    Executor, Parts,
    call_future::OpenEarlyResponse,
    closure::{Closure, ClosureClient},
    stack::{Limited, Stack},
};
#[cfg(feature = "http")]
use crate::body::{BodyLayer, BodyService, StreamBody, open_early_response};
use crate::{
    concurrency::Concurrency,
    deadline::DeadlineService,
    error::{BoxError, InvalidConfig},
    event::{Describe, EventService, Http},
    rate::{AsCharged, ByExtension, Limiter, Limits, Rate, RateLimiter, RequestCost, UsedCost},
};
use http::{Request, Response};
use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};
use tower::layer::util::{Identity, Stack as Pair};
use tower_layer::Layer;
use tower_service::Service;

/// Builds an [`Executor`].
///
/// | setting | default |
/// |---|---|
/// | [`queue_capacity`](Self::queue_capacity) | 1000 |
/// | [`concurrency_limit`](Self::concurrency_limit) | 10 |
/// | [`requests`](Self::requests) | 10 a second, burst 10 |
/// | [`tokens`](Self::tokens) | not limited |
/// | [`workers`](Self::workers) | 1 |
/// | [`timeout`](Self::timeout) | none |
///
/// ```
/// use tower_outbound::{Executor, Rate};
///
/// let executor = Executor::builder()
///     .queue_capacity(500)
///     .concurrency_limit(5)
///     .requests(Rate::per_second(10))
///     .tokens(Rate::per_minute(10_000))
///     .build_for_closures::<String>()?;
/// # Ok::<_, tower_outbound::error::InvalidConfig>(())
/// ```
#[derive(Clone, Debug)]
#[must_use = "a builder does nothing until it builds"]
pub struct ExecutorBuilder<L = Identity, D = Http, K = ByExtension, U = AsCharged> {
    settings: Settings,
    layer: L,
    describe: D,
    cost: K,
    used: U,
}

/// What is the same whatever the layers are.
#[derive(Clone, Debug)]
struct Settings {
    queue_capacity: usize,
    workers: usize,
    concurrency: ConcurrencySetting,
    rates: RateSetting,
    timeout: Option<Duration>,
}

#[derive(Clone, Debug)]
enum ConcurrencySetting {
    Own(usize),
    Shared(Concurrency),
}

#[derive(Clone, Debug)]
enum RateSetting {
    Own {
        requests: Rate,
        tokens: Option<Rate>,
    },
    Given(Limits),
    Shared(Limiter),
    /// A shared limiter, and rates of its own: which of them?
    Conflict,
}

impl ExecutorBuilder {
    /// All defaults.
    pub fn new() -> Self {
        Self {
            settings: Settings {
                queue_capacity: 1_000,
                workers: 1,
                concurrency: ConcurrencySetting::Own(10),
                rates: RateSetting::Own {
                    requests: Rate::new(10, Duration::from_secs(1)),
                    tokens: None,
                },
                timeout: None,
            },
            layer: Identity::new(),
            describe: Http::default(),
            cost: ByExtension,
            used: AsCharged,
        }
    }
}

impl Default for ExecutorBuilder {
    fn default() -> Self {
        Self::new()
    }
}

impl<L, D, K, U> ExecutorBuilder<L, D, K, U> {
    /// Places in the queue. Default: 1000.
    pub fn queue_capacity(mut self, capacity: usize) -> Self {
        self.settings.queue_capacity = capacity;
        self
    }

    /// Calls in flight at once. Default: 10.
    pub fn concurrency_limit(mut self, limit: usize) -> Self {
        self.settings.concurrency = ConcurrencySetting::Own(limit);
        self
    }

    /// Shares the concurrency limit with others.
    pub fn concurrency(mut self, limit: Concurrency) -> Self {
        self.settings.concurrency = ConcurrencySetting::Shared(limit);
        self
    }

    /// The rate of requests. Default: 10 a second. After [`limits`](Self::limits), one more of them.
    pub fn requests(mut self, rate: Rate) -> Self {
        self.settings.rates = match self.settings.rates {
            RateSetting::Own { tokens, .. } => RateSetting::Own { requests: rate, tokens },
            RateSetting::Given(limits) => RateSetting::Given(limits.requests(rate)),
            RateSetting::Shared(_) | RateSetting::Conflict => RateSetting::Conflict,
        };
        self
    }

    /// The rate of the API's tokens. Default: not limited. After [`limits`](Self::limits), one more of them.
    pub fn tokens(mut self, rate: Rate) -> Self {
        self.settings.rates = match self.settings.rates {
            RateSetting::Own { requests, .. } => RateSetting::Own {
                requests,
                tokens: Some(rate),
            },
            RateSetting::Given(limits) => RateSetting::Given(limits.tokens(rate)),
            RateSetting::Shared(_) | RateSetting::Conflict => RateSetting::Conflict,
        };
        self
    }

    /// Any number of rates at once, instead of [`requests`](Self::requests) and [`tokens`](Self::tokens); or none at
    /// all.
    pub fn limits(mut self, limits: Limits) -> Self {
        self.settings.rates = RateSetting::Given(limits);
        self
    }

    /// Shares a limiter with others, in this process or in many, instead of having limits of its own.
    pub fn limiter(mut self, limiter: impl Into<Limiter>) -> Self {
        self.settings.rates = RateSetting::Shared(limiter.into());
        self
    }

    /// How many tasks drive the calls. Default: one, which can drive any number of them. It never caps concurrency;
    /// more workers let the calls' own computing spread over several threads.
    pub fn workers(mut self, workers: usize) -> Self {
        self.settings.workers = workers;
        self
    }

    /// How long a call may take, from when it is submitted until it is over: queue, limits, retries, call and body.
    /// Default: as long as it takes. [`Call::timeout`](super::Call::timeout) sets it for one call.
    ///
    /// A call that would have to wait longer for its limits, behind all that were submitted before it, is refused at
    /// once: [`DeadlineExceeded`](crate::error::DeadlineExceeded).
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.settings.timeout = Some(timeout);
        self
    }

    /// Puts a layer around the limits: see [`stack`](super::stack). The last one added is the outermost.
    pub fn layer<N>(self, layer: N) -> ExecutorBuilder<Pair<L, N>, D, K, U> {
        ExecutorBuilder {
            settings: self.settings,
            layer: Pair::new(self.layer, layer),
            describe: self.describe,
            cost: self.cost,
            used: self.used,
        }
    }

    /// What to record of requests and responses. Default: [`Http`].
    pub fn describe<N>(self, describe: N) -> ExecutorBuilder<L, N, K, U> {
        ExecutorBuilder {
            settings: self.settings,
            layer: self.layer,
            describe,
            cost: self.cost,
            used: self.used,
        }
    }

    /// What a request costs. Default: one request, and the tokens of its extension [`ApiTokens`](crate::ApiTokens).
    pub fn cost<N>(self, cost: N) -> ExecutorBuilder<L, D, N, U> {
        ExecutorBuilder {
            settings: self.settings,
            layer: self.layer,
            describe: self.describe,
            cost,
            used: self.used,
        }
    }

    /// What a call cost in truth, once it is over: what it was charged is corrected. Default: it stands. See
    /// [`RateLimitLayer::settle`](crate::RateLimitLayer::settle).
    pub fn settle<N>(self, used: N) -> ExecutorBuilder<L, D, K, N> {
        ExecutorBuilder {
            settings: self.settings,
            layer: self.layer,
            describe: self.describe,
            cost: self.cost,
            used,
        }
    }

    /// An executor that makes its calls with `client`: any service from http requests to http responses.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`] names the setting that makes no sense.
    pub fn build<C, B, R>(self, client: C) -> Result<Executor<B, R>, InvalidConfig>
    where
        C: Service<Request<B>, Response = Response<R>> + Clone + Send + 'static,
        C::Error: Into<BoxError> + 'static,
        L: Layer<Limited<C, D, K, U>> + Send + Sync + 'static,
        L::Service: Service<Request<B>, Response = Response<R>, Error: Into<BoxError>, Future: Send> + Send + 'static,
        EventService<DeadlineService<L::Service, K>, D>:
            Service<Request<B>, Response = Response<R>, Error = BoxError, Future: Send> + Send + 'static,
        D: Describe<Request<B>, Response<R>> + Clone + Send + Sync + 'static,
        K: RequestCost<Request<B>> + Clone + Send + Sync + 'static,
        U: UsedCost<Response<R>> + Clone + Send + Sync + 'static,
        B: Send + 'static,
        R: Send + 'static,
    {
        self.build_with(client, None)
    }

    /// An executor that returns each response as soon as its response is there, and whose calls go on until the body is over:
    /// its permit is held, and its event open, until the last byte. See [`http`](crate::body#streams).
    ///
    /// Whoever neither reads a response nor drops it keeps its permit: a [timeout](Self::timeout) ends that.
    ///
    /// # Errors
    ///
    /// As [`build`](Self::build).
    #[cfg(feature = "http")]
    #[cfg_attr(docsrs, doc(cfg(feature = "http")))]
    pub fn build_streaming<C, B, R>(self, client: C) -> Result<Executor<B, StreamBody<R>>, InvalidConfig>
    where
        C: Service<Request<B>, Response = Response<R>, Future: Send> + Clone + Send + 'static,
        C::Error: Into<BoxError>,
        L: Layer<Limited<BodyService<C>, D, K, U>> + Send + Sync + 'static,
        L::Service: Service<Request<B>, Response = Response<StreamBody<R>>, Error: Into<BoxError>, Future: Send>
            + Send
            + 'static,
        EventService<DeadlineService<L::Service, K>, D>:
            Service<Request<B>, Response = Response<StreamBody<R>>, Error = BoxError, Future: Send> + Send + 'static,
        D: Describe<Request<B>, Response<StreamBody<R>>> + Clone + Send + Sync + 'static,
        K: RequestCost<Request<B>> + Clone + Send + Sync + 'static,
        U: UsedCost<Response<StreamBody<R>>> + Clone + Send + Sync + 'static,
        B: Send + 'static,
        R: http_body::Body<Data = bytes::Bytes, Error: Into<BoxError>> + Send + 'static,
    {
        self.build_with(BodyLayer::new().layer(client), Some(open_early_response))
    }

    fn build_with<C, B, R>(
        self,
        client: C,
        open_early_response: Option<OpenEarlyResponse<B, R>>,
    ) -> Result<Executor<B, R>, InvalidConfig>
    where
        C: Service<Request<B>, Response = Response<R>> + Clone + Send + 'static,
        C::Error: Into<BoxError> + 'static,
        L: Layer<Limited<C, D, K, U>> + Send + Sync + 'static,
        L::Service: Service<Request<B>, Response = Response<R>, Error: Into<BoxError>, Future: Send> + Send + 'static,
        EventService<DeadlineService<L::Service, K>, D>:
            Service<Request<B>, Response = Response<R>, Error = BoxError, Future: Send> + Send + 'static,
        D: Describe<Request<B>, Response<R>> + Clone + Send + Sync + 'static,
        K: RequestCost<Request<B>> + Clone + Send + Sync + 'static,
        U: UsedCost<Response<R>> + Clone + Send + Sync + 'static,
        B: Send + 'static,
        R: Send + 'static,
    {
        let stack = Stack {
            queue_capacity: InvalidConfig::positive("queue_capacity", self.settings.queue_capacity)?,
            workers: InvalidConfig::workers(self.settings.workers)?,
            layer: self.layer,
            concurrency: match self.settings.concurrency {
                ConcurrencySetting::Own(limit) => Concurrency::new(limit)?,
                ConcurrencySetting::Shared(limit) => limit,
            },
            limiter: match self.settings.rates {
                RateSetting::Own { requests, tokens: None } => {
                    RateLimiter::new(Limits::new().requests(requests))?.into()
                }
                RateSetting::Own {
                    requests,
                    tokens: Some(tokens),
                } => RateLimiter::new(Limits::new().requests(requests).tokens(tokens))?.into(),
                RateSetting::Given(limits) => RateLimiter::new(limits)?.into(),
                RateSetting::Shared(limiter) => limiter,
                RateSetting::Conflict => {
                    return Err(InvalidConfig::new(
                        "limiter",
                        "is shared, and has its own rates: set those with set_limits",
                    ));
                }
            },
            cost: self.cost,
            used: self.used,
            describe: self.describe,
        };
        let (limiter, concurrency) = (stack.limiter.clone(), stack.concurrency.clone());
        let (describe, cost) = (Box::new(stack.describe.clone()), Box::new(stack.cost.clone()));
        // So that a client need not be `Sync`: it is only cloned here, once for every start.
        let client = Mutex::new(client);
        let start = move || {
            let client = client.lock().unwrap_or_else(PoisonError::into_inner).clone();
            stack.around(client)
        };
        Ok(Executor::new(Parts {
            start: Box::new(start),
            open_early_response,
            describe,
            cost,
            timeout: self.settings.timeout,
            limiter,
            concurrency,
        }))
    }

    /// An executor whose calls are closures: see [`Call::new`](super::Call::new).
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`] names the setting that makes no sense.
    pub fn build_for_closures<R>(self) -> Result<Executor<Closure<R>, R>, InvalidConfig>
    where
        L: Layer<Limited<ClosureClient<R>, D, K, U>> + Send + Sync + 'static,
        L::Service:
            Service<Request<Closure<R>>, Response = Response<R>, Error: Into<BoxError>, Future: Send> + Send + 'static,
        EventService<DeadlineService<L::Service, K>, D>:
            Service<Request<Closure<R>>, Response = Response<R>, Error = BoxError, Future: Send> + Send + 'static,
        D: Describe<Request<Closure<R>>, Response<R>> + Clone + Send + Sync + 'static,
        K: RequestCost<Request<Closure<R>>> + Clone + Send + Sync + 'static,
        U: UsedCost<Response<R>> + Clone + Send + Sync + 'static,
        R: Send + 'static,
    {
        self.build(ClosureClient::new())
    }
}
