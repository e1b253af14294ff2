//! A charge that was made for a call before it reached the rate limit: see [`GrantedCharge`].
//!
//! A schedule charges a call when it chooses it, outside all layers. The [`RateLimit`](super::RateLimit) that the call
//! reaches finds the charge here, and does not charge the call again.

use super::{
    cost::Cost,
    estimate::{Estimate, OnSettled},
    limiter::RateLimiter,
};
use crate::error::AcquireError;
use std::{cell::Cell, sync::Arc};

/// The charge that a schedule has made for the call which is made or polled on this thread. A charge that no rate limit
/// takes is settled as not used.
pub(crate) struct GrantedCharge {
    limiter: RateLimiter,
    /// The charge, or why the call is never charged. `None` once the rate limit has taken it.
    charge: Option<Granted>,
}

/// The charge, or why the call is never charged. Boxed, so that calls without a schedule are not larger for it.
pub(super) type Granted = Box<Result<Unused, AcquireError>>;

/// The charge of a call that has not been made yet: settled as not used when it is dropped.
#[derive(Debug)]
pub(crate) struct Unused(Option<Estimate>);

thread_local! {
    static CURRENT: Cell<Option<GrantedCharge>> = const { Cell::new(None) };
    /// Whether there is a current one. Without a schedule there never is, and this is much quicker to read: it has no
    /// destructor.
    static IS_ANY: Cell<bool> = const { Cell::new(false) };
}

/// Exchanges the granted charge of this thread with `slot`. It is called before and after a call is made or polled.
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

/// Returns the charge that was made for the current call, if it was made by `limiter`.
#[inline]
pub(super) fn take(limiter: &RateLimiter) -> Option<Granted> {
    if !IS_ANY.get() {
        return None;
    }
    take_current(limiter)
}

#[cold]
fn take_current(limiter: &RateLimiter) -> Option<Granted> {
    with_current(limiter, |granted| granted.charge.take())?
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
        let unused = charge.map(|estimate| Unused(Some(estimate)));
        Self {
            limiter,
            charge: Some(Box::new(unused)),
        }
    }

    /// Tells `receipt` what the call has used of the charge, when that is known.
    pub(crate) fn tell(&mut self, receipt: Arc<dyn OnSettled>) {
        if let Some(Ok(Unused(Some(estimate)))) = self.charge.as_deref_mut() {
            estimate.tell(receipt);
        }
    }

    /// Settles the charge as not used if no layer has taken it.
    pub(crate) fn give_back(&mut self) {
        self.charge = None;
    }
}

impl Unused {
    /// Returns the charge of a call that is made now.
    pub(super) fn used(&mut self) -> Option<Estimate> {
        self.0.take()
    }
}

impl Drop for Unused {
    fn drop(&mut self) {
        if let Some(estimate) = self.0.take() {
            estimate.settle(Cost::none());
        }
    }
}
