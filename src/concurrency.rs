//! A limit on how many calls are in flight at once.
//!
//! Tower's `ConcurrencyLimit` takes a permit in `poll_ready`. A service that was made ready and is not called keeps its
//! permit, and the calls of other clones wait for that permit, possibly forever. Also, the limit cannot be changed once
//! the service is built.
//!
//! [`ConcurrencyLimitLayer`] takes a permit when the call's future is polled, and releases it when that future
//! completes or is dropped. `poll_ready` waits until a permit is available to this clone of the service, and reserves
//! nothing. If a clone that had to wait is not called within 5 ms after it was woken, the next waiting clone or call is
//! woken. Permits are handed out in the order in which services and futures began to wait. The [limit](Concurrency) can
//! be read and changed at run time.
//!
//! # Examples
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), tower::BoxError> {
//! use tower::{Service, ServiceBuilder, ServiceExt, service_fn};
//! use tower_outbound::ConcurrencyLimitLayer;
//!
//! let layer = ConcurrencyLimitLayer::new(5)?;
//! let limit = layer.limit().clone();
//! let mut service = ServiceBuilder::new()
//!     .layer(layer)
//!     .service(service_fn(async |name: &'static str| Ok::<_, tower::BoxError>(name.len())));
//!
//! assert_eq!(service.ready().await?.call("hello").await?, 5);
//! limit.set(2)?;
//! assert_eq!(limit.in_flight(), 0);
//! # Ok(())
//! # }
//! ```

use crate::{
    error::InvalidConfig,
    semaphore::{Acquire, Permit, Semaphore},
};
use pin_project_lite::pin_project;
use std::{
    fmt,
    future::Future,
    mem,
    pin::Pin,
    task::{Context, Poll, ready},
};
use tower_layer::Layer;
use tower_service::Service;

/// Limits how many calls are in flight at once. See the [module docs](self).
#[derive(Clone, Debug)]
pub struct ConcurrencyLimitLayer {
    limit: Concurrency,
}

/// A service with a limited number of calls in flight, counted over all its clones. See the [module docs](self).
#[derive(Clone, Debug)]
pub struct ConcurrencyLimit<S> {
    inner: S,
    acquire: Acquire,
}

/// A limit on the calls in flight, which can be read and changed at run time, and shared by several services.
///
/// Clones are handles to the same limit.
#[derive(Clone)]
pub struct Concurrency {
    permits: Semaphore,
}

pin_project! {
    /// The response future of a [`ConcurrencyLimit`].
    ///
    /// The future waits for a permit, calls the inner service, and holds the permit until the call has completed or the
    /// future is dropped.
    ///
    /// # Panics
    ///
    /// Panics if the future is polled after it has completed.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future drops the inner call and then releases the permit. If the call still waits for a permit, it
    /// gives up its position among the waiters.
    #[must_use = "futures do nothing unless polled"]
    pub struct ResponseFuture<S, Req>
    where
        S: Service<Req>,
    {
        #[pin]
        state: State<S, Req, S::Future>,
        // The field `permit` is declared after `state`, which holds the inner call, and fields are dropped in this
        // order. So the inner call ends before its permit is released.
        permit: Option<Permit>,
    }
}

pin_project! {
    #[project = StateProj]
    enum State<S, Req, F> {
        /// The call waits for a permit. `ready` is the instance of the inner service that was made ready.
        Waiting { acquire: Option<Acquire>, ready: S, req: Option<Req> },
        /// The call is in flight and holds a permit.
        Calling { #[pin] future: F },
        /// The future has returned the result of the call.
        Done,
    }
}

// === impl ConcurrencyLimitLayer ===

impl ConcurrencyLimitLayer {
    /// Creates a layer that allows `limit` calls in flight, counted over all services that this layer and its clones
    /// make.
    ///
    /// # Errors
    ///
    /// Returns [`InvalidConfig`] if `limit` is zero.
    pub fn new(limit: usize) -> Result<Self, InvalidConfig> {
        Concurrency::new(limit).map(Self::with_limit)
    }

    /// Creates a layer that uses `limit`, which other layers may use, too. The calls of the services of all these
    /// layers count together.
    #[must_use]
    pub const fn with_limit(limit: Concurrency) -> Self {
        Self { limit }
    }

    /// Returns the limit of this layer, to read or change the limit.
    #[must_use]
    pub const fn limit(&self) -> &Concurrency {
        &self.limit
    }
}

impl<S> Layer<S> for ConcurrencyLimitLayer {
    type Service = ConcurrencyLimit<S>;

    fn layer(&self, inner: S) -> Self::Service {
        ConcurrencyLimit {
            inner,
            acquire: self.limit.permits.acquire(),
        }
    }
}

// === impl Concurrency ===

impl Concurrency {
    /// Creates a limit that allows `limit` calls in flight.
    ///
    /// # Errors
    ///
    /// Returns [`InvalidConfig`] if `limit` is zero.
    pub fn new(limit: usize) -> Result<Self, InvalidConfig> {
        Ok(Self {
            permits: Semaphore::new(InvalidConfig::positive("concurrency_limit", limit)?),
        })
    }

    /// Returns the limit, that is, how many calls may be in flight.
    #[must_use]
    pub fn get(&self) -> usize {
        self.permits.total()
    }

    /// Returns how many calls are in flight. After the limit was lowered, more calls than the limit may be in flight
    /// until enough calls have ended.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.permits.held()
    }

    /// Changes the limit. A higher limit takes effect at once, also for calls that are waiting already. A lower limit
    /// does not stop calls in flight: it takes effect as they end.
    ///
    /// # Errors
    ///
    /// Returns [`InvalidConfig`] if `limit` is zero. The limit is not changed then.
    pub fn set(&self, limit: usize) -> Result<(), InvalidConfig> {
        self.permits
            .set_total(InvalidConfig::positive("concurrency_limit", limit)?);
        Ok(())
    }
}

impl fmt::Debug for Concurrency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Concurrency")
            .field("limit", &self.get())
            .field("in_flight", &self.in_flight())
            .finish()
    }
}

