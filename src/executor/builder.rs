//! [`ExecutorBuilder`]: the settings of an executor, their defaults and their checks.

use super::{
    Executor,
    call_future::OpenEarlyResponse,
    closure::{Closure, ClosureClient},
    inner::Parts,
    monitor::Monitor,
    stack::{Around, Layers},
};
#[cfg(feature = "http")]
use crate::body::{BodyLayer, BodyService, StreamBody, open_early_response};
use crate::{
    concurrency::Concurrency,
    error::{BoxError, InvalidConfig},
    event::Http,
    queue::QueueLayer,
    rate::{AsCharged, ByExtension, Limiter, Limits, Rate, RateLimiter},
};
use http::{Request, Response};
use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};
use tower::layer::util::{Identity, Stack};
#[cfg(feature = "http")]
use tower_layer::Layer;
use tower_service::Service;

/// Builds an [`Executor`].
///
/// | setting | default |
/// |---|---|
/// | [`queue_capacity`](Self::queue_capacity) | 1000 calls |
/// | [`concurrency_limit`](Self::concurrency_limit) | 10 calls in flight |
/// | [`requests`](Self::requests) | 10 a second, with a burst of 10 |
/// | [`tokens`](Self::tokens) | not limited |
/// | [`workers`](Self::workers) | 1 task |
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

/// The settings whose types do not depend on the layers.
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
    /// At most one rate of each budget.
    Simple {
        requests: Rate,
        tokens: Option<Rate>,
    },
    Limits(Limits),
    Shared(Limiter),
    /// A shared limiter followed by `requests` or `tokens`: which of the two is meant is not clear.
    Conflict,
}

// === impl ExecutorBuilder ===

