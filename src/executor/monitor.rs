//! [`Monitor`]: an executor's settings.

use crate::{
    concurrency::Concurrency,
    event::{Events, Subscription, Totals},
    rate::Limiter,
    semaphore::Semaphore,
};
use std::sync::{Arc, Mutex, PoisonError};

/// Watches an executor, without keeping it alive. Shared by its clones.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let executor = tower_outbound::Executor::builder().build_for_closures::<String>()?;
/// let monitor = executor.monitor();
/// assert_eq!((monitor.queue_depth(), monitor.in_flight(), monitor.totals().completed), (0, 0, 0));
/// assert_eq!(monitor.limiter().available().requests, Some(10));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Monitor {
    limiter: Limiter,
    concurrency: Concurrency,
    events: Events,
    /// Those of the queue that was started last.
    places: Arc<Mutex<Option<Semaphore>>>,
}

impl Monitor {
    pub(super) fn new(limiter: Limiter, concurrency: Concurrency, events: Events) -> Self {
        Self {
            limiter,
            concurrency,
            events,
            places: Arc::default(),
        }
    }

    pub(super) fn watch(&self, places: Semaphore) {
        *self.places.lock().unwrap_or_else(PoisonError::into_inner) = Some(places);
    }

    pub(super) const fn events(&self) -> &Events {
        &self.events
    }

    /// Calls in the queue: those that have a place and have not begun.
    #[must_use]
    pub fn queue_depth(&self) -> usize {
        self.places
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .as_ref()
            .map_or(0, Semaphore::held)
    }

    /// Calls that hold a permit: on the wire, or next to it, waiting for their rate.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.concurrency.in_flight()
    }

    /// Calls on the wire.
    #[must_use]
    pub fn calling(&self) -> usize {
        self.events.calling()
    }

    /// How many calls there were, by outcome, since the executor was built.
    #[must_use]
    pub fn totals(&self) -> Totals {
        self.events.totals()
    }

    /// Every change of a call's status from now on.
    #[must_use]
    pub fn subscribe(&self) -> Subscription {
        self.events.subscribe()
    }

    /// The rates: to see what is left, to change or pause them.
    #[must_use]
    pub const fn limiter(&self) -> &Limiter {
        &self.limiter
    }

    /// The concurrency limit: to see or change it.
    #[must_use]
    pub const fn concurrency(&self) -> &Concurrency {
        &self.concurrency
    }
}
