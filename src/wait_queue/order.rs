//! [`Order`]: the waiters of a queue in the order in which they came, and which of them has been notified.
//!
//! An `Order` is only used under the queue's lock, where user code could deadlock. Its methods therefore wake and drop
//! no waker themselves: they return a [`Deferred`], which the caller carries out after it has released the lock.

use super::resource::{Availability, Resource};
use crate::clock::LazyNow;
use std::{collections::BTreeMap, mem, task::Waker, time::Duration};
use tokio::{
    runtime::{Handle, Id},
    time::Instant,
};

/// How long a notified waiter has to take what it waits for before the next waiter is notified.
///
/// Five milliseconds are far more than a healthy runtime needs to poll a woken task, and several times the resolution
/// of Tokio's timers (1 ms), so a waiter that is still polled is hardly ever skipped. They are short enough that a
/// waiter that is no longer polled costs the waiters behind it little.
pub(super) const HANDOFF_TIMEOUT: Duration = Duration::from_millis(5);

pub(super) struct Order<R: Resource> {
    pub(super) resource: R,
    next_seq: u64,
    /// The queued waiters by sequence number, without the skipped ones.
    pub(super) waiting: BTreeMap<u64, Entry<R::Request>>,
    /// Waiters that were notified and took nothing within [`HANDOFF_TIMEOUT`]. They do not hold up the queue. When
    /// polled again they return to `waiting` with their old sequence number, that is, before all later waiters.
    pub(super) skipped: BTreeMap<u64, Entry<R::Request>>,
    /// The first of `waiting`, if it has been notified, and when.
    pub(super) notified: Option<(u64, Instant)>,
    /// When a timer task has to call [`advance`](Self::advance) next.
    pub(super) deadline: Option<Instant>,
    /// The deadline that the timer tasks are sleeping until.
    pub(super) armed: Option<Instant>,
    /// The runtimes that run a timer task for this queue: one task for each runtime that has waiters here.
    timers: Vec<Id>,
    /// The runtime of a waiter. A timer task is started there if the thread that needs one is outside every runtime.
    runtime: Option<Handle>,
}

/// A queued waiter.
pub(super) struct Entry<Request> {
    request: Request,
    pub(super) waker: Waker,
}

