//! A charge that was made for a call before it reached the rate limit: see [`GrantedCharge`].
//!
//! A schedule charges a call when it chooses it, outside all layers. The [`RateLimit`](super::RateLimit) that the call
//! reaches finds the charge here, and does not charge the call again. If no concurrency limit does so, it also lets further
//! attempts of the call wait for their turn in the schedule.

use super::{
    cost::Cost,
    estimate::{Estimate, OnSettled},
    limiter::RateLimiter,
};
use crate::{error::AcquireError, semaphore::granted::InFlight};
use std::{
    cell::Cell,
    fmt,
    sync::Arc,
    task::{Context, Poll},
};

/// The charge that a schedule has made for the call which is made or polled on this thread. A charge that no rate limit
/// takes is settled as not used.
pub(crate) struct GrantedCharge {
    limiter: RateLimiter,
    /// `None` once the rate limit has taken it.
    charge: Option<Granted>,
    /// `None` if further attempts wait for their turn at the concurrency limit, which they reach before.
    again: Option<Arc<dyn ChargeAgain>>,
}

/// Boxed, so that calls without a schedule are not larger for it.
pub(super) type Granted = Box<Charged>;

/// What a schedule has given an attempt.
pub(crate) struct Charged {
    /// The charge, or why the call is never charged.
    pub(super) charge: Result<Unused, AcquireError>,
    /// Counts the attempt as in flight, if there is no permit that does.
    in_flight: Option<InFlight>,
}

/// The charge of a call that has not been made yet: settled as not used when it is dropped.
#[derive(Debug)]
pub(crate) struct Unused(Option<Estimate>);

/// Lets a call that makes a further attempt wait for its turn again.
pub(crate) trait ChargeAgain: Send + Sync {
    fn charge_again(self: Arc<Self>) -> Box<dyn PollCharge>;
}

/// A further attempt that waits for its turn. Dropping it gives up the turn.
pub(crate) trait PollCharge: Send + Sync {
    /// Ready when the attempt is charged. Without a charge, the attempt has to be charged as any call is.
    fn poll_charge(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Box<Charged>, AcquireError>>>;
}

/// What a rate limit finds for a call.
pub(super) enum Found {
    Charge(Granted),
    /// The call is a further attempt, and waits for its turn again.
    Again(Box<dyn PollCharge>),
}

thread_local! {
    static CURRENT: Cell<Option<GrantedCharge>> = const { Cell::new(None) };
    /// Whether there is a current one. Without a schedule there never is, and this is much quicker to read: it has no
    /// destructor.
    static IS_ANY: Cell<bool> = const { Cell::new(false) };
}

/// Exchanges the granted charge of this thread with `slot`. It is called before and after a call is made or polled.
#[cold]
pub(crate) fn swap(slot: &mut Option<GrantedCharge>) {
    IS_ANY.set(slot.is_some());
    *slot = CURRENT.replace(slot.take());
}

/// Grants a charge to the current call, for its next attempt.
pub(crate) fn grant(charge: GrantedCharge) {
    IS_ANY.set(true);
    let before = CURRENT.replace(Some(charge));
    // Settling it runs no user code.
    drop(before);
}

/// Whether the current call has been charged by `limiter` already.
pub(crate) fn is_charged(limiter: &RateLimiter) -> bool {
    IS_ANY.get() && with_current(limiter, |granted| granted.charge.is_some()).unwrap_or(false)
}

/// Whether something was granted to the current call, by any limiter.
#[inline]
pub(super) fn is_any() -> bool {
    IS_ANY.get()
}

/// Returns what was granted to the current call, if it was a charge of `limiter`.
pub(super) fn take(limiter: &RateLimiter) -> Option<Found> {
    with_current(limiter, |granted| match granted.charge.take() {
        Some(charge) => Some(Found::Charge(charge)),
        None => granted.again.clone().map(|again| Found::Again(again.charge_again())),
    })?
}

/// Returns how further attempts of the current call wait for their turn, and by which limiter they are charged.
pub(crate) fn current_again() -> Option<(RateLimiter, Arc<dyn ChargeAgain>)> {
    let granted = CURRENT.take()?;
    let again = granted.again.clone().map(|again| (granted.limiter.clone(), again));
    CURRENT.set(Some(granted));
    again
}

fn with_current<T>(limiter: &RateLimiter, f: impl FnOnce(&mut GrantedCharge) -> T) -> Option<T> {
    let mut granted = CURRENT.take()?;
    let output = granted.limiter.is_same(limiter).then(|| f(&mut granted));
    CURRENT.set(Some(granted));
    output
}

impl GrantedCharge {
    /// Grants what was charged, or why nothing ever is.
    pub(crate) fn new(limiter: RateLimiter, charge: Result<Estimate, AcquireError>) -> Self {
        let charge = charge.map(|estimate| Unused(Some(estimate)));
        Self {
            limiter,
            charge: Some(Box::new(Charged {
                charge,
                in_flight: None,
            })),
            again: None,
        }
    }

    /// Returns what is current while a call makes attempts outside the task that runs it, which all ask for their turn.
    pub(crate) const fn of_attempts(limiter: RateLimiter, again: Arc<dyn ChargeAgain>) -> Self {
        Self {
            limiter,
            charge: None,
            again: Some(again),
        }
    }

    /// Lets the rate limit do what a concurrency limit does for other calls: count the call as in flight, and let its
    /// further attempts wait for their turn.
    pub(crate) fn without_permit(&mut self, in_flight: Option<InFlight>, again: Arc<dyn ChargeAgain>) {
        if let Some(charge) = &mut self.charge {
            charge.in_flight = in_flight;
        }
        self.again = Some(again);
    }

    /// Tells `receipt` what the call has used of the charge, when that is known.
    pub(crate) fn tell(&mut self, receipt: Arc<dyn OnSettled>) {
        if let Some(estimate) = self.estimate_mut() {
            estimate.tell(receipt);
        }
    }

    /// Gives back what was charged above `cost`, because another call goes than the one that was expected.
    pub(crate) fn lower_to(&mut self, cost: Cost) {
        if let Some(estimate) = self.estimate_mut() {
            estimate.lower_to(cost);
        }
    }

    /// Returns what is granted to an attempt that its rate limit asks the schedule for.
    pub(crate) fn into_charged(self, in_flight: Option<InFlight>) -> Option<Box<Charged>> {
        let mut charged = self.charge?;
        charged.in_flight = in_flight;
        Some(charged)
    }

    fn estimate_mut(&mut self) -> Option<&mut Estimate> {
        self.charge.as_deref_mut()?.charge.as_mut().ok()?.0.as_mut()
    }

    /// Settles the charge as not used if no layer has taken it.
    pub(crate) fn give_back(&mut self) {
        self.charge = None;
    }
}

impl Charged {
    /// Returns what counts the attempt as in flight, to be kept until it has ended.
    pub(super) fn take_in_flight(&mut self) -> Option<InFlight> {
        self.in_flight.take()
    }
}

impl Unused {
    /// Returns what the call was charged.
    pub(super) fn cost(&self) -> Option<Cost> {
        self.0.as_ref().map(Estimate::cost)
    }

    /// Returns the charge of a call that is made now.
    pub(super) fn used(&mut self) -> Option<Estimate> {
        self.0.take()
    }
}

impl fmt::Debug for Charged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Charged")
            .field("charge", &self.charge)
            .finish_non_exhaustive()
    }
}

impl Drop for Unused {
    fn drop(&mut self) {
        if let Some(estimate) = self.0.take() {
            estimate.settle(Cost::none());
        }
    }
}
