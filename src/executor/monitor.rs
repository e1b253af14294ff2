//! [`Monitor`]: a handle to watch an executor and change its limits.

use crate::{
    concurrency::Concurrency,
    event::{Events, Subscription, Totals},
    rate::{Available, Pause, RateLimiter},
    semaphore::Semaphore,
};
use std::sync::{Arc, Mutex, PoisonError};

/// Shows what an executor is doing, and changes its limits. A monitor does not keep its executor alive. Clones are
/// monitors of the same executor.
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
    limiter: RateLimiter,
    concurrency: Concurrency,
    events: Events,
    /// The places of the queue that the most recent start created, which count the queued calls. `None` before the
    /// first start.
    places: Arc<Mutex<Option<Semaphore>>>,
}

impl Monitor {
    pub(super) fn new(limiter: RateLimiter, concurrency: Concurrency) -> Self {
        Self {
            limiter,
            concurrency,
            events: Events::new(),
            places: Arc::default(),
        }
    }

    /// Makes [`queue_depth`](Self::queue_depth) count the calls of a queue that was just started, by the queue's
    /// `places`.
    pub(super) fn watch(&self, places: Semaphore) {
        *self.places.lock().unwrap_or_else(PoisonError::into_inner) = Some(places);
    }

    /// Returns the events of the executor's calls, which can be counted, subscribed to and [observed](Events::observe).
    #[must_use]
    pub const fn events(&self) -> &Events {
        &self.events
    }

    /// Returns how many calls are queued: they have a place in the queue and have not begun.
    #[must_use]
    pub fn queue_depth(&self) -> usize {
        self.places
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .as_ref()
            .map_or(0, Semaphore::held)
    }

    /// Returns how many calls hold a permit of the concurrency limit: they are on the wire, or wait for the rate limit.
    /// If the limit is shared, the calls of all executors and layers that share it are counted.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.concurrency.in_flight()
    }

    /// Returns how many calls are on the wire, that is, in the client.
    #[must_use]
    pub fn calling(&self) -> usize {
        self.events.calling()
    }

    /// Returns how many calls there were since the executor was built, in total and by outcome.
    #[must_use]
    pub fn totals(&self) -> Totals {
        self.events.totals()
    }

    /// Subscribes to every change of the status of any call from now on.
    #[must_use]
    pub fn subscribe(&self) -> Subscription {
        self.events.subscribe()
    }

    /// Returns the rate limiter, which shows what is left of the rates, changes them and pauses them.
    #[must_use]
    pub const fn limiter(&self) -> &RateLimiter {
        &self.limiter
    }

    /// Returns what the rate limiter's buckets hold now, by budget. A new call gets it only after the calls that wait.
    #[must_use]
    pub fn available(&self) -> Available {
        self.limiter.available()
    }

    /// Returns the current pause of the rate limiter, with its end and with who has begun it: the program or the
    /// provider. `None` if the limiter is not paused. [`RateLimiter::resume`] ends a pause.
    #[must_use]
    pub fn paused(&self) -> Option<Pause> {
        self.limiter.paused()
    }

    /// Returns the concurrency limit, which can be watched and changed.
    #[must_use]
    pub const fn concurrency(&self) -> &Concurrency {
        &self.concurrency
    }
}
