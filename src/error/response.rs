//! Errors of http responses: a delay before a retry that is too long, a body that fails or is too large.

use super::{causes, transport};
use crate::redact;
use http::StatusCode;
use std::{error::Error as StdError, fmt, time::Duration};

/// The server asks for a longer delay before a retry than the
/// [retry policy allows](crate::retry::RetryPolicy::max_delay).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetryAfterTooLong {
    delay: Duration,
    max_delay: Duration,
    status: StatusCode,
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
    pub(crate) const fn new(delay: Duration, max_delay: Duration, status: StatusCode) -> Self {
        Self {
            delay,
            max_delay,
            status,
        }
    }

    /// Returns the delay before a retry that the server asks for.
    #[must_use]
    pub const fn delay(&self) -> Duration {
        self.delay
    }

    /// Returns the longest delay before a retry that the retry policy allows.
    #[must_use]
    pub const fn max_delay(&self) -> Duration {
        self.max_delay
    }

    /// Returns the status of the response that asks for the delay before a retry.
    #[must_use]
    pub const fn status(&self) -> StatusCode {
        self.status
    }
}

impl fmt::Display for RetryAfterTooLong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            delay,
            max_delay,
            status,
        } = self;
        write!(
            f,
            "{status}: the server asks to retry after {delay:?}, and the longest delay allowed is {max_delay:?}: \
             raise `max_delay` to wait for it"
        )
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
