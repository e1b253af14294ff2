//! [`Panicked`], and how user code is called where a panic must not spread.

use crate::{error::BoxError, redact};
use std::{
    any::Any,
    error::Error as StdError,
    fmt,
    panic::{self, AssertUnwindSafe},
    task::Waker,
};

/// The call panicked. Only this call failed; whatever carried it goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Panicked {
    message: String,
}

/// Calls user code and turns a panic into a [`Panicked`] error.
///
/// `f` may capture a service that panicked before: a service that cannot be used after a panic reports that by
/// panicking again.
pub(crate) fn catch_unwind<T>(f: impl FnOnce() -> T) -> Result<T, BoxError> {
    panic::catch_unwind(AssertUnwindSafe(f)).map_err(|payload| Panicked::from_payload(&*payload).into())
}

/// Wakes `waker` and swallows a panic of its `wake` function.
///
/// The caller usually has further wakers to wake, or runs inside another call, neither of which may be hit by the
/// panic. The panic hook still reports it.
pub(crate) fn wake(waker: Waker) {
    let _ = catch_unwind(|| waker.wake());
}

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
