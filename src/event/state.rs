//! [`EventState`]: the compact form in which an event is kept in memory, during its call and afterwards.
//!
//! A million events may wait in a queue, and each event is written about six times. So an [`EventState`] is small: its
//! times are `Instant`s, and the fields that most calls do not use are in a box. A [`NetworkRequestEvent`] is built
//! from the state only when a snapshot of the event is taken through a handle.

use super::{
    attempt::{AttemptStart, AttemptState, attempt_number},
    change::{AttemptEnd, CallEnd},
    details::{ErrorDetails, RequestDetails, ResponseDetails},
    record::{LogEntry, NetworkRequestEvent},
    request_id::RequestId,
    status::RequestStatus,
    time::Anchor,
    value::{Value, redacted_fields},
    wait::{Wait, WaitCause, Waits},
};
use crate::{
    redact::{self, UnredactedHeaders},
    tokens::TokenUsage,
};
use http::{HeaderMap, Method, Uri};
use std::{mem, task::Waker, time::Duration};
use tokio::time::Instant;
use tracing::Span;

pub(super) struct EventState {
    pub(super) status: RequestStatus,
    pub(super) request: RequestDetails,
    opened: Instant,
    /// Converts the event's times to UTC.
    anchor: Anchor,
    queued: Option<Instant>,
    processing: Option<Instant>,
    calling: Option<Instant>,
    completed: Option<Instant>,
    response_status_code: Option<u16>,
    response_headers: UnredactedHeaders,
    first_attempt: Option<AttemptState>,
    extra: Option<Box<EventExtra>>,
    /// The number of changes so far. A handle compares it with the number that it has seen, to find out whether the
    /// event has changed.
    pub(super) version: u32,
    /// Whether the caller has cancelled the call, so that the outcome will be CANCELLED, whatever the call returns.
    is_cancelled: bool,
    /// Whether no further attempt may start, because the call is to end with those that are on the wire.
    refuses_attempts: bool,
    /// The call's tracing span. It is taken out when the outcome is written, so that the span closes even if a handle
    /// keeps the event.
    span: Option<Box<Span>>,
}

/// The fields of an event that most calls do not use.
#[derive(Default)]
struct EventExtra {
    /// The waits of the layers: not those for a place and for a turn, which are the times between the statuses.
    waits: Waits,
    /// The second and all further attempts of a call that is retried.
    later_attempts: Vec<AttemptState>,
    /// When a note, a metadata key or the response's body was last added to the event.
    last_noted: Option<Instant>,
    /// The response's body, not redacted.
    response_body: Option<Value>,
    token_usage: Option<TokenUsage>,
    body_progress: Option<BodyProgress>,
    error: Option<Box<ErrorDetails>>,
    /// The type name of the error that the client is returning in a box. It is set by the code that boxes the error,
    /// because the box hides the type.
    error_type: Option<&'static str>,
    logs: Vec<(Instant, String)>,
    /// The tasks that wait for a change of the event: the key of each, and its waker.
    watchers: Vec<(u64, Waker)>,
    /// The key of the next task that waits.
    next_watcher: u64,
}

/// How many bytes of the response's body have arrived, and when the first and the last of them did.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct BodyProgress {
    pub(crate) first: Option<Instant>,
    pub(crate) last: Option<Instant>,
    pub(crate) count: u64,
}

/// What has to be done after an event has ended, besides what is written to its state.
pub(super) struct Ended {
    pub(super) status: RequestStatus,
    /// The indices of the attempts that were still on the wire, and are closed now.
    pub(super) closed_attempts: Vec<usize>,
    /// The call's span, in which the outcome is to be recorded too.
    pub(super) span: Option<Box<Span>>,
}

/// A copy of an event that is not redacted yet, and so must not be shown.
pub(super) struct Copied {
    /// The record. Its URL, method and headers are missing; its body, metadata and response's body may have secrets.
    event: NetworkRequestEvent,
    method: Option<Method>,
    url: Option<Uri>,
    headers: UnredactedHeaders,
    response_headers: UnredactedHeaders,
}

/// How a call ended.
pub(crate) enum Outcome {
    Response(ResponseDetails),
    Error(Box<ErrorDetails>),
    Cancelled,
}

/// The number of notes that an event keeps. If more are added, the last one is replaced by the number of notes that are
/// not kept, including the replaced one.
const MAX_LOGS: usize = 1_000;

// === impl EventState ===

