//! The layers in order, one line each with its reason. Nothing else in the crate knows the order.
//!
//! A call comes in at the top:
//!
//! ```text
//! Executor::submit           opens the event: PENDING while it waits for a place, QUEUED once it has one
//!   QueueLayer               bounded, first in first out; its workers drive the calls
//!     EventLayer::processing PROCESSING on the way in; COMPLETED, FAILED or CANCELLED on the way out
//!       DeadlineLayer        ends a call when its time is up; refuses one that cannot make it
//!       your layer           around the limits: a retry here takes a permit and pays its rate for every attempt
//!         ConcurrencyLimitLayer
//!           RateLimitLayer   requests and tokens, both or neither
//!             EventLayer::calling  CALLING on the way in; the attempt's response or error on the way out
//!               the client   your layers around it are inside the limits: they see what goes to the wire
//! ```
//!
//! In a stack of one's own, `EventLayer::queued()` on top does what `submit` does here.
//!
//! # A layer of your own
//!
//! There are two places for it, and both take any Tower layer:
//!
//! - *Around the limits*, with [`ExecutorBuilder::layer`](super::ExecutorBuilder::layer): what happens once for a call
//!   that may go to the wire several times (retry), or has to count the waiting (timeout).
//! - *Around the client*: wrap it before you give it to [`build`](super::ExecutorBuilder::build). What happens each
//!   time a call goes to the wire (set a header, sign, trace).

use crate::{
    concurrency::{Concurrency, ConcurrencyLimit, ConcurrencyLimitLayer},
    deadline::{DeadlineLayer, DeadlineService},
    error::{BoxError, InvalidConfig},
    event::{Describe, EventLayer, EventService},
    queue::{Queue, QueueLayer},
    rate::{Limiter, RateLimit, RateLimitLayer, RequestCost, UsedCost},
};
use http::{Request, Response};
use std::any::TypeId;
use tower::{ServiceBuilder, layer::util::Identity};
use tower_layer::Layer;
use tower_service::Service;

/// The client with its limits: what a layer given to [`ExecutorBuilder::layer`](super::ExecutorBuilder::layer) wraps.
pub type Limited<C, D, K, U> = ConcurrencyLimit<RateLimit<EventService<C, D>, K, U>>;

/// Everything but the client.
#[derive(Clone, Debug)]
pub(super) struct Stack<L, D, K, U> {
    pub(super) queue_capacity: usize,
    pub(super) workers: usize,
    pub(super) layer: L,
    pub(super) concurrency: Concurrency,
    pub(super) limiter: Limiter,
    pub(super) cost: K,
    pub(super) used: U,
    pub(super) describe: D,
}

impl<L, D, K, U> Stack<L, D, K, U> {
    /// Spawns the workers.
    pub(super) fn around<C, B, R>(&self, client: C) -> Result<Queue<Request<B>, Response<R>>, InvalidConfig>
    where
        C: Service<Request<B>, Response = Response<R>>,
        C::Error: Into<BoxError> + 'static,
        L: Layer<Limited<C, D, K, U>> + 'static,
        L::Service: Service<Request<B>, Response = Response<R>, Error: Into<BoxError>, Future: Send> + Send + 'static,
        D: Describe<Request<B>, Response<R>> + Clone,
        K: RequestCost<Request<B>> + Clone,
        U: UsedCost<Response<R>> + Clone,
        EventService<DeadlineService<L::Service, K>, D>:
            Service<Request<B>, Response = Response<R>, Error = BoxError, Future: Send> + Send + 'static,
        B: Send + 'static,
        R: Send + 'static,
    {
        Ok(ServiceBuilder::new()
            // Bounded, so that callers feel the limits; and its workers drive the calls, whether or not somebody waits.
            .layer(QueueLayer::new(self.queue_capacity)?.workers(self.workers)?)
            // Below the queue: so the outcome is written even if the caller never looks.
            .layer(
                EventLayer::processing()
                    .describe(self.describe.clone())
                    .above_own_layers(TypeId::of::<L>() == TypeId::of::<Identity>()),
            )
            // Over all that follows. The queue's part of it is the caller's handle's to see to.
            .layer(DeadlineLayer::new().limiter(self.limiter.clone(), self.cost.clone()))
            // Yours. A retry belongs here, so that every attempt takes its own permit and pays its own rate.
            .layer(&self.layer)
            // Outside the rate: the budget is taken last, next to the wire. The other way round, calls that have paid
            // would pile up behind a full limit and leave as a burst.
            .layer(ConcurrencyLimitLayer::with_limit(self.concurrency.clone()))
            // Requests and tokens, both or neither.
            .layer(RateLimitLayer::with_cost(self.limiter.clone(), self.cost.clone()).settle(self.used.clone()))
            // Next to the wire: from here on the call is really being made.
            .layer(EventLayer::calling().describe(self.describe.clone()))
            .service(client))
    }
}
