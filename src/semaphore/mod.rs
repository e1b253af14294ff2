//! [`Semaphore`]: a number of permits that are handed out in order. The number can be changed at run time.
//!
//! A semaphore counts the places of a queue, or the calls in flight. A permit is taken and released once per call,
//! usually while no other caller waits, so there are two ways to take one:
//!
//! - The **fast path** is one atomic operation. It is open while no acquirer waits.
//! - The **slow path** is a [`WaitQueue`], which has a lock. The first acquirer that has to wait sets the *contended*
//!   flag, which closes the fast path, so that no newcomer takes a permit before the waiting acquirers. The last
//!   acquirer that leaves the wait queue clears the flag.
//!
//! A call of a concurrency limit takes its permit when it is made, and [claims](Claim) it until it is polled.
//!
//! Tokio's semaphore cannot be used here: it assigns a permit to an acquirer before it wakes the acquirer's task, so a
//! service that was made ready and is never called would keep a permit from the others.

mod claims;
pub(crate) mod granted;
#[cfg(all(test, tower_outbound_loom))]
mod interleavings;

use crate::{
    clock::LazyNow,
    error::Closed,
    sync::atomic::{AtomicUsize, Ordering},
    wait_queue::{Availability, HANDOFF_TIMEOUT, Resource, WaitQueue, Waiter},
};
use claims::Claims;
use granted::InFlight;
use std::{
    fmt, mem,
    sync::Arc,
    task::{Context, Poll, ready},
};
use tokio::time::Instant;

/// A number of permits that are handed out in order, each to one holder at a time. Clones share the permits.
#[derive(Clone)]
pub(crate) struct Semaphore {
    inner: Arc<SemaphoreInner>,
}

/// An acquirer of one permit. It enters the wait queue when it has to wait, and leaves the queue when it is dropped.
pub(crate) struct Acquire {
    semaphore: Semaphore,
    /// The acquirer's handle to the wait queue. `None` unless the acquirer found the fast path closed or without a free
    /// permit.
    waiter: Option<Waiter<Permits>>,
}

/// One permit of a [`Semaphore`], released when dropped.
pub(crate) struct Permit {
    /// `None` only while a permit is dropped that does not have to be released.
    semaphore: Option<Semaphore>,
}

/// A permit that was taken for a call which has not been polled yet, released when dropped.
///
/// If the claim is not [confirmed](Self::confirm) within 5 ms while an acquirer waits for a permit, it is void, and the
/// acquirer gets the permit.
pub(crate) struct Claim {
    /// `None` after the claim was confirmed.
    permit: Option<Permit>,
    epoch: u32,
}

struct SemaphoreInner {
    state: Arc<PermitState>,
    queue: WaitQueue<Permits>,
    /// Counts a call in flight for the schedule that has granted its permit, if this is the handle of one permit. Kept here, so
    /// that other permits are not larger for it.
    /// A thin pointer, so that a semaphore is hardly larger for it, either.
    #[allow(dead_code, reason = "its drop is what matters")]
    in_flight: Option<Box<InFlight>>,
}

/// The counters of a semaphore that the fast path reads and writes without the wait queue's lock.
struct PermitState {
    total: AtomicUsize,
    /// The number of permits held, claimed ones included, times [`PERMIT`], plus [`CONTENDED`] while the fast path is
    /// closed.
    held: AtomicUsize,
    claims: Claims,
}

/// The permits of one semaphore, as the [`Resource`] of its wait queue (the slow path).
pub(crate) struct Permits {
    state: Arc<PermitState>,
    waiting: usize,
    closed: bool,
    /// When the old claims, if there are any, became old.
    aged_at: Option<Instant>,
}

/// The flag in [`PermitState::held`] that closes the fast path while it is set.
const CONTENDED: usize = 1;
/// The value of one held permit in [`PermitState::held`], whose lowest bit is the flag [`CONTENDED`].
const PERMIT: usize = 2;

// === impl Semaphore ===

impl Semaphore {
    pub(crate) fn new(total: usize) -> Self {
        let state = Arc::new(PermitState {
            total: AtomicUsize::new(total),
            held: AtomicUsize::new(0),
            claims: Claims::new(),
        });
        let permits = Permits {
            state: state.clone(),
            waiting: 0,
            closed: false,
            aged_at: None,
        };
        Self {
            inner: Arc::new(SemaphoreInner {
                state,
                queue: WaitQueue::new(permits),
                in_flight: None,
            }),
        }
    }

    /// Returns a new acquirer, which is not in the wait queue.
    #[inline]
    pub(crate) fn acquire(&self) -> Acquire {
        Acquire {
            semaphore: self.clone(),
            waiter: None,
        }
    }

