//! Who may write an event, and who watches it: [`Writer`] and [`EventHandle`].

use super::{
    describe::{ErrorDetails, RequestDetails, ResponseDetails},
    events::Events,
    record::{NetworkRequestEvent, RequestId, RequestStatus},
    scope::Stage,
    state::{Outcome, State},
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
    shared: Arc<Shared>,
    /// How far in the stack it stands.
    stage: Stage,
}

struct Shared {
    state: Mutex<State>,
    writers: AtomicUsize,
    events: Option<Events>,
}

// === impl EventHandle ===

impl EventHandle {
    /// The record as it stands now.
    #[must_use]
    pub fn snapshot(&self) -> NetworkRequestEvent {
        let (mut event, method, url) = self.lock().snapshot();
        event.method = method.map(|method| method.as_str().to_owned());
        event.endpoint_url = url.map(|url| redact::uri(&url));
        event
    }

    /// Where the call is now.
    #[must_use]
    pub fn status(&self) -> RequestStatus {
        self.lock().status
    }

    /// The call's name.
    #[must_use]
    pub fn request_id(&self) -> RequestId {
        self.lock().request_id().clone()
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
            if state.version == self.seen && !state.status.is_terminal() {
                state.watch(cx.waker());
                return Poll::Pending;
            }
            self.seen = state.version;
            Poll::Ready(state.status)
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
        let now = Instant::now();
        self.shared.write(|state| state.log(message, now));
    }

    /// Adds a key and value of the caller's own. Beyond a thousand keys, further ones are only counted, under the key
    /// `[more]`; what is there can still be changed.
    pub fn set_metadata(&self, key: impl Into<String>, value: impl Into<Value>) {
        let fields = redacted_fields([(key.into(), value.into())].into());
        let now = Instant::now();
        self.shared.write(|state| state.set_metadata(fields, now));
    }

    /// Records the response's body, which is never done silently.
    pub fn set_response_body(&self, body: impl Into<Value>) {
        let body = body.into().redacted();
        let now = Instant::now();
        self.shared.write(|state| state.set_response_body(body, now));
    }

    /// What came of the response's body.
    #[cfg(feature = "http")]
    pub(crate) fn set_body_progress(&self, bytes: super::state::BodyProgress) {
        self.shared.write(|state| state.set_body_progress(bytes));
    }

    /// The call is given up by whoever made it.
    #[cfg(feature = "http")]
    pub(crate) fn cancel(&self) {
        self.writer().finish(Outcome::Cancelled);
    }

    /// The call failed before anybody further in could know.
    pub(crate) fn fail(&self, error: &BoxError) {
        self.writer().finish(Outcome::Error(ErrorDetails::of(error)));
    }

    pub(super) fn writer(&self) -> Writer {
        Writer::new(&self.shared, self.stage)
    }

    pub(crate) fn reports_to(&self, events: &Events) -> bool {
        self.shared.events.as_ref().is_some_and(|own| own.is_same(events))
    }

    /// The type of the error that is about to come back in a box.
    pub(crate) fn set_error_type(&self, name: &'static str) {
        if name != type_name::<BoxError>() {
            self.lock().set_error_type(name);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
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
    /// Opens an event, and its span, for a call that is about to be made.
    #[inline]
    pub(crate) fn open(
        describe: impl FnOnce(&mut RequestDetails),
        events: Option<Events>,
        stage: Stage,
    ) -> (Self, Option<Box<Span>>) {
        let mut shared = Arc::new(Shared {
            state: Mutex::new(State::new(clock::now())),
            writers: AtomicUsize::new(1),
            events,
        });
        // Described where it stays: it is not small.
        let mut span = None;
        if let Some(Shared { state, .. }) = Arc::get_mut(&mut shared) {
            let state = state.get_mut().unwrap_or_else(PoisonError::into_inner);
            describe(&mut state.request);
            span = state.open_span();
        }
        let writer = Self { shared, stage };
        if let Some(events) = &writer.shared.events {
            events.opened();
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

    /// One more, for a layer at `stage`.
    #[inline]
    pub(super) fn at(&self, stage: Stage) -> Self {
        Self::new(&self.shared, stage)
    }

    pub(super) const fn stage(&self) -> Stage {
        self.stage
    }

    /// Tells events that are alive apart.
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

    /// Moves the status forward; never back.
    #[inline]
    pub(crate) fn mark(&self, status: RequestStatus) {
        let now = clock::now();
        if self.shared.write(|state| state.mark(status, now)) {
            self.publish(status);
        }
    }

    /// The call goes to the wire, again perhaps. Returns the attempt's number.
    #[inline]
    pub(super) fn attempt_started(&self) -> usize {
        let now = clock::now();
        let (first, index) = self.shared.write(|state| state.attempt_started(now));
        if let Some(events) = &self.shared.events {
            events.attempt_started();
        }
        if first {
            self.publish(RequestStatus::Calling);
        }
        index
    }

    /// What came back from the wire; `None`: nothing, the attempt was dropped.
    #[inline]
    pub(super) fn attempt_ended(&self, index: usize, came_back: Option<&Result<ResponseDetails, ErrorDetails>>) {
        if let Some(events) = &self.shared.events {
            events.attempt_ended();
        }
        let now = clock::now();
        self.shared.write(|state| state.attempt_ended(index, came_back, now));
    }

    /// Writes how the call ended, if that has not been written yet.
    pub(crate) fn finish(&self, outcome: Outcome) {
        let status = outcome.status();
        let now = clock::now();
        let Some(span) = self.shared.write(|state| state.finish(outcome, now)) else {
            return;
        };
        if let Some(events) = &self.shared.events {
            events.ended(status);
        }
        self.publish(status);
        if let Some(span) = span {
            // Last and without the lock: whoever records spans may look at the event, or panic.
            record_end(&span, &self.handle().snapshot());
        }
    }

    #[inline]
    fn publish(&self, status: RequestStatus) {
        if let Some(events) = &self.shared.events {
            events.publish(status, || self.handle());
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
    #[inline]
    fn write<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
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

    /// No code but ours runs under this lock, so a poisoned one is as good as any.
    fn lock(&self) -> MutexGuard<'_, State> {
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
