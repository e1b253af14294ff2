//! [`FeedbackLayer`]: what a provider says of its limits is made known to ours.

use super::{Provider, RateLimitInfo, Unit, adapt::Adaptation};
use crate::rate::{Budget, Limiter};
use http::{HeaderMap, Request, Response, StatusCode};
use pin_project_lite::pin_project;
use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::{Duration, SystemTime},
};
use tokio::time::Instant;
use tower_layer::Layer;
use tower_service::Service;

/// Around the client: listens to what a [`Provider`] says of its limits, and tells the [`Limiter`] that paces the
/// calls.
///
/// - A 429, 503 or 529 that says when to come back pauses *everybody* who uses the limiter until then. A pause is only
///   ever extended; one that is longer than [`max_pause`](Self::max_pause) is that long.
/// - What is left of a limit lowers what is in our bucket, and never raises it.
/// - If it is asked to [adopt](Self::adopt_limits) them, the provider's limits become ours.
/// - If it is asked to [adapt](Self::adapt), limits that nobody tells are found by their 429s.
///
/// Only requests and tokens as a whole are looked at; the limits are known by their [period](crate::rate::RateLimiter::lower).
///
/// ```
/// use tower::{Layer, service_fn};
/// use tower_outbound::{Executor, Limits, Rate, RateLimiter, provider::{FeedbackLayer, Provider}};
/// # let client = service_fn(async |_: http::Request<String>| Ok::<_, tower::BoxError>(http::Response::new(())));
///
/// let limiter = RateLimiter::new(Limits::new().requests(Rate::per_minute(500)).tokens(Rate::per_minute(30_000)))?;
/// let client = FeedbackLayer::new(limiter.clone(), Provider::OpenAi).adopt_limits().layer(client);
/// let executor = Executor::builder().limiter(limiter).build(client)?;
/// # Ok::<_, tower_outbound::error::InvalidConfig>(())
/// ```
#[derive(Clone)]
pub struct FeedbackLayer {
    limiter: Limiter,
    provider: Provider,
    adopts: bool,
    adapts: Option<Arc<Adaptation>>,
    max_pause: Duration,
}

/// A client whose provider is listened to. See [`FeedbackLayer`].
#[derive(Clone, Debug)]
pub struct Feedback<S> {
    inner: S,
    layer: FeedbackLayer,
}

pin_project! {
    /// A call whose response is listened to.
    ///
    /// # Cancel safety
    ///
    /// Dropping it drops the call.
    #[must_use = "futures do nothing unless polled"]
    pub struct ResponseFuture<F> {
        #[pin]
        future: F,
        layer: FeedbackLayer,
        // If that is of interest.
        begun: Option<Instant>,
    }
}

// === impl FeedbackLayer ===

impl FeedbackLayer {
    /// Tells `limiter` what `provider` says.
    #[must_use]
    pub fn new(limiter: impl Into<Limiter>, provider: Provider) -> Self {
        Self {
            limiter: limiter.into(),
            provider,
            adopts: false,
            adapts: None,
            max_pause: Duration::from_secs(60 * 60),
        }
    }

    /// The provider's limits become the limiter's as soon as they are known. Bursts stay, as far as the limits allow.
    /// Default: what was configured holds.
    #[must_use]
    pub fn adopt_limits(mut self) -> Self {
        self.adopts = true;
        self
    }

    /// Each 429 lowers all rates by a tenth, and each second without one raises them again by a hundredth, up to what was
    /// configured: for providers that do not tell their limits, or share them among many. Default: they stay.
    #[must_use]
    pub fn adapt(mut self) -> Self {
        self.adapts = Some(Arc::new(Adaptation::new(&self.limiter)));
        self
    }

    /// The longest pause that one response can cause. Default: an hour.
    #[must_use]
    pub fn max_pause(mut self, pause: Duration) -> Self {
        self.max_pause = pause;
        self
    }

    fn observe(&self, status: StatusCode, headers: &HeaderMap, begun: Option<Instant>) {
        if let (Some(adapts), Some(begun)) = (&self.adapts, begun) {
            match status {
                StatusCode::TOO_MANY_REQUESTS => adapts.too_much(&self.limiter, begun),
                _ if status.is_success() => adapts.went_well(&self.limiter),
                _ => {}
            }
        }
        let info = self.provider.rate_limit_info(headers, SystemTime::now());
        if is_too_much(self.provider, status, &info) {
            if let Some(delay) = info.retry_after {
                self.limiter.pause_for(delay.min(self.max_pause));
            }
        }
        for window in info.windows {
            let budget = match window.unit {
                Unit::Requests => Budget::Requests,
                Unit::Tokens => Budget::Tokens,
                Unit::InputTokens | Unit::OutputTokens => continue,
            };
            if let Some(limit) = window.limit.filter(|limit| self.adopts && *limit > 0) {
                // Fails for a limit that could not be counted: then ours holds.
                let adopted = self.limiter.adopt(budget, window.period, limit);
                if let Ok(true) = adopted {
                    tracing::info!(target: "tower_outbound", ?budget, limit, "adopted the provider's limit");
                }
            }
            if let Some(remaining) = window.remaining {
                self.limiter.lower(budget, window.period, remaining);
            }
        }
    }
}

/// Whether a response says that there was too much, or that the provider is overloaded.
fn is_too_much(provider: Provider, status: StatusCode, info: &RateLimitInfo) -> bool {
    let is_exhausted = || info.windows.iter().any(|window| window.remaining == Some(0));
    match status.as_u16() {
        429 | 503 | 529 => true,
        // GitHub says so when a limit is reached.
        403 => provider == Provider::GitHub && (is_exhausted() || info.retry_after.is_some()),
        _ => false,
    }
}

impl fmt::Debug for FeedbackLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FeedbackLayer")
            .field("provider", &self.provider)
            .field("adopts", &self.adopts)
            .field("adapts", &self.adapts.is_some())
            .field("max_pause", &self.max_pause)
            .finish_non_exhaustive()
    }
}

impl<S> Layer<S> for FeedbackLayer {
    type Service = Feedback<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Feedback {
            inner,
            layer: self.clone(),
        }
    }
}

// === impl Feedback ===

impl<S, B, R> Service<Request<B>> for Feedback<S>
where
    S: Service<Request<B>, Response = Response<R>>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = ResponseFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, req: Request<B>) -> Self::Future {
        ResponseFuture {
            begun: self.layer.adapts.is_some().then(Instant::now),
            future: self.inner.call(req),
            layer: self.layer.clone(),
        }
    }
}

// === impl ResponseFuture ===

impl<F, R, E> Future for ResponseFuture<F>
where
    F: Future<Output = Result<Response<R>, E>>,
{
    type Output = Result<Response<R>, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let response = ready!(this.future.poll(cx))?;
        this.layer.observe(response.status(), response.headers(), *this.begun);
        Poll::Ready(Ok(response))
    }
}

impl<F> fmt::Debug for ResponseFuture<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("feedback::ResponseFuture").finish_non_exhaustive()
    }
}
