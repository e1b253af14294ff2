//! [`Order`]: the list of the waiters of a queue in the order in which they came, and which of them was notified.
//!
//! An `Order`, the ordered list of waiters, is used only under the queue's lock. Waking or dropping a waker runs user
//! code, which could lock the queue again and deadlock. So the methods of `Order` do neither: they return a
//! [`Deferred`], which the caller carries out after it has released the lock.

use super::resource::{Availability, Resource};
use crate::clock::LazyNow;
use std::{collections::BTreeMap, mem, task::Waker, time::Duration};
use tokio::{
    runtime::{Handle, Id},
    time::Instant,
};

/// How long a notified waiter has to take what it waits for before it is skipped and the next waiter is notified.
///
/// Five milliseconds are far more than a healthy runtime needs to poll a woken task, and several times the resolution
/// of Tokio's timers (1 ms), so a waiter that is still polled is rarely skipped. They are also short, so a waiter that
/// is no longer polled delays the waiters behind it only briefly.
pub(super) const HANDOFF_TIMEOUT: Duration = Duration::from_millis(5);

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
    /// The sequence number of the first waiter and when it was notified. `None` if the first waiter was not notified.
    pub(super) notified: Option<(u64, Instant)>,
    /// When a timer task has to call [`advance`](Self::advance) next. `None` if no timer is needed.
    pub(super) deadline: Option<Instant>,
    /// The deadline until which the timer tasks sleep. `None` if it is not certain that a timer task sleeps until a
    /// deadline.
    pub(super) armed: Option<Instant>,
    /// The runtimes that run a timer task for this queue: at most one task for each runtime.
    timers: Vec<Id>,
    /// The runtime of one of the waiters. If a timer task is needed on a thread that is outside every runtime, the task
    /// is started on this runtime.
    runtime: Option<Handle>,
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
    /// A waker that is no longer needed, to be dropped. Dropping it may drop a task that holds another waiter of this
    /// queue, whose drop locks the queue again.
    pub(super) discard: Option<Waker>,
    /// Whether to wake the timer tasks, because they sleep past the deadline or are no longer needed.
    pub(super) reschedule_timers: bool,
    /// The runtime on which a timer task has to be started. It is already registered in [`Order::timers`].
    pub(super) start_timer: Option<Handle>,
    /// Whether the first waiter has to wait until a certain instant, so that only a timer task can notify it.
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

    /// Returns whether the waiter with the sequence number `seq` (`None` if it is not in the queue) could take what it
    /// wants now: no other waiter is before it, and the resource is available. Takes nothing.
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

    /// Takes what the waiter wants if [`can_take`](Self::can_take) allows it, and returns whether it was taken.
    #[inline]
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

    /// Returns whether no other waiter is before the one with the sequence number `seq`. If that waiter was skipped (it
    /// did not take the resource in time after it was notified), it first returns to its old position in the queue. For
    /// `None`, returns whether no waiter is in the queue, except skipped ones.
    fn is_first(&mut self, seq: Option<u64>) -> bool {
        let Some(seq) = seq else {
            return self.waiting.is_empty();
        };
        if let Some(entry) = self.skipped.remove(&seq) {
            self.waiting.insert(seq, entry);
        }
        self.waiting.first_key_value().is_some_and(|(first, _)| *first == seq)
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
        let discard = match seq.and_then(|seq| self.waiting.get_mut(&seq)) {
            Some(entry) if entry.waker.will_wake(waker) => None,
            Some(entry) => Some(mem::replace(&mut entry.waker, waker.clone())),
            None => {
                // The waker is cloned before anything is changed, because cloning it runs user code, which may panic.
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

    pub(super) fn remove_timer(&mut self, timer: Option<Id>) {
        self.timers.retain(|id| Some(*id) != timer);
        // `armed` is the deadline until which the timer tasks sleep. The removed task may have been the only one that
        // slept until then: if `armed` stayed set, `advance` would not wake another timer task for the same deadline.
        self.armed = None;
    }

    /// Notifies the first waiter if the resource is available to it, and skips a notified waiter that took nothing
    /// within [`HANDOFF_TIMEOUT`]. Called after every change of the queue or the resource, and by the timer tasks.
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
            // When the queue has become empty, a timer task that wakes up within `HANDOFF_TIMEOUT` anyway is not woken
            // before its time: it ends when it finds the queue empty.
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
