//! [`Order`]: the list of the waiters of a queue in the order in which they came, and which of them was notified.
//!
//! An `Order`, the ordered list of waiters, is used only under the queue's lock. Waking or dropping a waker runs user
//! code, which could lock the queue again and deadlock. So the methods of `Order` do neither: they return a
//! [`Deferred`], which the caller carries out after it has released the lock.

use super::{
    resource::{Availability, HANDOFF_TIMEOUT, Resource},
    timers::{Deadline, Timers, UnarmedTimer},
};
use crate::clock::LazyNow;
use std::{collections::BTreeMap, mem, task::Waker};
use tokio::{runtime::Handle, time::Instant};

/// How much [`Order::width`] grows each time that no notified waiter has responded.
const WIDTH_GROWTH: usize = 8;

pub(super) struct Order<R: Resource> {
    pub(super) resource: R,
    next_seq: u64,
    /// The waiters in the queue by sequence number, except the [skipped](Self::skipped) ones, which were notified
    /// and did not take the resource within [`HANDOFF_TIMEOUT`].
    pub(super) waiting: BTreeMap<u64, Entry<R::Request>>,
    /// Waiters that were notified and did not take the resource within [`HANDOFF_TIMEOUT`], by sequence number. They do
    /// not block the queue. A skipped waiter that is polled again returns to `waiting` with its old sequence number,
    /// before all later waiters.
    pub(super) skipped: BTreeMap<u64, Entry<R::Request>>,
    /// Which waiters were notified. `None` if the first waiter was not notified.
    notified: Option<Notified>,
    /// How many waiters are notified at once: 1, and [`WIDTH_GROWTH`] times more each time that none of the notified
    /// ones has taken the resource within [`HANDOFF_TIMEOUT`]. So waiters that are no longer polled cost a time that
    /// grows with the logarithm of their number. It is 1 again as soon as a notified waiter takes the resource.
    width: usize,
    /// When a timer has to call [`advance`](Self::advance) next. `None` if no timer is needed.
    deadline: Option<Deadline>,
    pub(super) timers: Timers,
}

/// The waiters that were notified: those at the front of [`Order::waiting`].
struct Notified {
    /// The sequence number of the last one.
    last: u64,
    /// When the first one was notified.
    since: Instant,
    /// How many more waiters may be notified until `since` is [`HANDOFF_TIMEOUT`] ago.
    room: usize,
}

/// A waiter in the queue: its request and its waker.
pub(super) struct Entry<Request> {
    request: Request,
    pub(super) waker: Waker,
}