impl EventState {
    #[inline]
    pub(super) fn new(now: Instant) -> Self {
        let anchor = Anchor::at(now);
        Self {
            status: RequestStatus::Pending,
            request: RequestDetails::default(),
            opened: now,
            anchor,
            queued: None,
            processing: None,
            calling: None,
            completed: None,
            response_status_code: None,
            response_headers: UnredactedHeaders::default(),
            first_attempt: None,
            extra: None,
            version: 0,
            is_cancelled: false,
            refuses_attempts: false,
            span: None,
        }
    }

    /// Opens the call's tracing span. Returns `None` if no tracing subscriber records the span.
    pub(super) fn open_span(&mut self) -> Option<Box<Span>> {
        self.span = Some(self.request.span())
            .filter(|span| !span.is_disabled())
            .map(Box::new);
        self.span.clone()
    }

    /// Returns the call's id. A random id is generated only when it is first needed, since most events are never read.
    pub(super) fn request_id(&mut self) -> &RequestId {
        self.request.request_id.get_or_insert_with(RequestId::random)
    }

    /// Sets the status, unless the event has the same or a later one: a status never moves back. Returns whether the
    /// status has changed.
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

    /// Returns what the call has waited for. The waits for a place and for a turn are the times between its statuses, which
    /// every call has, so that they are not written twice. They are known once they are over.
    fn waits(&self) -> Vec<Wait> {
        let began = self.processing.or(self.calling);
        let place = match began {
            None => self.queued.or(self.completed),
            Some(_) => self.queued,
        };
        let turn = self.queued.zip(began.or(self.completed));
        let mut waits = Waits::default();
        waits.add(
            WaitCause::Place,
            place.map_or(Duration::ZERO, |end| end.duration_since(self.opened)),
        );
        waits.add(
            WaitCause::Turn,
            turn.map_or(Duration::ZERO, |(since, end)| end.duration_since(since)),
        );
        for wait in self.layer_waits() {
            waits.add(wait.cause, wait.duration);
        }
        waits.into_vec()
    }

    /// Adds a wait of the call, unless it has ended.
    pub(super) fn add_wait(&mut self, cause: WaitCause, duration: Duration) {
        if !self.status.is_terminal() && !duration.is_zero() {
            self.extra().waits.add(cause, duration);
        }
    }

    fn layer_waits(&self) -> &[Wait] {
        self.extra.as_ref().map_or(&[], |extra| extra.waits.as_slice())
    }

    /// Returns how long the call has waited at its layers in all.
    pub(super) fn time_waited(&self) -> Duration {
        self.layer_waits().iter().map(|wait| wait.duration).sum()
    }

    /// Adds an attempt, and moves the status forward to CALLING. Returns whether the status has changed.
    pub(super) fn attempt_started(&mut self, now: Instant) -> (bool, AttemptStart) {
        if self.status.is_terminal() {
            return (false, AttemptStart::Ended);
        }
        if self.refuses_attempts {
            return (false, AttemptStart::Refused);
        }
        let has_changed = self.mark(RequestStatus::Calling, now);
        let attempt = AttemptState::new(now);
        if self.first_attempt.is_none() {
            self.first_attempt = Some(attempt);
            return (has_changed, AttemptStart::Started(0));
        }
        let later_attempts = &mut self.extra().later_attempts;
        later_attempts.push(attempt);
        (has_changed, AttemptStart::Started(later_attempts.len()))
    }

    /// Records the status of the response to the last attempt, whose head has arrived before the attempt has ended. If
    /// the attempt ends without a response, because its body fails or a deadline ends it, this status is kept.
    #[cfg(feature = "http")]
    pub(super) fn head_arrived(&mut self, status_code: u16) {
        let later = self.extra.as_mut().and_then(|extra| extra.later_attempts.last_mut());
        if let Some(attempt) = later.or(self.first_attempt.as_mut()) {
            attempt.status_code = Some(status_code);
        }
    }

