//! [`EventHandle`], through which an event is read and notes are added, and [`Writer`], which moves its status and ends
//! it.

use super::{
    attempt::{AttemptStart, attempt_number},
    change::Change,
    details::{ErrorDetails, RequestDetails, ResponseDetails},
    record::NetworkRequestEvent,
    reporter::Reporter,
    request_id::RequestId,
    server::Server,
    state::{EventState, Outcome},
    status::RequestStatus,
    value::Value,
    wait::WaitCause,
};
use crate::{
    clock,
    error::BoxError,
    panic, redact,
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};
use http::Method;
#[cfg(feature = "metrics")]
use std::collections::BTreeMap;
use std::{
    any::type_name,
    fmt,
    future::poll_fn,
    sync::{Arc, PoisonError},
    task::{Context, Poll},
    thread,
    time::Duration,
};
use tokio::time::Instant;
use tracing::Span;

/// A handle to the event of one call, during the call and afterwards.
///
/// Clones of a handle refer to the same event. A handle keeps the event alive, but neither the call nor its span.
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
    /// The stage (how far in the stack) from which the handle was taken. When the handle makes its event current, the
    /// event is made current from this stage.
    stage: Stage,
    /// The version of the event (the number of its changes) when [`changed`](Self::changed) last returned; 0 if that
    /// method has not been called.
    seen: u32,
}

/// The right to end an event. Each part of the stack that still runs the call has one.
///
/// If the last writer of an event is dropped before the event has an outcome, the event ends as CANCELLED, or as FAILED
/// if the thread is panicking.
pub(crate) struct Writer {
    shared: Arc<Shared>,
    stage: Stage,
}

/// The place of an event layer in the stack. The variants are ordered from the outermost to the innermost place.
///
/// An event layer writes to the current event (that of the call which is being made or polled on this thread) only if
/// the layer's stage is further in than the stage from which the event was made current. Otherwise the layer opens an
/// event of its own: see [`scope`](super::scope).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Stage {
    /// The event layer above the queue, which is the outermost.
    Queued,
    /// The event layer below the queue and above the concurrency and rate limits.
    Processing,
    /// The event layer around the client, which is the innermost.
    Calling,
}

/// A task that waits for a change of an event. Its waker is removed from the event when this is dropped, so that tasks
/// that have stopped waiting leave nothing behind.
struct Watcher<'a> {
    shared: &'a Shared,
    /// The key of the task's waker in the event, once it was registered.
    key: Option<u64>,
}

struct Shared {
    state: Mutex<EventState>,
    /// The number of writers. It is no longer counted down once the event has ended.
    writers: AtomicUsize,
    /// Whether the event has ended, readable without the lock. It is set before the writer that ends the event is
    /// dropped, so that the last writer to be dropped sees it.
    has_ended: AtomicBool,
    reporter: Option<Arc<Reporter<EventHandle>>>,
}

// === impl EventHandle ===

impl EventHandle {
    /// Returns a copy of the event's record as it is now.
    #[must_use]
    pub fn snapshot(&self) -> NetworkRequestEvent {
        let copied = self.lock().snapshot();
        copied.redacted()
    }

    /// Returns the call's status as it is now.
    #[must_use]
    pub fn status(&self) -> RequestStatus {
        self.lock().status
    }

    /// Returns the call's id.
    #[must_use]
    pub fn request_id(&self) -> RequestId {
        self.lock().request_id().clone()
    }

    /// Returns the method of the call's request, if it has one.
    #[must_use]
    pub fn method(&self) -> Option<Method> {
        self.lock().request.method.clone()
    }

    /// Returns the host and the port of the URL of the call's request: never its user info. The port is the default port of
    /// the scheme, `http` or `https`, if the URL has none. `None` if the URL has no host.
    ///
    /// The authority is shared with the event, and not copied.
    #[must_use]
    pub fn server(&self) -> Option<Server> {
        Server::of(self.lock().request.url.as_ref()?)
    }