impl ExecutorBuilder {
    /// Returns a builder with all defaults.
    pub fn new() -> Self {
        Self {
            settings: Settings {
                queue_capacity: 1_000,
                workers: 1,
                concurrency: ConcurrencySetting::Own(10),
                rates: RateSetting::Simple {
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
    /// Sets how many calls the queue holds. Default: 1000.
    pub fn queue_capacity(mut self, capacity: usize) -> Self {
        self.settings.queue_capacity = capacity;
        self
    }

    /// Sets how many calls may be in flight at once. Default: 10.
    pub fn concurrency_limit(mut self, limit: usize) -> Self {
        self.settings.concurrency = ConcurrencySetting::Own(limit);
        self
    }

    /// Uses a concurrency limit that other executors or layers share, instead of
    /// [`concurrency_limit`](Self::concurrency_limit).
    pub fn concurrency(mut self, limit: Concurrency) -> Self {
        self.settings.concurrency = ConcurrencySetting::Shared(limit);
        self
    }

    /// Sets the rate of requests. Default: 10 a second. After [`limits`](Self::limits) it is added to them.
    pub fn requests(mut self, rate: Rate) -> Self {
        self.settings.rates = match self.settings.rates {
            RateSetting::Simple { tokens, .. } => RateSetting::Simple { requests: rate, tokens },
            RateSetting::Limits(limits) => RateSetting::Limits(limits.requests(rate)),
            RateSetting::Shared(_) | RateSetting::Conflict => RateSetting::Conflict,
        };
        self
    }

    /// Sets the rate of the API's tokens. Default: not limited. After [`limits`](Self::limits) it is added to them.
    pub fn tokens(mut self, rate: Rate) -> Self {
        self.settings.rates = match self.settings.rates {
            RateSetting::Simple { requests, .. } => RateSetting::Simple {
                requests,
                tokens: Some(rate),
            },
            RateSetting::Limits(limits) => RateSetting::Limits(limits.tokens(rate)),
            RateSetting::Shared(_) | RateSetting::Conflict => RateSetting::Conflict,
        };
        self
    }

    /// Sets any number of rates that hold at once, or none at all, instead of [`requests`](Self::requests) and
    /// [`tokens`](Self::tokens).
    pub fn limits(mut self, limits: Limits) -> Self {
        self.settings.rates = RateSetting::Limits(limits);
        self
    }

    /// Uses a limiter that is shared, within this process or between processes, instead of rates of this executor.
    ///
    /// [`requests`](Self::requests) or [`tokens`](Self::tokens) after it is an error when the executor is built: the
    /// rates of a shared limiter are changed with [`Limiter::set_limits`].
    pub fn limiter(mut self, limiter: impl Into<Limiter>) -> Self {
        self.settings.rates = RateSetting::Shared(limiter.into());
        self
    }

    /// Sets how many tasks drive the calls. Default: 1, which drives any number of calls at once.
    ///
    /// It never caps concurrency. More workers spread the computing that the calls do themselves over several threads.
    pub fn workers(mut self, workers: usize) -> Self {
        self.settings.workers = workers;
        self
    }

    /// Sets how long a call may take from its submission to its end: queue, limits, retries, the call and its body.
    /// Default: no limit. [`Call::timeout`](super::Call::timeout) sets it for one call.
    ///
    /// A call whose limits alone would make it wait longer, behind all calls submitted before it, is refused at once
    /// with [`DeadlineExceeded`](crate::error::DeadlineExceeded).
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.settings.timeout = Some(timeout);
        self
    }

    /// Adds a layer around the limits: see [`stack`](super::stack). The layer added last is the outermost.
    pub fn layer<N>(self, layer: N) -> ExecutorBuilder<Stack<L, N>, D, K, U> {
        ExecutorBuilder {
            settings: self.settings,
            layer: Stack::new(self.layer, layer),
            describe: self.describe,
            cost: self.cost,
            used: self.used,
        }
    }

    /// Sets what is recorded of requests and responses: a [`Describe`](crate::event::Describe). Default: [`Http`].
    pub fn describe<N>(self, describe: N) -> ExecutorBuilder<L, N, K, U> {
        ExecutorBuilder {
            settings: self.settings,
            layer: self.layer,
            describe,
            cost: self.cost,
            used: self.used,
        }
    }

    /// Sets what a request costs: a [`RequestCost`](crate::rate::RequestCost), for example a function from
    /// `&Request<B>` to [`Cost`](crate::Cost). Default: one request, and the tokens of its extension
    /// [`ApiTokens`](crate::ApiTokens).
    pub fn cost<N>(self, cost: N) -> ExecutorBuilder<L, D, N, U> {
        ExecutorBuilder {
            settings: self.settings,
            layer: self.layer,
            describe: self.describe,
            cost,
            used: self.used,
        }
    }

    /// Sets how the cost that a call has really used is found when the call has ended, a
    /// [`UsedCost`](crate::rate::UsedCost); the charge is corrected to it. Default: the charge is not corrected. See
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

    /// Builds an executor that makes its calls with `client`.
    ///
    /// A client is any service from `http::Request<B>` to `http::Response<R>` that can be cloned and sent, whose
    /// futures can be sent, and whose error is a [`BoxError`] or converts into one. What the layers, the description,
    /// the cost and the settlement of this builder have to be for it is listed at [`Around`]; the defaults fit every
    /// client.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`] names the setting that is out of range, or contradicts another.
    pub fn build<C, B, R>(self, client: C) -> Result<Executor<B, R>, InvalidConfig>
    where
        C: Service<Request<B>, Response = Response<R>> + Clone + Send + 'static,
        C::Error: Into<BoxError> + 'static,
        Layers<L, D, K, U>: Around<C, B, R>,
        B: Send + 'static,
        R: Send + 'static,
    {
        self.build_with(client, None)
    }

    /// Builds an executor that returns each response as soon as its head has arrived, and whose calls last until the
    /// body has ended: until then the permit is held and the event is open. See [`body`](crate::body#streams).
    ///
    /// A response that is neither read nor dropped keeps its permit; set a [timeout](Self::timeout) to bound that.
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
        Layers<L, D, K, U>: Around<BodyService<C>, B, StreamBody<R>>,
        B: Send + 'static,
        R: http_body::Body<Data = bytes::Bytes, Error: Into<BoxError>> + Send + 'static,
    {
        self.build_with(BodyLayer::new().layer(client), Some(open_early_response))
    }

    /// Builds an executor whose calls are closures: see [`Call::new`](super::Call::new).
    ///
    /// # Errors
    ///
    /// As [`build`](Self::build).
    pub fn build_for_closures<R>(self) -> Result<Executor<Closure<R>, R>, InvalidConfig>
    where
        Layers<L, D, K, U>: Around<ClosureClient<R>, Closure<R>, R>,
        R: Send + 'static,
    {
        self.build(ClosureClient::new())
    }

    fn build_with<C, B, R>(
        self,
        client: C,
        open_early_response: Option<OpenEarlyResponse<B, R>>,
    ) -> Result<Executor<B, R>, InvalidConfig>
    where
        C: Clone + Send + 'static,
        Layers<L, D, K, U>: Around<C, B, R>,
        B: Send + 'static,
        R: Send + 'static,
    {
        let queue = QueueLayer::new(self.settings.queue_capacity)?.workers(self.settings.workers)?;
        let layers = Layers {
            layer: self.layer,
            concurrency: self.settings.concurrency.into_concurrency()?,
            limiter: self.settings.rates.into_limiter()?,
            cost: self.cost,
            used: self.used,
            describe: self.describe,
        };
        let (describe, cost) = (layers.boxed_describe(), layers.boxed_cost());
        let monitor = Monitor::new(layers.limiter.clone(), layers.concurrency.clone());
        // In a mutex, so that a client need not be `Sync`. It is locked once a start, to clone the client.
        let client = Mutex::new(client);
        let start = move || {
            let client = client.lock().unwrap_or_else(PoisonError::into_inner).clone();
            layers.around(queue.clone(), client)
        };
        Ok(Executor::new(Parts {
            start: Box::new(start),
            open_early_response,
            describe,
            cost,
            timeout: self.settings.timeout,
            monitor,
        }))
    }
}

// === impl ConcurrencySetting ===

impl ConcurrencySetting {
    fn into_concurrency(self) -> Result<Concurrency, InvalidConfig> {
        match self {
            Self::Own(limit) => Concurrency::new(limit),
            Self::Shared(limit) => Ok(limit),
        }
    }
}

// === impl RateSetting ===

impl RateSetting {
    fn into_limiter(self) -> Result<Limiter, InvalidConfig> {
        let limits = match self {
            Self::Simple { requests, tokens } => {
                let limits = Limits::new().requests(requests);
                match tokens {
                    Some(tokens) => limits.tokens(tokens),
                    None => limits,
                }
            }
            Self::Limits(limits) => limits,
            Self::Shared(limiter) => return Ok(limiter),
            Self::Conflict => {
                return Err(InvalidConfig::new(
                    "limiter",
                    "is shared, so its rates cannot be set here: leave out `requests` and `tokens`",
                ));
            }
        };
        Ok(RateLimiter::new(limits)?.into())
    }
}
