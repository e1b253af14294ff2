//! [`Waiters`]: the waiters of a queue in the order in which they came, and which of them were notified.

use super::{
    resource::HANDOFF_TIMEOUT,
    timers::{Deadline, Timers},
};
use crate::clock::LazyNow;
use std::{collections::BTreeMap, task::Waker};
use tokio::time::Instant;

/// How much [`Waiters::width`] grows each time that no notified waiter has responded.
const WIDTH_GROWTH: usize = 8;

/// The waiters of a queue, and the timers that they need.
pub(super) struct Waiters<Request> {
    /// The waiters in the queue by sequence number, except the [skipped](Self::skipped) ones.
    pub(super) waiting: BTreeMap<u64, Entry<Request>>,
    /// Waiters that were notified and did not take the resource within [`HANDOFF_TIMEOUT`], by sequence number. They do
    /// not block the queue. A skipped waiter that is polled again returns to `waiting` with its old sequence number,
    /// before all later waiters.
    pub(super) skipped: BTreeMap<u64, Entry<Request>>,
    /// Which waiters were notified. `None` if the first waiter was not notified.
    notified: Option<Notified>,
    /// How many waiters are notified at once: 1, and [`WIDTH_GROWTH`] times more each time that none of the notified
    /// ones has taken the resource within [`HANDOFF_TIMEOUT`]. So waiters that are no longer polled cost a time that
    /// grows with the logarithm of their number. It is 1 again as soon as a waiter takes the resource.
    width: usize,
    /// When a timer has to advance the queue next. `None` if no timer is needed.
    pub(super) deadline: Option<Deadline>,
    pub(super) timers: Timers,
}

/// A waiter in the queue: its request and its waker.
pub(super) struct Entry<Request> {
    pub(super) request: Request,
    pub(super) waker: Waker,
}

/// The waiters that were notified: those at the front of [`Waiters::waiting`].
struct Notified {
    /// The sequence number of the last one.
    last: u64,
    /// When the first one was notified.
    since: Instant,
    /// How many more waiters may be notified until `since` is [`HANDOFF_TIMEOUT`] ago.
    room: usize,
}

impl<Request> Waiters<Request> {
    /// Returns the first waiter and its sequence number.
    pub(super) fn first(&self) -> Option<(u64, &Entry<Request>)> {
        self.waiting.first_key_value().map(|(seq, entry)| (*seq, entry))
    }

    /// Returns whether the waiter with the sequence number `seq`, which is being polled, is the first one. If that
    /// waiter was skipped, it first returns to its old position in the queue.
    ///
    /// If several waiters were notified, the one that is polled first becomes the first waiter: those before it count as
    /// skipped. They return to their old positions when they are polled, and those that are no longer polled are not
    /// waited for again.
    pub(super) fn is_first(&mut self, seq: u64) -> bool {
        if let Some(entry) = self.skipped.remove(&seq) {
            self.waiting.insert(seq, entry);
        }
        if self.is_notified(seq) {
            self.skip_before(seq);
        }
        self.first().is_some_and(|(first, _)| first == seq)
    }

    fn is_notified(&self, seq: u64) -> bool {
        self.notified.as_ref().is_some_and(|notified| seq <= notified.last)
    }

    pub(super) fn entry(&mut self, seq: u64) -> Option<&mut Entry<Request>> {
        let waiting = self.waiting.get_mut(&seq);
        waiting.or_else(|| self.skipped.get_mut(&seq))
    }

    /// Removes the waiter with the sequence number `seq`.
    pub(super) fn remove(&mut self, seq: u64) -> Option<Entry<Request>> {
        self.waiting.remove(&seq).or_else(|| self.skipped.remove(&seq))
    }

    /// Records that the first waiter, whose sequence number is `first`, has found the resource available and has not
    /// taken it. If it was not notified, it counts as notified now.
    pub(super) fn stay(&mut self, first: u64, now: &mut LazyNow) {
        if !self.is_notified(first) {
            self.notified = Some(Notified {
                last: first,
                since: now.get(),
                room: self.width - 1,
            });
        }
    }

    /// Records that a waiter has taken the resource, or that none is left: from now on, one waiter is notified at a time.
    pub(super) fn responded(&mut self) {
        self.notified = None;
        self.width = 1;
    }

    /// Records that the resource is not available to the first waiter.
    pub(super) fn withdraw(&mut self) {
        self.notified = None;
    }

    /// Notifies the first waiter, unless it was notified already, and as many waiters behind it as [`width`](Self::width)
    /// allows: calls `wake` with the waker of each. Returns by when they have to respond.
    ///
    /// If waiters were notified [`HANDOFF_TIMEOUT`] ago, they are skipped instead, and `None` is returned.
    pub(super) fn notify(&mut self, now: &mut LazyNow, mut wake: impl FnMut(Waker)) -> Option<Instant> {
        let (first, entry) = self.first()?;
        let notified = if self.is_notified(first) {
            self.notified.as_mut()?
        } else {
            wake(entry.waker.clone());
            self.notified.insert(Notified {
                last: first,
                since: now.get(),
                room: self.width - 1,
            })
        };
        let respond_by = notified.since + HANDOFF_TIMEOUT;
        if now.get() >= respond_by {
            let last = notified.last;
            self.notified = None;
            self.width = self.width.saturating_mul(WIDTH_GROWTH);
            self.skip_before(last + 1);
            return None;
        }
        for (&seq, entry) in self.waiting.range(notified.last + 1..).take(notified.room) {
            wake(entry.waker.clone());
            notified.last = seq;
            notified.room -= 1;
        }
        Some(respond_by)
    }

    /// Moves the waiters with smaller sequence numbers than `seq` to the skipped ones.
    fn skip_before(&mut self, seq: u64) {
        while let Some(entry) = self.waiting.first_entry().filter(|entry| *entry.key() < seq) {
            let (seq, entry) = entry.remove_entry();
            self.skipped.insert(seq, entry);
        }
    }
}

impl<Request> Default for Waiters<Request> {
    fn default() -> Self {
        Self {
            waiting: BTreeMap::new(),
            skipped: BTreeMap::new(),
            notified: None,
            width: 1,
            deadline: None,
            timers: Timers::default(),
        }
    }
}
