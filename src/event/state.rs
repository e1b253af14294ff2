//! [`State`]: an event while its call goes on.
//!
//! A million of them may wait in a queue, and each is written to half a dozen times: so it is small, keeps instants for
//! times, and has what most calls never have in boxes. A [`NetworkRequestEvent`] is made of it when somebody looks.

use super::{
    describe::{ErrorDetails, RequestDetails, ResponseDetails},
    record::{Attempt, LogEntry, NetworkRequestEvent, RequestId, RequestStatus},
    utc::utc,
    value::Value,
};
use http::{HeaderMap, Method, Uri};
use std::{collections::BTreeMap, mem, task::Waker, time::SystemTime};
use tokio::time::Instant;
use tracing::Span;

pub(super) struct State {
    pub(super) status: RequestStatus,
    pub(super) request: RequestDetails,
    created_at: SystemTime,
    opened: Instant,
    queued: Option<Instant>,
    processing: Option<Instant>,
    calling: Option<Instant>,
    completed: Option<Instant>,
    response_status_code: Option<u16>,
    first_attempt: Option<AttemptState>,
    rest: Option<Box<Rest>>,
    pub(super) version: u64,
    /// Until the outcome is there, so that a handle that is kept does not keep the span open.
    span: Option<Box<Span>>,
}

/// What most calls never have.
#[derive(Default)]
struct Rest {
    /// After the first.
    later_attempts: Vec<AttemptState>,
    /// When something was noted last.
    touched: Option<Instant>,
    response_headers: HeaderMap,
    response_body: Option<Value>,
    api_tokens_used: Option<u64>,
    bytes: Option<BodyProgress>,
    error: Option<ErrorDetails>,
    /// The type of the error that is just coming back, if whoever made the call could tell.
    error_type: Option<&'static str>,
    logs: Vec<(Instant, String)>,
    /// Those who wait for a change.
    watchers: Vec<Waker>,
}

/// What came of the response's body, and when.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct BodyProgress {
    pub(crate) first: Option<Instant>,
    pub(crate) last: Option<Instant>,
    pub(crate) count: u64,
}

/// One time on the wire.
struct AttemptState {
    started: Instant,
    ended: Option<Instant>,
    status_code: Option<u16>,
    /// The error's type, and what it says.
    error: Option<Box<(String, Option<String>)>>,
}

/// How a call ended.
pub(crate) enum Outcome {
    Response(ResponseDetails),
    Error(ErrorDetails),
    Cancelled,
}

/// The number of notes an event keeps; later ones are counted in the last of them.
const MOST_LOGS: usize = 1_000;

impl State {
    #[inline]
    pub(super) fn new(now: Instant) -> Self {
        Self {
            status: RequestStatus::Pending,
            request: RequestDetails::default(),
            created_at: utc(now),
            opened: now,
            queued: None,
            processing: None,
            calling: None,
            completed: None,
            response_status_code: None,
            first_attempt: None,
            rest: None,
            version: 0,
            span: None,
        }
    }

    /// The span, if anybody listens.
    pub(super) fn open_span(&mut self) -> Option<Box<Span>> {
        self.span = Some(self.request.span())
            .filter(|span| !span.is_disabled())
            .map(Box::new);
        self.span.clone()
    }

    /// A random one is only made for those who look.
    pub(super) fn request_id(&mut self) -> &RequestId {
        self.request.request_id.get_or_insert_with(RequestId::random)
    }

    /// Moves the status forward; never back. Returns whether it has moved.
    pub(super) fn mark(&mut self, status: RequestStatus, now: Instant) -> bool {
        if self.status >= status {
            return false;
        }
        self.status = status;
        match status {
            RequestStatus::Queued => self.queued = Some(now),
            RequestStatus::Processing => self.processing = Some(now),
            RequestStatus::Calling => self.calling = Some(now),
            _ => {}
        }
        true
    }

    /// Returns whether it is the first one, and its number.
    pub(super) fn attempt_started(&mut self, now: Instant) -> (bool, usize) {
        let first = self.mark(RequestStatus::Calling, now);
        let attempt = AttemptState {
            started: now,
            ended: None,
            status_code: None,
            error: None,
        };
        if self.first_attempt.is_none() {
            self.first_attempt = Some(attempt);
            return (first, 0);
        }
        let later_attempts = &mut self.rest().later_attempts;
        later_attempts.push(attempt);
        (first, later_attempts.len())
    }

