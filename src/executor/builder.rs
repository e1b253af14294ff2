//! [`ExecutorBuilder`]: the settings of an executor, their defaults and their checks.

use super::{
    Executor,
    call_future::OpenEarlyResponse,
    closure::{Closure, ClosureClient},
    inner::ExecutorParts,
    monitor::Monitor,
    rate_settings::RateSettings,
    stack::{BuildStack, StackLayers},
};
#[cfg(feature = "http")]
use crate::body::{BodyLayer, BodyService, StreamBody, open_early_response};
use crate::{
    concurrency::Concurrency,
    error::{BoxError, InvalidConfig},
    event::{Http, Observer, Observers},
    queue::QueueLayer,
    rate::{AsCharged, Budget, ByExtension, Limits, Rate, RateLimiter},
    schedule::{Flow, RequestFlow, Schedule},
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

/// Builds an [`Executor`]. These are the main settings and their defaults:
///
/// | setting | default |
/// |---|---|
/// | [`queue_capacity`](Self::queue_capacity) | 1000 calls |
/// | [`concurrency_limit`](Self::concurrency_limit) | 10 calls in flight |
/// | [`requests`](Self::requests) | 10 per second, with a burst of 10, also if other budgets are limited |
/// | [`tokens`](Self::tokens), [`input_tokens`](Self::input_tokens), [`output_tokens`](Self::output_tokens), [`budget`](Self::budget) | not limited |
/// | [`workers`](Self::workers) | 1 call starts at once |
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
///
/// An executor whose requests are not limited has [`limits`](Self::limits) without a rate of requests.
#[derive(Clone, Debug)]
#[must_use = "a builder does nothing until it builds"]
pub struct ExecutorBuilder<L = Identity, D = Http, K = ByExtension, U = AsCharged, F = ByExtension> {
    settings: Settings,
    layer: L,
    describe: D,
    cost: K,
    used: U,
    flow: F,
}

/// The settings that do not depend on the builder's type parameters.
#[derive(Clone, Debug)]
struct Settings {
    queue_capacity: usize,
    workers: usize,
    concurrency: ConcurrencySetting,
    rates: RateSettings,
    schedule: Option<Schedule>,
    timeout: Option<Duration>,
    observers: Observers,
    #[cfg(feature = "http")]
    body_layer: BodyLayer,
}

#[derive(Clone, Debug)]
enum ConcurrencySetting {
    Own(usize),
    Shared(Concurrency),
}

// === impl ExecutorBuilder ===

impl ExecutorBuilder {
    /// Returns a builder of executors whose settings all have their default values.
    pub fn new() -> Self {
        Self {
            settings: Settings {
                queue_capacity: 1_000,
                workers: 1,
                concurrency: ConcurrencySetting::Own(10),
                rates: RateSettings::default(),
                schedule: None,
                timeout: None,
                observers: Observers::default(),
                #[cfg(feature = "http")]
                body_layer: BodyLayer::new(),
            },
            layer: Identity::new(),
            describe: Http::default(),
            cost: ByExtension,
            used: AsCharged,
            flow: ByExtension,
        }
    }
}

impl Default for ExecutorBuilder {
    fn default() -> Self {
        Self::new()
    }
}

impl<L, D, K, U, F> ExecutorBuilder<L, D, K, U, F> {
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

    /// Uses a concurrency limit that other executors or layers share, instead of one for this executor only, which
    /// [`concurrency_limit`](Self::concurrency_limit) sets.
    pub fn concurrency(mut self, limit: Concurrency) -> Self {
        self.settings.concurrency = ConcurrencySetting::Shared(limit);
        self
    }

    /// Sets the rate of requests. Default: 10 per second, whether or not other budgets are limited. If
    /// [`limits`](Self::limits) was called before, the rate is added to those limits.
    pub fn requests(mut self, rate: Rate) -> Self {
        self.settings.rates.set("requests", Budget::Requests, rate);
        self
    }

    /// Sets the rate of the API's tokens, of prompts and answers together. Default: not limited. If
    /// [`limits`](Self::limits) was called before, the rate is added to those limits.
    ///
    /// This does not change the rate of [`requests`](Self::requests): if that is not set, the executor still sends 10
    /// requests per second at most, and building it logs that.
    pub fn tokens(mut self, rate: Rate) -> Self {
        self.settings.rates.set("tokens", Budget::Tokens, rate);
        self
    }

    /// Sets the rate of the tokens of prompts, for providers that limit them apart. Default: not limited. Otherwise like
    /// [`tokens`](Self::tokens).
    pub fn input_tokens(mut self, rate: Rate) -> Self {
        self.settings.rates.set("input_tokens", Budget::InputTokens, rate);
        self
    }

    /// Sets the rate of the tokens of answers, for providers that limit them apart. Default: not limited. Otherwise like
    /// [`tokens`](Self::tokens).
    pub fn output_tokens(mut self, rate: Rate) -> Self {
        self.settings.rates.set("output_tokens", Budget::OutputTokens, rate);
        self
    }

    /// Sets the rate of any budget, such as `images`: see [`Limits::budget`]. A call takes of it what the executor's
    /// [`cost`](Self::cost) has under the same name. Default: not limited. Otherwise like [`tokens`](Self::tokens).
    pub fn budget(mut self, budget: impl Into<Budget>, rate: Rate) -> Self {
        self.settings.rates.set("budget", budget.into(), rate);
        self
    }

    /// Adds a rate to those that are set, as [`Config`](super::Config) does, which may have several for a budget.
    pub(super) fn add_rate(mut self, budget: Budget, rate: Rate) -> Self {
        self.settings.rates.add("budget", budget, rate);
        self
    }

    /// Sets any number of rates that are all enforced at once, or none at all. They replace the rates set before for
    /// single budgets, and the default rate of requests: without a rate of requests in `limits`, requests are not
    /// limited.
    pub fn limits(mut self, limits: Limits) -> Self {
        self.settings.rates.replace(limits);
        self
    }

    /// Uses a rate limiter that is shared, within this process or between processes, instead of rates for this executor
    /// only.
    ///
    /// If [`limits`](Self::limits) or the rate of a budget, such as [`requests`](Self::requests), is set, too, be it
    /// before or after, building the executor fails. The rates of a shared limiter are changed with
    /// [`RateLimiter::set_limits`].
    pub fn limiter(mut self, limiter: RateLimiter) -> Self {
        self.settings.rates.share(limiter);
        self
    }

    /// Sets how many calls may start at once, that is, be on their way from the queue to the limits. Default: 1, so that
    /// calls reach the limits in the order in which they were submitted. See
    /// [`QueueLayer::workers`](crate::QueueLayer::workers).
    ///
    /// The number of workers does not limit how many calls run at once: each running call is a task of its own.
    pub fn workers(mut self, workers: usize) -> Self {
        self.settings.workers = workers;
        self
    }

    /// Sets how long a call may take from its submission to its end, which includes its time in the queue, its wait for
    /// the limits, all attempts, and the response's body if it is streamed. Default: no limit.
    /// [`Call::timeout`](super::Call::timeout) sets the timeout of one call.
    ///
    /// A call is refused when it is submitted, with [`DeadlineExceeded`](crate::error::DeadlineExceeded), if its wait
    /// for the rate limits, behind all calls submitted before it, would not end within this timeout. With a
    /// [schedule](Self::schedule), only the calls of its flow that it cannot go before are counted.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.settings.timeout = Some(timeout);
        self
    }

    /// Sets how long the body of a response that is not a success (2xx) is read, in an executor that [streams
    /// bodies](Self::build_streaming): see [`body`](crate::body#failures). Default: 15 s.
    #[cfg(feature = "http")]
    #[cfg_attr(docsrs, doc(cfg(feature = "http")))]
    pub fn failure_timeout(mut self, timeout: Duration) -> Self {
        self.settings.body_layer = self.settings.body_layer.failure_timeout(timeout);
        self
    }

    /// Lets `schedule` decide which call goes next, instead of the order of arrival: fairly between tenants, urgent calls
    /// first, with limits of each key. Calls name their [flow](super::Call::flow) and their [class](super::Call::class); a
    /// function can do so by the request: see [`schedule_by`](Self::schedule_by). Default: first in, first out.
    ///
    /// The schedule takes permits and budgets from this executor's concurrency limit and limiter. It serves one executor: one
    /// that is started while another one uses it fails to start.
    pub fn schedule(mut self, schedule: Schedule) -> Self {
        self.settings.schedule = Some(schedule);
        self
    }

    /// Does what [`schedule`](Self::schedule) does, and lets `flow` say whose call a request is: a function from
    /// `&Request<B>` to [`Flow`]. What a call itself names, by [`Call::flow`](super::Call::flow),
    /// [`Call::class`](super::Call::class) or an extension of its request, goes before what the function returns. The
    /// function is called when a call is submitted, and should not block.
    ///
    /// ```
    /// use http::Request;
    /// use std::time::Duration;
    /// use tower_outbound::{Executor, Schedule, schedule::{Flow, Level}};
    ///
    /// let schedule = Schedule::new()
    ///     .class("interactive", Duration::ZERO)
    ///     .class("batch", Duration::from_secs(600))
    ///     .level(Level::by("host"));
    /// let by_host = |request: &Request<String>| {
    ///     let class = if request.uri().path().starts_with("/batch") { "batch" } else { "interactive" };
    ///     Flow::from(request.uri().host().unwrap_or_default()).class(class)
    /// };
    ///
    /// # let client = tower::service_fn(async |_: Request<String>| Ok::<_, std::io::Error>(http::Response::new(())));
    /// let executor = Executor::builder().schedule_by(schedule, by_host).build(client)?;
    /// # Ok::<_, tower_outbound::error::InvalidConfig>(())
    /// ```
    pub fn schedule_by<N>(self, schedule: Schedule, flow: N) -> ExecutorBuilder<L, D, K, U, N> {
        let builder = self.schedule(schedule);
        ExecutorBuilder {
            settings: builder.settings,
            layer: builder.layer,
            describe: builder.describe,
            cost: builder.cost,
            used: builder.used,
            flow,
        }
    }

    /// Adds an observer, which is called at every step of every call: see [`Observer`]. Of several observers, the one added
    /// first is called first. [`Monitor::events`](super::Monitor::events) also adds observers, while the executor runs.
    /// Default: none.
    pub fn observe(mut self, observer: impl Observer + 'static) -> Self {
        self.settings.observers.add(observer);
        self
    }

    /// Adds a Tower layer around the concurrency limit and the rate limit: see [`stack`](super::stack). The layer added
    /// last is the outermost.
    pub fn layer<N>(self, layer: N) -> ExecutorBuilder<Stack<L, N>, D, K, U, F> {
        ExecutorBuilder {
            settings: self.settings,
            layer: Stack::new(self.layer, layer),
            describe: self.describe,
            cost: self.cost,
            used: self.used,
            flow: self.flow,
        }
    }

    /// Sets what the event of a call records of the request and the response: a [`Describe`](crate::event::Describe).
    /// Default: [`Http`].
    pub fn describe<N>(self, describe: N) -> ExecutorBuilder<L, N, K, U, F> {
        ExecutorBuilder {
            settings: self.settings,
            layer: self.layer,
            describe,
            cost: self.cost,
            used: self.used,
            flow: self.flow,
        }
    }

    /// Sets how the cost of a request is computed: a [`RequestCost`](crate::rate::RequestCost), for example a function
    /// from `&Request<B>` to [`Cost`](crate::Cost). Default: [`ByExtension`], the cost that the request declares.
    pub fn cost<N>(self, cost: N) -> ExecutorBuilder<L, D, N, U, F> {
        ExecutorBuilder {
            settings: self.settings,
            layer: self.layer,
            describe: self.describe,
            cost,
            used: self.used,
            flow: self.flow,
        }
    }

    /// Sets the [`UsedCost`](crate::rate::UsedCost) that determines, when a call has ended, what the call has really
    /// cost. The rate limiter then corrects the call's charge to that cost. Default:
    /// charges are not corrected. See [`RateLimitLayer::settle`](crate::RateLimitLayer::settle).
    pub fn settle<N>(self, used: N) -> ExecutorBuilder<L, D, K, N, F> {
        ExecutorBuilder {
            settings: self.settings,
            layer: self.layer,
            describe: self.describe,
            cost: self.cost,
            used,
            flow: self.flow,
        }
    }

    /// Sets an estimate that is both the [cost](Self::cost) of a request and what [settles](Self::settle) it, because it
    /// learns from what calls have used: [`QuantileEstimate`](crate::provider::QuantileEstimate), or
    /// [`AverageEstimate`](crate::provider::AverageEstimate). Default: none.
    pub fn estimate<E: Clone>(self, estimate: E) -> ExecutorBuilder<L, D, E, E, F> {
        self.cost(estimate.clone()).settle(estimate)
    }

    /// Builds an executor that makes its calls with `client`.
    ///
    /// A client is any service from `http::Request<B>` to `http::Response<R>` that can be cloned and sent, whose
    /// futures can be sent, and whose error is a [`BoxError`] or converts into one. [`BuildStack`] lists the
    /// requirements for the values given to `layer`, `describe`, `cost` and `settle`; the defaults meet them for every
    /// client.
    ///
    /// # Errors
    ///
    /// Returns [`InvalidConfig`], which names the setting that is out of range or contradicts another.
    pub fn build<C, B, R>(self, client: C) -> Result<Executor<B, R>, InvalidConfig>
    where
        C: Service<Request<B>, Response = Response<R>> + Clone + Send + 'static,
        C::Error: Into<BoxError> + 'static,
        StackLayers<L, D, K, U>: BuildStack<C, B, R>,
        B: Send + 'static,
        F: RequestFlow<B> + Send + Sync + 'static,
        R: Send + 'static,
    {
        self.build_with(client, None)
    }

    /// Builds an executor that returns each response as soon as its head (status and headers) has arrived. A call lasts
    /// until the response's body has ended: until then, the call holds its concurrency permit and its event is open.
    /// See [`body`](crate::body#streams).
    ///
    /// A response whose body is neither read nor dropped keeps its permit; set a [timeout](Self::timeout) to bound
    /// that.
    ///
    /// # Errors
    ///
    /// Returns the errors of [`build`](Self::build).
    #[cfg(feature = "http")]
    #[cfg_attr(docsrs, doc(cfg(feature = "http")))]
    pub fn build_streaming<C, B, R>(self, client: C) -> Result<Executor<B, StreamBody<R>>, InvalidConfig>
    where
        C: Service<Request<B>, Response = Response<R>, Future: Send> + Clone + Send + 'static,
        C::Error: Into<BoxError>,
        StackLayers<L, D, K, U>: BuildStack<BodyService<C>, B, StreamBody<R>>,
        F: RequestFlow<B> + Send + Sync + 'static,
        B: Send + 'static,
        R: http_body::Body<Data = bytes::Bytes, Error: Into<BoxError>> + Send + 'static,
    {
        let client = self.settings.body_layer.layer(client);
        self.build_with(client, Some(open_early_response))
    }

    /// Builds an executor whose calls are closures instead of http requests to a client: see
    /// [`Call::new`](super::Call::new).
    ///
    /// # Errors
    ///
    /// Returns the errors of [`build`](Self::build).
    pub fn build_for_closures<R>(self) -> Result<Executor<Closure<R>, R>, InvalidConfig>
    where
        StackLayers<L, D, K, U>: BuildStack<ClosureClient<R>, Closure<R>, R>,
        F: RequestFlow<Closure<R>> + Send + Sync + 'static,
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
        StackLayers<L, D, K, U>: BuildStack<C, B, R>,
        F: RequestFlow<B> + Send + Sync + 'static,
        B: Send + 'static,
        R: Send + 'static,
    {
        let mut queue = QueueLayer::new(self.settings.queue_capacity)?.workers(self.settings.workers)?;
        let layers = StackLayers {
            layer: self.layer,
            concurrency: self.settings.concurrency.into_concurrency()?,
            limiter: self.settings.rates.into_limiter()?,
            cost: self.cost,
            used: self.used,
            describe: self.describe,
        };
        let schedule = match &self.settings.schedule {
            Some(schedule) => {
                let schedule = schedule.with_root(&layers.concurrency, &layers.limiter);
                queue = queue.schedule(schedule.clone(), Flow::of, ByExtension)?;
                Some(schedule)
            }
            None => None,
        };
        let (describe, cost) = (layers.boxed_describe(), layers.boxed_cost());
        let monitor = Monitor::new(layers.limiter.clone(), layers.concurrency.clone());
        self.settings.observers.register(monitor.events());
        // The client is in a mutex so that it need not be `Sync`. The mutex is locked once per start of the executor,
        // to clone the client.
        let client = Mutex::new(client);
        let start = move || {
            let client = client.lock().unwrap_or_else(PoisonError::into_inner).clone();
            layers.build_stack(queue.clone(), client)
        };
        Ok(Executor::new(ExecutorParts {
            start: Box::new(start),
            open_early_response,
            describe,
            cost,
            schedule,
            flow: Box::new(self.flow),
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
