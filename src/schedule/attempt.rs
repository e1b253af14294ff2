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
    rate::{self, ChargeAgain, Charged, Estimate, GrantedCharge, PollCharge, RateLimiter, Unused},
    semaphore::{
        Claim, Permit,
        granted::{AskAgain, InFlight, PollPermit},
    },
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
};
use std::{
    fmt,
    sync::{Arc, PoisonError},
    task::{Context, Poll, Waker, ready},
};

/// What further attempts of a call need to wait for their turn.
pub(super) struct Again {
    shared: Arc<Shared>,
    call: ScheduledCall,
    seq: u64,
    refusal: Mutex<Refusal>,
    /// Whether a further attempt was made or may be made. Before, none can be refused.
    has_attempts: AtomicBool,
}

/// A refusal that no layer of the call can fail with.
#[derive(Default)]
struct Refusal {
    error: Option<AcquireError>,
    waker: Option<Waker>,
}

/// An attempt that waits, shared by the layer that waits for it and the tree.
#[derive(Default)]
pub(crate) struct Attempt {
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

/// What an attempt was given.
pub(super) struct GrantedAttempt {
    permit: Result<Claim, Permit>,
    in_flight: Option<InFlight>,
    charge: Option<(RateLimiter, Estimate)>,
    receipt: Option<Box<Receipt>>,
}

/// What an attempt that goes has: a permit, what counts it as in flight, and a charge.
type Parts = (Permit, Option<InFlight>, Option<(RateLimiter, Unused)>);

/// The end of an attempt that the layer holds.
struct Waiting {
    again: Arc<Again>,
    attempt: Arc<Attempt>,
    /// Its place in the tree. `None` until the attempt is polled, and after it was granted what it waits for.
    id: Option<usize>,
    /// Whether the attempt was refused. It stays pending then, until its call has failed.
    is_refused: bool,
}

// === impl Again ===

impl Again {
    pub(super) fn new(shared: Arc<Shared>, call: ScheduledCall, seq: u64) -> Self {
        Self {
            shared,
            call,
            seq,
            refusal: Mutex::default(),
            has_attempts: AtomicBool::new(false),
        }
    }

    fn wait(self: Arc<Self>) -> Waiting {
        self.expect_attempts();
        Waiting {
            again: self,
            attempt: Arc::default(),
            id: None,
            is_refused: false,
        }
    }

    /// Lets the call fail with `error`.
    fn refuse(&self, error: AcquireError) {
        let waker = {
            let mut refusal = self.refusal.lock().unwrap_or_else(PoisonError::into_inner);
            refusal.error.get_or_insert(error);
            refusal.waker.take()
        };
        waker.into_iter().for_each(panic::wake);
    }
}

impl AskAgain for Again {
    fn ask_again(self: Arc<Self>) -> Box<dyn PollPermit> {
        Box::new(self.wait())
    }

    fn expect_attempts(&self) {
        self.has_attempts.store(true, Ordering::Release);
    }

    fn poll_refused(&self, cx: &mut Context<'_>) -> Poll<AcquireError> {
        if !self.has_attempts.load(Ordering::Acquire) {
            return Poll::Pending;
        }
        let mut refusal = self.refusal.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(error) = refusal.error.take() {
            return Poll::Ready(error);
        }
        let replaced = refusal.waker.replace(cx.waker().clone());
        drop(refusal);
        drop(replaced);
        Poll::Pending
    }
}

impl ChargeAgain for Again {
    fn charge_again(self: Arc<Self>) -> Box<dyn PollCharge> {
        Box::new(self.wait())
    }
}

// === impl Attempt ===

impl Attempt {
    /// Gives the attempt its permit and its charge. If its layer was dropped meanwhile, both are given back.
    pub(super) fn grant(&self, granted: GrantedAttempt) {
        self.end(Ok(granted));
    }

    /// Tells the attempt that its limits never let it go.
    pub(super) fn refuse(&self, error: AcquireError) {
        self.end(Err(error));
    }

    fn end(&self, end: Result<GrantedAttempt, AcquireError>) {
        let mut state = self.lock();
        if state.is_given_up {
            drop(state);
            end.into_iter().for_each(GrantedAttempt::give_back);
            return;
        }
        state.end = Some(end);
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
        charge: Option<(RateLimiter, Estimate)>,
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
    fn into_parts(self) -> Option<Parts> {
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
            (Some((limiter, estimate)), Some(receipt)) => Some((limiter, Unused::new(estimate.with_receipt(receipt)))),
            (Some((limiter, estimate)), None) => Some((limiter, Unused::new(estimate))),
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
fn give_back(charge: Option<(RateLimiter, Estimate)>, receipt: Option<Box<Receipt>>) {
    if let Some((_, estimate)) = charge {
        drop(Unused::new(estimate));
    }
    // Dropped without being settled, the receipt counts as not used.
    drop(receipt);
}

impl Waiting {
    /// Waits for the turn of the attempt. Ready with `None` if it cannot wait, because the keys of the call were forgotten and
    /// there is no room for them.
    fn poll_turn(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Parts, AcquireError>>> {
        loop {
            if self.id.is_none() {
                let Again { shared, call, seq, .. } = &*self.again;
                let Ok(id) = shared.push_attempt(call, *seq, &self.attempt) else {
                    return Poll::Ready(None);
                };
                self.id = Some(id);
            }
            let end = ready!(self.poll_end(cx));
            self.id = None;
            match end.map(GrantedAttempt::into_parts) {
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
        let (permit, in_flight, limiter, charge) = match ready!(self.poll_turn(cx)) {
            None => return Poll::Ready(None),
            Some(Ok((permit, in_flight, None))) => return Poll::Ready(Some((permit, in_flight))),
            Some(Ok((permit, in_flight, Some((limiter, charge))))) => (permit, in_flight, limiter, Ok(charge)),
            Some(Err(error)) => match self.again.shared.root().limiter {
                // The rate limit below fails with the error.
                Some(limiter) => (Permit::of_none(), None, limiter, Err(error)),
                None => {
                    self.is_refused = true;
                    self.again.refuse(error);
                    return Poll::Pending;
                }
            },
        };
        rate::grant_charge(GrantedCharge::new(limiter, Charged::new(charge, None), None));
        Poll::Ready(Some((permit, in_flight)))
    }
}

impl PollCharge for Waiting {
    fn poll_charge(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Charged, AcquireError>>> {
        Poll::Ready(match ready!(self.poll_turn(cx)) {
            Some(Ok((_, in_flight, Some((_, charge))))) => Some(Ok(Charged::new(Ok(charge), in_flight))),
            Some(Ok((_, _, None))) | None => None,
            Some(Err(error)) => Some(Err(error)),
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
            (Some(end), _) => end.into_iter().for_each(GrantedAttempt::give_back),
            (None, Some(id)) => self.again.shared.cancel(id, &Ticket::Attempt(self.attempt.clone())),
            (None, None) => {}
        }
    }
}
