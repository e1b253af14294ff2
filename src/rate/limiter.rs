//! [`RateLimiter`]: the rate limiter as its users see it, whether its buckets are in this process or shared by several.

#[cfg(feature = "http")]
use super::followed::{FollowedLevel, Report};
#[cfg(feature = "redis")]
use super::redis::{SharedLimiter, StoreStatus};
use super::{
    admission::Admission, available::Available, budget::Budget, bursts::Bursts, cost::Cost, demand::Demand,
    estimate::Estimate, limits::Limits, local::LocalLimiter, pause::Pause, saved::SavedLimits,
};
#[cfg(feature = "redis")]
use crate::error::StoreUnavailable;
use crate::{
    coop,
    error::{AcquireError, CostExceedsBurst, InvalidConfig},
};
use std::{
    fmt,
    future::{Future, poll_fn},
    sync::Arc,
    task::{Poll, ready},
    time::{Duration, SystemTime},
};
use tokio::time::Instant;

/// A rate limiter of requests, tokens and other things that a provider counts. Clones share the buckets and the limits.
///
/// Its buckets are in this process, or on a Redis or Valkey server, where several processes share them: see
/// [`rate::redis`](super::redis) (feature `redis`). Layers and executors work the same with both. Where a shared limiter
/// differs, the methods say so.
///
/// A call gets its whole cost at one instant, or waits and takes nothing. Calls are admitted in the order in which they
/// began to wait, whatever they cost: no call overtakes another. There is one exception: a waiter whose turn has come
/// and that is not polled within 5 ms is skipped. The skipped waiter keeps its place, and is admitted before all later
/// calls when it is polled again. Such waiters do not add up: the next 8 waiters are woken at once then, and the next 64
/// if none of these is polled within 5 ms, and the one that is polled first is the first in the queue.
///
/// A call that need not wait counts as one unit of the cooperative budget of its [Tokio task](tokio::task::coop).
///
/// In any time window of length T, at most `burst + rate x T` is admitted, plus at most `rate x 5 ms` by [catching
/// up](Self#catching-up).
///
/// # Catching up
///
/// A timer is coarse (a millisecond in Tokio), and a woken task may run late. So a waiter is admitted as of the instant
/// at which its cost became available, not as of the instant at which it runs: lateness costs no throughput, even at
/// 20,000 requests a second with a burst of 1. No more than 5 ms are caught up, so a window may admit up to `rate x 5
/// ms` more.
///
/// # Examples
///
/// ```
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use tower_outbound::{Cost, Limits, Rate, RateLimiter};
///
/// let limiter = RateLimiter::new(
///     Limits::new().requests(Rate::per_second(10).burst(1)).tokens(Rate::per_minute(6_000)),
/// )?;
///
/// limiter.acquire(Cost::tokens(500)).await?;          // takes one request and 500 tokens at once
/// limiter.acquire(Cost::tokens(500)).await?;          // takes one request and 500 tokens 100 ms later
///
/// let later = limiter.try_acquire(Cost::tokens(500)).unwrap_err();
/// assert_eq!(later.retry_after(), Some(std::time::Duration::from_millis(100)));
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct RateLimiter {
    kind: Kind,
}

/// Where the buckets of a limiter are.
#[derive(Clone)]
enum Kind {
    Local(LocalLimiter),
    #[cfg(feature = "redis")]
    Shared(SharedLimiter),
}

/// Evaluates an expression with the local or the shared limiter. The two types have methods of the same names, but no
/// common trait.
macro_rules! either {
    ($limiter:expr, $inner:ident => $call:expr) => {
        match &$limiter.kind {
            Kind::Local($inner) => $call,
            #[cfg(feature = "redis")]
            Kind::Shared($inner) => $call,
        }
    };
}

// === impl RateLimiter ===

