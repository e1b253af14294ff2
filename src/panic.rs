//! [`Panicked`], and how user code is called where its panic must not spread.
//!
//! The queue's workers and the limiters run the code of many callers: services, futures, wakers, and the destructors of
//! requests and responses. A panic there fails the one call that it belongs to. It must not end a worker, which would
//! cancel the calls of other callers.

use crate::{error::BoxError, redact};
use std::{
    any::Any,
    error::Error as StdError,
    fmt,
    panic::{self, AssertUnwindSafe},
    task::Waker,
};

/// The service below panicked, in `poll_ready`, in `call` or in its future, while it handled this call.
///
/// Other calls are not affected: the queue's workers catch the panic and continue.
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
            .unwrap_or("the panic payload is not a string");
        Self {
            message: redact::text(text).into_owned(),
        }
    }

    /// Returns the panic's message. Secrets that are recognised in it are redacted.
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
