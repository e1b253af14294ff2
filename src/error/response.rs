//! Errors of http responses: a delay before a retry that is too long, a body that fails or is too large.

use super::{causes, transport};
use crate::redact;
use bytes::Bytes;
use http::{Response, StatusCode};
use std::{error::Error as StdError, fmt, time::Duration};

/// The server asks for a delay before a retry that is longer than the
/// [retry policy allows](crate::retry::RetryPolicy::max_delay), or than the time until the deadline of the call.
///
/// The error has the response that asks for the delay: its status, its headers, and its body as far as that was in
/// memory. `Debug` and `Display` show neither the headers nor the body, which may contain secrets.
#[derive(Clone)]
pub struct RetryAfterTooLong {
    delay: Duration,
    bound: DelayBound,
    response: Response<Bytes>,
}

/// The bound of a delay before a retry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DelayBound {
    /// The setting of the retry policy.
    MaxDelay(Duration),
    /// The time until the deadline of the call.
    Deadline(Duration),
}

/// The body of a response ended with an error, so the call failed.
///
/// The reader of the body gets the original error. `BodyFailed` is a redacted copy of that error, with which the call
/// fails.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BodyFailed {
    message: String,
    is_transient: bool,
}

/// The body of a response is larger than the configured limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BodyTooLarge {
    limit: usize,
}

// === impl RetryAfterTooLong ===

impl RetryAfterTooLong {
    pub(crate) const fn new(delay: Duration, bound: DelayBound, response: Response<Bytes>) -> Self {
        Self { delay, bound, response }
    }

    /// Returns the delay before a retry that the server asks for.
    #[must_use]
    pub const fn delay(&self) -> Duration {
        self.delay
    }

    /// Returns the longest delay before a retry that was allowed: that of the retry policy, or the time that was left
    /// until the deadline of the call, if that was shorter.
    #[must_use]
    pub const fn max_delay(&self) -> Duration {
        match self.bound {
            DelayBound::MaxDelay(bound) | DelayBound::Deadline(bound) => bound,
        }
    }

    /// Returns whether the delay is too long for the deadline of the call, rather than for the setting of the retry
    /// policy.
    #[must_use]
    pub const fn is_deadline(&self) -> bool {
        matches!(self.bound, DelayBound::Deadline(_))
    }

    /// Returns the status of the response that asks for the delay before a retry.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        self.response.status()
    }

    /// Returns the response that asks for the delay before a retry: its status, its headers, and its body as far as
    /// that was in memory. The body of a response that is [collected or streamed](crate::body) is in memory.
    #[must_use]
    pub const fn response(&self) -> &Response<Bytes> {
        &self.response
    }

    /// Returns the [response](Self::response) that asks for the delay before a retry.
    #[must_use]
    pub fn into_response(self) -> Response<Bytes> {
        self.response
    }
}

impl fmt::Display for RetryAfterTooLong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (status, delay) = (self.status(), self.delay);
        write!(f, "{status}: the server asks to retry after {delay:?}, and ")?;
        match self.bound {
            DelayBound::MaxDelay(max_delay) => write!(
                f,
                "the longest delay allowed is {max_delay:?}: raise `max_delay` to wait for it"
            ),
            DelayBound::Deadline(left) => write!(
                f,
                "the call has only {left:?} until its deadline: set a later deadline to wait for it"
            ),
        }
    }
}

impl fmt::Debug for RetryAfterTooLong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RetryAfterTooLong")
            .field("status", &self.status())
            .field("delay", &self.delay)
            .field("bound", &self.bound)
            .finish_non_exhaustive()
    }
}

impl StdError for RetryAfterTooLong {}

// === impl BodyFailed ===

impl BodyFailed {
    pub(crate) fn new(error: &(dyn StdError + 'static)) -> Self {
        let mut message = redact::text(&error.to_string()).into_owned();
        for cause in causes(error) {
            message.push_str(": ");
            message.push_str(&cause);
        }
        Self {
            message,
            is_transient: transport::is_transient(error),
        }
    }

    /// Returns whether the body failed because the connection was lost or a timeout ended it, so that another attempt
    /// may succeed. A [`RetryPolicy`](crate::retry::RetryPolicy) retries such a call.
    #[must_use]
    pub const fn is_transient(&self) -> bool {
        self.is_transient
    }

    /// Returns the messages of the body's error and of its sources, redacted.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.message
    }
}

impl fmt::Display for BodyFailed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the response's body failed: {}", self.message)
    }
}

impl StdError for BodyFailed {}

// === impl BodyTooLarge ===

impl BodyTooLarge {
    pub(crate) const fn new(limit: usize) -> Self {
        Self { limit }
    }

    /// Returns the largest size that the body may have, in bytes.
    #[must_use]
    pub const fn limit(&self) -> usize {
        self.limit
    }
}

impl fmt::Display for BodyTooLarge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { limit } = self;
        write!(
            f,
            "the response's body is larger than the limit of {limit} bytes: raise the limit of `CollectLayer`"
        )
    }
}

impl StdError for BodyTooLarge {}
