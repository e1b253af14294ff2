//! [`Order`]: a resource and its [`Waiters`], and which of them takes from the resource next.
//!
//! An `Order` is used only under the queue's lock. Waking or dropping a waker runs user
//! code, which could lock the queue again and deadlock. So the methods of `Order` do neither: they return a
//! [`Deferred`], which the caller carries out after it has released the lock.

use super::{
    resource::{Availability, Resource},
    timers::{ArmedTimer, Deadline, Timers, UnarmedTimer},
    waiters::{Entry, Waiters},
};
use crate::clock::LazyNow;
use std::{mem, task::Waker};
use tokio::runtime::{Handle, Id};

pub(super) struct Order<R: Resource> {
    pub(super) resource: R,
    next_seq: u64,
    /// `None` while there are no waiters and no timers, so that an idle queue takes little memory.
    waiters: Option<Box<Waiters<R::Request>>>,
}

/// Actions that the caller carries out after it has released the queue's lock.
#[must_use]
#[derive(Default)]
pub(super) struct Deferred {
    /// The waker of the waiter that has just been notified. The caller must wake it.
    pub(super) wake: Option<Waker>,
    /// The wakers of further waiters that have been notified. Empty unless notified waiters have not responded.
    pub(super) wake_also: Vec<Waker>,
    /// A waker that is no longer needed, to be dropped. Dropping it may drop a task that holds another waiter of this
    /// queue, whose drop locks the queue again.
    pub(super) discard: Option<Waker>,
    /// Timers that are no longer needed, to be dropped.
    pub(super) discard_timers: Timers,
    /// Whether a timer has to be armed.
    pub(super) arm_timers: bool,
    /// Whether the first waiter has to wait until a certain instant, so that only a timer can notify it.
    pub(super) needs_timer: bool,
    /// Whether the waiter that has just entered the queue runs outside every runtime, or in one whose timer was not
    /// armed before, so that it may have none.
    pub(super) is_timer_unproven: bool,
}

// === impl Order ===

impl<R: Resource> Order<R> {
    pub(super) const fn new(resource: R) -> Self {
        Self {
            resource,
            next_seq: 0,
            waiters: None,
        }
    }

    /// Returns how many waiters are in the queue, except skipped ones.
    #[inline]
    pub(super) fn waiting(&self) -> usize {
        self.waiters.as_ref().map_or(0, |waiters| waiters.waiting.len())
    }

    /// Returns the wakers of all waiters in the queue.
    pub(super) fn wakers(&self) -> Vec<Waker> {
        let waiters = self.waiters.iter();
        let entries = waiters.flat_map(|waiters| waiters.waiting.values().chain(waiters.skipped.values()));
        entries.map(|entry| entry.waker.clone()).collect()
    }

    /// Returns whether the waiter with the sequence number `seq` (`None` if it is not in the queue) could take what it
    /// wants now: no other waiter is before it, except skipped ones, and the resource is available. Takes nothing.
    #[inline]
    fn can_take(&mut self, seq: Option<u64>, request: &R::Request, now: &mut LazyNow) -> Result<bool, R::Rejection> {
        if seq.is_none() && self.waiting() == 0 {
            return self.resource.is_available_uncontended(request, now);
        }
        self.can_take_contended(seq, request, now)
    }

    /// Does what [`can_take`](Self::can_take) does while waiters are in the queue.
    #[inline(never)]
    fn can_take_contended(
        &mut self,
        seq: Option<u64>,
        request: &R::Request,
        now: &mut LazyNow,
    ) -> Result<bool, R::Rejection> {
        if let Some(rejection) = self.resource.rejection(request, now) {
            return Err(rejection);
        }
        let is_first = match (seq, &mut self.waiters) {
            (Some(seq), Some(waiters)) => waiters.is_first(seq),
            _ => false,
        };
        Ok(is_first && self.resource.availability(request, now) == Availability::Now)
    }