    pub(crate) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.inner.state, &other.inner.state)
    }

    /// Returns a number that no other semaphore has while this one lives.
    #[inline]
    fn address(&self) -> usize {
        Arc::as_ptr(&self.inner.state).addr()
    }

    /// Returns how many permits the semaphore has, held or not.
    pub(crate) fn total(&self) -> usize {
        self.state().total.load(Ordering::Acquire)
    }

    /// Returns how many permits are held, or claimed. After the total was lowered, more permits than the total may be held.
    pub(crate) fn held(&self) -> usize {
        self.state().held.load(Ordering::Acquire) / PERMIT
    }

    /// Changes how many permits the semaphore has. Permits that are held stay held, even if they are more than the new
    /// total.
    pub(crate) fn set_total(&self, total: usize) {
        self.inner
            .queue
            .update(|permits, _| permits.state.total.store(total, Ordering::Release));
    }

    /// Closes the semaphore: every acquirer fails with [`Closed`] from now on, also one that is waiting. Permits that
    /// are held stay held.
    pub(crate) fn close(&self) {
        self.inner.queue.update_and_wake_all(|permits, _| {
            permits.closed = true;
            // The fast path is closed for good, so that every acquirer uses the wait queue, which rejects it.
            permits.state.set_contended();
        });
    }

    #[inline]
    fn release(&self) {
        if self.state().release() {
            // `PermitState::release` has changed the counters already: the update only makes the wait queue notify its
            // first waiter.
            self.notify();
        }
    }

    /// Makes the wait queue notify its first waiter if a permit is available to it.
    #[inline(never)]
    fn notify(&self) {
        self.inner.queue.update(|_, _| ());
    }

    #[inline]
    fn state(&self) -> &PermitState {
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
    /// Waits until a permit is available to this acquirer.
    ///
    /// This method takes no permit. An acquirer that has waited must take the permit within 5 ms (the timeout of the
    /// wait queue), or the next acquirer is notified.
    #[inline]
    pub(crate) fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Closed>> {
        if self.has_uncontended() {
            return Poll::Ready(Ok(()));
        }
        self.waiter().poll_ready(&(), cx, None)
    }

    /// Does what [`poll_ready`](Self::poll_ready) does before a call is made. A call that was [granted](granted) its permits
    /// does not wait.
    #[inline]
    pub(crate) fn poll_ready_for_call(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Closed>> {
        if self.has_uncontended() || granted::is_granted(&self.semaphore) {
            return Poll::Ready(Ok(()));
        }
        self.waiter().poll_ready(&(), cx, None)
    }

    /// Takes a permit if one is available now and no other acquirer is before this one.
    #[inline]
    pub(crate) fn try_acquire(&mut self) -> Result<Option<Permit>, Closed> {
        Ok(self.try_take()?.then(|| self.permit()))
    }

    /// Takes a permit if one is available now and no acquirer waits. It never wakes another acquirer.
    #[inline]
    pub(crate) fn try_acquire_uncontended(&mut self) -> Option<Permit> {
        self.take_uncontended().then(|| self.permit())
    }

    /// Takes a permit as [`try_acquire`](Self::try_acquire) does, and returns whether it was taken. The caller must then
    /// call [`permit`](Self::permit).
    #[inline]
    fn try_take(&mut self) -> Result<bool, Closed> {
        if self.take_uncontended() {
            return Ok(true);
        }
        self.try_take_contended()
    }

    #[inline(never)]
    fn try_take_contended(&mut self) -> Result<bool, Closed> {
        self.waiter().try_acquire(&(), None)
    }

    /// Waits for a permit and takes it. Then `slot` becomes `None`: an acquirer takes one permit, and is dropped.
    #[inline]
    pub(crate) fn poll_acquire(slot: &mut Option<Self>, cx: &mut Context<'_>) -> Poll<Result<Permit, Closed>> {
        let acquire = slot.as_mut().expect("`Acquire` polled after completion");
        if !acquire.take_uncontended() {
            ready!(acquire.waiter().poll_acquire(&(), cx, None))?;
        }
        let Self { semaphore, .. } = slot.take().expect("the slot was not empty above");
        Poll::Ready(Ok(Permit {
            semaphore: Some(semaphore),
        }))
    }

    /// Claims a permit for a call, if one is available now and no other acquirer is before this one. Otherwise, returns
    /// an acquirer for the call, which has the position of this one in the wait queue. In both cases, this acquirer is
    /// new afterwards.
    #[inline]
    pub(crate) fn claim(&mut self) -> Result<Claim, Self> {
        if self.semaphore.state().claims.is_open() {
            if let Ok(true) = self.try_take() {
                let permit = self.permit();
                let state = self.semaphore.state();
                if let Some(epoch) = state.claims.add() {
                    if state.is_contended() {
                        // An acquirer waits that may have looked for claims before this one was added. The update makes
                        // the wait queue look again.
                        self.semaphore.notify();
                    }
                    return Ok(Claim {
                        permit: Some(permit),
                        epoch,
                    });
                }
            }
        }
        Err(self.replace())
    }

    pub(crate) const fn semaphore(&self) -> &Semaphore {
        &self.semaphore
    }

    /// Lets calls claim permits again after claims were revoked. Called when a call that has claimed no permit is polled
    /// and takes one, which shows that calls are polled.
    #[inline]
    pub(crate) fn reopen_claims(&self) {
        self.semaphore.state().claims.reopen();
    }

    /// Replaces this acquirer with a new one. Returns the old one, which keeps its position in the wait queue.
    #[inline]
    pub(crate) fn replace(&mut self) -> Self {
        mem::replace(self, self.semaphore.acquire())
    }

    #[inline]
    fn has_uncontended(&self) -> bool {
        self.waiter.is_none() && self.semaphore.state().has_uncontended()
    }

    #[inline]
    fn take_uncontended(&self) -> bool {
        self.waiter.is_none() && self.semaphore.state().take_uncontended()
    }

    fn waiter(&mut self) -> &mut Waiter<Permits> {
        self.waiter.get_or_insert_with(|| self.semaphore.inner.queue.waiter())
    }

    #[inline]
    fn permit(&mut self) -> Permit {
        // The acquirer left the wait queue when it took the permit. Its handle to the wait queue is dropped, so that it
        // tries the fast path first again.
        self.waiter = None;
        Permit {
            semaphore: Some(self.semaphore.clone()),
        }
    }
}

/// The clone is a new acquirer of the same semaphore, which is not in the wait queue.
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

impl Permit {
    /// Returns the semaphore of the permit.
    pub(crate) fn of(&self) -> Option<Semaphore> {
        self.semaphore.clone()
    }

    #[inline]
    pub(crate) const fn is_of_none(&self) -> bool {
        self.semaphore.is_none()
    }

    /// Returns a permit of no semaphore, which counts nowhere.
    pub(crate) const fn of_none() -> Self {
        Self { semaphore: None }
    }

    /// Lets `in_flight` live as long as the permit, and as what becomes of it: a claim, or an acquirer.
    pub(crate) fn counted_by(mut self, in_flight: Option<InFlight>) -> Self {
        if let (Some(semaphore), Some(in_flight)) = (&mut self.semaphore, in_flight) {
            semaphore.inner = Arc::new(SemaphoreInner {
                state: semaphore.inner.state.clone(),
                queue: semaphore.inner.queue.clone(),
                in_flight: Some(Box::new(in_flight)),
            });
        }
        self
    }

    /// Makes the permit one that is [confirmed](Claim::confirm) by the call that it is for. Gives the permit back if it is
    /// of no semaphore, or if calls cannot claim permits now.
    pub(crate) fn into_claim(self) -> Result<Claim, Self> {
        let Some(semaphore) = &self.semaphore else {
            return Err(self);
        };
        let Some(epoch) = semaphore.state().claims.add() else {
            return Err(self);
        };
        if semaphore.state().is_contended() {
            // As in `Acquire::claim`.
            semaphore.notify();
        }
        Ok(Claim {
            permit: Some(self),
            epoch,
        })
    }

    /// Releases the permit, and returns a new acquirer of the same semaphore.
    pub(crate) fn release(mut self) -> Acquire {
        let semaphore = self
            .semaphore
            .take()
            .expect("a permit belongs to a semaphore until it is dropped");
        semaphore.release();
        semaphore.acquire()
    }

    /// Drops the permit without releasing it, and returns a new acquirer of the same semaphore.
    fn forget(mut self) -> Acquire {
        let semaphore = self
            .semaphore
            .take()
            .expect("a permit belongs to a semaphore until it is dropped");
        semaphore.acquire()
    }

    #[inline]
    fn state(&self) -> Option<&PermitState> {
        self.semaphore.as_ref().map(Semaphore::state)
    }
}

impl Drop for Permit {
    #[inline]
    fn drop(&mut self) {
        if let Some(semaphore) = &self.semaphore {
            semaphore.release();
        }
    }
}

impl fmt::Debug for Permit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Permit")
    }
}

