//! [`RetryPolicy`]: decides which calls are retried, and after which delay.

use super::{
    backoff::{Backoff, Delay},
    bodies::{ByClone, ByWholeBody, CloneBody, InspectBody},
    no_retry::NoRetry,
    verdict::{ResponseView, Verdict},
};
#[cfg(feature = "json")]
use crate::error::BadResponse;
use crate::{
    body::is_delivered,
    deadline::Deadline,
    error::{BoxError, DelayBound, RetryAfterTooLong, transport},
    event,
    provider::{Provider, RateLimitInfo},
};
use bytes::Bytes;
use http::{Request, Response};
use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};
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
///   is not retried; nor is a host name that hyper-util cannot resolve, as its error does not tell that to a program,
/// - calls whose attempt was ended by a timeout of the client or of user code: an [`io::Error`](std::io::Error) of the
///   kind `TimedOut`, the `Elapsed` error of [`tower::timeout`] or [`tokio::time::timeout`], or reqwest's timeout error
///   (feature `reqwest`),
/// - calls with an error that [`retry_errors`](Self::retry_errors) accepts,
/// - responses with the status 408, 409, 429 or 5xx, and a 403 of GitHub that reports an exceeded limit,
/// - successful responses (2xx) without an answer, if a [`CheckLayer`](crate::body::CheckLayer) below has found that
///   another attempt may succeed: see [`BadResponse::is_transient`](crate::error::BadResponse::is_transient) (feature
///   `json`).
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
/// feature `json`, if the body is [in memory](crate::body::WholeBody) and at most 64 KiB long.
///
/// A call whose response was [streamed](crate::body#streams) to the caller is not retried, as the caller has the
/// response.
///
/// # When
///
/// If the server requests no delay, the policy waits for the backoff: a random part of a time that doubles with each
/// retry ([full jitter](https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/)).
///
/// If the server requests a delay, the policy never waits for less, and never for less than the backoff, so that
/// `Retry-After: 0` and very short delays do not use up all retries at once. While another call of the same policy
/// waits for a requested delay, the backoff is added to the requested delay: a thousand calls that are told "1 s"
/// together come back at different times, the first of them after exactly 1 s.
///
/// GitHub requests a delay also with `x-ratelimit-remaining: 0`, until the time of `x-ratelimit-reset`. If it tells no
/// delay, as for a secondary limit, the delay is the 60 s that its documentation asks for.
///
/// The policy does not wait in vain. If the server requests a delay above [`max_delay`](Self::max_delay), or one that does not end
/// before the [`Deadline`] of the call, the call fails at once with [`RetryAfterTooLong`], which has the response. If
/// the backoff does not end before the deadline, the last response or error is returned at once. The policy knows the
/// deadline that an executor, a call or the request's extensions set, and that of a
/// [`DeadlineLayer`](crate::DeadlineLayer) further out; it does not know a timeout of another layer.
///
/// # Bodies
///
/// A retry sends a clone of the request, so its body must be [`Clone`], as `String`, `Bytes` and `Full` are. For
/// another body, [`clone_body_with`](Self::clone_body_with) tells how to clone it, or that it cannot be cloned: the
/// call is then made once. The error documents of responses are found in bodies that implement
/// [`WholeBody`](crate::body::WholeBody). For another body, [`whole_body_with`](Self::whole_body_with) tells how to look
/// into it, or that it cannot be looked into: the policy then decides by the head alone.
///
/// ```
/// use bytes::Bytes;
/// use http::{Request, Response};
/// use http_body_util::{BodyExt, Full, combinators::BoxBody};
/// use tower::{Layer, retry::RetryLayer, service_fn};
/// use tower_outbound::retry::RetryPolicy;
///
/// /// A body that can neither be cloned nor looked into.
/// type Opaque = BoxBody<Bytes, std::io::Error>;
/// # let client = service_fn(async |_: Request<Opaque>| Ok::<_, tower::BoxError>(Response::new(Full::new(Bytes::new()))));
///
/// let policy = RetryPolicy::new()
///     .clone_body_with(|_: &Opaque| None)
///     .whole_body_with(|_: &Full<Bytes>| None);
/// let client = RetryLayer::new(policy).layer(client);
/// # fn is_service<S: tower::Service<Request<Opaque>>>(_: S) {}
/// # is_service(client);
/// ```
///
/// # Settings
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
/// | [`clone_body_with`](Self::clone_body_with) | [`ByClone`]: bodies of requests are `Clone` |
/// | [`whole_body_with`](Self::whole_body_with) | [`ByWholeBody`]: bodies of responses are `WholeBody` |
///
/// The event of the call records all its attempts. A log entry in the event notes each retry, and each retry that is
/// not made because a bound of the policy is reached.
///
/// # Errors
///
/// [`RetryAfterTooLong`] replaces the response if the server requests a delay above [`max_delay`](Self::max_delay) or
/// beyond the deadline of the call. If a call is not retried any more for another reason, its last response or error is
/// returned.
///
/// # Panics
///
/// A retry after a delay panics outside a Tokio runtime with its timer enabled.
#[derive(Clone)]
pub struct RetryPolicy<C = ByClone, W = ByWholeBody> {
    rules: Arc<Rules>,
    clone_body: C,
    whole_body: W,
    /// How often the current call was retried. Tower clones the policy for each call.
    retries: u32,
}

