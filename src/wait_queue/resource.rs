//! [`Resource`]: something limited that the waiters of a wait queue wait for.
//!
//! A resource decides when a request, which is what one waiter wants, can be granted, and takes what the request needs.
//! The wait queue decides which waiter is next.

use crate::clock::LazyNow;
use std::time::Duration;
use tokio::time::Instant;

/// How long a notified waiter has to take what it waits for before it is skipped and the next waiter is notified.
///
/// Five milliseconds are far more than a healthy runtime needs to poll a woken task, and several times the resolution
/// of Tokio's timers (1 ms), so a waiter that is still polled is rarely skipped. They are also short, so a waiter that
/// is no longer polled delays the waiters behind it only briefly.
pub(crate) const HANDOFF_TIMEOUT: Duration = Duration::from_millis(5);

/// Something limited that waiters take from in the order of their queue, such as permits or the tokens of a rate limit.
///
/// The methods of a resource run under the wait queue's lock, so they must not call user code or block.
pub(crate) trait Resource: Send + 'static {
    /// What one waiter wants to take, such as the cost of a call.
    type Request: Clone + Send + 'static;
    /// The reason why a request is not granted, and does not wait.
    type Rejection: PartialEq;

    /// Returns the reason if `request` cannot be granted and its waiter must not wait, for example because it could never
    /// be granted.
    fn rejection(&mut self, request: &Self::Request, now: &mut LazyNow) -> Option<Self::Rejection>;

    /// Returns the time at which `request` can be granted, provided that no other request is granted before it.
    fn availability(&mut self, request: &Self::Request, now: &mut LazyNow) -> Availability;

    /// Takes what `request` wants. Returns `false` if that was no longer available.
    ///
    /// The wait queue calls `try_take` right after [`availability`](Resource::availability) has returned
    /// [`Availability::Now`] for the same request. So `try_take` can return `false` only for a resource that is also
    /// taken from without the queue's lock, such as permits with a fast path. `waited` is `false` if the queue was
    /// empty when the request was made.
    fn try_take(&mut self, request: &Self::Request, waited: bool, now: &mut LazyNow) -> bool;

    /// Brings the resource up to date before a request that is made while the wait queue is empty. A rate limit adds
    /// the tokens that have accumulated in the meantime.
    fn on_idle(&mut self, _now: &mut LazyNow) {}

    /// Returns whether what `request` wants is available now, for a request that is made while the wait queue is empty.
    /// May be overridden with a faster method that has the same result.
    fn is_available_uncontended(
        &mut self,
        request: &Self::Request,
        now: &mut LazyNow,
    ) -> Result<bool, Self::Rejection> {
        if let Some(rejection) = self.rejection(request, now) {
            return Err(rejection);
        }
        self.on_idle(now);
        Ok(self.availability(request, now) == Availability::Now)
    }

    /// Takes what `request` wants if that is available now, for a request that is made while the wait queue is empty.
    /// Returns whether it was taken.
    ///
    /// Most requests are made while the wait queue is empty, so a resource may override this method with a faster one
    /// that has the same result.
    fn try_take_uncontended(&mut self, request: &Self::Request, now: &mut LazyNow) -> Result<bool, Self::Rejection> {
        Ok(self.is_available_uncontended(request, now)? && self.try_take(request, false, now))
    }

    /// Called before a waiter with this request enters the wait queue.
    fn on_enqueue(&mut self, _request: &Self::Request) {}

    /// Called after a waiter with this request has left the wait queue, whether or not it has taken what it wanted.
    fn on_dequeue(&mut self, _request: &Self::Request) {}
}

/// When a [`Resource`] can grant a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Availability {
    Now,
    /// The request can be granted at this instant, unless the resource is changed before.
    At(Instant),
    /// The request can be granted only after the resource has been changed, for example after a permit was released or
    /// the total was raised.
    Blocked,
    /// As for [`Blocked`](Self::Blocked). Besides, the resource wants to be asked again at this instant, because it may
    /// then take something back from a holder. Where there is no timer, it is not asked.
    BlockedUntil(Instant),
}
