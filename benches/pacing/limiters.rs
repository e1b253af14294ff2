//! The limiters that are measured: tower-outbound, and every peer that lets its callers wait. Each is set up to be as
//! close to a token bucket as it allows.

use crate::figures::{Budget, Call, CostOf};
use governor::{DefaultDirectRateLimiter, Quota};
use std::{convert::Infallible, fmt, future::Future, num::NonZero, sync::Arc, time::Duration};
use throttle_net::{MultiLimiter, Throttle};
use tokio::time::Instant;
use tower::{BoxError, Layer, Service, ServiceBuilder, ServiceExt, service_fn};
use tower_outbound::{Cost, Rate, RateLimiter, rate::Estimate};
use tower_resilience::ratelimiter::RateLimiterLayer;

/// A budget that is never exhausted.
pub(crate) const UNLIMITED: Budget = Budget::new(1_000_000_000_000, 1_000_000_000_000);

/// The names of throttle-net's budgets.
const REQUESTS: &str = "requests";
const TOKENS: &str = "tokens";
const OUTPUT: &str = "output tokens";

/// The capacity of the buffer in front of Tower's rate limit. It is larger than the number of callers.
const BUFFER: usize = 1_024;

/// The limits of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    pub(crate) requests: Budget,
    /// The limit of the tokens of the prompt if those of the answer have one of their own, and otherwise of all tokens.
    pub(crate) tokens: Budget,
    /// The limit of the tokens of the answer.
    pub(crate) output: Option<Budget>,
}

/// A limiter that is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Limiter {
    TowerOutbound,
    ThrottleNet,
    Governor,
    LeakyBucket,
    TowerResilience,
    Tower,
}

/// The handle with which one caller waits for a limiter.
pub(crate) trait Pacer: Clone + Send + 'static {
    /// Waits until a call of this cost is admitted, and returns the time of the admission.
    fn admit(&mut self, cost: Cost) -> impl Future<Output = Instant> + Send;
}

/// A limiter that can be paused.
pub(crate) trait Pauses: Pacer {
    /// Admits no call from now on for this time.
    fn pause_for(&self, pause: Duration);
}

/// A limiter whose charge of a call can be corrected afterwards.
pub(crate) trait Settles: Pacer {
    type Estimate: Send;

    /// Like [`admit`](Pacer::admit), for a number of tokens that is an estimate.
    fn admit_estimate(&mut self, tokens: u64) -> impl Future<Output = (Instant, Self::Estimate)> + Send;

    /// Replaces the estimate by the number of tokens that the call has used.
    fn settle(&self, estimate: Self::Estimate, used: u64);
}

/// What is to be done with a limiter, whatever its type.
pub(crate) trait WithPacer {
    type Output;

    /// `pacer` makes the limiter, and must be called within a Tokio runtime.
    fn run<P: Pacer>(self, pacer: impl FnOnce() -> P) -> Self::Output;
}

/// A limiter of throttle-net.
#[derive(Clone)]
pub(crate) enum ThrottleNet {
    /// Limits requests only.
    Requests(Arc<Throttle>),
    /// Limits requests and tokens, of one kind or of two.
    Several { budgets: MultiLimiter, kinds: usize },
}

/// A service behind a limit. The service responds with the time at which it was called.
#[derive(Clone)]
pub(crate) struct LimitedService<S>(S);

// === impl Limits ===

impl Limits {
    pub(crate) const fn requests(requests: Budget) -> Self {
        Self {
            requests,
            tokens: UNLIMITED,
            output: None,
        }
    }

    pub(crate) const fn tokens(tokens: Budget) -> Self {
        Self {
            tokens,
            ..Self::requests(UNLIMITED)
        }
    }

    /// The limits, and what a call costs of each: requests, tokens, and the tokens of the answer if they are limited.
    pub(crate) fn budgets(&self) -> Vec<(Budget, CostOf)> {
        let both = [
            (self.requests, Call::one as CostOf),
            (self.tokens, Call::tokens as CostOf),
        ];
        let output = self.output.map(|output| (output, Call::output as CostOf));
        both.into_iter().chain(output).collect()
    }

    /// The cost of a call with so many tokens.
    pub(crate) fn cost(&self, tokens: u64, output: u64) -> Cost {
        match self.output {
            Some(_) => Cost::input_output_tokens(tokens, output),
            None => Cost::tokens(tokens),
        }
    }
}

// === impl Limiter ===

