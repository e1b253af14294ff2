//! [`Monitor`]: what an executor is doing, from outside.

use crate::{
    concurrency::Concurrency,
    event::{Events, Subscription, Totals},
    rate::Limiter,
    semaphore::Semaphore,
};
use std::sync::{Arc, Mutex, PoisonError};

/// Shows what an executor is doing, and changes its limits. It does not keep the executor alive. Clones show the same.
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
    /// The places of the queue that was started last; `None` before the first start.
    places: Arc<Mutex<Option<Semaphore>>>,
}

impl Monitor {
    pub(super) fn new(limiter: Limiter, concurrency: Concurrency) -> Self {
        Self {
            limiter,
            concurrency,
            events: Events::new(),
            places: Arc::default(),
        }
    }

    /// Counts the calls of a queue that was just started.
    pub(super) fn watch(&self, places: Semaphore) {
        *self.places.lock().unwrap_or_else(PoisonError::into_inner) = Some(places);
    }

    pub(super) const fn events(&self) -> &Events {
        &self.events
    }

    /// How many calls are queued: those that have a place and have not begun.
    #[must_use]
    pub fn queue_depth(&self) -> usize {
        self.places
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .as_ref()
            .map_or(0, Semaphore::held)
    }

    /// How many calls hold a permit: on the wire, or waiting for the rate limit.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.concurrency.in_flight()
    }

    /// How many calls are on the wire.
    #[must_use]
    pub fn calling(&self) -> usize {
        self.events.calling()
    }

    /// How many calls there were since the executor was built, by outcome.
    #[must_use]
    pub fn totals(&self) -> Totals {
        self.events.totals()
    }

    /// Subscribes to every change of a call's status from now on.
    #[must_use]
    pub fn subscribe(&self) -> Subscription {
        self.events.subscribe()
    }

    /// The rates: shows what is left of them, changes and pauses them.
    #[must_use]
    pub const fn limiter(&self) -> &Limiter {
        &self.limiter
    }

    /// The concurrency limit: shows and changes it.
    #[must_use]
    pub const fn concurrency(&self) -> &Concurrency {
        &self.concurrency
    }
}
