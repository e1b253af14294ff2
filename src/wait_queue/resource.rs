//! [`Resource`]: what the waiters of a queue wait for.
//!
//! A resource decides when a request can be met and takes what it needs. The queue decides which waiter is next.

use crate::clock::LazyNow;
use tokio::time::Instant;

/// Something limited that waiters take from in the order of their queue, such as permits or a rate's tokens.
///
/// Every method runs under the queue's lock, so none may call user code or block.
pub(crate) trait Resource: Send + 'static {
    /// What one waiter wants, such as the cost of a call.
    type Request: Clone + Send + 'static;
    /// Why a request can never be met.
    type Rejection: PartialEq;

    /// Returns the reason if `request` can never be met, however long the waiter waits.
    fn rejection(&self, request: &Self::Request) -> Option<Self::Rejection>;

    /// Returns when `request` can be met, provided that no other request is met before it.
    fn availability(&mut self, request: &Self::Request, now: &mut LazyNow) -> Availability;

    /// Takes what `request` wants and returns whether it was still available.
    ///
    /// The queue calls this right after [`availability`](Resource::availability) has returned [`Availability::Now`] for
    /// the same request. It can return `false` only for a resource that is also taken from without the queue's lock.
    /// `waited` is `false` if the queue was empty when the request was made.
    fn try_take(&mut self, request: &Self::Request, waited: bool, now: &mut LazyNow) -> bool;

    /// Prepares for the first request after a time in which the queue was empty.
    fn on_idle(&mut self, _now: &mut LazyNow) {}

    /// Takes what `request` wants if it is available, while the queue is empty.
    ///
    /// Most requests are made while the queue is empty, so a resource may override this with a shorter way that has
    /// the same result.
    fn try_take_uncontended(&mut self, request: &Self::Request, now: &mut LazyNow) -> Result<bool, Self::Rejection> {
        if let Some(rejection) = self.rejection(request) {
            return Err(rejection);
        }
        self.on_idle(now);
        Ok(self.availability(request, now) == Availability::Now && self.try_take(request, false, now))
    }

    /// A waiter with this request is about to enter the queue.
    fn on_enqueue(&mut self, _request: &Self::Request) {}

    /// A waiter with this request has left the queue, with or without what it wanted.
    fn on_dequeue(&mut self, _request: &Self::Request) {}
}

/// When a [`Resource`] can meet a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Availability {
    Now,
    /// At this instant, unless the resource is changed before.
    At(Instant),
    /// After the resource has been changed: a permit was released, or a total was raised.
    Blocked,
}
