//! [`Reporter`]: counts the events of an executor or a stack of layers, and sends their new statuses to subscribers.

use super::{listeners::Listeners, status::RequestStatus};
use crossbeam_utils::CachePadded;
use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicU64, AtomicUsize, Ordering},
};
use tokio::sync::broadcast::{self, error::RecvError};

/// Counts events, and sends each new status of an event to the subscribers.
///
/// [`Reporter`] sends handles to events, and is generic over the handle's type, because this module cannot import the
/// module that defines the handle: that module imports this one, since each event has an `Arc` of its reporter.
pub(super) struct Reporter<H> {
    /// The number of calls that were made. It is on a cache line of its own, because callers write it, and the tasks
    /// that run the calls write the other counters: on a shared cache line, they would slow each other down.
    opened: CachePadded<AtomicU64>,
    /// The counters of running and ended calls, which are written by the tasks that run the calls.
    running: CachePadded<Running>,
    /// The channel to the subscribers. It is created for the first of them, because its buffer takes 200 kB.
    updates: OnceLock<Updates<H>>,
    /// The observers, which miss nothing.
    pub(super) listeners: Listeners<H>,
}

struct Updates<H> {
    /// The number of receivers, kept here so that publishing a status costs only two atomic loads if there are none.
    subscribers: Arc<AtomicUsize>,
    sender: broadcast::Sender<(RequestStatus, H)>,
}

#[derive(Default)]
struct Running {
    completed: AtomicU64,
    failed: AtomicU64,
    cancelled: AtomicU64,
    calling: AtomicUsize,
}

/// Receives the updates that a [`Reporter`] sends after the receiver was created.
#[derive(Debug)]
pub(super) struct Receiver<H> {
    updates: broadcast::Receiver<(RequestStatus, H)>,
    subscribers: Arc<AtomicUsize>,
}

/// How many calls were made, and how many have ended with each outcome.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Totals {
    /// Calls that were made.
    pub opened: u64,
    /// Calls that ended with a response that does not count as a failure.
    pub completed: u64,
    /// Calls that ended with an error, or with a response that counts as a failure.
    pub failed: u64,
    /// Calls that were ended before there was a response or an error.
    pub cancelled: u64,
}

/// The number of updates that a receiver may be behind. If it falls further behind, it misses the oldest updates.
const MAX_LAG: usize = 4_096;

// === impl Reporter ===

impl<H: Clone> Reporter<H> {
    pub(super) fn new() -> Self {
        Self {
            opened: CachePadded::default(),
            running: CachePadded::default(),
            updates: OnceLock::new(),
            listeners: Listeners::new(),
        }
    }

    pub(super) fn totals(&self) -> Totals {
        // The counters of the outcomes are read before `opened`, the number of calls that were made. So `opened` is
        // never less than their sum: a call that they count was counted in `opened` before.
        let completed = self.running.completed.load(Ordering::Acquire);
        let failed = self.running.failed.load(Ordering::Acquire);
        let cancelled = self.running.cancelled.load(Ordering::Acquire);
        Totals {
            opened: self.opened.load(Ordering::Acquire),
            completed,
            failed,
            cancelled,
        }
    }

    /// Returns the number of attempts that are on the wire now.
    pub(super) fn calling(&self) -> usize {
        self.running.calling.load(Ordering::Acquire)
    }

    pub(super) fn subscribe(&self) -> Receiver<H> {
        let updates = self.updates.get_or_init(|| Updates {
            subscribers: Arc::default(),
            sender: broadcast::Sender::new(MAX_LAG),
        });
        updates.subscribers.fetch_add(1, Ordering::AcqRel);
        Receiver {
            updates: updates.sender.subscribe(),
            subscribers: updates.subscribers.clone(),
        }
    }

    pub(super) fn opened(&self) {
        self.opened.fetch_add(1, Ordering::AcqRel);
    }

    pub(super) fn attempt_started(&self) {
        self.running.calling.fetch_add(1, Ordering::AcqRel);
    }

    pub(super) fn attempts_ended(&self, count: usize) {
        if count > 0 {
            self.running.calling.fetch_sub(count, Ordering::AcqRel);
        }
    }

    pub(super) fn ended(&self, status: RequestStatus) {
        let counter = match status {
            RequestStatus::Completed => &self.running.completed,
            RequestStatus::Failed => &self.running.failed,
            _ => &self.running.cancelled,
        };
        counter.fetch_add(1, Ordering::AcqRel);
    }

    /// Sends a new status of an event to the subscribers. Calls `handle`, which creates a handle to the event, only if
    /// there is a subscriber.
    pub(super) fn publish(&self, status: RequestStatus, handle: impl FnOnce() -> H) {
        let Some(updates) = self.updates.get() else { return };
        if updates.subscribers.load(Ordering::Acquire) > 0 {
            // The error is ignored: sending fails only if there is no receiver, because the last one has been dropped
            // since the number of subscribers was read.
            let _ = updates.sender.send((status, handle()));
        }
    }
}

// === impl Receiver ===

impl<H: Clone> Receiver<H> {
    /// Waits for the next update. Returns `Err` with the number of missed updates if the receiver fell too far behind,
    /// and `None` once the reporter is dropped and no update is left.
    pub(super) async fn recv(&mut self) -> Option<Result<(RequestStatus, H), u64>> {
        match self.updates.recv().await {
            Ok(update) => Some(Ok(update)),
            Err(RecvError::Lagged(missed)) => Some(Err(missed)),
            Err(RecvError::Closed) => None,
        }
    }
}

impl<H> Drop for Receiver<H> {
    fn drop(&mut self) {
        self.subscribers.fetch_sub(1, Ordering::AcqRel);
    }
}

// === impl Totals ===

impl Totals {
    /// Returns the number of calls that have ended, with any outcome.
    #[must_use]
    pub const fn ended(&self) -> u64 {
        self.completed + self.failed + self.cancelled
    }

    /// Returns the number of calls that have not ended.
    #[must_use]
    pub const fn open(&self) -> u64 {
        self.opened.saturating_sub(self.ended())
    }
}
