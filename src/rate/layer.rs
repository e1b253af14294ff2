//! [`RateLimitLayer`]: computes the cost of a call, waits until the rate limiter admits the call, makes it, and
//! corrects the charge when the true cost is available.

use super::{
    admission::Admission, cost::Cost, estimate::Estimate, granted, kind::CallKind, limit_wait::LimitWait,
    limiter::RateLimiter,
};
use crate::{
    clock, coop,
    error::{AcquireError, BoxError},
    event,
    on_turn::OnTurn,
    semaphore::granted::InFlight,
    tokens::{ApiTokens, ApiTokensUsed, TokenUsage},
};
use pin_project_lite::pin_project;
use std::{
    fmt,
    future::Future,
    panic::{RefUnwindSafe, UnwindSafe},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};
use tower_layer::Layer;
use tower_service::Service;

/// A layer that makes each call of a service wait until a rate [`RateLimiter`] admits it. See the [module
/// docs](crate::rate).
#[derive(Clone, Debug)]
pub struct RateLimitLayer<C = ByExtension, U = AsCharged> {
    limiter: RateLimiter,
    cost: C,
    used: U,
}

/// A service whose calls wait until a rate [`RateLimiter`] admits them. See the [module docs](crate::rate).
///
/// `poll_ready` is always ready: it asks neither the limiter, whose charge depends on the request, nor the inner service.
/// The call's future waits for its turn, then asks the inner service to be ready, and is then charged and calls the
/// inner service at once. So a call that waits for the limiter holds nothing of the inner service, and the inner
/// service's error from `poll_ready` is the result of the call. While the inner service is not ready, nothing is charged
/// and no other call waits for this one longer than 5 ms. If the turn is lost by then, the call gives the readiness
/// back, that is, it continues with a clone of the inner service, and waits again.
///
/// Place a [`ConcurrencyLimitLayer`](crate::ConcurrencyLimitLayer) above this layer: below it, calls whose rates are
/// available wait for a permit, and hold up those behind them.
///
/// A limiter that several processes share charges a call first and asks the inner service afterwards: asking the store
/// twice would take twice as long.
#[derive(Clone, Debug)]
pub struct RateLimit<S, C = ByExtension, U = AsCharged> {
    inner: S,
    limiter: RateLimiter,
    cost: C,
    used: U,
}

/// Computes what a request is charged by a rate limiter: an amount of each budget.
///
/// Every `Fn(&Req) -> Cost` implements this trait. A [`RateLimitLayer`] uses [`ByExtension`] by default.
pub trait RequestCost<Req> {
    /// Returns the cost of `req`.
    fn cost(&self, req: &Req) -> Cost;

    /// Returns which other calls `req` is like, for a [`UsedCost`] that learns from each kind apart. Default: `None`.
    fn kind(&self, _req: &Req) -> Option<CallKind> {
        None
    }

    /// Reads once what [`cost`](Self::cost) and [`kind`](Self::kind) need, and keeps it in the request, for callers that
    /// ask several times. Returns whether it did. Default: does nothing, and returns `false`.
    ///
    /// An executor asks for the cost when a call is submitted, and again when the call is charged. The cost of a request
    /// that is not prepared is computed when it is submitted, and kept. That of a prepared one is computed anew, by what
    /// was learned in the meantime.
    fn prepare(&self, _req: &mut Req) -> bool {
        false
    }
}

/// A [`RequestCost`] for http requests: the cost is the request's extension [`Cost`], or else that of its extension
/// [`ApiTokens`], or else one request.
///
/// Which of the tokens of an `ApiTokens` are of the prompt and which of the answer is not known, so limits of input tokens
/// and of output tokens are each charged all of them. A `Cost` tells them apart.
#[derive(Clone, Copy, Debug, Default)]
pub struct ByExtension;

/// Determines what a call really cost, after the call has ended: see [`RateLimitLayer::settle`].
///
/// [`ByUsage`] implements this trait for http responses. For other responses, use a closure: every `Fn(Cost,
/// Result<&Res, &BoxError>) -> Option<Cost>` implements it.
pub trait UsedCost<Res> {
    /// Whether charges are estimates that are corrected after the call. If `false`, [`used`](Self::used) is not called,
    /// and charges are final.
    const SETTLES: bool = true;