impl RateLimiter {
    /// Creates a rate limiter whose buckets are in this process. With limits without any rate, it admits every call.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`] names the invalid field: an amount or a period of 0, a number that is negative or not finite,
    /// a period above 292 years, a burst below 1, an initial fill above the burst, numbers too large to be counted
    /// exactly, the name of a budget that is not valid, or more than four budgets that are not built in.
    pub fn new(limits: Limits) -> Result<Self, InvalidConfig> {
        Self::at(limits, SystemTime::now())
    }

    /// Does what [`new`](Self::new) does, when the wall clock shows `now`. Only rates by the calendar, such as
    /// [`Rate::utc_day`](super::Rate::utc_day), depend on it. For tests, and where the system's clock is wrong.
    ///
    /// # Errors
    ///
    /// Returns an error in the same cases as [`new`](Self::new).
    pub fn at(limits: Limits, now: SystemTime) -> Result<Self, InvalidConfig> {
        Ok(Self {
            kind: Kind::Local(LocalLimiter::new(limits, now)?),
        })
    }

    #[cfg(feature = "redis")]
    pub(super) const fn shared(shared: SharedLimiter) -> Self {
        Self {
            kind: Kind::Shared(shared),
        }
    }

    /// Waits until every bucket of the limiter holds `cost`, and takes it from all of them at one instant.
    ///
    /// # Errors
    ///
    /// - [`AcquireError::CostExceedsBurst`], at once, if a bucket can never hold as much as the cost. A call that waits
    ///   already gets this error when [`set_limits`](Self::set_limits) lowers a burst below its cost.
    /// - [`AcquireError::Exhausted`], at once or when the call's turn has come, if a rate that
    ///   [refuses](super::Rate::refuse) calls does not hold the cost.
    /// - [`AcquireError::StoreUnavailable`] if several processes share the limits, their store is lost, and the limiter
    ///   admits no call without it.
    ///
    /// # Panics
    ///
    /// If the call has to wait outside a Tokio runtime with its timer enabled. A shared limiter panics outside a Tokio
    /// runtime with its timer and its I/O enabled.
    ///
    /// # Cancel safety
    ///
    /// A future that is dropped while it waits for the limiter loses its place in the queue and has taken nothing. A
    /// shared limiter gives back what it has reserved for the call, except for what would let other calls exceed the
    /// limits. The future enters the queue at its first poll.
    #[inline]
    pub fn acquire(&self, cost: Cost) -> impl Future<Output = Result<(), AcquireError>> + Send + use<> {
        let mut admission = self.admission(cost, false);
        poll_fn(move |cx| coop::poll_counted(cx, |cx| admission.poll_acquire(cx)))
    }

    /// Like [`acquire`](Self::acquire), for a cost that is an estimate. [`Estimate::settle`] corrects the charge later.
    ///
    /// # Errors
    ///
    /// Returns an error in the same cases as [`acquire`](Self::acquire).
    ///
    /// # Panics
    ///
    /// Panics in the same cases as [`acquire`](Self::acquire).
    ///
    /// # Cancel safety
    ///
    /// Dropping the future has the same effect as for [`acquire`](Self::acquire).
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use tower_outbound::{Cost, Limits, Rate, RateLimiter};
    ///
    /// let limiter = RateLimiter::new(Limits::new().tokens(Rate::per_minute(1_000)))?;
    /// let estimate = limiter.acquire_estimate(Cost::tokens(800)).await?;
    /// // The response reports that 300 tokens were used.
    /// estimate.settle(Cost::tokens(300));
    /// assert_eq!(limiter.available().tokens, Some(700));
    /// # Ok(())
    /// # }
    /// ```
    pub fn acquire_estimate(&self, cost: Cost) -> impl Future<Output = Result<Estimate, AcquireError>> + Send + use<> {
        let mut admission = self.admission(cost, true);
        poll_fn(move |cx| {
            ready!(coop::poll_counted(cx, |cx| admission.poll_acquire(cx)))?;
            Poll::Ready(Ok(admission.estimate().expect("the admission is of an estimate")))
        })
    }