    /// Records what an attempt returned. `result` is `None` if the attempt was dropped before it returned. Returns false
    /// and changes nothing if the attempt has ended already: the end of an event closes its attempts.
    pub(super) fn attempt_ended(
        &mut self,
        index: usize,
        result: Option<&Result<ResponseDetails, Box<ErrorDetails>>>,
        now: Instant,
    ) -> bool {
        let error_type = self.take_error_type();
        let Some(attempt) = self.attempt_mut(index).filter(|attempt| attempt.ended.is_none()) else {
            return false;
        };
        attempt.ended = Some(now);
        match result {
            Some(Ok(response)) => attempt.status_code = response.status_code,
            Some(Err(error)) => {
                let kind = error_type
                    .filter(|_| error.kind_is_guess)
                    .map_or_else(|| error.kind.clone(), str::to_owned);
                attempt.status_code = error.response.status_code.or(attempt.status_code);
                attempt.error = Some(Box::new((kind, Some(error.message.clone()))));
            }
            None => attempt.set_cancelled(),
        }
        true
    }

    /// Makes the event end as CANCELLED, whatever the call returns.
    #[cfg(feature = "http")]
    pub(super) fn cancel(&mut self) {
        self.is_cancelled = true;
    }

    /// Refuses further attempts. Returns whether the call may still finish: an attempt is on the wire, the last one has
    /// succeeded, so that nothing but its response is waited for, or the event has ended.
    pub(super) fn finish_attempts(&mut self) -> bool {
        self.refuses_attempts = true;
        self.status.is_terminal() || self.is_on_wire() || self.last_attempt().is_some_and(AttemptState::has_succeeded)
    }

    /// Makes the event end as CANCELLED, whatever the call returns, unless an attempt is on the wire. Returns whether it
    /// will.
    pub(super) fn cancel_refused(&mut self) -> bool {
        self.is_cancelled |= !self.is_on_wire();
        self.is_cancelled
    }

    fn is_on_wire(&self) -> bool {
        self.attempts().any(|attempt| attempt.ended.is_none())
    }

    /// Records how the call ended, and closes the attempts that are still open. If the event has ended before, returns
    /// `None` and leaves the record as it is.
    pub(super) fn finish(&mut self, mut outcome: Outcome, now: Instant) -> Option<Ended> {
        let error_type = self.take_error_type();
        if self.status.is_terminal() {
            return None;
        }
        if self.is_cancelled {
            outcome = Outcome::Cancelled;
        }
        let closed_attempts = self.close_attempts(now);
        self.status = outcome.status();
        self.completed = Some(now);
        match outcome {
            Outcome::Response(response) => {
                self.response_status_code = response.status_code;
                self.response_headers = response.headers;
                if let Some(response) = response.extra {
                    let extra = self.extra();
                    // A body that was set through the handle earlier is kept, unless the response has one to record.
                    if response.body.is_some() {
                        extra.response_body = response.body;
                    }
                    extra.token_usage = response.token_usage;
                    extra.error = response.failure;
                }
            }
            Outcome::Error(mut error) => {
                if error.kind_is_guess {
                    // The error's type is a guess, because a layer boxed the error. If the error of the last attempt
                    // has the same message, it is the same error, and the event layer around the client may have
                    // recorded its type before it was boxed: so the type is taken from the last attempt.
                    let last = self.last_attempt().and_then(|last| last.error.as_deref());
                    let kind = last
                        .filter(|(_, message)| message.as_ref() == Some(&error.message))
                        .map(|(kind, _)| kind.clone())
                        .or_else(|| error_type.map(str::to_owned));
                    error.kind = kind.unwrap_or(error.kind);
                }
                let response = mem::take(&mut error.response);
                self.response_status_code = response.status_code;
                self.response_headers = response.headers;
                let extra = self.extra();
                extra.token_usage = response.extra.and_then(|response| response.token_usage);
                extra.error = Some(error);
            }
            Outcome::Cancelled => {}
        }
        Some(Ended {
            status: self.status,
            closed_attempts,
            span: self.span.take(),
        })
    }

    /// Closes the attempts that are still on the wire as cancelled. Returns their indices.
    fn close_attempts(&mut self, now: Instant) -> Vec<usize> {
        let mut closed = Vec::new();
        let later = self.extra.iter_mut().flat_map(|extra| &mut extra.later_attempts);
        for (index, attempt) in self.first_attempt.iter_mut().chain(later).enumerate() {
            if attempt.ended.is_none() {
                attempt.ended = Some(now);
                attempt.set_cancelled();
                closed.push(index);
            }
        }
        closed
    }

    /// Returns how an attempt has ended. `None` if it has not.
    pub(super) fn attempt_end(&self, index: usize) -> Option<AttemptEnd> {
        self.attempts().nth(index)?.end(attempt_number(index))
    }

