//! [`RateLimiter`]: the rate limiter whose buckets are in this process. Its callers wait in order of arrival.

use super::{
    buckets::{Available, Buckets, Bursts, ChargeRequest},
    estimate::{Estimate, Settle, warn_of_cut_off},
    limits::{Budget, Cost, Demand, Limits},
    pause::{Pause, PauseChange, PauseSource},
};
use crate::{
    clock::LazyNow,
    coop,
    error::{CostExceedsBurst, InvalidConfig},
    wait_queue::{WaitQueue, Waiter},
};
use std::{
    fmt,
    future::poll_fn,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll},
    time::Duration,
};
use tokio::time::Instant;

/// The time to retry after that `try_acquire` returns if the buckets hold the cost of the call, but earlier calls still
/// wait that are about to be admitted.
const RETRY_SOON: Duration = Duration::from_millis(1);

/// A rate limiter of requests and tokens, for the tasks of one process. Clones share the buckets and the limits.
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
    queue: WaitQueue<Buckets>,
}

/// The reason why [`try_acquire`](RateLimiter::try_acquire) took nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TryAcquireError {
    /// The cost is not available yet. It is available after this time, if no call that comes later takes it before. The
    /// calls that wait already are taken into account. The time is never zero.
    NotYet(Duration),
    /// The cost exceeds the burst of a bucket: it will never be available under the current limits.
    CostExceedsBurst(CostExceedsBurst),
}

/// An estimate that a [`RateLimiter`] has charged.
struct LocalCharge {
    limiter: RateLimiter,
    /// The version of the limits under which the estimate was charged.
    limits_version: u64,
}

/// One call that waits for its admission by a [`RateLimiter`]. Not a `Future`, because its methods also take the time.
#[derive(Debug)]
pub(super) struct LocalAdmission {
    waiter: Waiter<Buckets>,
    /// What the call is charged. If the cost is an estimate, the version of the limits is there once it was charged.
    request: ChargeRequest,
}

// === impl RateLimiter ===

impl RateLimiter {
    /// Creates a rate limiter. With limits without any rate, it admits every call.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`] names the invalid field: an amount or a period of 0, a number that is negative or not finite,
    /// a period above 292 years, a burst below 1, an initial fill above the burst, or numbers too large to be counted
    /// exactly.
    pub fn new(limits: Limits) -> Result<Self, InvalidConfig> {
        Ok(Self {
            queue: WaitQueue::new(Buckets::new(limits)?),
        })
    }

