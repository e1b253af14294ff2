//! The queue's timer: a task that keeps the time.
//!
//! It calls the first in queue when the resource availability, and passes over the skipped. There is one for each runtime that has
//! waiters, and it ends when nobody waits.

use super::{
    order::{Deferred, Order},
    resource::Resource,
};
use crate::{
    clock::LazyNow,
    panic,
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

/// Shared by the queue, its tickets and its timers.
pub(super) struct Shared<R: Resource> {
    order: Mutex<Order<R>>,
    /// Tells the timers that there is something earlier to do, or nothing at all.
    rescheduled: Notify,
}

/// A timer's registration; taken back when it ends, however it ends.
struct TimerTask<R: Resource> {
    shared: Arc<Shared<R>>,
    runtime: Option<Id>,
}

// === impl Shared ===

impl<R: Resource> Shared<R> {
    pub(super) fn new(resource: R) -> Self {
        Self {
            order: Mutex::new(Order::new(resource)),
            rescheduled: Notify::new(),
        }
    }

    /// No code but ours runs under this lock, so a poisoned one is as good as any.
    pub(super) fn lock(&self) -> MutexGuard<'_, Order<R>> {
        self.order.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Panics here, in the waiter, where it is seen, if there is no timer that could end the waiting.
    pub(super) fn check_timer(self: &Arc<Self>, deferred: &Deferred) {
        if deferred.needs_timer && (deferred.start_timer.is_some() || Handle::try_current().is_err()) {
            let registered = deferred
                .start_timer
                .as_ref()
                .map(|runtime| TimerTask::new(self.clone(), runtime));
            drop(time::sleep(Duration::ZERO));
            if let Some(timer) = registered {
                timer.forget();
            }
        }
    }

    /// Does what was on_dequeue to be done once the lock is released.
    pub(super) fn finish(self: &Arc<Self>, deferred: Deferred) {
        if let Some(runtime) = deferred.start_timer {
            TimerTask::new(self.clone(), &runtime).start(&runtime);
        }
        if deferred.reschedule_timers {
            self.rescheduled.notify_waiters();
        }
        if let Some(waker) = deferred.wake {
            panic::wake(waker);
        }
        drop(deferred.discard);
    }
}

// === impl TimerTask ===

impl<R: Resource> TimerTask<R> {
    /// For a runtime that has just been entered among the queue's timers.
    fn new(shared: Arc<Shared<R>>, runtime: &Handle) -> Self {
        Self {
            shared,
            runtime: Some(runtime.id()),
        }
    }

    fn start(self, runtime: &Handle) {
        runtime.spawn(run(self));
    }

    /// Leaves the registration to another one.
    fn forget(mut self) {
        self.runtime = None;
    }
}

async fn run<R: Resource>(mut timer: TimerTask<R>) {
    let shared = timer.shared.clone();
    loop {
        let rescheduled = shared.rescheduled.notified();
        tokio::pin!(rescheduled);
        rescheduled.as_mut().enable();

        let deadline = {
            let mut order = shared.lock();
            let deferred = order.advance(&mut LazyNow::default());
            if order.waiting.is_empty() {
                // Under the lock, so that whoever joins next starts a new timer.
                order.remove_timer(timer.runtime.take());
                return;
            }
            let deadline = order.deadline;
            order.armed = deadline;
            drop(order);
            shared.finish(deferred);
            deadline
        };

        match deadline {
            // Whichever comes first.
            Some(deadline) => drop(time::timeout_at(deadline, rescheduled).await),
            None => rescheduled.await,
        }
    }
}

impl<R: Resource> Drop for TimerTask<R> {
    fn drop(&mut self) {
        self.shared.lock().remove_timer(self.runtime);
        self.shared.rescheduled.notify_waiters();
    }
}
