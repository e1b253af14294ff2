//! [`Change`]: one step of a call, as the observers of its event are told of it.

use super::{status::RequestStatus, wait::Wait};
use crate::{cost::Cost, tokens::TokenUsage};
use std::time::Duration;

/// One step of a call.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Change<'a> {
    Opened,
    Queued,
    Started,
    AttemptStarted { number: u32 },
    AttemptEnded(&'a AttemptEnd),
    Charged(&'a Cost),
    Settled { charged: &'a Cost, used: &'a Cost },
    Ended(&'a CallEnd),
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