    /// Waits until every bucket of the limiter holds `cost`, and takes it from all of them at one instant.
    ///
    /// # Errors
    ///
    /// [`CostExceedsBurst`], at once, if a bucket can never hold as much as the cost. A call that waits already gets
    /// this error when [`set_limits`](Self::set_limits) lowers a burst below its cost.
    ///
    /// # Panics
    ///
    /// If the call has to wait outside a Tokio runtime with its timer enabled.
    ///
    /// # Cancel safety
    ///
    /// A future that is dropped while it waits for the limiter loses its place in the queue and has taken nothing. The
    /// future enters the queue at its first poll.
    pub async fn acquire(&self, cost: Cost) -> Result<(), CostExceedsBurst> {
        let mut waiter = self.queue.waiter();
        let request = ChargeRequest {
            cost,
            limits_version: None,
        };
        poll_fn(|cx| coop::poll_counted(cx, |cx| waiter.poll_acquire(&request, cx, None))).await
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
    pub async fn acquire_estimate(&self, cost: Cost) -> Result<Estimate, CostExceedsBurst> {
        let mut admission = self.admission(cost, true);
        poll_fn(|cx| coop::poll_counted(cx, |cx| admission.poll(cx))).await?;
        Ok(admission.estimate().expect("the admission is of an estimate"))
    }

    /// Takes `cost` if it is available now and no other call waits.
    ///
    /// # Errors
    ///
    /// [`TryAcquireError::NotYet`] with the time to retry after, or [`TryAcquireError::CostExceedsBurst`] if a retry
    /// cannot succeed. Nothing is taken in either case.
    pub fn try_acquire(&self, cost: Cost) -> Result<(), TryAcquireError> {
        let request = ChargeRequest {
            cost,
            limits_version: None,
        };
        let now = LazyNow::at(Instant::now());
        let refused = self
            .queue
            .try_acquire(&request, now, |buckets, now| buckets.wait(cost, now));
        match refused {
            Ok(None) => Ok(()),
            Ok(Some(Duration::ZERO)) => Err(TryAcquireError::NotYet(RETRY_SOON)),
            Ok(Some(wait)) => Err(TryAcquireError::NotYet(wait)),
            Err(error) => Err(TryAcquireError::CostExceedsBurst(error)),
        }
    }

    /// Returns how long a new call of this cost will probably wait, behind the waiters in the limiter's queue and behind
    /// `ahead`, the summed costs of the calls that will join the queue before it. Estimates count as what calls turn out
    /// to use of them.
    pub(super) fn wait(&self, cost: Cost, ahead: Demand) -> Duration {
        self.queue
            .inspect(|buckets, now| buckets.expected_wait(cost, ahead, now))
    }

    /// Declares that costs will be charged as estimates, so that [`wait`](Self::wait) knows it before the first one.
    pub(super) fn expect_estimates(&self) {
        self.queue.inspect(|buckets, _| buckets.expect_estimates());
    }

    /// Returns what the buckets of the limiter hold now. A new call gets it only after the calls that wait already.
    #[must_use]
    pub fn available(&self) -> Available {
        self.queue.inspect(|buckets, now| buckets.available(now))
    }

    /// Returns an error if `cost` exceeds the burst of a bucket. Takes nothing from the buckets.
    ///
    /// # Errors
    ///
    /// [`CostExceedsBurst`] if a bucket can never hold as much as the cost.
    pub fn check(&self, cost: Cost) -> Result<(), CostExceedsBurst> {
        self.bursts().check(cost)
    }

    /// Returns the largest cost, per budget, that one call may have. The shared value is updated whenever the limits
    /// change.
    pub(super) fn bursts(&self) -> Arc<Bursts> {
        self.queue.inspect(|buckets, _| buckets.bursts().clone())
    }

    /// Replaces the limits of this limiter. The new limits apply at once, also to the calls that wait already.
    ///
    /// A bucket keeps its debt and what it holds, up to the new burst: a rate takes over the bucket of the old rate with
    /// the same budget and period, whatever the order of the rates. If there is none, it takes over the bucket of the
    /// first old rate of its budget that is left over. If none is left over, it starts with its initial fill.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`], in the same cases as [`new`](Self::new). The limits are unchanged then.
    pub fn set_limits(&self, limits: Limits) -> Result<(), InvalidConfig> {
        // The limits are checked before the update, because the update wakes every waiter, also if it fails.
        limits.check()?;
        self.queue
            .update_and_wake_all(|buckets, now| buckets.set_limits(limits, now))
    }

    /// Returns the current limits of this limiter.
    #[must_use]
    pub fn limits(&self) -> Limits {
        self.queue.inspect(|buckets, _| buckets.limits().clone())
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
    pub fn lower(&self, budget: Budget, period: Option<Duration>, remaining: u64) {
        self.queue
            .update(|buckets, now| buckets.lower(budget, period, remaining, now));
    }

    /// Records that a call is sent now, for a later [`lower_since`](Self::lower_since).
    #[cfg(feature = "http")]
    pub(super) fn mark_sent(&self) {
        self.queue.inspect(Buckets::mark_sent);
    }

    /// Lowers what the bucket of one rate holds, as [`lower`](Self::lower) does, to what is left now of `remaining`,
    /// which the provider held when it received a call that was sent at `sent`.
    #[cfg(feature = "http")]
    pub(super) fn lower_since(&self, budget: Budget, period: Option<Duration>, remaining: u64, sent: Instant) {
        self.queue
            .update(|buckets, now| buckets.lower_since(budget, period, remaining, sent, now));
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
    pub fn adopt(&self, budget: Budget, period: Option<Duration>, amount: u64) -> Result<bool, InvalidConfig> {
        let changed = |limits: &Limits| limits.with_amount(limits.index_of(budget, period)?, amount);
        // Providers report the same limit with every response. So the limits are compared first, because an update
        // wakes every waiter.
        let Some(limits) = self.queue.inspect(|buckets, _| changed(buckets.limits())) else {
            return Ok(false);
        };
        limits.check()?;
        self.queue
            .update_and_wake_all(|buckets, now| match changed(buckets.limits()) {
                Some(limits) => buckets.set_limits(limits, now).map(|()| true),
                None => Ok(false),
            })
    }

    /// Admits no call for the duration `pause` from now on. Replaces the pause that was set by an earlier call of this
    /// method or of [`pause_until`](Self::pause_until), so a shorter pause ends earlier, and a pause of zero ends at
    /// once. A pause of the provider is not changed: see [`resume`](Self::resume). A pause does not end by itself if its
    /// end is too far away for an [`Instant`].
    pub fn pause_for(&self, pause: Duration) {
        self.change_pause(|buckets, now| {
            let until = now.get().checked_add(pause);
            [(PauseSource::User, buckets.pause(until, now))]
        });
    }

    /// Admits no call until `until`. Replaces an earlier pause as [`pause_for`](Self::pause_for) does: an instant that
    /// has passed ends it.
    pub fn pause_until(&self, until: Instant) {
        self.change_pause(|buckets, now| [(PauseSource::User, buckets.pause(Some(until), now))]);
    }

    /// Admits no call for the duration `pause`, at the request of the provider. Only extends an earlier pause of the
    /// provider: its responses may arrive in another order than they were sent.
    #[cfg(feature = "http")]
    pub(super) fn pause_for_provider(&self, pause: Duration) {
        self.change_pause(|buckets, now| {
            let until = now.get().checked_add(pause);
            [(PauseSource::Provider, buckets.extend_pause(until, now))]
        });
    }

    /// Ends all pauses now, also a pause of the provider. Waiting calls go on at once, as far as the limits allow.
    pub fn resume(&self) {
        self.change_pause(Buckets::resume);
    }

    /// Returns the current pause, with its end and with who has begun it. If there are several, returns the one that
    /// ends last. `None` if the limiter is not paused.
    #[must_use]
    pub fn paused(&self) -> Option<Pause> {
        self.queue.inspect(|buckets, now| buckets.pause_since(now.get()))
    }

    fn change_pause<const N: usize>(
        &self,
        change: impl FnOnce(&mut Buckets, &mut LazyNow) -> [(PauseSource, PauseChange); N],
    ) {
        let (changes, remaining) = self.queue.update(|buckets, now| {
            let changes = change(buckets, now);
            (changes, buckets.wait(Cost::default(), now))
        });
        for (source, change) in changes {
            change.log(source, remaining);
        }
    }

    /// Raises each bucket that is in debt to 0, so that calls are admitted again as soon as the rates have added their
    /// cost. What a bucket holds stays. For a debt that is wrong, such as that of a usage that was reported wrongly.
    ///
    /// How large a debt can become is set by [`Rate::max_debt`](crate::Rate::max_debt).
    pub fn forgive_debts(&self) {
        self.queue.update(Buckets::forgive_debts);
    }

    #[inline]
    pub(super) fn admission(&self, cost: Cost, is_estimate: bool) -> LocalAdmission {
        LocalAdmission {
            waiter: self.queue.waiter(),
            request: ChargeRequest {
                cost,
                limits_version: is_estimate.then(Arc::default),
            },
        }
    }

    /// Replaces a charged estimate by what the call really `used`: refunds what was not used, or debits what was used
    /// in addition. The correction applies at once, also to the calls that wait already. This method is the same as
    /// [`Estimate::settle`].
    ///
    /// A debit may leave a bucket in debt, which must be filled before the bucket admits another call. The debt is
    /// [bounded](crate::Rate::max_debt), and can be [forgiven](Self::forgive_debts). A refund never
    /// lets more than `burst + rate x T` of true usage through in a window of length T: what would have overflowed in
    /// the meantime, had the true cost been charged from the start, is not refunded.
    pub fn settle(&self, estimate: Estimate, used: Cost) {
        estimate.settle(used);
    }
}

impl fmt::Debug for RateLimiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RateLimiter")
            .field("available", &self.available())
            .finish_non_exhaustive()
    }
}

// === impl TryAcquireError ===

impl TryAcquireError {
    /// Returns the time after which to retry `try_acquire`. `None` if a retry cannot succeed.
    #[must_use]
    pub const fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::NotYet(wait) => Some(*wait),
            Self::CostExceedsBurst(_) => None,
        }
    }
}

