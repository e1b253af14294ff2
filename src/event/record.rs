//! [`NetworkRequestEvent`] and its parts: the data that is recorded of one call.

use super::{
    request_id::RequestId,
    status::RequestStatus,
    value::Value,
    wait::{Wait, WaitCause},
};
use http::HeaderMap;
use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};

/// The record of one call at one point in time.
///
/// Secrets in URLs, headers, texts and bodies are redacted. Times are in UTC. Only the first, [`created_at`], is taken
/// from the system's clock; the others are computed from it with the monotonic clock, so that differences between the
/// times of one event are exact, even if the system's clock is set meanwhile.
///
/// [`created_at`]: Self::created_at
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct NetworkRequestEvent {
    /// The call's id: a random UUID unless the caller chose an id.
    pub request_id: RequestId,
    /// How far the call has come.
    pub status: RequestStatus,

    /// When the call was made.
    #[cfg_attr(feature = "serde", serde(with = "super::formats::time"))]
    pub created_at: SystemTime,
    /// When the status, an attempt, a note, the metadata or the response's body last changed.
    #[cfg_attr(feature = "serde", serde(with = "super::formats::time"))]
    pub updated_at: SystemTime,
    /// When the call got a place in the queue.
    #[cfg_attr(feature = "serde", serde(with = "super::formats::optional_time", default))]
    pub queued_at: Option<SystemTime>,
    /// When the call was taken from the queue.
    #[cfg_attr(feature = "serde", serde(with = "super::formats::optional_time", default))]
    pub processing_started_at: Option<SystemTime>,
    /// When the first attempt of the call started.
    #[cfg_attr(feature = "serde", serde(with = "super::formats::optional_time", default))]
    pub call_started_at: Option<SystemTime>,
    /// When the call ended, with any outcome.
    #[cfg_attr(feature = "serde", serde(with = "super::formats::optional_time", default))]
    pub completed_at: Option<SystemTime>,

    /// The request's URL, without user info and without the values of secret query parameters.
    pub endpoint_url: Option<String>,
    /// The request's method.
    pub method: Option<String>,
    /// The request's headers, with the values of secret headers redacted.
    #[cfg_attr(feature = "serde", serde(with = "super::formats::headers", default))]
    pub headers: HeaderMap,
    /// The request's body, if the caller chose to record it: see [`Payload`](super::Payload).
    pub payload: Option<Value>,
    /// The number of the API's tokens that the request is expected to cost; 0 by default. See
    /// [`ApiTokens`](crate::ApiTokens).
    pub api_tokens: u64,

    /// The status code of the response with which the call ended.
    pub response_status_code: Option<u16>,
    /// The response's headers, with the values of secret headers redacted.
    #[cfg_attr(feature = "serde", serde(with = "super::formats::headers", default))]
    pub response_headers: HeaderMap,
    /// The response's body, which is not recorded by default: see [`Http::response_body`](super::Http::response_body).
    pub response_body: Option<Value>,
    /// The number of the API's tokens that the call used, as its response reports it.
    #[cfg_attr(feature = "serde", serde(default))]
    pub api_tokens_used: Option<u64>,
    /// The tokens of the prompt, as the response reports them: see [`TokenUsage`](crate::TokenUsage) for this and the
    /// three numbers that follow.
    #[cfg_attr(feature = "serde", serde(default))]
    pub input_tokens_used: Option<u64>,
    /// The tokens of the answer, with those that were used for reasoning.
    #[cfg_attr(feature = "serde", serde(default))]
    pub output_tokens_used: Option<u64>,
    /// The tokens of the prompt that the provider has read from its cache.
    #[cfg_attr(feature = "serde", serde(default))]
    pub cached_tokens: Option<u64>,
    /// The tokens of the answer that were used for reasoning.
    #[cfg_attr(feature = "serde", serde(default))]
    pub reasoning_tokens: Option<u64>,

    /// When the first byte of the response's body arrived, if a layer of [`body`](crate::body) read the body.
    #[cfg_attr(feature = "serde", serde(with = "super::formats::optional_time", default))]
    pub first_byte_at: Option<SystemTime>,
    /// When the last byte of the response's body arrived, if a layer of [`body`](crate::body) read the body.
    #[cfg_attr(feature = "serde", serde(with = "super::formats::optional_time", default))]
    pub last_byte_at: Option<SystemTime>,
    /// The number of bytes of the response's body that arrived, if a layer of [`body`](crate::body) read the body.
    #[cfg_attr(feature = "serde", serde(default))]
    pub response_bytes: Option<u64>,

    /// The type of the error that ended the call.
    pub error_type: Option<String>,
    /// The message of the error that ended the call.
    pub error_message: Option<String>,
    /// The messages of the sources of the error that ended the call, one on each line: at most 128, followed by `…` if
    /// there may be more.
    pub error_details: Option<String>,

    /// The attempts of the call: more than one if the call was retried.
    pub attempts: Vec<Attempt>,
    /// What the call has waited for so far, at most one entry for each cause. A cause is entered when a wait for it ends;
    /// one for which the call has not waited is left out.
    #[cfg_attr(feature = "serde", serde(default))]
    pub waits: Vec<Wait>,
    /// The notes, of which at most 1,000 are kept: see [`EventHandle::log`](super::EventHandle::log).
    pub logs: Vec<LogEntry>,
    /// The caller's metadata keys and values, of which at most 1,000 are kept. Further keys are only counted, under the
    /// key `[more]`.
    pub metadata: BTreeMap<String, Value>,
}

