//! [`EventHandle`], which reads an event, and [`Writer`], which ends it.

use super::{
    details::{ErrorDetails, RequestDetails, ResponseDetails},
    record::NetworkRequestEvent,
    reporter::Reporter,
    request_id::RequestId,
    state::{EventState, Outcome},
    status::RequestStatus,
    value::{Value, redacted_fields},
};
use crate::{
    clock,
    error::BoxError,
    panic, redact,
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicUsize, Ordering},
    },
};
use std::{
    any::type_name,
    fmt,
    future::poll_fn,
    sync::{Arc, PoisonError},
    task::Poll,
    thread,
};
use tokio::time::Instant;
use tracing::Span;

/// A handle to the event of one call, during the call and afterwards.
///
/// Clones refer to the same event. A handle keeps the event alive, but neither the call nor its span.
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
    /// The stage of the layer, or of the scope, from which the handle was taken.
    stage: Stage,
    /// The version that `changed` returned last.
    seen: u64,
}

/// The right to end an event. There is one for each part of the stack that still runs the call.
///
/// If the last writer is dropped before there is an outcome, the event ends as CANCELLED, or as FAILED if the thread is
/// panicking.
pub(crate) struct Writer {
    shared: Arc<Shared>,
    stage: Stage,
}

/// The place of an event layer in the stack, from the outside in.
///
/// A layer takes part in the current event only if its stage is further in than the stage from which that event was
/// made current: see [`scope`](super::scope).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Stage {
    /// Above the queue.
    Queued,
    /// Below the queue and above the limits.
    Processing,
    /// Around the client.
    Calling,
}

struct Shared {
    state: Mutex<EventState>,
    writers: AtomicUsize,
    reporter: Option<Arc<Reporter<EventHandle>>>,
}

// === impl EventHandle ===

impl EventHandle {
    /// A copy of the record as it is now.
    #[must_use]
    pub fn snapshot(&self) -> NetworkRequestEvent {
        let (mut event, method, url) = self.lock().snapshot();
        event.method = method.map(|method| method.as_str().to_owned());
        event.endpoint_url = url.map(|url| redact::uri(&url));
        event
    }

    /// The call's status now.
    #[must_use]
    pub fn status(&self) -> RequestStatus {
        self.lock().status
    }

    /// The call's name.
    #[must_use]
    pub fn request_id(&self) -> RequestId {
        self.lock().request_id().clone()
    }

