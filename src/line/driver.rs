//! The line's driver: a task that keeps the time.
//!
//! It calls the first in line when the gate opens, and passes over the silent. There is one for each runtime that has
//! waiters, and it ends when nobody waits.

use super::{Clock, Gate, Shared};
use std::sync::Arc;
use tokio::{
    runtime::{Handle, Id},
    time,
};

/// A driver's registration; taken back when it ends, however it ends.
pub(super) struct Driver<G: Gate> {
    shared: Arc<Shared<G>>,
    runtime: Option<Id>,
}

impl<G: Gate> Driver<G> {
    /// For a runtime that has just been entered among the line's drivers.
    pub(super) fn new(shared: Arc<Shared<G>>, runtime: &Handle) -> Self {
        Self {
            shared,
            runtime: Some(runtime.id()),
        }
    }

    pub(super) fn start(self, runtime: &Handle) {
        runtime.spawn(drive(self));
    }

    /// Leaves the registration to another one.
    pub(super) fn forget(mut self) {
        self.runtime = None;
    }
}

async fn drive<G: Gate>(mut driver: Driver<G>) {
    let shared = driver.shared.clone();
    loop {
        let moved = shared.moved.notified();
        tokio::pin!(moved);
        moved.as_mut().enable();

        let deadline = {
            let mut state = shared.lock();
            let after = state.advance(&mut Clock::default());
            if state.waiting.is_empty() {
                // Under the lock, so that whoever joins next starts a new driver.
                state.dismiss(driver.runtime.take());
                return;
            }
            let deadline = state.deadline;
            state.armed = deadline;
            drop(state);
            after.run(&shared);
            deadline
        };

        match deadline {
            Some(deadline) => {
                tokio::select! {
                    () = time::sleep_until(deadline) => {}
                    () = moved => {}
                }
            }
            None => moved.await,
        }
    }
}

impl<G: Gate> Drop for Driver<G> {
    fn drop(&mut self) {
        self.shared.lock().dismiss(self.runtime);
        self.shared.moved.notify_waiters();
    }
}