    /// Returns how the call has ended, once it has.
    pub(super) fn call_end(&self) -> CallEnd {
        let (status_code, error_type) = self.outcome();
        let extra = self.extra.as_ref();
        let first_byte = extra.and_then(|extra| extra.body_progress?.first);
        CallEnd {
            status: self.status,
            duration: self.completed.unwrap_or(self.opened).duration_since(self.opened),
            status_code,
            error_type,
            is_deadline_exceeded: extra
                .and_then(|extra| extra.error.as_ref())
                .is_some_and(|error| error.is_deadline_exceeded),
            attempts: self.attempts().count().try_into().unwrap_or(u32::MAX),
            waits: self.waits(),
            tokens: extra.and_then(|extra| extra.token_usage),
            time_to_first_byte: first_byte
                .zip(self.calling)
                .map(|(byte, call)| byte.duration_since(call)),
        }
    }

    /// Returns the status code of the response and the type of the error with which the call ended.
    pub(super) fn outcome(&self) -> (Option<u16>, Option<String>) {
        let error = self.extra.as_ref().and_then(|extra| extra.error.as_ref());
        (self.response_status_code, error.map(|error| error.kind.clone()))
    }

    pub(super) fn log(&mut self, message: String, now: Instant) {
        let extra = self.extra();
        extra.last_noted = Some(now);
        if extra.logs.len() < MAX_LOGS {
            extra.logs.push((now, message));
        } else if let Some((at, last)) = extra.logs.last_mut() {
            let count = last
                .strip_suffix(" more")
                .and_then(|count| count.parse().ok())
                .unwrap_or(1_u64);
            (*at, *last) = (now, format!("{} more", count + 1));
        }
    }

    pub(super) fn set_metadata(&mut self, key: String, value: Value, now: Instant) {
        self.extra().last_noted = Some(now);
        self.request.metadata([(key, value)].into());
    }

    pub(super) fn set_response_body(&mut self, body: Value, now: Instant) {
        let extra = self.extra();
        extra.last_noted = Some(now);
        extra.response_body = Some(body);
    }

    /// Records how much of the response's body has arrived. This replaces what was recorded for an earlier attempt.
    #[cfg(feature = "http")]
    pub(super) fn set_body_progress(&mut self, progress: BodyProgress, now: Instant) {
        let extra = self.extra();
        extra.last_noted = Some(now);
        extra.body_progress = Some(progress);
    }

    pub(super) fn set_error_type(&mut self, name: &'static str) {
        self.extra().error_type = Some(name);
    }