    /// Waits until it is the turn of a call and every bucket holds `cost`, and takes nothing. A caller that then does
    /// something else first, such as asking a service to be ready, takes the cost with
    /// [`try_acquire`](Self::try_acquire), which may fail if another call was faster.
    ///
    /// A shared limiter takes the cost for a moment and gives it back, except for what would let other calls exceed the
    /// limits: it cannot wait for its turn without a reservation.
    ///
    /// # Errors
    ///
    /// Returns an error in the same cases as [`acquire`](Self::acquire).
    ///
    /// # Panics
    ///
    /// Panics in the same cases as [`acquire`](Self::acquire).
    ///
    /// # Cancel safety
    ///
    /// Dropping the future has the same effect as for [`acquire`](Self::acquire).
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use tower_outbound::{Cost, Limits, Rate, RateLimiter};
    ///
    /// let limiter = RateLimiter::new(Limits::new().requests(Rate::per_second(1)))?;
    /// limiter.acquire(Cost::request()).await?;
    /// limiter.ready(Cost::request()).await?;             // a second later
    /// assert_eq!(limiter.available().requests, Some(1));
    /// # Ok(())
    /// # }
    /// ```
    pub async fn ready(&self, cost: Cost) -> Result<(), AcquireError> {
        let mut admission = self.admission(cost, true);
        poll_fn(|cx| coop::poll_counted(cx, |cx| admission.poll_turn(Instant::now(), cx))).await?;
        #[cfg(feature = "redis")]
        if let Admission::Charged {
            estimate: Some(estimate),
            ..
        } = admission
        {
            estimate.settle(Cost::none());
        }
        Ok(())
    }

    /// Takes `cost` if it is available now and no other call waits.
    ///
    /// # Errors
    ///
    /// - [`AcquireError::NotYet`] with the time to retry after.
    /// - [`AcquireError::CostExceedsBurst`] if a retry cannot succeed under the current limits.
    /// - [`AcquireError::NeedsStore`], always, if several processes share the limits: only their store knows what is
    ///   available, and to ask it takes a round trip. Use [`acquire`](Self::acquire) with a timeout instead.
    ///
    /// Nothing is taken in any of these cases.
    #[inline]
    pub fn try_acquire(&self, cost: Cost) -> Result<(), AcquireError> {
        match &self.kind {
            Kind::Local(local) => local.try_acquire(cost),
            #[cfg(feature = "redis")]
            Kind::Shared(shared) => Err(shared.cannot_try(cost)),
        }
    }

    /// Like [`try_acquire`](Self::try_acquire), for a cost that is an estimate. [`Estimate::settle`] corrects the charge
    /// later.
    ///
    /// # Errors
    ///
    /// Returns an error in the same cases as [`try_acquire`](Self::try_acquire).
    pub fn try_acquire_estimate(&self, cost: Cost) -> Result<Estimate, AcquireError> {
        match &self.kind {
            Kind::Local(local) => Ok(Estimate::local(cost, local.try_acquire_estimate(cost)?)),
            #[cfg(feature = "redis")]
            Kind::Shared(shared) => Err(shared.cannot_try(cost)),
        }
    }

    /// Charges an estimate if that is possible at once, and `also` returns that it has taken what is wanted together with it.
    /// `None` if the call has to wait, is never admitted, or the limiter is shared. `also` is called under the lock, and only
    /// when the cost is available. Nothing else runs user code or wakes anybody.
    pub(crate) fn try_charge(&self, cost: &Cost, now: Instant, also: impl FnOnce() -> bool) -> Option<Estimate> {
        match &self.kind {
            Kind::Local(local) => Some(Estimate::local(*cost, local.try_charge(*cost, now, also)?)),
            #[cfg(feature = "redis")]
            Kind::Shared(_) => None,
        }
    }

