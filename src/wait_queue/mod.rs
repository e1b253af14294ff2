//! [`WaitQueue`]: a first-come, first-served queue of waiters for a limited resource.
//!
//! A call waits for a place in the bounded queue, for a permit of the concurrency limit, and for the tokens of a rate
//! limit. What is limited, and when it is available, is decided by a [`Resource`]. The order of the waiters is the same
//! for all resources and is decided by this module:
//!
//! 1. **First come, first served.** A newcomer never overtakes a waiter, except a skipped one (rule 4).
//! 2. **Waiting reserves nothing.** When the resource is available to the first waiter, this waiter is *notified*: it
//!    is woken, and takes what it waits for when it is polled. So a waiter that is dropped has nothing to release.
//! 3. **One waiter is notified at a time**, and only when the resource is available to it. So a release wakes one task,
//!    however long the queue is.
//! 4. **A waiter that does not respond does not block the others.** If a notified waiter takes nothing within
//!    [`HANDOFF_TIMEOUT`](order::HANDOFF_TIMEOUT) (5 ms), it is *skipped* and the next waiter is notified. A skipped
//!    waiter keeps its sequence number: when it is polled again, it is before all waiters that came after it.
//!
//! If the first waiter has to wait until a certain instant, a [timer task](timer) notifies it then. The timer task also
//! skips waiters that do not respond. It exists only while there are waiters.
//!
//! The files of this module import in one direction: `mod.rs` uses [`timer`], which uses [`order`], which uses
//! [`resource`].

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

/// A [`Resource`] and the queue of waiters in front of it. Clones share both.
pub(crate) struct WaitQueue<R: Resource> {
    locked: Arc<LockedOrder<R>>,
}

/// The handle of one waiter. When dropped, it removes the waiter from the queue.
pub(crate) struct Waiter<R: Resource> {
    locked: Arc<LockedOrder<R>>,
    /// The waiter's sequence number, which is its position in the queue. `None` while the waiter is not in the queue.
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

    /// Takes what `request` wants if that is available now and no waiter is in the queue, except skipped ones (which
    /// were notified and took nothing in time). Returns `None` if it was taken. Otherwise returns what `refused` reads
    /// from the resource, under the same lock and with the same reading of the clock.
    #[inline]
    pub(crate) fn try_acquire<T>(
        &self,
        request: &R::Request,
        mut now: LazyNow,
        refused: impl FnOnce(&mut R, &mut LazyNow) -> T,
    ) -> Result<Option<T>, R::Rejection> {
        let mut order = self.locked.lock();
        // No waiter has to be notified afterwards: a request that has not waited takes something only if no waiter is
        // in the queue, except skipped ones, and these are not notified.
        if order.try_take(None, request, &mut now)? {
            return Ok(None);
        }
        Ok(Some(refused(&mut order.resource, &mut now)))
    }

    /// Reads the resource. A change of the resource that could let a waiter continue needs [`update`](Self::update)
    /// instead.
    pub(crate) fn inspect<T>(&self, read: impl FnOnce(&mut R, &mut LazyNow) -> T) -> T {
        read(&mut self.locked.lock().resource, &mut LazyNow::default())
    }

    /// Changes the resource, and notifies the first waiter if the resource is available to it afterwards. For changes
    /// that matter only to the first waiter, such as a release of permits.
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

    /// Changes the resource, and wakes all waiters. For changes that matter to every waiter, such as closing the
    /// resource. Woken waiters that still have to wait keep their positions.
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
    /// This method does not reserve: the waiter stays in the queue and must call [`poll_acquire`](Self::poll_acquire)
    /// or [`try_acquire`](Self::try_acquire) within [`HANDOFF_TIMEOUT`](order::HANDOFF_TIMEOUT), or the next waiter is
    /// notified.
    pub(crate) fn poll_ready(&mut self, request: &R::Request, cx: &mut Context<'_>) -> Poll<Result<(), R::Rejection>> {
        self.poll(request, cx, false, LazyNow::default())
    }

    /// Waits until this waiter has taken what `request` wants, and has thereby left the queue.
    pub(crate) fn poll_acquire(
        &mut self,
        request: &R::Request,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), R::Rejection>> {
        self.poll(request, cx, true, LazyNow::default())
    }

    /// Does what [`poll_acquire`](Self::poll_acquire) does, with a time `now` that was read before the queue's lock is
    /// taken.
    ///
    /// For a waiter that is in the queue already, `now` is ignored and the clock is read under the lock: other waiters
    /// may have taken something at an instant later than `now`.
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

    /// Takes what `request` wants if that is available now and no other waiter is before this one. Returns whether it
    /// was taken. Never puts the waiter into the queue.
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
            // A waiter that does not have to wait never enters the queue.
            return Poll::Ready(done.map(drop));
        }
        let deferred = match done {
            Ok(false) => order.enqueue(&mut self.seq, request, cx.waker(), &mut now),
            Ok(true) if !takes => {
                // The waiter is ready and has taken nothing, so it stays in the queue. If it was not notified, it
                // counts as notified now, and is skipped unless it takes something within `HANDOFF_TIMEOUT`.
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

/// The clone is a new waiter of the same `WaitQueue`. It enters the queue when it has to wait.
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
