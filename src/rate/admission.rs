//! [`Admission`]: one call that waits for its admission by a rate limiter, whether its buckets are in this process or
//! shared by several.

#[cfg(feature = "redis")]
use super::redis::SharedAdmission;
use super::{
    budget::Budget,
    cost::Cost,
    estimate::Estimate,
    granted::{self, Found, Granted, PollCharge},
    limiter::RateLimiter,
    local::LocalAdmission,
    pause::Pause,
};
use crate::{error::AcquireError, event::WaitCause, semaphore::granted::InFlight};
use std::{
    fmt,
    task::{Context, Poll, ready},
};
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
    /// The call is a further attempt, and waits for its turn in a schedule again.
    Scheduled(Box<ScheduledAdmission>),
    /// A shared limiter has charged the call. If the cost is an estimate, it is kept until the call is made.
    #[cfg(feature = "redis")]
    Charged {
        cost: Cost,
        estimate: Option<Estimate>,
    },
}

/// A further attempt of a call that a schedule has chosen.
pub(crate) struct ScheduledAdmission {
    attempt: Box<dyn PollCharge>,
    limiter: RateLimiter,
    cost: Cost,
    is_estimate: bool,
}

// === impl Admission ===

impl Admission {
    /// Returns the admission of a call for which a schedule may have left something.
    #[cold]
    #[inline(never)]
    pub(super) fn of_granted(limiter: &RateLimiter, cost: Cost, is_estimate: bool) -> Self {
        match granted::take(limiter) {
            Some(Found::Charge(charge)) => Self::Granted(Some(charge)),
            Some(Found::Again(attempt)) => Self::Scheduled(Box::new(ScheduledAdmission {
                attempt,
                limiter: limiter.clone(),
                cost,
                is_estimate,
            })),
            None => limiter.admission(cost, is_estimate),
        }
    }

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
                let (cost, estimate) = (*cost, admission.estimate(*cost));
                *self = Self::Charged { cost, estimate };
                Poll::Ready(Ok(()))
            }
            #[cfg(feature = "redis")]
            Self::Charged { .. } => Poll::Ready(Ok(())),
            Self::Granted(charged) => match charged.as_deref().map(|charged| &charged.charge) {
                Some(Err(error)) => Poll::Ready(Err(error.clone())),
                Some(Ok(_)) | None => Poll::Ready(Ok(())),
            },
            Self::Scheduled(scheduled) => {
                let charged = ready!(scheduled.attempt.poll_charge(cx)).transpose()?;
                *self = match charged {
                    Some(charged) => Self::Granted(Some(charged)),
                    None => scheduled.limiter.admission(scheduled.cost, scheduled.is_estimate),
                };
                self.poll_turn(now, cx)
            }
        }
    }

    /// Ready when it is the turn of the call and the cost has been charged.
    #[inline]
    pub(crate) fn poll_acquire(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), AcquireError>> {
        match self {
            Self::Local(local) => local.poll_acquire(cx).map_err(AcquireError::from),
            Self::Granted(_) | Self::Scheduled(_) => self.poll_turn(Instant::now(), cx),
            #[cfg(feature = "redis")]
            Self::Shared { .. } | Self::Charged { .. } => self.poll_turn(Instant::now(), cx),
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
            Self::Charged { .. } => None,
            Self::Granted(_) | Self::Scheduled(_) => None,
        }
    }

    /// Returns what a call that has to wait waits for: the budget that has its cost last, or its turn in a schedule. A shared limiter does not
    /// know it, and returns the one whose rate takes the longest to bring the cost.
    pub(super) fn waits_for(&self) -> WaitCause {
        WaitCause::Budget(match self {
            Self::Local(local) => local.waits_for(),
            #[cfg(feature = "redis")]
            Self::Shared { admission, cost } => admission.waits_for(cost),
            #[cfg(feature = "redis")]
            Self::Charged { .. } => Budget::Requests,
            Self::Granted(_) => Budget::Requests,
            // The schedule chooses the attempt again when its permit and its budgets are there.
            Self::Scheduled(_) => return WaitCause::Turn,
        })
    }

    /// Returns the budget that a call has waited for which was admitted just now. `None` if that is not known better than
    /// [before](Self::waits_for).
    pub(super) fn waited_for(&self) -> Option<Budget> {
        match self {
            Self::Local(local) => Some(local.waited_for()),
            #[cfg(feature = "redis")]
            Self::Shared { .. } | Self::Charged { .. } => None,
            Self::Granted(_) | Self::Scheduled(_) => None,
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
            Self::Charged { .. } => Ok(true),
            Self::Granted(_) => Ok(true),
            Self::Scheduled(_) => Ok(false),
        }
    }

    /// Returns what counts a call that is made now as in flight, for the schedule that has chosen it.
    #[inline]
    pub(super) fn take_in_flight(&mut self) -> Option<InFlight> {
        match self {
            Self::Granted(Some(charged)) => charged.take_in_flight(),
            _ => None,
        }
    }

    /// Ends the admission of a call that is made now and is not settled: what it was granted is final.
    #[inline]
    pub(super) fn end_unsettled(&mut self) {
        if matches!(self, Self::Granted(_)) {
            drop(self.estimate());
        }
    }

    /// Replaces the cost of a call that waits at a limiter of this process, which keeps its place: another call goes first
    /// now. Does nothing to others.
    pub(crate) fn set_cost(&mut self, new: Cost) {
        if let Self::Local(local) = self {
            local.set_cost(new);
        }
    }

    /// Returns what the call was charged, which was admitted just now.
    pub(super) fn charged(&self) -> Option<Cost> {
        match self {
            Self::Local(local) => Some(local.cost()),
            #[cfg(feature = "redis")]
            Self::Shared { .. } => None,
            #[cfg(feature = "redis")]
            Self::Charged { cost, .. } => Some(*cost),
            Self::Granted(charged) => charged.as_deref()?.charge.as_ref().ok()?.cost(),
            Self::Scheduled(_) => None,
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
            Self::Charged { estimate, .. } => estimate.take(),
            Self::Granted(charged) => charged.take()?.charge.ok()?.used(),
            Self::Scheduled(_) => None,
        }
    }
}

impl fmt::Debug for ScheduledAdmission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ScheduledAdmission").finish_non_exhaustive()
    }
}
