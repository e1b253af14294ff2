//! Every error a caller can meet.
//!
//! Layers return [`BoxError`], as Tower's own do; the [`Executor`](crate::Executor) returns [`Error`], which answers
//! questions (`is_closed()`, `is_panicked()`, …) by walking the chain of sources, so that nobody has to downcast.

use crate::redact;
use std::{any::Any, borrow::Cow, error::Error as StdError, fmt, iter::successors, time::Duration};

/// An error of any type: the same alias as Tower's.
pub type BoxError = Box<dyn StdError + Send + Sync>;

/// A setting that makes no sense, found when a limit, a layer or an executor is built.
///
/// ```
/// use tower_outbound::{Limits, Rate, RateLimiter};
///
/// let error = RateLimiter::new(Limits::new().requests(Rate::per_second(0))).unwrap_err();
/// assert_eq!(error.field(), "requests.amount");
/// assert_eq!(error.to_string(), "invalid requests.amount: must be above zero, is 0");
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidConfig {
    field: Cow<'static, str>,
    problem: String,
}

/// The queue takes no more calls: it was closed, or its workers are gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Closed(());

/// The call was ended before there was a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cancelled(());

/// The call panicked. Only this call failed; whatever carried it goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Panicked {
    message: String,
}

/// The call costs more than a bucket can ever hold, so that waiting would never end. Nothing was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CostExceedsBurst {
    budget: &'static str,
    cost: u64,
    burst: u64,
}

/// The store that keeps shared limits does not answer, and waiting for it is over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreUnavailable {
    problem: Cow<'static, str>,
    waited: Duration,
}

/// Why a limiter let a call not pass. It has taken nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum AcquireError {
    /// It could never pass.
    CostExceedsBurst(CostExceedsBurst),
    /// The limits are shared, and their store is lost.
    StoreUnavailable(StoreUnavailable),
}

/// The call could not be over by its deadline. If that was known from the start, it has taken nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeadlineExceeded {
    wait: Duration,
    left: Duration,
}

/// The server asks for more patience than there is: see [`RetryPolicy`](crate::http::RetryPolicy::max_delay).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetryAfterTooLong {
    delay: Duration,
    ceiling: Duration,
    status: http::StatusCode,
}

/// A response's body broke off. What the call's reader is told as it came, the call is told as this.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BodyFailed {
    message: String,
}

/// A response's body is larger than it may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BodyTooLarge {
    limit: usize,
}

/// The queue is full (or closed); the request comes back.
pub struct Refused<Req> {
    request: Req,
    closed: bool,
}

/// What went wrong with an [`Executor`](crate::Executor) or one of its calls.
///
/// A call's own failure is passed on: `Display` and the chain of [sources](StdError::source) say what the client's
/// error says, except that secrets are redacted. The error itself is to be had with [`find`](Self::find) and
/// [`into_inner`](Self::into_inner).
pub struct Error {
    inner: BoxError,
    causes: Option<Cause>,
}

/// What a source said, without secrets.
struct Cause {
    text: String,
    source: Option<Box<Self>>,
}

/// So many sources of an error are looked at. A chain may be endless: an error can be its own source.
const MOST_SOURCES: usize = 128;

/// Reasons of the executor itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lifecycle {
    NotRunning,
    AlreadyRunning,
    NoRuntime,
}

// === impl InvalidConfig ===

impl InvalidConfig {
    pub(crate) fn new(field: impl Into<Cow<'static, str>>, problem: impl Into<String>) -> Self {
        Self {
            field: field.into(),
            problem: problem.into(),
        }
    }

    pub(crate) fn positive(field: &'static str, value: usize) -> Result<usize, Self> {
        if value == 0 {
            Err(Self::new(field, "must be above zero, is 0"))
        } else {
            Ok(value)
        }
    }

