//! Errors of the queue and of a single call.

use std::{error::Error as StdError, fmt, time::Duration};

/// The queue takes no more calls: it was closed, or its workers are gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Closed(());

/// The call was ended before there was a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cancelled(());

/// The call could not be over by its deadline. If that was known from the start, it has taken nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeadlineExceeded {
    wait: Duration,
    left: Duration,
}

/// The queue is full (or closed); the request comes back.
pub struct Refused<Req> {
    request: Req,
    closed: bool,
}

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
