//! The current event, as tracing has a current span.
//!
//! The layer that opens an event makes it *current* while it calls and polls the service below. Layers further in find
//! the event there. No request has to carry it, so every layer works for requests of any type.
//!
//! A layer takes part in the current event only if its [`Stage`] is further in than the stage from which the event was
//! made current. A call that is made from inside another call, for example from its closure, starts at an outer stage
//! and so gets an event of its own.
//!
//! A thread or a task that is spawned inside a layer has no current event. The code that spawns it can carry the event
//! over, as it would a span:
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

use super::{
    details::ErrorDetails,
    handle::{EventHandle, Stage, Writer},
    state::Outcome,
    status::RequestStatus,
};
use crate::error::BoxError;
use std::{cell::Cell, future::Future, pin::pin};
use tracing::Span;

/// The event and the span of one call, to be made current wherever the call continues.
///
/// Contains a [`Writer`]: if the scope is dropped before the call has ended, and no other part of the stack runs the
/// call, its event ends.
#[derive(Debug)]
pub(crate) struct Scope {
    /// Lent to [`CURRENT_EVENT`] while the scope is entered.
    event: Option<Writer>,
    /// `None` if no subscriber of tracing records it, as in most programs.
    span: Option<Box<Span>>,
}

/// The guard of an entered [`Scope`]. Dropping it makes the outer event and the outer span current again.
#[must_use = "the scope is left when this is dropped"]
pub(crate) struct Entered<'a> {
    outer: CurrentContext,
    /// The scope's field to which the event returns, and the outer event. `None` if an outer scope had made the same
    /// event current.
    swapped: Option<(&'a mut Option<Writer>, Option<Writer>)>,
    _span: Option<tracing::span::Entered<'a>>,
}

/// Which event is current, and from which stage it was made current.
#[derive(Clone, Copy)]
struct CurrentContext {
    /// The identifier of the event, which exists as long as it is current; 0 if there is none.
    event: usize,
    stage: Stage,
}

thread_local! {
    static CONTEXT: Cell<CurrentContext> = const { Cell::new(CurrentContext::NONE) };
    /// Kept apart from the context, which can be copied: most layers only compare it.
    static CURRENT_EVENT: Cell<Option<Writer>> = const { Cell::new(None) };
}

/// Returns the event of the call that is being made or polled on this thread, if there is one.
#[must_use]
pub fn current() -> Option<EventHandle> {
    with_current(|writer| writer.at(CONTEXT.get().stage).handle())
}

/// The writer of the current event for a layer at `stage`; `None` if the layer has to open an event of its own.
#[inline]
pub(super) fn attach(stage: Stage) -> Option<Writer> {
    if CONTEXT.get().stage >= stage {
        return None;
    }
    with_current(|writer| writer.at(stage))
}

#[inline]
fn with_current<T>(look: impl FnOnce(&Writer) -> T) -> Option<T> {
    if CONTEXT.get().event == 0 {
        return None;
    }
    CURRENT_EVENT.with(|current| {
        let writer = current.take();
        let seen = writer.as_ref().map(look);
        current.set(writer);
        seen
    })
}

fn current_span() -> Option<Box<Span>> {
    Some(Span::current()).filter(|span| !span.is_disabled()).map(Box::new)
}

// === impl EventHandle ===

impl EventHandle {
    /// Runs `f` with this event as the current one.
    ///
    /// While `f` runs, the event does not end merely because the call is dropped elsewhere.
    pub fn in_scope<T>(&self, f: impl FnOnce() -> T) -> T {
        let mut scope = Scope::new(self.writer(), None);
        let _entered = scope.enter();
        f()
    }

    /// Polls `future` with this event as the current one.
    ///
    /// While the returned future exists, the event does not end merely because the call is dropped elsewhere.
    ///
    /// # Cancel safety
    ///
    /// Dropping the returned future drops `future`. If no other part of the stack runs the call, its event ends as
    /// CANCELLED.
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
    /// No event is current. The innermost stage, so that no layer attaches to it.
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

    /// Captures the current event and the current span.
    #[inline]
    pub(crate) fn capture() -> Self {
        Self {
            event: with_current(|writer| writer.at(CONTEXT.get().stage)),
            span: current_span(),
        }
    }

    /// The scope of an event that has just been opened, and of its span; of the current span, if `span` is `None`.
    pub(crate) fn capture_with(event: Writer, span: Option<Box<Span>>) -> Self {
        Self::new(event, span.or_else(current_span))
    }

    /// The event. May be `None` while the scope is entered.
    pub(super) const fn event(&self) -> Option<&Writer> {
        self.event.as_ref()
    }

    /// Makes the event and the span current until the guard is dropped.
    #[inline]
    pub(crate) fn enter(&mut self) -> Entered<'_> {
        // First, since entering a span runs user code: if that panics, nothing has been swapped.
        let span = self.span.as_ref().map(|span| span.enter());
        let context = match &self.event {
            Some(writer) => CurrentContext {
                event: writer.address(),
                stage: writer.stage(),
            },
            None => CurrentContext::NONE,
        };
        let outer = CONTEXT.replace(context);
        // Usually an outer layer has made the same event current: then only the stage changes.
        let swapped = (outer.event != context.event).then(|| {
            let outer = CURRENT_EVENT.replace(self.event.take());
            (&mut self.event, outer)
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
        if let Some((event, outer)) = &mut self.swapped {
            **event = CURRENT_EVENT.replace(outer.take());
        }
        CONTEXT.set(self.outer);
    }
}
