//! Who goes next: a fair order of the calls that wait, with limits at every level.
//!
//! By default, calls begin in the order in which they were accepted. That is right while all calls are equal. It is wrong
//! if they come from several *flows*, such as the tenants of a service: a tenant that submits 10,000 calls keeps all others
//! waiting until the last of them has gone.
//!
//! A [`Schedule`] chooses the next call in three steps:
//!
//! 1. **Between flows: fairness.** The flow goes next that has used the least of its share. Shares are equal, or in the
//!    ratio of weights. A flow that has nothing to do saves nothing up, and loses nothing: it has its share from the moment
//!    its next call comes. What nobody else wants, a flow may have.
//! 2. **Inside a flow: classes.** A call of a class with a *slack* of ten minutes counts as if it had come ten minutes
//!    later. So calls of a class without slack, such as those that a person waits for, go first, and no call waits for ever.
//! 3. **Limits at every level.** A key of a [`Level`], such as a tenant or a model, may have [limits](Level::limits) of its
//!    own. Only calls that all limits allow are looked at: a key that has used up its limits waits, and delays no others.
//!
//! Flows can be nested in up to three levels, for example `model`, and `tenant` within it: each model gets its share of the
//! whole, and each tenant its share of the model's. Put the level outermost whose limits are shared by what is below it.
//!
//! A call is chosen late: at the moment when a concurrency permit and all budgets are there for it. Until then, a call that
//! comes later and is more urgent can still go first, and no call holds a permit while it waits for its rate.
//!
//! # With an executor
//!
//! ```
//! # #[tokio::main(flavor = "current_thread", start_paused = true)]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use std::time::Duration;
//! use tower_outbound::{Call, Executor, Limits, Rate, Schedule, Shutdown, schedule::Level};
//!
//! let schedule = Schedule::new()
//!     .class("interactive", Duration::ZERO)
//!     .class("batch", Duration::from_secs(600))
//!     .level(Level::by("tenant").limits(|_| Some(Limits::new().requests(Rate::per_second(5)))));
//!
//! # let client = tower::service_fn(async |_: http::Request<String>| Ok::<_, std::io::Error>(http::Response::new(())));
//! let executor = Executor::builder()
//!     .requests(Rate::per_second(10))
//!     .schedule(schedule.clone())
//!     .build(client)?;
//! executor.start()?;
//!
//! # let request = || http::Request::post("http://localhost/").body(String::new()).unwrap();
//! let slow = executor.submit(Call::from(request()).flow("acme").class("batch")).await?;
//! let quick = executor.submit(Call::from(request()).flow("acme").class("interactive")).await?;
//! quick.await?;
//! slow.await?;
//! # executor.stop(Shutdown::Graceful).await;
//! # Ok(())
//! # }
//! ```
//!
//! # In a Tower stack
//!
//! [`QueueLayer::schedule`](crate::QueueLayer::schedule) gives a queue a schedule. Tell the schedule which limits are below
//! it, with [`concurrency`](Schedule::concurrency) and [`limiter`](Schedule::limiter): it takes from them when it chooses a
//! call, and their layers find what it has taken.
//!
//! # More
//!
//! - **What a call counts.** The time in which the limits bring what it costs, so that requests and tokens can be added up:
//!   see [`price`](Schedule::price). Where charges are estimates that are [settled](crate::RateLimitLayer::settle), the
//!   share of a flow is corrected by what its calls have really used.
//! - **How even shares are.** For two flows that have calls waiting all the time, what they have used, each divided by its
//!   weight, differs by at most the largest call of each, and by what the estimates of their open calls were wrong.
//! - **Places in the queue.** When a place gets free, it goes to the flow that has the fewest places for its weight. Calls
//!   that wait for a place are scheduled as those that have one. With a schedule, `poll_ready` of a queue or an executor is
//!   always ready, because it does not know yet whose call will follow: the call waits for its place in its future, or in
//!   [`submit`](crate::Executor::submit). A handle that is [bound to a flow](crate::Queue::of) waits in `poll_ready`.
//! - **Retries.** A further attempt of a call waits in its flow again, with the place that the call had, holds nothing
//!   meanwhile, and is charged to all limits again. For an attempt in a task of its own, see [`CurrentCall`].
//! - **At run time.** Weights, limits and pauses of keys [change](Schedule::set_weight) while calls wait, and
//!   [`flows`](Schedule::flows) shows how the flows stand.
//!
//! The page `docs/schedule.md` of the repository explains all of this at length: which level goes where, when to use
//! weights, bands or classes, and what a schedule costs.
//!
//! # What cannot be promised
//!
//! - Classes work inside a flow. Between flows, fairness decides; for classes across all flows, make the class the outermost
//!   level, with weights.
//! - Fairness holds for what calls are known to have used. While estimates are open, it holds for the estimates.
//! - How long a new call will wait, because others that come later may go first. A call is refused because of its deadline
//!   only if the calls of its flow that it cannot go before would make it late.
//! - Whoever makes more keys gets more: put a level of tenants above keys that tenants choose.
//! - In [strict](Level::strict) bands, a band that always has calls waiting starves all behind it.
//! - Shares are of what calls cost. Where permits are scarce and not rates, a flow whose calls take longer has more permits.
//! - Fairness between processes. With limits that several processes [share](crate::rate), each process orders its own calls.
//!   It asks the store for the budgets of the calls that go next, at most 64 at a time, and a call that comes meanwhile may
//!   wait behind them.

