//! [`Events`]: all events of an executor or a stack, counted and to be subscribed to.

use super::{handle::EventHandle, record::RequestStatus};
use crossbeam_utils::CachePadded;
use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};
use tokio::sync::broadcast;

/// Counts the events of those layers that [report to](super::EventLayer::report_to) it, and tells its subscribers about
/// every change of a status. Shared by its clones.
#[derive(Clone)]
pub struct Events {
    shared: Arc<Shared>,
}

struct Shared {
    /// Counted by callers.
    opened: CachePadded<AtomicU64>,
    /// Counted by those who drive the calls.
    driven: CachePadded<Driven>,
    subscribers: Arc<AtomicUsize>,
    updates: broadcast::Sender<EventUpdate>,
}

#[derive(Default)]
struct Driven {
    completed: AtomicU64,
    failed: AtomicU64,
    cancelled: AtomicU64,
    calling: AtomicUsize,
}

/// How many calls there were, by outcome.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Totals {
    /// Calls that were made.
    pub opened: u64,
    /// Those that ended with a response.
    pub completed: u64,
    /// Those that ended with an error.
    pub failed: u64,
    /// Those that were ended before.
    pub cancelled: u64,
}

/// An event has a new status.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct EventUpdate {
    /// The new status. The event itself may be further on by now.
    pub status: RequestStatus,
    /// The event.
    pub event: EventHandle,
}

/// Updates of all events, from the moment of subscribing.
#[derive(Debug)]
pub struct Subscription {
    updates: broadcast::Receiver<EventUpdate>,
    subscribers: Arc<AtomicUsize>,
}

/// The subscriber was too slow, and so many updates are lost to it. The calls were not slowed; the next update is
/// there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lagged {
    missed: u64,
}

/// How many updates a subscriber may be behind.
const MAX_LAG: usize = 4_096;

// === impl Events ===

impl Events {
    /// Nothing counted yet.
    #[must_use]
    pub fn new() -> Self {
        let shared = Shared {
            opened: CachePadded::default(),
            driven: CachePadded::default(),
            subscribers: Arc::default(),
            updates: broadcast::Sender::new(MAX_LAG),
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    /// The counts by outcome.
    #[must_use]
    pub fn totals(&self) -> Totals {
        // Outcomes first: so `opened` is never behind their sum.
        let completed = self.shared.driven.completed.load(Ordering::Acquire);
        let failed = self.shared.driven.failed.load(Ordering::Acquire);
        let cancelled = self.shared.driven.cancelled.load(Ordering::Acquire);
        Totals {
            opened: self.shared.opened.load(Ordering::Acquire),
            completed,
            failed,
            cancelled,
        }
    }

    /// How many calls are on the wire now.
    #[must_use]
    pub fn calling(&self) -> usize {
        self.shared.driven.calling.load(Ordering::Acquire)
    }

    /// Every change of a status from now on. A subscriber that falls more than 4,096 behind misses the oldest, and is
    /// snapshot so; it never slows the calls.
    #[must_use]
    pub fn subscribe(&self) -> Subscription {
        self.shared.subscribers.fetch_add(1, Ordering::AcqRel);
        Subscription {
            updates: self.shared.updates.subscribe(),
            subscribers: self.shared.subscribers.clone(),
        }
    }

    pub(super) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared)
    }

    pub(super) fn opened(&self) {
        self.shared.opened.fetch_add(1, Ordering::AcqRel);
    }

    pub(super) fn attempt_started(&self) {
        self.shared.driven.calling.fetch_add(1, Ordering::AcqRel);
    }

    pub(super) fn attempt_ended(&self) {
        self.shared.driven.calling.fetch_sub(1, Ordering::AcqRel);
    }

    pub(super) fn ended(&self, status: RequestStatus) {
        let counter = match status {
            RequestStatus::Completed => &self.shared.driven.completed,
            RequestStatus::Failed => &self.shared.driven.failed,
            _ => &self.shared.driven.cancelled,
        };
        counter.fetch_add(1, Ordering::AcqRel);
    }

    pub(super) fn publish(&self, status: RequestStatus, event: impl FnOnce() -> EventHandle) {
        if self.shared.subscribers.load(Ordering::Acquire) > 0 {
            // Fails if the last subscriber has just left.
            let _ = self.shared.updates.send(EventUpdate { status, event: event() });
        }
    }
}

impl Default for Events {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Events")
            .field("totals", &self.totals())
            .finish_non_exhaustive()
    }
}

// === impl Totals ===

impl Totals {
    /// Calls that are over, however they ended.
    #[must_use]
    pub const fn ended(&self) -> u64 {
        self.completed + self.failed + self.cancelled
    }

    /// Calls that are not over yet.
    #[must_use]
    pub const fn open(&self) -> u64 {
        self.opened.saturating_sub(self.ended())
    }
}

// === impl Subscription ===

impl Subscription {
    /// The next update, when there is one; `None` when there will be no more: what reported is gone (an executor, say,
    /// with its monitors), and so are all handles to its events.
    ///
    /// # Errors
    ///
    /// [`Lagged`] says how many updates were missed; the next one follows.
    ///
    /// # Cancel safety
    ///
    /// Nothing is lost.
    pub async fn recv(&mut self) -> Option<Result<EventUpdate, Lagged>> {
        match self.updates.recv().await {
            Ok(update) => Some(Ok(update)),
            Err(broadcast::error::RecvError::Lagged(missed)) => Some(Err(Lagged { missed })),
            Err(broadcast::error::RecvError::Closed) => None,
        }
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.subscribers.fetch_sub(1, Ordering::AcqRel);
    }
}

// === impl Lagged ===

impl Lagged {
    /// How many updates were missed.
    #[must_use]
    pub const fn missed(&self) -> u64 {
        self.missed
    }
}

impl fmt::Display for Lagged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} updates were missed", self.missed)
    }
}

impl std::error::Error for Lagged {}
