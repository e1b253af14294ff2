//! [`Panicked`], and functions that run user code and catch its panics.
//!
//! The queue's workers and the limiters run the code of many callers: services, futures, wakers, and the destructors of
//! requests and responses. A panic in such code fails only the call that the code belongs to. It must not end a worker,
//! because that would cancel the calls of other callers.

use crate::{error::BoxError, redact};
use std::{
    any::Any,
    error::Error as StdError,
    fmt,
    panic::{self, AssertUnwindSafe},
    task::Waker,
};

/// The service panicked while it handled this call: in `poll_ready`, in `call` or in the call's future.
///
/// Calls other than the one that panicked are not affected: the queue's workers catch the panic and continue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Panicked {
    message: String,
}

/// Calls `f`, which runs user code, and turns a panic of `f` into a [`Panicked`] error.
///
/// `f` need not be unwind safe, and may capture a service that panicked before: a service that cannot be used after a
/// panic is expected to panic again.
pub(crate) fn catch_unwind<T>(f: impl FnOnce() -> T) -> Result<T, BoxError> {
    panic::catch_unwind(AssertUnwindSafe(f)).map_err(|payload| Panicked::from_payload(&*payload).into())
}

/// Wakes `waker`, and catches and ignores a panic of the waker's code.
///
/// The caller of this function usually has further wakers to wake, or runs inside another call, and neither may be
/// affected by the panic. The panic hook still reports the panic.
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

    /// Returns the message of the panic. Recognised secrets in the message are redacted.
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
