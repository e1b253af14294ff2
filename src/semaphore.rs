//! A counted thing behind a [queue](super): permits to be in flight, places in a queue.
//!
//! While nobody waits, a permit is taken and given back by one atomic operation, without the queue and its lock. The first
//! who has to wait bars that way, so that nobody can overtake; the last to leave the queue availability it again.

use crate::{
    clock::LazyNow,
    error::Closed,
    sync::atomic::{AtomicUsize, Ordering},
    wait_queue::{Availability, Resource, WaitQueue, Waiter},
};
use crossbeam_utils::CachePadded;
use std::{
    fmt, mem,
    sync::Arc,
    task::{Context, Poll, ready},
};

/// So many of a thing, each of which one holder at a time can have.
#[derive(Clone)]
pub(crate) struct Semaphore {
    shared: Arc<Shared>,
}

/// A acquire in the queue for one permit.
pub(crate) struct Acquire {
    semaphore: Semaphore,
    /// Once it had to go to the queue.
    waiter: Option<Waiter<Permits>>,
}

/// One permit, given back when dropped.
pub(crate) struct Permit {
    semaphore: Semaphore,
}

struct Shared {
    state: Arc<State>,
    queue: WaitQueue<Permits>,
}

/// What can be told and changed without the queue's lock.
struct State {
    total: AtomicUsize,
    /// How many permits are held, doubled; and [`CONTENDED`], if permits are to be had in queue only.
    held: CachePadded<AtomicUsize>,
}

/// The gate of the queue.
pub(crate) struct Permits {
    state: Arc<State>,
    waiting: usize,
    closed: bool,
}

const CONTENDED: usize = 1;
const PERMIT: usize = 2;

// === impl Semaphore ===

impl Semaphore {
    pub(crate) fn new(total: usize) -> Self {
        let state = Arc::new(State {
            total: AtomicUsize::new(total),
            held: CachePadded::default(),
        });
        let permits = Permits {
            state: state.clone(),
            waiting: 0,
            closed: false,
        };
        Self {
            shared: Arc::new(Shared {
                state,
                queue: WaitQueue::new(permits),
            }),
        }
    }

    #[inline]
    pub(crate) fn acquire(&self) -> Acquire {
        Acquire {
            semaphore: self.clone(),
            waiter: None,
        }
    }

    pub(crate) fn total(&self) -> usize {
        self.state().total.load(Ordering::Acquire)
    }

    pub(crate) fn held(&self) -> usize {
        self.state().held.load(Ordering::Acquire) / PERMIT
    }

    pub(crate) fn set_total(&self, total: usize) {
        self.shared
            .queue
            .update(|permits, _| permits.state.total.store(total, Ordering::Release));
    }

    /// Refuses everybody from now on, those who wait included.
    pub(crate) fn close(&self) {
        self.shared.queue.update_and_wake_all(|permits, _| {
            permits.closed = true;
            permits.state.set_contended();
        });
    }

    fn state(&self) -> &State {
        &self.shared.state
    }
}

impl fmt::Debug for Semaphore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Semaphore")
            .field("total", &self.total())
            .field("held", &self.held())
            .finish()
    }
}

// === impl Acquire ===

impl Acquire {
    /// Ready when there is a permit and it is this one's acquire; takes nothing.
    #[inline]
    pub(crate) fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Closed>> {
        if self.waiter.is_none() && self.semaphore.state().has_uncontended() {
            return Poll::Ready(Ok(()));
        }
        self.waiter().poll_ready(&(), cx)
    }

    /// A permit, if there is one and it is this one's acquire.
    #[inline]
    pub(crate) fn try_acquire(&mut self) -> Result<Option<Permit>, Closed> {
        let taken = self.take_uncontended() || self.waiter().try_acquire(&())?;
        Ok(taken.then(|| self.permit()))
    }

