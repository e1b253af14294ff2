//! Who may write an event, and who watches it: [`Writer`] and [`EventHandle`].

use super::{
    clock::utc,
    describe::{ErrorDetails, RequestDetails, ResponseDetails},
    hub::Events,
    record::{Attempt, LogEntry, NetworkRequestEvent, RequestId, RequestStatus},
    scope::Stage,
    value::{Value, redacted_fields},
};
use crate::{error::BoxError, redact};
use http::{Method, Uri};
use std::{
    any::type_name,
    fmt,
    future::poll_fn,
    mem,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Poll, Waker},
    thread,
    time::SystemTime,
};
use tokio::time::Instant;
use tracing::Span;

/// A view of one call's event while it happens, and afterwards. Cheap to clone; it keeps nothing but the event alive.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # use tower_outbound::{Call, Executor, RequestStatus};
/// # let executor = Executor::builder().build_for_closures::<String>()?;
/// # executor.start()?;
/// let call = executor.submit(Call::new(|| async { Ok::<_, std::io::Error>((200, String::from("hello"))) })).await?;
/// let event = call.event().clone();
///
/// assert_eq!(event.finished().await.status, RequestStatus::Completed);
/// assert_eq!(event.snapshot().response_status_code, Some(200));
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct EventHandle {
    shared: Arc<Shared>,
    /// How far in the stack this handle was taken: see [`scope`](super::scope).
    stage: Stage,
    /// The version that `changed` has seen.
    seen: u64,
}

/// The right to end an event. When the last one is dropped and there was no outcome, there will be none: the call was
/// cancelled, or it panicked.
pub(crate) struct Writer {
    handle: EventHandle,
}

struct Shared {
    state: Mutex<State>,
    writers: AtomicUsize,
    events: Option<Events>,
}

struct State {
    /// All but the method and the URL, which are told from those below when somebody looks.
    event: NetworkRequestEvent,
    method: Option<Method>,
    url: Option<Uri>,
    opened: Instant,
    version: u64,
    /// Those who wait for a change.
    watchers: Vec<Waker>,
    /// The type of the error that is just coming back, if whoever made the call could tell.
    error_type: Option<&'static str>,
    /// Until the outcome is there, so that a handle that is kept does not keep the span open.
    span: Span,
}

/// How a call ended.
pub(crate) enum Outcome {
    Response(ResponseDetails),
    Error(ErrorDetails),
    Cancelled,
}

/// The number of notes an event keeps; later ones are counted in the last of them.
const MOST_LOGS: usize = 1_000;

// === impl EventHandle ===

impl EventHandle {
    /// The record as it stands now.
    #[must_use]
    pub fn snapshot(&self) -> NetworkRequestEvent {
        let (mut event, method, url) = {
            let state = self.lock();
            (state.event.clone(), state.method.clone(), state.url.clone())
        };
        event.method = method.map(|method| method.as_str().to_owned());
        event.endpoint_url = url.map(|url| redact::uri(&url));
        event
    }

    /// Where the call is now.
    #[must_use]
    pub fn status(&self) -> RequestStatus {
        self.lock().event.status
    }

    /// The call's name.
    #[must_use]
    pub fn request_id(&self) -> RequestId {
        self.lock().event.request_id.clone()
    }

    /// Waits until the record has changed since this handle was made or last asked, and returns the status. Once the
    /// call is over, at once.
    ///
    /// Changes in quick succession may be seen as one.
    ///
    /// # Cancel safety
    ///
    /// Nothing is lost: a change that was not returned is returned the next time.
    pub async fn changed(&mut self) -> RequestStatus {
        poll_fn(|cx| {
            let mut state = self.shared.lock();
            if state.version == self.seen && !state.event.is_terminal() {
                // A task that comes again before there was a change is there already.
                if !state.watchers.iter().any(|watcher| watcher.will_wake(cx.waker())) {
                    state.watchers.push(cx.waker().clone());
                }
                return Poll::Pending;
            }
            self.seen = state.version;
            Poll::Ready(state.event.status)
        })
        .await
    }

    /// Waits until the call is over, and returns its record.
    ///
    /// # Cancel safety
    ///
    /// Nothing is lost.
    pub async fn finished(&self) -> NetworkRequestEvent {
        let mut handle = self.clone();
        while !handle.changed().await.is_terminal() {}
        handle.snapshot()
    }

