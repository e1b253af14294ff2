//! [`FeedbackLayer`]: applies the rate-limit headers of a provider to a limiter.

use super::{
    adapt::{Adaptation, Rejection},
    dialect::Provider,
    info::{RateLimitInfo, Unit},
};
use crate::rate::{Budget, RateLimiter};
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

/// Reads the rate-limit headers of each response in the dialect of a [`Provider`], and applies them to the [`RateLimiter`]
/// that paces the calls. The layer is placed around the client, below the limits in the stack.
///
/// The headers are applied as follows:
/// - A 429, 503 or 529 with a [delay](RateLimitInfo::retry_after) pauses the limiter for *all* its users. So does a 403
///   of GitHub that reports an exceeded limit. The layer only extends its pause. The pause is at most
///   [`max_pause`](Self::max_pause) long, and can be ended by [`RateLimiter::resume`].
/// - If the provider reports that less of a limit remains than the bucket of the limiter holds, the bucket is lowered
///   to the remaining amount. The bucket is never raised. What remained is as of when the provider received the
///   request, so what the rate has added and what was charged since the call was sent is taken into account.
/// - With [`adopt_limits`](Self::adopt_limits), the limits that the provider reports replace those of the limiter.
///   Default: they do not.
/// - With [`adapt`](Self::adapt), limits that no header reports are found from the provider's 429s. Default: they are
///   not.
///
/// Reported limits of requests and of tokens are applied. Separate limits of input tokens and of output tokens are
/// ignored. A limit of the provider applies to the rate of the limiter that has the same budget (requests or tokens)
/// and the same period: see [`RateLimiter::lower`](crate::rate::RateLimiter::lower).
///
/// The layer passes responses and errors on unchanged.
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
    limiter: RateLimiter,
    provider: Provider,
    adopts: bool,
    adapts: Option<Arc<Adaptation>>,
    max_pause: Duration,
}

/// The service of [`FeedbackLayer`].
#[derive(Clone, Debug)]
pub struct Feedback<S> {
    inner: S,
    layer: FeedbackLayer,
}

pin_project! {
    /// The future of [`Feedback`]: makes the call, and applies the headers of its response to the limiter.
    ///
    /// # Panics
    ///
    /// May panic when polled after it has completed.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future ends the call.
    #[must_use = "futures do nothing unless polled"]
    pub struct ResponseFuture<F> {
        #[pin]
        future: F,
        layer: FeedbackLayer,
        // When the call was sent.
        sent: Instant,
    }
}

// === impl FeedbackLayer ===

impl FeedbackLayer {
    /// Creates a layer that applies the headers of `provider` to `limiter`, and so to all clones of the limiter.
    #[must_use]
    pub fn new(limiter: RateLimiter, provider: Provider) -> Self {
        Self {
            limiter,
            provider,
            adopts: false,
            adapts: None,
            max_pause: Duration::from_secs(60 * 60),
        }
    }

    /// Replaces the amounts of the limiter's rates by the limits that the provider reports, as soon as a response has
    /// them. A burst above the new amount is lowered to that amount. Default: the configured limits stay.
    #[must_use]
    pub fn adopt_limits(mut self) -> Self {
        self.adopts = true;
        self
    }

    /// Adapts the rates of the limiter to the provider's rejections (429, 503, 529, and GitHub's 403 for an exceeded
    /// limit), for providers that do not report their limits or share them among many accounts. Default: the configured
    /// limits stay.
    ///
    /// Many rejections with the same cause are one signal. The first one lowers the rates by a tenth, and empties the
    /// limiter's buckets. Those of calls that were sent before that change nothing. If calls are still rejected after the
    /// lowering, the rates are set, once a second, to the share that the provider has accepted. So limits that are far
    /// too high are found within a second or two. When no call is rejected any more, the rates rise: within seconds to
    /// what the provider has last allowed, then slowly beyond it, and after that faster and faster, up to the configured
    /// amounts (the curve of CUBIC, [RFC 9438](https://www.rfc-editor.org/rfc/rfc9438)). The rates are never above
    /// the configured amounts, and never below a hundredth of them. A burst that was [set](crate::Rate::burst) stays, so
    /// that a call that needs it waits and does not fail. A log entry of tracing tells each change, and
    /// [`RateLimiter::limits`] shows the rates in force.
    ///
    /// A 503 or 529 may also come from a server that fails now and then. These count only while they are
    /// many: four within five seconds, beyond 6 % of the answers.
    ///
    /// Rates with a period above a minute are quotas, and stay as they are, unless the limiter has no other rates. If
    /// user code [sets](RateLimiter::set_limits) other limits on the limiter, these become the configured ones, and the
    /// adaptation starts again from them.
    #[must_use]
    pub fn adapt(mut self) -> Self {
        self.adapts = Some(Arc::new(Adaptation::new(&self.limiter)));
        self
    }