/// The settings of a [`RetryPolicy`], which are the same for all its calls.
#[derive(Clone)]
struct Rules {
    provider: Option<Provider>,
    max_retries: u32,
    backoff: Backoff,
    max_delay: Duration,
    is_retryable: fn(&BoxError) -> bool,
    only_idempotent: bool,
    budget: Option<Arc<dyn Budget + Send + Sync>>,
}

// === impl RetryPolicy ===

impl RetryPolicy {
    /// Creates a policy with the default settings.
    #[must_use]
    pub fn new() -> Self {
        Self {
            rules: Arc::new(Rules {
                provider: None,
                max_retries: 5,
                backoff: Backoff::new(),
                max_delay: Duration::from_secs(60),
                is_retryable: |_| false,
                only_idempotent: false,
                budget: Some(Arc::new(TpsBudget::default())),
            }),
            clone_body: ByClone,
            whole_body: ByWholeBody,
            retries: 0,
        }
    }
}

impl<C, W> RetryPolicy<C, W> {
    fn with(mut self, change: impl FnOnce(&mut Rules)) -> Self {
        change(Arc::make_mut(&mut self.rules));
        self
    }

    /// Sets the provider in whose dialect the headers and error documents of responses are read. Default: none.
    #[must_use]
    pub fn provider(self, provider: Provider) -> Self {
        self.with(|rules| rules.provider = Some(provider))
    }

    /// Sets the maximum number of retries of a call. Default: 5, so that a call has at most 6 attempts. With 0, the
    /// policy does nothing: it does not even clone requests, and returns each response and error as it is.
    #[must_use]
    pub fn max_retries(self, retries: u32) -> Self {
        self.with(|rules| rules.max_retries = retries)
    }

    /// Sets the backoff: it is `base` before the first retry, and doubles with each further retry up to `cap`. The call
    /// waits for a random fraction of it if the server requests no delay, or a shorter one. Default: 500 ms and 30 s.
    #[must_use]
    pub fn backoff(self, base: Duration, cap: Duration) -> Self {
        self.with(|rules| (rules.backoff.base, rules.backoff.cap) = (base, cap))
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
        self.with(|rules| rules.backoff.seed(seed))
    }

    /// Sets how the bodies of requests are cloned, for bodies that are not [`Clone`]. A call whose body `clone_body`
    /// does not clone is made once, returns its response or error as it is, and adds nothing to the
    /// [`budget`](Self::budget). Default: [`ByClone`].
    ///
    /// ```
    /// # #[cfg(feature = "reqwest")] {
    /// use tower_outbound::retry::RetryPolicy;
    ///
    /// // Calls whose body is a stream are not retried.
    /// let policy = RetryPolicy::new().clone_body_with(|body: &reqwest::Body| {
    ///     let bytes = body.as_bytes()?;
    ///     Some(bytes.to_vec().into())
    /// });
    /// # }
    /// ```
    #[must_use]
    pub fn clone_body_with<B, F: Fn(&B) -> Option<B>>(self, clone_body: F) -> RetryPolicy<F, W> {
        RetryPolicy {
            rules: self.rules,
            clone_body,
            whole_body: self.whole_body,
            retries: self.retries,
        }
    }

    /// Sets how the policy gets the bytes of the body of a response, for bodies that are not
    /// [`WholeBody`](crate::body::WholeBody). `whole_body` returns `None` for a body that is not in memory. Default:
    /// [`ByWholeBody`].
    #[must_use]
    pub fn whole_body_with<R, F: Fn(&R) -> Option<&[u8]>>(self, whole_body: F) -> RetryPolicy<C, F> {
        RetryPolicy {
            rules: self.rules,
            clone_body: self.clone_body,
            whole_body,
            retries: self.retries,
        }
    }

    fn verdict<R>(&self, result: &Result<Response<R>, BoxError>) -> Verdict
    where
        W: InspectBody<R>,
    {
        match result {
            Err(error) if (self.rules.is_retryable)(error) => Verdict::Retry {
                delay: None,
                may_be_processed: false,
            },
            Err(error) if transport::is_transient(&**error) => Verdict::Retry {
                delay: None,
                may_be_processed: !transport::never_sent(&**error),
            },
            Err(error) => self.verdict_of_bad_response(error),
            Ok(response) if !is_failure(response) => Verdict::Final,
            Ok(response) => ResponseView {
                provider: self.rules.provider,
                status: response.status(),
                info: &self.info(response),
                body: self.whole_body.bytes(response.body()),
            }
            .verdict(),
        }
    }

    #[cfg(feature = "json")]
    fn verdict_of_bad_response(&self, error: &BoxError) -> Verdict {
        let Some(error) = transport::find::<BadResponse>(&**error) else {
            return Verdict::Final;
        };
        ResponseView {
            provider: self.rules.provider,
            status: error.response().status(),
            info: &self.info(error.response()),
            body: Some(error.response().body()),
        }
        .verdict_of_bad_response(error)
    }