/// What has to be done after the queue's lock is released.
#[must_use]
#[derive(Default)]
pub(super) struct Deferred {
    /// The waiter that has just been notified.
    pub(super) wake: Option<Waker>,
    /// A waker that is no longer needed. Dropping it may drop a task that holds another waiter of this queue, which
    /// would lock the queue again.
    pub(super) discard: Option<Waker>,
    /// The timer tasks sleep until too late an instant, or are no longer needed.
    pub(super) reschedule_timers: bool,
    /// The runtime to start a timer task on. It is already registered in [`Order::timers`].
    pub(super) start_timer: Option<Handle>,
    /// The first waiter waits for an instant, so only a timer task can notify it.
    pub(super) needs_timer: bool,
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
            deadline: None,
            armed: None,
            timers: Vec::new(),
            runtime: None,
        }
    }

    /// Returns whether the waiter with this sequence number, or a newcomer without one, could take what it wants now:
    /// no other waiter is before it, and the resource is available. Takes nothing.
    pub(super) fn can_take(
        &mut self,
        seq: Option<u64>,
        request: &R::Request,
        now: &mut LazyNow,
    ) -> Result<bool, R::Rejection> {
        if let Some(rejection) = self.resource.rejection(request) {
            return Err(rejection);
        }
        if !self.is_first(seq) {
            return Ok(false);
        }
        if seq.is_none() {
            self.resource.on_idle(now);
        }
        Ok(self.resource.availability(request, now) == Availability::Now)
    }

    /// Takes what the waiter wants if it [can](Self::can_take), and returns whether it did.
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

    /// Returns whether no waiter is before this one, or before a newcomer without a sequence number. A skipped waiter
    /// returns to its old place.
    fn is_first(&mut self, seq: Option<u64>) -> bool {
        let Some(seq) = seq else {
            return self.waiting.is_empty();
        };
        if let Some(entry) = self.skipped.remove(&seq) {
            self.waiting.insert(seq, entry);
        }
        self.waiting.first_key_value().is_some_and(|(first, _)| *first == seq)
    }

    /// Enters the waiter at the end of the queue and gives it a sequence number. A waiter that is in the queue already
    /// only has its waker replaced.
    pub(super) fn enqueue(
        &mut self,
        seq: &mut Option<u64>,
        request: &R::Request,
        waker: &Waker,
        now: &mut LazyNow,
    ) -> Deferred {
        let discard = match seq.and_then(|seq| self.waiting.get_mut(&seq)) {
            Some(entry) if entry.waker.will_wake(waker) => None,
            Some(entry) => Some(mem::replace(&mut entry.waker, waker.clone())),
            None => {
                // Cloning a waker runs user code, which may panic: before anything is changed.
                let (request, waker) = (request.clone(), waker.clone());
                let new = *seq.insert(self.next_seq);
                self.next_seq += 1;
                self.resource.on_enqueue(&request);
                if self.timers.is_empty() {
                    self.runtime = Handle::try_current().ok();
                }
                self.waiting.insert(new, Entry { request, waker });
                None
            }
        };
        Deferred {
            discard,
            ..self.advance(now)
        }
    }

    /// Removes the waiter from the queue, if it was in the queue.
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

    pub(super) fn remove_timer(&mut self, timer: Option<Id>) {
        self.timers.retain(|id| Some(*id) != timer);
        // The removed task may have been the only one that slept until `armed`.
        self.armed = None;
    }

    /// Notifies the first waiter if the resource is available to it, and skips a waiter whose [`HANDOFF_TIMEOUT`] has
    /// passed. Called after every change of the queue or the resource, and by the timer tasks.
    pub(super) fn advance(&mut self, now: &mut LazyNow) -> Deferred {
        let mut deferred = Deferred::default();
        self.deadline = loop {
            let Some((&first, entry)) = self.waiting.first_key_value() else {
                self.notified = None;
                break None;
            };
            match self.resource.availability(&entry.request, now) {
                Availability::Now => match self.notified {
                    Some((notified, since)) if notified == first => {
                        let take_by = since + HANDOFF_TIMEOUT;
                        if now.get() < take_by {
                            break Some(take_by);
                        }
                        self.skipped.extend(self.waiting.pop_first());
                        self.notified = None;
                    }
                    _ => {
                        let now = now.get();
                        self.notified = Some((first, now));
                        deferred.wake = Some(entry.waker.clone());
                        break Some(now + HANDOFF_TIMEOUT);
                    }
                },
                Availability::At(instant) => {
                    self.notified = None;
                    deferred.needs_timer = true;
                    break Some(instant);
                }
                Availability::Blocked => {
                    self.notified = None;
                    break None;
                }
            }
        };
        match (self.deadline, self.armed) {
            (Some(deadline), Some(armed)) => deferred.reschedule_timers = deadline < armed,
            (Some(_), None) => deferred.reschedule_timers = true,
            // A timer task that wakes up soon finds out by itself that it is no longer needed.
            (None, Some(armed)) => {
                deferred.reschedule_timers = self.waiting.is_empty() && armed > now.get() + HANDOFF_TIMEOUT;
            }
            (None, None) => deferred.reschedule_timers = self.waiting.is_empty() && !self.timers.is_empty(),
        }
        if self.deadline.is_some() {
            let runtime = Handle::try_current().ok().or_else(|| self.runtime.clone());
            if let Some(runtime) = runtime.filter(|runtime| !self.timers.contains(&runtime.id())) {
                self.timers.push(runtime.id());
                deferred.start_timer = Some(runtime);
            }
        }
        if self.waiting.is_empty() {
            self.runtime = None;
        }
        deferred
    }
}
