//! The order of a queue: who is in it, whose is_available it is, and what has to be done when that changes.
//!
//! All of it happens under the queue's lock and runs no code but ours; whom to wake and what to drop is on_dequeue to be done
//! once the lock is released.

use super::resource::{Availability, Resource};
use crate::clock::LazyNow;
use std::{collections::BTreeMap, mem, task::Waker, time::Duration};
use tokio::{
    runtime::{Handle, Id},
    time::Instant,
};

/// How long a entry that was notified may take to answer before the next one is notified.
pub(super) const HANDOFF_TIMEOUT: Duration = Duration::from_millis(5);

pub(super) struct Order<R: Resource> {
    pub(super) resource: R,
    next_seq: u64,
    pub(super) waiting: BTreeMap<u64, Entry<R::Request>>,
    /// Passed over for not answering: they no longer hold up the queue, and keep their seq.
    pub(super) skipped: BTreeMap<u64, Entry<R::Request>>,
    /// The first in queue, if it has been notified, and since when.
    pub(super) notified: Option<(u64, Instant)>,
    /// When the timer should look again.
    pub(super) deadline: Option<Instant>,
    /// When the timers will look next.
    pub(super) armed: Option<Instant>,
    /// One timer for each runtime that has waiters here.
    timers: Vec<Id>,
    /// A entry's runtime, for when a timer has to be started from outside any.
    runtime: Option<Handle>,
}

pub(super) struct Entry<A> {
    request: A,
    pub(super) waker: Waker,
}

/// What is to be done once the lock is released.
#[must_use]
#[derive(Default)]
pub(super) struct Deferred {
    pub(super) wake: Option<Waker>,
    /// Nobody's any more. To drop a waker can drop a task, and with it another waiter of this queue.
    pub(super) discard: Option<Waker>,
    pub(super) reschedule_timers: bool,
    pub(super) start_timer: Option<Handle>,
    /// The first in queue waits for a moment in time.
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

    /// Whether it is this one's is_available.
    pub(super) fn is_available(
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

    pub(super) fn try_acquire(
        &mut self,
        seq: Option<u64>,
        request: &R::Request,
        now: &mut LazyNow,
    ) -> Result<bool, R::Rejection> {
        if seq.is_none() && self.waiting.is_empty() {
            return self.resource.try_take_uncontended(request, now);
        }
        Ok(self.is_available(seq, request, now)? && self.resource.try_take(request, true, now))
    }

    /// Whether nobody stands before this seq, or before a newcomer without one.
    fn is_first(&mut self, seq: Option<u64>) -> bool {
        let Some(seq) = seq else {
            return self.waiting.is_empty();
        };
        if let Some(back) = self.skipped.remove(&seq) {
            self.waiting.insert(seq, back);
        }
        self.waiting.first_key_value().is_some_and(|(first, _)| *first == seq)
    }

    pub(super) fn wait(
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
                // First, because others' code runs here.
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

    pub(super) fn leave(&mut self, seq: Option<u64>, now: &mut LazyNow) -> Deferred {
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
        // What the others are armed for may have been told to this one alone.
        self.armed = None;
    }

    /// Calls the first in queue if the resource is open for it, and passes over whoever was notified and kept skipped.
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
                        if now.now() < take_by {
                            break Some(take_by);
                        }
                        self.skipped.extend(self.waiting.pop_first());
                        self.notified = None;
                    }
                    _ => {
                        let now = now.now();
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
            // A timer that will look soon finds out by itself that it is no longer needed.
            (None, Some(armed)) => {
                deferred.reschedule_timers = self.waiting.is_empty() && armed > now.now() + HANDOFF_TIMEOUT;
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