    /// Waits until the record has changed since this method last returned, and returns the status. On a new handle,
    /// that is any change since the event was opened.
    ///
    /// Several changes may be returned as one. Once the event has ended, the method returns at once.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe: if the future is dropped, the next call returns the change.
    pub async fn changed(&mut self) -> RequestStatus {
        poll_fn(|cx| {
            let mut state = self.shared.lock();
            if state.version == self.seen && !state.status.is_terminal() {
                state.watch(cx.waker());
                return Poll::Pending;
            }
            self.seen = state.version;
            Poll::Ready(state.status)
        })
        .await
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

    /// Adds a note to the record. Secrets that can be recognized in it are redacted.
    ///
    /// An event keeps at most 1,000 notes. If there are more, the last one is a count, as in `4001 more`.
    pub fn log(&self, message: impl AsRef<str>) {
        let message = redact::text(message.as_ref()).into_owned();
        let now = Instant::now();
        self.shared.write(|state| state.log(message, now));
    }

    /// Adds a key and its value to the record, or replaces the value of a key. The value of a secret key is redacted.
    ///
    /// An event keeps at most 1,000 keys. Further keys are counted under the key `[more]`.
    pub fn set_metadata(&self, key: impl Into<String>, value: impl Into<Value>) {
        let fields = redacted_fields([(key.into(), value.into())].into());
        let now = Instant::now();
        self.shared.write(|state| state.set_metadata(fields, now));
    }

    /// Records the response's body, which no layer does unless it is configured to. Values of secret fields are
    /// redacted.
    pub fn set_response_body(&self, body: impl Into<Value>) {
        let body = body.into().redacted();
        let now = Instant::now();
        self.shared.write(|state| state.set_response_body(body, now));
    }

    #[cfg(feature = "http")]
    pub(crate) fn set_body_progress(&self, progress: super::state::BodyProgress) {
        self.shared.write(|state| state.set_body_progress(progress));
    }

    /// Ends the event as CANCELLED, if it has not ended.
    #[cfg(feature = "http")]
    pub(crate) fn cancel(&self) {
        self.writer().finish(Outcome::Cancelled);
    }

    /// Ends the event as FAILED, if it has not ended.
    pub(crate) fn fail(&self, error: &BoxError) {
        self.writer().finish(Outcome::Error(ErrorDetails::of(error)));
    }

    pub(super) fn writer(&self) -> Writer {
        Writer::new(&self.shared, self.stage)
    }

    pub(super) fn reporter(&self) -> Option<&Arc<Reporter<Self>>> {
        self.shared.reporter.as_ref()
    }

    /// Records the type of an error that is about to be returned in a box, where its type is lost.
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
    /// Opens an event and its span, for a call that is about to be made at `stage`. The span is `None` if no subscriber
    /// of tracing records it.
    #[inline]
    pub(super) fn open(
        describe: impl FnOnce(&mut RequestDetails),
        reporter: Option<Arc<Reporter<EventHandle>>>,
        stage: Stage,
    ) -> (Self, Option<Box<Span>>) {
        let mut shared = Arc::new(Shared {
            state: Mutex::new(EventState::new(clock::now())),
            writers: AtomicUsize::new(1),
            reporter,
        });
        // The details are large, so they are written in place and not moved.
        let mut span = None;
        if let Some(Shared { state, .. }) = Arc::get_mut(&mut shared) {
            let state = state.get_mut().unwrap_or_else(PoisonError::into_inner);
            describe(&mut state.request);
            span = state.open_span();
        }
        let writer = Self { shared, stage };
        if let Some(reporter) = &writer.shared.reporter {
            reporter.opened();
        }
        writer.publish(RequestStatus::Pending);
        (writer, span)
    }

    fn new(shared: &Arc<Shared>, stage: Stage) -> Self {
        shared.writers.fetch_add(1, Ordering::Relaxed);
        Self {
            shared: shared.clone(),
            stage,
        }
    }

    /// Another writer of the same event, for a layer at `stage`.
    #[inline]
    pub(super) fn at(&self, stage: Stage) -> Self {
        Self::new(&self.shared, stage)
    }

    pub(super) const fn stage(&self) -> Stage {
        self.stage
    }

    /// An identifier that no other event has while this one exists.
    pub(super) fn address(&self) -> usize {
        Arc::as_ptr(&self.shared).addr()
    }

    #[inline]
    pub(crate) fn handle(&self) -> EventHandle {
        EventHandle {
            shared: self.shared.clone(),
            stage: self.stage,
            seen: 0,
        }
    }

    /// Moves the status forward, and never back.
    #[inline]
    pub(crate) fn mark(&self, status: RequestStatus) {
        let now = clock::now();
        if self.shared.write(|state| state.mark(status, now)) {
            self.publish(status);
        }
    }

    /// Adds an attempt, and returns its index.
    #[inline]
    pub(super) fn attempt_started(&self) -> usize {
        let now = clock::now();
        let (has_changed, index) = self.shared.write(|state| state.attempt_started(now));
        if let Some(reporter) = &self.shared.reporter {
            reporter.attempt_started();
        }
        if has_changed {
            self.publish(RequestStatus::Calling);
        }
        index
    }

    /// Writes what an attempt returned; `None` if the attempt was dropped before it returned.
    #[inline]
    pub(super) fn attempt_ended(&self, index: usize, result: Option<&Result<ResponseDetails, ErrorDetails>>) {
        if let Some(reporter) = &self.shared.reporter {
            reporter.attempt_ended();
        }
        let now = clock::now();
        self.shared.write(|state| state.attempt_ended(index, result, now));
    }

    /// Ends the event, if it has not ended.
    pub(crate) fn finish(&self, outcome: Outcome) {
        let status = outcome.status();
        let now = clock::now();
        let Some(span) = self.shared.write(|state| state.finish(outcome, now)) else {
            return;
        };
        if let Some(reporter) = &self.shared.reporter {
            reporter.ended(status);
        }
        self.publish(status);
        if let Some(span) = span {
            // Last, and without the lock: a subscriber of tracing is user code, which may read the event or panic.
            record_end(&span, &self.handle().snapshot());
        }
    }

    #[inline]
    fn publish(&self, status: RequestStatus) {
        if let Some(reporter) = &self.shared.reporter {
            reporter.publish(status, || self.handle());
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if self.shared.writers.fetch_sub(1, Ordering::AcqRel) == 1 && !self.shared.lock().status.is_terminal() {
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
    /// Changes the state, and wakes the tasks that wait for a change.
    #[inline]
    fn write<T>(&self, change: impl FnOnce(&mut EventState) -> T) -> T {
        let mut state = self.lock();
        state.version += 1;
        let result = change(&mut state);
        let watchers = state.take_watchers();
        drop(state);
        if let Some(watchers) = watchers {
            watchers.into_iter().for_each(panic::wake);
        }
        result
    }

    /// Ignores poisoning: the only user code that runs under the lock is a waker's `clone`, before anything is changed.
    fn lock(&self) -> MutexGuard<'_, EventState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
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