    /// Returns how long a call of this cost that comes now would probably wait, behind all calls that wait already.
    /// Zero if it would be admitted at once. For a cost that no bucket can hold, the time until the buckets would have
    /// added as much.
    ///
    /// Where charges are estimates, calls are expected to use what the last ones have used of their estimates. Before
    /// the first settlement, the requests of the waiting calls count in full, and nothing else of them does. A shared
    /// limiter computes the time from the store's last reply.
    #[must_use]
    pub fn wait_for(&self, cost: Cost) -> Duration {
        self.wait(&cost, &Demand::default())
    }

    /// Does what [`wait_for`](Self::wait_for) does, for a call behind `ahead`, too: the summed costs of the calls that
    /// will join the limiter's queue before it.
    pub(crate) fn wait(&self, cost: &Cost, ahead: &Demand) -> Duration {
        either!(self, limiter => limiter.wait(cost, ahead))
    }

    /// Returns what the buckets of the limiter hold now. A new call gets it only after the calls that wait already.
    ///
    /// Of a shared limiter: what its store has last reported. What the rates have added since then is not counted.
    #[must_use]
    pub fn available(&self) -> Available {
        either!(self, limiter => limiter.available())
    }

    /// Returns an error if `cost` exceeds the burst of a bucket. Takes nothing from the buckets.
    ///
    /// # Errors
    ///
    /// [`CostExceedsBurst`] if a bucket can never hold as much as the cost.
    pub fn check(&self, cost: Cost) -> Result<(), CostExceedsBurst> {
        self.bursts().check(&cost)
    }

    /// Returns the current limits of this limiter. Of a shared limiter: those that this process has last set, or has
    /// last received from the store.
    #[must_use]
    pub fn limits(&self) -> Limits {
        either!(self, limiter => limiter.limits())
    }

    /// Replaces the limits of this limiter. The new limits apply at once, also to the calls that wait already.
    ///
    /// A bucket keeps its debt and what it holds, up to the new burst: a rate takes over the bucket of the old rate with
    /// the same budget and period, whatever the order of the rates. If there is none, it takes over the bucket of the
    /// first old rate of its budget that is left over. If none is left over, it starts with its initial fill.
    ///
    /// The limits of a shared limiter are replaced for all processes. The others receive them with the store's next
    /// reply.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`], in the same cases as [`new`](Self::new), and, if the limiter is shared, limits
    /// that its store cannot count exactly. The limits are unchanged then.
    pub fn set_limits(&self, limits: Limits) -> Result<(), InvalidConfig> {
        either!(self, limiter => limiter.set_limits(limits))
    }

    /// Returns what the buckets hold, to be [restored](Self::restore) later, for example by the next run of a program.
    /// Estimates that are not settled count as used.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`] for a shared limiter: its store keeps what the buckets hold.
    pub fn save(&self) -> Result<SavedLimits, InvalidConfig> {
        match &self.kind {
            Kind::Local(local) => Ok(local.save()),
            #[cfg(feature = "redis")]
            Kind::Shared(_) => Err(kept_by_store()),
        }
    }

    /// Sets what each bucket holds to what it held when it was saved, and what its rate has added since by the wall
    /// clock, at most a full bucket. A bucket by the calendar whose window has ended since is not changed. The rates are
    /// found by budget and period; one that was not saved keeps what it holds. The change applies at once, also to the
    /// calls that wait already. What was charged before is forgotten, so restore before the first call.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`] if `saved` is of another version or has no rate of this limiter, and for a shared limiter.
    /// Nothing is changed then.
    pub fn restore(&self, saved: &SavedLimits) -> Result<(), InvalidConfig> {
        match &self.kind {
            Kind::Local(local) => local.restore(saved),
            #[cfg(feature = "redis")]
            Kind::Shared(_) => Err(kept_by_store()),
        }
    }