    /// Returns the name of the model that the call is for, as it was set with the extension [`Model`](super::Model) or
    /// with [`RequestDetails::model`].
    #[must_use]
    pub fn model(&self) -> Option<Arc<str>> {
        self.lock().request.extra.as_ref()?.model.clone()
    }

    /// Waits until the event has changed since this method last returned on this handle, and returns the status. On a
    /// new handle, the method returns at once if the event has changed since it was opened.
    ///
    /// Several changes of the event may be reported by one return. Once the event has ended, the method returns at
    /// once.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe: if the future is dropped, no change of the event is missed. The next call of this
    /// method reports the changes that the dropped future has not reported.
    pub async fn changed(&mut self) -> RequestStatus {
        let mut watcher = Watcher {
            shared: &self.shared,
            key: None,
        };
        let (version, status) = poll_fn(|cx| watcher.poll_changed(self.seen, cx)).await;
        self.seen = version;
        status
    }

    /// Waits until the call has ended, and returns its record.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe: it only reads.
    pub async fn finished(&self) -> NetworkRequestEvent {
        let mut handle = self.clone();
        while !handle.changed().await.is_terminal() {}
        handle.snapshot()
    }

    /// Adds a note to the event. Secrets that can be recognized in the note are redacted.
    ///
    /// An event keeps at most 1,000 notes. If more are added, the last one becomes a count of the rest: `4001 more`.
    pub fn log(&self, message: impl AsRef<str>) {
        let message = redact::text(message.as_ref()).into_owned();
        let now = Instant::now();
        self.shared.write(|state| state.log(message, now));
    }

    /// Adds a metadata key and its value to the event, or replaces the value of an existing key. The value of a key
    /// whose name suggests a credential is redacted.
    ///
    /// An event keeps at most 1,000 metadata keys. Further keys are only counted, under the key `[more]`.
    pub fn set_metadata(&self, key: impl Into<String>, value: impl Into<Value>) {
        let (key, value) = (key.into(), value.into());
        let now = Instant::now();
        self.shared.write(|state| state.set_metadata(key, value, now));
    }

    /// Records the response's body in the event. No layer records the body unless it is configured to. The values of
    /// fields whose name suggests a credential are redacted.
    pub fn set_response_body(&self, body: impl Into<Value>) {
        let body = body.into();
        let now = Instant::now();
        self.shared.write(|state| state.set_response_body(body, now));
    }

    #[cfg(feature = "http")]
    pub(crate) fn set_body_progress(&self, progress: super::state::BodyProgress) {
        let now = clock::now();
        self.shared.write(|state| state.set_body_progress(progress, now));
    }

    /// Records the status of the response to the last attempt, which has not ended yet.
    #[cfg(feature = "http")]
    pub(crate) fn head_arrived(&self, status: http::StatusCode) {
        self.shared.write(|state| state.head_arrived(status.as_u16()));
    }

    /// Makes the event end as CANCELLED, whatever the call returns, because its caller has cancelled it. The event ends
    /// when the call does, so that the record is then final.
    #[cfg(feature = "http")]
    pub(crate) fn cancel(&self) {
        self.lock().cancel();
    }

    /// Calls `read` with the method and the URL of the request, which is not redacted, under the event's lock: `read`
    /// must not call user code.
    #[cfg(feature = "metrics")]
    pub(crate) fn with_request<T>(&self, read: impl FnOnce(Option<&http::Method>, Option<&http::Uri>) -> T) -> T {
        let state = self.lock();
        read(state.request.method.as_ref(), state.request.url.as_ref())
    }

    /// Calls `read` with the metadata, which is not redacted, under the event's lock: `read` must not call user code.
    #[cfg(feature = "metrics")]
    pub(crate) fn with_metadata<T>(&self, read: impl FnOnce(Option<&BTreeMap<String, Value>>) -> T) -> T {
        let state = self.lock();
        read(state.request.extra.as_ref().map(|extra| &extra.metadata.0))
    }

