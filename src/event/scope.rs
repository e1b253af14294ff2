//! The current event: that of the call which is being made or polled on this thread, as tracing has a current span.
//!
//! The layer that opens an event makes the event *current* while it calls and polls the service below. Layers further
//! in find the event in a thread-local variable. No request has to carry the event, so every layer works for requests
//! of any type.
//!
//! An event layer writes to the current event only if the layer's [`Stage`] is further in than the stage from which the
//! event was made current. A call that is made from inside another call, for example by a closure that an executor
//! runs, starts at an outer stage and so gets an event of its own.
//!
//! A thread or a task that is spawned while a call is made or polled has no current event. The code that spawns the
//! thread or task can carry the event over, as it would carry over a tracing span:
//!
//! ```
//! use tower_outbound::event;
//!
//! # fn main() {
//! if let Some(event) = event::current() {
//!     std::thread::spawn(move || event.in_scope(|| event.log("carried over")));
//! }
//! # }
//! ```

#[cfg(feature = "http")]
use super::change::LimitReport;
use super::{
    change::Change,
    details::ErrorDetails,
    handle::{EventHandle, Stage, Writer},
    state::Outcome,
    status::RequestStatus,
    wait::WaitCause,
};
use crate::{cost::Cost, error::BoxError};
use std::{
    cell::{Cell, RefCell},
    future::Future,
    mem,
    pin::pin,
    time::Duration,
};
use tracing::{Span, level_filters::LevelFilter};

/// The event and the tracing span of one call, to be made current wherever the call continues, for example in another
/// task.
///
/// A [`Scope`] contains a [`Writer`] of the event (the right to end the event): if the scope is dropped before the call
/// has ended, and no other part of the stack runs the call, the event ends as CANCELLED, or as FAILED if the thread is
/// panicking.
#[derive(Debug)]
pub(crate) struct Scope {
    /// The writer of the scope's event (the right to end the event), if the scope has an event. While the scope is
    /// entered, the writer is in the thread-local variable [`CURRENT_EVENT`], unless an outer scope has made the same
    /// event current: the writer then stays here.
    event: Option<Writer>,
    /// The span that is entered with the scope. `None` if there is no span to enter, for example because no tracing
    /// subscriber records it.
    span: Option<Box<Span>>,
}

/// The guard of an entered [`Scope`]. Dropping the guard makes the event and the span current again that were current
/// before.
#[must_use = "the scope is left when this is dropped"]
pub(crate) struct Entered<'a> {
    outer: CurrentContext,
    /// The field of the scope that holds the scope's writer (the right to end the event). While the scope is entered,
    /// the field holds the writer of the event that was current before. Dropping the guard swaps them back. `None` if
    /// the same event was current before: no writer was then moved.
    swapped: Option<&'a mut Option<Writer>>,
    _span: Option<tracing::span::Entered<'a>>,
}

/// Which event is current on this thread, and from which stage it was made current.
#[derive(Clone, Copy)]
struct CurrentContext {
    /// The [identifier](Writer::position) of the current event, which stays unique because the event exists as long as
    /// it is current; 0 if no event is current.
    event: usize,
    stage: Stage,
}

thread_local! {
    static CONTEXT: Cell<CurrentContext> = const { Cell::new(CurrentContext::NONE) };
    /// The writer of the current event (the right to end the event). The writer cannot be copied, so it is not a part
    /// of [`CONTEXT`], which holds the event's identifier and can be copied: most layers only compare identifiers and
    /// need no writer.
    static CURRENT_EVENT: RefCell<Option<Writer>> = const { RefCell::new(None) };
}

/// Returns the event of the call that is being made or polled on this thread, if there is one.
#[must_use]
pub fn current() -> Option<EventHandle> {
    with_current(|writer| writer.at(CONTEXT.get().stage).handle())
}

/// Adds to the current event how long its call has waited for `cause`. Without a current event, does nothing.
pub(crate) fn waited(cause: WaitCause, duration: Duration) {
    with_current(|writer| writer.add_wait(cause, duration));
}