    /// What came back from the wire; `None`: nothing, the attempt was dropped.
    pub(super) fn attempt_ended(
        &mut self,
        index: usize,
        came_back: Option<&Result<ResponseDetails, ErrorDetails>>,
        now: Instant,
    ) {
        let snapshot = self.rest.as_mut().and_then(|rest| rest.error_type.take());
        let attempt = match index {
            0 => self.first_attempt.as_mut(),
            later => self
                .rest
                .as_mut()
                .and_then(|rest| rest.later_attempts.get_mut(later - 1)),
        };
        let Some(attempt) = attempt else { return };
        attempt.ended = Some(now);
        match came_back {
            Some(Ok(response)) => attempt.status_code = response.status_code,
            Some(Err(error)) => {
                let kind = snapshot
                    .filter(|_| !error.kind_is_known)
                    .map_or_else(|| error.kind.clone(), str::to_owned);
                attempt.error = Some(Box::new((kind, Some(error.message.clone()))));
            }
            None => attempt.error = Some(Box::new(("Cancelled".to_owned(), None))),
        }
    }

    /// Writes how the call ended, and returns the span, if that has not been done yet.
    pub(super) fn finish(&mut self, outcome: Outcome, now: Instant) -> Option<Option<Box<Span>>> {
        let snapshot = self.rest.as_mut().and_then(|rest| rest.error_type.take());
        if self.status.is_terminal() {
            return None;
        }
        self.status = outcome.status();
        self.completed = Some(now);
        match outcome {
            Outcome::Response(response) => {
                self.response_status_code = response.status_code;
                if let Some(more) = response.rest {
                    let rest = self.rest();
                    rest.response_headers = more.headers;
                    if more.body.is_some() {
                        rest.response_body = more.body;
                    }
                    rest.api_tokens_used = more.api_tokens_used;
                    rest.error = more.failure;
                }
            }
            Outcome::Error(mut error) => {
                if !error.kind_is_known {
                    // Nearer to the wire the type was still known.
                    let wire = self.last_attempt().and_then(|last| last.error.as_deref());
                    let kind = wire
                        .filter(|(_, message)| message.as_ref() == Some(&error.message))
                        .map(|(kind, _)| kind.clone())
                        .or_else(|| snapshot.map(str::to_owned));
                    error.kind = kind.unwrap_or(error.kind);
                }
                self.rest().error = Some(error);
            }
            Outcome::Cancelled => {}
        }
        Some(self.span.take())
    }

    pub(super) fn log(&mut self, message: String, now: Instant) {
        let rest = self.rest();
        rest.touched = Some(now);
        if rest.logs.len() < MOST_LOGS {
            rest.logs.push((now, message));
        } else if let Some((at, last)) = rest.logs.last_mut() {
            let more = last
                .strip_suffix(" more")
                .and_then(|count| count.parse().ok())
                .unwrap_or(1_u64);
            (*at, *last) = (now, format!("{} more", more + 1));
        }
    }

    pub(super) fn set_metadata(&mut self, fields: BTreeMap<String, Value>, now: Instant) {
        self.rest().touched = Some(now);
        self.request.rest().keep(fields);
    }

    pub(super) fn set_response_body(&mut self, body: Value, now: Instant) {
        let rest = self.rest();
        rest.touched = Some(now);
        rest.response_body = Some(body);
    }

    /// Of the last attempt that had any.
    #[cfg(feature = "http")]
    pub(super) fn set_body_progress(&mut self, bytes: BodyProgress) {
        self.rest().bytes = Some(bytes);
    }

    pub(super) fn set_error_type(&mut self, name: &'static str) {
        self.rest().error_type = Some(name);
    }

    /// Wakes this one at the next change. A task that comes again before there was one is there already.
    pub(super) fn watch(&mut self, waker: &Waker) {
        let watchers = &mut self.rest().watchers;
        if !watchers.iter().any(|watcher| watcher.will_wake(waker)) {
            watchers.push(waker.clone());
        }
    }

