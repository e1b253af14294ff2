//! [`Admission`]: one call that waits for its admission by a rate limiter, whether its buckets are in this process or
//! shared by several.

#[cfg(feature = "redis")]
use super::redis::SharedAdmission;
use super::{cost::Cost, estimate::Estimate, granted::Granted, local::LocalAdmission, pause::Pause};
use crate::error::AcquireError;
#[cfg(feature = "redis")]
use std::task::ready;
use std::task::{Context, Poll};
use tokio::time::Instant;

/// One call that waits for its admission by a limiter. Not a `Future`, because its methods also take the time.
#[derive(Debug)]
pub(crate) enum Admission {
    Local(LocalAdmission),
    #[cfg(feature = "redis")]
    Shared {
        admission: Box<SharedAdmission>,
        cost: Cost,
    },
    /// The call was charged before it came here.
    Granted(Option<Granted>),
    /// A shared limiter has charged the call. If the cost is an estimate, it is kept until the call is made.
    #[cfg(feature = "redis")]
    Charged(Option<Estimate>),
}

// === impl Admission ===

impl Admission {
    /// Ready when it is the turn of the call and its cost is available. `now` is the current time.
    ///
    /// A local limiter has taken nothing then. A shared one has charged the cost: to ask and then to charge would take
    /// two round trips to the store.
    pub(crate) fn poll_turn(&mut self, now: Instant, cx: &mut Context<'_>) -> Poll<Result<(), AcquireError>> {
        match self {
            Self::Local(local) => local.poll_turn(now, cx).map_err(AcquireError::from),
            #[cfg(feature = "redis")]
            Self::Shared { admission, cost } => {
                ready!(admission.poll(*cost, cx))?;
                *self = Self::Charged(admission.estimate(*cost));
                Poll::Ready(Ok(()))
            }
            #[cfg(feature = "redis")]
            Self::Charged(_) => Poll::Ready(Ok(())),
            Self::Granted(charge) => match charge.as_deref() {
                Some(Err(error)) => Poll::Ready(Err(error.clone())),
                Some(Ok(_)) | None => Poll::Ready(Ok(())),
            },
        }
    }

    /// Ready when it is the turn of the call and the cost has been charged.
    #[inline]
    pub(crate) fn poll_acquire(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), AcquireError>> {
        match self {
            Self::Local(local) => local.poll_acquire(cx).map_err(AcquireError::from),
            Self::Granted(_) => self.poll_turn(Instant::now(), cx),
            #[cfg(feature = "redis")]
            Self::Shared { .. } | Self::Charged(_) => self.poll_turn(Instant::now(), cx),
        }
    }

    /// Returns the last pause of the limiter if it ends after `since`, which may be in the past: the pause that a call
    /// waits for now, or that held a call which has waited since then. `None` for a call that a shared limiter has charged.
    pub(crate) fn pause_since(&self, since: Instant) -> Option<Pause> {
        match self {
            Self::Local(local) => local.pause_since(since),
            #[cfg(feature = "redis")]
            Self::Shared { admission, .. } => admission.pause_since(since),
            #[cfg(feature = "redis")]
            Self::Charged(_) => None,
            Self::Granted(_) => None,
        }
    }

    /// Charges the cost if it is still the turn of the call and the cost is still available. Returns whether it was
    /// charged.
    pub(crate) fn try_charge(&mut self, now: Instant) -> Result<bool, AcquireError> {
        match self {
            Self::Local(local) => local.try_charge(now).map_err(AcquireError::from),
            #[cfg(feature = "redis")]
            Self::Shared { .. } => Ok(false),
            #[cfg(feature = "redis")]
            Self::Charged(_) => Ok(true),
            Self::Granted(_) => Ok(true),
        }
    }

    /// Ends the admission of a call that is made now and is not settled: what it was granted is final.
    #[inline]
    pub(super) fn end_unsettled(&mut self) {
        if matches!(self, Self::Granted(_)) {
            drop(self.estimate());
        }
    }

    /// Replaces the cost of a call that waits, which keeps its place: another call goes first now. Returns `false` if the
    /// cost cannot be replaced, because a shared limiter may have reserved it already.
    pub(crate) fn set_cost(&mut self, new: Cost) -> bool {
        match self {
            Self::Local(local) => {
                local.set_cost(new);
                true
            }
            #[cfg(feature = "redis")]
            Self::Shared { cost, .. } => *cost == new,
            #[cfg(feature = "redis")]
            Self::Charged(estimate) => estimate.as_ref().is_some_and(|estimate| estimate.cost() == new),
            Self::Granted(_) => false,
        }
    }

    /// Leaves the line of the limiter. If a shared limiter has charged the call already, gives that back.
    pub(crate) fn give_back(self) {
        #[cfg(feature = "redis")]
        if let Self::Charged(Some(estimate)) = self {
            estimate.settle(Cost::none());
        }
    }

    /// Returns the charge of a charged call, to be settled when the true cost is available. `None` if the cost was not
    /// charged as an estimate.
    pub(crate) fn estimate(&mut self) -> Option<Estimate> {
        match self {
            Self::Local(local) => local.charge().map(|(cost, charge)| Estimate::local(cost, charge)),
            #[cfg(feature = "redis")]
            Self::Shared { .. } => None,
            #[cfg(feature = "redis")]
            Self::Charged(estimate) => estimate.take(),
            Self::Granted(charge) => (*charge.take()?).ok()?.used(),
        }
    }
}
