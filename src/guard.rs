//! Others' code may panic where there is nobody to tell. Here that ends.

use crate::error::{BoxError, Panicked};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Turns a panic into an error. What panicked is used again: a service that cannot bear that says so by panicking
/// again.
pub(crate) fn guarded<T>(f: impl FnOnce() -> T) -> Result<T, BoxError> {
    catch_unwind(AssertUnwindSafe(f)).map_err(|payload| Panicked::from_payload(&*payload).into())
}