/// One time that a call was on the wire.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct Attempt {
    /// When the attempt started.
    #[cfg_attr(feature = "serde", serde(with = "super::formats::time"))]
    pub started_at: SystemTime,
    /// When the attempt ended; `None` while the attempt runs.
    #[cfg_attr(feature = "serde", serde(with = "super::formats::optional_time", default))]
    pub ended_at: Option<SystemTime>,
    /// The status code of the response to this attempt, if there was a response. Also set if the body of the response
    /// failed, or did not arrive in time, in a stack with a `CollectLayer` or `BodyLayer`.
    pub status_code: Option<u16>,
    /// The type of the error that the attempt returned, if there was no response; `Cancelled` if the attempt was
    /// dropped.
    pub error_type: Option<String>,
    /// The message of the error that the attempt returned.
    pub error_message: Option<String>,
}

/// A note that was added to an event, for example with [`EventHandle::log`](super::EventHandle::log).
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct LogEntry {
    /// When the note was added.
    #[cfg_attr(feature = "serde", serde(with = "super::formats::time"))]
    pub at: SystemTime,
    /// The text of the note.
    pub message: String,
}

// === impl NetworkRequestEvent ===

impl NetworkRequestEvent {
    /// Whether the call has ended.
    #[must_use]
    pub const fn is_terminal(&self) -> bool {
        self.status.is_terminal()
    }

    /// The time from the call's creation until the call got a place in the queue, or until it ended without a place.
    /// `None` while the call has neither got a place nor ended.
    #[must_use]
    pub fn time_pending(&self) -> Option<Duration> {
        between(Some(self.created_at), self.queued_at.or(self.completed_at))
    }

    /// The time from when the call got a place in the queue until it was taken from the queue, or until it ended in the
    /// queue. `None` while the call is still in the queue, and for a call that got no place.
    #[must_use]
    pub fn time_in_queue(&self) -> Option<Duration> {
        between(self.queued_at, self.processing_started_at.or(self.completed_at))
    }

    /// The time that the call waited for its concurrency and rate limits together: from when it was taken from the queue until
    /// its first attempt started, or until it ended without an attempt. `None` while the call still waits, and for a
    /// call that was not taken from the queue. [`waits`](Self::waits) has the causes apart, and the waits of retries.
    #[must_use]
    pub fn time_waiting(&self) -> Option<Duration> {
        between(self.processing_started_at, self.call_started_at.or(self.completed_at))
    }

    /// How long the call has waited for this cause: zero if it has not, or if it still waits.
    ///
    /// ```
    /// # fn show(event: &tower_outbound::NetworkRequestEvent) {
    /// use tower_outbound::{event::WaitCause, rate::Budget};
    ///
    /// let for_tokens = event.time_waited_for(WaitCause::Budget(Budget::Tokens));
    /// # let _ = for_tokens;
    /// # }
    /// ```
    #[must_use]
    pub fn time_waited_for(&self, cause: WaitCause) -> Duration {
        let wait = self.waits.iter().find(|wait| wait.cause == cause);
        wait.map_or(Duration::ZERO, |wait| wait.duration)
    }

    /// The time from the start of the first attempt to the end of the call, including the waits between attempts.
    /// `None` until the call has ended, and for a call without an attempt.
    #[must_use]
    pub fn time_calling(&self) -> Option<Duration> {
        between(self.call_started_at, self.completed_at)
    }

    /// The time from the start of the first attempt to the first byte of the response's body: `None` if no layer of
    /// [`body`](crate::body) read the body.
    #[must_use]
    pub fn time_to_first_byte(&self) -> Option<Duration> {
        between(self.call_started_at, self.first_byte_at)
    }

    /// The time from the start of the first attempt to the last byte of the response's body: `None` if no layer of
    /// [`body`](crate::body) read the body.
    #[must_use]
    pub fn time_to_last_byte(&self) -> Option<Duration> {
        between(self.call_started_at, self.last_byte_at)
    }

    /// The time from the call's creation to its end: `None` until the call has ended.
    #[must_use]
    pub fn time_total(&self) -> Option<Duration> {
        between(Some(self.created_at), self.completed_at)
    }
}

fn between(start: Option<SystemTime>, end: Option<SystemTime>) -> Option<Duration> {
    end?.duration_since(start?).ok()
}
