//! [`RateLimitLayer`]: what does this call cost, wait for it, call, and settle what it cost in truth.

use super::{
    estimate::Estimate,
    limiter::{Admission, Limiter},
    limits::Cost,
};
use crate::{
    clock,
    error::BoxError,
    tokens::{ApiTokens, ApiTokensUsed},
};
use pin_project_lite::pin_project;
use std::{
    future::Future,
    mem,
    pin::Pin,
    task::{Context, Poll, ready},
};
use tower_layer::Layer;
use tower_service::Service;

/// Paces calls by a [`Limiter`]. See the [module docs](crate::rate).
#[derive(Clone, Debug)]
pub struct RateLimitLayer<C = ByExtension, U = AsCharged> {
    limiter: Limiter,
    cost: C,
    used: U,
}

/// A service whose calls wait for a [`Limiter`]. See the [module docs](crate::rate).
#[derive(Clone, Debug)]
pub struct RateLimit<S, C = ByExtension, U = AsCharged> {
    inner: S,
    limiter: Limiter,
    cost: C,
    used: U,
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

/// What a call cost in truth, told when it is over: see [`RateLimitLayer::settle`].
///
/// [`ByUsage`] is for http; for other types, any `Fn(Cost, Result<&Res, &BoxError>) -> Option<Cost>` will do.
pub trait UsedCost<Res> {
    /// Whether there is anything to settle at all.
    const SETTLES: bool = true;