    /// Takes what the waiter wants if [`can_take`](Self::can_take) allows it, and returns whether it was taken.
    #[inline]
    pub(super) fn try_take(
        &mut self,
        seq: Option<u64>,
        request: &R::Request,
        now: &mut LazyNow,
    ) -> Result<bool, R::Rejection> {
        if seq.is_none() {
            return self.try_take_as_newcomer(request, now);
        }
        Ok(self.can_take_contended(seq, request, now)? && self.resource.try_take(request, true, now))
    }

    /// Does what [`try_take`](Self::try_take) does for a request that is not in the queue: it takes nothing while
    /// waiters are there.
    #[inline]
    pub(super) fn try_take_as_newcomer(
        &mut self,
        request: &R::Request,
        now: &mut LazyNow,
    ) -> Result<bool, R::Rejection> {
        if self.waiting() == 0 {
            return self.resource.try_take_uncontended(request, now);
        }
        self.resource.rejection(request, now).map_or(Ok(false), Err)
    }

    /// [Takes](Self::try_take) what the waiter wants if it `takes` it, and otherwise returns whether it
    /// [could](Self::can_take).
    #[inline]
    pub(super) fn poll(
        &mut self,
        seq: Option<u64>,
        request: &R::Request,
        takes: bool,
        now: &mut LazyNow,
    ) -> Result<bool, R::Rejection> {
        if takes {
            self.try_take(seq, request, now)
        } else {
            self.can_take(seq, request, now)
        }
    }

    /// Puts the waiter at the end of the queue and gives it a sequence number. If the waiter is in the queue already,
    /// only its waker is replaced.
    pub(super) fn enqueue(
        &mut self,
        seq: &mut Option<u64>,
        request: &R::Request,
        waker: &Waker,
        now: &mut LazyNow,
    ) -> Deferred {
        let waiters = self.waiters.get_or_insert_default();
        let known = seq.and_then(|seq| waiters.waiting.get_mut(&seq));
        let (mut discard, mut is_timer_unproven) = (None, false);
        if known.as_ref().is_none_or(|entry| !entry.waker.will_wake(waker)) {
            // The waker is cloned before anything is changed, because cloning it runs user code, which may panic.
            let waker = waker.clone();
            if let Some(entry) = known {
                discard = Some(mem::replace(&mut entry.waker, waker));
            } else {
                let request = request.clone();
                let new = *seq.insert(self.next_seq);
                self.next_seq += 1;
                self.resource.on_enqueue(&request);
                waiters.waiting.insert(new, Entry { request, waker });
            }
            is_timer_unproven = !add_timer(&mut waiters.timers);
        }
        Deferred {
            discard,
            is_timer_unproven,
            ..self.advance(now)
        }
    }

    /// Records that the first waiter, whose sequence number is `seq`, has stayed in the queue although the resource was
    /// available to it. If it was not notified, it counts as notified now, and is skipped unless it takes something
    /// within [`HANDOFF_TIMEOUT`](super::HANDOFF_TIMEOUT).
    pub(super) fn stay(&mut self, seq: u64, now: &mut LazyNow) -> Deferred {
        if let Some(waiters) = &mut self.waiters {
            waiters.stay(seq, now);
        }
        self.advance(now)
    }

    /// Removes the waiter with the sequence number `seq` from the queue, which has taken what it waited for.
    pub(super) fn complete(&mut self, seq: Option<u64>, now: &mut LazyNow) -> Deferred {
        if let (Some(waiters), Some(_)) = (&mut self.waiters, seq) {
            waiters.responded();
        }
        self.dequeue(seq, now)
    }

    /// Replaces what the waiter with the sequence number `seq` wants.
    pub(super) fn replace_request(&mut self, seq: u64, request: &R::Request, now: &mut LazyNow) -> Deferred {
        let entry = self.waiters.as_mut().and_then(|waiters| waiters.entry(seq));
        if let Some(entry) = entry {
            // Counted before the old one is not any more, so that the resource does not count as idle in between.
            self.resource.on_enqueue(request);
            let before = mem::replace(&mut entry.request, request.clone());
            self.resource.on_dequeue(&before);
        }
        self.advance(now)
    }