    fn take_error_type(&mut self) -> Option<&'static str> {
        self.extra.as_mut().and_then(|extra| extra.error_type.take())
    }

    /// Registers the waker of a task that waits for the next change of the event, under the key that the task got when
    /// it registered before. Returns the task's key, and a replaced waker, which the caller drops after it has released
    /// the lock.
    pub(super) fn watch(&mut self, key: Option<u64>, waker: &Waker) -> (u64, Option<Waker>) {
        let extra = self.extra();
        if let Some((key, watcher)) = extra.watchers.iter_mut().find(|(other, _)| Some(*other) == key) {
            let replaced = (!watcher.will_wake(waker)).then(|| mem::replace(watcher, waker.clone()));
            return (*key, replaced);
        }
        let key = extra.next_watcher;
        extra.next_watcher += 1;
        extra.watchers.push((key, waker.clone()));
        (key, None)
    }

    /// Removes the waker of a task that no longer waits. The caller drops it after it has released the lock.
    pub(super) fn unwatch(&mut self, key: u64) -> Option<Waker> {
        let watchers = &mut self.extra.as_mut()?.watchers;
        let at = watchers.iter().position(|(other, _)| *other == key)?;
        Some(watchers.swap_remove(at).1)
    }

    /// Takes the wakers of the tasks that wait for a change of the event. `None` if no task waits.
    #[inline]
    pub(super) fn take_watchers(&mut self) -> Option<Vec<(u64, Waker)>> {
        let extra = self.extra.as_mut().filter(|extra| !extra.watchers.is_empty())?;
        Some(mem::take(&mut extra.watchers))
    }

    /// Copies the event. What the copy contains is redacted and formatted later, by [`Copied::redacted`], when the
    /// caller has released the lock.
    pub(super) fn snapshot(&mut self) -> Copied {
        let request_id = self.request_id().clone();
        let utc = |instant: Instant| self.anchor.utc(instant);
        let extra = self.extra.as_deref();
        let request = self.request.extra.as_deref();
        let error = extra.and_then(|extra| extra.error.as_ref());
        let body_progress = extra.and_then(|extra| extra.body_progress);
        let logs = extra.iter().flat_map(|extra| &extra.logs);
        let usage = extra.and_then(|extra| extra.token_usage);
        let event = NetworkRequestEvent {
            request_id,
            status: self.status,
            created_at: utc(self.opened),
            updated_at: utc(self.updated()),
            queued_at: self.queued.map(utc),
            processing_started_at: self.processing.map(utc),
            call_started_at: self.calling.map(utc),
            completed_at: self.completed.map(utc),
            endpoint_url: None,
            method: None,
            headers: HeaderMap::new(),
            payload: request.and_then(|request| request.payload.clone()),
            api_tokens: self.request.api_tokens,
            response_status_code: self.response_status_code,
            response_headers: HeaderMap::new(),
            response_body: extra.and_then(|extra| extra.response_body.clone()),
            api_tokens_used: usage.and_then(|usage| usage.counted()),
            input_tokens_used: usage.and_then(|usage| usage.input),
            output_tokens_used: usage.and_then(|usage| usage.output),
            cached_tokens: usage.and_then(|usage| usage.cached_input),
            reasoning_tokens: usage.and_then(|usage| usage.reasoning),
            first_byte_at: body_progress.and_then(|progress| progress.first).map(utc),
            last_byte_at: body_progress.and_then(|progress| progress.last).map(utc),
            response_bytes: body_progress.map(|progress| progress.count),
            error_type: error.map(|error| error.kind.clone()),
            error_message: error.map(|error| error.message.clone()),
            error_details: error.and_then(|error| error.sources.clone()),
            attempts: self.attempts().map(|attempt| attempt.snapshot(utc)).collect(),
            waits: self.waits(),
            logs: logs
                .map(|(at, message)| LogEntry {
                    at: utc(*at),
                    message: message.clone(),
                })
                .collect(),
            metadata: request.map(|request| request.metadata.0.clone()).unwrap_or_default(),
        };
        Copied {
            event,
            method: self.request.method.clone(),
            url: self.request.url.clone(),
            headers: self.request.headers.clone(),
            response_headers: self.response_headers.clone(),
        }
    }

    /// When the status, an attempt, a note, the metadata or the response's body last changed.
    fn updated(&self) -> Instant {
        let last_noted = self.extra.as_ref().and_then(|extra| extra.last_noted);
        let attempts = self
            .attempts()
            .flat_map(|attempt| [Some(attempt.started), attempt.ended]);
        [self.queued, self.processing, self.calling, self.completed, last_noted]
            .into_iter()
            .chain(attempts)
            .flatten()
            .fold(self.opened, Instant::max)
    }

    fn attempts(&self) -> impl Iterator<Item = &AttemptState> {
        let later = self.extra.iter().flat_map(|extra| &extra.later_attempts);
        self.first_attempt.iter().chain(later)
    }

    fn last_attempt(&self) -> Option<&AttemptState> {
        let later = self.extra.as_ref().and_then(|extra| extra.later_attempts.last());
        later.or(self.first_attempt.as_ref())
    }

    fn attempt_mut(&mut self, index: usize) -> Option<&mut AttemptState> {
        match index.checked_sub(1) {
            None => self.first_attempt.as_mut(),
            Some(later) => self.extra.as_mut()?.later_attempts.get_mut(later),
        }
    }

    fn extra(&mut self) -> &mut EventExtra {
        self.extra.get_or_insert_default()
    }
}

// === impl Copied ===

impl Copied {
    /// Returns the record without secrets.
    pub(super) fn redacted(self) -> NetworkRequestEvent {
        NetworkRequestEvent {
            endpoint_url: self.url.as_ref().map(redact::uri),
            method: self.method.map(|method| method.as_str().to_owned()),
            headers: self.headers.redacted(),
            payload: self.event.payload.map(Value::redacted),
            response_headers: self.response_headers.redacted(),
            response_body: self.event.response_body.map(Value::redacted),
            metadata: redacted_fields(self.event.metadata),
            ..self.event
        }
    }
}

// === impl Outcome ===

impl Outcome {
    pub(super) fn status(&self) -> RequestStatus {
        match self {
            Self::Response(response) if !response.is_failure() => RequestStatus::Completed,
            Self::Response(_) | Self::Error(_) => RequestStatus::Failed,
            Self::Cancelled => RequestStatus::Cancelled,
        }
    }
}
