//! [`CurrentCall`]: the call that is made or polled on this thread, for attempts of it in other tasks.

use crate::{
    rate::{self, ChargeAgain, GrantedCharge, RateLimiter},
    semaphore::{
        Semaphore,
        granted::{self, AskAgain, GrantedPermit},
    },
};
use std::{
    fmt,
    future::{Future, poll_fn},
    pin::pin,
    sync::Arc,
};

/// The call that is made or polled on this thread and that a schedule has chosen: see [`current`].
///
/// Layers find what a schedule has given a call in thread-local variables, as they find the current
/// [event](crate::event). A task that a layer spawns does not have them: an attempt that it makes would wait for a permit
/// and for the limiter as a call without a schedule does, and would not be charged to the limits of its keys. With
/// [`instrument`](Self::instrument) it is a further attempt of its call, as a retry is: it waits in its flow and is charged
/// to all limits.
///
/// ```
/// use tower::Service;
/// use tower_outbound::schedule;
///
/// /// Makes a call in a task of its own.
/// fn spawn_attempt<S>(mut service: S, request: http::Request<String>)
/// where
///     S: Service<http::Request<String>, Future: Send, Error: Send, Response: Send> + Send + 'static,
/// {
///     let attempt = async move {
///         std::future::poll_fn(|cx| service.poll_ready(cx)).await?;
///         service.call(request).await
///     };
///     match schedule::current() {
///         Some(call) => drop(tokio::spawn(call.instrument(attempt))),
///         None => drop(tokio::spawn(attempt)),
///     }
/// }
/// ```
#[derive(Clone)]
pub struct CurrentCall {
    permits: Option<(Semaphore, Arc<dyn AskAgain>)>,
    limiter: Option<(RateLimiter, Arc<dyn ChargeAgain>)>,
}

/// What the layers find in a scope, and outside it while the scope is not entered.
struct Slots {
    permit: Option<GrantedPermit>,
    charge: Option<GrantedCharge>,
}

/// The guard of entered [`Slots`].
struct Entered<'a>(&'a mut Slots);

/// Returns the call that is made or polled on this thread, if a schedule with a
/// [concurrency limit](super::Schedule::concurrency) or a [limiter](super::Schedule::limiter) has chosen it. `None`
/// otherwise.
#[must_use]
pub fn current() -> Option<CurrentCall> {
    let (permits, limiter) = (granted::current_again(), rate::current_charge_again());
    (permits.is_some() || limiter.is_some()).then_some(CurrentCall { permits, limiter })
}

impl CurrentCall {
    /// Runs `f` with this call as the current one.
    pub fn in_scope<T>(&self, f: impl FnOnce() -> T) -> T {
        let mut slots = self.slots();
        let _entered = slots.enter();
        f()
    }

    /// Polls `future` with this call as the current one. The call itself may have ended by then.
    ///
    /// # Cancel safety
    ///
    /// Dropping the returned future drops `future`. An attempt of it that waits leaves its flow, and is charged nothing.
    pub async fn instrument<F: Future>(self, future: F) -> F::Output {
        let mut slots = self.slots();
        let mut future = pin!(future);
        poll_fn(|cx| {
            let _entered = slots.enter();
            future.as_mut().poll(cx)
        })
        .await
    }

    fn slots(&self) -> Slots {
        let permit = self.permits.clone();
        let permit = permit.map(|(permits, again)| GrantedPermit::of_attempts(permits, again));
        let charge = self.limiter.clone();
        let charge = charge.map(|(limiter, again)| GrantedCharge::of_attempts(limiter, again));
        Slots { permit, charge }
    }
}

impl fmt::Debug for CurrentCall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CurrentCall").finish_non_exhaustive()
    }
}

impl Slots {
    fn enter(&mut self) -> Entered<'_> {
        self.swap();
        Entered(self)
    }

    fn swap(&mut self) {
        granted::swap(&mut self.permit);
        rate::swap_granted_charge(&mut self.charge);
    }
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        self.0.swap();
    }
}
