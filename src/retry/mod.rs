//! [`RetryPolicy`]: which calls are retried, and after which delay.
//!
//! A policy for tower's [`RetryLayer`](tower::retry::RetryLayer), made for metered APIs: it reads the provider's
//! headers and error documents, waits as long as the server requests, and notes the reason for each retry in the event
//! of the call. Where it is placed in the stack is shown in [`provider`](crate::provider#order).
//!
//! [`never_sent`] recognizes failures that have cost nothing, because the request did not reach the server.

mod transient;
mod verdict;

pub use transient::never_sent;

use crate::{
    body::{WholeBody, is_delivered},
    error::{BoxError, RetryAfterTooLong},
    event,
    provider::Provider,
};
use fastrand::Rng;
use http::{Request, Response, StatusCode};
use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::{Duration, SystemTime},
};
use tokio::time::{Sleep, sleep};
use tower::retry::{
    Policy,
    budget::{Budget, TpsBudget},
};
use transient::is_transient;
use verdict::{ResponseView, Verdict};

/// Retries calls that failed for a reason that may pass, as a policy of [`tower::retry`].
///
/// It belongs *around the limits*, so that every attempt takes its own permit and pays its own rate:
///
/// ```
/// use tower::{Layer, retry::RetryLayer, service_fn};
/// use tower_outbound::{Executor, provider::Provider, retry::RetryPolicy};
/// # let client = service_fn(async |_: http::Request<String>| Ok::<_, tower::BoxError>(http::Response::new(String::new())));
///
/// let executor = Executor::builder()
///     .layer(RetryLayer::new(RetryPolicy::new().provider(Provider::OpenAi)))
///     .build(client)?;
/// # Ok::<_, tower_outbound::error::InvalidConfig>(())
/// ```
///
/// # Which calls
///
/// - Failed calls whose connection could not be made or was lost, or that timed out; and those that
///   [`retry_errors`](Self::retry_errors) accepts.
/// - Responses with the status 408, 409, 429 or 5xx, and a 403 of GitHub that reports a limit.
///
/// The header `x-should-retry` takes precedence over the status. A 429 that does not pass by waiting is returned like
/// any other response: OpenAI's `insufficient_quota`, Anthropic's spend limit (a 429 without `retry-after`), and
/// Gemini's limits per day or of zero. OpenAI's and Gemini's are found in the body, with the feature `json`, if the
/// body is [in memory](WholeBody) and at most 64 KiB long.
///
/// A call whose response was [streamed](crate::body#streams) to the caller is not retried.
///
/// # When
///
/// The delay that the server requests is waited in full. If it is above [`max_delay`](Self::max_delay), the call fails
/// at once.
///
/// If the server requests none, the delay is a random part of a time that doubles with each retry
/// ([full jitter](https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/)).
///
/// | setting | default |
/// |---|---|
/// | [`provider`](Self::provider) | none: only `Retry-After`, `x-should-retry` and the status are read |
/// | [`max_retries`](Self::max_retries) | 5 |
/// | [`backoff`](Self::backoff) | 500 ms, doubled up to 30 s |
/// | [`max_delay`](Self::max_delay) | 60 s |
/// | [`retry_errors`](Self::retry_errors) | none besides those above |
/// | [`budget`](Self::budget) | [`TpsBudget::default`]: a fifth of the calls, and ten per second |
///
/// The event of the call has all its attempts, and a log entry for each decision about a retry.
///
/// # Errors
///
/// [`RetryAfterTooLong`] replaces the response if the requested delay is above the maximum. When a call is not retried
/// any more for another reason, its last response or error is returned.
#[derive(Clone)]
pub struct RetryPolicy {
    rules: Arc<Rules>,
    /// How often this call was retried.
    retries: u32,
}

/// The settings, which are the same for all calls of a policy.
#[derive(Clone)]
struct Rules {
    provider: Option<Provider>,
    max_retries: u32,
    /// The backoff of the first retry.
    base: Duration,
    /// The bound of the backoff.
    cap: Duration,
    max_delay: Duration,
    is_retryable: fn(&BoxError) -> bool,
    budget: Option<Arc<dyn Budget + Send + Sync>>,
    /// Shared by all clones of a policy, so that concurrent calls draw different delays.
    rng: Arc<Mutex<Rng>>,
}

/// The delay before a retry.
#[must_use = "futures do nothing unless polled"]
pub struct Delay(Option<Pin<Box<Sleep>>>);

// === impl RetryPolicy ===

impl RetryPolicy {
    /// Creates a policy with the defaults.
    #[must_use]
    pub fn new() -> Self {
        Self {
            rules: Arc::new(Rules {
                provider: None,
                max_retries: 5,
                base: Duration::from_millis(500),
                cap: Duration::from_secs(30),
                max_delay: Duration::from_secs(60),
                is_retryable: |_| false,
                budget: Some(Arc::new(TpsBudget::default())),
                rng: Arc::new(Mutex::new(Rng::new())),
            }),
            retries: 0,
        }
    }

    fn with(mut self, change: impl FnOnce(&mut Rules)) -> Self {
        change(Arc::make_mut(&mut self.rules));
        self
    }

    /// Sets the provider in whose dialect headers and error documents are read. Default: none.
    #[must_use]
    pub fn provider(self, provider: Provider) -> Self {
        self.with(|rules| rules.provider = Some(provider))
    }

    /// Sets how often a call is retried at most. Default: 5, so that a call has at most 6 attempts.
    #[must_use]
    pub fn max_retries(self, retries: u32) -> Self {
        self.with(|rules| rules.max_retries = retries)
    }

