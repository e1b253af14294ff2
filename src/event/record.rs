//! What is recorded of a call: [`NetworkRequestEvent`] and its parts. Plain data.

use super::value::Value;
use http::HeaderMap;
use std::{
    collections::BTreeMap,
    fmt,
    str::FromStr,
    sync::Arc,
    time::{Duration, SystemTime},
};
use uuid::Uuid;

/// Where a call is. It only ever moves forward, and ends in exactly one of the last three.
///
/// `Display` and `FromStr` use the names in capitals: `PENDING`, `QUEUED`, …
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(rename_all = "UPPERCASE")
)]
pub enum RequestStatus {
    /// Made, and waiting for a place in the queue.
    #[default]
    Pending,
    /// Has a place in the queue.
    Queued,
    /// Taken from the queue; waiting for its limits.
    Processing,
    /// On the wire.
    Calling,
    /// Over: a response arrived. Its code says which.
    Completed,
    /// Over: an error came instead.
    Failed,
    /// Over: it was ended before it was over.
    Cancelled,
}

/// A text that is no [`RequestStatus`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParseStatusError {
    text: String,
}

/// The name of a call: a random UUID (version 4), or one of the caller's own.
///
/// As an extension of an http request it names that request's event.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct RequestId(Name);

#[derive(Clone, PartialEq, Eq, Hash)]
enum Name {
    Random(Uuid),
    Given(Arc<str>),
}

/// The record of one call, as it stands at one moment.
///
/// Secrets in URLs, headers, texts and bodies were redacted before they were recorded. Times are the process's
/// monotonic clock, snapshot in UTC: differences between the times of one event are exact, whatever is done to the system's
/// clock.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct NetworkRequestEvent {
    /// The call's name.
    pub request_id: RequestId,
    /// Where the call is.
    pub status: RequestStatus,

    /// When the call was made.
    #[cfg_attr(feature = "serde", serde(with = "super::time"))]
    pub created_at: SystemTime,
    /// When this record last changed.
    #[cfg_attr(feature = "serde", serde(with = "super::time"))]
    pub updated_at: SystemTime,
    /// When it got a place in the queue.
    #[cfg_attr(feature = "serde", serde(with = "super::time::option", default))]
    pub queued_at: Option<SystemTime>,
    /// When it was taken from the queue.
    #[cfg_attr(feature = "serde", serde(with = "super::time::option", default))]
    pub processing_started_at: Option<SystemTime>,
    /// When it first went to the wire.
    #[cfg_attr(feature = "serde", serde(with = "super::time::option", default))]
    pub call_started_at: Option<SystemTime>,
    /// When it was over, however it ended.
    #[cfg_attr(feature = "serde", serde(with = "super::time::option", default))]
    pub completed_at: Option<SystemTime>,

    /// The URL, without user info and secret query values.
    pub endpoint_url: Option<String>,
    /// The method.
    pub method: Option<String>,
    /// The request's headers; the values of secret ones are redacted.
    #[cfg_attr(feature = "serde", serde(with = "super::headers", default))]
    pub headers: HeaderMap,
    /// The request's body, if the caller gave it to be recorded.
    pub payload: Option<Value>,
    /// How many of the API's tokens it was said to need.
    pub api_tokens: u64,

    /// The response's status code.
    pub response_status_code: Option<u16>,
    /// The response's headers; the values of secret ones are redacted.
    #[cfg_attr(feature = "serde", serde(with = "super::headers", default))]
    pub response_headers: HeaderMap,
    /// The response's body, if the caller asked for it to be recorded.
    pub response_body: Option<Value>,
    /// How many of the API's tokens the response says were used.
    #[cfg_attr(feature = "serde", serde(default))]
    pub api_tokens_used: Option<u64>,

    /// When the first byte of the response's body arrived, if the body was watched: see [`body`](crate::body).
    #[cfg_attr(feature = "serde", serde(with = "super::time::option", default))]
    pub first_byte_at: Option<SystemTime>,
    /// When the last byte of it arrived that did.
    #[cfg_attr(feature = "serde", serde(with = "super::time::option", default))]
    pub last_byte_at: Option<SystemTime>,
    /// How many bytes of it there were.
    #[cfg_attr(feature = "serde", serde(default))]
    pub response_bytes: Option<u64>,

    /// The type of the error.
    pub error_type: Option<String>,
    /// What the error says.
    pub error_message: Option<String>,
    /// What caused the error: the chain of its sources, a line each; the first 128 of them, and then `…`.
    pub error_details: Option<String>,

    /// Each time the call went to the wire: one, or more if it was retried.
    pub attempts: Vec<Attempt>,
    /// What was noted along the way.
    pub logs: Vec<LogEntry>,
    /// The caller's own keys and values: a thousand at most, and under `[more]` how many there were beyond.
    pub metadata: BTreeMap<String, Value>,
}