mod attempt;
mod batch;
mod call;
mod calls;
mod core;
mod current;
mod dispatch;
mod fair;
mod flow;
mod grant;
#[cfg(all(test, tower_outbound_loom))]
mod interleavings;
mod key_hash;
mod level;
mod shared;
#[cfg(test)]
mod tests;
mod tree;

pub(crate) use self::{
    call::ScheduledCall,
    core::{CallKey, Eligible, PushError, Ticket},
    dispatch::{Chosen, Dispatcher},
    grant::Grant,
    key_hash::KeyMap,
    shared::{Effects, Pushed, Scheduled, Shared},
};
pub use current::{CurrentCall, current};
pub use flow::{Flow, FlowKey, RequestFlow};
pub use level::Level;

use self::{
    core::{Core, DEFAULT_MAX_NODES, Price, Prices},
    shared::Root,
};
use crate::{
    clock,
    concurrency::Concurrency,
    error::InvalidConfig,
    rate::{Cost, Demand, Limits, RateLimiter},
    semaphore::Semaphore,
};
use std::{
    fmt,
    num::NonZeroU32,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::time::Instant;

/// Decides which of the waiting calls goes next. See the [module docs](self).
///
/// Clones are handles to the same schedule. A schedule serves one queue at a time.
#[derive(Clone)]
pub struct Schedule {
    settings: Settings,
    prices: Arc<Prices>,
    shared: Arc<Shared>,
}

/// What a schedule is made with.
#[derive(Clone, Default)]
struct Settings {
    levels: Vec<Level>,
    classes: Vec<Class>,
    price: Option<Price>,
    max_keys: Option<usize>,
    concurrency: Option<Concurrency>,
    limiter: Option<RateLimiter>,
}

#[derive(Clone)]
struct Class {
    name: Arc<str>,
    /// In nanoseconds. It can be changed while the schedule is used.
    slack: Arc<AtomicU64>,
}

/// A flow that waits, or has calls that are not settled: see [`Schedule::flows`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct FlowStatus {
    /// The keys of the flow, the outermost first.
    pub keys: Vec<FlowKey>,
    /// How many of its calls wait.
    pub waiting: usize,
    /// How many of its calls have begun and are not settled.
    pub open: usize,
    /// The weight of the flow among its siblings.
    pub weight: u32,
    /// How far the flow has got ahead of its siblings, in seconds of the limits' time for its weight: negative if it is
    /// behind. Always 0 at a strict level.
    pub lag: f64,
    /// Until when a limit or a pause of a key blocks the flow. `None` if nothing does, or no end is known.
    pub blocked_until: Option<Instant>,
    /// The name of the level whose key blocks the flow.
    pub blocked_by: Option<Arc<str>>,
}

