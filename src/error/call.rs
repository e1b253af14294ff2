//! Errors of the queue and of a single call.

use std::{error::Error as StdError, fmt, time::Duration};

/// The queue accepts no more calls: it was closed, or its Tokio runtime was shut down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Closed(());

/// The call was cancelled before it had ended: by its caller, by an abort of its queue, or because the queue's runtime
/// was shut down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cancelled(());

/// The call had not ended by its deadline, or was refused because the wait for its limits would make it miss the
/// deadline. A refused call takes nothing from its limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeadlineExceeded {
    wait: Duration,
    left: Duration,
}

/// The call was refused because the queue is full or closed. [`into_request`](Self::into_request) returns its request.
pub struct Refused<Req> {
    request: Req,
    closed: bool,
    retry_after: Option<Duration>,
}

/// The call could never begin: every permit of the concurrency limit is held by a call that awaits a call of the same
/// executor that has no permit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadlock {
    permits: usize,
}

// === impl Deadlock ===

impl Deadlock {
    pub(crate) const fn new(permits: usize) -> Self {
        Self { permits }
    }
}

impl fmt::Display for Deadlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the call could never begin: each of the {} calls that hold a permit awaits a call without one; raise the \
             concurrency limit, or do not await calls of an executor in its own calls",
            self.permits
        )
    }
}

impl StdError for Deadlock {}

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

    /// Returns how long the call would have had to wait for its limits when it was refused. Zero if the call was ended
    /// at its deadline.
    #[must_use]
    pub const fn wait(&self) -> Duration {
        self.wait
    }

    /// Returns how long the call had until its deadline when it was refused. Zero if the deadline has passed.
    #[must_use]
    pub const fn left(&self) -> Duration {
        self.left
    }

    /// Returns the time after which the same call with as much time until its deadline would be accepted: by how much
    /// its wait was too long, and a millisecond. Calls that come in between make it longer. `None` if the call was not
    /// refused for its wait, but ended at its deadline. The time is never zero.
    #[must_use]
    pub const fn retry_after(&self) -> Option<Duration> {
        if self.wait.is_zero() {
            return None;
        }
        // A wait that ends exactly at the deadline is too long, too.
        Some(
            self.wait
                .saturating_sub(self.left)
                .saturating_add(Duration::from_millis(1)),
        )
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
        Self {
            request,
            closed: false,
            retry_after: None,
        }
    }

    pub(crate) const fn closed(request: Req) -> Self {
        Self {
            request,
            closed: true,
            retry_after: None,
        }
    }

    /// Sets when the full queue probably has a free place.
    pub(crate) const fn free_after(mut self, wait: Duration) -> Self {
        self.retry_after = Some(wait);
        self
    }

    /// Whether the call was refused because the queue was closed. A closed queue never accepts a call again.
    #[must_use]
    pub const fn is_closed(&self) -> bool {
        self.closed
    }

    /// Whether the call was refused because the queue was full. A later attempt may find a place.
    #[must_use]
    pub const fn is_full(&self) -> bool {
        !self.closed
    }

    /// Returns the time after which the full queue of an [`Executor`](crate::Executor) probably has a free place, for
    /// example for the `Retry-After` of a gateway's own response. The time is never zero. `None` if the queue is closed,
    /// or if it is a [`Queue`](crate::Queue) without an executor, which knows of no limits.
    ///
    /// A place becomes free when the rate limiter admits the first of the calls that wait. The time is computed from the
    /// wait of a new call at the limiter, less the share of the calls that wait there already, each at the mean cost of
    /// the queued calls. It includes a pause of the limiter. How long calls are on the wire is not known: if the rates
    /// hold up no call, so that the queue is full only because the calls in flight take their time, it is 100 ms.
    #[must_use]
    pub const fn retry_after(&self) -> Option<Duration> {
        self.retry_after
    }

    /// Returns the request of the refused call.
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
