//! [`WaitQueue`]: fair waiting for something limited.
//!
//! A call waits for a place in the queue, for a permit to be in flight, and for the tokens of a rate. What is limited
//! and when it is available differs, and is the [`Resource`]'s part. The order of the waiters is the same everywhere,
//! and is this module's:
//!
//! 1. **First come, first served.** A newcomer never overtakes a waiter.
//! 2. **Waiting reserves nothing.** The first waiter is *notified* when the resource is available: it is woken, and
//!    takes what it waits for when it is polled. A waiter that is dropped has nothing to give back.
//! 3. **One waiter is notified at a time**, and only when the resource is available to it. So a release wakes one task,
//!    however long the queue is.
//! 4. **A waiter that does not respond does not block the others.** If a notified waiter takes nothing within
//!    [`HANDOFF_TIMEOUT`](order::HANDOFF_TIMEOUT) (5 ms), it is *skipped* and the next one is notified. A skipped
//!    waiter keeps its sequence number: when it is polled again it is before all waiters that came after it.
//!
//! A [timer task](timer) notifies the first waiter when it waits for an instant, and skips waiters. It exists only
//! while there are waiters.
//!
//! The files import in one direction: this one uses [`timer`], which uses [`order`], which uses [`resource`].

#[cfg(all(test, tower_outbound_loom))]
mod interleavings;
mod order;
mod resource;
mod timer;

pub(crate) use resource::{Availability, Resource};

use crate::{clock::LazyNow, panic};
use std::{
    fmt,
    sync::Arc,
    task::{Context, Poll},
};
use timer::LockedOrder;
use tokio::time::Instant;

/// A resource and the queue of waiters in front of it. Clones share both.
pub(crate) struct WaitQueue<R: Resource> {
    locked: Arc<LockedOrder<R>>,
}

/// One waiter's handle. Dropped, it gives up its place in the queue.
pub(crate) struct Waiter<R: Resource> {
    locked: Arc<LockedOrder<R>>,
    /// The sequence number, which is the waiter's place in the queue. `None` until it has to wait.
    seq: Option<u64>,
}

// === impl WaitQueue ===

impl<R: Resource> WaitQueue<R> {
    pub(crate) fn new(resource: R) -> Self {
        Self {
            locked: Arc::new(LockedOrder::new(resource)),
        }
    }

    pub(crate) fn waiter(&self) -> Waiter<R> {
        Waiter {
            locked: self.locked.clone(),
            seq: None,
        }
    }

    /// Takes what `request` wants if it is available now and no waiter is before it. Returns whether it was taken.
    pub(crate) fn try_acquire(&self, request: &R::Request, mut now: LazyNow) -> Result<bool, R::Rejection> {
        // There is nothing to advance afterwards: a newcomer takes something only if the queue is empty.
        self.locked.lock().try_take(None, request, &mut now)
    }

    /// Reads the resource. A change that a waiter could be waiting for needs [`update`](Self::update).
    pub(crate) fn inspect<T>(&self, read: impl FnOnce(&mut R, &mut LazyNow) -> T) -> T {
        read(&mut self.locked.lock().resource, &mut LazyNow::default())
    }

    /// Changes the resource in a way that matters to the first waiter only, such as a release of permits.
    pub(crate) fn update<T>(&self, change: impl FnOnce(&mut R, &mut LazyNow) -> T) -> T {
        let mut now = LazyNow::default();
        let mut order = self.locked.lock();
        let output = change(&mut order.resource, &mut now);
        if !order.waiting.is_empty() {
            let deferred = order.advance(&mut now);
            drop(order);
            self.locked.finish(deferred);
        }
        output
    }

    /// Changes the resource in a way that matters to every waiter, such as closing it, and wakes all of them. Waiters
    /// that are still not first wait on, in their old order.
    pub(crate) fn update_and_wake_all<T>(&self, change: impl FnOnce(&mut R, &mut LazyNow) -> T) -> T {
        let output = self.update(change);
        let wakers: Vec<_> = {
            let order = self.locked.lock();
            order
                .waiting
                .values()
                .chain(order.skipped.values())
                .map(|entry| entry.waker.clone())
                .collect()
        };
        wakers.into_iter().for_each(panic::wake);
        output
    }
}

impl<R: Resource> Clone for WaitQueue<R> {
    fn clone(&self) -> Self {
        Self {
            locked: self.locked.clone(),
        }
    }
}

