//! The timer task of a queue: notifies the first waiter at the instant it waits for, and skips waiters that take
//! nothing within [`HANDOFF_TIMEOUT`](super::order::HANDOFF_TIMEOUT).
//!
//! The waiters themselves sleep without timers, because only the first one needs one, and the first one may be a
//! waiter that is never polled again. The task is started when a waiter needs it and ends when the queue is empty.
//! There is one for each runtime that has waiters, so that waiters of one runtime are notified after another one has
//! been shut down.

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

/// The [`Order`] under its lock, shared by the queue's handles, its waiters and its timer tasks.
pub(super) struct LockedOrder<R: Resource> {
    order: Mutex<Order<R>>,
    /// Wakes the timer tasks before their deadline: there is an earlier one, or the queue is empty.
    rescheduled: Notify,
}

/// A runtime's registration among the queue's timers, removed when the task ends: the queue is empty, or the runtime
/// has been shut down.
struct TimerTask<R: Resource> {
    locked: Arc<LockedOrder<R>>,
    /// `None` if dropping this leaves the registration in place.
    runtime: Option<Id>,
}

// === impl LockedOrder ===

impl<R: Resource> LockedOrder<R> {
    pub(super) fn new(resource: R) -> Self {
        Self {
            order: Mutex::new(Order::new(resource)),
            rescheduled: Notify::new(),
        }
    }

    /// Locks the order. Poisoning is ignored: the only user code that runs under this lock is the clone of a waker, and
    /// a panic there leaves an order that can still be used.
    pub(super) fn lock(&self) -> MutexGuard<'_, Order<R>> {
        self.order.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Panics, as Tokio's own timers do, if a waiter waits for an instant and its runtime has no timer enabled.
    ///
    /// The panic belongs here, in the waiter's `poll`: in the timer task it would not be seen, and the waiter would
    /// wait forever.
    pub(super) fn check_timer(self: &Arc<Self>, deferred: &Deferred) {
        if deferred.needs_timer && (deferred.start_timer.is_some() || Handle::try_current().is_err()) {
            // Removes the registration of the task that is not started, if `sleep` panics.
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

    /// Carries out what was deferred until the lock was released.
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
    /// Takes over the registration that [`Order::advance`] has just made for `runtime`.
    fn new(locked: Arc<LockedOrder<R>>, runtime: &Handle) -> Self {
        Self {
            locked,
            runtime: Some(runtime.id()),
        }
    }

    fn start(self, runtime: &Handle) {
        runtime.spawn(run(self));
    }

    /// Drops this without removing the registration.
    fn forget(mut self) {
        self.runtime = None;
    }
}

async fn run<R: Resource>(mut timer: TimerTask<R>) {
    let locked = timer.locked.clone();
    loop {
        // Before the deadline is read, so that no later change of it is missed.
        let rescheduled = locked.rescheduled.notified();
        tokio::pin!(rescheduled);
        rescheduled.as_mut().enable();

        let deadline = {
            let mut order = locked.lock();
            let deferred = order.advance(&mut LazyNow::default());
            if order.waiting.is_empty() {
                // Under the lock, so that the next waiter that enters the queue starts a new task.
                order.remove_timer(timer.runtime.take());
                return;
            }
            let deadline = order.deadline;
            order.armed = deadline;
            drop(order);
            locked.finish(deferred);
            deadline
        };

        match deadline {
            // Either the deadline has passed or there is another one: `advance` decides what to do.
            Some(deadline) => drop(time::timeout_at(deadline, rescheduled).await),
            None => rescheduled.await,
        }
    }
}

impl<R: Resource> Drop for TimerTask<R> {
    fn drop(&mut self) {
        self.locked.lock().remove_timer(self.runtime);
        // The tasks of other runtimes have to look at the deadline again.
        self.locked.rescheduled.notify_waiters();
    }
}