    /// More than any machine has threads, and few enough to be spawned.
    pub(crate) fn workers(value: usize) -> Result<usize, Self> {
        const MOST: usize = 65_536;
        if value > MOST {
            return Err(Self::new("workers", format!("must be {MOST} at most, is {value}")));
        }
        Self::positive("workers", value)
    }

    pub(crate) fn renamed(self, field: String) -> Self {
        Self {
            field: field.into(),
            ..self
        }
    }

    /// The setting, as it is named in the builder or the config.
    #[must_use]
    pub fn field(&self) -> &str {
        &self.field
    }
}

impl fmt::Display for InvalidConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "invalid {}: {}", self.field, self.problem)
    }
}

impl StdError for InvalidConfig {}

// === impl Closed ===

impl Closed {
    pub(crate) const fn new() -> Self {
        Self(())
    }
}

impl fmt::Display for Closed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the queue is closed")
    }
}

impl StdError for Closed {}

// === impl Cancelled ===

impl Cancelled {
    pub(crate) const fn new() -> Self {
        Self(())
    }
}

impl fmt::Display for Cancelled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the call was cancelled")
    }
}

impl StdError for Cancelled {}

// === impl Panicked ===

impl Panicked {
    pub(crate) fn from_payload(payload: &(dyn Any + Send)) -> Self {
        let text = payload
            .downcast_ref::<&'static str>()
            .copied()
            .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
            .unwrap_or("a value that is no text");
        Self {
            message: redact::text(text).into_owned(),
        }
    }

    /// The panic's message.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.message
    }
}

impl fmt::Display for Panicked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the call panicked: {}", self.message)
    }
}

impl StdError for Panicked {}

// === impl CostExceedsBurst ===

impl CostExceedsBurst {
    pub(crate) const fn new(budget: &'static str, cost: u64, burst: u64) -> Self {
        Self { budget, cost, burst }
    }

    /// What the call would have taken.
    #[must_use]
    pub const fn cost(&self) -> u64 {
        self.cost
    }

    /// The most the bucket can hold.
    #[must_use]
    pub const fn burst(&self) -> u64 {
        self.burst
    }

    /// Which budget: `requests` or `tokens`.
    #[must_use]
    pub const fn budget(&self) -> &'static str {
        self.budget
    }
}

impl fmt::Display for CostExceedsBurst {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { budget, cost, burst } = self;
        write!(f, "the call costs {cost} {budget}, more than the burst of {burst}")
    }
}

impl StdError for CostExceedsBurst {}

// === impl StoreUnavailable ===

impl StoreUnavailable {
    #[cfg(feature = "redis")]
    pub(crate) const fn new(problem: Cow<'static, str>, waited: Duration) -> Self {
        Self { problem, waited }
    }

    /// How long the call has waited for it.
    #[must_use]
    pub const fn waited(&self) -> Duration {
        self.waited
    }
}

impl fmt::Display for StoreUnavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { problem, waited } = self;
        write!(
            f,
            "the store of the shared limits is lost ({problem}), and was waited for {waited:?}"
        )
    }
}

impl StdError for StoreUnavailable {}

// === impl AcquireError ===

impl From<CostExceedsBurst> for AcquireError {
    fn from(error: CostExceedsBurst) -> Self {
        Self::CostExceedsBurst(error)
    }
}

impl AcquireError {
    /// The reason itself, so that it can be found by its type.
    pub(crate) fn into_reason(self) -> BoxError {
        match self {
            Self::CostExceedsBurst(error) => error.into(),
            Self::StoreUnavailable(error) => error.into(),
        }
    }
}

impl fmt::Display for AcquireError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CostExceedsBurst(error) => error.fmt(f),
            Self::StoreUnavailable(error) => error.fmt(f),
        }
    }
}

impl StdError for AcquireError {}

// === impl DeadlineExceeded ===

impl DeadlineExceeded {
    pub(crate) const fn new(wait: Duration, left: Duration) -> Self {
        Self { wait, left }
    }

    /// How long it would have had to wait for its limits alone; zero if its time was up before that mattered.
    #[must_use]
    pub const fn wait(&self) -> Duration {
        self.wait
    }