    /// Removes the waiter with the sequence number `seq` from the queue, if it is there.
    pub(super) fn dequeue(&mut self, seq: Option<u64>, now: &mut LazyNow) -> Deferred {
        let (Some(waiters), Some(seq)) = (&mut self.waiters, seq) else {
            return Deferred::default();
        };
        let discard = waiters.remove(seq).map(|entry| {
            self.resource.on_dequeue(&entry.request);
            entry.waker
        });
        Deferred {
            discard,
            ..self.advance(now)
        }
    }

    /// Notifies the first waiter if the resource is available to it, and skips notified waiters of which none took
    /// anything within [`HANDOFF_TIMEOUT`](super::HANDOFF_TIMEOUT). Called after every change of the queue or the
    /// resource, and by the timers.
    pub(super) fn advance(&mut self, now: &mut LazyNow) -> Deferred {
        let mut deferred = Deferred::default();
        let Some(waiters) = &mut self.waiters else {
            return deferred;
        };
        waiters.deadline = loop {
            let Some((_, entry)) = waiters.first() else { break None };
            match self.resource.availability(&entry.request, now) {
                Availability::Now => {
                    if let Some(respond_by) = waiters.notify(now, |waker| deferred.wake(waker)) {
                        break Some(Deadline::Handoff(respond_by));
                    }
                }
                Availability::At(instant) => {
                    waiters.withdraw();
                    deferred.needs_timer = true;
                    break Some(Deadline::Turn(instant));
                }
                Availability::BlockedUntil(instant) => {
                    waiters.withdraw();
                    break Some(Deadline::Handoff(instant));
                }
                Availability::Blocked => {
                    waiters.withdraw();
                    break None;
                }
            }
        };
        if let Some(deadline) = waiters.deadline {
            if waiters.timers.is_empty() {
                // All waiters are outside every runtime. The runtime that runs at the moment has to do.
                add_timer(&mut waiters.timers);
            }
            deferred.arm_timers = waiters.timers.need_arming(deadline);
        } else if waiters.waiting.is_empty() {
            waiters.responded();
            if !waiters.timers.is_empty() {
                deferred.discard_timers = waiters.timers.retire(now.get());
            }
            if waiters.skipped.is_empty() && waiters.timers.is_empty() {
                self.waiters = None;
            }
        }
        deferred
    }

    /// Advances the queue because the timer of `runtime` has fired.
    pub(super) fn timer_fired(&mut self, runtime: Id, now: &mut LazyNow) -> Deferred {
        if let Some(waiters) = &mut self.waiters {
            waiters.timers.fired(runtime);
        }
        self.advance(now)
    }

    /// Takes out a timer that has to be armed for the deadline.
    pub(super) fn take_unarmed_timer(&mut self) -> Option<UnarmedTimer> {
        let waiters = self.waiters.as_mut()?;
        waiters.timers.take_unarmed(waiters.deadline?)
    }

    /// Puts back a timer that was taken out, and advances the queue if the timer fired at once. What is left in `armed`
    /// is dropped by the caller, without the queue's lock.
    pub(super) fn put_back_timer(&mut self, armed: &mut ArmedTimer) -> Deferred {
        let mut now = LazyNow::default();
        let Some(waiters) = &mut self.waiters else {
            return Deferred::default();
        };
        let fired = !waiters.timers.put_back(armed, || now.get());
        // The last waiter may have left the queue in the meantime. Then no waiter needs the timer.
        if fired || waiters.deadline.is_none() {
            self.advance(&mut now)
        } else {
            Deferred::default()
        }
    }
}

/// Adds a timer for the current runtime, if there is one. Returns whether the runtime is known to have timers.
fn add_timer(timers: &mut Timers) -> bool {
    let Ok(runtime) = Handle::try_current() else {
        return false;
    };
    let is_proven = timers.has_armed(&runtime);
    if !is_proven {
        timers.add(runtime);
    }
    is_proven
}

// === impl Deferred ===

impl Deferred {
    fn wake(&mut self, waker: Waker) {
        if self.wake.is_none() {
            self.wake = Some(waker);
        } else {
            self.wake_also.push(waker);
        }
    }
}
