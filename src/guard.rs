//! Others' code may panic where there is nobody to tell. Here that ends.

use crate::error::{BoxError, Panicked};
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    task::Waker,
};

/// Turns a panic into an error. What panicked is used again: a service that cannot bear that says so by panicking
/// again.
pub(crate) fn guarded<T>(f: impl FnOnce() -> T) -> Result<T, BoxError> {
    catch_unwind(AssertUnwindSafe(f)).map_err(|payload| Panicked::from_payload(&*payload).into())
}

/// Wakes somebody. Whoever wakes is about to wake others, too, or in the middle of somebody else's call: a waker that
/// panics is told by the panic hook, and by nobody else.
pub(crate) fn wake(waker: Waker) {
    let _ = guarded(|| waker.wake());
}
