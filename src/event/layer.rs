//! [`EventLayer`]: a status on the way in, what came back on the way out.

use super::{
    describe::{Describe, ErrorDetails, Http, RequestDetails, ResponseDetails},
    handle::{EventHandle, Outcome, Writer},
    hub::Events,
    record::RequestStatus,
    scope::{Scope, Stage, join},
};
use crate::error::BoxError;
use pin_project_lite::pin_project;
use std::{
    fmt,
    future::Future,
    marker::PhantomData,
    pin::Pin,
    task::{Context, Poll, ready},
};
use tower_layer::Layer;
use tower_service::Service;
use tracing::Span;

/// Records calls. See the [module docs](super).
#[derive(Clone, Debug)]
pub struct EventLayer<D = Http> {
    stage: Stage,
    describe: D,
    events: Option<Events>,
}

/// A service whose calls are recorded. See the [module docs](super).
#[derive(Clone, Debug)]
pub struct Event<S, D = Http> {
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
        // Before the scope: the call is gone before its event ends.
        #[pin]
        future: F,
        attempt: Option<OpenAttempt>,
        scope: Scope,
        event: EventHandle,
        // Whether this layer writes the outcome.
        ends: bool,
        describe: D,
        request: PhantomData<fn(Req)>,
    }
}

/// A call on the wire. Dropped before anything came back, it is not there any more.
struct OpenAttempt {
    event: EventHandle,
    index: usize,
    ended: bool,
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
        }
    }

    /// The events this layer opens are counted by `events`, and its subscribers are told about them.
    #[must_use]
    pub fn report_to(mut self, events: &Events) -> Self {
        self.events = Some(events.clone());
        self
    }
}

impl<S, D: Clone> Layer<S> for EventLayer<D> {
    type Service = Event<S, D>;

    fn layer(&self, inner: S) -> Self::Service {
        Event {
            inner,
            layer: self.clone(),
        }
    }
}

// === impl Event ===

impl<S, D, Req> Service<Req> for Event<S, D>
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
        } = &self.layer;
        let joined = join(*stage);
        let opens = joined.is_none();
        let (writer, span) = match joined {
            Some(event) => (Writer::of(&event), Span::none()),
            None => Writer::open(RequestDetails::of(describe, &req), events.clone(), *stage),
        };
        let event = writer.handle().clone();
        let mut scope = Scope::new(writer, span);

        let mut attempt = None;
        match stage {
            Stage::Queued => {}
            Stage::Processing => event.mark(RequestStatus::Processing),
            Stage::Calling => {
                let index = event.attempt_started();
                attempt = Some(OpenAttempt {
                    event: event.clone(),
                    index,
                    ended: false,
                });
            }
        }
        let future = scope.enter(|| self.inner.call(req));
        ResponseFuture {
            future,
            attempt,
            scope,
            event,
            ends: opens || *stage == Stage::Processing,
            describe: describe.clone(),
            request: PhantomData,
        }
    }
}

impl<S, D> Event<S, D> {
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
    pub const fn event(&self) -> &EventHandle {
        &self.event
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
        let result = ready!(this.scope.enter(|| this.future.poll(cx))).map_err(Into::into);

        let details = |code_only| match &result {
            Ok(response) => Ok(ResponseDetails::of(this.describe, response, code_only)),
            Err(error) => Err(ErrorDetails::of_type::<E>(error)),
        };
        if let Some(attempt) = this.attempt.as_mut() {
            attempt.end(Some(&details(true)));
        }
        if *this.ends {
            this.event.finish(match details(false) {
                Ok(response) => Outcome::Response(response),
                Err(error) => Outcome::Error(error),
            });
        }
        Poll::Ready(result)
    }
}

impl<F, D, Req> fmt::Debug for ResponseFuture<F, D, Req> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("event::ResponseFuture")
            .field("event", &self.event)
            .finish_non_exhaustive()
    }
}

// === impl OpenAttempt ===

impl OpenAttempt {
    fn end(&mut self, came_back: Option<&Result<ResponseDetails, ErrorDetails>>) {
        if !self.ended {
            self.ended = true;
            self.event.attempt_ended(self.index, came_back);
        }
    }
}

impl Drop for OpenAttempt {
    fn drop(&mut self) {
        self.end(None);
    }
}
