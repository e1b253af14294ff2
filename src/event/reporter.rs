//! [`Reporter`]: what all events of an executor or a stack report to.

use super::status::RequestStatus;
use crossbeam_utils::CachePadded;
use std::sync::{
    Arc,
    atomic::{AtomicU64, AtomicUsize, Ordering},
};
use tokio::sync::broadcast::{self, error::RecvError};

/// Counts events, and sends each new status to the subscribers.
///
/// It is generic over the handle that it sends, because the handle is defined above, where each event has an `Arc` of
/// its reporter.
pub(super) struct Reporter<H> {
    /// Written by the callers, who open events.
    opened: CachePadded<AtomicU64>,
    /// Written by the tasks that run the calls.
    running: CachePadded<Running>,
    /// The number of receivers, so that a new status costs one load if there are none.
    subscribers: Arc<AtomicUsize>,
    updates: broadcast::Sender<(RequestStatus, H)>,
}

#[derive(Default)]
struct Running {
    completed: AtomicU64,
    failed: AtomicU64,
    cancelled: AtomicU64,
    calling: AtomicUsize,
}

/// Receives the updates that are sent after it was made.
#[derive(Debug)]
pub(super) struct Receiver<H> {
    updates: broadcast::Receiver<(RequestStatus, H)>,
    subscribers: Arc<AtomicUsize>,
}

/// The numbers of calls that were made and that have ended, by outcome.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Totals {
    /// Calls that were made.
    pub opened: u64,
    /// Calls that ended with a response.
    pub completed: u64,
    /// Calls that ended with an error, or with a response that counts as a failure.
    pub failed: u64,
    /// Calls that were ended before there was a response or an error.
    pub cancelled: u64,
}

/// The number of updates that a receiver may be behind before it misses the oldest.
const MAX_LAG: usize = 4_096;

// === impl Reporter ===

impl<H: Clone> Reporter<H> {
    pub(super) fn new() -> Self {
        Self {
            opened: CachePadded::default(),
            running: CachePadded::default(),
            subscribers: Arc::default(),
            updates: broadcast::Sender::new(MAX_LAG),
        }
    }

    pub(super) fn totals(&self) -> Totals {
        // The outcomes are read first, so that `opened` is never less than their sum.
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

    /// The number of attempts on the wire.
    pub(super) fn calling(&self) -> usize {
        self.running.calling.load(Ordering::Acquire)
    }

    pub(super) fn subscribe(&self) -> Receiver<H> {
        self.subscribers.fetch_add(1, Ordering::AcqRel);
        Receiver {
            updates: self.updates.subscribe(),
            subscribers: self.subscribers.clone(),
        }
    }

    pub(super) fn opened(&self) {
        self.opened.fetch_add(1, Ordering::AcqRel);
    }

    pub(super) fn attempt_started(&self) {
        self.running.calling.fetch_add(1, Ordering::AcqRel);
    }

    pub(super) fn attempt_ended(&self) {
        self.running.calling.fetch_sub(1, Ordering::AcqRel);
    }

    pub(super) fn ended(&self, status: RequestStatus) {
        let counter = match status {
            RequestStatus::Completed => &self.running.completed,
            RequestStatus::Failed => &self.running.failed,
            _ => &self.running.cancelled,
        };
        counter.fetch_add(1, Ordering::AcqRel);
    }

    /// Sends a new status. The handle is only made if there is a subscriber.
    pub(super) fn publish(&self, status: RequestStatus, handle: impl FnOnce() -> H) {
        if self.subscribers.load(Ordering::Acquire) > 0 {
            // Fails if the last receiver was dropped since.
            let _ = self.updates.send((status, handle()));
        }
    }
}

// === impl Receiver ===

impl<H: Clone> Receiver<H> {
    /// The next update, or the number of updates that were missed; `None` once the reporter is dropped.
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
    /// The number of calls that have ended, with any outcome.
    #[must_use]
    pub const fn ended(&self) -> u64 {
        self.completed + self.failed + self.cancelled
    }

    /// The number of calls that have not ended.
    #[must_use]
    pub const fn open(&self) -> u64 {
        self.opened.saturating_sub(self.ended())
    }
}