impl Limiter {
    pub(crate) const ALL: [Self; 6] = [
        Self::TowerOutbound,
        Self::ThrottleNet,
        Self::Governor,
        Self::LeakyBucket,
        Self::TowerResilience,
        Self::Tower,
    ];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::TowerOutbound => "tower-outbound",
            Self::ThrottleNet => "throttle-net",
            Self::Governor => "governor",
            Self::LeakyBucket => "leaky-bucket",
            Self::TowerResilience => "tower-resilience",
            Self::Tower => "tower",
        }
    }

    /// Describes how the limiter is set up for a rate and a burst.
    pub(crate) const fn setup(self) -> &'static str {
        match self {
            Self::TowerOutbound => {
                "RateLimiter::acquire; requests at this rate and burst, and a budget of tokens that is never exhausted"
            }
            Self::ThrottleNet => "Throttle::acquire; with several budgets, MultiLimiter::acquire_costs",
            Self::Governor => "until_ready; Quota::per_second(rate).allow_burst(burst)",
            Self::LeakyBucket => {
                "fair; refills at intervals: a burst every burst / rate; at 20000/s burst 1, twenty every ms"
            }
            Self::TowerResilience => {
                "token bucket with a capacity of one burst; a timeout of an hour, so that calls wait"
            }
            Self::Tower => "behind Buffer; counts in windows and has no burst: a burst in every window of burst / rate",
        }
    }

    /// The amount and the interval of the limiter's refills; `None` if it refills continuously.
    pub(crate) fn interval(self, requests: Budget) -> Option<(u64, Duration)> {
        let amount = match self {
            Self::TowerOutbound | Self::ThrottleNet | Self::Governor | Self::TowerResilience => return None,
            // The timer of leaky-bucket has a resolution of a millisecond, so the interval must not be shorter.
            Self::LeakyBucket => requests.burst.max(requests.rate / 1_000),
            Self::Tower => requests.burst,
        };
        Some((amount, time_for(amount, requests)))
    }

    /// Whether the limiter limits tokens besides requests.
    pub(crate) const fn limits_tokens(self) -> bool {
        matches!(self, Self::TowerOutbound | Self::ThrottleNet)
    }

    /// Does this with a limiter of these limits. A limiter that does not [limit tokens](Self::limits_tokens) limits
    /// requests only.
    pub(crate) fn with<W: WithPacer>(self, limits: Limits, with: W) -> W::Output {
        let requests = limits.requests;
        match self {
            Self::TowerOutbound => with.run(|| tower_outbound(limits)),
            Self::ThrottleNet => with.run(|| throttle_net(limits)),
            Self::Governor => with.run(|| governor(requests)),
            Self::LeakyBucket => with.run(|| leaky_bucket(requests)),
            Self::TowerResilience => with.run(|| tower_resilience(requests)),
            Self::Tower => with.run(|| tower(requests)),
        }
    }
}

impl fmt::Display for Limiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

// === tower-outbound ===

pub(crate) fn tower_outbound(limits: Limits) -> RateLimiter {
    let rate = |budget: Budget| Rate::per_second(budget.rate).burst(budget.burst);
    let requests = tower_outbound::Limits::new().requests(rate(limits.requests));
    let limits = match limits.output {
        Some(output) => requests.input_tokens(rate(limits.tokens)).output_tokens(rate(output)),
        None => requests.tokens(rate(limits.tokens)),
    };
    RateLimiter::new(limits).expect("the limits make sense")
}

impl Pacer for RateLimiter {
    async fn admit(&mut self, cost: Cost) -> Instant {
        self.acquire(cost).await.expect("the cost is below the burst");
        Instant::now()
    }
}

impl Pauses for RateLimiter {
    fn pause_for(&self, pause: Duration) {
        Self::pause_for(self, pause);
    }
}

impl Settles for RateLimiter {
    type Estimate = Estimate;

    async fn admit_estimate(&mut self, tokens: u64) -> (Instant, Estimate) {
        let estimate = self.acquire_estimate(Cost::tokens(tokens)).await;
        let estimate = estimate.expect("the cost is not above the burst");
        (Instant::now(), estimate)
    }

    fn settle(&self, estimate: Estimate, used: u64) {
        estimate.settle(Cost::tokens(used));
    }
}

// === throttle-net ===

pub(crate) fn throttle_net(limits: Limits) -> ThrottleNet {
    let Limits {
        requests,
        tokens,
        output,
    } = limits;
    let throttle = |budget: Budget| {
        Throttle::builder()
            .per_second(small(budget.rate))
            .burst(small(budget.burst))
            .build()
    };
    if tokens == UNLIMITED {
        return ThrottleNet::Requests(Arc::new(throttle(requests)));
    }
    let mut budgets = MultiLimiter::builder().dimension(TOKENS, throttle(tokens));
    if requests != UNLIMITED {
        budgets = budgets.dimension(REQUESTS, throttle(requests));
    }
    if let Some(output) = output {
        budgets = budgets.dimension(OUTPUT, throttle(output));
    }
    ThrottleNet::Several {
        budgets: budgets.strict(false).build(),
        kinds: if output.is_some() { 3 } else { 2 },
    }
}

