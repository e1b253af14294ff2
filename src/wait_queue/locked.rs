//! [`LockedOrder`]: the [`Order`] of a wait queue in a mutex, and what is done after the mutex was released: waking
//! waiters and arming [timers](super::timers).

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
    sync::{Arc, PoisonError, Weak},
    task::{Wake, Waker},
    time::Duration,
};
use tokio::{runtime::Id, time};

/// The [`Order`] (the ordered list of waiters) of a wait queue, in a mutex, shared by the queue's handles and its
/// waiters.
pub(super) struct LockedOrder<R: Resource> {
    order: Mutex<Order<R>>,
}

/// The waker of the timer of one runtime. Waking it advances the queue.
struct TimerWaker<R: Resource> {
    /// Weak, because the queue holds the timer, and the timer its waker.
    locked: Weak<LockedOrder<R>>,
    runtime: Id,
}

// === impl LockedOrder ===

impl<R: Resource> LockedOrder<R> {
    pub(super) fn new(resource: R) -> Self {
        Self {
            order: Mutex::new(Order::new(resource)),
        }
    }

    /// Locks the ordered list of waiters. Poisoning of the mutex is ignored: the only user code that runs under this
    /// lock is the clone of a waker, and a panic there leaves the list in a usable state.
    #[inline]
    pub(super) fn lock(&self) -> MutexGuard<'_, Order<R>> {
        self.order.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Panics, as Tokio's own timers do, if a waiter has to wait until a certain instant and is polled outside a Tokio
    /// runtime, or in a runtime that has no timer enabled.
    ///
    /// The check is made in the waiter's `poll`, where the caller sees the panic. When a timer is armed, a panic is
    /// caught, since the thread may belong to another waiter.
    pub(super) fn check_timer(deferred: &Deferred) {
        if deferred.needs_timer && deferred.is_timer_unproven {
            drop(time::sleep(Duration::ZERO));
        }
    }

    /// Carries out the actions that were deferred until the lock was released.
    pub(super) fn finish(self: &Arc<Self>, deferred: Deferred) {
        // The timers are armed first: a waker is user code, and might not return for long.
        if deferred.arm_timers {
            self.arm_timers();
        }
        wake(deferred);
    }

    /// Arms each timer that has to fire earlier than it would.
    fn arm_timers(self: &Arc<Self>) {
        loop {
            let Some(timer) = self.lock().take_unarmed_timer() else {
                return;
            };
            let mut armed = timer.arm(|runtime| self.timer_waker(runtime));
            let deferred = self.lock().put_back_timer(&mut armed);
            wake(deferred);
        }
    }

    fn timer_waker(self: &Arc<Self>, runtime: Id) -> Waker {
        Waker::from(Arc::new(TimerWaker {
            locked: Arc::downgrade(self),
            runtime,
        }))
    }
}

/// Wakes the notified waiters, and drops what is no longer needed.
fn wake(deferred: Deferred) {
    let Deferred {
        wake,
        wake_also,
        discard,
        discard_timers,
        ..
    } = deferred;
    wake.into_iter().chain(wake_also).for_each(panic::wake);
    drop((discard, discard_timers));
}

// === impl TimerWaker ===

impl<R: Resource> Wake for TimerWaker<R> {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let Some(locked) = self.locked.upgrade() else { return };
        let deferred = locked.lock().timer_fired(self.runtime, &mut LazyNow::default());
        locked.finish(deferred);
    }
}