    /// Lowers what the bucket of one rate holds to `remaining`, for example to the amount that the provider reports.
    /// Never raises what the bucket holds. The change applies at once, also to the calls that wait already.
    ///
    /// The rate is the first one with this budget and period. Without a period, it is the only rate of the budget. The
    /// method does nothing if there is no such rate, or if there are several rates and no period is given.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use tower_outbound::{Limits, Rate, RateLimiter, rate::Budget};
    /// let limits = Limits::new().tokens(Rate::per_minute(30_000)).tokens(Rate::per_day(1_000_000));
    /// let limiter = RateLimiter::new(limits)?;
    /// limiter.lower(Budget::Tokens, Some(Duration::from_secs(60)), 12_000);
    /// limiter.lower(Budget::Tokens, Some(Duration::from_secs(60)), 29_000);
    /// assert_eq!(limiter.available().tokens, Some(12_000));
    /// # Ok::<_, tower_outbound::error::InvalidConfig>(())
    /// ```
    pub fn lower(&self, budget: impl Into<Budget>, period: Option<Duration>, remaining: u64) {
        either!(self, limiter => limiter.lower(budget.into(), period, remaining));
    }

    /// Replaces the amount per period of one rate, for example with the limit that the provider reports. A burst or
    /// initial fill above the new amount is lowered to it. Returns whether the limits have changed.
    ///
    /// The rate is identified by its budget and period, as in [`lower`](Self::lower). The method returns `false` if
    /// there is no such rate, or if the rate has this amount already.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`] for an amount that [`new`](Self::new) would reject, such as 0. The limits are unchanged then.
    pub fn adopt(
        &self,
        budget: impl Into<Budget>,
        period: Option<Duration>,
        amount: u64,
    ) -> Result<bool, InvalidConfig> {
        either!(self, limiter => limiter.adopt(budget.into(), period, amount))
    }

    /// Records that a call is sent now, for a later [`lower_since`](Self::lower_since).
    #[cfg(feature = "http")]
    pub(crate) fn mark_sent(&self) {
        match &self.kind {
            Kind::Local(local) => local.mark_sent(),
            #[cfg(feature = "redis")]
            Kind::Shared(_) => {}
        }
    }

    /// Lowers what the bucket of one rate holds to what is left now of `remaining`, which the provider held when it
    /// received a call that was sent at `sent`.
    #[cfg(feature = "http")]
    pub(crate) fn lower_since(&self, budget: Budget, period: Option<Duration>, remaining: u64, sent: Instant) {
        either!(self, limiter => limiter.lower_since(budget, period, remaining, sent));
    }

    /// Makes the buckets follow those of a provider, up to `most`. A shared limiter is lowered to what the provider
    /// reports, and never raised.
    #[cfg(feature = "http")]
    pub(crate) fn follow(&self, most: &Limits, is_start: bool) {
        match &self.kind {
            Kind::Local(local) => local.follow(most, is_start),
            #[cfg(feature = "redis")]
            Kind::Shared(_) => {}
        }
    }

    /// Records that a call is sent now, and returns the stamp of the record, for a later [`report`](Self::report).
    #[cfg(feature = "http")]
    pub(crate) fn stamp_sent(&self) -> u64 {
        match &self.kind {
            Kind::Local(local) => local.stamp_sent(),
            #[cfg(feature = "redis")]
            Kind::Shared(_) => 0,
        }
    }

    /// Tells a limiter that follows a provider that the first response is there.
    #[cfg(feature = "http")]
    pub(crate) fn end_start(&self) {
        match &self.kind {
            Kind::Local(local) => local.end_start(),
            #[cfg(feature = "redis")]
            Kind::Shared(_) => {}
        }
    }

    /// Applies what the provider has reported about the rate at `index`, which has this budget and period, with the
    /// response to a call that was sent at `sent`.
    #[cfg(feature = "http")]
    pub(crate) fn report(&self, index: usize, (budget, period): (Budget, Duration), report: &Report, sent: Instant) {
        match &self.kind {
            Kind::Local(local) => {
                let _ = (budget, period, sent);
                local.report(index, report);
            }
            #[cfg(feature = "redis")]
            Kind::Shared(shared) => shared.lower_since(budget, Some(period), report.remaining, sent),
        }
    }