    /// Returns the true cost of a call that was charged `charged`. `None` leaves the charge unchanged: it is right, or
    /// the true cost is not available.
    ///
    /// This method is not called for a call whose future is dropped before the call has ended. That call stays charged.
    fn used(&self, charged: Cost, result: Result<&Res, &BoxError>) -> Option<Cost>;

    /// Does what [`used`](Self::used) does, for a call of which its [`RequestCost`] tells the kind. This is the method
    /// that a [`RateLimit`] calls. Default: calls `used`.
    fn used_by_kind(&self, _kind: Option<CallKind>, charged: Cost, result: Result<&Res, &BoxError>) -> Option<Cost> {
        self.used(charged, result)
    }
}

/// A [`UsedCost`] that corrects no charge: every charge is final. A [`RateLimitLayer`] uses it by default.
#[derive(Clone, Copy, Debug, Default)]
pub struct AsCharged;

/// A [`UsedCost`] for http responses: the tokens that a call has used are the numbers in the response's extension
/// [`ApiTokensUsed`].
///
/// The total settles the budget of tokens; the numbers of input and output tokens settle theirs. A number that is not
/// known leaves its budget as it was charged, and so do requests and all other budgets, unless they are
/// [priced](Self::price).
///
/// A call whose response has no [`ApiTokensUsed`], or one without a number, stays charged. So does a call that failed:
/// OpenAI and Azure document that they count failed calls, too. Only a call whose request was [never
/// sent](Self::unless_sent) costs nothing.
#[derive(Clone)]
pub struct ByUsage {
    never_sent: fn(&BoxError) -> bool,
    price: Option<Price>,
}

type Price = Arc<dyn Fn(TokenUsage, Cost) -> Cost + Send + Sync>;

pin_project! {
    /// The response future of [`RateLimit`]: waits until the limiter admits the call and the inner service is ready, then
    /// makes the inner call.
    ///
    /// # Errors
    ///
    /// - [`CostExceedsBurst`](crate::error::CostExceedsBurst) if the call costs more than the burst of a rate.
    /// - [`StoreUnavailable`](crate::error::StoreUnavailable) if several processes share the limits and their Redis
    ///   store is unavailable.
    /// - The inner service's error, from `poll_ready` or from the call. An error from `poll_ready` is charged nothing
    ///   by a local limiter, and stays charged by a shared one.
    ///
    /// # Panics
    ///
    /// With a local limiter, the future panics when it has to wait outside a Tokio runtime with its timer enabled. With
    /// a shared limiter, it panics outside a Tokio runtime with its timer and its I/O enabled. It may panic when polled
    /// after it has completed.
    ///
    /// # Cancel safety
    ///
    /// A future that is dropped before the inner call is charged nothing, and the next waiter moves up. (A shared limiter
    /// charges a call before the inner service is ready: the call stays charged then.) A future that is dropped during
    /// the inner call stays charged. The future enters the limiter's queue at its first
    /// poll.
    #[must_use = "futures do nothing unless polled"]
    pub struct ResponseFuture<S, Req, U = AsCharged>
    where
        S: Service<Req>,
    {
        #[pin]
        state: State<S, Req, S::Future>,
        used: U,
        kind: Option<CallKind>,
    }
}

