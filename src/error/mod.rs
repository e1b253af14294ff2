//! Every error that this crate returns.
//!
//! Layers return [`BoxError`], as Tower's layers do. The [`Executor`](crate::Executor) returns [`Error`], whose methods
//! (`is_closed()`, `is_panicked()`, …) walk the chain of sources, so that a caller need not downcast.

#[cfg(feature = "json")]
mod bad_response;
mod call;
mod config;
mod rate;
#[cfg(feature = "http")]
mod response;
mod store;
#[cfg(feature = "http")]
pub(crate) mod transport;

pub use crate::panic::Panicked;
#[cfg(feature = "json")]
pub(crate) use bad_response::Reported;
#[cfg(feature = "json")]
#[cfg_attr(docsrs, doc(cfg(feature = "json")))]
pub use bad_response::{BadResponse, BadResponseReason};
pub use call::{Cancelled, Closed, DeadlineExceeded, Deadlock, Refused};
pub use config::InvalidConfig;
pub(crate) use rate::Rejected;
pub use rate::{AcquireError, CostExceedsBurst, Exhausted, StoreUnavailable, TooManyKeys};
#[cfg(feature = "http")]
pub(crate) use response::DelayBound;
#[cfg(feature = "http")]
#[cfg_attr(docsrs, doc(cfg(feature = "http")))]
pub use response::{BodyFailed, BodyTooLarge, RetryAfterTooLong};
pub use store::{StoreProblem, TlsProblem};

use crate::redact;
use std::{error::Error as StdError, fmt, iter::successors, time::Duration};

/// An error of any type: the same alias as `tower::BoxError`.
pub type BoxError = Box<dyn StdError + Send + Sync>;

/// An error of an [`Executor`](crate::Executor) or of one of its calls.
///
/// `Display` and the chain of [sources](StdError::source) show the texts of the client's error with secrets redacted.
/// [`find`](Self::find) and [`into_inner`](Self::into_inner) give access to the client's error itself.
pub struct Error {
    inner: BoxError,
    /// A redacted copy of the chain of sources of `inner`, which `source` returns in place of the sources themselves.
    causes: Option<Cause>,
}

/// A redacted copy of one error in a chain of sources: its text, and the copy of the next source in the chain.
struct Cause {
    text: String,
    source: Option<Box<Self>>,
}

/// The most sources of an error that are visited. Without a bound, a visit might never end: an error can be its own
/// source.
const MAX_SOURCES: usize = 128;

/// The executor was used in a state that does not allow it, or was started outside a Tokio runtime.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lifecycle {
    NotRunning,
    AlreadyRunning,
    NoRuntime,
}

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

    /// Whether the operation failed because the executor was not started, or was stopped.
    #[must_use]
    pub fn is_not_running(&self) -> bool {
        self.find::<Lifecycle>() == Some(&Lifecycle::NotRunning)
    }

    /// Whether the executor could not be started because it is running, or because a stop of it has not finished.
    #[must_use]
    pub fn is_already_running(&self) -> bool {
        self.find::<Lifecycle>() == Some(&Lifecycle::AlreadyRunning)
    }

    /// Whether the call failed because the queue was closed before there was a place for the call.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.find::<Closed>().is_some()
    }

    /// Whether the call was cancelled: by its handle, by a stop of the executor, or because the executor was dropped.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.find::<Cancelled>().is_some()
    }

    /// Whether the call panicked.
    #[must_use]
    pub fn is_panicked(&self) -> bool {
        self.find::<Panicked>().is_some()
    }

    /// Whether the call was refused because it costs more than the burst of a rate, so that it could never be admitted.
    #[must_use]
    pub fn is_cost_exceeds_burst(&self) -> bool {
        self.find::<CostExceedsBurst>().is_some()
    }

    /// Whether the call was refused because a rate that [refuses](crate::Rate::refuse) calls did not hold its cost.
    #[must_use]
    pub fn is_exhausted(&self) -> bool {
        self.find::<Exhausted>().is_some()
    }

    /// Whether the call was refused because its key is new to a limiter by key that holds as many keys as it may.
    #[must_use]
    pub fn is_too_many_keys(&self) -> bool {
        self.find::<TooManyKeys>().is_some()
    }

    /// Whether the call failed because the Redis store of the shared rate limits was unavailable for as long as a call
    /// may wait for it.
    #[must_use]
    pub fn is_store_unavailable(&self) -> bool {
        self.find::<StoreUnavailable>().is_some()
    }

    /// Whether the call missed its deadline, or was refused because the wait for its limits would make it miss the
    /// deadline.
    #[must_use]
    pub fn is_deadline_exceeded(&self) -> bool {
        self.find::<DeadlineExceeded>().is_some()
    }

    /// Returns the time after which a retry of the call may succeed, for example for the `Retry-After` of a gateway's
    /// own response. The time is never zero. `None` if a retry cannot help, or if the time is not known.
    ///
    /// The time is that of the first error in the chain of sources that has one: [`DeadlineExceeded`] of a call that was
    /// refused in advance, [`AcquireError`] of a rate limiter, or, with the feature `http`, `RetryAfterTooLong` of a
    /// provider.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        let deadline = || self.find::<DeadlineExceeded>().and_then(DeadlineExceeded::retry_after);
        let limiter = || self.find::<AcquireError>().and_then(AcquireError::retry_after);
        #[cfg(feature = "http")]
        let provider = || self.find::<RetryAfterTooLong>().map(RetryAfterTooLong::delay);
        #[cfg(not(feature = "http"))]
        let provider = || None;
        let known = deadline().or_else(limiter).or_else(provider);
        known.filter(|wait| !wait.is_zero())
    }

    /// Whether the call could never begin, because it was awaited by a call that holds the permit it needs. See
    /// [`executor`](crate::executor#calls-that-make-calls).
    #[must_use]
    pub fn is_deadlock(&self) -> bool {
        self.find::<Deadlock>().is_some()
    }

    /// Returns the first error of type `E` among the wrapped error (for example the client's) and its first 128
    /// sources.
    #[must_use]
    pub fn find<E: StdError + 'static>(&self) -> Option<&E> {
        let inner: &(dyn StdError + 'static) = &*self.inner;
        inner
            .downcast_ref()
            .or_else(|| sources(inner).find_map(|error| error.downcast_ref()))
    }

    /// Returns the wrapped error, for example the client's. The wrapped error is not redacted: its texts may contain
    /// secrets.
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

/// Returns the first sources of an error, at most [`MAX_SOURCES`] of them.
pub(crate) fn sources<'a>(error: &'a (dyn StdError + 'static)) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    successors(error.source(), |error| (*error).source()).take(MAX_SOURCES)
}

/// Returns the redacted texts of the sources of an error. After [`MAX_SOURCES`] texts, the list ends with `…`.
pub(crate) fn causes(error: &(dyn StdError + 'static)) -> Vec<String> {
    let mut causes: Vec<_> = sources(error)
        .map(|source| redact::text(&source.to_string()).into_owned())
        .collect();
    if causes.len() == MAX_SOURCES {
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
            Self::NotRunning => "the executor is not running: call `start` first",
            Self::AlreadyRunning => "the executor is already running: call `stop` and await it first",
            Self::NoRuntime => "there is no Tokio runtime: call `start` inside a Tokio runtime",
        })
    }
}

impl StdError for Lifecycle {}
