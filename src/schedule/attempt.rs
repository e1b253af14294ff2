//! [`Attempt`]: a further attempt of a call that runs, which waits for its turn again.
//!
//! A retry keeps the place that its call had: it waits in its flow with the number and the arrival of its call, so it is the
//! first of its class there. It holds nothing meanwhile, and is charged again.

use super::{call::ScheduledCall, core::Ticket, tree::Started};
use crate::{
    panic,
    rate::{self, GrantedCharge},
    semaphore::{
        Claim, Permit,
        granted::{AskAgain, InFlight, PollPermit},
    },
};
use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker, ready},
};

/// An attempt that waits, shared by the layer that waits for it and the tree.
pub(crate) struct Attempt {
    call: Arc<ScheduledCall>,
    state: Mutex<AttemptState>,
}

#[derive(Default)]
struct AttemptState {
    granted: Option<GrantedAttempt>,
    waker: Option<Waker>,
    /// Whether the layer that has waited for the attempt was dropped.
    is_given_up: bool,
}

/// What an attempt was given. It loses the permit if it is not polled in time while others wait for one.
struct GrantedAttempt {
    permit: Result<Claim, Permit>,
    in_flight: Option<InFlight>,
    charge: Option<GrantedCharge>,
}

/// The end of an attempt that the layer holds.
struct Waiting {
    attempt: Arc<Attempt>,
    /// Its place in the tree. `None` until the attempt is polled, and after it was granted what it waits for.
    id: Option<usize>,
}

impl AskAgain for ScheduledCall {
    fn ask_again(self: Arc<Self>) -> Box<dyn PollPermit> {
        let attempt = Attempt {
            call: self.again(),
            state: Mutex::default(),
        };
        Box::new(Waiting {
            attempt: Arc::new(attempt),
            id: None,
        })
    }
}

impl Attempt {
    pub(super) const fn call(&self) -> &Arc<ScheduledCall> {
        &self.call
    }

    /// Gives the attempt, which was chosen, its permit and its charge. If its layer was dropped meanwhile, both are given back.
    pub(super) fn grant(
        &self,
        started: Started,
        permit: Option<Permit>,
        in_flight: Option<InFlight>,
        mut charge: Option<GrantedCharge>,
    ) {
        self.call.begin(started);
        if let Some(charge) = &mut charge {
            charge.tell(self.call.clone());
        }
        self.give(permit.unwrap_or_else(Permit::of_none), in_flight, charge);
    }

    /// Ends the wait of an attempt that gets nothing, but maybe the reason.
    pub(super) fn refuse(&self, reason: Option<GrantedCharge>) {
        self.give(Permit::of_none(), None, reason);
    }

    fn give(&self, permit: Permit, in_flight: Option<InFlight>, charge: Option<GrantedCharge>) {
        let granted = GrantedAttempt {
            permit: permit.into_claim(),
            in_flight,
            charge,
        };
        let mut state = self.lock();
        if state.is_given_up {
            drop(state);
            self.give_back(granted);
            return;
        }
        state.granted = Some(granted);
        let waker = state.waker.take();
        drop(state);
        waker.into_iter().for_each(panic::wake);
    }

    /// Returns the permit and the charge. If the permit is lost, gives the charge back.
    fn take(&self, granted: GrantedAttempt) -> Option<(Permit, Option<InFlight>, Option<GrantedCharge>)> {
        let GrantedAttempt {
            permit,
            in_flight,
            charge,
        } = granted;
        let permit = match permit {
            Ok(mut claim) => claim.confirm().ok(),
            Err(permit) => Some(permit),
        };
        let Some(permit) = permit else {
            drop(charge);
            self.call.give_back();
            return None;
        };
        if charge.is_none() {
            self.call.settle_as_charged();
        }
        Some((permit, in_flight, charge))
    }

    fn give_back(&self, granted: GrantedAttempt) {
        drop(granted);
        self.call.give_back();
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
                let Ok(id) = self.attempt.call.shared().push_attempt(&self.attempt) else {
                    // The keys of the call were forgotten, and there is no room for them.
                    return Poll::Ready(None);
                };
                self.id = Some(id);
            }
            let granted = ready!(self.poll_granted(cx));
            self.id = None;
            // An attempt that was not polled in time has lost its permit, and waits again.
            if let Some((permit, in_flight, charge)) = self.attempt.take(granted) {
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
            (Some(granted), _) => self.attempt.give_back(granted),
            (None, Some(id)) => {
                let ticket = Ticket::Attempt(self.attempt.clone());
                self.attempt.call.shared().cancel(id, &ticket);
            }
            (None, None) => {}
        }
    }
}
