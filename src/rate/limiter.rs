//! [`Limiter`]: a rate limiter, either of this process or shared by several processes.

#[cfg(feature = "redis")]
use super::redis::{SharedAdmission, SharedRateLimiter};
use super::{
    buckets::{Available, Bursts},
    estimate::Estimate,
    limits::{Budget, Cost, Demand, Limits},
    local::{LocalAdmission, RateLimiter},
    pause::Pause,
};
use crate::error::{AcquireError, CostExceedsBurst, InvalidConfig};
use std::{
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};
use tokio::time::Instant;

/// A rate limiter whose buckets are in this process ([`RateLimiter`]), or one that several processes share
/// (`rate::redis::SharedRateLimiter`, feature `redis`).
///
/// Layers and executors accept either kind of limiter, as `impl Into<Limiter>`, and work the same with both. This type
/// has the methods that both kinds have; their own types document the methods in detail.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Limiter {
    /// A limiter whose buckets are in this process.
    Local(RateLimiter),
    /// A limiter that several processes share.
    #[cfg(feature = "redis")]
    #[cfg_attr(docsrs, doc(cfg(feature = "redis")))]
    Shared(SharedRateLimiter),
}

/// One call that waits for its admission by a limiter. Not a `Future`, because its methods also take the time.
#[derive(Debug)]
pub(super) enum Admission {
    Local(LocalAdmission),
    #[cfg(feature = "redis")]
    Shared {
        admission: Box<SharedAdmission>,
        cost: Cost,
    },
    /// A shared limiter has charged the call. If the cost is an estimate, it is kept until the call is made.
    #[cfg(feature = "redis")]
    Charged(Option<Estimate>),
}

/// Evaluates an expression with the local or the shared limiter. The two types have methods of the same names, but no
/// common trait.
macro_rules! either {
    ($limiter:expr, $inner:ident => $call:expr) => {
        match $limiter {
            Limiter::Local($inner) => $call,
            #[cfg(feature = "redis")]
            Limiter::Shared($inner) => $call,
        }
    };
}

// === impl Limiter ===

impl Limiter {
    /// Waits until every bucket of the limiter holds `cost`, and takes it from all of them. See
    /// [`RateLimiter::acquire`].
    ///
    /// # Errors
    ///
    /// [`AcquireError`] if the cost exceeds a burst, or if several processes share the limits and their Redis store is
    /// unavailable.
    ///
    /// # Panics
    ///
    /// A local limiter panics when it has to wait outside a Tokio runtime with its timer enabled. A shared limiter
    /// panics outside a Tokio runtime with its timer and its I/O enabled.
    ///
    /// # Cancel safety
    ///
    /// A future that is dropped while it waits loses its place in the queue, and nothing is charged. A shared limiter
    /// gives back what it has reserved for the call.
    pub async fn acquire(&self, cost: Cost) -> Result<(), AcquireError> {
        either!(self, limiter => Ok(limiter.acquire(cost).await?))
    }

    /// Like [`acquire`](Self::acquire), for a cost that is an estimate and is corrected later. See
    /// [`RateLimiter::acquire_estimate`].
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
    pub async fn acquire_estimate(&self, cost: Cost) -> Result<Estimate, AcquireError> {
        either!(self, limiter => Ok(limiter.acquire_estimate(cost).await?))
    }

    /// Returns the [`RateLimiter`] if the limiter's buckets are in this process, or `None` if several processes share
    /// the limiter. A [`RateLimiter`] has methods that a `Limiter` has not, such as
    /// [`try_acquire`](RateLimiter::try_acquire).
    #[must_use]
    pub const fn local(&self) -> Option<&RateLimiter> {
        match self {
            Self::Local(local) => Some(local),
            #[cfg(feature = "redis")]
            Self::Shared(_) => None,
        }
    }

