//! [`Change`]: one step of a call, as the observers of its event are told of it.

use super::{status::RequestStatus, wait::Wait};
#[cfg(feature = "http")]
use crate::budget::Budget;
use crate::{cost::Cost, error::Error, tokens::TokenUsage};
use std::time::Duration;

/// One step of a call.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Change<'a> {
    Opened,
    Queued,
    Started,
    AttemptStarted {
        number: u32,
    },
    AttemptEnded(&'a AttemptEnd),
    Charged(&'a Cost),
    Settled {
        charged: &'a Cost,
        used: &'a Cost,
    },
    #[cfg(feature = "http")]
    LimitReported(&'a LimitReport),
    #[cfg(feature = "http")]
    Paused(Duration),
    Ended(&'a CallEnd),
    /// The call has no event.
    Refused(Refusal),
}

/// How an attempt of a call has ended.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct AttemptEnd {
    /// The number of the attempt in its call: 1 for the first, 2 for the first retry.
    pub number: u32,
    /// How long the attempt was on the wire.
    pub duration: Duration,
    /// The status code of its response.
    pub status_code: Option<u16>,
    /// The type of its error; `Cancelled` for an attempt that was dropped before it ended.
    pub error_type: Option<String>,
}

/// How a call has ended, and what it has waited for.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct CallEnd {
    /// COMPLETED, FAILED or CANCELLED.
    pub status: RequestStatus,
    /// The time from when the call was made until it ended.
    pub duration: Duration,
    /// The status code of the response with which the call ended.
    pub status_code: Option<u16>,
    /// The type of the error with which the call ended.
    pub error_type: Option<String>,
    /// Whether the call has missed its deadline, or was refused because it would have: with the error
    /// [`DeadlineExceeded`](crate::error::DeadlineExceeded). If `attempts` is 0, it was not on the wire.
    pub is_deadline_exceeded: bool,
    /// How often the call was on the wire.
    pub attempts: u32,
    /// What the call has waited for, at most one entry for each cause. Causes for which it has not waited are left out.
    pub waits: Vec<Wait>,
    /// The tokens that the response says were used.
    pub tokens: Option<TokenUsage>,
    /// The time from the start of the first attempt to the first byte of the response's body, if a layer of
    /// [`body`](crate::body) has read the body.
    pub time_to_first_byte: Option<Duration>,
}

/// What the response to a call reports of one limit of the provider: see
/// [`Observer::limit_reported`](super::Observer::limit_reported).
#[cfg(feature = "http")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LimitReport {
    /// What the limit counts.
    pub budget: Budget,
    /// The period of the limit. `None` if it is not reported.
    pub period: Option<Duration>,
    /// The amount that the limit allows per period.
    pub limit: Option<u64>,
    /// What is left of that amount.
    pub remaining: Option<u64>,
    /// The time until more of the amount is available, or all of it, as the provider reports it.
    pub reset: Option<Duration>,
}

/// Why a call was refused when it was submitted, before it had an event: see
/// [`Observer::call_refused`](super::Observer::call_refused).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Refusal {
    /// The queue was full.
    Full,
    /// The executor is not running.
    Closed,
    /// The wait for the limits would have made the call miss its deadline.
    Deadline,
    /// The call costs more than the burst of a rate.
    CostExceedsBurst,
    /// Another reason, such as a malformed URL.
    Other,
}

// === impl LimitReport ===

#[cfg(feature = "http")]
impl LimitReport {
    pub(crate) const fn new(
        (budget, period): (Budget, Option<Duration>),
        (limit, remaining): (Option<u64>, Option<u64>),
        reset: Option<Duration>,
    ) -> Self {
        Self {
            budget,
            period,
            limit,
            remaining,
            reset,
        }
    }
}

// === impl Refusal ===

impl Refusal {
    /// Returns the reason of an error with which a call was refused.
    pub(crate) fn of(error: &Error) -> Self {
        if error.is_not_running() || error.is_closed() {
            Self::Closed
        } else if error.is_deadline_exceeded() {
            Self::Deadline
        } else if error.is_cost_exceeds_burst() {
            Self::CostExceedsBurst
        } else {
            Self::Other
        }
    }

    /// Returns a short name for metrics and logs: `full`, `closed`, `deadline`, `cost_exceeds_burst` or `other`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Closed => "closed",
            Self::Deadline => "deadline",
            Self::CostExceedsBurst => "cost_exceeds_burst",
            Self::Other => "other",
        }
    }
}
