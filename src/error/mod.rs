//! Every error a caller can meet.
//!
//! Layers return [`BoxError`], as Tower's own do; the [`Executor`](crate::Executor) returns [`Error`], which answers
//! questions (`is_closed()`, `is_panicked()`, …) by walking the chain of sources, so that nobody has to downcast.

mod call;
mod config;
mod rate;
mod response;

pub use crate::panic::Panicked;
pub use call::{Cancelled, Closed, DeadlineExceeded, Refused};
pub use config::InvalidConfig;
pub use rate::{AcquireError, CostExceedsBurst, StoreUnavailable};
pub use response::{BodyFailed, BodyTooLarge, RetryAfterTooLong};

use crate::redact;
use std::{error::Error as StdError, fmt, iter::successors};

/// An error of any type: the same alias as Tower's.
pub type BoxError = Box<dyn StdError + Send + Sync>;

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
