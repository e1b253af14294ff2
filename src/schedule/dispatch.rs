//! [`Dispatcher`]: chooses the next call, when a permit and all budgets are there for it.

use super::{
    batch::{Batch, MAX_BATCH},
    call::ScheduledCall,
    core::{CallKey, Eligible, Ticket},
    grant::Grant,
    shared::{Root, Shared, StartedCall},
    tree::Started,
};
use crate::{
    clock,
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
    limiter: Option<Line>,
    /// Wakes the dispatcher when an attempt could go while no call can, which has no timer of its own then.
    attempts: Option<Pin<Box<Sleep>>>,
}

/// How the dispatcher waits for the limiter.
enum Line {
    /// With one place in the line of the limiter, in which other stacks may wait, too. `None` while no budget is waited for.
    Local(RateLimiter, Option<Admission>),
    /// For several charges at a time, because each takes a round trip to the store of the limiter.
    Shared(RateLimiter, Batch),
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
            limiter: limiter.map(Line::new),
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
            let Some(head) = self.shared.head(eligible) else {
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
            match self.poll_grant(&head, eligible, cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(None) => {}
                Poll::Ready(Some((cost, Ok(granted)))) => {
                    let started = self.start_charged(&cost, granted, eligible);
                    if let Some(chosen) = started.and_then(Self::give) {
                        return Poll::Ready(chosen);
                    }
                }
                Poll::Ready(Some((cost, Err(error)))) => {
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
            ..
        } = self;
        let limiter = match limiter {
            None => None,
            Some(Line::Local(limiter, None)) => Some(&*limiter),
            // A dispatcher that has a place in the line of the limiter keeps it, and a store has to be asked first.
            Some(Line::Local(_, Some(_)) | Line::Shared(..)) => return None,
        };
        if shared.waiting() == 0 {
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
        let started = shared.start(1, eligible, |cost, now| match limiter {
            Some(limiter) => {
                let estimate = limiter.try_charge(cost, now.get(), &mut take_permit)?;
                Some(Some(GrantedCharge::new(limiter.clone(), Ok(estimate))))
            }
            None => take_permit().then_some(None),
        });
        // A permit for which the limiter was not charged after all is given back here, without the lock.
        started.map(|started| started.map(|charge| Granted { permit, charge }))
    }

    /// Begins a call for which `cost` was charged. Returns `None` if there is none any more.
    fn start_charged(&self, cost: &Cost, granted: Granted, eligible: Eligible) -> Option<StartedCall<Granted>> {
        // What is not taken is dropped without the lock, since that may wake others.
        let mut granted = Some(granted);
        let started = self.start_for(cost, eligible, |of| granted.take().map(|granted| (granted, *of)))?;
        // So does what is given back of a charge.
        Some(started.map(|(mut granted, of)| {
            if let Some(charge) = granted.charge.as_mut().filter(|_| of != *cost) {
                charge.lower_to(of);
            }
            granted
        }))
    }

    /// Begins a call for which `cost` was charged or refused: the first one if it costs as much. A shared limiter was asked
    /// for several, so the first one goes there that costs no more.
    fn start_for<G>(
        &self,
        cost: &Cost,
        eligible: Eligible,
        mut take: impl FnMut(&Cost) -> Option<G>,
    ) -> Option<StartedCall<G>> {
        let is_shared = matches!(self.limiter, Some(Line::Shared(..)));
        let among = if is_shared { MAX_BATCH } else { 1 };
        self.shared.start(among, eligible, |of, _| {
            // Another call of the same cost may have come in between, which may go as well.
            let fits = if is_shared { of.is_within(cost) } else { of == cost };
            if fits { take(of) } else { None }
        })
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
        self.leave();
        let StartedCall { started, ticket, .. } = self.shared.start(1, eligible, |_, _| Some(()))?;
        self.shared.give_back(started);
        match ticket {
            Ticket::Call(call) => Some(call),
            Ticket::Attempt(attempt) => {
                attempt.let_go();
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

    /// Takes what the call needs, all of it or nothing. Ready without it if it was taken by others meanwhile, and
    /// otherwise with the cost that was charged, or that the limiter refuses.
    fn poll_grant(
        &mut self,
        head: &Cost,
        eligible: Eligible,
        cx: &mut Context<'_>,
    ) -> Poll<Option<(Cost, Result<Granted, AcquireError>)>> {
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
        let mut cost = *head;
        let mut charged = None;
        let polled = match &mut self.limiter {
            None => Poll::Ready(Ok(())),
            Some(Line::Local(limiter, admission)) => {
                let admission = admission.get_or_insert_with(|| limiter.schedule_admission(cost));
                admission.set_cost(cost);
                admission.poll_turn(now, cx)
            }
            Some(Line::Shared(limiter, batch)) => {
                // Set before the calls are looked at, so that none is missed that comes meanwhile.
                self.shared.watch_arrivals(true);
                let permits = self.acquire.as_ref().map(Acquire::semaphore);
                let free = permits.map_or(MAX_BATCH, |permits| permits.total().saturating_sub(permits.held()));
                let most = self.shared.waiting().min(free).clamp(1, MAX_BATCH);
                batch.ask_for(most, head, |most| self.shared.upcoming(most, eligible));
                if batch.is_full() {
                    self.shared.watch_arrivals(false);
                }
                batch.poll(now, cx).map(|(of, result)| {
                    cost = of;
                    charged = result?.map(|estimate| GrantedCharge::new(limiter.clone(), Ok(estimate)));
                    Ok(())
                })
            }
        };
        match polled {
            Poll::Pending => {
                // So would a place in the line of the permits.
                self.acquire.iter_mut().for_each(|acquire| drop(acquire.replace()));
                return Poll::Pending;
            }
            Poll::Ready(Err(error)) => {
                self.leave_turn();
                return Poll::Ready(Some((cost, Err(error))));
            }
            Poll::Ready(Ok(())) => {}
        }
        let mut granted = Granted {
            permit: None,
            charge: charged,
        };
        if let Some(acquire) = &mut self.acquire {
            // Never fails, because this semaphore is never closed.
            let Ok(Some(permit)) = acquire.try_acquire() else {
                return Poll::Ready(None);
            };
            granted.permit = Some(permit);
        }
        if let Some(Line::Local(limiter, turn)) = &mut self.limiter {
            let Some(admission) = turn else {
                return Poll::Ready(None);
            };
            match admission.try_charge(now) {
                Ok(true) => {}
                Ok(false) => return Poll::Ready(None),
                Err(error) => {
                    *turn = None;
                    return Poll::Ready(Some((cost, Err(error))));
                }
            }
            granted.charge = admission
                .estimate()
                .map(|estimate| GrantedCharge::new(limiter.clone(), Ok(estimate)));
            *turn = None;
        }
        Poll::Ready(Some((cost, Ok(granted))))
    }

    /// Leaves the lines of the permits and the limiter.
    fn leave(&mut self) {
        self.leave_limiter();
        self.acquire.iter_mut().for_each(|acquire| drop(acquire.replace()));
    }

    fn leave_limiter(&mut self) {
        if let Some(Line::Shared(_, batch)) = &mut self.limiter {
            batch.leave();
            self.shared.watch_arrivals(false);
        }
        self.leave_turn();
    }

    /// Leaves the line of a limiter of this process.
    fn leave_turn(&mut self) {
        if let Some(Line::Local(_, admission)) = &mut self.limiter {
            *admission = None;
        }
    }

    /// Ends the wait of a call that the limiter never admits. Returns `None` if the call is an attempt, which has been told,
    /// or is not the first any more.
    fn refuse(&self, cost: &Cost, eligible: Eligible, error: AcquireError) -> Option<Chosen> {
        let StartedCall { started, ticket, .. } = self.start_for(cost, eligible, |_| Some(()))?;
        // It has not begun: nothing stays charged to the limits of its keys.
        self.shared.give_back(started);
        match ticket {
            Ticket::Call(call) => Some(Chosen::Refused(call, error)),
            Ticket::Attempt(attempt) => {
                attempt.refuse(error);
                None
            }
        }
    }
}

impl Line {
    fn new(limiter: RateLimiter) -> Self {
        if limiter.is_shared() {
            let batch = Batch::new(limiter.clone());
            Self::Shared(limiter, batch)
        } else {
            Self::Local(limiter, None)
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
