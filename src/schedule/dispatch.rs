//! [`Dispatcher`]: chooses the next call, when a permit and all budgets are there for it.

use super::{
    attempt::{Again, GrantedAttempt},
    batch::{Batch, MAX_BATCH},
    core::{Eligible, ScheduledCall, Ticket},
    grant::{Grant, Receipt},
    shared::{Root, Shared},
    tree::Started,
};
use crate::{
    clock,
    error::AcquireError,
    panic::catch_unwind,
    rate::{Admission, Cost, Estimate, RateLimiter},
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
    Call(u32, Box<ChosenCall>),
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
    pub(super) fn new(shared: Arc<Shared>, root: Root) -> Self {
        let Root { permits, limiter, .. } = root;
        Self {
            shared,
            acquire: permits.map(|permits| permits.acquire()),
            limiter: limiter.map(Line::new),
            attempts: None,
        }
    }

    /// Among how many calls that go next the one is looked for that costs what was charged.
    const fn among(&self) -> usize {
        match self.limiter {
            Some(Line::Shared(..)) => MAX_BATCH,
            Some(Line::Local(..)) | None => 1,
        }
    }

    /// Chooses the next of the eligible calls. Pending until one can go, or none waits: then the waker is woken, unless the
    /// call waits for [a limit of its key](Shared::next_at).
    pub(crate) fn poll_choose(&mut self, eligible: Eligible, cx: &mut Context<'_>) -> Poll<Chosen> {
        loop {
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
                Poll::Ready(Some(Ok(mut granted))) => {
                    let Some((started, in_flight, ticket)) = self.shared.start(&granted.cost, self.among(), eligible)
                    else {
                        granted.give_back();
                        continue;
                    };
                    granted.lower_to(started.cost());
                    match ticket {
                        Ticket::Call(call) => {
                            let chosen = ChosenCall {
                                started,
                                in_flight,
                                granted,
                            };
                            return Poll::Ready(Chosen::Call(call, Box::new(chosen)));
                        }
                        Ticket::Attempt(attempt) => {
                            attempt.grant(granted.for_attempt(started, in_flight, &self.shared))
                        }
                    }
                }
                Poll::Ready(Some(Err((cost, error)))) => {
                    if let Some(refused) = self.refuse(&cost, eligible, error) {
                        return Poll::Ready(refused);
                    }
                }
            }
        }
    }

    /// Takes the call out that was the first when [`poll_choose`](Self::poll_choose) panicked, because its limits can only be
    /// waited for in another runtime. Returns its key, and `None` if it is an attempt: that one is let go with nothing, and
    /// panics where it waits itself.
    pub(crate) fn take_after_panic(&mut self, eligible: Eligible) -> Option<u32> {
        self.leave();
        let head = self.shared.head(eligible)?;
        let (started, in_flight, ticket) = self.shared.start(&head, 1, eligible)?;
        drop(in_flight);
        self.shared.give_back(started);
        match ticket {
            Ticket::Call(call) => Some(call),
            Ticket::Attempt(attempt) => {
                attempt.grant(GrantedAttempt::new(Permit::of_none(), None, None, None));
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

    /// Takes what the call needs, all of it or nothing. Ready without it if it was taken by others meanwhile, and with the
    /// cost of the call that the limiter refuses if it does.
    fn poll_grant(
        &mut self,
        head: &Cost,
        eligible: Eligible,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Granted, (Cost, AcquireError)>>> {
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
                    charged = result?.map(|estimate| (limiter.clone(), estimate));
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
                return Poll::Ready(Some(Err((cost, error))));
            }
            Poll::Ready(Ok(())) => {}
        }
        let mut granted = Granted {
            permit: None,
            charge: charged,
            cost,
        };
        if let Some(acquire) = &mut self.acquire {
            // Never fails, because this semaphore is never closed.
            let Ok(Some(permit)) = acquire.try_acquire() else {
                granted.give_back();
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
                    return Poll::Ready(Some(Err((cost, error))));
                }
            }
            granted.charge = admission.estimate().map(|estimate| (limiter.clone(), estimate));
            *turn = None;
        }
        Poll::Ready(Some(Ok(granted)))
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
        let (started, in_flight, ticket) = self.shared.start(cost, self.among(), eligible)?;
        drop(in_flight);
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
    pub(crate) fn into_grant(self, call: &ScheduledCall, shared: &Arc<Shared>) -> Grant {
        let Self {
            started,
            in_flight,
            granted,
        } = self;
        let again = Again::new(shared.clone(), call.clone(), started.seq);
        let receipt = Box::new(Receipt::new(shared.clone(), started, granted.cost));
        Grant::new(granted.permit, in_flight, granted.charge, receipt, again)
    }

    /// Gives back what the call does not need, because it was cancelled just now.
    pub(crate) fn give_back(self, shared: &Shared) {
        shared.give_back(self.started);
        self.granted.give_back();
    }
}

impl Granted {
    fn for_attempt(self, started: Started, in_flight: Option<InFlight>, shared: &Arc<Shared>) -> GrantedAttempt {
        let permit = self.permit.unwrap_or_else(Permit::of_none);
        let receipt = Receipt::new(shared.clone(), started, self.cost);
        GrantedAttempt::new(permit, in_flight, self.charge, Some(Box::new(receipt)))
    }

    /// Gives back what no call needs.
    fn give_back(self) {
        if let Some((_, estimate)) = self.charge {
            estimate.settle(Cost::none());
        }
    }

    /// Gives back what was charged above the cost of the call that goes.
    fn lower_to(&mut self, cost: Cost) {
        if self.cost == cost {
            return;
        }
        if let Some((_, estimate)) = &mut self.charge {
            estimate.lower_to(cost);
        }
        self.cost = cost;
    }
}