/// One time a call went to the wire.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct Attempt {
    /// When it started.
    #[cfg_attr(feature = "serde", serde(with = "super::time"))]
    pub started_at: SystemTime,
    /// When it was over; `None` while it is not.
    #[cfg_attr(feature = "serde", serde(with = "super::time::option", default))]
    pub ended_at: Option<SystemTime>,
    /// The status code that came back.
    pub status_code: Option<u16>,
    /// The type of the error that came instead; `Cancelled` if the attempt was dropped before anything came.
    pub error_type: Option<String>,
    /// What that error says.
    pub error_message: Option<String>,
}

/// A note in an event's log.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct LogEntry {
    /// When it was noted.
    #[cfg_attr(feature = "serde", serde(with = "super::time"))]
    pub at: SystemTime,
    /// What was noted.
    pub message: String,
}

// === impl RequestStatus ===

impl RequestStatus {
    /// All seven, in order.
    pub const ALL: [Self; 7] = [
        Self::Pending,
        Self::Queued,
        Self::Processing,
        Self::Calling,
        Self::Completed,
        Self::Failed,
        Self::Cancelled,
    ];

    /// Whether the call is over.
    #[must_use]
    pub const fn is_terminal(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Cancelled)
    }

    /// The name in capitals.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "PENDING",
            Self::Queued => "QUEUED",
            Self::Processing => "PROCESSING",
            Self::Calling => "CALLING",
            Self::Completed => "COMPLETED",
            Self::Failed => "FAILED",
            Self::Cancelled => "CANCELLED",
        }
    }
}

impl fmt::Display for RequestStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for RequestStatus {
    type Err = ParseStatusError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let status = Self::ALL.into_iter().find(|status| status.as_str() == text);
        status.ok_or_else(|| ParseStatusError {
            text: text.chars().take(64).collect(),
        })
    }
}

impl fmt::Display for ParseStatusError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no request status: {:?}", self.text)
    }
}

impl std::error::Error for ParseStatusError {}

// === impl RequestId ===

impl RequestId {
    /// A random one.
    #[must_use]
    pub fn random() -> Self {
        Self(Name::Random(Uuid::new_v4()))
    }
}

/// A name is its text: one that is written as a UUID is that UUID.
impl From<&str> for RequestId {
    fn from(name: &str) -> Self {
        Self(uuid_of(name).map_or_else(|| Name::Given(name.into()), Name::Random))
    }
}

impl From<String> for RequestId {
    fn from(name: String) -> Self {
        name.as_str().into()
    }
}

impl From<Uuid> for RequestId {
    fn from(uuid: Uuid) -> Self {
        Self(Name::Random(uuid))
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Name::Random(uuid) => uuid.fmt(f),
            Name::Given(name) => name.fmt(f),
        }
    }
}

impl fmt::Debug for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

#[cfg(feature = "serde")]
impl serde::Serialize for RequestId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(feature = "serde")]
impl<'de> serde::Deserialize<'de> for RequestId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(Self::from)
    }
}

/// The UUID, if the text is just as one is written context.
fn uuid_of(text: &str) -> Option<Uuid> {
    let uuid = Uuid::try_parse(text).ok()?;
    let mut written = Uuid::encode_buffer();
    (*uuid.hyphenated().encode_lower(&mut written) == *text).then_some(uuid)
}