    /// Sets the longest pause that one response can cause, so that a wrong header cannot stop all calls for days. A
    /// longer delay is cut, with a warning in the log. Default: one hour. If the delay was right, such as that of a
    /// daily limit, the next call gets another 429, and with it another pause.
    #[must_use]
    pub fn max_pause(mut self, pause: Duration) -> Self {
        self.max_pause = pause;
        self
    }

    /// Applies the status and the headers of one response to the limiter. `sent` is when the call was sent.
    fn observe(&self, status: StatusCode, headers: &HeaderMap, sent: Instant) {
        let info = self.provider.rate_limit_info(headers, SystemTime::now());
        let is_throttled = is_throttled(self.provider, status, &info);
        if let Some(adaptation) = &self.adapts {
            if is_throttled {
                let rejection = match status.as_u16() {
                    503 | 529 => Rejection::Doubtful,
                    _ if info.retry_after.is_some_and(|delay| !delay.is_zero()) => Rejection::Pausing,
                    _ => Rejection::Certain,
                };
                adaptation.on_throttled(&self.limiter, sent, rejection);
            } else if status.is_success() {
                adaptation.on_success(&self.limiter, sent);
            }
        }
        if is_throttled {
            if let Some(delay) = info.retry_after {
                if delay > self.max_pause {
                    tracing::warn!(
                        target: "tower_outbound",
                        ?delay,
                        max_pause = ?self.max_pause,
                        "The provider asks for a longer pause than is allowed: the pause is cut"
                    );
                }
                self.limiter.pause_for_provider(delay.min(self.max_pause));
            }
        }
        for window in info.windows {
            let budget = match window.unit {
                Unit::Requests => Budget::Requests,
                Unit::Tokens => Budget::Tokens,
                Unit::InputTokens | Unit::OutputTokens => continue,
            };
            if let Some(limit) = window.limit.filter(|limit| self.adopts && *limit > 0) {
                // Adopting the provider's limit fails for an amount that the limiter cannot represent. The limiter then
                // keeps its amount.
                let adopted = self.limiter.adopt(budget, window.period, limit);
                if let Ok(true) = adopted {
                    tracing::info!(target: "tower_outbound", ?budget, limit, "Adopted the provider's limit");
                }
            }
            if let Some(remaining) = window.remaining {
                self.limiter.lower_since(budget, window.period, remaining, sent);
            }
        }
    }
}

/// Returns whether a response reports that a limit was exceeded, or that the provider is overloaded (503, or
/// Anthropic's 529).
fn is_throttled(provider: Provider, status: StatusCode, info: &RateLimitInfo) -> bool {
    match status.as_u16() {
        429 | 503 | 529 => true,
        // GitHub sends a 403 for an exceeded limit as well as for a missing permission. Only a 403 whose headers report
        // an exceeded limit may pause the limiter.
        403 => provider == Provider::GitHub && info.is_limited(),
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
        self.layer.limiter.mark_sent();
        let sent = Instant::now();
        if let Some(adaptation) = &self.layer.adapts {
            adaptation.on_sent(&self.layer.limiter, sent);
        }
        ResponseFuture {
            sent,
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
        this.layer.observe(response.status(), response.headers(), *this.sent);
        Poll::Ready(Ok(response))
    }
}

impl<F> fmt::Debug for ResponseFuture<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("provider::feedback::ResponseFuture")
            .finish_non_exhaustive()
    }
}
