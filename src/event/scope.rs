//! The current event, as tracing has a current span.
//!
//! The layer that opens an event makes it *current* while it calls and polls what is inside. Layers further in find it
//! there: no request has to carry it, so every layer works for requests of any type.
//!
//! A layer joins the current event only if it stands further in than whoever made it current. So a call that is made
//! from inside another call (from its closure, say) is a call of its own.
//!
//! Whoever spawns inside a layer carries the event over, as with a span:
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
    describe::ErrorDetails,
    handle::{EventHandle, Writer},
    record::RequestStatus,
    state::Outcome,
};
use crate::error::BoxError;
use std::{cell::Cell, future::Future, pin::pin};
use tracing::Span;

/// How far in the stack something stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Stage {
    Queued,
    Processing,
    Calling,
}

/// A call's event and span, to be carried to where the call goes on.
///
/// Dropped before the call is over, it counts as one who gave up: see [`Writer`].
#[derive(Debug)]
pub(crate) struct Scope {
    event: Option<Writer>,
    /// If there is one: mostly nobody listens to spans.
    span: Option<Box<Span>>,
}

/// Dropped, the event and the span that were current before are so again.
#[must_use = "the scope is left when this is dropped"]
pub(crate) struct Entered<'a> {
    outer: Context,
    /// Where the event came from, and the one it is for now; `None` if it was current already.
    swapped: Option<(&'a mut Option<Writer>, Option<Writer>)>,
    _span: Option<tracing::span::Entered<'a>>,
}

impl Drop for Entered<'_> {
    #[inline]
    fn drop(&mut self) {
        if let Some((event, outer)) = &mut self.swapped {
            **event = CURRENT.replace(outer.take());
        }
        CONTEXT.set(self.outer);
    }
}

/// Where in a stack the thread is: in which call, and how far in.
#[derive(Clone, Copy)]
struct Context {
    /// The address of the call's event, which is alive as long as it is current. Zero: no call.
    event: usize,
    stage: Stage,
}

const NONE: Context = Context {
    event: 0,
    stage: Stage::Calling,
};

thread_local! {
    static CURRENT: Cell<Option<Writer>> = const { Cell::new(None) };
    static CONTEXT: Cell<Context> = const { Cell::new(NONE) };
}

/// The event of the call that is being made or polled right now, if there is one.
#[must_use]
pub fn current() -> Option<EventHandle> {
    with_current(|writer| writer.at(CONTEXT.get().stage).handle())
}

#[inline]
fn with_current<T>(look: impl FnOnce(&Writer) -> T) -> Option<T> {
    if CONTEXT.get().event == 0 {
        return None;
    }
    CURRENT.with(|current| {
        let writer = current.take();
        let seen = writer.as_ref().map(look);
        current.set(writer);
        seen
    })
}

fn current_span() -> Option<Box<Span>> {
    Some(Span::current()).filter(|span| !span.is_disabled()).map(Box::new)
}

impl EventHandle {
    /// Runs `f` with this event as the current one.
    pub fn in_scope<T>(&self, f: impl FnOnce() -> T) -> T {
        let mut scope = Scope::new(self.writer(), None);
        let _entered = scope.enter();
        f()
    }

    /// Polls `future` with this event as the current one.
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

impl Scope {
    #[inline]
    pub(crate) const fn new(event: Writer, span: Option<Box<Span>>) -> Self {
        Self {
            event: Some(event),
            span,
        }
    }

    /// The event and the span that are current context.
    #[inline]
    pub(crate) fn capture() -> Self {
        Self {
            event: with_current(|writer| writer.at(CONTEXT.get().stage)),
            span: current_span(),
        }
    }

    /// The same, with an event that has just been opened and its span, if that is recorded.
    pub(crate) fn capture_with(event: Writer, span: Option<Box<Span>>) -> Self {
        Self::new(event, span.or_else(current_span))
    }

    /// The event; may be `None` while it is the current one.
    pub(super) const fn event(&self) -> Option<&Writer> {
        self.event.as_ref()
    }

    /// Makes event and span current, until this is dropped.
    #[inline]
    pub(crate) fn enter(&mut self) -> Entered<'_> {
        // First, because others' code runs context.
        let span = self.span.as_ref().map(|span| span.enter());
        let context = match &self.event {
            Some(writer) => Context {
                event: writer.address(),
                stage: writer.stage(),
            },
            None => NONE,
        };
        let outer = CONTEXT.replace(context);
        // Mostly an outer layer of the same call has been context: then only the stage is another.
        let swapped = (outer.event != context.event).then(|| {
            let outer = CURRENT.replace(self.event.take());
            (&mut self.event, outer)
        });
        Entered {
            outer,
            swapped,
            _span: span,
        }
    }

    /// The call has a place in the queue.
    pub(crate) fn queued(&self) {
        if let Some(event) = self.event() {
            event.mark(RequestStatus::Queued);
        }
    }

    /// The call failed before anybody further in could know.
    pub(crate) fn fail(&self, error: &BoxError) {
        if let Some(event) = self.event() {
            event.finish(Outcome::Error(ErrorDetails::of(error)));
        }
    }

    /// The call is not going to be made, or not to its end.
    pub(crate) fn cancel(&self) {
        if let Some(event) = self.event() {
            event.finish(Outcome::Cancelled);
        }
    }
}

/// The current event, if a layer at `stage` belongs to it.
#[inline]
pub(super) fn attach(stage: Stage) -> Option<Writer> {
    // Nobody is further in than nowhere.
    if CONTEXT.get().stage >= stage {
        return None;
    }
    with_current(|writer| writer.at(stage))
}
