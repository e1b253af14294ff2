//! [`EventLayer`]: a status on the way in, what came back on the way out.

use super::{
    describe::{Describe, ErrorDetails, Http, ResponseDetails},
    events::Events,
    handle::{EventHandle, Writer},
    record::RequestStatus,
    scope::{Scope, Stage, attach},
    state::Outcome,
};
use crate::{
    clock,
    error::{BoxError, Panicked},
};
use pin_project_lite::pin_project;
use std::{
    fmt,
    future::Future,
    marker::PhantomData,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    pin::Pin,
    task::{Context, Poll, ready},
};
use tower_layer::Layer;
use tower_service::Service;

/// Records calls. See the [module docs](super).
#[derive(Clone, Debug)]
pub struct EventLayer<D = Http> {
    stage: Stage,
    describe: D,
    events: Option<Events>,
    /// Down to the next event layer all is ours: see [`clock`].
    is_above_own_layers: bool,
}

/// A service whose calls are recorded. See the [module docs](super).
#[derive(Clone, Debug)]
pub struct EventService<S, D = Http> {
    inner: S,
    layer: EventLayer<D>,
}

pin_project! {
    /// The call; the current event while it is polled is its own.
    ///
    /// # Cancel safety
    ///
    /// Dropping it drops the call. If nobody else carries the call on, its event ends as CANCELLED.
    #[must_use = "futures do nothing unless polled"]
    pub struct ResponseFuture<F, D, Req> {
        // Before the record: the call is gone before its event ends.
        #[pin]
        future: F,
        record: Record,
        describe: D,
        request: PhantomData<fn(Req)>,
    }
}

/// This layer's part in the event of one call.
struct Record {
    scope: Scope,
    /// The number of the attempt, while the call is on the wire.
    attempt: Option<usize>,
    /// Whether this layer writes the outcome.
    ends: bool,
    is_above_own_layers: bool,
}

// === impl EventLayer ===

impl EventLayer {
    /// Outermost, above the queue: opens the event, PENDING until the [queue](crate::queue) below has a place for the
    /// call, and QUEUED from then on.
    #[must_use]
    pub fn queued() -> Self {
        Self::at(Stage::Queued)
    }

    /// Below the queue and above the limits: PROCESSING on the way in, the outcome on the way out.
    #[must_use]
    pub fn processing() -> Self {
        Self::at(Stage::Processing)
    }

    /// Around the client: CALLING on the way in, what came back for this attempt on the way out.
    #[must_use]
    pub fn calling() -> Self {
        Self::at(Stage::Calling)
    }

    fn at(stage: Stage) -> Self {
        Self {
            stage,
            describe: Http::default(),
            events: None,
            is_above_own_layers: false,
        }
    }
}

impl<D> EventLayer<D> {
    /// Records what `describe` tells of requests and responses. Default: [`Http`].
    #[must_use]
    pub fn describe<E>(self, describe: E) -> EventLayer<E> {
        EventLayer {
            stage: self.stage,
            describe,
            events: self.events,
            is_above_own_layers: self.is_above_own_layers,
        }
    }

    /// The events this layer opens are counted by `events`, and its subscribers are snapshot about them.
    #[must_use]
    pub fn report_to(mut self, events: &Events) -> Self {
        self.events = Some(events.clone());
        self
    }

    /// Down to the next event layer there are only layers of ours, so that what they do can share its moments.
    pub(crate) const fn above_own_layers(mut self, is_above_own_layers: bool) -> Self {
        self.is_above_own_layers = is_above_own_layers;
        self
    }
}

impl<S, D: Clone> Layer<S> for EventLayer<D> {
    type Service = EventService<S, D>;

    fn layer(&self, inner: S) -> Self::Service {
        EventService {
            inner,
            layer: self.clone(),
        }
    }
}

// === impl EventService ===

