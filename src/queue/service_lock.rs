//! [`ServiceLock`]: a lock around the queue's inner service, which one worker at a time holds.

use crate::sync::{Mutex, MutexGuard};
use std::{
    collections::VecDeque,
    sync::{Arc, PoisonError},
    task::{Context, Poll, Waker},
};

/// A lock around the inner service, acquired by polling. Clones are handles to the same lock.
pub(super) struct ServiceLock<S> {
    state: Arc<Mutex<LockState<S>>>,
}

struct LockState<S> {
    /// The inner service. `None` while a worker holds it.
    service: Option<S>,
    /// The wakers of the workers that wait for the service, in the order in which the workers came.
    waiters: VecDeque<Waker>,
}

/// A guard that holds the inner service. When dropped, it returns the service to the lock and wakes the next waiting
/// worker.
pub(super) struct ServiceGuard<S> {
    service: Option<S>,
    lock: ServiceLock<S>,
}

impl<S> ServiceLock<S> {
    pub(super) fn new(service: S) -> Self {
        let state = LockState {
            service: Some(service),
            waiters: VecDeque::new(),
        };
        Self {
            state: Arc::new(Mutex::new(state)),
        }
    }

    pub(super) fn poll_acquire(&self, cx: &Context<'_>) -> Poll<ServiceGuard<S>> {
        let mut state = self.state();
        if let Some(service) = state.service.take() {
            // A worker can acquire the lock without having been woken. Its waker then has to leave the waiters:
            // otherwise a later release would wake this worker in place of one that needs the service.
            state.waiters.retain(|waker| !waker.will_wake(cx.waker()));
            return Poll::Ready(ServiceGuard {
                service: Some(service),
                lock: self.clone(),
            });
        }
        if !state.waiters.iter().any(|waker| waker.will_wake(cx.waker())) {
            state.waiters.push_back(cx.waker().clone());
        }
        Poll::Pending
    }

    fn state(&self) -> MutexGuard<'_, LockState<S>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<S> Clone for ServiceLock<S> {
    fn clone(&self) -> Self {
        Self {
            state: self.state.clone(),
        }
    }
}

impl<S> ServiceGuard<S> {
    pub(super) const fn service(&mut self) -> &mut S {
        self.service
            .as_mut()
            .expect("the guard holds the service until it is dropped")
    }
}

impl<S> Drop for ServiceGuard<S> {
    fn drop(&mut self) {
        let next = {
            let mut state = self.lock.state();
            state.service = self.service.take();
            state.waiters.pop_front()
        };
        if let Some(next) = next {
            next.wake();
        }
    }
}

#[cfg(all(test, not(tower_outbound_loom)))]
mod tests {
    use super::*;
    use tokio_test::task;

    #[test]
    fn a_worker_that_acquires_the_service_before_it_is_woken_is_not_woken_in_place_of_another() {
        let lock = ServiceLock::new(());
        let (mut first, mut second) = (task::spawn(()), task::spawn(()));
        let guard = lock.poll_acquire(&Context::from_waker(Waker::noop()));
        assert!(first.enter(|cx, _| lock.poll_acquire(cx)).is_pending());
        assert!(second.enter(|cx, _| lock.poll_acquire(cx)).is_pending());
        drop(guard);
        assert!(first.is_woken());
        // The second worker acquires the service although it was not woken. The first worker, which was woken, waits
        // again.
        let guard = second.enter(|cx, _| lock.poll_acquire(cx));
        assert!(guard.is_ready());
        assert!(first.enter(|cx, _| lock.poll_acquire(cx)).is_pending());
        drop(guard);
        assert!(first.is_woken() && !second.is_woken());
    }
}
