//! At most so many calls in flight.
//!
//! [`ConcurrencyLimitLayer`] differs from Tower's in three points: the limit can be changed at run time, it can be
//! watched, and a service that was made ready but is never called holds no permit, so that it starves nobody. A permit
//! is taken when the call's future is first polled, and given back when that future is done or dropped.
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

/// Caps how many calls are in flight. See the [module docs](self).
#[derive(Clone, Debug)]
pub struct ConcurrencyLimitLayer {
    limit: Concurrency,
}

/// A service with at most so many calls in flight, over all its clones. See the [module docs](self).
#[derive(Clone, Debug)]
pub struct ConcurrencyLimit<S> {
    inner: S,
    acquire: Acquire,
}

/// The limit itself, shared by its clones: to watch it, to change it, to put several services under one.
#[derive(Clone)]
pub struct Concurrency {
    permits: Semaphore,
}

pin_project! {
    /// The call: it waits for its permit if it has to, and holds it until it is done or dropped.
    ///
    /// # Cancel safety
    ///
    /// Dropping it gives the permit back, or the place in line.
    #[must_use = "futures do nothing unless polled"]
    pub struct ResponseFuture<S, Req>
    where
        S: Service<Req>,
    {
        #[pin]
        state: State<S, Req, S::Future>,
        // After the state: the call is gone before its permit is.
        permit: Option<Permit>,
    }
}

pin_project! {
    #[project = StateProj]
    enum State<S, Req, F> {
        /// In line for a permit, with the inner service that was ready.
        Waiting { acquire: Option<Acquire>, ready: S, req: Option<Req> },
        /// In flight.
        Calling { #[pin] future: F },
        /// Over.
        Done,
    }
}

// === impl ConcurrencyLimitLayer ===

impl ConcurrencyLimitLayer {
    /// At most `limit` calls in flight, over all services this layer or its clones make.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`] if the limit is zero.
    pub fn new(limit: usize) -> Result<Self, InvalidConfig> {
        Concurrency::new(limit).map(Self::with_limit)
    }

    /// The same limit as other layers have.
    #[must_use]
    pub const fn with_limit(limit: Concurrency) -> Self {
        Self { limit }
    }

    /// The limit, to watch or change it.
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
    /// At most `limit` at once.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`] if the limit is zero.
    pub fn new(limit: usize) -> Result<Self, InvalidConfig> {
        Ok(Self {
            permits: Semaphore::new(InvalidConfig::positive("concurrency_limit", limit)?),
        })
    }

    /// The limit.
    #[must_use]
    pub fn get(&self) -> usize {
        self.permits.total()
    }

    /// How many permits are held now. Above the limit for a while after the limit was lowered.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.permits.held()
    }

    /// Changes the limit, at once also for those who wait. Calls in flight go on.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`] if the limit is zero; nothing is changed then.
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
        // Only waits for its acquire: a permit held here would be lost to the others if no call followed.
        let _ = ready!(self.acquire.poll_ready(cx));
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, req: Req) -> Self::Future {
        // The inner service that was made ready goes along; a fresh clone stays here. So does the place in line.
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
                    // Permits are never closed.
                    *this.permit = ready!(Acquire::poll_acquire(acquire, cx)).ok();
                    let req = req.take().expect("a future is not polled after it was ready");
                    let future = ready.call(req);
                    this.state.set(State::Calling { future });
                }
                StateProj::Calling { future } => {
                    let result = ready!(future.poll(cx));
                    this.state.set(State::Done);
                    *this.permit = None;
                    return Poll::Ready(result);
                }
                StateProj::Done => panic!("a future is not polled after it was ready"),
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
