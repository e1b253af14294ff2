//! [`Alone`]: a value on cache lines of its own.

use std::ops::Deref;

/// What one thread writes here does not slow down another that reads or writes what stands beside it.
#[repr(align(128))]
#[derive(Default)]
pub(crate) struct Alone<T>(pub(crate) T);

impl<T> Deref for Alone<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}