    /// Returns the stage (how far in the stack) from which the handle was taken.
    pub(crate) const fn stage(&self) -> Stage {
        self.stage
    }

    /// Returns a number that no other event has while this one exists.
    pub(crate) fn key(&self) -> usize {
        Arc::as_ptr(&self.shared).addr()
    }

    pub(super) fn writer(&self) -> Writer {
        Writer::new(&self.shared, self.stage)
    }

    pub(super) fn reporter(&self) -> Option<&Arc<Reporter<Self>>> {
        self.shared.reporter.as_ref()
    }

    /// Records the type name of an error that is about to be returned in a box, which hides the type.
    pub(crate) fn set_error_type(&self, name: &'static str) {
        if name != type_name::<BoxError>() {
            self.lock().set_error_type(name);
        }
    }

    fn lock(&self) -> MutexGuard<'_, EventState> {
        self.shared.lock()
    }
}

impl fmt::Debug for EventHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut state = self.lock();
        f.debug_struct("EventHandle")
            .field("request_id", &state.request_id().clone())
            .field("status", &state.status)
            .finish_non_exhaustive()
    }
}

// === impl Writer ===

impl Writer {
    /// Opens an event and its tracing span, for a call that is about to be made. `stage` is the stage (how far in the
    /// stack) of the layer that opens the event. The returned span is `None` if no tracing subscriber records it.
    ///
    /// The event's status is PENDING, or QUEUED if `is_queued`, because the call has a place in the queue already.
    #[inline]
    pub(super) fn open(
        describe: impl FnOnce(&mut RequestDetails),
        reporter: Option<Arc<Reporter<EventHandle>>>,
        stage: Stage,
        is_queued: bool,
    ) -> (Self, Option<Box<Span>>) {
        let now = clock::now();
        let mut shared = Arc::new(Shared {
            state: Mutex::new(EventState::new(now)),
            writers: AtomicUsize::new(1),
            has_ended: AtomicBool::new(false),
            reporter,
        });
        // `describe` writes the request's details directly into the event: they are large, and moving them would cost
        // time. The event is not shared yet, so its lock is not needed.
        let mut span = None;
        if let Some(Shared { state, .. }) = Arc::get_mut(&mut shared) {
            let state = state.get_mut().unwrap_or_else(PoisonError::into_inner);
            describe(&mut state.request);
            span = state.open_span();
            if is_queued {
                state.version += 1;
                state.mark(RequestStatus::Queued, now);
            }
        }
        let writer = Self { shared, stage };
        if let Some(reporter) = &writer.shared.reporter {
            reporter.opened();
        }
        writer.publish(RequestStatus::Pending);
        if is_queued {
            writer.publish(RequestStatus::Queued);
        }
        (writer, span)
    }

    fn new(shared: &Arc<Shared>, stage: Stage) -> Self {
        shared.writers.fetch_add(1, Ordering::Relaxed);
        Self {
            shared: shared.clone(),
            stage,
        }
    }

    /// Returns another writer of the event (the right to end the event), for a layer at `stage` (how far in the stack).
    #[inline]
    pub(super) fn at(&self, stage: Stage) -> Self {
        Self::new(&self.shared, stage)
    }

    /// Returns an identifier of the event, and the stage (how far in the stack) of the layer that has this writer. No
    /// other event has the same identifier while this event exists.
    pub(super) fn position(&self) -> (usize, Stage) {
        (Arc::as_ptr(&self.shared).addr(), self.stage)
    }

    #[inline]
    pub(crate) fn handle(&self) -> EventHandle {
        EventHandle {
            shared: self.shared.clone(),
            stage: self.stage,
            seen: 0,
        }
    }