/// Returns a duration in nanoseconds, at most 584 years.
fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// The most classes that a schedule can have.
const MAX_CLASSES: usize = 256;

// === impl Schedule ===

impl Schedule {
    /// Creates a schedule with one flow and one class, whose order is that of arrival.
    #[must_use]
    pub fn new() -> Self {
        Self::with(Settings::default())
    }

    fn with(settings: Settings) -> Self {
        let mut strict = [false; tree::MAX_LEVELS];
        for (strict, level) in strict.iter_mut().zip(&settings.levels) {
            *strict = level.is_strict();
        }
        let mut core = Core::new(strict, settings.max_keys.unwrap_or(DEFAULT_MAX_NODES));
        if settings.levels.iter().any(Level::limits_concurrency) {
            core.count_running();
        }
        let mut levels = settings.levels.clone();
        if levels.is_empty() {
            levels.push(Level::by("flow"));
        }
        let root = settings.root();
        let prices = root.prices.clone();
        let shared = Shared::new(levels, core, root);
        Self {
            settings,
            prices,
            shared: Arc::new(shared),
        }
    }

    /// Changes the settings, which makes another schedule: clones that were made before stay as they are.
    fn set(self, set: impl FnOnce(&mut Settings)) -> Self {
        let mut settings = self.settings;
        set(&mut settings);
        Self::with(settings)
    }

    /// Adds a level below those that were added before. Default: all calls are one flow.
    #[must_use]
    pub fn level(self, level: Level) -> Self {
        self.set(|settings| settings.levels.push(level))
    }

    /// Adds a class of calls: inside its flow, a call of this class counts as if it had come by `slack` later. The first class
    /// that is added is that of calls that name none. Default: one class without slack.
    #[must_use]
    pub fn class(self, name: impl Into<Arc<str>>, slack: Duration) -> Self {
        let name = name.into();
        let slack = Arc::new(AtomicU64::new(nanos(slack)));
        self.set(|settings| settings.classes.push(Class { name, slack }))
    }

    /// Sets what a call counts in the fair order, by its cost. Default: the time in which the limits bring what it costs, of
    /// each budget, added up; of several rates of a budget, the one that takes the longest.
    #[must_use]
    pub fn price(self, price: impl Fn(&Cost) -> u64 + Send + Sync + 'static) -> Self {
        self.set(|settings| settings.price = Some(Arc::new(price)))
    }

    /// Sets how many keys the schedule may know at a time: those with calls that wait or run, and those whose limits are not
    /// full. A call with a new key beyond that fails with [`TooManyKeys`](crate::error::TooManyKeys). Default: 1,000,000.
    #[must_use]
    pub fn max_keys(self, max: usize) -> Self {
        self.set(|settings| settings.max_keys = Some(max))
    }

    /// Names the limit that a call takes a permit of when it is chosen. An executor sets its own. Without one, calls are
    /// chosen without a permit, and wait for it below the queue.
    #[must_use]
    pub fn concurrency(self, limit: Concurrency) -> Self {
        self.set(|settings| settings.concurrency = Some(limit))
    }

    /// Names the limiter that a call is charged by when it is chosen. An executor sets its own. Without one, calls are
    /// charged only to the limits of their keys when they are chosen.
    #[must_use]
    pub fn limiter(self, limiter: RateLimiter) -> Self {
        self.set(|settings| settings.limiter = Some(limiter))
    }

    /// Returns the same schedule with the limits of an executor, which count while a queue [uses](Self::set_queue) it.
    pub(crate) fn with_root(&self, concurrency: &Concurrency, limiter: &RateLimiter) -> Self {
        let mut settings = self.settings.clone();
        settings.concurrency = Some(concurrency.clone());
        settings.limiter = Some(limiter.clone());
        Self {
            prices: settings.root().prices,
            settings,
            shared: self.shared.clone(),
        }
    }