    /// Returns what the buckets of the limiter hold. See [`RateLimiter::available`].
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
        either!(self, limiter => limiter.check(cost))
    }

    /// Returns the current limits of the limiter.
    #[must_use]
    pub fn limits(&self) -> Limits {
        either!(self, limiter => limiter.limits())
    }

    /// Replaces the limits, also for the calls that wait already. See [`RateLimiter::set_limits`].
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`] names the invalid field. The limits are unchanged then.
    pub fn set_limits(&self, limits: Limits) -> Result<(), InvalidConfig> {
        either!(self, limiter => limiter.set_limits(limits))
    }

    /// Lowers what the bucket of one rate holds to `remaining`, for example to the amount that the provider reports.
    /// See [`RateLimiter::lower`].
    pub fn lower(&self, budget: Budget, period: Option<Duration>, remaining: u64) {
        either!(self, limiter => limiter.lower(budget, period, remaining));
    }

    /// Replaces the amount of one rate, for example with the limit that the provider reports. Returns whether the
    /// limits have changed. See [`RateLimiter::adopt`].
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`] for an amount that is not valid, such as 0. The limits are unchanged then.
    pub fn adopt(&self, budget: Budget, period: Option<Duration>, amount: u64) -> Result<bool, InvalidConfig> {
        either!(self, limiter => limiter.adopt(budget, period, amount))
    }

    /// Records that a call is sent now, for a later [`lower_since`](Self::lower_since).
    #[cfg(feature = "http")]
    pub(crate) fn mark_sent(&self) {
        match self {
            Self::Local(local) => local.mark_sent(),
            #[cfg(feature = "redis")]
            Self::Shared(_) => {}
        }
    }

    /// Lowers what the bucket of one rate holds to what is left now of `remaining`, which the provider held when it
    /// received a call that was sent at `sent`.
    #[cfg(feature = "http")]
    pub(crate) fn lower_since(&self, budget: Budget, period: Option<Duration>, remaining: u64, sent: Instant) {
        either!(self, limiter => limiter.lower_since(budget, period, remaining, sent));
    }

    /// Admits no call for the duration `pause` from now on. Replaces the user's earlier pause, so a pause of zero ends
    /// it. See [`RateLimiter::pause_for`].
    pub fn pause_for(&self, pause: Duration) {
        either!(self, limiter => limiter.pause_for(pause));
    }

    /// Admits no call until `until`. Replaces the user's earlier pause, so an instant that has passed ends it. See
    /// [`RateLimiter::pause_until`].
    pub fn pause_until(&self, until: Instant) {
        either!(self, limiter => limiter.pause_until(until));
    }

    /// Admits no call for the duration `pause`, at the request of the provider. Only extends the provider's earlier
    /// pause.
    #[cfg(feature = "http")]
    pub(crate) fn pause_for_provider(&self, pause: Duration) {
        either!(self, limiter => limiter.pause_for_provider(pause));
    }

    /// Ends all pauses now, also a pause of the provider. See [`RateLimiter::resume`].
    pub fn resume(&self) {
        either!(self, limiter => limiter.resume());
    }

    /// Returns the current pause, with its end and with who has begun it. See [`RateLimiter::paused`].
    #[must_use]
    pub fn paused(&self) -> Option<Pause> {
        either!(self, limiter => limiter.paused())
    }

    /// Raises each bucket that is in debt to 0. See [`RateLimiter::forgive_debts`].
    pub fn forgive_debts(&self) {
        either!(self, limiter => limiter.forgive_debts());
    }

    /// Replaces a charged estimate by what the call really `used`. See [`RateLimiter::settle`].
    pub fn settle(&self, estimate: Estimate, used: Cost) {
        estimate.settle(used);
    }

    /// Declares that costs will be charged as estimates, so that [`wait`](Self::wait) knows it before the first one.
    pub(crate) fn expect_estimates(&self) {
        either!(self, limiter => limiter.expect_estimates());
    }

    /// Returns how long a new call of this cost will probably wait, behind the waiters in the limiter's queue and behind
    /// `ahead`, the summed costs of the calls that will join the queue before it. Estimates count as what calls turn out
    /// to use of them; before the first settlement, their tokens count as nothing.
    pub(crate) fn wait(&self, cost: Cost, ahead: Demand) -> Duration {
        either!(self, limiter => limiter.wait(cost, ahead))
    }

    /// Returns the largest cost, per budget, that one call may have. The shared value is updated whenever the limits
    /// change.
    pub(crate) fn bursts(&self) -> Arc<Bursts> {
        either!(self, limiter => limiter.bursts())
    }

    /// Returns the admission of a call that costs `cost`, which is corrected later if it `is_estimate`.
    #[inline]
    pub(super) fn admission(&self, cost: Cost, is_estimate: bool) -> Admission {
        match self {
            Self::Local(local) => Admission::Local(local.admission(cost, is_estimate)),
            #[cfg(feature = "redis")]
            Self::Shared(shared) => Admission::Shared {
                admission: Box::new(shared.admission(is_estimate)),
                cost,
            },
        }
    }
}

impl From<RateLimiter> for Limiter {
    fn from(local: RateLimiter) -> Self {
        Self::Local(local)
    }
}

#[cfg(feature = "redis")]
impl From<SharedRateLimiter> for Limiter {
    fn from(shared: SharedRateLimiter) -> Self {
        Self::Shared(shared)
    }
}

// === impl Admission ===

impl Admission {
    /// Ready when it is the turn of the call and its cost is available. `now` is the current time.
    ///
    /// A local limiter has taken nothing then. A shared one has charged the cost: to ask and then to charge would take
    /// two round trips to the store.
    pub(super) fn poll_turn(&mut self, now: Instant, cx: &mut Context<'_>) -> Poll<Result<(), AcquireError>> {
        match self {
            Self::Local(local) => local.poll_turn(now, cx).map_err(AcquireError::from),
            #[cfg(feature = "redis")]
            Self::Shared { admission, cost } => {
                std::task::ready!(admission.poll(*cost, cx))?;
                *self = Self::Charged(admission.estimate(*cost));
                Poll::Ready(Ok(()))
            }
            #[cfg(feature = "redis")]
            Self::Charged(_) => Poll::Ready(Ok(())),
        }
    }

    /// Returns the last pause of the limiter if it ends after `since`, which may be in the past: the pause that a call
    /// waits for now, or that held a call which has waited since then. `None` for a call that a shared limiter has charged.
    pub(super) fn pause_since(&self, since: Instant) -> Option<Pause> {
        match self {
            Self::Local(local) => local.pause_since(since),
            #[cfg(feature = "redis")]
            Self::Shared { admission, .. } => admission.pause_since(since),
            #[cfg(feature = "redis")]
            Self::Charged(_) => None,
        }
    }

    /// Charges the cost if it is still the turn of the call and the cost is still available. Returns whether it was
    /// charged.
    pub(super) fn try_charge(&mut self, now: Instant) -> Result<bool, AcquireError> {
        match self {
            Self::Local(local) => local.try_charge(now).map_err(AcquireError::from),
            #[cfg(feature = "redis")]
            Self::Shared { .. } => Ok(false),
            #[cfg(feature = "redis")]
            Self::Charged(_) => Ok(true),
        }
    }

    /// Returns the charge of a charged call, to be settled when the true cost is available. `None` if the cost was not
    /// charged as an estimate.
    pub(super) fn estimate(&mut self) -> Option<Estimate> {
        match self {
            Self::Local(local) => local.estimate(),
            #[cfg(feature = "redis")]
            Self::Shared { .. } => None,
            #[cfg(feature = "redis")]
            Self::Charged(estimate) => estimate.take(),
        }
    }
}