    /// Sets the event's status, unless the event has the same or a later one: a status never moves back.
    #[inline]
    pub(crate) fn mark(&self, status: RequestStatus) {
        let now = clock::now();
        if self.shared.write(|state| state.mark(status, now)) {
            self.publish(status);
        }
    }

    /// Adds an attempt to the event, unless the event has ended or refuses further attempts.
    #[inline]
    pub(super) fn attempt_started(&self) -> AttemptStart {
        let now = clock::now();
        let (has_changed, start) = self.shared.write(|state| {
            let (has_changed, start) = state.attempt_started(now);
            if let AttemptStart::Started(_) = start {
                self.count(Reporter::attempt_started);
            }
            (has_changed, start)
        });
        if has_changed {
            self.publish(RequestStatus::Calling);
        }
        if let AttemptStart::Started(index) = start {
            let number = attempt_number(index);
            self.tell(|| Change::AttemptStarted { number });
        }
        start
    }

    /// Makes the event refuse further attempts. Returns whether the call may still finish: an attempt is on the wire,
    /// the last one has succeeded, or the event has ended.
    pub(super) fn finish_attempts(&self) -> bool {
        self.shared.lock().finish_attempts()
    }

    /// Makes the event end as CANCELLED after it has refused an attempt, unless another attempt is on the wire. Returns
    /// whether it will.
    pub(super) fn cancel_refused(&self) -> bool {
        self.shared.lock().cancel_refused()
    }

    /// Records what an attempt returned, unless the event has ended. `result` is `None` if the attempt was dropped
    /// before it returned.
    #[inline]
    pub(super) fn attempt_ended(&self, index: usize, result: Option<&Result<ResponseDetails, Box<ErrorDetails>>>) {
        let now = clock::now();
        let end = self.shared.write(|state| {
            if !state.attempt_ended(index, result, now) {
                return None;
            }
            self.count(|reporter| reporter.attempts_ended(1));
            self.is_observed().then(|| state.attempt_end(index))?
        });
        if let Some(end) = &end {
            self.tell(|| Change::AttemptEnded(end));
        }
    }

    /// Ends the event with `outcome`, if it has not ended.
    pub(crate) fn finish(&self, outcome: Outcome) {
        let now = clock::now();
        let ended = self.shared.write(|state| {
            let ended = state.finish(outcome, now)?;
            self.shared.has_ended.store(true, Ordering::Release);
            self.count(|reporter| {
                reporter.attempts_ended(ended.closed_attempts.len());
                reporter.ended(ended.status);
            });
            Some(ended)
        });
        let Some(ended) = ended else { return };
        self.publish(ended.status);
        if self.is_observed() {
            self.tell_end(&ended.closed_attempts);
        }
        // The outcome is recorded in the span last, and without the lock of the event: a tracing subscriber is user
        // code, which may panic, or read the event and so take the lock.
        if let Some(span) = &ended.span {
            let (code, error_type) = self.shared.lock().outcome();
            record_end(span, ended.status, code, error_type);
        }
    }

    /// Adds how long the call has waited for `cause`.
    pub(super) fn add_wait(&self, cause: WaitCause, duration: Duration) {
        self.shared.lock().add_wait(cause, duration);
    }

    /// Returns how long the call has waited in all, as far as layers have recorded it.
    pub(super) fn time_waited(&self) -> Duration {
        self.shared.lock().time_waited()
    }

    /// Tells the observers how the event has ended, and before that, the attempts that were closed with it.
    #[cold]
    fn tell_end(&self, closed_attempts: &[usize]) {
        let (attempts, call) = {
            let state = self.shared.lock();
            let ends = closed_attempts.iter().filter_map(|index| state.attempt_end(*index));
            (ends.collect::<Vec<_>>(), state.call_end())
        };
        for attempt in &attempts {
            self.tell(|| Change::AttemptEnded(attempt));
        }
        self.tell(|| Change::Ended(&call));
    }