// === impl ConcurrencyLimit ===

impl<S, Req> Service<Req> for ConcurrencyLimit<S>
where
    S: Service<Req> + Clone,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = ResponseFuture<S, Req>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        // No permit is taken in `poll_ready`: if no call followed, the permit would be kept from the other clones.
        // Waiting for a permit never fails, because this semaphore is never closed.
        let _ = ready!(self.acquire.poll_ready(cx));
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, req: Req) -> Self::Future {
        // The future gets the instance of the inner service that was made ready, and the acquirer with its position
        // among the waiters. A clone of the inner service, which is not ready, and a new acquirer stay in this service.
        let fresh = self.inner.clone();
        let ready = mem::replace(&mut self.inner, fresh);
        ResponseFuture {
            state: State::Waiting {
                acquire: Some(self.acquire.replace()),
                ready,
                req: Some(req),
            },
            permit: None,
        }
    }
}

// === impl ResponseFuture ===

impl<S, Req> Future for ResponseFuture<S, Req>
where
    S: Service<Req>,
{
    type Output = Result<S::Response, S::Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        loop {
            match this.state.as_mut().project() {
                StateProj::Waiting { acquire, ready, req } => {
                    // Taking a permit never fails, because this semaphore is never closed.
                    *this.permit = ready!(Acquire::poll_acquire(acquire, cx)).ok();
                    let req = req.take().expect("the request is there until it is called");
                    let future = ready.call(req);
                    this.state.set(State::Calling { future });
                }
                StateProj::Calling { future } => {
                    let result = ready!(future.poll(cx));
                    this.state.set(State::Done);
                    *this.permit = None;
                    return Poll::Ready(result);
                }
                StateProj::Done => panic!("`ResponseFuture` polled after completion"),
            }
        }
    }
}

impl<S: Service<Req>, Req> fmt::Debug for ResponseFuture<S, Req> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("concurrency::ResponseFuture")
            .field("permit", &self.permit)
            .finish_non_exhaustive()
    }
}
