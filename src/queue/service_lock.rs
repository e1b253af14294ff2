//! [`ServiceLock`]: the service, which one worker at a time has.

use crate::sync::{Mutex, MutexGuard};
use std::{
    collections::VecDeque,
    sync::{Arc, PoisonError},
    task::{Context, Poll, Waker},
};

/// Where the service lies when nobody has it.
pub(super) struct ServiceLock<S> {
    rest: Arc<Mutex<LockState<S>>>,
}

struct LockState<S> {
    service: Option<S>,
    /// Those who wait, in order.
    waiting: VecDeque<Waker>,
}

/// The service, in hand. Dropped, it is laid down, and the next who waits is told.
pub(super) struct ServiceGuard<S> {
    service: Option<S>,
    service_lock: ServiceLock<S>,
}

impl<S> ServiceLock<S> {
    pub(super) fn new(service: S) -> Self {
        let rest = LockState {
            service: Some(service),
            waiting: VecDeque::new(),
        };
        Self {
            rest: Arc::new(Mutex::new(rest)),
        }
    }

    pub(super) fn poll_acquire(&self, cx: &Context<'_>) -> Poll<ServiceGuard<S>> {
        let mut rest = self.lock();
        if let Some(service) = rest.service.take() {
            // Who comes of itself waits no more: the next to be told is another.
            rest.waiting.retain(|waker| !waker.will_wake(cx.waker()));
            return Poll::Ready(ServiceGuard {
                service: Some(service),
                service_lock: self.clone(),
            });
        }
        if !rest.waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
            rest.waiting.push_back(cx.waker().clone());
        }
        Poll::Pending
    }

    fn lock(&self) -> MutexGuard<'_, LockState<S>> {
        self.rest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<S> Clone for ServiceLock<S> {
    fn clone(&self) -> Self {
        Self {
            rest: self.rest.clone(),
        }
    }
}

impl<S> ServiceGuard<S> {
    pub(super) const fn service(&mut self) -> &mut S {
        self.service.as_mut().expect("it is in hand until it is dropped")
    }
}

impl<S> Drop for ServiceGuard<S> {
    fn drop(&mut self) {
        let next = {
            let mut rest = self.service_lock.lock();
            rest.service = self.service.take();
            rest.waiting.pop_front()
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
    fn who_comes_before_being_told_is_not_told_in_place_of_another() {
        let service_lock = ServiceLock::new(());
        let (mut one, mut other) = (task::spawn(()), task::spawn(()));
        let service_guard = service_lock.poll_acquire(&Context::from_waker(Waker::noop()));
        assert!(one.enter(|cx, _| service_lock.poll_acquire(cx)).is_pending());
        assert!(other.enter(|cx, _| service_lock.poll_acquire(cx)).is_pending());
        drop(service_guard);
        assert!(one.is_woken());
        // The other was not told, but comes first. The one who was told waits again.
        let service_guard = other.enter(|cx, _| service_lock.poll_acquire(cx));
        assert!(service_guard.is_ready());
        assert!(one.enter(|cx, _| service_lock.poll_acquire(cx)).is_pending());
        drop(service_guard);
        assert!(one.is_woken() && !other.is_woken());
    }
}