impl Pacer for ThrottleNet {
    async fn admit(&mut self, cost: Cost) -> Instant {
        let admitted = match self {
            Self::Requests(requests) => requests.acquire().await,
            Self::Several { budgets, kinds: 2 } => {
                let costs = [(REQUESTS, 1), (TOKENS, small(cost.tokens))];
                budgets.acquire_costs(&costs).await
            }
            Self::Several { budgets, .. } => {
                let (input, output) = (small(cost.input_tokens), small(cost.output_tokens));
                budgets
                    .acquire_costs(&[(REQUESTS, 1), (TOKENS, input), (OUTPUT, output)])
                    .await
            }
        };
        admitted.expect("the cost is not above the capacity");
        Instant::now()
    }
}

impl Pauses for ThrottleNet {
    fn pause_for(&self, pause: Duration) {
        match self {
            Self::Requests(requests) => requests.pause_for(pause),
            Self::Several { budgets, .. } => budgets.pause_for(pause),
        }
    }
}

impl Settles for ThrottleNet {
    type Estimate = u64;

    async fn admit_estimate(&mut self, tokens: u64) -> (Instant, u64) {
        (self.admit(Cost::tokens(tokens)).await, tokens)
    }

    fn settle(&self, estimate: u64, used: u64) {
        let Self::Several { budgets, .. } = self else {
            unreachable!("only tokens are settled")
        };
        budgets.settle_costs(&[(TOKENS, small(estimate))], &[(TOKENS, small(used))]);
    }
}

// === governor ===

pub(crate) fn governor(requests: Budget) -> Arc<DefaultDirectRateLimiter> {
    let whole = |amount| NonZero::new(small(amount)).expect("above zero");
    let quota = Quota::per_second(whole(requests.rate)).allow_burst(whole(requests.burst));
    Arc::new(DefaultDirectRateLimiter::direct(quota))
}

impl Pacer for Arc<DefaultDirectRateLimiter> {
    async fn admit(&mut self, _: Cost) -> Instant {
        self.until_ready().await;
        Instant::now()
    }
}

// === leaky-bucket ===

pub(crate) fn leaky_bucket(requests: Budget) -> Arc<leaky_bucket::RateLimiter> {
    let (refill, interval) = Limiter::LeakyBucket
        .interval(requests)
        .expect("it refills at intervals");
    let whole = |amount| usize::try_from(amount).expect("small enough");
    Arc::new(
        leaky_bucket::RateLimiter::builder()
            .fair(true)
            .initial(whole(requests.burst))
            .max(whole(refill))
            .refill(whole(refill))
            .interval(interval)
            .build(),
    )
}

impl Pacer for Arc<leaky_bucket::RateLimiter> {
    async fn admit(&mut self, _: Cost) -> Instant {
        self.acquire_one().await;
        Instant::now()
    }
}

// === tower-resilience ===

pub(crate) fn tower_resilience(requests: Budget) -> impl Pacer {
    let layer = RateLimiterLayer::builder()
        .limit_for_period(usize::try_from(requests.burst).expect("small enough"))
        .refresh_period(time_for(requests.burst, requests))
        // The burst size is added to the amount of one period, so it is zero.
        .burst_size(0)
        .timeout_duration(Duration::from_secs(3_600))
        .build()
        .expect("the limit makes sense");
    LimitedService(layer.layer(clock()))
}

// === tower ===

pub(crate) fn tower(requests: Budget) -> impl Pacer {
    let (amount, window) = Limiter::Tower.interval(requests).expect("it refills at intervals");
    let service = ServiceBuilder::new()
        .buffer(BUFFER)
        .rate_limit(amount, window)
        .service(clock());
    LimitedService(service)
}

// === impl LimitedService ===

impl<S> Pacer for LimitedService<S>
where
    S: Service<(), Response = Instant, Error: Into<BoxError> + Send, Future: Send> + Clone + Send + 'static,
{
    async fn admit(&mut self, _: Cost) -> Instant {
        let called = async { self.0.ready().await?.call(()).await };
        called
            .await
            .map_err(Into::into)
            .expect("the limit waits and does not fail")
    }
}

/// A service that responds with the time at which it is called.
fn clock() -> impl Service<(), Response = Instant, Error = Infallible, Future: Send> + Clone + Send + Sync + 'static {
    service_fn(async |()| Ok(Instant::now()))
}

fn small(amount: u64) -> u32 {
    u32::try_from(amount).expect("small enough")
}

/// The time in which this amount flows into the bucket.
fn time_for(amount: u64, budget: Budget) -> Duration {
    Duration::from_secs(amount) / small(budget.rate)
}