    /// Makes `queue` the one whose calls are scheduled. Returns whether there is no other one.
    pub(crate) fn set_queue(&self, queue: Weak<dyn Scheduled>) -> bool {
        self.shared.set_queue(queue, self.settings.root())
    }

    pub(crate) fn dispatcher(&self) -> Dispatcher {
        Dispatcher::new(self.shared.clone(), self.settings.root())
    }

    /// # Errors
    ///
    /// [`InvalidConfig`] if there are too many levels or classes.
    pub(crate) fn check(&self) -> Result<(), InvalidConfig> {
        let Settings { levels, classes, .. } = &self.settings;
        InvalidConfig::positive_up_to(tree::MAX_LEVELS, "levels", levels.len().max(1))?;
        InvalidConfig::positive_up_to(MAX_CLASSES, "classes", classes.len().max(1))?;
        Ok(())
    }

    /// Sets the weight of a key, for what is charged from now on. `keys` are those from the outermost level to the one whose
    /// weight is set. It stays set while the key has no calls.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`] if the weight is 0, or the schedule has no such level.
    pub fn set_weight(&self, keys: impl Into<Flow>, weight: u32) -> Result<(), InvalidConfig> {
        let weight = NonZeroU32::new(weight).ok_or_else(|| InvalidConfig::new("weight", "must be positive"))?;
        let flow = keys.into();
        let path = self.node(&flow)?;
        let ((), effects) = self.shared.change(|core, now| core.set_weight(path, weight, now));
        self.shared.carry_out(effects);
        Ok(())
    }

    /// Replaces the limits of a key, also for calls that wait already. It stays set while the key has no calls.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`] if the limits are invalid or begin with less than their burst, or the schedule has no such level.
    /// Nothing is changed then.
    pub fn set_limits(&self, keys: impl Into<Flow>, limits: &Limits) -> Result<(), InvalidConfig> {
        let flow = keys.into();
        let path = self.node(&flow)?;
        let (set, effects) = self.shared.change(|core, now| core.set_limits(path, limits, now));
        self.shared.carry_out(effects);
        set
    }

    /// Changes the slack of a class, for calls that come from now on. Inside its class, no call goes before an earlier one.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`] if the schedule has no such class.
    pub fn set_slack(&self, class: &str, slack: Duration) -> Result<(), InvalidConfig> {
        let known = self.settings.classes.iter().find(|known| &*known.name == class);
        let known = known.ok_or_else(|| InvalidConfig::new("class", "must be one of the schedule"))?;
        known.slack.store(nanos(slack), Ordering::Relaxed);
        Ok(())
    }

    /// Lets no call of a key begin until `until`. Calls that run are not changed. An instant that has passed ends the pause.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`] if the schedule has no such level.
    pub fn pause(&self, keys: impl Into<Flow>, until: Instant) -> Result<(), InvalidConfig> {
        self.set_pause(&keys.into(), Some(until))
    }

    /// Ends the pause of a key.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`] if the schedule has no such level.
    pub fn resume(&self, keys: impl Into<Flow>) -> Result<(), InvalidConfig> {
        self.set_pause(&keys.into(), None)
    }

    fn set_pause(&self, flow: &Flow, until: Option<Instant>) -> Result<(), InvalidConfig> {
        let path = self.node(flow)?;
        let ((), effects) = self.shared.change(|core, now| core.pause(path, until, now));
        self.shared.carry_out(effects);
        Ok(())
    }

