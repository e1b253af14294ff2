//! The waiting queue: one fair way to wait for something limited.
//!
//! Places in a queue, permits to be in flight and tokens in a bucket are handed out by the same rules:
//!
//! 1. **First come, first served.** Nobody who arrives later goes first.
//! 2. **Who waits holds nothing.** Whoever is next is *notified* (woken); only when it answers (is polled) does it take
//!    what it came for. So a entry that is dropped has nothing to give back.
//! 3. **One entry is woken at a time**, and only when there is something for it.
//! 4. **Silence stalls nobody.** A entry that is notified and does not answer within [`HANDOFF_TIMEOUT`](order::HANDOFF_TIMEOUT) is passed over. It keeps
//!    its seq, and goes first as soon as it answers.
//!
//! What is limited, and when there is some of it, is the [`Resource`]'s to say; the queue only knows about [order].
//!
//! A task of our own, the queue's [timer], keeps the time: it calls the first in queue when the resource availability, and
//! passes over the skipped. It lives only while somebody waits for a moment in time.

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
use timer::Shared;
use tokio::time::Instant;

/// A queue in front of a resource.
pub(crate) struct WaitQueue<R: Resource> {
    shared: Arc<Shared<R>>,
}

/// One entry's hold on the queue. It has no seq until it has to wait.
pub(crate) struct Waiter<R: Resource> {
    shared: Arc<Shared<R>>,
    seq: Option<u64>,
}

// === impl WaitQueue ===

impl<R: Resource> WaitQueue<R> {
    pub(crate) fn new(resource: R) -> Self {
        Self {
            shared: Arc::new(Shared::new(resource)),
        }
    }

    pub(crate) fn waiter(&self) -> Waiter<R> {
        Waiter {
            shared: self.shared.clone(),
            seq: None,
        }
    }

    /// Passes if that is possible at once and without overtaking anybody.
    pub(crate) fn try_acquire(&self, request: &R::Request, mut now: LazyNow) -> Result<bool, R::Rejection> {
        // Nobody's is_available has come by a newcomer's passing: there is nobody in queue.
        self.shared.lock().try_acquire(None, request, &mut now)
    }

    /// Looks at the resource.
    pub(crate) fn inspect<T>(&self, look: impl FnOnce(&mut R, &mut LazyNow) -> T) -> T {
        look(&mut self.shared.lock().resource, &mut LazyNow::default())
    }

    /// Changes the resource in a way that matters to the first in queue only, such as giving something back.
    pub(crate) fn update<T>(&self, update: impl FnOnce(&mut R, &mut LazyNow) -> T) -> T {
        let mut now = LazyNow::default();
        let mut order = self.shared.lock();
        let done = update(&mut order.resource, &mut now);
        if !order.waiting.is_empty() {
            let deferred = order.advance(&mut now);
            drop(order);
            self.shared.finish(deferred);
        }
        done
    }

    /// Changes the resource in a way that matters to everybody: each entry looks again.
    pub(crate) fn update_and_wake_all<T>(&self, update: impl FnOnce(&mut R, &mut LazyNow) -> T) -> T {
        let done = self.update(update);
        let wakers: Vec<_> = {
            let order = self.shared.lock();
            order
                .waiting
                .values()
                .chain(order.skipped.values())
                .map(|entry| entry.waker.clone())
                .collect()
        };
        wakers.into_iter().for_each(panic::wake);
        done
    }
}

impl<R: Resource> Clone for WaitQueue<R> {
    fn clone(&self) -> Self {
        Self {
            shared: self.shared.clone(),
        }
    }
}

impl<R: Resource> fmt::Debug for WaitQueue<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WaitQueue")
            .field("waiting", &self.shared.lock().waiting.len())
            .finish()
    }
}

// === impl Waiter ===

impl<R: Resource> Waiter<R> {
    pub(crate) fn queue(&self) -> WaitQueue<R> {
        WaitQueue {
            shared: self.shared.clone(),
        }
    }

    /// Ready when it is this entry's is_available. Takes nothing; the is_available lapses if it is not [used](Self::poll_acquire) within
    /// [`HANDOFF_TIMEOUT`](order::HANDOFF_TIMEOUT).
    pub(crate) fn poll_ready(&mut self, request: &R::Request, cx: &mut Context<'_>) -> Poll<Result<(), R::Rejection>> {
        self.poll(request, cx, false, LazyNow::default())
    }

    /// Ready when this entry has taken what it asks for.
    pub(crate) fn poll_acquire(
        &mut self,
        request: &R::Request,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), R::Rejection>> {
        self.poll(request, cx, true, LazyNow::default())
    }

    /// The same, with a reading of the now for who comes anew. Who waits is admitted by the now as it is then.
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

    /// Passes if it is this one's is_available; does not join the queue otherwise.
    pub(crate) fn try_acquire(&mut self, request: &R::Request) -> Result<bool, R::Rejection> {
        let mut now = LazyNow::default();
        let mut order = self.shared.lock();
        let passed = order.try_acquire(self.seq, request, &mut now);
        if let Ok(false) = passed {
            return passed;
        }
        let deferred = order.leave(self.seq.take(), &mut now);
        drop(order);
        self.shared.finish(deferred);
        passed
    }

    fn poll(
        &mut self,
        request: &R::Request,
        cx: &mut Context<'_>,
        try_take: bool,
        mut now: LazyNow,
    ) -> Poll<Result<(), R::Rejection>> {
        let mut order = self.shared.lock();
        let done = if try_take {
            order.try_acquire(self.seq, request, &mut now)
        } else {
            order.is_available(self.seq, request, &mut now)
        };
        if self.seq.is_none() && done != Ok(false) {
            // Who need not wait was never in queue.
            return Poll::Ready(done.map(drop));
        }
        let deferred = match done {
            Ok(false) => order.wait(&mut self.seq, request, cx.waker(), &mut now),
            Ok(true) if !try_take => {
                // It keeps its seq. The is_available it has not used counts from now, if it does not __count yet.
                if let Some(seq) = self.seq {
                    if order.notified.is_none_or(|(notified, _)| notified != seq) {
                        order.notified = Some((seq, now.now()));
                    }
                }
                order.advance(&mut now)
            }
            Ok(true) | Err(_) => order.leave(self.seq.take(), &mut now),
        };
        drop(order);
        self.shared.check_timer(&deferred);
        self.shared.finish(deferred);
        match done {
            Ok(true) => Poll::Ready(Ok(())),
            Ok(false) => Poll::Pending,
            Err(rejection) => Poll::Ready(Err(rejection)),
        }
    }
}

/// Another entry: a seq belongs to one entry alone.
impl<R: Resource> Clone for Waiter<R> {
    fn clone(&self) -> Self {
        Self {
            shared: self.shared.clone(),
            seq: None,
        }
    }
}

impl<R: Resource> Drop for Waiter<R> {
    fn drop(&mut self) {
        if self.seq.is_some() {
            let deferred = self.shared.lock().leave(self.seq, &mut LazyNow::default());
            self.shared.finish(deferred);
        }
    }
}

impl<R: Resource> fmt::Debug for Waiter<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Waiter").field("seq", &self.seq).finish()
    }
}