    /// Adds a note to the record. URLs in it are redacted. Beyond a thousand notes they are only counted.
    pub fn log(&self, message: impl AsRef<str>) {
        let message = redact::text(message.as_ref()).into_owned();
        self.write(|state, at| {
            let logs = &mut state.event.logs;
            if logs.len() < MOST_LOGS {
                logs.push(LogEntry { at, message });
            } else if let Some(last) = logs.last_mut() {
                let more = last
                    .message
                    .strip_suffix(" more")
                    .and_then(|count| count.parse().ok())
                    .unwrap_or(1_u64);
                *last = LogEntry {
                    at,
                    message: format!("{} more", more + 1),
                };
            }
        });
    }

    /// Adds a key and value of the caller's own.
    pub fn set_metadata(&self, key: impl Into<String>, value: impl Into<Value>) {
        let fields = redacted_fields([(key.into(), value.into())].into());
        self.write(|state, _| state.event.metadata.extend(fields));
    }

    /// Records the response's body, which is never done silently.
    pub fn set_response_body(&self, body: impl Into<Value>) {
        let body = body.into().redacted();
        self.write(|state, _| state.event.response_body = Some(body));
    }

    pub(super) const fn stage(&self) -> Stage {
        self.stage
    }

    pub(crate) fn at_stage(&self, stage: Stage) -> Self {
        Self { stage, ..self.clone() }
    }

    /// Moves the status forward; never back.
    pub(crate) fn mark(&self, status: RequestStatus) {
        let moved = self.write(|state, at| {
            let event = &mut state.event;
            if event.status >= status {
                return false;
            }
            event.status = status;
            match status {
                RequestStatus::Queued => event.queued_at = Some(at),
                RequestStatus::Processing => event.processing_started_at = Some(at),
                RequestStatus::Calling => event.call_started_at = Some(at),
                _ => {}
            }
            true
        });
        if moved {
            self.publish(status);
        }
    }

    /// The type of the error that is about to come back in a box.
    pub(crate) fn tell_error_type(&self, name: &'static str) {
        if name != type_name::<BoxError>() {
            self.lock().error_type = Some(name);
        }
    }

    /// The call goes to the wire, again perhaps. Returns the attempt's number.
    pub(super) fn attempt_started(&self) -> usize {
        let (first, index) = self.write(|state, at| {
            let event = &mut state.event;
            let first = event.status < RequestStatus::Calling;
            if first {
                event.status = RequestStatus::Calling;
                event.call_started_at = Some(at);
            }
            event.attempts.push(Attempt {
                started_at: at,
                ended_at: None,
                status_code: None,
                error_type: None,
                error_message: None,
            });
            (first, event.attempts.len() - 1)
        });
        if let Some(events) = &self.shared.events {
            events.attempt_started();
        }
        if first {
            self.publish(RequestStatus::Calling);
        }
        index
    }

    /// What came back from the wire; `None`: nothing, the attempt was dropped.
    pub(super) fn attempt_ended(&self, index: usize, came_back: Option<&Result<ResponseDetails, ErrorDetails>>) {
        if let Some(events) = &self.shared.events {
            events.attempt_ended();
        }
        self.write(|state, at| {
            let told = state.error_type.take();
            let Some(attempt) = state.event.attempts.get_mut(index) else {
                return;
            };
            attempt.ended_at = Some(at);
            match came_back {
                Some(Ok(response)) => attempt.status_code = response.status_code,
                Some(Err(error)) => {
                    attempt.error_type = Some(
                        told.filter(|_| !error.kind_is_known)
                            .map_or_else(|| error.kind.clone(), str::to_owned),
                    );
                    attempt.error_message = Some(error.message.clone());
                }
                None => attempt.error_type = Some("Cancelled".to_owned()),
            }
        });
    }

