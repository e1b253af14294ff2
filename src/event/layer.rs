//! [`EventLayer`]: records in a call's event a status on the way in, and the response or the error on the way out.

use super::{
    attempt::AttemptStart,
    describe::{Describe, Http},
    details::{ErrorDetails, ResponseDetails},
    events::Events,
    handle::{EventHandle, Stage, Writer},
    scope::{Scope, attach},
    state::Outcome,
    status::RequestStatus,
};
use crate::{
    clock,
    error::{BoxError, Cancelled, Panicked},
};
use pin_project_lite::pin_project;
use std::{
    any::Any,
    fmt,
    future::Future,
    marker::PhantomData,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    pin::Pin,
    task::{Context, Poll},
    thread,
};
use tower_layer::Layer;
use tower_service::Service;

/// Records every call in an event. See the [module docs](super).
#[derive(Clone, Debug)]
pub struct EventLayer<D = Http> {
    stage: Stage,
    describe: D,
    events: Option<Events>,
    /// Whether this layer and the next event layer below it in the stack share one cached reading of the [`clock`].
    /// They may share it only if all layers between them are of this crate: user code between them could take long,
    /// after which the reading would be stale.
    shares_cached_now: bool,
}

/// The service of [`EventLayer`]. See the [module docs](super).
#[derive(Clone, Debug)]
pub struct EventService<S, D = Http> {
    inner: S,
    layer: EventLayer<D>,
}

pin_project! {
    /// The future of [`EventService`]. While the future is polled, the call's event is the [current](super::current)
    /// one.
    ///
    /// # Panics
    ///
    /// May panic when polled after it has completed.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future drops the call. If no other part of the stack, such as a queue, runs the call, the call's
    /// event ends as CANCELLED.
    #[must_use = "futures do nothing unless polled"]
    pub struct ResponseFuture<F, D, Req> {
        // The future of the inner service; `None` after it has completed. It is declared before the recorder, and so is
        // dropped before it: dropping the recorder may end the event, which must not end before the call is dropped.
        #[pin]
        future: Option<F>,
        recorder: Recorder,
        // Whether the attempt was refused, because the call was to end with its earlier attempts. `future` is `None` then.
        is_refused: bool,
        describe: D,
        request: PhantomData<fn(Req)>,
    }

    impl<F, D, Req> PinnedDrop for ResponseFuture<F, D, Req> {
        // A call that is dropped before it has ended records what it has waited for, so it is dropped with its event as the
        // current one.
        fn drop(this: Pin<&mut Self>) {
            let mut this = this.project();
            if this.future.is_some() {
                let _entered = this.recorder.scope.enter();
                this.future.set(None);
            }
        }
    }
}

/// Writes what one event layer records to the event of one call.
struct Recorder {
    scope: Scope,
    /// The index of this attempt in the event, while the attempt is on the wire. `None` after the attempt, and in a
    /// layer that is not around the client.
    attempt: Option<usize>,
    /// Whether this layer writes the outcome of the whole call, because it opened the event or is the layer below the
    /// queue.
    writes_outcome: bool,
    shares_cached_now: bool,
}

// === impl EventLayer ===

impl EventLayer {
    /// Creates the outermost event layer, above the queue. The layer opens the call's event, whose status is PENDING
    /// until the call gets a place in the [queue](crate::queue) below, and QUEUED from then on.
    #[must_use]
    pub fn queued() -> Self {
        Self::at(Stage::Queued)
    }

    /// Creates the event layer below the queue and above the concurrency and rate limits. The layer writes the status
    /// PROCESSING to the call's event on the way in, and the outcome of the call on the way out.
    #[must_use]
    pub fn processing() -> Self {
        Self::at(Stage::Processing)
    }

    /// Creates the event layer around the client. The layer writes the status CALLING to the call's event on the way
    /// in, and the response or the error of the attempt on the way out.
    #[must_use]
    pub fn calling() -> Self {
        Self::at(Stage::Calling)
    }

    fn at(stage: Stage) -> Self {
        Self {
            stage,
            describe: Http::default(),
            events: None,
            shares_cached_now: false,
        }
    }
}

impl<D> EventLayer<D> {
    /// Sets what the event records of requests and responses: see [`Describe`]. Default: [`Http`].
    #[must_use]
    pub fn describe<E>(self, describe: E) -> EventLayer<E> {
        EventLayer {
            stage: self.stage,
            describe,
            events: self.events,
            shares_cached_now: self.shares_cached_now,
        }
    }

    /// Reports the events that this layer opens to `events`, which counts them and notifies its subscribers. Default:
    /// the events are not reported.
    #[must_use]
    pub fn report_to(mut self, events: &Events) -> Self {
        self.events = Some(events.clone());
        self
    }