impl fmt::Display for TryAcquireError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotYet(wait) => write!(f, "the rate limit is reached: retry in {wait:?}"),
            Self::CostExceedsBurst(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for TryAcquireError {}

// === impl LocalCharge ===

impl Settle for LocalCharge {
    fn settle(&self, charged: Cost, used: Cost) {
        let cut_off = self
            .limiter
            .queue
            .update(|buckets, now| buckets.settle(charged, self.limits_version, used, now));
        if let Some(budget) = cut_off {
            warn_of_cut_off(budget, used);
        }
    }
}

// === impl LocalAdmission ===

impl LocalAdmission {
    /// Ready when it is the turn of the call and its cost is available. Takes nothing. `now` is the current time.
    #[inline]
    pub(super) fn poll_turn(&mut self, now: Instant, cx: &mut Context<'_>) -> Poll<Result<(), CostExceedsBurst>> {
        self.waiter.poll_ready(&self.request, cx, Some(now))
    }

    /// Charges the cost if it is still the turn of the call and the cost is still available. Returns whether it was
    /// charged.
    #[inline]
    pub(super) fn try_charge(&mut self, now: Instant) -> Result<bool, CostExceedsBurst> {
        self.waiter.try_acquire(&self.request, Some(now))
    }

    /// Ready when the cost has been charged.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), CostExceedsBurst>> {
        self.waiter.poll_acquire(&self.request, cx, None)
    }

    pub(super) fn pause_since(&self, since: Instant) -> Option<Pause> {
        self.waiter.queue().inspect(|buckets, _| buckets.pause_since(since))
    }

    /// Returns the charge of an admitted call, to be settled when the true cost is available. `None` if the cost was
    /// not charged as an estimate.
    pub(super) fn estimate(&mut self) -> Option<Estimate> {
        let limits_version = self.request.limits_version.take()?.load(Ordering::Acquire);
        let limiter = RateLimiter {
            queue: self.waiter.queue(),
        };
        Some(Estimate::new(
            self.request.cost,
            LocalCharge {
                limiter,
                limits_version,
            },
        ))
    }
}
