//! [`FeedbackLayer`]: applies the rate-limit headers of a provider to a limiter.

use super::{
    adapt::{Adaptation, Rejection},
    dialect::Provider,
    follow::{Following, InFlight, Learned},
    info::{RateLimitInfo, Reset, Window},
};
use crate::{
    event::{self, LimitReport},
    rate::RateLimiter,
};
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
/// - With [`follow`](Self::follow), the limiter follows the provider's buckets, up as well as down. Default: it does not.
/// - With [`adapt`](Self::adapt), limits that no header reports are found from the provider's 429s. Default: they are
///   not.
///
/// A limit of the provider applies to the rate of the limiter that has the same budget (requests, tokens, input tokens,
/// output tokens) and the same period. If the period of a limit is not reported, it is found from the time until the
/// limit is full, from the amount, or is that of the budget's only rate.
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
    follows: Option<Arc<Following>>,
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
        // `None` if the limiter does not follow the provider, or the call is over.
        in_flight: Option<InFlight>,
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
            follows: None,
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
    /// amounts. A limit that was found twice is tried again only after 200 calls for each rejection of the last try, or
    /// after five minutes (the curve of CUBIC, [RFC 9438](https://www.rfc-editor.org/rfc/rfc9438)). The rates are never above
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

    /// Makes the limiter follow the provider's own buckets: their rates, what they can hold, and what they hold now, up
    /// as well as down. So a short job uses at once what the provider has left, a limit that is changed is followed with
    /// the next response, and clients that share an account take equal shares. Default: buckets are only lowered.
    ///
    /// **The limits of the limiter are the most.** A rate is never above its configured amount, and no window of length T
    /// admits more than the configured `burst + rate x T`, whatever is reported. So state the highest limits that you
    /// may have: `Rate::per_minute(600)` allows 600 requests at once where the provider has as many left, and
    /// `.burst(10)` never more than 10.
    ///
    /// - **Where the provider tells**, in the headers of its responses, the amounts follow the reported limits, down to a
    ///   hundredth of the configured ones. What is left is carried forward from when the provider received the call, and
    ///   each report counts once. The limiter keeps two seconds' amount in reserve, or that of a round trip if it is
    ///   longer, up to five seconds, so that calls on their way are not rejected when a limit falls.
    /// - **Where it tells nothing**, limits are found from its 429s, as with [`adapt`](Self::adapt), and at most a
    ///   second's requests are sent at once. Where it tells, the 429s count only if they are many.
    /// - **Rates by the calendar**, such as [`utc_day`](crate::Rate::utc_day), are lowered to what is left, and never raised
    ///   before their window ends. Their limits follow the reported ones, at most up to the configured ones.
    /// - **At the start**, nothing is known. A rate of at most a minute without an [initial fill](crate::Rate::initial)
    ///   begins with the requests of one second, or if requests are not limited, with a tenth of its burst, and sends no
    ///   more before the first response, for at most two seconds. The first
    ///   response releases half of what is left, and each further round trip half of the rest, as another client of the
    ///   account may begin at the same time. After ten seconds without one, everything is released at once.
    ///
    /// A limit applies to the rate with the same budget and period. Where the period of a limit is not reported (OpenAI's
    /// requests), it is found from how long the limit takes to be full. If two limits apply to one rate, such as those of
    /// an organization and of a project, the lower one does. What was learned is in [`learned`](Self::learned), and a log
    /// entry of tracing tells each change of a limit. If user code [sets](RateLimiter::set_limits) other limits on the
    /// limiter, these become the most.
    ///
    /// A limiter that several processes share in a store follows the limits, and is lowered but not raised. The clones of
    /// a layer follow together; two layers should not follow for one limiter.
    #[must_use]
    pub fn follow(mut self) -> Self {
        let following = Following::new(&self.limiter);
        self.adapts = Some(following.adaptation().clone());
        self.follows = Some(Arc::new(following));
        self
    }

    /// Returns what was learned about the provider's limits, one for each rate of the limiter. Empty without
    /// [`follow`](Self::follow).
    #[must_use]
    pub fn learned(&self) -> Vec<Learned> {
        let following = self.follows.as_ref();
        following.map_or_else(Vec::new, |following| following.learned(&self.limiter))
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
    fn observe(&self, status: StatusCode, headers: &HeaderMap, sent: Instant, in_flight: Option<&InFlight>) {
        let info = self.provider.rate_limit_info(headers, SystemTime::now());
        let is_throttled = is_throttled(self.provider, status, &info);
        if let Some(adaptation) = &self.adapts {
            if is_throttled {
                let is_told = self.follows.as_ref().is_some_and(|following| following.is_told());
                let rejection = match status.as_u16() {
                    503 | 529 => Rejection::Doubtful,
                    // What is left is known from the reports.
                    _ if is_told => Rejection::Doubtful,
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
                let pause = delay.min(self.max_pause);
                if self.limiter.pause_for_provider(pause) {
                    event::limiter_paused(pause);
                }
            }
        }
        if !info.windows.is_empty() && event::is_observed() {
            info.windows.iter().for_each(report);
        }
        if let (Some(following), Some(in_flight)) = (&self.follows, in_flight) {
            following.observe(&self.limiter, &info.windows, in_flight, sent);
            return;
        }
        let limits = self.limiter.limits();
        for window in info.windows {
            let Some((budget, rate)) = window.index_in(&limits).and_then(|index| limits.rates().nth(index)) else {
                continue;
            };
            let period = Some(rate.period());
            if let Some(limit) = window.limit.filter(|limit| self.adopts && *limit > 0) {
                // Adopting the provider's limit fails for an amount that the limiter cannot represent. The limiter then
                // keeps its amount.
                let adopted = self.limiter.adopt(budget, period, limit);
                if let Ok(true) = adopted {
                    tracing::info!(target: "tower_outbound", ?budget, limit, "Adopted the provider's limit");
                }
            }
            if let Some(remaining) = window.remaining {
                self.limiter.lower_since(budget, period, remaining, sent);
            }
        }
    }
}

/// Tells the observers of the current call what the response reports of a limit.
fn report(window: &Window) {
    let reset = window.reset.map(|(Reset::Full(reset) | Reset::More(reset))| reset);
    event::limit_reported(&LimitReport::new(
        (window.unit.budget(), window.period),
        (window.limit, window.remaining),
        reset,
    ));
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
            .field("follows", &self.follows.is_some())
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
        let in_flight = match &self.layer.follows {
            Some(following) => Some(following.on_sent(&self.layer.limiter)),
            None => {
                self.layer.limiter.mark_sent();
                None
            }
        };
        let sent = Instant::now();
        if let Some(adaptation) = &self.layer.adapts {
            adaptation.on_sent(&self.layer.limiter, sent);
        }
        ResponseFuture {
            sent,
            in_flight,
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
        let in_flight = this.in_flight.take();
        this.layer
            .observe(response.status(), response.headers(), *this.sent, in_flight.as_ref());
        Poll::Ready(Ok(response))
    }
}

impl<F> fmt::Debug for ResponseFuture<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("provider::feedback::ResponseFuture")
            .finish_non_exhaustive()
    }
}
