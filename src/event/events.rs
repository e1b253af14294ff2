//! [`Events`]: the events of an executor or a stack, counted and to be subscribed to.

use super::{
    details::RequestDetails,
    handle::{EventHandle, Stage, Writer},
    reporter::{Receiver, Reporter, Totals},
    status::RequestStatus,
};
use std::{fmt, sync::Arc};
use tracing::Span;

/// Counts the events of the layers that [report to](super::EventLayer::report_to) it, and sends every new status to its
/// subscribers. Clones share the counts and the subscribers.
#[derive(Clone)]
pub struct Events {
    reporter: Arc<Reporter<EventHandle>>,
}

/// An event has a new status.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct EventUpdate {
    /// The new status. The event itself may have moved on since.
    pub status: RequestStatus,
    /// The event.
    pub event: EventHandle,
}

/// Receives the updates of all events, from the time of [`Events::subscribe`] on.
#[derive(Debug)]
pub struct Subscription {
    receiver: Receiver<EventHandle>,
}

/// The subscriber was too slow and has missed updates.
///
/// Calls do not wait for a slow subscriber. The next [`Subscription::recv`] returns the oldest update that is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lagged {
    missed: u64,
}

// === impl Events ===

impl Events {
    /// Creates one without events.
    #[must_use]
    pub fn new() -> Self {
        Self {
            reporter: Arc::new(Reporter::new()),
        }
    }

    /// The numbers of calls so far, by outcome.
    #[must_use]
    pub fn totals(&self) -> Totals {
        self.reporter.totals()
    }

    /// The number of attempts that are on the wire now.
    #[must_use]
    pub fn calling(&self) -> usize {
        self.reporter.calling()
    }

    /// Subscribes to every new status from now on.
    ///
    /// A subscriber that falls more than 4,096 updates behind misses the oldest, and [`Subscription::recv`] returns how
    /// many.
    #[must_use]
    pub fn subscribe(&self) -> Subscription {
        Subscription {
            receiver: self.reporter.subscribe(),
        }
    }

    /// Opens an event that reports here: see [`Writer::open`].
    pub(crate) fn open(&self, describe: impl FnOnce(&mut RequestDetails), stage: Stage) -> (Writer, Option<Box<Span>>) {
        Writer::open(describe, Some(self.reporter()), stage)
    }

    pub(super) fn reporter(&self) -> Arc<Reporter<EventHandle>> {
        self.reporter.clone()
    }
}

impl EventHandle {
    /// Whether the event is one of `events`.
    pub(crate) fn reports_to(&self, events: &Events) -> bool {
        self.reporter()
            .is_some_and(|reporter| Arc::ptr_eq(reporter, &events.reporter))
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

// === impl Subscription ===

impl Subscription {
    /// Waits for the next update.
    ///
    /// Returns `None` when there will be no more: everything that reports to the [`Events`] is dropped (an executor
    /// with its monitors, or the layers and services), and so are all handles to its events.
    ///
    /// # Errors
    ///
    /// [`Lagged`] with the number of missed updates, if the subscriber fell more than 4,096 updates behind.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe: no update is lost if the future is dropped before it completes.
    pub async fn recv(&mut self) -> Option<Result<EventUpdate, Lagged>> {
        let update = self.receiver.recv().await?;
        Some(match update {
            Ok((status, event)) => Ok(EventUpdate { status, event }),
            Err(missed) => Err(Lagged { missed }),
        })
    }
}

// === impl Lagged ===

impl Lagged {
    /// The number of updates that were missed.
    #[must_use]
    pub const fn missed(&self) -> u64 {
        self.missed
    }
}

impl fmt::Display for Lagged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let missed = self.missed;
        write!(f, "the subscriber was too slow and has missed {missed} updates")
    }
}

impl std::error::Error for Lagged {}