    /// Changes the counts of the event's reporter. This is done while the event is locked, so that a reader who sees
    /// the new state of the event finds it counted.
    #[inline]
    fn count(&self, change: impl FnOnce(&Reporter<EventHandle>)) {
        if let Some(reporter) = &self.shared.reporter {
            change(reporter);
        }
    }

    #[inline]
    fn publish(&self, status: RequestStatus) {
        if let Some(reporter) = &self.shared.reporter {
            reporter.publish(status, || self.handle());
        }
        match status {
            RequestStatus::Pending => self.tell(|| Change::Opened),
            RequestStatus::Queued => self.tell(|| Change::Queued),
            RequestStatus::Processing => self.tell(|| Change::Started),
            // Attempts and ends have more to tell.
            _ => {}
        }
    }

    /// Whether the event has observers.
    #[inline]
    pub(super) fn is_observed(&self) -> bool {
        let reporter = self.shared.reporter.as_ref();
        reporter.is_some_and(|reporter| !reporter.listeners.is_empty())
    }

    /// Tells the observers of the event what has happened. Not to be called under the event's lock: they may take it.
    #[inline]
    pub(super) fn tell<'a>(&self, change: impl FnOnce() -> Change<'a>) {
        if let Some(reporter) = self.shared.reporter.as_ref() {
            if !reporter.listeners.is_empty() {
                reporter.listeners.tell(Some(&self.handle()), change());
            }
        }
    }
}

impl Drop for Writer {
    #[inline]
    fn drop(&mut self) {
        // Once the event has ended, its writers need not be counted any more.
        if self.shared.has_ended.load(Ordering::Acquire) {
            return;
        }
        let is_last = self.shared.writers.fetch_sub(1, Ordering::AcqRel) == 1;
        if is_last && !self.shared.has_ended.load(Ordering::Acquire) {
            self.finish(if thread::panicking() {
                Outcome::Error(ErrorDetails::panicked("the call panicked"))
            } else {
                Outcome::Cancelled
            });
        }
    }
}

impl fmt::Debug for Writer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.handle().fmt(f)
    }
}

// === impl Shared ===

impl Shared {
    /// Changes the state of the event, and wakes the tasks that wait for a change.
    #[inline]
    fn write<T>(&self, change: impl FnOnce(&mut EventState) -> T) -> T {
        let mut state = self.lock();
        state.version = state.version.wrapping_add(1);
        let result = change(&mut state);
        let watchers = state.take_watchers();
        drop(state);
        if let Some(watchers) = watchers {
            for (_, watcher) in watchers {
                panic::wake(watcher);
            }
        }
        result
    }

    /// Locks the state of the event and ignores poisoning: the only user code that runs under the lock is the `clone`
    /// of a waker, and if that panics, nothing has been changed.
    #[inline]
    fn lock(&self) -> MutexGuard<'_, EventState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn record_end(span: &Span, status: RequestStatus, code: Option<u16>, error_type: Option<String>) {
    span.record("status", status.as_str());
    if let Some(code) = code {
        span.record("http.response.status_code", code);
    }
    if let Some(kind) = error_type {
        span.record("error.type", kind.as_str());
    }
}

// === impl Watcher ===

impl Watcher<'_> {
    /// Waits until the version of the event (the number of its changes) is not `seen`, or the event has ended. Returns
    /// the version and the status.
    fn poll_changed(&mut self, seen: u32, cx: &Context<'_>) -> Poll<(u32, RequestStatus)> {
        let mut state = self.shared.lock();
        if state.version == seen && !state.status.is_terminal() {
            let (key, replaced) = state.watch(self.key, cx.waker());
            drop(state);
            drop(replaced);
            self.key = Some(key);
            return Poll::Pending;
        }
        Poll::Ready((state.version, state.status))
    }
}

impl Drop for Watcher<'_> {
    fn drop(&mut self) {
        if let Some(key) = self.key {
            let removed = self.shared.lock().unwatch(key);
            drop(removed);
        }
    }
}
