//! The layers of an executor in order, with a reason for each. No other file defines the order.
//!
//! A call passes the layers from the top, the outermost layer, to the client:
//!
//! ```text
//! Executor::submit                  opens the event: PENDING while it waits for a place, QUEUED once it has one
//!   QueueLayer                      bounded; in order, or as a Schedule chooses; a task for each call; deadlines end calls
//!     EventLayer::processing()      PROCESSING on the way in; COMPLETED, FAILED or CANCELLED on the way out
//!       DeadlineLayer               refuses a call that cannot meet its deadline
//!         your layers               around the limits: each retry takes its own permit and pays its own rate
//!           ConcurrencyLimitLayer   at most n calls in flight
//!             RateLimitLayer        requests and tokens: all budgets or none
//!               EventLayer::calling()  CALLING on the way in; the attempt's response or error on the way out
//!                 your client       reqwest, hyper, a closure
//! ```
//!
//! In a stack built with `tower::ServiceBuilder`, without an executor, put `EventLayer::queued()` at the top: it opens
//! the call's event, as `Executor::submit` does for an executor.
//!
//! # A layer of your own
//!
//! A Tower layer of your own can be added to an executor in two places:
//!
//! - *Around the limits*, with [`ExecutorBuilder::layer`](super::ExecutorBuilder::layer): for a layer that acts once
//!   per call, however many attempts the call makes (a retry), or that has to include the wait for the limits (a
//!   timeout).
//! - *Around the client*, by wrapping the client before it is given to [`build`](super::ExecutorBuilder::build): for a
//!   layer that acts once per attempt (setting a header, signing, tracing).

use crate::{
    concurrency::{Concurrency, ConcurrencyLimit, ConcurrencyLimitLayer},
    deadline::DeadlineLayer,
    error::BoxError,
    event::{Describe, EventLayer, EventService},
    queue::{Queue, QueueLayer},
    rate::{RateLimit, RateLimitLayer, RateLimiter, RequestCost, UsedCost},
};
use http::{Request, Response};
use std::any::TypeId;
use tower::{ServiceBuilder, layer::util::Identity};
use tower_layer::Layer;
use tower_service::Service;

/// The client `C`, wrapped in an event layer, the rate limit and the concurrency limit. A layer given
/// to [`ExecutorBuilder::layer`](super::ExecutorBuilder::layer) wraps this service.
pub type Limited<C, D, K, U> = ConcurrencyLimit<RateLimit<EventService<C, D>, K, U>>;

/// All layers of an executor, without its client: the user's layer around the limits (`L`), what the event records of
/// requests and responses (`D`), how the cost of a request is computed (`K`), and how the cost that the call has really
/// used is determined (`U`). Only an [`ExecutorBuilder`](super::ExecutorBuilder) builds this type.
#[derive(Clone, Debug)]
pub struct StackLayers<L, D, K, U> {
    pub(super) layer: L,
    pub(super) concurrency: Concurrency,
    pub(super) limiter: RateLimiter,
    pub(super) cost: K,
    pub(super) used: U,
    pub(super) describe: D,
}

/// [`StackLayers`] that can be put around the client `C`, a service from `Request<B>` to `Response<R>`.
///
/// This sealed trait is a bound of [`ExecutorBuilder::build`](super::ExecutorBuilder::build) and its variants. It is
/// implemented for [`StackLayers`] if both of these conditions hold:
///
/// - The layers given to [`layer`](super::ExecutorBuilder::layer) turn the [`Limited`] client into a service from
///   `Request<B>` to `Response<R>` that is `Send + 'static`, with `Send` futures and errors that are
///   `Into<`[`BoxError`]`>`. Without such a layer, this means that the client's futures are `Send`.
/// - The values given to [`describe`](super::ExecutorBuilder::describe), [`cost`](super::ExecutorBuilder::cost) and
///   [`settle`](super::ExecutorBuilder::settle) implement [`Describe`], [`RequestCost`] and [`UsedCost`] for these
///   requests and responses, and are `Clone + Send + Sync + 'static`. The default values do so for any `B` and `R`.
pub trait BuildStack<C, B, R>: sealed::Sealed + Send + Sync + 'static {
    /// Puts the layers around `client`, and returns the queue.
    #[doc(hidden)]
    fn build_stack(&self, queue: QueueLayer<Request<B>>, client: C) -> Queue<Request<B>, Response<R>>;

    #[doc(hidden)]
    fn boxed_describe(&self) -> BoxDescribe<B, R>;

    #[doc(hidden)]
    fn boxed_cost(&self) -> BoxCost<B>;
}

pub(super) type BoxDescribe<B, R> = Box<dyn Describe<Request<B>, Response<R>> + Send + Sync>;
pub(super) type BoxCost<B> = Box<dyn RequestCost<Request<B>> + Send + Sync>;

mod sealed {
    pub trait Sealed {}

    impl<L, D, K, U> Sealed for super::StackLayers<L, D, K, U> {}
}

impl<L, D, K, U, C, B, R> BuildStack<C, B, R> for StackLayers<L, D, K, U>
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
    fn build_stack(&self, queue: QueueLayer<Request<B>>, client: C) -> Queue<Request<B>, Response<R>> {
        if U::SETTLES {
            // The first calls are already checked against their deadlines by what they are expected to use.
            self.limiter.expect_estimates();
        }
        ServiceBuilder::new()
            // The queue is bounded, so that callers wait when the limits are reached. Each call is a task of its own, so
            // that it proceeds, and ends at its deadline, even if its handle is not polled. With a schedule, a call leaves
            // the queue with its permit and its charge, which the two limits below take instead of waiting.
            .layer(queue)
            // The outer event layer is below the queue, so that a call's outcome is recorded even if the caller drops
            // the call's handle.
            .layer(
                EventLayer::processing()
                    .describe(self.describe.clone())
                    .share_cached_now(TypeId::of::<L>() == TypeId::of::<Identity>()),
            )
            // The deadline layer refuses a call that leaves the queue too late to be admitted in time: it takes no
            // permit and wastes nothing of the rates. The queue ends the other calls at their deadline.
            .layer(
                DeadlineLayer::new()
                    .limiter(self.limiter.clone(), self.cost.clone())
                    .only_refuse(),
            )
            // The user's layers are around the limits. A retry belongs here, so that every attempt takes a permit and
            // is charged to the rates.
            .layer(&self.layer)
            // The concurrency limit is outside the rate limit, so that a call is charged to the rates last, just before
            // it is sent. In the reverse order, calls that have been charged would pile up behind a full concurrency
            // limit and be sent as a burst.
            .layer(ConcurrencyLimitLayer::with_limit(self.concurrency.clone()))
            // The rate limit takes a call's requests and tokens at once, or neither.
            .layer(RateLimitLayer::with_cost(self.limiter.clone(), self.cost.clone()).settle(self.used.clone()))
            // The inner event layer is directly around the client, so that a call gets the status CALLING only when it
            // reaches the client.
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
    /// GitHub cannot include one file in another, so the README has a copy of the picture of the layers. This test
    /// checks that the two pictures are the same.
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