    /// Sets the backoff, for retries without a delay that the server requests: `base` at the first retry, doubled with
    /// each retry up to `cap`. A random part of it is waited. Default: 500 ms and 30 s.
    #[must_use]
    pub fn backoff(self, base: Duration, cap: Duration) -> Self {
        self.with(|rules| (rules.base, rules.cap) = (base, cap))
    }

    /// Sets the longest delay that a server may request. A call whose server requests a longer one fails at once with
    /// [`RetryAfterTooLong`]. Default: 60 s.
    #[must_use]
    pub fn max_delay(self, delay: Duration) -> Self {
        self.with(|rules| rules.max_delay = delay)
    }

    /// Retries errors for which `is_retryable` returns true, besides those that are always retried. Default: none.
    #[must_use]
    pub fn retry_errors(self, is_retryable: fn(&BoxError) -> bool) -> Self {
        self.with(|rules| rules.is_retryable = is_retryable)
    }

    /// Sets the budget that bounds the retries of all calls together: each success adds to it, each retry takes from
    /// it. So retries do not multiply the load of a provider that fails all calls. Default: [`TpsBudget::default`].
    /// `None`: no bound but [`max_retries`](Self::max_retries).
    #[must_use]
    pub fn budget(self, budget: Option<Arc<dyn Budget + Send + Sync>>) -> Self {
        self.with(|rules| rules.budget = budget)
    }

    /// Seeds the random delays, for tests. The same seed gives the same delays within one version of this crate.
    /// Default: a random seed.
    #[must_use]
    pub fn seed(self, seed: u64) -> Self {
        self.with(|rules| rules.rng = Arc::new(Mutex::new(Rng::with_seed(seed))))
    }

    fn verdict<R: WholeBody>(&self, result: &Result<Response<R>, BoxError>) -> Verdict {
        match result {
            Err(error) if is_transient(error) || (self.rules.is_retryable)(error) => Verdict::Retry { delay: None },
            Err(_) => Verdict::Final,
            Ok(response) => {
                let provider = self.rules.provider;
                let info = provider
                    .unwrap_or(Provider::Ietf)
                    .rate_limit_info(response.headers(), SystemTime::now());
                ResponseView {
                    provider,
                    status: response.status(),
                    info: &info,
                    body: response.body().whole(),
                }
                .verdict()
            }
        }
    }

    /// The time until the next attempt: the delay that the server requests, or a random part of the backoff.
    fn wait(&self, requested: Option<Duration>) -> Duration {
        requested.unwrap_or_else(|| {
            let factor = 1_u32.checked_shl(self.retries).unwrap_or(u32::MAX);
            let backoff = self.rules.base.saturating_mul(factor).min(self.rules.cap);
            let mut rng = self.rules.rng.lock().unwrap_or_else(PoisonError::into_inner);
            backoff.mul_f64(rng.f64())
        })
    }

    /// Takes a retry from the budget. The error is the reason why the call is not retried.
    fn take_retry(&self) -> Result<(), &'static str> {
        if self.retries >= self.rules.max_retries {
            return Err("max_retries is reached");
        }
        match &self.rules.budget {
            Some(budget) if !budget.withdraw() => Err("the retry budget is used up"),
            _ => Ok(()),
        }
    }
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self::new()
    }
}

impl<B, R> Policy<Request<B>, Response<R>, BoxError> for RetryPolicy
where
    B: Clone,
    R: WholeBody,
{
    type Future = Delay;

    fn retry(&mut self, request: &mut Request<B>, result: &mut Result<Response<R>, BoxError>) -> Option<Delay> {
        if is_delivered(request) {
            return None;
        }
        let Verdict::Retry { delay } = self.verdict(result) else {
            if let (Some(budget), true) = (&self.rules.budget, result.as_ref().is_ok_and(is_success)) {
                budget.deposit();
            }
            return None;
        };
        let number = self.retries + 1;
        let log = |decision: fmt::Arguments<'_>| {
            if let Some(event) = event::current() {
                match &*result {
                    Ok(response) => event.log(format!("Attempt {number}: {}; {decision}", response.status())),
                    Err(error) => event.log(format!("Attempt {number}: {error}; {decision}")),
                }
            }
        };
        let max_delay = self.rules.max_delay;
        if let Some(delay) = delay.filter(|delay| *delay > max_delay) {
            log(format_args!(
                "not retried: the server requests a delay of {delay:?}, and max_delay is {max_delay:?}"
            ));
            let status = result.as_ref().map_or(StatusCode::TOO_MANY_REQUESTS, Response::status);
            *result = Err(RetryAfterTooLong::new(delay, max_delay, status).into());
            return None;
        }
        if let Err(reason) = self.take_retry() {
            log(format_args!("not retried: {reason}"));
            return None;
        }
        let wait = self.wait(delay);
        let source = if delay.is_some() {
            "requested by the server"
        } else {
            "backoff"
        };
        log(format_args!("retrying in {wait:?} ({source})"));
        self.retries = number;
        // No timer for no wait.
        Some(Delay((!wait.is_zero()).then(|| Box::pin(sleep(wait)))))
    }

    fn clone_request(&mut self, request: &Request<B>) -> Option<Request<B>> {
        Some(request.clone())
    }
}

fn is_success<R>(response: &Response<R>) -> bool {
    response.status().is_success()
}

impl fmt::Debug for RetryPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rules = &self.rules;
        f.debug_struct("RetryPolicy")
            .field("provider", &rules.provider)
            .field("max_retries", &rules.max_retries)
            .field("backoff", &(rules.base, rules.cap))
            .field("max_delay", &rules.max_delay)
            .field("retries", &self.retries)
            .finish_non_exhaustive()
    }
}

// === impl Delay ===

impl Future for Delay {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        match &mut self.0 {
            Some(sleep) => sleep.as_mut().poll(cx),
            None => Poll::Ready(()),
        }
    }
}

impl fmt::Debug for Delay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Delay")
    }
}
