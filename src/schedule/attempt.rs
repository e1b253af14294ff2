//! [`Attempt`]: a further attempt of a call that runs, which waits for its turn again.
//!
//! A retry keeps the place that its call had: it waits in its flow with the number and the arrival of its call, so it is the
//! first of its class there. It holds nothing meanwhile, and is charged again.

use super::{call::ScheduledCall, core::Ticket, tree::Started};
use crate::{
    error::AcquireError,
    panic,
    rate::{self, ChargeAgain, Charged, GrantedCharge, PollCharge},
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

/// An attempt that waits, shared by the layer that waits for it and the tree.
pub(crate) struct Attempt {
    /// What the schedule has to know about the attempt: the same as about its call, but it is settled on its own.
    call: Arc<ScheduledCall>,
    state: Mutex<AttemptState>,
}

#[derive(Default)]
struct AttemptState {
    /// What the attempt was given, or why it never goes.
    end: Option<Result<GrantedAttempt, AcquireError>>,
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

/// What an attempt that goes has: a permit, what counts it as in flight, and a charge.
type Parts = (Permit, Option<InFlight>, Option<GrantedCharge>);

/// The end of an attempt that the layer holds.
struct Waiting {
    /// The call that makes the attempt.
    of: Arc<ScheduledCall>,
    attempt: Arc<Attempt>,
    /// Its place in the tree. `None` until the attempt is polled, and after it was granted what it waits for.
    id: Option<usize>,
    /// Whether the attempt was refused. It stays pending then, until its call has failed.
    is_refused: bool,
}

// === impl ScheduledCall ===

impl AskAgain for ScheduledCall {
    fn ask_again(self: Arc<Self>) -> Box<dyn PollPermit> {
        Box::new(Waiting::new(self))
    }

    fn expect_attempts(&self) {
        Self::expect_attempts(self);
    }

    fn poll_refused(&self, cx: &mut Context<'_>) -> Poll<AcquireError> {
        Self::poll_refused(self, cx)
    }
}

impl ChargeAgain for ScheduledCall {
    fn charge_again(self: Arc<Self>) -> Box<dyn PollCharge> {
        Box::new(Waiting::new(self))
    }
}

// === impl Attempt ===

impl Attempt {
    pub(super) const fn call(&self) -> &Arc<ScheduledCall> {
        &self.call
    }

    /// Gives the attempt, which was chosen, its permit and its charge. If its layer was dropped meanwhile, both are given
    /// back.
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
        self.end(Ok(GrantedAttempt {
            permit: permit.unwrap_or_else(Permit::of_none).into_claim(),
            in_flight,
            charge,
        }));
    }

    /// Lets the attempt go with nothing.
    pub(super) fn let_go(&self) {
        self.end(Ok(GrantedAttempt {
            permit: Err(Permit::of_none()),
            in_flight: None,
            charge: None,
        }));
    }

    /// Tells the attempt that its limits never let it go.
    pub(super) fn refuse(&self, error: AcquireError) {
        self.end(Err(error));
    }

    fn end(&self, end: Result<GrantedAttempt, AcquireError>) {
        let mut state = self.lock();
        if state.is_given_up {
            drop(state);
            self.give_back(end);
            return;
        }
        state.end = Some(end);
        let waker = state.waker.take();
        drop(state);
        waker.into_iter().for_each(panic::wake);
    }

    /// Returns the permit and the charge. If the permit is lost, gives the charge back.
    fn take(&self, granted: GrantedAttempt) -> Option<Parts> {
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

    /// Gives back what the attempt does not need.
    fn give_back(&self, end: Result<GrantedAttempt, AcquireError>) {
        drop(end);
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

// === impl Waiting ===

impl Waiting {
    fn new(of: Arc<ScheduledCall>) -> Self {
        of.expect_attempts();
        let attempt = Attempt {
            call: of.again(),
            state: Mutex::default(),
        };
        Self {
            of,
            attempt: Arc::new(attempt),
            id: None,
            is_refused: false,
        }
    }

    /// Waits for the turn of the attempt. Ready with `None` if it cannot wait, because the keys of the call were forgotten and
    /// there is no room for them.
    fn poll_turn(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Parts, AcquireError>>> {
        loop {
            if self.id.is_none() {
                let Ok(id) = self.of.shared().push_attempt(&self.attempt) else {
                    return Poll::Ready(None);
                };
                self.id = Some(id);
            }
            let end = ready!(self.poll_end(cx));
            self.id = None;
            match end.map(|granted| self.attempt.take(granted)) {
                Ok(Some(parts)) => return Poll::Ready(Some(Ok(parts))),
                // An attempt that was not polled in time has lost its permit, and waits again.
                Ok(None) => {}
                Err(error) => return Poll::Ready(Some(Err(error))),
            }
        }
    }

    fn poll_end(&self, cx: &mut Context<'_>) -> Poll<Result<GrantedAttempt, AcquireError>> {
        let mut state = self.attempt.lock();
        if let Some(end) = state.end.take() {
            return Poll::Ready(end);
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
        if self.is_refused {
            return Poll::Pending;
        }
        let (permit, in_flight, charge) = match ready!(self.poll_turn(cx)) {
            None => return Poll::Ready(None),
            Some(Ok(parts)) => parts,
            Some(Err(error)) => match self.of.shared().root().limiter {
                // The rate limit below fails with the error.
                Some(limiter) => {
                    let charge = GrantedCharge::new(limiter, Err(error));
                    (Permit::of_none(), None, Some(charge))
                }
                None => {
                    self.is_refused = true;
                    self.of.refuse(error);
                    return Poll::Pending;
                }
            },
        };
        charge.into_iter().for_each(rate::grant_charge);
        Poll::Ready(Some((permit, in_flight)))
    }
}

impl PollCharge for Waiting {
    fn poll_charge(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Box<Charged>, AcquireError>>> {
        Poll::Ready(match ready!(self.poll_turn(cx)) {
            Some(Ok((_, in_flight, charge))) => charge.and_then(|charge| charge.into_charged(in_flight)).map(Ok),
            Some(Err(error)) => Some(Err(error)),
            None => None,
        })
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let end = {
            let mut state = self.attempt.lock();
            state.is_given_up = true;
            state.end.take()
        };
        match (end, self.id) {
            (Some(end), _) => self.attempt.give_back(end),
            (None, Some(id)) => self.of.shared().cancel(id, &Ticket::Attempt(self.attempt.clone())),
            (None, None) => {}
        }
    }
}
