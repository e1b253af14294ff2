//! [`Semaphore`]: a number of permits that is handed out in order, and can be changed at run time.
//!
//! It counts the places of the queue and the calls in flight. Both are taken and released once a call, usually while no
//! other caller waits, so there are two ways to a permit:
//!
//! - The **fast path** is one atomic operation. It is open while no acquirer waits.
//! - The **slow path** is a [`WaitQueue`], with its lock. The first acquirer that has to wait sets the *contended*
//!   flag, which closes the fast path, so that no newcomer takes a permit before the waiters. The last one that leaves
//!   the queue clears the flag.
//!
//! Tokio's semaphore cannot be used here: its permits belong to an acquirer as soon as it is woken, so a service that
//! was made ready and is never called would keep a permit from the others.

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

/// A number of permits, each of which one holder at a time has. Clones share them.
#[derive(Clone)]
pub(crate) struct Semaphore {
    inner: Arc<Inner>,
}

/// One acquirer of one permit: its place in the queue, once it has to wait. Dropped, it gives up that place.
pub(crate) struct Acquire {
    semaphore: Semaphore,
    /// `None` until the fast path was closed or had no permit.
    waiter: Option<Waiter<Permits>>,
}

/// One permit, released when dropped.
pub(crate) struct Permit {
    semaphore: Semaphore,
}

struct Inner {
    state: Arc<State>,
    queue: WaitQueue<Permits>,
}

/// What the fast path reads and writes without the queue's lock.
struct State {
    total: AtomicUsize,
    /// The number of permits held, times [`PERMIT`], plus [`CONTENDED`] if the fast path is closed.
    held: CachePadded<AtomicUsize>,
}

/// The [`Resource`] of the slow path: all permits of a semaphore.
pub(crate) struct Permits {
    state: Arc<State>,
    waiting: usize,
    closed: bool,
}

/// The flag in [`State::held`] that closes the fast path.
const CONTENDED: usize = 1;
/// One permit in [`State::held`], above the flag.
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
            inner: Arc::new(Inner {
                state,
                queue: WaitQueue::new(permits),
            }),
        }
    }

    /// Returns a new acquirer, which is not in the queue.
    #[inline]
    pub(crate) fn acquire(&self) -> Acquire {
        Acquire {
            semaphore: self.clone(),
            waiter: None,
        }
    }

    /// Returns how many permits there are, held or not.
    pub(crate) fn total(&self) -> usize {
        self.state().total.load(Ordering::Acquire)
    }

    /// Returns how many permits are held. After the total was lowered this may be more than the total.
    pub(crate) fn held(&self) -> usize {
        self.state().held.load(Ordering::Acquire) / PERMIT
    }

    /// Changes how many permits there are. Permits that are held stay held.
    pub(crate) fn set_total(&self, total: usize) {
        self.inner
            .queue
            .update(|permits, _| permits.state.total.store(total, Ordering::Release));
    }

    /// Rejects every acquirer from now on, the waiting ones included. Permits that are held stay held.
    pub(crate) fn close(&self) {
        self.inner.queue.update_and_wake_all(|permits, _| {
            permits.closed = true;
            // So that every acquirer comes to the queue, where it is rejected.
            permits.state.set_contended();
        });
    }

    fn state(&self) -> &State {
        &self.inner.state
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
    /// Waits until there is a permit for this acquirer.
    ///
    /// Takes nothing. An acquirer that has waited must take the permit within the queue's timeout of 5 ms, or the next
    /// one is notified.
    #[inline]
    pub(crate) fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Closed>> {
        if self.waiter.is_none() && self.semaphore.state().has_uncontended() {
            return Poll::Ready(Ok(()));
        }
        self.waiter().poll_ready(&(), cx)
    }

    /// Takes a permit if there is one now and no other acquirer is before this one.
    #[inline]
    pub(crate) fn try_acquire(&mut self) -> Result<Option<Permit>, Closed> {
        let taken = self.take_uncontended() || self.waiter().try_acquire(&())?;
        Ok(taken.then(|| self.permit()))
    }

    /// Waits for a permit and takes it. Leaves `None` in `slot` then, since an acquirer takes one permit.
    #[inline]
    pub(crate) fn poll_acquire(slot: &mut Option<Self>, cx: &mut Context<'_>) -> Poll<Result<Permit, Closed>> {
        let acquire = slot
            .as_mut()
            .expect("an `Acquire` is not polled after it has returned a permit");
        if !acquire.take_uncontended() {
            ready!(acquire.waiter().poll_acquire(&(), cx))?;
        }
        let Self { semaphore, .. } = slot.take().expect("the slot was not empty above");
        Poll::Ready(Ok(Permit { semaphore }))
    }

    /// Returns this acquirer with its place in the queue, and leaves a new one here.
    #[inline]
    pub(crate) fn replace(&mut self) -> Self {
        mem::replace(self, self.semaphore.acquire())
    }

    fn take_uncontended(&self) -> bool {
        self.waiter.is_none() && self.semaphore.state().take_uncontended()
    }

    fn waiter(&mut self) -> &mut Waiter<Permits> {
        self.waiter.get_or_insert_with(|| self.semaphore.inner.queue.waiter())
    }

    fn permit(&mut self) -> Permit {
        // The waiter left the queue when it took the permit. Without it the fast path is open to this acquirer again.
        self.waiter = None;
        Permit {
            semaphore: self.semaphore.clone(),
        }
    }
}

/// The clone is another acquirer, which is not in the queue.
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
            // The release has changed the state already: the queue only has to notify the first waiter.
            self.semaphore.inner.queue.update(|_, _| ());
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
    /// Returns whether the fast path is open and has a permit.
    fn has_uncontended(&self) -> bool {
        let held = self.held.load(Ordering::Acquire);
        held & CONTENDED == 0 && held / PERMIT < self.total.load(Ordering::Acquire)
    }

    /// Takes a permit by the fast path, and returns whether there was one and the path was open.
    fn take_uncontended(&self) -> bool {
        self.take_if(|held| held & CONTENDED == 0)
    }

    fn take_if(&self, is_allowed: impl Fn(usize) -> bool) -> bool {
        let total = self.total.load(Ordering::Acquire);
        let take = |held| (is_allowed(held) && held / PERMIT < total).then_some(held + PERMIT);
        self.held
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, take)
            .is_ok()
    }

    /// Releases a permit. Returns whether the contended flag is set, so that the queue has to notify a waiter.
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
        self.state.take_if(|_| true)
    }

    fn on_enqueue(&mut self, (): &()) {
        self.waiting += 1;
        // The queue checks the availability once more after this. A permit that was released before the flag was set is
        // seen then; one that is released later notifies the queue.
        self.state.set_contended();
    }

    fn on_dequeue(&mut self, (): &()) {
        self.waiting -= 1;
        if self.waiting == 0 && !self.closed {
            self.state.clear_contended();
        }
    }
}