// === impl Claim ===

impl Claim {
    /// Turns the claim into a permit. If the claim is void, returns an acquirer that is not in the wait queue.
    ///
    /// # Panics
    ///
    /// If it is called a second time.
    #[inline]
    pub(crate) fn confirm(&mut self) -> Result<Permit, Acquire> {
        let permit = self.permit.take().expect("a claim is confirmed once");
        if self.is_valid(&permit) {
            Ok(permit)
        } else {
            Err(permit.forget())
        }
    }

    /// Ends the claim on `permit`, and returns whether it was valid.
    #[inline]
    fn is_valid(&self, permit: &Permit) -> bool {
        permit.state().is_some_and(|state| state.claims.end(self.epoch))
    }
}

impl Drop for Claim {
    #[inline]
    fn drop(&mut self) {
        if let Some(permit) = self.permit.take() {
            if !self.is_valid(&permit) {
                drop(permit.forget());
            }
        }
    }
}

impl fmt::Debug for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Claim")
    }
}

// === impl PermitState ===

impl PermitState {
    /// Returns whether the fast path is open and a permit is available.
    #[inline]
    fn has_uncontended(&self) -> bool {
        let held = self.held.load(Ordering::Acquire);
        held & CONTENDED == 0 && held / PERMIT < self.total.load(Ordering::Acquire)
    }