    /// Returns what is known about the provider's buckets, in the order of the limits. Empty for a shared limiter.
    #[cfg(feature = "http")]
    pub(crate) fn followed_levels(&self) -> Vec<FollowedLevel> {
        match &self.kind {
            Kind::Local(local) => local.followed_levels(),
            #[cfg(feature = "redis")]
            Kind::Shared(_) => Vec::new(),
        }
    }

    /// Admits no call for the duration `pause` from now on. Replaces the pause that was set by an earlier call of this
    /// method or of [`pause_until`](Self::pause_until), so a shorter pause ends earlier, and a pause of zero ends at
    /// once. A pause of the provider is not changed: see [`resume`](Self::resume). A pause does not end by itself if its
    /// end is too far away for an [`Instant`].
    ///
    /// The pause of a shared limiter holds all processes, as soon as the server has announced it to them. Reservations
    /// that fall into it are given back, and made again after it.
    pub fn pause_for(&self, pause: Duration) {
        either!(self, limiter => limiter.pause_for(pause));
    }

    /// Admits no call until `until`. Replaces an earlier pause as [`pause_for`](Self::pause_for) does: an instant that
    /// has passed ends it.
    pub fn pause_until(&self, until: Instant) {
        either!(self, limiter => limiter.pause_until(until));
    }

    /// Admits no call for the duration `pause`, at the request of the provider. Only extends the provider's earlier
    /// pause: its responses may arrive in another order than they were sent. Returns whether this has begun a pause.
    #[cfg(feature = "http")]
    pub(crate) fn pause_for_provider(&self, pause: Duration) -> bool {
        either!(self, limiter => limiter.pause_for_provider(pause))
    }

    /// Ends all pauses now, also a pause of the provider. Waiting calls go on at once, as far as the limits allow.
    pub fn resume(&self) {
        either!(self, limiter => limiter.resume());
    }

    /// Returns the current pause, with its end and with who has begun it. If there are several, returns the one that
    /// ends last. `None` if the limiter is not paused.
    #[must_use]
    pub fn paused(&self) -> Option<Pause> {
        either!(self, limiter => limiter.paused())
    }

    /// Raises each bucket that is in debt to 0, so that calls are admitted again as soon as the rates have added their
    /// cost. What a bucket holds stays. For a debt that is wrong, such as that of a usage that was reported wrongly.
    ///
    /// How large a debt can become is set by [`Rate::max_debt`](super::Rate::max_debt).
    /// For a shared limiter, all this takes effect with the next round trip to its store.
    pub fn forgive_debts(&self) {
        either!(self, limiter => limiter.forgive_debts());
    }

    /// Replaces a charged estimate by what the call really `used`: refunds what was not used, or debits what was used
    /// in addition. The correction applies at once, also to the calls that wait already. This method is the same as
    /// [`Estimate::settle`].
    ///
    /// A debit may leave a bucket in debt, which must be filled before the bucket admits another call. The debt is
    /// [bounded](super::Rate::max_debt), and can be [forgiven](Self::forgive_debts). A refund never lets more than
    /// `burst + rate x T` of true usage through in a window of length T: what would have overflowed in the meantime, had
    /// the true cost been charged from the start, is not refunded.
    pub fn settle(&self, estimate: Estimate, used: Cost) {
        estimate.settle(used);
    }

    /// Returns the state of the Redis or Valkey server that holds the buckets, as this process sees it. `None` if the
    /// buckets are in this process.
    #[cfg(feature = "redis")]
    #[cfg_attr(docsrs, doc(cfg(feature = "redis")))]
    #[must_use]
    pub fn store_status(&self) -> Option<StoreStatus> {
        match &self.kind {
            Kind::Local(_) => None,
            Kind::Shared(shared) => Some(shared.store_status()),
        }
    }

