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
        Permit,
        granted::{AskAgain, PollPermit},
    },
};
use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
};

/// What a further attempt of a call needs to wait for its turn.
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
    /// Whether nobody waits any more.
    is_given_up: bool,
}

/// What an attempt was given.
pub(super) struct GrantedAttempt {
    pub(super) permit: Permit,
    pub(super) charge: Option<(RateLimiter, Result<Estimate, AcquireError>)>,
    pub(super) receipt: Option<Box<Receipt>>,
}

/// The end of an attempt that the layer holds.
struct Waiting {
    shared: Arc<Shared>,
    attempt: Arc<Attempt>,
    /// Its place in the tree.
    id: usize,
    is_done: bool,
}

impl AskAgain for Again {
    fn ask_again(&self) -> Option<Box<dyn PollPermit>> {
        let attempt = Arc::new(Attempt::default());
        let id = self.shared.push_attempt(&self.call, self.seq, &attempt).ok()?;
        Some(Box::new(Waiting {
            shared: self.shared.clone(),
            attempt,
            id,
            is_done: false,
        }))
    }
}

impl Attempt {
    /// Gives the attempt what it waits for. If nobody waits any more, it is given back.
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
    /// Returns the charge, with what was charged in the tree.
    fn into_parts(self) -> (Permit, Option<GrantedCharge>) {
        let Self {
            permit,
            charge,
            receipt,
        } = self;
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
        (permit, charge)
    }

    fn give_back(self) {
        let Self {
            permit,
            charge,
            receipt,
        } = self;
        if let Some((_, Ok(estimate))) = charge {
            drop(Unused::new(estimate));
        }
        // Dropped without being settled, the receipt counts as not used.
        drop((receipt, permit));
    }
}

impl PollPermit for Waiting {
    fn poll_permit(&mut self, cx: &mut Context<'_>) -> Poll<Permit> {
        let mut state = self.attempt.lock();
        let Some(granted) = state.granted.take() else {
            let replaced = match &state.waker {
                Some(waker) if waker.will_wake(cx.waker()) => None,
                _ => state.waker.replace(cx.waker().clone()),
            };
            drop(state);
            drop(replaced);
            return Poll::Pending;
        };
        drop(state);
        self.is_done = true;
        let (permit, charge) = granted.into_parts();
        if let Some(charge) = charge {
            rate::grant_charge(charge);
        }
        Poll::Ready(permit)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if self.is_done {
            return;
        }
        let granted = {
            let mut state = self.attempt.lock();
            state.is_given_up = true;
            state.granted.take()
        };
        match granted {
            Some(granted) => granted.give_back(),
            None => self.shared.cancel(self.id, &Ticket::Attempt(self.attempt.clone())),
        }
    }
}