    /// The true cost of a call that was charged so much; `None`: what was charged.
    ///
    /// It is not asked for calls that are dropped on the wire: they stay charged.
    fn used(&self, charged: Cost, result: Result<&Res, &BoxError>) -> Option<Cost>;
}

/// Nothing is settled: what was charged stands.
#[derive(Clone, Copy, Debug, Default)]
pub struct AsCharged;

/// The tokens that the http response's extension [`ApiTokensUsed`] says.
///
/// Without one, the call stays charged; so does one that failed, because providers count those, too (OpenAI and Azure
/// say so). Only what was [never sent](Self::unless_sent) costs nothing.
#[derive(Clone, Copy, Debug)]
pub struct ByUsage {
    never_sent: fn(&BoxError) -> bool,
}

pin_project! {
    /// The call: first it waits for its tokens, then it is the inner call.
    ///
    /// # Cancel safety
    ///
    /// Dropped while it waits, it has taken nothing and the next in line moves up. Dropped after that, it stays
    /// charged. Never polled, it is not in line.
    #[must_use = "futures do nothing unless polled"]
    pub struct ResponseFuture<S, Req, U = AsCharged>
    where
        S: Service<Req>,
    {
        #[pin]
        state: State<S, Req, S::Future>,
        used: U,
    }
}

pin_project! {
    #[project = StateProj]
    enum State<S, Req, F> {
        /// In the limiter's line, with the inner service that was ready.
        Waiting { admission: Admission, cost: Cost, ready: S, req: Option<Req> },
        /// Admitted, and charged what may be an estimate.
        Calling { #[pin] future: F, estimate: Option<Estimate> },
    }
}

// === impl RateLimitLayer ===

impl RateLimitLayer {
    /// Paces http requests: each costs one request and as many tokens as its extension [`ApiTokens`] says.
    ///
    /// Clones of the limiter share their limits, so one limiter can serve many stacks. It is a
    /// [`RateLimiter`](crate::RateLimiter), or one that many processes share: see [`Limiter`].
    #[must_use]
    pub fn new(limiter: impl Into<Limiter>) -> Self {
        Self::with_cost(limiter, ByExtension)
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
    pub fn with_cost(limiter: impl Into<Limiter>, cost: C) -> Self {
        Self {
            limiter: limiter.into(),
            cost,
            used: AsCharged,
        }
    }
}

impl<C, U> RateLimitLayer<C, U> {
    /// The charge is an estimate: when the call is over, `used` tells what it cost, and the difference is credited or
    /// debited at once, as with [`RateLimiter::settle`](crate::RateLimiter::settle).
    ///
    /// ```
    /// # use tower_outbound::{Limits, Rate, RateLimitLayer, RateLimiter, rate::ByUsage};
    /// let limiter = RateLimiter::new(Limits::new().tokens(Rate::per_minute(30_000)))?;
    /// let layer = RateLimitLayer::new(limiter).settle(ByUsage::default());
    /// # Ok::<_, tower_outbound::error::InvalidConfig>(())
    /// ```
    #[must_use]
    pub fn settle<V>(self, used: V) -> RateLimitLayer<C, V> {
        RateLimitLayer {
            limiter: self.limiter,
            cost: self.cost,
            used,
        }
    }
}

impl<S, C: Clone, U: Clone> Layer<S> for RateLimitLayer<C, U> {
    type Service = RateLimit<S, C, U>;

    fn layer(&self, inner: S) -> Self::Service {
        RateLimit {
            inner,
            limiter: self.limiter.clone(),
            cost: self.cost.clone(),
            used: self.used.clone(),
        }
    }
}

// === impl RateLimit ===

impl<S, C, U, Req> Service<Req> for RateLimit<S, C, U>
where
    S: Service<Req> + Clone,
    S::Error: Into<BoxError>,
    C: RequestCost<Req>,
    U: UsedCost<S::Response> + Clone,
{
    type Response = S::Response;
    type Error = BoxError;
    type Future = ResponseFuture<S, Req, U>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        // What a call costs is known with the call: the waiting is done in its future.
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, req: Req) -> Self::Future {
        // The inner service that was made ready goes along; a fresh clone stays here.
        let fresh = self.inner.clone();
        let ready = mem::replace(&mut self.inner, fresh);
        let cost = self.cost.cost(&req);
        let admission = self.limiter.admission(U::SETTLES);
        ResponseFuture {
            state: State::Waiting {
                admission,
                cost,
                ready,
                req: Some(req),
            },
            used: self.used.clone(),
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

// === impl UsedCost ===

impl<Res> UsedCost<Res> for AsCharged {
    const SETTLES: bool = false;

    fn used(&self, _: Cost, _: Result<&Res, &BoxError>) -> Option<Cost> {
        None
    }
}

impl<Res, F: Fn(Cost, Result<&Res, &BoxError>) -> Option<Cost>> UsedCost<Res> for F {
    fn used(&self, charged: Cost, result: Result<&Res, &BoxError>) -> Option<Cost> {
        self(charged, result)
    }
}

// === impl ByUsage ===

impl ByUsage {
    /// Failures for which this is true were never on the wire, and cost nothing, neither tokens nor a request. Default:
    /// none of them.
    #[must_use]
    pub const fn unless_sent(mut self, never_sent: fn(&BoxError) -> bool) -> Self {
        self.never_sent = never_sent;
        self
    }
}

impl Default for ByUsage {
    fn default() -> Self {
        Self { never_sent: |_| false }
    }
}

impl<R> UsedCost<http::Response<R>> for ByUsage {
    fn used(&self, charged: Cost, result: Result<&http::Response<R>, &BoxError>) -> Option<Cost> {
        match result {
            Ok(response) => {
                let tokens = response.extensions().get::<ApiTokensUsed>()?.get()?;
                Some(Cost { tokens, ..charged })
            }
            Err(error) => (self.never_sent)(error).then(Cost::default),
        }
    }
}

// === impl ResponseFuture ===

impl<S, Req, U> Future for ResponseFuture<S, Req, U>
where
    S: Service<Req>,
    S::Error: Into<BoxError>,
    U: UsedCost<S::Response>,
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
                    if let Err(refused) = ready!(admission.poll(*cost, clock::now(), cx)) {
                        return Poll::Ready(Err(refused.into_reason()));
                    }
                    let estimate = if U::SETTLES { admission.estimate(*cost) } else { None };
                    let req = req.take().expect("a future is not polled after it was ready");
                    let future = ready.call(req);
                    this.state.set(State::Calling { future, estimate });
                }
                StateProj::Calling { future, estimate } => {
                    if !U::SETTLES {
                        return future.poll(cx).map_err(Into::into);
                    }
                    let result = ready!(future.poll(cx)).map_err(Into::into);
                    if let Some(estimate) = estimate.take() {
                        if let Some(used) = this.used.used(estimate.cost(), result.as_ref()) {
                            estimate.settle(used);
                        }
                    }
                    return Poll::Ready(result);
                }
            }
        }
    }
}

impl<S: Service<Req>, Req, U> std::fmt::Debug for ResponseFuture<S, Req, U> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("rate::ResponseFuture").finish_non_exhaustive()
    }
}