pin_project! {
    #[project = StateProj]
    enum State<S, Req, F> {
        /// The call waits for the limiter and for the inner service to be ready.
        Waiting {
            admission: Admission,
            inner: OnTurn<S>,
            req: Option<Req>,
            // Whether the call has consumed its unit of cooperative budget.
            is_counted: bool,
            wait: LimitWait,
        },
        /// The call is admitted and charged, and the inner call runs. `estimate` is present if the charge is to be
        /// corrected when the call has ended.
        // `in_flight` is declared last, and the fields of a variant are dropped in this order: the inner call ends before it
        // does not count as in flight any more.
        Calling { #[pin] future: F, estimate: Option<Estimate>, in_flight: Option<InFlight> },
        /// The call has failed before it was made.
        Failed,
    }
}

// === impl RateLimitLayer ===

impl RateLimitLayer {
    /// Creates a rate limit for http requests. Each of them costs one request and the tokens of its extension
    /// [`ApiTokens`].
    ///
    /// `limiter` is a [`RateLimiter`](crate::RateLimiter), or a limiter that several processes share: see [`RateLimiter`].
    /// Clones of a limiter share its buckets, so one limiter can serve several stacks.
    #[must_use]
    pub fn new(limiter: RateLimiter) -> Self {
        Self::with_cost(limiter, ByExtension)
    }
}

impl<C> RateLimitLayer<C> {
    /// Creates a rate limit for requests of any type. `cost` computes what each of them costs.
    ///
    /// ```
    /// # use tower_outbound::{Cost, Limits, Rate, RateLimitLayer, RateLimiter};
    /// let limiter = RateLimiter::new(Limits::new().requests(Rate::per_second(5)))?;
    /// let layer = RateLimitLayer::with_cost(limiter, |prompt: &String| Cost::tokens(prompt.len() as u64 / 4));
    /// # Ok::<_, tower_outbound::error::InvalidConfig>(())
    /// ```
    #[must_use]
    pub fn with_cost(limiter: RateLimiter, cost: C) -> Self {
        Self {
            limiter,
            cost,
            used: AsCharged,
        }
    }
}

impl<C, U> RateLimitLayer<C, U> {
    /// Treats every charge as an estimate: when a call has ended, `used` determines what the call really cost, and the
    /// difference is refunded or debited at once, as by [`RateLimiter::settle`](crate::RateLimiter::settle). Default:
    /// charges are final.
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

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    #[inline]
    fn call(&mut self, mut req: Req) -> Self::Future {
        self.cost.prepare(&mut req);
        let cost = self.cost.cost(&req);
        let kind = if U::SETTLES { self.cost.kind(&req) } else { None };
        let admission = if granted::is_any() {
            Admission::of_granted(&self.limiter, cost, U::SETTLES)
        } else {
            self.limiter.admission(cost, U::SETTLES)
        };
        ResponseFuture {
            state: State::Waiting {
                admission,
                inner: OnTurn::new(self.inner.clone()),
                req: Some(req),
                is_counted: false,
                wait: LimitWait::default(),
            },
            used: self.used.clone(),
            kind,
        }
    }
}

// === impl RequestCost ===

impl<B> RequestCost<http::Request<B>> for ByExtension {
    fn cost(&self, req: &http::Request<B>) -> Cost {
        let extensions = req.extensions();
        let tokens = || extensions.get::<ApiTokens>().map(|tokens| Cost::from(*tokens));
        let declared = extensions.get::<Cost>().copied().or_else(tokens);
        declared.unwrap_or_else(Cost::request)
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
    /// Refunds the whole cost, the request and its tokens, of a call whose error makes `never_sent` return `true`
    /// because its request never reached the provider. Default: a failed call is not refunded.
    #[must_use]
    pub fn unless_sent(mut self, never_sent: fn(&BoxError) -> bool) -> Self {
        self.never_sent = never_sent;
        self
    }

    /// Computes the true cost of a call with `price`, which gets what the call has used, and the cost that is settled
    /// without it. The cost that it returns is settled. Default: the latter cost.
    ///
    /// So a budget of any name can be reserved as it is expected, and settled as it was used. It is not called for a call
    /// that failed or whose usage is not known: such a call stays charged.
    ///
    /// ```
    /// use tower_outbound::rate::ByUsage;
    ///
    /// // Millionths of a dollar: 3 for a token of the prompt, and 15 for one of the answer.
    /// let settlement = ByUsage::default().price(|used, cost| {
    ///     let dollars = 3 * used.input.unwrap_or(0) + 15 * used.output.unwrap_or(0);
    ///     cost.with("microdollars", dollars)
    /// });
    /// ```
    #[must_use]
    pub fn price(mut self, price: impl Fn(TokenUsage, Cost) -> Cost + Send + Sync + 'static) -> Self {
        self.price = Some(Arc::new(price));
        self
    }
}

impl Default for ByUsage {
    fn default() -> Self {
        Self {
            never_sent: |_| false,
            price: None,
        }
    }
}

/// The function of [`ByUsage::price`] is only called, never changed. The compiler does not see through the trait object.
impl UnwindSafe for ByUsage {}
impl RefUnwindSafe for ByUsage {}

impl fmt::Debug for ByUsage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ByUsage")
            .field("is_priced", &self.price.is_some())
            .finish_non_exhaustive()
    }
}