    /// Connects to the server that holds the buckets, and runs the script of the shared limits there once, without
    /// reserving anything. Use it when a program starts: a limiter connects with its first call otherwise, and a URL or a
    /// password that can never work looks like a server that is away. Does nothing if the buckets are in this process.
    ///
    /// # Errors
    ///
    /// [`StoreUnavailable`] with the [problem](StoreUnavailable::problem), as soon as there is one, and after 15 s at the
    /// latest.
    ///
    /// # Panics
    ///
    /// If the limits are shared, panics outside a Tokio runtime with its timer and its I/O enabled.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future ends the check. Nothing has to be undone.
    #[cfg(feature = "redis")]
    #[cfg_attr(docsrs, doc(cfg(feature = "redis")))]
    pub async fn check_store(&self) -> Result<(), StoreUnavailable> {
        match &self.kind {
            Kind::Local(_) => Ok(()),
            Kind::Shared(shared) => shared.check_store().await,
        }
    }

    /// Declares that costs will be charged as estimates, so that [`wait_for`](Self::wait_for) knows it before the first
    /// one.
    pub(crate) fn expect_estimates(&self) {
        either!(self, limiter => limiter.expect_estimates());
    }

    /// Returns the largest cost, per budget, that one call may have. The shared value is updated whenever the limits
    /// change.
    pub(crate) fn bursts(&self) -> Arc<Bursts> {
        either!(self, limiter => limiter.bursts())
    }

    /// Returns whether `self` and `other` are handles to the same limiter.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        match (&self.kind, &other.kind) {
            (Kind::Local(local), Kind::Local(other)) => local.is_same(other),
            #[cfg(feature = "redis")]
            (Kind::Shared(shared), Kind::Shared(other)) => shared.is_same(other),
            #[cfg(feature = "redis")]
            _ => false,
        }
    }

    /// Whether the limits are shared with other processes.
    pub(crate) const fn is_shared(&self) -> bool {
        match &self.kind {
            Kind::Local(_) => false,
            #[cfg(feature = "redis")]
            Kind::Shared(_) => true,
        }
    }

    /// Returns how long a charge takes at least because of the distance of the store; zero before it is known.
    pub(crate) fn round_trip(&self) -> Duration {
        match &self.kind {
            Kind::Local(_) => Duration::ZERO,
            #[cfg(feature = "redis")]
            Kind::Shared(shared) => shared.store_status().latency,
        }
    }

    /// Returns how much of each budget can be charged within `time` from now, as far as is known.
    pub(crate) fn available_in(&self, time: Duration) -> Vec<(Budget, u64)> {
        let available = self.available();
        let limits = self.limits();
        let in_time = limits.rates().map(|(budget, rate)| {
            let added = rate.amount() * time.as_secs_f64() / rate.period().as_secs_f64();
            // The cast cuts off at the bounds.
            (budget, available.of(budget).unwrap_or(0).saturating_add(added as u64))
        });
        in_time.collect()
    }

    /// Returns the admission of the call that a schedule chooses next, whose cost is corrected later.
    pub(crate) fn schedule_admission(&self, cost: Cost) -> Admission {
        match &self.kind {
            Kind::Local(local) => Admission::Local(local.schedule_admission(cost)),
            #[cfg(feature = "redis")]
            Kind::Shared(shared) => Admission::Shared {
                admission: Box::new(shared.schedule_admission()),
                cost,
            },
        }
    }

    /// Returns the admission of a call that costs `cost`, which is corrected later if it `is_estimate`.
    #[inline]
    pub(crate) fn admission(&self, cost: Cost, is_estimate: bool) -> Admission {
        match &self.kind {
            Kind::Local(local) => Admission::Local(local.admission(cost, is_estimate)),
            #[cfg(feature = "redis")]
            Kind::Shared(shared) => Admission::Shared {
                admission: Box::new(shared.admission(is_estimate)),
                cost,
            },
        }
    }
}

#[cfg(feature = "redis")]
fn kept_by_store() -> InvalidConfig {
    InvalidConfig::new(
        "limiter",
        "must not be shared to be saved or restored: its store keeps what the buckets hold",
    )
}

impl fmt::Debug for RateLimiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RateLimiter")
            .field("available", &self.available())
            .finish_non_exhaustive()
    }
}