/// Returns how long the call of the current event has waited in all, as far as its layers have recorded it.
pub(super) fn time_waited() -> Duration {
    with_current(Writer::time_waited).unwrap_or_default()
}

/// Whether there is a current event.
pub(super) fn is_current() -> bool {
    CONTEXT.get().event != 0
}

/// Tells the observers of the current event what a limiter has charged its call. Without a current event, does nothing.
#[inline]
pub(crate) fn charged(cost: impl FnOnce() -> Option<Cost>) {
    if is_observed() {
        if let Some(cost) = cost() {
            tell_current(Change::Charged(&cost));
        }
    }
}

/// Tells the observers of the current event what its call has really cost. Without a current event, does nothing.
#[inline]
pub(crate) fn settled(charged: &Cost, used: &Cost) {
    if is_observed() {
        tell_current(Change::Settled { charged, used });
    }
}

/// Tells the observers of the current event what its response reports of a limit.
#[cfg(feature = "http")]
pub(crate) fn limit_reported(report: &LimitReport) {
    tell_current(Change::LimitReported(report));
}

/// Tells the observers of the current event that its response has paused the limiter.
#[cfg(feature = "http")]
pub(crate) fn limiter_paused(pause: Duration) {
    if is_observed() {
        tell_current(Change::Paused(pause));
    }
}

/// Whether the current event has observers.
#[inline]
pub(crate) fn is_observed() -> bool {
    with_current(Writer::is_observed).unwrap_or(false)
}

/// Tells the observers, who may use the current event, and so must not find it borrowed.
#[cold]
fn tell_current(change: Change<'_>) {
    if let Some(writer) = with_current(|writer| writer.at(CONTEXT.get().stage)) {
        writer.tell(|| change);
    }
}

/// Returns a writer of the current event (the right to end the event), for an event layer at `stage` (how far in the
/// stack). Returns `None` if the layer has to open an event of its own: if there is no current event, or if the current
/// event was made current from `stage` or a stage further in.
#[inline]
pub(super) fn attach(stage: Stage) -> Option<Writer> {
    if CONTEXT.get().stage >= stage {
        return None;
    }
    with_current(|writer| writer.at(stage))
}

#[inline]
fn with_current<T>(f: impl FnOnce(&Writer) -> T) -> Option<T> {
    if CONTEXT.get().event == 0 {
        return None;
    }
    CURRENT_EVENT.with_borrow(|current| current.as_ref().map(f))
}

/// Makes the event of `writer` the current one, and moves the writer of the event that was current before to its place.
#[inline]
fn swap_current(writer: &mut Option<Writer>) {
    CURRENT_EVENT.with_borrow_mut(|current| mem::swap(current, writer));
}

/// Returns the current tracing span, if there is one. If no tracing subscriber enables any level, no span is looked up.
#[inline]
fn current_span() -> Option<Box<Span>> {
    if LevelFilter::current() == LevelFilter::OFF {
        return None;
    }
    Some(Span::current()).filter(|span| !span.is_disabled()).map(Box::new)
}

// === impl EventHandle ===

impl EventHandle {
    /// Runs `f` with this event as the current one.
    ///
    /// While `f` runs, the event stays open even if all other parts of the stack that run the call are dropped. A queue
    /// or an executor that cancels the call still ends the event.
    pub fn in_scope<T>(&self, f: impl FnOnce() -> T) -> T {
        let mut scope = Scope::new(self.writer(), None);
        let _entered = scope.enter();
        f()
    }

    /// Polls `future` with this event as the current one.
    ///
    /// While the returned future exists, the event stays open even if all other parts of the stack that run the call
    /// are dropped. A queue or an executor that cancels the call still ends the event.
    ///
    /// # Cancel safety
    ///
    /// Dropping the returned future drops `future`. If no other part of the stack runs the call, the call's event ends
    /// as CANCELLED.
    pub async fn instrument<F: Future>(self, future: F) -> F::Output {
        let mut scope = Scope::new(self.writer(), None);
        let mut future = pin!(future);
        std::future::poll_fn(|cx| {
            let _entered = scope.enter();
            future.as_mut().poll(cx)
        })
        .await
    }
}

