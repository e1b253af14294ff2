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
//!    [`HANDOFF_TIMEOUT`](resource::HANDOFF_TIMEOUT) (5 ms), it is *skipped* and the next waiters are notified. A skipped
//!    waiter keeps its sequence number: when it is polled again, it is before all waiters that came after it.
//! 5. **Waiters that do not respond do not add up.** Each time that nothing was taken within the timeout, eight times as
//!    many waiters are notified at once: 1, 8, 64 and so on. The first of them that is polled becomes the first waiter,
//!    so they may overtake each other; the others keep their positions. When one has taken something, one waiter is
//!    notified at a time again. So a thousand waiters that are no longer polled delay the next one by 20 ms, once.
//!
//! If the first waiter has to wait until a certain instant, a [timer](timers) notifies it then. The timers also skip
//! waiters that do not respond. They exist only while there are waiters, and 5 ms longer at most.
//!
//! The files of this module import in one direction: `mod.rs` uses [`locked`], which uses [`order`], which uses
//! [`waiters`], which uses [`timers`], which uses [`resource`].

#[cfg(all(test, tower_outbound_loom))]
mod interleavings;
mod locked;
mod order;
mod resource;
mod timers;
mod waiters;

pub(crate) use resource::{Availability, HANDOFF_TIMEOUT, Resource};

use crate::{clock::LazyNow, panic};
use locked::LockedOrder;
use order::Deferred;
use std::{
    fmt,
    sync::Arc,
    task::{Context, Poll, Waker},
};
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

/// All waiters of a queue, to be [woken](Self::wake) after a change of the resource.
#[must_use = "the waiters have to be woken"]
pub(crate) struct WakeAll<R: Resource> {
    locked: Arc<LockedOrder<R>>,
    deferred: Option<Deferred>,
    wakers: Vec<Waker>,
}

// === impl WaitQueue ===

impl<R: Resource> WaitQueue<R> {
    pub(crate) fn new(resource: R) -> Self {
        Self {
            locked: Arc::new(LockedOrder::new(resource)),
        }
    }

    #[inline]
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
        if order.try_take_as_newcomer(request, &mut now)? {
            return Ok(None);
        }
        Ok(Some(refused(&mut order.resource, &mut now)))
    }

    /// Takes what `request` wants if that is available now, no waiter is in the queue, and `also` returns that it has taken
    /// what is wanted together with it. Returns whether both were taken. `also` is called under the lock, and only when the
    /// resource is available, so that it need not give anything back: to give something back would notify others, who could
    /// do the same in turn for ever.
    pub(crate) fn try_acquire_with(
        &self,
        request: &R::Request,
        mut now: LazyNow,
        also: impl FnOnce() -> bool,
    ) -> Result<bool, R::Rejection> {
        let mut order = self.locked.lock();
        let is_available = order.waiting() == 0 && order.resource.is_available_uncontended(request, &mut now)?;
        if is_available && also() {
            return order.try_take_as_newcomer(request, &mut now);
        }
        Ok(false)
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
        if order.waiting() > 0 {
            let deferred = order.advance(&mut now);
            drop(order);
            self.locked.finish(deferred);
        }
        output
    }

    /// Does what [`update_and_wake_all`](Self::update_and_wake_all) does, except that it leaves it to the caller to wake the
    /// waiters. For a caller that holds a lock of its own, under which no waker may run.
    pub(crate) fn update_then_wake_all<T>(&self, change: impl FnOnce(&mut R, &mut LazyNow) -> T) -> (T, WakeAll<R>) {
        let mut now = LazyNow::default();
        let mut order = self.locked.lock();
        let output = change(&mut order.resource, &mut now);
        let deferred = (order.waiting() > 0).then(|| order.advance(&mut now));
        let wakers = order.wakers();
        drop(order);
        let wake_all = WakeAll {
            locked: self.locked.clone(),
            deferred,
            wakers,
        };
        (output, wake_all)
    }

    /// Changes the resource, and wakes all waiters. For changes that matter to every waiter, such as closing the
    /// resource. Woken waiters that still have to wait keep their positions.
    pub(crate) fn update_and_wake_all<T>(&self, change: impl FnOnce(&mut R, &mut LazyNow) -> T) -> T {
        let output = self.update(change);
        let wakers = self.locked.lock().wakers();
        wakers.into_iter().for_each(panic::wake);
        output
    }
}

impl<R: Resource> WaitQueue<R> {
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.locked, &other.locked)
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
            .field("waiting", &self.locked.lock().waiting())
            .finish()
    }
}

// === impl WakeAll ===

