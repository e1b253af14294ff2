//! The line's driver: a task that keeps the time.
//!
//! It calls the first in line when the gate opens, and passes over the silent. There is one for each runtime that has
//! waiters, and it ends when nobody waits.

use super::{
    gate::Gate,
    order::{After, State},
};
use crate::{
    clock::Reading,
    guard,
    sync::{Mutex, MutexGuard},
};
use std::{
    sync::{Arc, PoisonError},
    time::Duration,
};
use tokio::{
    runtime::{Handle, Id},
    sync::Notify,
    time,
};

/// Shared by the line, its tickets and its drivers.
pub(super) struct Shared<G: Gate> {
    state: Mutex<State<G>>,
    /// Tells the drivers that there is something earlier to do, or nothing at all.
    moved: Notify,
}

/// A driver's registration; taken back when it ends, however it ends.
struct Driver<G: Gate> {
    shared: Arc<Shared<G>>,
    runtime: Option<Id>,
}

// === impl Shared ===

impl<G: Gate> Shared<G> {
    pub(super) fn new(gate: G) -> Self {
        Self {
            state: Mutex::new(State::new(gate)),
            moved: Notify::new(),
        }
    }

    /// No code but ours runs under this lock, so a poisoned one is as good as any.
    pub(super) fn lock(&self) -> MutexGuard<'_, State<G>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Panics here, in the waiter, where it is seen, if there is no timer that could end the waiting.
    pub(super) fn check_timer(self: &Arc<Self>, after: &After) {
        if after.needs_timer && (after.start_driver.is_some() || Handle::try_current().is_err()) {
            let registered = after
                .start_driver
                .as_ref()
                .map(|runtime| Driver::new(self.clone(), runtime));
            drop(time::sleep(Duration::ZERO));
            if let Some(driver) = registered {
                driver.forget();
            }
        }
    }

    /// Does what was left to be done once the lock is released.
    pub(super) fn finish(self: &Arc<Self>, after: After) {
        if let Some(runtime) = after.start_driver {
            Driver::new(self.clone(), &runtime).start(&runtime);
        }
        if after.move_drivers {
            self.moved.notify_waiters();
        }
        if let Some(waker) = after.wake {
            guard::wake(waker);
        }
        drop(after.discard);
    }
}

// === impl Driver ===

impl<G: Gate> Driver<G> {
    /// For a runtime that has just been entered among the line's drivers.
    fn new(shared: Arc<Shared<G>>, runtime: &Handle) -> Self {
        Self {
            shared,
            runtime: Some(runtime.id()),
        }
    }

    fn start(self, runtime: &Handle) {
        runtime.spawn(drive(self));
    }

    /// Leaves the registration to another one.
    fn forget(mut self) {
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
            let after = state.advance(&mut Reading::default());
            if state.waiting.is_empty() {
                // Under the lock, so that whoever joins next starts a new driver.
                state.dismiss(driver.runtime.take());
                return;
            }
            let deadline = state.deadline;
            state.armed = deadline;
            drop(state);
            shared.finish(after);
            deadline
        };

        match deadline {
            // Whichever comes first.
            Some(deadline) => drop(time::timeout_at(deadline, moved).await),
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