    /// How long it had left; zero if its time was up.
    #[must_use]
    pub const fn left(&self) -> Duration {
        self.left
    }
}

impl fmt::Display for DeadlineExceeded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { wait, left } = self;
        if left.is_zero() {
            f.write_str("the call's deadline has passed")
        } else {
            write!(
                f,
                "the call would have to wait {wait:?} and has only {left:?} until its deadline"
            )
        }
    }
}

impl StdError for DeadlineExceeded {}

// === impl RetryAfterTooLong ===

impl RetryAfterTooLong {
    #[cfg(feature = "http")]
    pub(crate) const fn new(delay: Duration, ceiling: Duration, status: http::StatusCode) -> Self {
        Self { delay, ceiling, status }
    }

    /// When to come back, as the server says.
    #[must_use]
    pub const fn delay(&self) -> Duration {
        self.delay
    }

    /// The longest delay that would have been waited for.
    #[must_use]
    pub const fn ceiling(&self) -> Duration {
        self.ceiling
    }

    /// The status of the response that said so.
    #[must_use]
    pub const fn status(&self) -> http::StatusCode {
        self.status
    }
}

impl fmt::Display for RetryAfterTooLong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { delay, ceiling, status } = self;
        write!(f, "{status}: come back in {delay:?}, which is more than {ceiling:?}")
    }
}

impl StdError for RetryAfterTooLong {}

// === impl BodyFailed ===

impl BodyFailed {
    #[cfg(feature = "http")]
    pub(crate) fn new(error: &(dyn StdError + 'static)) -> Self {
        let mut message = redact::text(&error.to_string()).into_owned();
        for cause in causes(error) {
            message.push_str(": ");
            message.push_str(&cause);
        }
        Self { message }
    }

    /// What the body's error said, and its causes.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.message
    }
}

impl fmt::Display for BodyFailed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the response's body broke off: {}", self.message)
    }
}

impl StdError for BodyFailed {}

// === impl BodyTooLarge ===

impl BodyTooLarge {
    #[cfg(feature = "http")]
    pub(crate) const fn new(limit: usize) -> Self {
        Self { limit }
    }

    /// The most bytes it may have.
    #[must_use]
    pub const fn limit(&self) -> usize {
        self.limit
    }
}

impl fmt::Display for BodyTooLarge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the response's body is larger than {} bytes", self.limit)
    }
}

impl StdError for BodyTooLarge {}

// === impl Refused ===

impl<Req> Refused<Req> {
    pub(crate) const fn full(request: Req) -> Self {
        Self { request, closed: false }
    }

    pub(crate) const fn closed(request: Req) -> Self {
        Self { request, closed: true }
    }

    /// Whether the queue was closed, rather than full.
    #[must_use]
    pub const fn is_closed(&self) -> bool {
        self.closed
    }

    /// Whether the queue was full: it may have a place later.
    #[must_use]
    pub const fn is_full(&self) -> bool {
        !self.closed
    }

    /// The request, unharmed.
    #[must_use]
    pub fn into_request(self) -> Req {
        self.request
    }
}

impl<Req> fmt::Debug for Refused<Req> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Refused")
            .field("closed", &self.closed)
            .finish_non_exhaustive()
    }
}

impl<Req> fmt::Display for Refused<Req> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.closed {
            "the queue is closed"
        } else {
            "the queue is full"
        })
    }
}

impl<Req> StdError for Refused<Req> {}

// === impl Error ===

impl Error {
    pub(crate) fn new(error: impl Into<BoxError>) -> Self {
        match error.into().downcast::<Self>() {
            Ok(same) => *same,
            Err(inner) => Self {
                causes: Cause::of(&*inner),
                inner,
            },
        }
    }

    pub(crate) fn not_running() -> Self {
        Self::new(Lifecycle::NotRunning)
    }

    pub(crate) fn already_running() -> Self {
        Self::new(Lifecycle::AlreadyRunning)
    }

