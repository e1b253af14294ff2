//! [`Dispatcher`]: chooses the next call, when a permit and all budgets are there for it.

use super::{
    call::ScheduledCall,
    core::{CallKey, Eligible, Ticket},
    grant::Grant,
    shared::{Root, Shared, StartedCall},
    tree::Started,
};
use crate::{
    clock::{self, LazyNow},
    error::AcquireError,
    panic::catch_unwind,
    rate::{Admission, Cost, GrantedCharge, RateLimiter},
    semaphore::{Acquire, Permit, granted::InFlight},
};
use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};
use tokio::time::{Sleep, sleep_until};

/// Waits for what the first call of the tree needs, and takes it. It takes all or nothing, and another call may become the
/// first at any time until then.
pub(crate) struct Dispatcher {
    shared: Arc<Shared>,
    acquire: Option<Acquire>,
    limiter: Option<RateLimiter>,
    /// The place in the line of the limiter, in which other stacks may wait, too. `None` while no budget is waited for.
    admission: Option<Admission>,
    /// Wakes the dispatcher when an attempt could go while no call can, which has no timer of its own then.
    attempts: Option<Pin<Box<Sleep>>>,
}

/// What was chosen.
pub(crate) enum Chosen {
    /// The call of the queue with this key.
    Call(CallKey, ChosenCall),
    /// This call can never be admitted.
    Refused(CallKey, AcquireError),
    /// No call waits.
    Nothing,
}

/// A call that was chosen, and charged to the limits of its keys, and what it was given.
pub(crate) struct ChosenCall {
    started: Started,
    in_flight: Option<InFlight>,
    granted: Granted,
}

/// What a chosen call was given. Dropped, it is given back.
struct Granted {
    permit: Option<Permit>,
    charge: Option<GrantedCharge>,
}

impl Dispatcher {
    pub(super) fn new(shared: Arc<Shared>, root: Root) -> Self {
        let Root { permits, limiter, .. } = root;
        Self {
            shared,
            acquire: permits.map(|permits| permits.acquire()),
            limiter,
            admission: None,
            attempts: None,
        }
    }

    /// Chooses the next of the eligible calls. Pending until one can go, or none waits: then the waker is woken, unless the
    /// call waits for [a limit of its key](Shared::next_at).
    pub(crate) fn poll_choose(&mut self, eligible: Eligible, cx: &mut Context<'_>) -> Poll<Chosen> {
        loop {
            if let Some(started) = self.start_at_once(eligible) {
                match Self::give(started) {
                    Some(chosen) => return Poll::Ready(chosen),
                    None => continue,
                }
            }
            let Some(cost) = self.shared.head(eligible) else {
                self.leave();
                if eligible == Eligible::Attempts && self.poll_next_attempt(cx).is_ready() {
                    continue;
                }
                return if self.shared.waiting() == 0 {
                    Poll::Ready(Chosen::Nothing)
                } else {
                    Poll::Pending
                };
            };
            match self.poll_grant(&cost, cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(None) => {}
                Poll::Ready(Some(Ok(granted))) => {
                    // Another call of the same cost may have come in between, which may go as well. What is not taken is
                    // dropped without the lock, since that may wake others.
                    let mut granted = Some(granted);
                    let take = |of: &Cost, _: &mut LazyNow| granted.take_if(|_| *of == cost);
                    let started = self.shared.start(eligible, take);
                    if let Some(chosen) = started.and_then(Self::give) {
                        return Poll::Ready(chosen);
                    }
                }
                Poll::Ready(Some(Err(error))) => {
                    if let Some(refused) = self.refuse(&cost, eligible, error) {
                        return Poll::Ready(refused);
                    }
                }
            }
        }
    }

    /// Begins the first call if all that it needs is there, which is the case of most calls while the limits are not
    /// reached: then nothing is waited for, and the tree is locked once.
    fn start_at_once(&mut self, eligible: Eligible) -> Option<StartedCall<Granted>> {
        let Self {
            shared,
            acquire,
            limiter,
            admission,
            ..
        } = self;
        // A dispatcher that has a place in the line of the limiter keeps it.
        if admission.is_some() || shared.waiting() == 0 {
            return None;
        }
        let mut permit = None;
        let mut take_permit = || match acquire {
            Some(acquire) => {
                permit = acquire.try_acquire_uncontended();
                permit.is_some()
            }
            None => true,
        };
        let started = shared.start(eligible, |cost, now| match limiter {
            Some(limiter) => {
                let estimate = limiter.try_charge(cost, now.get(), take_permit)?;
                Some(Some(GrantedCharge::new(limiter.clone(), Ok(estimate))))
            }
            None => take_permit().then_some(None),
        });
        // A permit for which the limiter was not charged after all is given back here, without the lock.
        started.map(|started| started.map(|charge| Granted { permit, charge }))
    }