    /// Takes a permit on the fast path. Returns `false` if the fast path is closed or no permit is available.
    #[inline]
    fn take_uncontended(&self) -> bool {
        self.take_if(|held| held & CONTENDED == 0)
    }

    /// Returns whether a permit is available, whether or not the fast path is open.
    fn is_available(&self) -> bool {
        self.held.load(Ordering::Acquire) / PERMIT < self.total.load(Ordering::Acquire)
    }

    #[inline]
    fn take_if(&self, is_allowed: impl Fn(usize) -> bool) -> bool {
        let total = self.total.load(Ordering::Acquire);
        let take = |held| (is_allowed(held) && held / PERMIT < total).then_some(held + PERMIT);
        self.held
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, take)
            .is_ok()
    }

    /// Releases a permit. Returns whether the contended flag is set, in which case the wait queue has to notify a
    /// waiter.
    #[inline]
    fn release(&self) -> bool {
        self.held.fetch_sub(PERMIT, Ordering::AcqRel) & CONTENDED != 0
    }

    /// Returns whether the fast path is closed.
    ///
    /// The flag and the [claims](Claims) are accessed with sequential consistency, so that either this call, which is
    /// made after a claim was added, sees the flag, or the thread that sets the flag sees the claim afterwards.
    #[inline]
    fn is_contended(&self) -> bool {
        // loom treats sequential consistency as acquire and release, for which the load has to be an operation that
        // also writes. It costs much more.
        let held = if cfg!(tower_outbound_loom) {
            self.held.fetch_or(0, Ordering::SeqCst)
        } else {
            self.held.load(Ordering::SeqCst)
        };
        held & CONTENDED != 0
    }

    fn set_contended(&self) {
        self.held.fetch_or(CONTENDED, Ordering::SeqCst);
    }

    fn clear_contended(&self) {
        self.held.fetch_and(!CONTENDED, Ordering::AcqRel);
    }
}

// === impl Permits ===

impl Permits {
    /// Revokes the old claims, and releases their permits. The wait queue must be advanced afterwards.
    fn revoke_old_claims(&mut self) {
        let revoked = self.state.claims.revoke_old();
        self.state.held.fetch_sub(revoked * PERMIT, Ordering::AcqRel);
        self.aged_at = None;
    }
}

impl Resource for Permits {
    type Request = ();
    type Rejection = Closed;

    fn rejection(&mut self, (): &(), _: &mut LazyNow) -> Option<Closed> {
        self.closed.then(Closed::new)
    }

    fn availability(&mut self, (): &(), now: &mut LazyNow) -> Availability {
        if self.state.is_available() {
            return Availability::Now;
        }
        let claims = &self.state.claims;
        if let Some(aged_at) = self.aged_at.filter(|_| claims.has_old()) {
            let revoked_at = aged_at + HANDOFF_TIMEOUT;
            if now.get() < revoked_at {
                return Availability::BlockedUntil(revoked_at);
            }
            self.revoke_old_claims();
            if self.state.is_available() {
                return Availability::Now;
            }
        }
        if self.state.claims.age() {
            let now = now.get();
            self.aged_at = Some(now);
            return Availability::BlockedUntil(now + HANDOFF_TIMEOUT);
        }
        Availability::Blocked
    }

    fn try_take(&mut self, (): &(), _waited: bool, _: &mut LazyNow) -> bool {
        self.state.take_if(|_| true)
    }

    fn on_enqueue(&mut self, (): &()) {
        self.waiting += 1;
        // The contended flag is set here, before the waiter enters the wait queue. Afterwards the wait queue checks the
        // availability once more. That check sees a permit that was released before the flag was set. A permit that is
        // released later finds the flag set, so its release notifies the queue.
        self.state.set_contended();
    }

    fn on_dequeue(&mut self, (): &()) {
        self.waiting -= 1;
        if self.waiting == 0 && !self.closed {
            self.state.clear_contended();
        }
    }
}