    pub(crate) fn no_runtime() -> Self {
        Self::new(Lifecycle::NoRuntime)
    }

    /// The executor was not started, or has been stopped.
    #[must_use]
    pub fn is_not_running(&self) -> bool {
        self.find::<Lifecycle>() == Some(&Lifecycle::NotRunning)
    }

    /// The executor runs already, or is still stopping.
    #[must_use]
    pub fn is_already_running(&self) -> bool {
        self.find::<Lifecycle>() == Some(&Lifecycle::AlreadyRunning)
    }

    /// The queue was closed before it had a place for the call.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.find::<Closed>().is_some()
    }

    /// The call was cancelled: by its handle, or by a stop that did not wait.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.find::<Cancelled>().is_some()
    }

    /// The call panicked.
    #[must_use]
    pub fn is_panicked(&self) -> bool {
        self.find::<Panicked>().is_some()
    }

    /// The call costs more than a burst allows.
    #[must_use]
    pub fn is_cost_exceeds_burst(&self) -> bool {
        self.find::<CostExceedsBurst>().is_some()
    }

    /// The store of shared limits was lost, and the call has waited for it long enough.
    #[must_use]
    pub fn is_store_unavailable(&self) -> bool {
        self.find::<StoreUnavailable>().is_some()
    }

    /// The call could not be over by its deadline.
    #[must_use]
    pub fn is_deadline_exceeded(&self) -> bool {
        self.find::<DeadlineExceeded>().is_some()
    }

    /// The first error of type `E` in the chain of sources, whose first 128 are looked at.
    #[must_use]
    pub fn find<E: StdError + 'static>(&self) -> Option<&E> {
        let inner: &(dyn StdError + 'static) = &*self.inner;
        inner
            .downcast_ref()
            .or_else(|| sources(inner).find_map(|error| error.downcast_ref()))
    }

    /// The client's own error, untouched: its text may hold secrets.
    #[must_use]
    pub fn into_inner(self) -> BoxError {
        self.inner
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Error({})", redact::text(&format!("{:?}", self.inner)))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&redact::text(&self.inner.to_string()))
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.causes.as_ref().map(|cause| cause as _)
    }
}

impl From<InvalidConfig> for Error {
    fn from(error: InvalidConfig) -> Self {
        Self::new(error)
    }
}

impl From<DeadlineExceeded> for Error {
    fn from(error: DeadlineExceeded) -> Self {
        Self::new(error)
    }
}

impl From<CostExceedsBurst> for Error {
    fn from(error: CostExceedsBurst) -> Self {
        Self::new(error)
    }
}

// === impl Cause ===

pub(crate) fn sources<'a>(error: &'a (dyn StdError + 'static)) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    successors(error.source(), |error| (*error).source()).take(MOST_SOURCES)
}

/// What the sources of an error say, without secrets. The last one is `…` if there are more than are looked at.
pub(crate) fn causes(error: &(dyn StdError + 'static)) -> Vec<String> {
    let mut causes: Vec<_> = sources(error)
        .map(|source| redact::text(&source.to_string()).into_owned())
        .collect();
    if causes.len() == MOST_SOURCES {
        causes.push("…".into());
    }
    causes
}

impl Cause {
    fn of(error: &(dyn StdError + 'static)) -> Option<Self> {
        let innermost_first = causes(error).into_iter().rev();
        innermost_first.fold(None, |source, text| {
            Some(Self {
                text,
                source: source.map(Box::new),
            })
        })
    }
}

impl fmt::Debug for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl StdError for Cause {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_ref().map(|cause| &**cause as _)
    }
}

// === impl Lifecycle ===

impl fmt::Display for Lifecycle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotRunning => "the executor is not running: call start first",
            Self::AlreadyRunning => "the executor is already running",
            Self::NoRuntime => "the executor has to be started inside a Tokio runtime",
        })
    }
}

impl StdError for Lifecycle {}
