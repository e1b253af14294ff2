//! [`NoRetry`]: why a call that failed for a reason that may go away is not retried.

use crate::error::DelayBound;
use std::{fmt, time::Duration};

/// Why a call that failed for a reason that may go away is not retried. `Display` writes the reason for the event.
pub(super) enum NoRetry {
    /// The server requests a delay that is longer than the bound allows.
    TooLong { delay: Duration, bound: DelayBound },
    /// The backoff would not end before the call's deadline, which is `left` away.
    Deadline { left: Duration },
    /// The server may have processed the request, which is not idempotent.
    NotIdempotent,
    /// The call has had all its retries.
    MaxRetries,
    /// The budget of all calls together allows no retry now.
    Budget,
}

impl fmt::Display for NoRetry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLong {
                delay,
                bound: DelayBound::MaxDelay(max_delay),
            } => write!(
                f,
                "the server requests a delay of {delay:?}, and max_delay is {max_delay:?}"
            ),
            Self::TooLong {
                delay,
                bound: DelayBound::Deadline(left),
            } => write!(
                f,
                "the server requests a delay of {delay:?}, and the call has only {left:?} until its deadline"
            ),
            Self::Deadline { left } => {
                write!(
                    f,
                    "the backoff would not end before the call's deadline, which is in {left:?}"
                )
            }
            Self::NotIdempotent => {
                f.write_str("the server may have processed the request, and the request is not idempotent")
            }
            Self::MaxRetries => f.write_str("max_retries is reached"),
            Self::Budget => f.write_str("the retry budget is used up"),
        }
    }
}