    pub(super) fn take_watchers(&mut self) -> Option<Vec<Waker>> {
        self.rest.as_mut().map(|rest| mem::take(&mut rest.watchers))
    }

    /// The record as it stands; the method and the URL as they came, to be snapshot without the lock.
    pub(super) fn snapshot(&mut self) -> (NetworkRequestEvent, Option<Method>, Option<Uri>) {
        let request_id = self.request_id().clone();
        let utc = |instant: Instant| self.created_at + instant.saturating_duration_since(self.opened);
        let rest = self.rest.as_deref();
        let request = self.request.rest.as_deref();
        let error = rest.and_then(|rest| rest.error.as_ref());
        let bytes = rest.and_then(|rest| rest.bytes);
        let later_attempts = self
            .first_attempt
            .iter()
            .chain(rest.iter().flat_map(|rest| &rest.later_attempts));
        let event = NetworkRequestEvent {
            status: self.status,
            created_at: self.created_at,
            updated_at: utc(self.updated()),
            queued_at: self.queued.map(utc),
            processing_started_at: self.processing.map(utc),
            call_started_at: self.calling.map(utc),
            completed_at: self.completed.map(utc),
            headers: request.map(|rest| rest.headers.clone()).unwrap_or_default(),
            payload: request.and_then(|rest| rest.payload.clone()),
            api_tokens: self.request.api_tokens,
            response_status_code: self.response_status_code,
            response_headers: rest.map(|rest| rest.response_headers.clone()).unwrap_or_default(),
            response_body: rest.and_then(|rest| rest.response_body.clone()),
            api_tokens_used: rest.and_then(|rest| rest.api_tokens_used),
            first_byte_at: bytes.and_then(|bytes| bytes.first).map(utc),
            last_byte_at: bytes.and_then(|bytes| bytes.last).map(utc),
            response_bytes: bytes.map(|bytes| bytes.count),
            error_type: error.map(|error| error.kind.clone()),
            error_message: error.map(|error| error.message.clone()),
            error_details: error.and_then(|error| error.details.clone()),
            attempts: later_attempts.map(|attempt| attempt.snapshot(utc)).collect(),
            logs: rest
                .iter()
                .flat_map(|rest| &rest.logs)
                .map(|(at, message)| LogEntry {
                    at: utc(*at),
                    message: message.clone(),
                })
                .collect(),
            metadata: request.map(|rest| rest.metadata.clone()).unwrap_or_default(),
            ..NetworkRequestEvent::new(request_id, self.created_at)
        };
        (event, self.request.method.clone(), self.request.url.clone())
    }

    fn updated(&self) -> Instant {
        let rest = self.rest.as_deref();
        let later_attempts = self
            .first_attempt
            .iter()
            .chain(rest.iter().flat_map(|rest| &rest.later_attempts));
        let times = [
            self.queued,
            self.processing,
            self.calling,
            self.completed,
            rest.and_then(|rest| rest.touched),
        ];
        times
            .into_iter()
            .chain(later_attempts.flat_map(|attempt| [Some(attempt.started), attempt.ended]))
            .flatten()
            .fold(self.opened, Instant::max)
    }

    fn last_attempt(&self) -> Option<&AttemptState> {
        let later = self.rest.as_ref().and_then(|rest| rest.later_attempts.last());
        later.or(self.first_attempt.as_ref())
    }

    fn rest(&mut self) -> &mut Rest {
        self.rest.get_or_insert_default()
    }
}

impl Outcome {
    pub(super) fn status(&self) -> RequestStatus {
        match self {
            Self::Response(response) if !response.is_failure() => RequestStatus::Completed,
            Self::Response(_) | Self::Error(_) => RequestStatus::Failed,
            Self::Cancelled => RequestStatus::Cancelled,
        }
    }
}

impl AttemptState {
    fn snapshot(&self, utc: impl Fn(Instant) -> SystemTime) -> Attempt {
        let (error_type, error_message) = match self.error.as_deref() {
            Some((kind, message)) => (Some(kind.clone()), message.clone()),
            None => (None, None),
        };
        Attempt {
            started_at: utc(self.started),
            ended_at: self.ended.map(utc),
            status_code: self.status_code,
            error_type,
            error_message,
        }
    }
}