// === impl CurrentContext ===

impl CurrentContext {
    /// The context when no event is current. Its stage (how far in the stack) is the innermost: [`attach`], which
    /// returns the current event only to a layer further in than the context's stage, then returns `None` to every
    /// layer.
    const NONE: Self = Self {
        event: 0,
        stage: Stage::Calling,
    };
}

// === impl Scope ===

impl Scope {
    #[inline]
    pub(crate) const fn new(event: Writer, span: Option<Box<Span>>) -> Self {
        Self {
            event: Some(event),
            span,
        }
    }

    /// Returns a scope with the event and the tracing span that are current on this thread.
    #[inline]
    pub(crate) fn capture() -> Self {
        Self {
            event: with_current(|writer| writer.at(CONTEXT.get().stage)),
            span: current_span(),
        }
    }

    /// Returns a scope with an event that has just been opened, and with its span. If `span` is `None`, the scope has
    /// the current span instead.
    pub(crate) fn capture_with(event: Writer, span: Option<Box<Span>>) -> Self {
        Self::new(event, span.or_else(current_span))
    }

    /// Returns the writer of the scope's event (the right to end the event). Returns `None` if the scope has no event.
    /// It cannot be called while the scope is entered, since the guard borrows the scope.
    pub(super) const fn event(&self) -> Option<&Writer> {
        self.event.as_ref()
    }

    /// Makes the scope's event and span current until the returned guard is dropped.
    #[inline]
    pub(crate) fn enter(&mut self) -> Entered<'_> {
        // The span is entered first, since that runs user code (the tracing subscriber): if it panics, the current
        // event has not been changed.
        let span = self.span.as_ref().map(|span| span.enter());
        let context = match &self.event {
            Some(writer) => {
                let (event, stage) = writer.position();
                CurrentContext { event, stage }
            }
            None => CurrentContext::NONE,
        };
        let outer = CONTEXT.replace(context);
        // Usually an outer layer has made the same event current. Then only the stage (how far in the stack) from which
        // the event is current changes, and the event's writer is not moved.
        let swapped = (outer.event != context.event).then(|| {
            swap_current(&mut self.event);
            &mut self.event
        });
        Entered {
            outer,
            swapped,
            _span: span,
        }
    }

    /// Marks the event as QUEUED: the call has a place in the queue.
    pub(crate) fn queued(&self) {
        if let Some(event) = self.event() {
            event.mark(RequestStatus::Queued);
        }
    }

    /// Returns a function that does what [`queued`](Self::queued) does, to be called when no lock is held.
    pub(crate) fn mark_queued(&self) -> impl FnOnce() + use<> {
        let event = self.event().map(|event| event.at(event.position().1));
        move || {
            if let Some(event) = event {
                event.mark(RequestStatus::Queued);
            }
        }
    }

    /// Lets the call start no further attempt. Returns whether the call may still finish: an attempt is on the wire, or
    /// the last one has succeeded. A call without an event always may.
    pub(crate) fn finish_attempts(&self) -> bool {
        self.event().is_none_or(Writer::finish_attempts)
    }

    /// Ends the event as FAILED, if it has not ended.
    pub(crate) fn fail(&self, error: &BoxError) {
        if let Some(event) = self.event() {
            event.finish(Outcome::Error(ErrorDetails::of(error)));
        }
    }

    /// Ends the event as CANCELLED, if it has not ended.
    pub(crate) fn cancel(&self) {
        if let Some(event) = self.event() {
            event.finish(Outcome::Cancelled);
        }
    }
}

// === impl Entered ===

impl Drop for Entered<'_> {
    #[inline]
    fn drop(&mut self) {
        if let Some(event) = &mut self.swapped {
            swap_current(event);
        }
        CONTEXT.set(self.outer);
    }
}
