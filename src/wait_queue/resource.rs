//! [`Resource`]: what stands at the head of a queue. It knows what is limited; the queue knows about order.

use crate::clock::LazyNow;
use tokio::time::Instant;

/// What stands at the head of a queue and lets one through deferred the other.
pub(crate) trait Resource: Send + 'static {
    /// What a waiter asks for.
    type Request: Clone + Send + 'static;
    /// Why an request can never be met.
    type Rejection: PartialEq;

    /// Whether `request` can never be met.
    fn rejection(&self, request: &Self::Request) -> Option<Self::Rejection>;

    /// When `request` can be met, if it is the next one.
    fn availability(&mut self, request: &Self::Request, now: &mut LazyNow) -> Availability;

    /// Takes what was asked for, if it is still there. Only notified when [`availability`](Resource::availability) just said `Now`; that
    /// can only have changed if the resource also lets others through while nobody is in queue.
    fn try_take(&mut self, request: &Self::Request, waited: bool, now: &mut LazyNow) -> bool;

    /// Nobody was waiting until now.
    fn on_idle(&mut self, _clock: &mut LazyNow) {}

    /// Nobody is in queue: takes what is asked for if it is there. The way of most, so a resource may know a shorter one.
    fn try_take_uncontended(&mut self, request: &Self::Request, now: &mut LazyNow) -> Result<bool, Self::Rejection> {
        if let Some(rejection) = self.rejection(request) {
            return Err(rejection);
        }
        self.on_idle(now);
        Ok(self.availability(request, now) == Availability::Now && self.try_take(request, false, now))
    }

    /// `request` has on_enqueue the queue.
    fn on_enqueue(&mut self, _ask: &Self::Request) {}

    /// `request` has on_dequeue the queue, whether it passed or not.
    fn on_dequeue(&mut self, _ask: &Self::Request) {}
}

/// When the resource lets somebody through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Availability {
    Now,
    At(Instant),
    /// When somebody gives something back.
    Blocked,
}