    #[cfg(not(feature = "json"))]
    const fn verdict_of_bad_response(&self, _: &BoxError) -> Verdict {
        Verdict::Final
    }

    fn info<R>(&self, response: &Response<R>) -> RateLimitInfo {
        let provider = self.rules.provider.unwrap_or(Provider::Ietf);
        provider.rate_limit_info(response.headers(), SystemTime::now())
    }

    /// Decides when to retry a call that may be retried. `requested` is the delay that the server requests, `left` the
    /// time until the call's deadline.
    fn delay(&self, requested: Option<Duration>, left: Duration) -> Result<Delay, NoRetry> {
        let Rules { max_delay, backoff, .. } = &*self.rules;
        // A server that requests a delay of zero leaves the delay to the client.
        let requested = requested.filter(|delay| !delay.is_zero());
        // A call that is retried at its deadline itself has no time left.
        if let Some(delay) = requested.filter(|delay| delay > max_delay || *delay >= left) {
            let bound = if left <= *max_delay {
                DelayBound::Deadline(left)
            } else {
                DelayBound::MaxDelay(*max_delay)
            };
            return Err(NoRetry::TooLong { delay, bound });
        }
        if self.retries >= self.rules.max_retries {
            return Err(NoRetry::MaxRetries);
        }
        let delay = match requested {
            Some(requested) => backoff.requested_delay(requested, self.retries, left),
            None => backoff.delay(self.retries, left).ok_or(NoRetry::Deadline { left })?,
        };
        match &self.rules.budget {
            Some(budget) if !budget.withdraw() => Err(NoRetry::Budget),
            _ => Ok(delay),
        }
    }

    /// Returns the error that replaces a response whose requested delay is too long.
    fn too_long<R>(&self, response: &Response<R>, delay: Duration, bound: DelayBound) -> RetryAfterTooLong
    where
        W: InspectBody<R>,
    {
        let body = self.whole_body.bytes(response.body());
        let mut copy = Response::new(body.map(Bytes::copy_from_slice).unwrap_or_default());
        *copy.status_mut() = response.status();
        *copy.headers_mut() = response.headers().clone();
        RetryAfterTooLong::new(delay, bound, copy)
    }
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self::new()
    }
}

impl<B, R, C, W> Policy<Request<B>, Response<R>, BoxError> for RetryPolicy<C, W>
where
    C: CloneBody<B>,
    W: InspectBody<R>,
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
        let decision = if self.rules.only_idempotent && may_be_processed && !is_idempotent(request) {
            Err(NoRetry::NotIdempotent)
        } else {
            self.delay(delay, Deadline::time_left(request).unwrap_or(Duration::MAX))
        };
        let number = self.retries + 1;
        if let Some(event) = event::current() {
            let failure: &dyn fmt::Display = match &*result {
                Ok(response) => &response.status(),
                Err(error) => error,
            };
            event.log(match &decision {
                Ok(delay) => {
                    let (duration, origin) = (delay.duration(), delay.origin());
                    format!("Attempt {number}: {failure}; retrying in {duration:?} ({origin})")
                }
                Err(reason) => format!("Attempt {number}: {failure}; not retried: {reason}"),
            });
        }
        match decision {
            Ok(delay) => {
                self.retries = number;
                Some(delay)
            }
            Err(NoRetry::TooLong { delay, bound }) => {
                if let Ok(response) = result {
                    *result = Err(self.too_long(response, delay, bound).into());
                }
                None
            }
            Err(_) => None,
        }
    }

    fn clone_request(&mut self, request: &Request<B>) -> Option<Request<B>> {
        if self.rules.max_retries == 0 {
            return None;
        }
        let mut clone = Request::new(self.clone_body.clone_body(request.body())?);
        clone.method_mut().clone_from(request.method());
        clone.uri_mut().clone_from(request.uri());
        *clone.version_mut() = request.version();
        clone.headers_mut().clone_from(request.headers());
        clone.extensions_mut().clone_from(request.extensions());
        Some(clone)
    }
}

/// Returns whether the server does the same if it receives the request twice.
fn is_idempotent<B>(request: &Request<B>) -> bool {
    request.method().is_idempotent() || request.headers().contains_key("idempotency-key")
}

/// Returns whether the status of a response is 4xx or 5xx. No other response is retried.
fn is_failure<R>(response: &Response<R>) -> bool {
    response.status().is_client_error() || response.status().is_server_error()
}

fn is_success<R>(response: &Response<R>) -> bool {
    response.status().is_success()
}

impl<C, W> fmt::Debug for RetryPolicy<C, W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rules = &self.rules;
        f.debug_struct("RetryPolicy")
            .field("provider", &rules.provider)
            .field("max_retries", &rules.max_retries)
            .field("backoff", &(rules.backoff.base, rules.backoff.cap))
            .field("max_delay", &rules.max_delay)
            .field("only_idempotent", &rules.only_idempotent)
            .field("retries", &self.retries)
            .finish_non_exhaustive()
    }
}
