//! [`Dispatcher`]: chooses the next call, when a permit and all budgets are there for it.

use super::{
    attempt::{Again, GrantedAttempt},
    core::{Head, ScheduledCall, Ticket},
    grant::{Grant, Receipt},
    shared::{Root, Shared},
    tree::Started,
};
use crate::{
    clock,
    error::AcquireError,
    rate::{Admission, Cost, Estimate, RateLimiter},
    semaphore::{Acquire, Permit, granted::InFlight},
};
use std::{
    sync::Arc,
    task::{Context, Poll},
};

/// Waits for what the first call of the tree needs, and takes it. It takes all or nothing, and another call may become the
/// first at any time until then.
pub(crate) struct Dispatcher {
    shared: Arc<Shared>,
    acquire: Option<Acquire>,
    limiter: Option<RateLimiter>,
    /// The place in the line of the limiter, in which other stacks may wait, too. `None` while no budget is waited for.
    admission: Option<Admission>,
}

/// What was chosen.
pub(crate) enum Chosen {
    /// The call of the queue with this key.
    Call(u32, ChosenCall),
    /// This call can never be admitted.
    Refused(u32, AcquireError),
    /// No call waits.
    Nothing,
}

/// A call that was chosen, and charged to the limits of its keys, and what it was given.
pub(crate) struct ChosenCall {
    started: Started,
    in_flight: Option<InFlight>,
    granted: Granted,
}

/// What a chosen call was given.
struct Granted {
    permit: Option<Permit>,
    charge: Option<(RateLimiter, Estimate)>,
    cost: Cost,
}

impl Dispatcher {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        let Root { permits, limiter } = shared.root();
        Self {
            shared,
            acquire: permits.map(|permits| permits.acquire()),
            limiter,
            admission: None,
        }
    }

    /// Chooses the next call. Pending until a call can go, or none waits: then the waker is woken, unless the call waits
    /// for [a limit of its key](Shared::next_at).
    pub(crate) fn poll_choose(&mut self, cx: &mut Context<'_>) -> Poll<Chosen> {
        loop {
            let Some(head) = self.shared.head() else {
                self.leave();
                return if self.shared.waiting() == 0 {
                    Poll::Ready(Chosen::Nothing)
                } else {
                    Poll::Pending
                };
            };
            match self.poll_grant(&head, cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(None) => {}
                Poll::Ready(Some(Ok(granted))) => {
                    let Some((started, in_flight, ticket)) = self.shared.start(&head) else {
                        granted.give_back();
                        continue;
                    };
                    match ticket {
                        Ticket::Call(call) => {
                            let chosen = ChosenCall {
                                started,
                                in_flight,
                                granted,
                            };
                            return Poll::Ready(Chosen::Call(call, chosen));
                        }
                        Ticket::Attempt(attempt) => {
                            attempt.grant(granted.for_attempt(started, in_flight, &self.shared))
                        }
                    }
                }
                Poll::Ready(Some(Err(error))) => {
                    if let Some(refused) = self.refuse(&head, error) {
                        return Poll::Ready(refused);
                    }
                }
            }
        }
    }

    /// Takes what the call needs, all of it or nothing. Ready without it if it was taken by others meanwhile.
    fn poll_grant(&mut self, head: &Head, cx: &mut Context<'_>) -> Poll<Option<Result<Granted, AcquireError>>> {
        let is_permitted = self
            .acquire
            .as_mut()
            .is_none_or(|acquire| acquire.poll_ready(cx).is_ready());
        if !is_permitted {
            // A place in the line of the limiter would hold up others who have a permit.
            self.admission = None;
            return Poll::Pending;
        }
        let now = clock::now();
        if let Some(limiter) = &self.limiter {
            let admission = self.admission.get_or_insert_with(|| limiter.admission(head.cost, true));
            admission.set_cost(head.cost);
            match admission.poll_turn(now, cx) {
                Poll::Pending => {
                    // So would a place in the line of the permits.
                    self.acquire.iter_mut().for_each(|acquire| drop(acquire.replace()));
                    return Poll::Pending;
                }
                Poll::Ready(Err(error)) => {
                    self.admission = None;
                    return Poll::Ready(Some(Err(error)));
                }
                Poll::Ready(Ok(())) => {}
            }
        }
        let permit = match &mut self.acquire {
            // Never fails, because this semaphore is never closed.
            Some(acquire) => match acquire.try_acquire() {
                Ok(Some(permit)) => Some(permit),
                Ok(None) | Err(_) => return Poll::Ready(None),
            },
            None => None,
        };
        let mut charge = None;
        if let (Some(admission), Some(limiter)) = (&mut self.admission, &self.limiter) {
            match admission.try_charge(now) {
                Ok(true) => {}
                Ok(false) => return Poll::Ready(None),
                Err(error) => {
                    self.admission = None;
                    return Poll::Ready(Some(Err(error)));
                }
            }
            charge = admission.estimate().map(|estimate| (limiter.clone(), estimate));
            self.admission = None;
        }
        Poll::Ready(Some(Ok(Granted {
            permit,
            charge,
            cost: head.cost,
        })))
    }

    /// Leaves the lines of the permits and the limiter.
    fn leave(&mut self) {
        self.admission = None;
        self.acquire.iter_mut().for_each(|acquire| drop(acquire.replace()));
    }

    /// Ends the wait of a call that the limiter never admits. Returns `None` if the call is an attempt, which has been told,
    /// or is not the first any more.
    fn refuse(&self, head: &Head, error: AcquireError) -> Option<Chosen> {
        let (started, in_flight, ticket) = self.shared.start(head)?;
        drop(in_flight);
        // It has not begun: nothing stays charged to the limits of its keys.
        self.shared.settle(started, Cost::none());
        match ticket {
            Ticket::Call(call) => Some(Chosen::Refused(call, error)),
            Ticket::Attempt(attempt) => {
                let charge = self.limiter.clone().map(|limiter| (limiter, Err(error)));
                attempt.grant(GrantedAttempt::new(Permit::of_none(), None, charge, None));
                None
            }
        }
    }
}

impl ChosenCall {
    /// Returns what the layers of the call find.
    pub(crate) fn into_grant(self, call: &ScheduledCall, shared: &Arc<Shared>) -> Grant {
        let Self {
            started,
            in_flight,
            granted,
        } = self;
        let again = Again {
            shared: shared.clone(),
            call: call.clone(),
            seq: started.seq,
        };
        let receipt = Box::new(Receipt::new(shared.clone(), started, granted.cost));
        Grant::new(granted.permit, in_flight, granted.charge, receipt, again)
    }

    /// Gives back what the call does not need, because it was cancelled just now.
    pub(crate) fn give_back(self, shared: &Shared) {
        shared.settle(self.started, Cost::none());
        self.granted.give_back();
    }
}

impl Granted {
    fn for_attempt(self, started: Started, in_flight: Option<InFlight>, shared: &Arc<Shared>) -> GrantedAttempt {
        let permit = self.permit.unwrap_or_else(Permit::of_none);
        let charge = self.charge.map(|(limiter, estimate)| (limiter, Ok(estimate)));
        GrantedAttempt::new(
            permit,
            in_flight,
            charge,
            Some(Box::new(Receipt::new(shared.clone(), started, self.cost))),
        )
    }

    /// Gives back what no call needs.
    fn give_back(self) {
        if let Some((_, estimate)) = self.charge {
            estimate.settle(Cost::none());
        }
    }
}