impl<R: Resource> WakeAll<R> {
    /// Wakes the waiters. The caller must hold no lock.
    pub(crate) fn wake(self) {
        if let Some(deferred) = self.deferred {
            self.locked.finish(deferred);
        }
        self.wakers.into_iter().for_each(panic::wake);
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
    /// or [`try_acquire`](Self::try_acquire) within [`HANDOFF_TIMEOUT`], or the next waiter is notified.
    ///
    /// Here and in the other methods, `now` is the current time if the caller has read it before. For a waiter that is
    /// in the queue, `now` is ignored and the clock is read under the lock: other waiters may have taken something at an
    /// instant later than `now`.
    #[inline]
    pub(crate) fn poll_ready(
        &mut self,
        request: &R::Request,
        cx: &mut Context<'_>,
        now: Option<Instant>,
    ) -> Poll<Result<(), R::Rejection>> {
        self.poll(request, cx, false, now)
    }

    /// Waits until this waiter has taken what `request` wants, and has thereby left the queue.
    #[inline]
    pub(crate) fn poll_acquire(
        &mut self,
        request: &R::Request,
        cx: &mut Context<'_>,
        now: Option<Instant>,
    ) -> Poll<Result<(), R::Rejection>> {
        self.poll(request, cx, true, now)
    }

    /// Replaces what the waiter wants, if it is in the queue. It keeps its place.
    pub(crate) fn replace_request(&mut self, request: &R::Request) {
        let Some(seq) = self.seq else { return };
        let deferred = self
            .locked
            .lock()
            .replace_request(seq, request, &mut LazyNow::default());
        self.locked.finish(deferred);
    }

    /// Takes what `request` wants if that is available now and no other waiter is before this one. Returns whether it
    /// was taken. Never puts the waiter into the queue.
    #[inline]
    pub(crate) fn try_acquire(&mut self, request: &R::Request, now: Option<Instant>) -> Result<bool, R::Rejection> {
        if self.seq.is_some() {
            return self.try_acquire_queued(request);
        }
        let mut now = lazy_now(now);
        self.locked.lock().try_take_as_newcomer(request, &mut now)
    }

    /// Does what [`try_acquire`](Self::try_acquire) does, for a waiter that is in the queue.
    #[inline(never)]
    fn try_acquire_queued(&mut self, request: &R::Request) -> Result<bool, R::Rejection> {
        let mut now = LazyNow::default();
        let mut order = self.locked.lock();
        let taken = order.try_take(self.seq, request, &mut now);
        let deferred = match taken {
            Ok(false) => return taken,
            Ok(true) => order.complete(self.seq.take(), &mut now),
            Err(_) => order.dequeue(self.seq.take(), &mut now),
        };
        drop(order);
        self.locked.finish(deferred);
        taken
    }

    #[inline]
    fn poll(
        &mut self,
        request: &R::Request,
        cx: &mut Context<'_>,
        takes: bool,
        now: Option<Instant>,
    ) -> Poll<Result<(), R::Rejection>> {
        if self.seq.is_none() {
            // A waiter that does not have to wait never enters the queue.
            let done = self.locked.lock().poll(None, request, takes, &mut lazy_now(now));
            match done {
                Ok(true) => return Poll::Ready(Ok(())),
                Ok(false) => {}
                Err(rejection) => return Poll::Ready(Err(rejection)),
            }
        }
        self.poll_queued(request, cx, takes, now)
    }

    /// Removes the waiter from the queue.
    #[inline(never)]
    fn leave(&mut self) {
        let deferred = self.locked.lock().dequeue(self.seq.take(), &mut LazyNow::default());
        self.locked.finish(deferred);
    }

    /// Does what [`poll`](Self::poll) does, for a waiter that is in the queue or has to enter it. Most calls do not wait,
    /// and are faster without this code in between.
    #[inline(never)]
    fn poll_queued(
        &mut self,
        request: &R::Request,
        cx: &mut Context<'_>,
        takes: bool,
        now: Option<Instant>,
    ) -> Poll<Result<(), R::Rejection>> {
        let mut now = lazy_now(now.filter(|_| self.seq.is_none()));
        let mut order = self.locked.lock();
        let done = order.poll(self.seq, request, takes, &mut now);
        let deferred = match (&done, self.seq) {
            (Ok(false), _) => order.enqueue(&mut self.seq, request, cx.waker(), &mut now),
            // The waiter is ready and has taken nothing, so it stays in the queue.
            (Ok(true), Some(seq)) if !takes => order.stay(seq, &mut now),
            (Ok(true), _) => order.complete(self.seq.take(), &mut now),
            (Err(_), _) => order.dequeue(self.seq.take(), &mut now),
        };
        drop(order);
        LockedOrder::<R>::check_timer(&deferred);
        self.locked.finish(deferred);
        match done {
            Ok(true) => Poll::Ready(Ok(())),
            Ok(false) => Poll::Pending,
            Err(rejection) => Poll::Ready(Err(rejection)),
        }
    }
}

/// Returns the time that a caller has read before as a `LazyNow`, or one that reads the clock.
#[inline]
fn lazy_now(now: Option<Instant>) -> LazyNow {
    now.map_or_else(LazyNow::default, LazyNow::at)
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
    #[inline]
    fn drop(&mut self) {
        if self.seq.is_some() {
            self.leave();
        }
    }
}

impl<R: Resource> fmt::Debug for Waiter<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Waiter").field("seq", &self.seq).finish()
    }
}
