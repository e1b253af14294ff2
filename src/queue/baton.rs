//! [`Baton`]: the service, which one worker at a time has.

use crate::sync::{Mutex, MutexGuard};
use std::{
    collections::VecDeque,
    sync::{Arc, PoisonError},
    task::{Context, Poll, Waker},
};

/// Where the service lies when nobody has it.
pub(super) struct Baton<S> {
    rest: Arc<Mutex<Rest<S>>>,
}

struct Rest<S> {
    service: Option<S>,
    /// Those who wait, in order.
    waiting: VecDeque<Waker>,
}

/// The service, in hand. Dropped, it is laid down, and the next who waits is told.
pub(super) struct InHand<S> {
    service: Option<S>,
    baton: Baton<S>,
}

impl<S> Baton<S> {
    pub(super) fn new(service: S) -> Self {
        let rest = Rest {
            service: Some(service),
            waiting: VecDeque::new(),
        };
        Self {
            rest: Arc::new(Mutex::new(rest)),
        }
    }

    pub(super) fn poll_take(&self, cx: &Context<'_>) -> Poll<InHand<S>> {
        let mut rest = self.lock();
        if let Some(service) = rest.service.take() {
            // Who comes of itself waits no more: the next to be told is another.
            rest.waiting.retain(|waker| !waker.will_wake(cx.waker()));
            return Poll::Ready(InHand {
                service: Some(service),
                baton: self.clone(),
            });
        }
        if !rest.waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
            rest.waiting.push_back(cx.waker().clone());
        }
        Poll::Pending
    }

    fn lock(&self) -> MutexGuard<'_, Rest<S>> {
        self.rest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<S> Clone for Baton<S> {
    fn clone(&self) -> Self {
        Self {
            rest: self.rest.clone(),
        }
    }
}

impl<S> InHand<S> {
    pub(super) const fn service(&mut self) -> &mut S {
        self.service.as_mut().expect("it is in hand until it is dropped")
    }
}

impl<S> Drop for InHand<S> {
    fn drop(&mut self) {
        let next = {
            let mut rest = self.baton.lock();
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
        let baton = Baton::new(());
        let (mut one, mut other) = (task::spawn(()), task::spawn(()));
        let in_hand = baton.poll_take(&Context::from_waker(Waker::noop()));
        assert!(one.enter(|cx, _| baton.poll_take(cx)).is_pending());
        assert!(other.enter(|cx, _| baton.poll_take(cx)).is_pending());
        drop(in_hand);
        assert!(one.is_woken());
        // The other was not told, but comes first. The one who was told waits again.
        let in_hand = other.enter(|cx, _| baton.poll_take(cx));
        assert!(in_hand.is_ready());
        assert!(one.enter(|cx, _| baton.poll_take(cx)).is_pending());
        drop(in_hand);
        assert!(one.is_woken() && !other.is_woken());
    }
}