    /// Sets whether this layer and the next event layer below it in the stack share one cached reading of the clock.
    /// They may share it only if all layers between them are of this crate, because user code between them could take
    /// long, after which the reading would be stale. Default: they do not share it.
    pub(crate) const fn share_cached_now(mut self, shares_cached_now: bool) -> Self {
        self.shares_cached_now = shares_cached_now;
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
            shares_cached_now,
        } = &self.layer;
        let _cached_now = clock::cache();
        let attached = attach(*stage);
        let opens = attached.is_none();
        let (writer, span) = attached.map_or_else(
            || {
                let reporter = events.as_ref().map(Events::reporter);
                Writer::open(|details| describe.request(&req, details), reporter, *stage, false)
            },
            |writer| (writer, None),
        );
        let mut is_refused = false;
        let attempt = match stage {
            Stage::Queued => None,
            Stage::Processing => {
                writer.mark(RequestStatus::Processing);
                None
            }
            Stage::Calling => match writer.attempt_started() {
                AttemptStart::Started(index) => Some(index),
                AttemptStart::Ended => None,
                AttemptStart::Refused => {
                    is_refused = true;
                    None
                }
            },
        };
        let mut recorder = Recorder {
            scope: Scope::new(writer, span),
            attempt,
            writes_outcome: opens || *stage == Stage::Processing,
            shares_cached_now: *shares_cached_now,
        };
        // The request is taken, and the inner future is stored, inside the closure: both may be large, and moving them
        // through the closure's captures and its result would copy each of them several times.
        let (mut req, mut future) = (Some(req), None);
        let called = recorder.enter(|| {
            if let Some(req) = req.take().filter(|_| !is_refused) {
                future = Some(self.inner.call(req));
            }
        });
        if let Err(panic) = called {
            recorder.write_panic(&*panic);
            resume_unwind(panic)
        }
        // Cloned before the future is built: the clone may panic, and the inner future would be copied aside for that.
        let describe = describe.clone();
        ResponseFuture {
            future,
            recorder,
            is_refused,
            describe,
            request: PhantomData,
        }
    }
}

impl<S, D> EventService<S, D> {
    /// Returns a reference to the inner service.
    pub const fn get_ref(&self) -> &S {
        &self.inner
    }

    /// Returns a mutable reference to the inner service.
    pub const fn get_mut(&mut self) -> &mut S {
        &mut self.inner
    }
}

// === impl ResponseFuture ===

impl<F, D, Req> ResponseFuture<F, D, Req> {
    /// Returns a handle to the call's event.
    #[allow(
        clippy::missing_panics_doc,
        reason = "the scope lends the event only while the future is polled"
    )]
    pub fn event(&self) -> EventHandle {
        let event = self.recorder.event();
        event.expect("the future is not being polled").handle()
    }

    /// Returns the inner future, whose result this layer then does not write to the event. The event stays open if
    /// another part of the stack, such as a queue, runs the call, and ends as CANCELLED otherwise.
    ///
    /// # Panics
    ///
    /// Panics if this future has completed, or if the attempt was refused because the executor finishes only the calls
    /// that have been sent ([`Shutdown::SentWithin`](crate::Shutdown::SentWithin)).
    pub fn into_inner(mut self) -> F {
        self.future.take().expect("the future has not completed")
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
        let mut this = self.project();
        if *this.is_refused {
            // Another attempt, such as the first of two that run at once, is not disturbed.
            let is_over = this.recorder.event().is_none_or(Writer::cancel_refused);
            return if is_over {
                Poll::Ready(Err(Cancelled::new().into()))
            } else {
                Poll::Pending
            };
        }
        let _cached_now = clock::cache();
        // When the call has ended, the inner future is dropped before the end is recorded, and with it what the call
        // holds, such as a permit: when a reader finds the event ended, nothing of the call is left.
        let mut polled = Poll::Pending;
        let entered = this.recorder.enter(|| {
            let future = this.future.as_mut().as_pin_mut();
            if let Poll::Ready(result) = future.expect("`ResponseFuture` polled after completion").poll(cx) {
                polled = Poll::Ready(result.map_err(Into::into));
                this.future.set(None);
            }
        });
        if let Err(panic) = entered {
            let _ = crate::panic::catch_unwind(|| this.future.set(None));
            this.recorder.write_panic(&*panic);
            resume_unwind(panic)
        }
        let Poll::Ready(result) = &polled else { return polled };
        this.recorder.write(match result {
            Ok(response) => {
                let mut details = ResponseDetails {
                    code_only: !this.recorder.writes_outcome,
                    ..ResponseDetails::default()
                };
                this.describe.response(response, &mut details);
                Ok(details)
            }
            Err(error) => {
                let mut details = ErrorDetails::of_type::<E>(error);
                this.describe.error(error, &mut details.response);
                Err(details)
            }
        });
        polled
    }
}

impl<F, D, Req> fmt::Debug for ResponseFuture<F, D, Req> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("event::ResponseFuture")
            .field("event", &self.recorder.event())
            .finish_non_exhaustive()
    }
}

// === impl Recorder ===

impl Recorder {
    const fn event(&self) -> Option<&Writer> {
        self.scope.event()
    }

    /// Calls or polls the inner service with the call's event and span as the current ones, and catches a panic.
    ///
    /// The panic has to be written with [`write_panic`](Self::write_panic) and resumed. If it were not written, and a
    /// layer further out caught it, the event's writers would be dropped when the thread no longer panics, and the event
    /// would end as CANCELLED instead of FAILED.
    #[inline]
    fn enter<T>(&mut self, f: impl FnOnce() -> T) -> thread::Result<T> {
        let _bypass = (!self.shares_cached_now).then(clock::bypass_cache);
        let _entered = self.scope.enter();
        catch_unwind(AssertUnwindSafe(f))
    }

    /// Writes a panic of the inner service to the event, as its error.
    fn write_panic(&mut self, panic: &(dyn Any + Send)) {
        self.write(Err(ErrorDetails::of(&Panicked::from_payload(panic).into())));
    }

    /// Writes the response or the error to the event: to the attempt if this layer is around the client, and to the
    /// call if this layer writes its outcome.
    fn write(&mut self, details: Result<ResponseDetails, Box<ErrorDetails>>) {
        let attempt = self.attempt.take();
        let Some(event) = self.event() else { return };
        if let Some(index) = attempt {
            event.attempt_ended(index, Some(&details));
        }
        if self.writes_outcome {
            event.finish(match details {
                Ok(response) => Outcome::Response(response),
                Err(error) => Outcome::Error(error),
            });
        }
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        if let (Some(index), Some(event)) = (self.attempt, self.event()) {
            event.attempt_ended(index, None);
        }
    }
}
