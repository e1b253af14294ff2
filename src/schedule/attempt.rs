//! [`Attempt`]: a further attempt of a call that runs, which waits for its turn again.
//!
//! A retry keeps the place that its call had: it waits in its flow with the number and the arrival of its call, so it is the
//! first of its class there. It holds nothing meanwhile, and is charged again.

use super::{
    core::{ScheduledCall, Ticket},
    grant::Receipt,
    shared::Shared,
};
use crate::{
    error::AcquireError,
    panic,
    rate::{self, Estimate, GrantedCharge, RateLimiter, Unused},
    semaphore::{
        Claim, Permit,
        granted::{AskAgain, InFlight, PollPermit},
    },
    sync::{Mutex, MutexGuard},
};
use std::{
    fmt,
    sync::{Arc, PoisonError},
    task::{Context, Poll, Waker, ready},
};

/// What a further attempt of a call needs to wait for its turn.
#[derive(Clone)]
pub(super) struct Again {
    pub(super) shared: Arc<Shared>,
    pub(super) call: ScheduledCall,
    pub(super) seq: u64,
}

/// An attempt that waits, shared by the layer that waits for it and the tree.
#[derive(Default)]
pub(crate) struct Attempt {
    state: Mutex<AttemptState>,
}

#[derive(Default)]
struct AttemptState {
    granted: Option<GrantedAttempt>,
    waker: Option<Waker>,
    /// Whether the layer that has waited for the attempt was dropped.
    is_given_up: bool,
}

/// What an attempt was given.
pub(super) struct GrantedAttempt {
    permit: Result<Claim, Permit>,
    in_flight: Option<InFlight>,
    charge: Option<(RateLimiter, Result<Estimate, AcquireError>)>,
    receipt: Option<Box<Receipt>>,
}

/// The end of an attempt that the layer holds.
struct Waiting {
    again: Again,
    attempt: Arc<Attempt>,
    /// Its place in the tree. `None` until the attempt is polled, and after it was granted what it waits for.
    id: Option<usize>,
}

impl AskAgain for Again {
    fn ask_again(&self) -> Box<dyn PollPermit> {
        Box::new(Waiting {
            again: self.clone(),
            attempt: Arc::default(),
            id: None,
        })
    }
}

impl Attempt {
    /// Gives the attempt its permit and its charge. If its layer was dropped meanwhile, both are given back.
    pub(super) fn grant(&self, granted: GrantedAttempt) {
        let mut state = self.lock();
        if state.is_given_up {
            drop(state);
            granted.give_back();
            return;
        }
        state.granted = Some(granted);
        let waker = state.waker.take();
        drop(state);
        waker.into_iter().for_each(panic::wake);
    }

    fn lock(&self) -> MutexGuard<'_, AttemptState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attempt").finish_non_exhaustive()
    }
}

impl GrantedAttempt {
    /// Puts together what an attempt is given. It loses the permit if it is not polled in time while others wait for one.
    pub(super) fn new(
        permit: Permit,
        in_flight: Option<InFlight>,
        charge: Option<(RateLimiter, Result<Estimate, AcquireError>)>,
        receipt: Option<Box<Receipt>>,
    ) -> Self {
        Self {
            permit: permit.into_claim(),
            in_flight,
            charge,
            receipt,
        }
    }

    /// Returns the permit and the charge. If the permit is lost, gives the charge back.
    fn into_parts(self) -> Option<(Permit, Option<InFlight>, Option<GrantedCharge>)> {
        let Self {
            permit,
            in_flight,
            charge,
            receipt,
        } = self;
        let permit = match permit {
            Ok(mut claim) => claim.confirm().ok(),
            Err(permit) => Some(permit),
        };
        let Some(permit) = permit else {
            give_back(charge, receipt);
            return None;
        };
        let charge = match (charge, receipt) {
            (Some((limiter, Ok(estimate))), Some(receipt)) => {
                let unused = Unused::new(estimate.with_receipt(receipt));
                Some(GrantedCharge::new(limiter, Ok(unused)))
            }
            (Some((limiter, charge)), _) => Some(GrantedCharge::new(limiter, charge.map(Unused::new))),
            (None, Some(mut receipt)) => {
                receipt.settle_as_charged();
                None
            }
            (None, None) => None,
        };
        Some((permit, in_flight, charge))
    }

    fn give_back(self) {
        give_back(self.charge, self.receipt);
    }
}

/// Gives back a charge that no attempt needs.
fn give_back(charge: Option<(RateLimiter, Result<Estimate, AcquireError>)>, receipt: Option<Box<Receipt>>) {
    if let Some((_, Ok(estimate))) = charge {
        drop(Unused::new(estimate));
    }
    // Dropped without being settled, the receipt counts as not used.
    drop(receipt);
}

impl Waiting {
    /// Waits for what the attempt is given.
    fn poll_granted(&self, cx: &mut Context<'_>) -> Poll<GrantedAttempt> {
        let mut state = self.attempt.lock();
        if let Some(granted) = state.granted.take() {
            return Poll::Ready(granted);
        }
        let replaced = match &state.waker {
            Some(waker) if waker.will_wake(cx.waker()) => None,
            _ => state.waker.replace(cx.waker().clone()),
        };
        drop(state);
        drop(replaced);
        Poll::Pending
    }
}

impl PollPermit for Waiting {
    fn poll_permit(&mut self, cx: &mut Context<'_>) -> Poll<Option<(Permit, Option<InFlight>)>> {
        loop {
            if self.id.is_none() {
                let Again { shared, call, seq } = &self.again;
                let Ok(id) = shared.push_attempt(call, *seq, &self.attempt) else {
                    // The keys of the call were forgotten, and there is no room for them.
                    return Poll::Ready(None);
                };
                self.id = Some(id);
            }
            let granted = ready!(self.poll_granted(cx));
            self.id = None;
            // An attempt that was not polled in time has lost its permit, and waits again.
            if let Some((permit, in_flight, charge)) = granted.into_parts() {
                if let Some(charge) = charge {
                    rate::grant_charge(charge);
                }
                return Poll::Ready(Some((permit, in_flight)));
            }
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let granted = {
            let mut state = self.attempt.lock();
            state.is_given_up = true;
            state.granted.take()
        };
        match (granted, self.id) {
            (Some(granted), _) => granted.give_back(),
            (None, Some(id)) => self.again.shared.cancel(id, &Ticket::Attempt(self.attempt.clone())),
            (None, None) => {}
        }
    }
}