    /// Writes how the call ended, if that has not been written yet.
    pub(crate) fn finish(&self, outcome: Outcome) {
        let mut status = match &outcome {
            Outcome::Response(response) if response.failure.is_none() => RequestStatus::Completed,
            Outcome::Response(_) | Outcome::Error(_) => RequestStatus::Failed,
            Outcome::Cancelled => RequestStatus::Cancelled,
        };
        let span = self.write(|state, at| {
            let told = state.error_type.take();
            let event = &mut state.event;
            if event.is_terminal() {
                status = RequestStatus::Pending;
                return Span::none();
            }
            event.status = status;
            event.completed_at = Some(at);
            match outcome {
                Outcome::Response(response) => {
                    event.response_status_code = response.status_code;
                    event.response_headers = response.headers;
                    if response.body.is_some() {
                        event.response_body = response.body;
                    }
                    if let Some(failure) = response.failure {
                        event.error_type = Some(failure.kind);
                        event.error_message = Some(failure.message);
                    }
                }
                Outcome::Error(error) => {
                    // Nearer to the wire the type was still known.
                    let wire = event
                        .attempts
                        .last()
                        .filter(|last| last.error_message.as_ref() == Some(&error.message));
                    let kind = match wire
                        .and_then(|last| last.error_type.clone())
                        .or_else(|| told.map(str::to_owned))
                    {
                        Some(kind) if !error.kind_is_known => kind,
                        _ => error.kind,
                    };
                    event.error_type = Some(kind);
                    event.error_message = Some(error.message);
                    event.error_details = error.details;
                }
                Outcome::Cancelled => {}
            }
            mem::replace(&mut state.span, Span::none())
        });
        // Without the lock: whoever records spans may look at the event.
        if !span.is_disabled() {
            record_end(&span, &self.snapshot());
        }
        drop(span);
        if status.is_terminal() {
            if let Some(events) = &self.shared.events {
                events.ended(status);
            }
            self.publish(status);
        }
    }

    fn publish(&self, status: RequestStatus) {
        if let Some(events) = &self.shared.events {
            events.publish(status, self);
        }
    }

    fn write<T>(&self, change: impl FnOnce(&mut State, SystemTime) -> T) -> T {
        let now = Instant::now();
        let mut state = self.lock();
        let at = state.utc(now);
        state.event.updated_at = at;
        state.version += 1;
        let result = change(&mut state, at);
        let watchers = mem::take(&mut state.watchers);
        drop(state);
        watchers.into_iter().for_each(Waker::wake);
        result
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.lock()
    }
}

impl fmt::Debug for EventHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.lock();
        f.debug_struct("EventHandle")
            .field("request_id", &state.event.request_id)
            .field("status", &state.event.status)
            .finish_non_exhaustive()
    }
}

// === impl Writer ===

impl Writer {
    /// Opens an event, and its span, for a call that is about to be made.
    pub(crate) fn open(mut details: RequestDetails, events: Option<Events>, stage: Stage) -> (Self, Span) {
        let opened = Instant::now();
        let span = details.span();
        let current = span.clone();
        let (method, url) = (details.method.take(), details.url.take());
        let event = details.into_event(utc(opened));
        let state = State {
            event,
            method,
            url,
            opened,
            version: 0,
            watchers: Vec::new(),
            error_type: None,
            span,
        };
        let shared = Shared {
            state: Mutex::new(state),
            writers: AtomicUsize::new(1),
            events,
        };
        let writer = Self {
            handle: EventHandle {
                shared: Arc::new(shared),
                stage,
                seen: 0,
            },
        };
        if let Some(events) = &writer.handle.shared.events {
            events.opened();
        }
        writer.handle.publish(RequestStatus::Pending);
        (writer, current)
    }

    pub(crate) fn of(handle: &EventHandle) -> Self {
        handle.shared.writers.fetch_add(1, Ordering::Relaxed);
        Self { handle: handle.clone() }
    }

    pub(crate) const fn handle(&self) -> &EventHandle {
        &self.handle
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if self.handle.shared.writers.fetch_sub(1, Ordering::AcqRel) == 1 && !self.handle.status().is_terminal() {
            self.handle.finish(if thread::panicking() {
                Outcome::Error(ErrorDetails::panicked("the call panicked"))
            } else {
                Outcome::Cancelled
            });
        }
    }
}

impl fmt::Debug for Writer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.handle.fmt(f)
    }
}

// === impl Shared ===

impl Shared {
    /// No code but ours runs under this lock, so a poisoned one is as good as any.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl State ===

impl State {
    fn utc(&self, now: Instant) -> SystemTime {
        self.event.created_at + now.saturating_duration_since(self.opened)
    }
}

fn record_end(span: &Span, event: &NetworkRequestEvent) {
    span.record("status", event.status.as_str());
    if let Some(code) = event.response_status_code {
        span.record("http.response.status_code", code);
    }
    if let Some(kind) = &event.error_type {
        span.record("error.type", kind.as_str());
    }
}
