//! [`NestedWaits`]: finds calls that wait for themselves.
//!
//! A call may submit another call to its own executor and await it. While it does, it keeps its permit of the
//! concurrency limit. If every permit is held by such a call, and none of the awaited calls has a permit, none of them
//! can ever begin. The call that completes this circle fails with [`Deadlock`], instead of hanging for ever.

use crate::{
    concurrency::Concurrency,
    error::Deadlock,
    event::{self, EventHandle, Events, RequestStatus, Stage},
};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

/// The calls of one executor that hold a permit and await a call of the same executor that has none.
pub(super) struct NestedWaits {
    events: Events,
    concurrency: Concurrency,
    /// How many calls each waiting call awaits, by the key of the waiting call's event.
    waiting: Mutex<HashMap<usize, usize>>,
}

/// One call that awaits another one, until this guard is dropped.
pub(super) struct NestedWait {
    waits: Arc<NestedWaits>,
    /// The key of the waiting call's event.
    outer: usize,
}

impl NestedWaits {
    pub(super) fn new(events: Events, concurrency: Concurrency) -> Arc<Self> {
        Arc::new(Self {
            events,
            concurrency,
            waiting: Mutex::default(),
        })
    }

    /// Called when a call's future is polled and is not ready. If the task that polls it is itself a call of this
    /// executor that holds a permit, and `awaited` has none, notes in `wait` that the one waits for the other.
    ///
    /// # Errors
    ///
    /// [`Deadlock`] if no call that holds a permit can go on.
    pub(super) fn check(
        self: &Arc<Self>,
        awaited: &EventHandle,
        wait: &mut Option<Box<NestedWait>>,
    ) -> Result<(), Deadlock> {
        let Some(outer) = event::current() else {
            return Ok(());
        };
        // A call holds its permit while its client runs, that is, in the innermost stage.
        if outer.stage() != Stage::Calling || !outer.reports_to(&self.events) {
            return Ok(());
        }
        if awaited.status() >= RequestStatus::Calling {
            *wait = None;
            return Ok(());
        }
        if wait.is_none() {
            *wait = Some(Box::new(NestedWait::new(self, outer.key())));
        }
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner).len();
        let held = self.concurrency.in_flight();
        if held < self.concurrency.get() || waiting < held {
            return Ok(());
        }
        *wait = None;
        let deadlock = Deadlock::new(held);
        tracing::warn!(target: "tower_outbound", "{deadlock}");
        outer.log(deadlock.to_string());
        Err(deadlock)
    }
}

impl NestedWait {
    fn new(waits: &Arc<NestedWaits>, outer: usize) -> Self {
        let mut waiting = waits.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        *waiting.entry(outer).or_insert(0) += 1;
        Self {
            waits: waits.clone(),
            outer,
        }
    }
}

impl Drop for NestedWait {
    fn drop(&mut self) {
        let mut waiting = self.waits.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = waiting.get_mut(&self.outer) {
            *count -= 1;
            if *count == 0 {
                waiting.remove(&self.outer);
            }
        }
    }
}