impl<R> UsedCost<http::Response<R>> for ByUsage {
    fn used(&self, charged: Cost, result: Result<&http::Response<R>, &BoxError>) -> Option<Cost> {
        match result {
            Ok(response) => {
                let used = response.extensions().get::<ApiTokensUsed>()?.usage()?;
                let cost = Cost {
                    tokens: used.counted().unwrap_or(charged.tokens),
                    input_tokens: used.input.unwrap_or(charged.input_tokens),
                    output_tokens: used.output.unwrap_or(charged.output_tokens),
                    ..charged
                };
                Some(match &self.price {
                    Some(price) => price(used, cost),
                    None => cost,
                })
            }
            Err(error) => (self.never_sent)(error).then(Cost::none),
        }
    }
}

// === impl ResponseFuture ===

/// Waits until it is the turn of the call and `inner` is ready, and charges the call.
fn poll_charged<S, Req>(
    admission: &mut Admission,
    inner: &mut OnTurn<S>,
    wait: &mut LimitWait,
    cx: &mut Context<'_>,
) -> Poll<Result<(), BoxError>>
where
    S: Service<Req> + Clone,
    S::Error: Into<BoxError>,
{
    loop {
        let now = clock::now();
        match admission.poll_turn(now, cx) {
            Poll::Ready(turn) => turn.map_err(AcquireError::into_reason)?,
            Poll::Pending => {
                wait.wait_for_limit(admission);
                inner.give_back();
                return Poll::Pending;
            }
        }
        match inner.poll_ready(cx) {
            Poll::Ready(ready) => ready.map_err(Into::into)?,
            Poll::Pending => {
                wait.wait_for_service(admission);
                return Poll::Pending;
            }
        }
        // If another call was charged in the meantime, the loop waits again.
        if admission.try_charge(now).map_err(AcquireError::into_reason)? {
            return Poll::Ready(Ok(()));
        }
    }
}

impl<S, Req, U> Future for ResponseFuture<S, Req, U>
where
    S: Service<Req> + Clone,
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
                    inner,
                    req,
                    is_counted,
                    wait,
                } => {
                    if !*is_counted {
                        ready!(coop::poll_unit(cx));
                        *is_counted = true;
                    }
                    let charged = ready!(poll_charged(admission, inner, wait, cx));
                    wait.end(admission);
                    if let Err(error) = charged {
                        this.state.set(State::Failed);
                        return Poll::Ready(Err(error));
                    }
                    event::charged(|| admission.charged());
                    let in_flight = admission.take_in_flight();
                    let estimate = if U::SETTLES {
                        admission.estimate()
                    } else {
                        admission.end_unsettled();
                        None
                    };
                    let req = req.take().expect("the request is there until it is called");
                    let future = inner.call(req);
                    this.state.set(State::Calling {
                        future,
                        estimate,
                        in_flight,
                    });
                }
                StateProj::Failed => panic!("`ResponseFuture` polled after completion"),
                StateProj::Calling { future, estimate, .. } => {
                    if !U::SETTLES {
                        return future.poll(cx).map_err(Into::into);
                    }
                    let result = ready!(future.poll(cx)).map_err(Into::into);
                    if let Some(estimate) = estimate.take() {
                        if let Some(used) = this.used.used_by_kind(*this.kind, estimate.cost(), result.as_ref()) {
                            event::settled(&estimate.cost(), &used);
                            estimate.settle(used);
                        }
                    }
                    return Poll::Ready(result);
                }
            }
        }
    }
}

impl<S: Service<Req>, Req, U> fmt::Debug for ResponseFuture<S, Req, U> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("rate::ResponseFuture").finish_non_exhaustive()
    }
}