    /// Ready with a permit when it is this one's acquire. The acquire is used up by that.
    #[inline]
    pub(crate) fn poll_acquire(slot: &mut Option<Self>, cx: &mut Context<'_>) -> Poll<Result<Permit, Closed>> {
        let acquire = slot
            .as_mut()
            .expect("an `Acquire` is not polled after it has returned a permit");
        if !acquire.take_uncontended() {
            ready!(acquire.waiter().poll_acquire(&(), cx))?;
        }
        let Self { semaphore, .. } = slot.take().expect("it was there just now");
        Poll::Ready(Ok(Permit { semaphore }))
    }

    /// Leaves this acquire to the caller, and a new one in its place.
    #[inline]
    pub(crate) fn replace(&mut self) -> Self {
        mem::replace(self, self.semaphore.acquire())
    }

    fn take_uncontended(&self) -> bool {
        self.waiter.is_none() && self.semaphore.state().take_uncontended()
    }

    fn waiter(&mut self) -> &mut Waiter<Permits> {
        self.waiter.get_or_insert_with(|| self.semaphore.shared.queue.waiter())
    }

    fn permit(&mut self) -> Permit {
        // Whoever has taken a permit is not in queue any more.
        self.waiter = None;
        Permit {
            semaphore: self.semaphore.clone(),
        }
    }
}

/// Another waiter: a acquire belongs to one waiter alone.
impl Clone for Acquire {
    #[inline]
    fn clone(&self) -> Self {
        self.semaphore.acquire()
    }
}

impl fmt::Debug for Acquire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Acquire").field("waiter", &self.waiter).finish()
    }
}

// === impl Permit ===

impl Drop for Permit {
    #[inline]
    fn drop(&mut self) {
        if self.semaphore.state().release() {
            // Somebody may be waiting for it.
            self.semaphore.shared.queue.update(|_, _| ());
        }
    }
}

impl fmt::Debug for Permit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Permit")
    }
}

// === impl State ===

impl State {
    /// Whether there is a permit to be had without the queue.
    fn has_uncontended(&self) -> bool {
        let held = self.held.load(Ordering::Acquire);
        held & CONTENDED == 0 && held / PERMIT < self.total.load(Ordering::Acquire)
    }

    /// Takes a permit without the queue, if that is not barred.
    fn take_uncontended(&self) -> bool {
        self.take(|held| held & CONTENDED == 0)
    }

    fn take(&self, may: impl Fn(usize) -> bool) -> bool {
        let total = self.total.load(Ordering::Acquire);
        let take = |held| (may(held) && held / PERMIT < total).then_some(held + PERMIT);
        self.held
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, take)
            .is_ok()
    }

    /// Returns whether the queue has to be told.
    fn release(&self) -> bool {
        self.held.fetch_sub(PERMIT, Ordering::AcqRel) & CONTENDED != 0
    }

    fn set_contended(&self) {
        self.held.fetch_or(CONTENDED, Ordering::AcqRel);
    }

    fn clear_contended(&self) {
        self.held.fetch_and(!CONTENDED, Ordering::AcqRel);
    }
}

// === impl Permits ===

impl Resource for Permits {
    type Request = ();
    type Rejection = Closed;

    fn rejection(&self, (): &()) -> Option<Closed> {
        self.closed.then(Closed::new)
    }

    fn availability(&mut self, (): &(), _: &mut LazyNow) -> Availability {
        if self.state.held.load(Ordering::Acquire) / PERMIT < self.state.total.load(Ordering::Acquire) {
            Availability::Now
        } else {
            Availability::Blocked
        }
    }

    fn try_take(&mut self, (): &(), _waited: bool, _: &mut LazyNow) -> bool {
        self.state.take(|_| true)
    }

    fn on_enqueue(&mut self, (): &()) {
        self.waiting += 1;
        // The queue looks at the gate once more after this: what was given back before is seen then, and who gives
        // something back from now on tells the queue.
        self.state.set_contended();
    }

    fn on_dequeue(&mut self, (): &()) {
        self.waiting -= 1;
        if self.waiting == 0 && !self.closed {
            self.state.clear_contended();
        }
    }
}
