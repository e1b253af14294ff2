//! Errors of http responses: a retry delay that is too long, a body that is too large or ends early.

#[cfg(feature = "http")]
use super::causes;
#[cfg(feature = "http")]
use crate::redact;
use std::{error::Error as StdError, fmt, time::Duration};

/// The server asks for more patience than there is: see [`RetryPolicy`](crate::retry::RetryPolicy::max_delay).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetryAfterTooLong {
    delay: Duration,
    ceiling: Duration,
    status: http::StatusCode,
}

/// A response's body broke off. What the call's reader is told as it came, the call is told as this.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BodyFailed {
    message: String,
}

/// A response's body is larger than it may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BodyTooLarge {
    limit: usize,
}

// === impl RetryAfterTooLong ===

impl RetryAfterTooLong {
    #[cfg(feature = "http")]
    pub(crate) const fn new(delay: Duration, ceiling: Duration, status: http::StatusCode) -> Self {
        Self { delay, ceiling, status }
    }

    /// When to come back, as the server says.
    #[must_use]
    pub const fn delay(&self) -> Duration {
        self.delay
    }

    /// The longest delay that would have been waited for.
    #[must_use]
    pub const fn ceiling(&self) -> Duration {
        self.ceiling
    }

    /// The status of the response that said so.
    #[must_use]
    pub const fn status(&self) -> http::StatusCode {
        self.status
    }
}

impl fmt::Display for RetryAfterTooLong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { delay, ceiling, status } = self;
        write!(f, "{status}: come back in {delay:?}, which is more than {ceiling:?}")
    }
}

impl StdError for RetryAfterTooLong {}

// === impl BodyFailed ===

impl BodyFailed {
    #[cfg(feature = "http")]
    pub(crate) fn new(error: &(dyn StdError + 'static)) -> Self {
        let mut message = redact::text(&error.to_string()).into_owned();
        for cause in causes(error) {
            message.push_str(": ");
            message.push_str(&cause);
        }
        Self { message }
    }

    /// What the body's error said, and its causes.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.message
    }
}

impl fmt::Display for BodyFailed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the response's body broke off: {}", self.message)
    }
}

impl StdError for BodyFailed {}

// === impl BodyTooLarge ===

impl BodyTooLarge {
    #[cfg(feature = "http")]
    pub(crate) const fn new(limit: usize) -> Self {
        Self { limit }
    }

    /// The most bytes it may have.
    #[must_use]
    pub const fn limit(&self) -> usize {
        self.limit
    }
}

impl fmt::Display for BodyTooLarge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the response's body is larger than {} bytes", self.limit)
    }
}

impl StdError for BodyTooLarge {}
