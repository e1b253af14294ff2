//! The layers of an executor in order, one line each with its reason. No other file knows the order.
//!
//! A call enters at the top:
//!
//! ```text
//! Executor::submit                  opens the event: PENDING while it waits for a place, QUEUED once it has one
//!   QueueLayer                      bounded, first in, first out; its workers drive the calls
//!     EventLayer::processing()      PROCESSING on the way in; COMPLETED, FAILED or CANCELLED on the way out
//!       DeadlineLayer               ends a call at its deadline; refuses a call that cannot meet it
//!         your layers               around the limits: each retry takes its own permit and pays its own rate
//!           ConcurrencyLimitLayer   at most n calls in flight
//!             RateLimitLayer        requests and tokens: all budgets or none
//!               EventLayer::calling()  CALLING on the way in; the attempt's response or error on the way out
//!                 your client       reqwest, hyper, a closure
//! ```
//!
//! In a stack built with `tower::ServiceBuilder`, `EventLayer::queued()` at the top does what `submit` does here.
//!
//! # A layer of your own
//!
//! There are two places for a layer, and both take any Tower layer:
//!
//! - *Around the limits*, with [`ExecutorBuilder::layer`](super::ExecutorBuilder::layer): for what happens once a call,
//!   however many attempts it makes (a retry), or has to include the waiting (a timeout).
//! - *Around the client*, wrapped before the client is given to [`build`](super::ExecutorBuilder::build): for what
//!   happens once an attempt (setting a header, signing, tracing).

use crate::{
    concurrency::{Concurrency, ConcurrencyLimit, ConcurrencyLimitLayer},
    deadline::DeadlineLayer,
    error::BoxError,
    event::{Describe, EventLayer, EventService},
    queue::{Queue, QueueLayer},
    rate::{Limiter, RateLimit, RateLimitLayer, RequestCost, UsedCost},
};
use http::{Request, Response};
use std::any::TypeId;
use tower::{ServiceBuilder, layer::util::Identity};
use tower_layer::Layer;
use tower_service::Service;

/// The client inside its limits: the service that a layer given to
/// [`ExecutorBuilder::layer`](super::ExecutorBuilder::layer) wraps.
pub type Limited<C, D, K, U> = ConcurrencyLimit<RateLimit<EventService<C, D>, K, U>>;

/// All layers of an executor, without its client: the layer around the limits (`L`), what is recorded (`D`), what a
/// request costs (`K`) and what it has used (`U`). Built by an [`ExecutorBuilder`](super::ExecutorBuilder) only.
#[derive(Clone, Debug)]
pub struct Layers<L, D, K, U> {
    pub(super) layer: L,
    pub(super) concurrency: Concurrency,
    pub(super) limiter: Limiter,
    pub(super) cost: K,
    pub(super) used: U,
    pub(super) describe: D,
}

/// [`Layers`] that fit around the client `C`, whose calls go from `Request<B>` to `Response<R>`.
///
/// A bound of [`build`](super::ExecutorBuilder::build) and its variants. It is sealed, and holds whenever
///
/// - the layers given to [`layer`](super::ExecutorBuilder::layer) make of the [`Limited`] client a service from
///   `Request<B>` to `Response<R>` that is `Send + 'static`, with `Send` futures and errors that are
///   `Into<`[`BoxError`]`>`. With no layer this means that the client's futures are `Send`;
/// - what was given to [`describe`](super::ExecutorBuilder::describe), [`cost`](super::ExecutorBuilder::cost) and
///   [`settle`](super::ExecutorBuilder::settle) is a [`Describe`], a [`RequestCost`] and a [`UsedCost`] of these
///   requests and responses, and `Clone + Send + Sync + 'static`. The defaults are, for any `B` and `R`.
pub trait Around<C, B, R>: sealed::Sealed + Send + Sync + 'static {
    /// Spawns the queue's workers around `client`, and returns the queue.
    #[doc(hidden)]
    fn around(&self, queue: QueueLayer<Request<B>>, client: C) -> Queue<Request<B>, Response<R>>;

    #[doc(hidden)]
    fn boxed_describe(&self) -> BoxDescribe<B, R>;

    #[doc(hidden)]
    fn boxed_cost(&self) -> BoxCost<B>;
}

pub(super) type BoxDescribe<B, R> = Box<dyn Describe<Request<B>, Response<R>> + Send + Sync>;
pub(super) type BoxCost<B> = Box<dyn RequestCost<Request<B>> + Send + Sync>;

mod sealed {
    pub trait Sealed {}

    impl<L, D, K, U> Sealed for super::Layers<L, D, K, U> {}
}

impl<L, D, K, U, C, B, R> Around<C, B, R> for Layers<L, D, K, U>
where
    C: Service<Request<B>, Response = Response<R>>,
    C::Error: Into<BoxError> + 'static,
    L: Layer<Limited<C, D, K, U>> + Send + Sync + 'static,
    L::Service: Service<Request<B>, Response = Response<R>, Error: Into<BoxError>, Future: Send> + Send + 'static,
    D: Describe<Request<B>, Response<R>> + Clone + Send + Sync + 'static,
    K: RequestCost<Request<B>> + Clone + Send + Sync + 'static,
    U: UsedCost<Response<R>> + Clone + Send + Sync + 'static,
    B: Send + 'static,
    R: Send + 'static,
{
    fn around(&self, queue: QueueLayer<Request<B>>, client: C) -> Queue<Request<B>, Response<R>> {
        ServiceBuilder::new()
            // Bounded, so that callers wait when the limits are reached. Its workers drive the calls, also those whose
            // handles are not polled.
            .layer(queue)
            // Below the queue, so that the outcome is recorded even if the caller drops its handle.
            .layer(
                EventLayer::processing()
                    .describe(self.describe.clone())
                    .above_own_layers(TypeId::of::<L>() == TypeId::of::<Identity>()),
            )
            // Around everything that takes time below the queue. Above it, the caller's handle has the same deadline.
            .layer(DeadlineLayer::new().limiter(self.limiter.clone(), self.cost.clone()))
            // The user's layers. A retry belongs here, so that every attempt takes a permit and pays its rate.
            .layer(&self.layer)
            // Outside the rate limit: the budget is taken last, next to the wire. The other way round, calls that have
            // paid would pile up behind a full concurrency limit and be sent as a burst.
            .layer(ConcurrencyLimitLayer::with_limit(self.concurrency.clone()))
            // Requests and tokens, both or neither.
            .layer(RateLimitLayer::with_cost(self.limiter.clone(), self.cost.clone()).settle(self.used.clone()))
            // Next to the wire: only the time in the client counts as CALLING.
            .layer(EventLayer::calling().describe(self.describe.clone()))
            .service(client)
    }

    fn boxed_describe(&self) -> BoxDescribe<B, R> {
        Box::new(self.describe.clone())
    }

    fn boxed_cost(&self) -> BoxCost<B> {
        Box::new(self.cost.clone())
    }
}

#[cfg(test)]
mod tests {
    /// GitHub cannot include a file in another, so the picture stands in the README, too.
    #[test]
    fn the_picture_in_the_readme_is_the_one_in_these_docs() {
        let (_, rest) = include_str!("../../README.md").split_once("```text\n").unwrap();
        let (picture, _) = rest.split_once("```").unwrap();
        assert!(picture.contains("QueueLayer"));
        let documented: String = include_str!("stack.rs")
            .lines()
            .filter_map(|line| line.strip_prefix("//! "))
            .map(|line| format!("{line}\n"))
            .collect();
        assert!(documented.contains(picture));
    }
}
