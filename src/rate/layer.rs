//! [`RateLimitLayer`]: what does this call cost, wait for it, call.

use super::{
    limiter::{Admission, RateLimiter},
    rate::Cost,
};
use crate::{clock, error::BoxError, tokens::ApiTokens};
use pin_project_lite::pin_project;
use std::{
    future::Future,
    mem,
    pin::Pin,
    task::{Context, Poll, ready},
};
use tower_layer::Layer;
use tower_service::Service;

/// Paces calls by a [`RateLimiter`]. See the [module docs](crate::rate).
#[derive(Clone, Debug)]
pub struct RateLimitLayer<C = ByExtension> {
    limiter: RateLimiter,
    cost: C,
}

/// A service whose calls wait for a [`RateLimiter`]. See the [module docs](crate::rate).
#[derive(Clone, Debug)]
pub struct RateLimit<S, C = ByExtension> {
    inner: S,
    limiter: RateLimiter,
    cost: C,
}

/// What a request costs.
///
/// Any `Fn(&Req) -> Cost` will do; [`ByExtension`] is the default.
pub trait RequestCost<Req> {
    /// The cost of one request.
    fn cost(&self, req: &Req) -> Cost;
}

/// One request, and as many tokens as the request's extension [`ApiTokens`] says, or none.
#[derive(Clone, Copy, Debug, Default)]
pub struct ByExtension;

pin_project! {
    /// The call: first it waits for its tokens, then it is the inner call.
    ///
    /// # Cancel safety
    ///
    /// Dropped while it waits, it has taken nothing and the next in line moves up. Never polled, it is not in line.
    #[must_use = "futures do nothing unless polled"]
    pub struct ResponseFuture<S, Req>
    where
        S: Service<Req>,
    {
        #[pin]
        state: State<S, Req, S::Future>,
    }
}

pin_project! {
    #[project = StateProj]
    enum State<S, Req, F> {
        /// In the limiter's line, with the inner service that was ready.
        Waiting { admission: Admission, cost: Cost, ready: S, req: Option<Req> },
        /// Admitted.
        Calling { #[pin] future: F },
    }
}

// === impl RateLimitLayer ===

impl RateLimitLayer {
    /// Paces http requests: each costs one request and as many tokens as its extension [`ApiTokens`] says.
    ///
    /// Clones of the limiter share their limits, so one limiter can serve many stacks.
    #[must_use]
    pub const fn new(limiter: RateLimiter) -> Self {
        Self {
            limiter,
            cost: ByExtension,
        }
    }
}

impl<C> RateLimitLayer<C> {
    /// Paces requests of any type: `cost` tells what each of them costs.
    ///
    /// ```
    /// # use tower_outbound::{Cost, Limits, Rate, RateLimitLayer, RateLimiter};
    /// let limiter = RateLimiter::new(Limits::new().requests(Rate::per_second(5)))?;
    /// let layer = RateLimitLayer::with_cost(limiter, |prompt: &String| Cost::tokens(prompt.len() as u64 / 4));
    /// # Ok::<_, tower_outbound::error::InvalidConfig>(())
    /// ```
    #[must_use]
    pub const fn with_cost(limiter: RateLimiter, cost: C) -> Self {
        Self { limiter, cost }
    }
}

impl<S, C: Clone> Layer<S> for RateLimitLayer<C> {
    type Service = RateLimit<S, C>;

    fn layer(&self, inner: S) -> Self::Service {
        RateLimit {
            inner,
            limiter: self.limiter.clone(),
            cost: self.cost.clone(),
        }
    }
}

// === impl RateLimit ===

impl<S, C, Req> Service<Req> for RateLimit<S, C>
where
    S: Service<Req> + Clone,
    S::Error: Into<BoxError>,
    C: RequestCost<Req>,
{
    type Response = S::Response;
    type Error = BoxError;
    type Future = ResponseFuture<S, Req>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        // What a call costs is known with the call: the waiting is done in its future.
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, req: Req) -> Self::Future {
        // The inner service that was made ready goes along; a fresh clone stays here.
        let fresh = self.inner.clone();
        let ready = mem::replace(&mut self.inner, fresh);
        let cost = self.cost.cost(&req);
        let admission = self.limiter.admission();
        ResponseFuture {
            state: State::Waiting {
                admission,
                cost,
                ready,
                req: Some(req),
            },
        }
    }
}

// === impl RequestCost ===

impl<B> RequestCost<http::Request<B>> for ByExtension {
    fn cost(&self, req: &http::Request<B>) -> Cost {
        Cost::tokens(req.extensions().get::<ApiTokens>().map_or(0, |tokens| tokens.0))
    }
}

impl<Req, F: Fn(&Req) -> Cost> RequestCost<Req> for F {
    fn cost(&self, req: &Req) -> Cost {
        self(req)
    }
}

// === impl ResponseFuture ===

impl<S, Req> Future for ResponseFuture<S, Req>
where
    S: Service<Req>,
    S::Error: Into<BoxError>,
{
    type Output = Result<S::Response, BoxError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        loop {
            match this.state.as_mut().project() {
                StateProj::Waiting {
                    admission,
                    cost,
                    ready,
                    req,
                } => {
                    if let Err(never) = ready!(admission.poll(*cost, clock::now(), cx)) {
                        return Poll::Ready(Err(never.into()));
                    }
                    let req = req.take().expect("a future is not polled after it was ready");
                    let future = ready.call(req);
                    this.state.set(State::Calling { future });
                }
                StateProj::Calling { future } => return future.poll(cx).map_err(Into::into),
            }
        }
    }
}

impl<S: Service<Req>, Req> std::fmt::Debug for ResponseFuture<S, Req> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("rate::ResponseFuture").finish_non_exhaustive()
    }
}
