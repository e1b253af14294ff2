//! The timer task of a wait queue: notifies the first waiter at the instant until which it has to wait, and skips
//! notified waiters that take nothing within [`HANDOFF_TIMEOUT`](super::order::HANDOFF_TIMEOUT).
//!
//! The waiters have no timers themselves, because only the first waiter needs a timer, and the first waiter may never
//! be polled again. A timer task is started when a waiter needs it, and ends when the queue is empty. Each runtime that
//! has waiters gets its own timer task, so that its waiters are notified even after another runtime has been shut down.

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

/// The [`Order`] (the ordered list of waiters) of a wait queue, in a mutex, shared by the queue's handles, its waiters
/// and its timer tasks.
pub(super) struct LockedOrder<R: Resource> {
    order: Mutex<Order<R>>,
    /// Wakes the timer tasks before their deadline: the deadline has become earlier, the queue is empty, or one of the
    /// tasks has ended.
    rescheduled: Notify,
}

/// The registration of a timer task for its runtime. The registration is removed when the task ends, which happens when
/// the queue is empty or the runtime is shut down.
struct TimerTask<R: Resource> {
    locked: Arc<LockedOrder<R>>,
    /// The runtime whose registration is removed when this value is dropped. `None` if no registration is removed then.
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

    /// Locks the ordered list of waiters. Poisoning of the mutex is ignored: the only user code that runs under this
    /// lock is the clone of a waker, and a panic there leaves the list in a usable state.
    pub(super) fn lock(&self) -> MutexGuard<'_, Order<R>> {
        self.order.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Panics, as Tokio's own timers do, if a waiter has to wait until a certain instant and is polled outside a Tokio
    /// runtime, or in a runtime that has no timer enabled.
    ///
    /// The check is made in the waiter's `poll`, where the caller sees the panic. A panic of the timer task would not
    /// be seen, and the waiter would wait forever.
    pub(super) fn check_timer(self: &Arc<Self>, deferred: &Deferred) {
        if deferred.needs_timer && (deferred.start_timer.is_some() || Handle::try_current().is_err()) {
            // If `sleep` panics, the timer task is not started. Then `registered` is dropped, which removes the task's
            // registration.
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

    /// Carries out the actions that were deferred until the lock was released.
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
    /// Creates the owner of the registration that [`Order::advance`] has just made for `runtime`.
    fn new(locked: Arc<LockedOrder<R>>, runtime: &Handle) -> Self {
        Self {
            locked,
            runtime: Some(runtime.id()),
        }
    }

    fn start(self, runtime: &Handle) {
        runtime.spawn(run(self));
    }

    /// Drops this value without removing the registration of the timer task.
    fn forget(mut self) {
        self.runtime = None;
    }
}

async fn run<R: Resource>(mut timer: TimerTask<R>) {
    let locked = timer.locked.clone();
    loop {
        // The task listens for changes before it reads the deadline, so that it misses no later change of the deadline.
        let rescheduled = locked.rescheduled.notified();
        tokio::pin!(rescheduled);
        rescheduled.as_mut().enable();

        let deadline = {
            let mut order = locked.lock();
            let deferred = order.advance(&mut LazyNow::default());
            if order.waiting.is_empty() {
                // The registration is removed while the list of waiters is still locked, so that the next waiter that
                // enters the queue starts a new task.
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
            // The task continues when the deadline has passed or was changed. In both cases `advance` decides what to
            // do.
            Some(deadline) => drop(time::timeout_at(deadline, rescheduled).await),
            None => rescheduled.await,
        }
    }
}

impl<R: Resource> Drop for TimerTask<R> {
    fn drop(&mut self) {
        self.locked.lock().remove_timer(self.runtime);
        // The timer tasks of other runtimes have to read the deadline again, because the ended task no longer sleeps
        // until it.
        self.locked.rescheduled.notify_waiters();
    }
}