impl<S, D, Req> Service<Req> for EventService<S, D>
where
    S: Service<Req>,
    S::Error: Into<BoxError> + 'static,
    D: Describe<Req, S::Response> + Clone,
{
    type Response = S::Response;
    type Error = BoxError;
    type Future = ResponseFuture<S::Future, D, Req>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, req: Req) -> Self::Future {
        let EventLayer {
            stage,
            describe,
            events,
            is_above_own_layers,
        } = &self.layer;
        let _cached_now = clock::cache();
        let joined = attach(*stage);
        let opens = joined.is_none();
        let (writer, span) = match joined {
            Some(writer) => (writer, None),
            None => Writer::open(|details| describe.request(&req, details), events.clone(), *stage),
        };
        let attempt = match stage {
            Stage::Queued => None,
            Stage::Processing => {
                writer.mark(RequestStatus::Processing);
                None
            }
            Stage::Calling => Some(writer.attempt_started()),
        };
        let mut record = Record {
            scope: Scope::new(writer, span),
            attempt,
            ends: opens || *stage == Stage::Processing,
            is_above_own_layers: *is_above_own_layers,
        };
        let describe = describe.clone();
        ResponseFuture {
            future: record.inside(|| self.inner.call(req)),
            record,
            describe,
            request: PhantomData,
        }
    }
}

impl<S, D> EventService<S, D> {
    /// The service inside.
    pub const fn get_ref(&self) -> &S {
        &self.inner
    }

    /// The service inside.
    pub const fn get_mut(&mut self) -> &mut S {
        &mut self.inner
    }
}

// === impl ResponseFuture ===

impl<F, D, Req> ResponseFuture<F, D, Req> {
    /// The call's event.
    #[allow(clippy::missing_panics_doc, reason = "it is only away while the future is polled")]
    pub fn event(&self) -> EventHandle {
        self.record.event().expect("nobody looks while it is polled").handle()
    }

    /// The future inside. This layer has no more part in the event: it goes on if somebody else carries the call on, as
    /// a queue does, and ends as CANCELLED otherwise.
    pub fn into_inner(self) -> F {
        self.future
    }
}

impl<F, D, Req, Res, E> Future for ResponseFuture<F, D, Req>
where
    F: Future<Output = Result<Res, E>>,
    E: Into<BoxError> + 'static,
    D: Describe<Req, Res>,
{
    type Output = Result<Res, BoxError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let _cached_now = clock::cache();
        let result = ready!(this.record.inside(|| this.future.poll(cx).map_err(Into::into)));
        this.record.write(match &result {
            // Of one attempt among others only the code is kept.
            Ok(response) => Ok(ResponseDetails::of(this.describe, response, !this.record.ends)),
            Err(error) => Err(ErrorDetails::of_type::<E>(error)),
        });
        Poll::Ready(result)
    }
}

impl<F, D, Req> fmt::Debug for ResponseFuture<F, D, Req> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("event::ResponseFuture")
            .field("event", &self.record.event())
            .finish_non_exhaustive()
    }
}

// === impl Record ===

impl Record {
    const fn event(&self) -> Option<&Writer> {
        self.scope.event()
    }

    /// Calls or polls what is inside. A panic is written at once: whoever catches it further out may drop the call when
    /// nothing panics any more.
    #[inline]
    fn inside<T>(&mut self, f: impl FnOnce() -> T) -> T {
        let done = {
            let _bypass = (!self.is_above_own_layers).then(clock::bypass_cache);
            let _entered = self.scope.enter();
            catch_unwind(AssertUnwindSafe(f))
        };
        done.unwrap_or_else(|panic| {
            self.write(Err(ErrorDetails::of(&Panicked::from_payload(&*panic).into())));
            resume_unwind(panic)
        })
    }

    /// Writes what came back: to the attempt, and, if that is this layer's, to the call.
    fn write(&mut self, details: Result<ResponseDetails, ErrorDetails>) {
        let attempt = self.attempt.take();
        let Some(event) = self.event() else { return };
        if let Some(index) = attempt {
            event.attempt_ended(index, Some(&details));
        }
        if self.ends {
            event.finish(match details {
                Ok(response) => Outcome::Response(response),
                Err(error) => Outcome::Error(error),
            });
        }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        if let (Some(index), Some(event)) = (self.attempt, self.event()) {
            event.attempt_ended(index, None);
        }
    }
}