    /// Returns the flows that wait or have calls that are not settled, those with the most waiting calls first, and at most
    /// `most` of them.
    #[must_use]
    pub fn flows(&self, most: usize) -> Vec<FlowStatus> {
        let flows = self.shared.inspect(|core, now| core.view(most, now));
        // Flows are also kept for the limits of their keys, and for what they owe. They come last.
        let flows = flows.into_iter().filter(|flow| flow.waiting + flow.open > 0);
        let level = |depth: usize| self.settings.levels.get(depth).map(|level| level.name().clone());
        let status = |flow: tree::FlowView<FlowKey>| FlowStatus {
            keys: flow.path,
            waiting: flow.waiting,
            open: flow.open,
            weight: flow.weight,
            lag: self::core::seconds(flow.lag),
            blocked_until: flow.blocked_until,
            blocked_by: flow.blocked_at.and_then(level),
        };
        flows.map(status).collect()
    }

    /// Returns how many calls wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.shared.waiting()
    }

    /// Returns how many calls of a key wait. `keys` are those from the outermost level to that of the key.
    #[must_use]
    pub fn waiting_of(&self, keys: impl Into<Flow>) -> usize {
        let flow = keys.into();
        self.shared.inspect(|core, _| core.waiting_of(flow.keys()))
    }

    /// Returns the keys of a node, of which the schedule has the levels.
    fn node<'a>(&self, flow: &'a Flow) -> Result<&'a [FlowKey], InvalidConfig> {
        InvalidConfig::positive_up_to(self.settings.levels.len(), "keys", flow.keys().len())?;
        Ok(flow.keys())
    }

    /// Whether a queue uses the schedule.
    pub(crate) fn is_used(&self) -> bool {
        self.shared.is_used()
    }

    /// Returns the permits that a chosen call takes one of.
    pub(crate) fn permits(&self) -> Option<&Semaphore> {
        self.settings.concurrency.as_ref().map(Concurrency::permits)
    }

    pub(crate) const fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Returns what the schedule has to know about a call.
    pub(crate) fn call(&self, flow: &Flow, cost: Cost) -> Arc<ScheduledCall> {
        let class = self.class_of(flow.class_name());
        let slack = self.settings.classes.get(class);
        let slack = slack.map_or(0, |class| class.slack.load(Ordering::Relaxed));
        let arrival = self.shared.nanos(clock::now());
        let class = u8::try_from(class).unwrap_or(u8::MAX);
        let (units, due) = (self.prices.units(&cost), arrival.saturating_add(slack));
        ScheduledCall::new(&self.shared, self.path_of(flow), class, &cost, units, due)
    }

    pub(crate) fn path_of(&self, flow: &Flow) -> Arc<[FlowKey]> {
        // Most calls name all keys of their flow or none, and share them.
        let unnamed = self.shared.unnamed();
        match flow.keys() {
            [] => unnamed.clone(),
            keys if keys.len() == unnamed.len() => flow.shared_keys().clone(),
            keys => {
                let missing = unnamed.iter().skip(keys.len());
                keys.iter().take(unnamed.len()).chain(missing).cloned().collect()
            }
        }
    }

    fn class_of(&self, name: Option<&str>) -> usize {
        let Some(name) = name else { return 0 };
        let classes = &self.settings.classes;
        let known = classes.iter().position(|class| &*class.name == name);
        known.unwrap_or_else(|| classes.len().saturating_sub(1))
    }

    /// Returns the summed costs of the calls that wait and that a new call cannot go before: those of its own flow that are
    /// due before it.
    pub(crate) fn demand_ahead(&self, call: &ScheduledCall) -> Demand {
        self.shared.inspect(|core, _| core.demand_ahead(call))
    }
}

// === impl Settings ===

impl Settings {
    fn root(&self) -> Root {
        let prices = match (&self.price, &self.limiter) {
            (Some(price), _) => Prices::Function(price.clone()),
            (None, Some(limiter)) => Prices::of_limits(&limiter.limits()),
            (None, None) => Prices::of_limits(&Limits::new()),
        };
        Root {
            permits: self.concurrency.as_ref().map(|limit| limit.permits().clone()),
            limiter: self.limiter.clone(),
            prices: Arc::new(prices),
        }
    }
}

impl Default for Schedule {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Schedule")
            .field("levels", &self.settings.levels)
            .field("waiting", &self.waiting())
            .finish_non_exhaustive()
    }
}
