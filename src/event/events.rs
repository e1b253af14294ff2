//! [`Events`]: counts the events of an executor or a stack of layers, and sends their new statuses to subscribers.

use super::{
    change::{Change, Refusal},
    details::RequestDetails,
    handle::{EventHandle, Stage, Writer},
    reporter::{Receiver, Reporter, Totals},
    status::RequestStatus,
};
use std::{fmt, sync::Arc};
use tracing::Span;

/// Counts the events of the layers that [report to](super::EventLayer::report_to) it, sends every new status of an event
/// to its [subscribers](Self::subscribe), and calls its [observers](Self::observe). Clones share all of them.
#[derive(Clone)]
pub struct Events {
    reporter: Arc<Reporter<EventHandle>>,
}

/// An update, received through a [`Subscription`]: an event has a new status.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct EventUpdate {
    /// The new status. The event itself may have a later status by now.
    pub status: RequestStatus,
    /// The event that got the new status.
    pub event: EventHandle,
}

/// Receives an update for every new status of the events that report to an [`Events`], from the time of
/// [`Events::subscribe`] on.
#[derive(Debug)]
pub struct Subscription {
    receiver: Receiver<EventHandle>,
}

/// The error of a subscriber that was too slow and has missed updates.
///
/// Calls do not wait for a slow subscriber. After this error, the next [`Subscription::recv`] returns the oldest update
/// that is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lagged {
    missed: u64,
}

// === impl Events ===

impl Events {
    /// Creates an `Events` whose counts are all zero. A layer reports to it after a call of
    /// [`EventLayer::report_to`](super::EventLayer::report_to).
    #[must_use]
    pub fn new() -> Self {
        Self {
            reporter: Arc::new(Reporter::new()),
        }
    }

    /// Returns how many calls were made so far, and how many have ended with each outcome.
    #[must_use]
    pub fn totals(&self) -> Totals {
        self.reporter.totals()
    }

    /// Returns the number of attempts that are on the wire now.
    #[must_use]
    pub fn calling(&self) -> usize {
        self.reporter.calling()
    }

    /// Subscribes to every new status that an event gets from now on.
    ///
    /// A subscriber that falls more than 4,096 updates behind misses the oldest, and [`Subscription::recv`] returns how
    /// many it has missed. Under load that is usual: to count or to account for calls, [`observe`](Self::observe) them.
    #[must_use]
    pub fn subscribe(&self) -> Subscription {
        Subscription {
            receiver: self.reporter.subscribe(),
        }
    }

    /// Registers a function that is told of every step of every call.
    pub(super) fn listen(&self, listener: impl Fn(Option<&EventHandle>, Change<'_>) + Send + Sync + 'static) {
        self.reporter.listeners.add(listener);
    }

    /// Tells the observers that a call was refused before it had an event.
    #[cold]
    pub(crate) fn refused(&self, refusal: Refusal) {
        self.reporter.listeners.tell(None, Change::Refused(refusal));
    }

    /// Opens an event that reports to this `Events`: see [`Writer::open`].
    pub(crate) fn open(
        &self,
        describe: impl FnOnce(&mut RequestDetails),
        stage: Stage,
        is_queued: bool,
    ) -> (Writer, Option<Box<Span>>) {
        Writer::open(describe, Some(self.reporter()), stage, is_queued)
    }

    pub(super) fn reporter(&self) -> Arc<Reporter<EventHandle>> {
        self.reporter.clone()
    }
}

impl EventHandle {
    /// Whether the event reports to `events`.
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
    /// Waits for the next update, which is a new status of any of the events.
    ///
    /// Returns `None` when there can be no more updates: the [`Events`], everything that reports to it (an executor
    /// with its monitors, or the layers and services) and all handles to its events are dropped.
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
    /// Returns the number of updates that the subscriber has missed.
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
