//! [`RetryPolicy`]: which calls are made again, and when.

mod transient;
mod verdict;

pub use transient::never_sent;

use crate::{
    body::{WholeBody, is_delivered},
    error::{BoxError, RetryAfterTooLong},
    event,
    provider::Provider,
};
use http::{Request, Response, StatusCode};
use std::{
    fmt,
    future::Future,
    hash::{BuildHasher, RandomState},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
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

/// Makes calls again that failed for a while, as a policy of [`tower::retry`].
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
/// Those that failed because the connection could not be made or was lost, or it took too long; and those answered 408,
/// 409, 429 or 5xx. `x-should-retry` wins over all of that. A 429 that will not go away by waiting is an answer like any
/// other: OpenAI's `insufficient_quota`, Anthropic's spend cap (a 429 without `retry-after`), Gemini's limits by the day or
/// of zero. What is known from the body needs the feature `json`, and a body that is there [as a whole](WholeBody).
///
/// # When
///
/// When the server says: its delay is waited in full. If it is above [`max_delay`](Self::max_delay), the call fails at
/// once, with that delay in the error ([`RetryAfterTooLong`]). Otherwise after a random part of a time that doubles each
/// time ([full jitter](https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/)).
///
/// | setting | default |
/// |---|---|
/// | [`provider`](Self::provider) | none: `Retry-After` and status codes |
/// | [`max_retries`](Self::max_retries) | 5 |
/// | [`backoff`](Self::backoff) | 500 ms, doubled up to 30 s |
/// | [`max_delay`](Self::max_delay) | 60 s |
/// | [`retry_errors`](Self::retry_errors) | none but those above |
/// | [`budget`](Self::budget) | tower's: a fifth of the calls, and ten a second |
///
/// Why and when a call is made again is noted in its event; its attempts are there with their codes.
#[derive(Clone)]
pub struct RetryPolicy {
    rules: Arc<Rules>,
    /// By this call.
    made: u32,
}

/// What is the same for all calls.
#[derive(Clone)]
struct Rules {
    provider: Option<Provider>,
    max_retries: u32,
    base: Duration,
    cap: Duration,
    max_delay: Duration,
    also: fn(&BoxError) -> bool,
    budget: Option<Arc<dyn Budget + Send + Sync>>,
    rng: Arc<Rng>,
}

/// The wait before an attempt.
#[must_use = "futures do nothing unless polled"]
pub struct Delay(Option<Pin<Box<Sleep>>>);

/// Random numbers (SplitMix64), shared by all calls.
struct Rng(AtomicU64);

// === impl RetryPolicy ===

impl RetryPolicy {
    /// All defaults.
    #[must_use]
    pub fn new() -> Self {
        Self {
            rules: Arc::new(Rules {
                provider: None,
                max_retries: 5,
                base: Duration::from_millis(500),
                cap: Duration::from_secs(30),
                max_delay: Duration::from_secs(60),
                also: |_| false,
                budget: Some(Arc::new(TpsBudget::default())),
                rng: Arc::new(Rng(AtomicU64::new(RandomState::new().hash_one(0)))),
            }),
            made: 0,
        }
    }

    fn with(mut self, change: impl FnOnce(&mut Rules)) -> Self {
        change(Arc::make_mut(&mut self.rules));
        self
    }

    /// Whose words the responses are in.
    #[must_use]
    pub fn provider(self, provider: Provider) -> Self {
        self.with(|rules| rules.provider = Some(provider))
    }

    /// How often a call is made again at most.
    #[must_use]
    pub fn max_retries(self, retries: u32) -> Self {
        self.with(|rules| rules.max_retries = retries)
    }

    /// The time whose random part is waited before the first retry, if the server does not say; it doubles up to `cap`.
    #[must_use]
    pub fn backoff(self, base: Duration, cap: Duration) -> Self {
        self.with(|rules| (rules.base, rules.cap) = (base, cap))
    }

    /// The longest delay of a server's that is waited for.
    #[must_use]
    pub fn max_delay(self, delay: Duration) -> Self {
        self.with(|rules| rules.max_delay = delay)
    }

    /// Errors for which this is true are worth another attempt, too: those of one's own client, say.
    #[must_use]
    pub fn retry_errors(self, also: fn(&BoxError) -> bool) -> Self {
        self.with(|rules| rules.also = also)
    }

    /// What keeps retries from making things worse: each call that succeeds puts something in, each retry takes
    /// something out. `None`: nothing does.
    #[must_use]
    pub fn budget(self, budget: Option<Arc<dyn Budget + Send + Sync>>) -> Self {
        self.with(|rules| rules.budget = budget)
    }

    /// Draws the same random waits each time.
    #[must_use]
    pub fn seed(self, seed: u64) -> Self {
        self.with(|rules| rules.rng = Arc::new(Rng(AtomicU64::new(seed))))
    }

    fn judge<R: WholeBody>(&self, result: &Result<Response<R>, BoxError>) -> Verdict {
        match result {
            Err(error) if is_transient(error) || (self.rules.also)(error) => Verdict::Again(None),
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

    /// How long to wait for the next attempt.
    fn wait(&self, delay: Option<Duration>) -> Duration {
        delay.unwrap_or_else(|| {
            let doubled = self
                .rules
                .base
                .saturating_mul(1_u32.checked_shl(self.made).unwrap_or(u32::MAX));
            doubled.min(self.rules.cap).mul_f64(self.rules.rng.roll())
        })
    }

    fn may_retry(&self) -> Result<(), &'static str> {
        if self.made >= self.rules.max_retries {
            return Err("that was the last attempt");
        }
        match &self.rules.budget {
            Some(budget) if !budget.withdraw() => Err("too many calls are being made again"),
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
        let Verdict::Again(delay) = self.judge(result) else {
            if let (Some(budget), true) = (&self.rules.budget, result.as_ref().is_ok_and(is_success)) {
                budget.deposit();
            }
            return None;
        };
        let number = self.made + 1;
        let said = |what: fmt::Arguments<'_>| {
            if let Some(event) = event::current() {
                match &*result {
                    Ok(response) => event.log(format!("attempt {number}: {}; {what}", response.status())),
                    Err(error) => event.log(format!("attempt {number}: {error}; {what}")),
                }
            }
        };
        if let Some(delay) = delay.filter(|delay| *delay > self.rules.max_delay) {
            said(format_args!("not again, as the server asks for {delay:?}"));
            let status = result.as_ref().map_or(StatusCode::TOO_MANY_REQUESTS, Response::status);
            *result = Err(RetryAfterTooLong::new(delay, self.rules.max_delay, status).into());
            return None;
        }
        if let Err(why) = self.may_retry() {
            said(format_args!("not again: {why}"));
            return None;
        }
        let wait = self.wait(delay);
        let whose = if delay.is_some() { ", as the server asks" } else { "" };
        said(format_args!("again in {wait:?}{whose}"));
        self.made = number;
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
            .field("made", &self.made)
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

// === impl Rng ===

impl Rng {
    /// At least 0, and below 1.
    fn roll(&self) -> f64 {
        const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
        let mut mixed = self.0.fetch_add(STEP, Ordering::Relaxed).wrapping_add(STEP);
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^= mixed >> 31;
        (mixed >> 11) as f64 / (1_u64 << 53) as f64
    }
}
