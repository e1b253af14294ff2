//! [`RetryPolicy`]: decides which calls are retried, and after which delay.

use super::verdict::{ResponseView, Verdict};
use crate::{
    body::{WholeBody, is_delivered},
    error::{BoxError, RetryAfterTooLong, transport},
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

/// Retries calls that failed for a reason that may go away by waiting, as a policy of [`tower::retry`].
///
/// The retry layer belongs *above the limits* in the stack, so that every attempt takes a permit of its concurrency
/// limit and is charged to its rate limit:
///
/// ```
/// use tower::{Layer, retry::RetryLayer, service_fn};
/// use tower_outbound::{Executor, provider::Provider, retry::RetryPolicy};
/// # let client = service_fn(async |_: http::Request<String>| Ok::<_,
/// tower::BoxError>(http::Response::new(String::new())));
///
/// let executor = Executor::builder()
///     .layer(RetryLayer::new(RetryPolicy::new().provider(Provider::OpenAi)))
///     .build(client)?;
/// # Ok::<_, tower_outbound::error::InvalidConfig>(())
/// ```
///
/// # Which calls
///
/// The policy retries:
/// - calls whose connection could not be made or was lost: closed before, in or after the head of the response, reset,
///   broken off in a body that was [collected](crate::body::CollectLayer), or, with HTTP/2, ended by GOAWAY or a reset
///   of the stream. This is recognized by the I/O errors and the errors of hyper in the chain of sources, and so through
///   reqwest and hyper-util. An error of hyper about the request's own body, or about a response that it cannot parse,
///   is not retried,
/// - calls whose attempt was ended by a timeout of the client or of user code: an [`io::Error`](std::io::Error) of the
///   kind `TimedOut`, the `Elapsed` error of [`tower::timeout`] or [`tokio::time::timeout`], or reqwest's timeout error
///   (feature `reqwest`),
/// - calls with an error that [`retry_errors`](Self::retry_errors) accepts,
/// - responses with the status 408, 409, 429 or 5xx, and a 403 of GitHub that reports an exceeded limit.
///
/// A retry may make the server do the same thing twice: if the connection is lost after the request was sent, the
/// server may have processed it. By default such a call is retried all the same, whatever its method, as the libraries
/// of OpenAI and Anthropic do: a prompt that is answered twice costs twice and does no other harm.
/// [`retry_only_idempotent`](Self::retry_only_idempotent) excludes calls for which that is not so.
///
/// A call that failed with [`DeadlineExceeded`](crate::error::DeadlineExceeded) is not retried, unless
/// [`retry_errors`](Self::retry_errors) accepts that error.
///
/// The header `x-should-retry` of a response takes precedence over its status. A 429 whose cause does not go away by
/// waiting is not retried: OpenAI's `insufficient_quota`, Anthropic's spend limit (a 429 without `retry-after`), and
/// Gemini's limits that are per day or zero. OpenAI and Gemini report such a cause in the body, which is read with the
/// feature `json`, if the body is [in memory](WholeBody) and at most 64 KiB long.
///
/// A call whose response was [streamed](crate::body#streams) to the caller is not retried, as the caller has the
/// response.
///
/// # When
///
/// If the server requests a delay, the policy waits for all of it before the retry. If the delay is above
/// [`max_delay`](Self::max_delay), the call fails at once.
///
/// If the server requests no delay, the policy waits for a random part of a time that doubles with each retry ([full
/// jitter](https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/)).
///
/// | setting | default |
/// |---|---|
/// | [`provider`](Self::provider) | none: only `Retry-After`, `x-should-retry` and the status are read |
/// | [`max_retries`](Self::max_retries) | 5 |
/// | [`backoff`](Self::backoff) | 500 ms, doubled up to 30 s |
/// | [`max_delay`](Self::max_delay) | 60 s |
/// | [`retry_errors`](Self::retry_errors) | none besides the errors listed above |
/// | [`retry_only_idempotent`](Self::retry_only_idempotent) | not set: other calls are retried, too |
/// | [`budget`](Self::budget) | [`TpsBudget::default`]: a fifth of the calls, and ten per second |
///
/// The event of the call records all its attempts. A log entry in the event notes each retry, and each retry that is
/// not made because a bound of the policy is reached.
///
/// # Errors
///
/// [`RetryAfterTooLong`] replaces the response if the server requests a delay above [`max_delay`](Self::max_delay). If
/// a call is not retried any more for another reason, its last response or error is returned.
///
/// # Panics
///
/// A retry after a delay panics outside a Tokio runtime with its timer enabled.
#[derive(Clone)]
pub struct RetryPolicy {
    rules: Arc<Rules>,
    /// How often the current call was retried. Tower clones the policy for each call.
    retries: u32,
}

/// The settings of a [`RetryPolicy`], which are the same for all its calls.
#[derive(Clone)]
struct Rules {
    provider: Option<Provider>,
    max_retries: u32,
    /// The backoff before the first retry.
    base: Duration,
    /// The bound up to which the backoff doubles with each retry.
    cap: Duration,
    max_delay: Duration,
    is_retryable: fn(&BoxError) -> bool,
    only_idempotent: bool,
    budget: Option<Arc<dyn Budget + Send + Sync>>,
    /// The generator of random delays. All clones of a policy share it, so that concurrent calls draw different delays.
    rng: Arc<Mutex<Rng>>,
}

/// The future of a [`RetryPolicy`], which completes after the delay before a retry.
///
/// # Cancel safety
///
/// Dropping the future ends the delay and has no other effect. Tower's retry layer makes the retry only after the
/// future has completed.
#[must_use = "futures do nothing unless polled"]
pub struct Delay(Option<Pin<Box<Sleep>>>);

// === impl RetryPolicy ===

impl RetryPolicy {
    /// Creates a policy with the default settings.
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
                only_idempotent: false,
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

    /// Sets the provider in whose dialect the headers and error documents of responses are read. Default: none.
    #[must_use]
    pub fn provider(self, provider: Provider) -> Self {
        self.with(|rules| rules.provider = Some(provider))
    }

    /// Sets the maximum number of retries of a call. Default: 5, so that a call has at most 6 attempts.
    #[must_use]
    pub fn max_retries(self, retries: u32) -> Self {
        self.with(|rules| rules.max_retries = retries)
    }

    /// Sets the backoff, which applies if the server requests no delay: it is `base` before the first retry, and
    /// doubles with each further retry up to `cap`. The actual delay is a random fraction of the backoff. Default: 500
    /// ms and 30 s.
    #[must_use]
    pub fn backoff(self, base: Duration, cap: Duration) -> Self {
        self.with(|rules| (rules.base, rules.cap) = (base, cap))
    }

    /// Sets the longest delay that a server may request. If a server requests a longer delay, the call fails at once
    /// with [`RetryAfterTooLong`]. Default: 60 s.
    #[must_use]
    pub fn max_delay(self, delay: Duration) -> Self {
        self.with(|rules| rules.max_delay = delay)
    }

    /// Retries calls for whose error `is_retryable` returns true, besides those that are always retried. Default: no
    /// other calls.
    #[must_use]
    pub fn retry_errors(self, is_retryable: fn(&BoxError) -> bool) -> Self {
        self.with(|rules| rules.is_retryable = is_retryable)
    }

    /// Does not retry a call that the server may have processed, unless the request is idempotent: its method is
    /// (`GET`, `HEAD`, `OPTIONS`, `TRACE`, `PUT`, `DELETE`), or it has the header `idempotency-key`. Default: all calls
    /// are retried.
    ///
    /// The server cannot have processed a request that was [never sent](super::never_sent), and has not processed one
    /// that it answered with 403, 408, 409, 429, 503 or 529. After any other 5xx, a lost connection and a timeout, it
    /// may have. A response with `x-should-retry: true` and an error that [`retry_errors`](Self::retry_errors) accepts
    /// are retried in any case.
    ///
    /// HTTP/2 also tells that a request was not processed, by a refused stream. As hyper does not report that apart from
    /// other errors, such a call counts as one that may have been processed. reqwest itself repeats it.
    #[must_use]
    pub fn retry_only_idempotent(self) -> Self {
        self.with(|rules| rules.only_idempotent = true)
    }

    /// Sets the budget that bounds the retries of all calls together: each successful call adds to the budget, each
    /// retry takes from it. Without a budget, retries multiply the load of a provider that fails all calls. Default:
    /// [`TpsBudget::default`]. With `None`, only [`max_retries`](Self::max_retries) bounds the retries.
    #[must_use]
    pub fn budget(self, budget: Option<Arc<dyn Budget + Send + Sync>>) -> Self {
        self.with(|rules| rules.budget = budget)
    }

    /// Seeds the generator of random delays, for tests. The same seed gives the same delays within one version of this
    /// crate. Default: a random seed.
    #[must_use]
    pub fn seed(self, seed: u64) -> Self {
        self.with(|rules| rules.rng = Arc::new(Mutex::new(Rng::with_seed(seed))))
    }

    fn verdict<R: WholeBody>(&self, result: &Result<Response<R>, BoxError>) -> Verdict {
        match result {
            Err(error) if (self.rules.is_retryable)(error) => Verdict::Retry {
                delay: None,
                may_be_processed: false,
            },
            Err(error) if transport::is_transient(&**error) => Verdict::Retry {
                delay: None,
                may_be_processed: !transport::never_sent(&**error),
            },
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

    /// Returns the time until the next attempt: the delay that the server requests, or else a random part of the
    /// backoff.
    fn wait(&self, requested: Option<Duration>) -> Duration {
        requested.unwrap_or_else(|| {
            let factor = 1_u32.checked_shl(self.retries).unwrap_or(u32::MAX);
            let backoff = self.rules.base.saturating_mul(factor).min(self.rules.cap);
            let mut rng = self.rules.rng.lock().unwrap_or_else(PoisonError::into_inner);
            backoff.mul_f64(rng.f64())
        })
    }

    /// Takes one retry from the retry budget, if the call has not reached `max_retries`. The error is the reason why
    /// the call is not retried.
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
        let Verdict::Retry {
            delay,
            may_be_processed,
        } = self.verdict(result)
        else {
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
        if self.rules.only_idempotent && may_be_processed && !is_idempotent(request) {
            log(format_args!(
                "not retried: the server may have processed the request, which is not idempotent"
            ));
            return None;
        }
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
        // A retry without delay creates no timer, so it also works in a runtime whose timer is not enabled.
        Some(Delay((!wait.is_zero()).then(|| Box::pin(sleep(wait)))))
    }

    fn clone_request(&mut self, request: &Request<B>) -> Option<Request<B>> {
        Some(request.clone())
    }
}

/// Returns whether the server does the same if it receives the request twice.
fn is_idempotent<B>(request: &Request<B>) -> bool {
    request.method().is_idempotent() || request.headers().contains_key("idempotency-key")
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