    /// Gives a call that has begun what was taken for it. Returns a call of the queue.
    fn give(started: StartedCall<Granted>) -> Option<Chosen> {
        let StartedCall {
            started,
            in_flight,
            ticket,
            granted,
        } = started;
        match ticket {
            Ticket::Call(call) => Some(Chosen::Call(
                call,
                ChosenCall {
                    started,
                    in_flight,
                    granted,
                },
            )),
            Ticket::Attempt(attempt) => {
                let Granted { permit, charge } = granted;
                attempt.grant(started, permit, in_flight, charge);
                None
            }
        }
    }

    /// Takes the call out that was the first when [`poll_choose`](Self::poll_choose) panicked, because its limits can only be
    /// waited for in another runtime. Returns its key, and `None` if it is an attempt: that one is let go with nothing, and
    /// panics where it waits itself.
    pub(crate) fn take_after_panic(&mut self, eligible: Eligible) -> Option<CallKey> {
        self.admission = None;
        self.acquire.iter_mut().for_each(|acquire| drop(acquire.replace()));
        let StartedCall { started, ticket, .. } = self.shared.start(eligible, |_, _| Some(()))?;
        self.shared.give_back(started);
        match ticket {
            Ticket::Call(call) => Some(call),
            Ticket::Attempt(attempt) => {
                attempt.refuse(None);
                None
            }
        }
    }

    /// Waits until the limits of the keys let the first attempt go, if that is known.
    fn poll_next_attempt(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(at) = self.shared.next_attempt_at() else {
            return Poll::Pending;
        };
        // Without timers in the runtime, the attempt goes when something else changes.
        let polled = catch_unwind(|| {
            let timer = self.attempts.get_or_insert_with(|| Box::pin(sleep_until(at)));
            timer.as_mut().reset(at);
            timer.as_mut().poll(cx)
        });
        polled.unwrap_or(Poll::Pending)
    }

    /// Takes what the call needs, all of it or nothing. Ready without it if it was taken by others meanwhile.
    fn poll_grant(&mut self, cost: &Cost, cx: &mut Context<'_>) -> Poll<Option<Result<Granted, AcquireError>>> {
        let is_permitted = self
            .acquire
            .as_mut()
            .is_none_or(|acquire| acquire.poll_ready(cx).is_ready());
        if !is_permitted {
            // A place in the line of the limiter would hold up others who have a permit.
            self.leave_limiter();
            return Poll::Pending;
        }
        let now = clock::now();
        if let Some(limiter) = &self.limiter {
            let new = || limiter.admission(*cost, true);
            let admission = self.admission.get_or_insert_with(new);
            if !admission.set_cost(*cost) {
                std::mem::replace(admission, new()).give_back();
            }
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
            charge = admission
                .estimate()
                .map(|estimate| GrantedCharge::new(limiter.clone(), Ok(estimate)));
            self.admission = None;
        }
        Poll::Ready(Some(Ok(Granted { permit, charge })))
    }

    /// Leaves the lines of the permits and the limiter.
    fn leave(&mut self) {
        self.leave_limiter();
        self.acquire.iter_mut().for_each(|acquire| drop(acquire.replace()));
    }

    fn leave_limiter(&mut self) {
        self.admission.take().into_iter().for_each(Admission::give_back);
    }

    /// Ends the wait of a call that the limiter never admits. Returns `None` if the call is an attempt, which has been told,
    /// or is not the first any more.
    fn refuse(&self, cost: &Cost, eligible: Eligible, error: AcquireError) -> Option<Chosen> {
        let first = self.shared.start(eligible, |of, _| (of == cost).then_some(()))?;
        let StartedCall { started, ticket, .. } = first;
        // It has not begun: nothing stays charged to the limits of its keys.
        self.shared.give_back(started);
        match ticket {
            Ticket::Call(call) => Some(Chosen::Refused(call, error)),
            Ticket::Attempt(attempt) => {
                let limiter = self.limiter.clone();
                attempt.refuse(limiter.map(|limiter| GrantedCharge::new(limiter, Err(error))));
                None
            }
        }
    }
}

impl ChosenCall {
    /// Returns what the layers of the call find.
    pub(crate) fn into_grant(self, call: Arc<ScheduledCall>) -> Grant {
        let Self {
            started,
            in_flight,
            granted: Granted { permit, charge },
        } = self;
        call.begin(started);
        Grant::new(call, permit, in_flight, charge)
    }

    /// Gives back what the call does not need, because it was cancelled just now.
    pub(crate) fn give_back(self, shared: &Shared) {
        shared.give_back(self.started);
    }
}
