//! [`Limiter`]: a limiter, wherever its buckets live.

#[cfg(feature = "redis")]
use super::redis::{SharedAdmission, SharedRateLimiter};
use super::{
    buckets::{Available, Bursts},
    estimate::Estimate,
    limits::{Budget, Cost, Limits},
    local::{LocalAdmission, RateLimiter},
};
use crate::error::{AcquireError, CostExceedsBurst, InvalidConfig};
use std::{
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};
use tokio::time::Instant;

/// A limiter, wherever its buckets live: a [`RateLimiter`] of this process, or one that many processes share
/// (`rate::redis::SharedRateLimiter`, feature `redis`).
///
/// Layers and executors take either, by `Into<Limiter>`, and nothing else about them changes. What both can do is here;
/// it is described where they are.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Limiter {
    /// Of this process.
    Local(RateLimiter),
    /// Of many.
    #[cfg(feature = "redis")]
    #[cfg_attr(docsrs, doc(cfg(feature = "redis")))]
    Shared(SharedRateLimiter),
}

/// A stand in a limiter's line, for those who poll.
#[derive(Debug)]
pub(super) enum Admission {
    Local(LocalAdmission),
    #[cfg(feature = "redis")]
    Shared(Box<SharedAdmission>),
}

/// Calls the same of whichever it is.
macro_rules! either {
    ($limiter:expr, $one:ident => $call:expr) => {
        match $limiter {
            Limiter::Local($one) => $call,
            #[cfg(feature = "redis")]
            Limiter::Shared($one) => $call,
        }
    };
}

impl Limiter {
    /// Waits until `cost` can be taken, and takes it: [`RateLimiter::acquire`].
    ///
    /// # Errors
    ///
    /// [`AcquireError`]: it could never be taken, or the limits are shared and their store is lost.
    ///
    /// # Panics
    ///
    /// Outside a Tokio runtime with its timer enabled, if it has to wait.
    ///
    /// # Cancel safety
    ///
    /// Dropped while it waits, it loses its place in line and has taken nothing, or gives it back.
    pub async fn acquire(&self, cost: Cost) -> Result<(), AcquireError> {
        either!(self, one => Ok(one.acquire(cost).await?))
    }

    /// The same for a cost that is only estimated: [`RateLimiter::acquire_estimate`].
    ///
    /// # Errors
    ///
    /// As [`acquire`](Self::acquire).
    ///
    /// # Cancel safety
    ///
    /// As [`acquire`](Self::acquire).
    pub async fn acquire_estimate(&self, cost: Cost) -> Result<Estimate, AcquireError> {
        either!(self, one => Ok(one.acquire_estimate(cost).await?))
    }

    /// The limiter, if it is of this process: it can say at once whether a call may go.
    #[must_use]
    pub const fn local(&self) -> Option<&RateLimiter> {
        match self {
            Self::Local(local) => Some(local),
            #[cfg(feature = "redis")]
            Self::Shared(_) => None,
        }
    }

    /// What could go now if nobody waited: [`RateLimiter::available`].
    #[must_use]
    pub fn available(&self) -> Available {
        either!(self, one => one.available())
    }

    /// Whether `cost` could pass at all.
    ///
    /// # Errors
    ///
    /// [`CostExceedsBurst`] if it could not.
    pub fn check(&self, cost: Cost) -> Result<(), CostExceedsBurst> {
        either!(self, one => one.check(cost))
    }

    /// The limits, as they are now.
    #[must_use]
    pub fn limits(&self) -> Limits {
        either!(self, one => one.limits())
    }

    /// Replaces the limits, at once also for those who wait: [`RateLimiter::set_limits`].
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`] names the field; nothing is changed then.
    pub fn set_limits(&self, limits: Limits) -> Result<(), InvalidConfig> {
        either!(self, one => one.set_limits(limits))
    }

    /// Somebody who knows says what is left of a rate: [`RateLimiter::lower`].
    pub fn lower(&self, budget: Budget, period: Option<Duration>, left: u64) {
        either!(self, one => one.lower(budget, period, left));
    }

    /// Somebody who knows says what a rate is: [`RateLimiter::adopt`].
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`] for an amount of zero; nothing is changed then.
    pub fn adopt(&self, budget: Budget, period: Option<Duration>, amount: u64) -> Result<bool, InvalidConfig> {
        either!(self, one => one.adopt(budget, period, amount))
    }

    /// Admits nobody for this long. Only ever extends a pause.
    pub fn pause_for(&self, pause: Duration) {
        either!(self, one => one.pause_for(pause));
    }

    /// Admits nobody until then. Only ever extends a pause.
    pub fn pause_until(&self, until: Instant) {
        either!(self, one => one.pause_until(until));
    }

    /// Corrects a charge: [`RateLimiter::settle`].
    pub fn settle(&self, estimate: Estimate, used: Cost) {
        estimate.settle(used);
    }

    /// How long a newcomer would wait behind those in line, and behind others who are on their way there.
    pub(crate) fn wait(&self, cost: Cost, ahead: (u128, u128)) -> Duration {
        either!(self, one => one.wait(cost, ahead))
    }

    /// The most a call may cost, now and after every change of the limits.
    pub(crate) fn bursts(&self) -> Arc<Bursts> {
        either!(self, one => one.bursts())
    }

    pub(super) fn admission(&self, is_estimate: bool) -> Admission {
        match self {
            Self::Local(local) => Admission::Local(local.admission(is_estimate)),
            #[cfg(feature = "redis")]
            Self::Shared(shared) => Admission::Shared(Box::new(shared.admission(is_estimate))),
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
    pub(super) fn poll(&mut self, cost: Cost, now: Instant, cx: &mut Context<'_>) -> Poll<Result<(), AcquireError>> {
        match self {
            Self::Local(local) => local.poll(cost, now, cx).map_err(AcquireError::from),
            #[cfg(feature = "redis")]
            Self::Shared(shared) => shared.poll(cost, cx),
        }
    }

    /// What was charged, to be settled, if it was an estimate.
    pub(super) fn estimate(&mut self, cost: Cost) -> Option<Estimate> {
        match self {
            Self::Local(local) => local.estimate(cost),
            #[cfg(feature = "redis")]
            Self::Shared(shared) => shared.estimate(cost),
        }
    }
}