// === impl NetworkRequestEvent ===

impl NetworkRequestEvent {
    pub(crate) fn new(request_id: RequestId, created_at: SystemTime) -> Self {
        Self {
            request_id,
            status: RequestStatus::Pending,
            created_at,
            updated_at: created_at,
            queued_at: None,
            processing_started_at: None,
            call_started_at: None,
            completed_at: None,
            endpoint_url: None,
            method: None,
            headers: HeaderMap::new(),
            payload: None,
            api_tokens: 0,
            response_status_code: None,
            response_headers: HeaderMap::new(),
            response_body: None,
            api_tokens_used: None,
            first_byte_at: None,
            last_byte_at: None,
            response_bytes: None,
            error_type: None,
            error_message: None,
            error_details: None,
            attempts: Vec::new(),
            logs: Vec::new(),
            metadata: BTreeMap::new(),
        }
    }

    /// Whether the call is over.
    #[must_use]
    pub const fn is_terminal(&self) -> bool {
        self.status.is_terminal()
    }

    /// How long it waited for a place in the queue: `None` until it has one, or is over.
    #[must_use]
    pub fn time_pending(&self) -> Option<Duration> {
        between(Some(self.created_at), self.queued_at.or(self.completed_at))
    }

    /// How long it was in the queue: `None` until it is taken from there, or is over.
    #[must_use]
    pub fn time_in_queue(&self) -> Option<Duration> {
        between(self.queued_at, self.processing_started_at.or(self.completed_at))
    }

    /// How long it waited for its limits: `None` until it goes to the wire, or is over.
    #[must_use]
    pub fn time_waiting(&self) -> Option<Duration> {
        between(self.processing_started_at, self.call_started_at.or(self.completed_at))
    }

    /// How long the call itself took, retries and the waits between them included: `None` until it is over.
    #[must_use]
    pub fn time_calling(&self) -> Option<Duration> {
        between(self.call_started_at, self.completed_at)
    }

    /// How long it took from the wire to the first byte of the body: `None` if that was not watched.
    #[must_use]
    pub fn time_to_first_byte(&self) -> Option<Duration> {
        between(self.call_started_at, self.first_byte_at)
    }

    /// The same, to the last byte.
    #[must_use]
    pub fn time_to_last_byte(&self) -> Option<Duration> {
        between(self.call_started_at, self.last_byte_at)
    }

    /// How long everything took: `None` until it is over.
    #[must_use]
    pub fn time_total(&self) -> Option<Duration> {
        between(Some(self.created_at), self.completed_at)
    }
}

fn between(start: Option<SystemTime>, end: Option<SystemTime>) -> Option<Duration> {
    end?.duration_since(start?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn every_status_reads_what_it_writes() {
        for status in RequestStatus::ALL {
            assert_eq!(status.to_string().parse(), Ok(status));
        }
        assert_eq!("CALLING".parse(), Ok(RequestStatus::Calling));
        assert_eq!(
            "calling".parse::<RequestStatus>().unwrap_err().to_string(),
            "no request status: \"calling\""
        );
    }

    #[test]
    fn names_are_equal_when_their_texts_are() {
        let text = "67e55044-10b1-426f-9247-bb680e5fe0c8";
        let uuid = RequestId::from(text.parse::<Uuid>().unwrap());
        assert_eq!(RequestId::from(text), uuid);
        assert!(HashSet::from([uuid.clone()]).contains(&RequestId::from(text.to_owned())));
        // Another text for the same UUID is another name, and stays as it is.
        for other in [text.to_uppercase(), text.replace('-', ""), format!("{{{text}}}")] {
            let id = RequestId::from(other.as_str());
            assert_eq!(id.to_string(), other);
            assert_ne!(id, uuid);
        }
    }

    #[test]
    fn three_statuses_are_the_end() {
        let ends: Vec<_> = RequestStatus::ALL
            .into_iter()
            .filter(|status| status.is_terminal())
            .collect();
        assert_eq!(
            ends,
            [
                RequestStatus::Completed,
                RequestStatus::Failed,
                RequestStatus::Cancelled
            ]
        );
    }
}