/// Actions that the caller carries out after it has released the queue's lock.
#[must_use]
#[derive(Default)]
pub(super) struct Deferred {
    /// The waker of the waiter that has just been notified. The caller must wake it.
    pub(super) wake: Option<Waker>,
    /// The wakers of further waiters that have been notified. Empty unless waiters have not responded before.
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
            waiting: BTreeMap::new(),
            skipped: BTreeMap::new(),
            notified: None,
            width: 1,
            deadline: None,
            timers: Timers::new(),
        }
    }

    /// Returns whether the waiter with the sequence number `seq` (`None` if it is not in the queue) could take what it
    /// wants now: no other waiter is before it that was not notified, and the resource is available. Takes nothing.
    pub(super) fn can_take(
        &mut self,
        seq: Option<u64>,
        request: &R::Request,
        now: &mut LazyNow,
    ) -> Result<bool, R::Rejection> {
        if let Some(rejection) = self.resource.rejection(request) {
            return Err(rejection);
        }
        if !self.may_be_next(seq) {
            return Ok(false);
        }
        if seq.is_none() {
            self.resource.on_idle(now);
        }
        Ok(self.resource.availability(request, now) == Availability::Now)
    }

    /// Takes what the waiter wants if [`can_take`](Self::can_take) allows it, and returns whether it was taken.
    pub(super) fn try_take(
        &mut self,
        seq: Option<u64>,
        request: &R::Request,
        now: &mut LazyNow,
    ) -> Result<bool, R::Rejection> {
        if seq.is_none() && self.waiting.is_empty() {
            return self.resource.try_take_uncontended(request, now);
        }
        Ok(self.can_take(seq, request, now)? && self.resource.try_take(request, true, now))
    }

    /// Returns whether the waiter with the sequence number `seq` is the first one or was notified. If that waiter was
    /// skipped (it did not take the resource in time after it was notified), it first returns to its old position in
    /// the queue. For `None`, returns whether no waiter is in the queue, except skipped ones.
    fn may_be_next(&mut self, seq: Option<u64>) -> bool {
        let Some(seq) = seq else {
            return self.waiting.is_empty();
        };
        if let Some(entry) = self.skipped.remove(&seq) {
            self.waiting.insert(seq, entry);
        }
        self.is_notified(seq) || self.waiting.first_key_value().is_some_and(|(first, _)| *first == seq)
    }

    fn is_notified(&self, seq: u64) -> bool {
        self.notified.as_ref().is_some_and(|notified| seq <= notified.last)
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
        let mut is_timer_unproven = false;
        let discard = match seq.and_then(|seq| self.waiting.get_mut(&seq)) {
            Some(entry) if entry.waker.will_wake(waker) => None,
            Some(entry) => {
                let discard = mem::replace(&mut entry.waker, waker.clone());
                is_timer_unproven = !self.add_timer();
                Some(discard)
            }
            None => {
                // The waker is cloned before anything is changed, because cloning it runs user code, which may panic.
                let (request, waker) = (request.clone(), waker.clone());
                let new = *seq.insert(self.next_seq);
                self.next_seq += 1;
                self.resource.on_enqueue(&request);
                self.waiting.insert(new, Entry { request, waker });
                is_timer_unproven = !self.add_timer();
                None
            }
        };
        Deferred {
            discard,
            is_timer_unproven,
            ..self.advance(now)
        }
    }

    /// Adds a timer for the current runtime, if there is one. Returns whether the runtime is known to have timers.
    fn add_timer(&mut self) -> bool {
        let Ok(runtime) = Handle::try_current() else {
            return false;
        };
        let is_proven = self.timers.has_armed(&runtime);
        if !is_proven {
            self.timers.add(runtime);
        }
        is_proven
    }

    /// Records that the waiter with the sequence number `seq` has stayed in the queue although the resource was
    /// available to it. If it was not notified, it counts as notified now, and is skipped unless it takes something
    /// within [`HANDOFF_TIMEOUT`].
    pub(super) fn stay(&mut self, seq: u64, now: &mut LazyNow) -> Deferred {
        if !self.is_notified(seq) {
            self.notified = Some(Notified {
                last: seq,
                since: now.get(),
                room: self.width.saturating_sub(1),
            });
        }
        self.advance(now)
    }

    /// Removes the waiter with the sequence number `seq` from the queue, which has taken what it waited for.
    ///
    /// If it was not the first one, the notified waiters before it have not responded yet. They count as skipped: they
    /// return to their old positions when they are polled, and those that are no longer polled are not waited for
    /// again.
    pub(super) fn complete(&mut self, seq: Option<u64>, now: &mut LazyNow) -> Deferred {
        if let Some(seq) = seq {
            self.skip_before(seq);
            self.notified = None;
            self.width = 1;
        }
        self.dequeue(seq, now)
    }

    /// Removes the waiter with the sequence number `seq` from the queue, if it is there.
    pub(super) fn dequeue(&mut self, seq: Option<u64>, now: &mut LazyNow) -> Deferred {
        let Some(seq) = seq else {
            return Deferred::default();
        };
        let entry = self.waiting.remove(&seq).or_else(|| self.skipped.remove(&seq));
        let discard = entry.map(|entry| {
            self.resource.on_dequeue(&entry.request);
            entry.waker
        });
        Deferred {
            discard,
            ..self.advance(now)
        }
    }

    /// Notifies the first waiter if the resource is available to it, and skips notified waiters of which none took
    /// anything within [`HANDOFF_TIMEOUT`]. Called after every change of the queue or the resource, and by the timers.
    pub(super) fn advance(&mut self, now: &mut LazyNow) -> Deferred {
        let mut deferred = Deferred::default();
        self.deadline = loop {
            let Some((&first, entry)) = self.waiting.first_key_value() else {
                self.notified = None;
                break None;
            };
            let availability = self.resource.availability(&entry.request, now);
            if availability == Availability::Now {
                let take_by = self.notify(first, now, &mut deferred);
                if now.get() < take_by {
                    break Some(Deadline::Handoff(take_by));
                }
                self.skip_notified();
                continue;
            }
            self.notified = None;
            match availability {
                Availability::At(instant) => {
                    deferred.needs_timer = true;
                    break Some(Deadline::Turn(instant));
                }
                Availability::BlockedUntil(instant) => break Some(Deadline::Handoff(instant)),
                Availability::Blocked | Availability::Now => break None,
            }
        };
        if let Some(deadline) = self.deadline {
            if self.timers.is_empty() {
                // All waiters are outside every runtime. The runtime that runs at the moment has to do.
                if let Ok(runtime) = Handle::try_current() {
                    self.timers.add(runtime);
                }
            }
            deferred.arm_timers = self.timers.need_arming(deadline);
        } else if self.waiting.is_empty() {
            self.width = 1;
            if !self.timers.is_empty() {
                deferred.discard_timers = self.timers.retire(now.get());
            }
            if self.timers.is_empty() {
                // An empty map keeps the memory of its last entries.
                self.waiting = BTreeMap::new();
            }
        }
        deferred
    }

    /// Notifies the first waiter, whose sequence number is `first`, unless it was notified already, and as many waiters
    /// behind it as [`width`](Self::width) allows. Returns by when they have to respond.
    fn notify(&mut self, first: u64, now: &mut LazyNow, deferred: &mut Deferred) -> Instant {
        let notified = match &mut self.notified {
            Some(notified) if first <= notified.last => notified,
            notified => {
                deferred.wake = self.waiting.get(&first).map(|entry| entry.waker.clone());
                notified.insert(Notified {
                    last: first,
                    since: now.get(),
                    room: self.width - 1,
                })
            }
        };
        if notified.room > 0 {
            for (&seq, entry) in self.waiting.range(notified.last + 1..).take(notified.room) {
                deferred.wake_also.push(entry.waker.clone());
                notified.last = seq;
                notified.room -= 1;
            }
        }
        notified.since + HANDOFF_TIMEOUT
    }

    /// Moves the notified waiters, of which none has responded, to the skipped ones.
    fn skip_notified(&mut self) {
        if let Some(notified) = self.notified.take() {
            self.skip_before(notified.last + 1);
            self.width = self.width.saturating_mul(WIDTH_GROWTH);
        }
    }

    /// Moves the waiters with smaller sequence numbers than `seq` to the skipped ones.
    fn skip_before(&mut self, seq: u64) {
        while let Some(entry) = self.waiting.first_entry().filter(|entry| *entry.key() < seq) {
            let (seq, entry) = entry.remove_entry();
            self.skipped.insert(seq, entry);
        }
    }

    /// Takes out a timer that has to be armed for the deadline.
    pub(super) fn take_unarmed_timer(&mut self) -> Option<UnarmedTimer> {
        self.timers.take_unarmed(self.deadline?)
    }
}