impl<R: Resource> fmt::Debug for WaitQueue<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WaitQueue")
            .field("waiting", &self.locked.lock().waiting.len())
            .finish()
    }
}

// === impl Waiter ===

impl<R: Resource> Waiter<R> {
    pub(crate) fn queue(&self) -> WaitQueue<R> {
        WaitQueue {
            locked: self.locked.clone(),
        }
    }

    /// Waits until this waiter is first and the resource is available to it.
    ///
    /// Does not reserve: the waiter keeps its place in the queue and must call [`poll_acquire`](Self::poll_acquire) or
    /// [`try_acquire`](Self::try_acquire) within [`HANDOFF_TIMEOUT`](order::HANDOFF_TIMEOUT), or the next waiter is
    /// notified.
    pub(crate) fn poll_ready(&mut self, request: &R::Request, cx: &mut Context<'_>) -> Poll<Result<(), R::Rejection>> {
        self.poll(request, cx, false, LazyNow::default())
    }

    /// Waits until this waiter has taken what `request` wants. It is not in the queue any more then.
    pub(crate) fn poll_acquire(
        &mut self,
        request: &R::Request,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), R::Rejection>> {
        self.poll(request, cx, true, LazyNow::default())
    }

    /// Does what [`poll_acquire`](Self::poll_acquire) does, with a time that was read before the lock is taken.
    ///
    /// A waiter that is in the queue already does not use `now` but reads the clock under the lock: other waiters may
    /// have taken something at a later instant than `now`.
    pub(crate) fn poll_acquire_at(
        &mut self,
        request: &R::Request,
        cx: &mut Context<'_>,
        now: Instant,
    ) -> Poll<Result<(), R::Rejection>> {
        let now = match self.seq {
            Some(_) => LazyNow::default(),
            None => LazyNow::at(now),
        };
        self.poll(request, cx, true, now)
    }

    /// Takes what `request` wants if it is available now and no other waiter is before this one. Returns whether it was
    /// taken. A waiter that is not in the queue does not enter it.
    pub(crate) fn try_acquire(&mut self, request: &R::Request) -> Result<bool, R::Rejection> {
        let mut now = LazyNow::default();
        let mut order = self.locked.lock();
        let taken = order.try_take(self.seq, request, &mut now);
        if let Ok(false) = taken {
            return taken;
        }
        let deferred = order.dequeue(self.seq.take(), &mut now);
        drop(order);
        self.locked.finish(deferred);
        taken
    }

    fn poll(
        &mut self,
        request: &R::Request,
        cx: &mut Context<'_>,
        takes: bool,
        mut now: LazyNow,
    ) -> Poll<Result<(), R::Rejection>> {
        let mut order = self.locked.lock();
        let done = if takes {
            order.try_take(self.seq, request, &mut now)
        } else {
            order.can_take(self.seq, request, &mut now)
        };
        if self.seq.is_none() && done != Ok(false) {
            // A waiter that need not wait never enters the queue.
            return Poll::Ready(done.map(drop));
        }
        let deferred = match done {
            Ok(false) => order.enqueue(&mut self.seq, request, cx.waker(), &mut now),
            Ok(true) if !takes => {
                // The waiter stays in the queue. If it has not been notified before, its timeout begins now.
                if let Some(seq) = self.seq {
                    if order.notified.is_none_or(|(notified, _)| notified != seq) {
                        order.notified = Some((seq, now.get()));
                    }
                }
                order.advance(&mut now)
            }
            Ok(true) | Err(_) => order.dequeue(self.seq.take(), &mut now),
        };
        drop(order);
        self.locked.check_timer(&deferred);
        self.locked.finish(deferred);
        match done {
            Ok(true) => Poll::Ready(Ok(())),
            Ok(false) => Poll::Pending,
            Err(rejection) => Poll::Ready(Err(rejection)),
        }
    }
}

/// The clone is another waiter of the same queue, outside the queue until it has to wait.
impl<R: Resource> Clone for Waiter<R> {
    fn clone(&self) -> Self {
        Self {
            locked: self.locked.clone(),
            seq: None,
        }
    }
}

impl<R: Resource> Drop for Waiter<R> {
    fn drop(&mut self) {
        if self.seq.is_some() {
            let deferred = self.locked.lock().dequeue(self.seq, &mut LazyNow::default());
            self.locked.finish(deferred);
        }
    }
}

impl<R: Resource> fmt::Debug for Waiter<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Waiter").field("seq", &self.seq).finish()
    }
}
