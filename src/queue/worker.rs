//! The workers of a queue. Each worker takes calls from the channel, calls the service when it is ready, and drives the
//! calls' futures to their end.
//!
//! Only the worker that holds the [`ServiceLock`] calls the service. This worker waits for a call, then waits until the
//! service is ready for it, calls the service, and releases the lock. So calls begin in the order in which they were
//! accepted, however many workers there are, and the service is never made ready without a call that uses the
//! readiness.
//!
//! The service is user code and may panic. A panic fails only the call in which it happened; the worker continues.

use super::{
    call_set::CallSet,
    channel::{Channel, InFlightGuard, WorkerGuard},
    message::Message,
    service_lock::{ServiceGuard, ServiceLock},
};
use crate::{error::BoxError, event::Scope, panic::catch_unwind};
use pin_project_lite::pin_project;
use std::{
    future::{Future, poll_fn},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};
use tower_service::Service;

/// Spawns `workers` tasks that run the calls of `channel`. The tasks end when the channel is closed and empty and their
/// calls have ended.
///
/// # Panics
///
/// Panics outside a Tokio runtime.
pub(super) fn spawn<S, Req>(service: S, workers: usize, channel: &Arc<Channel<Req, S::Response>>)
where
    S: Service<Req> + Send + 'static,
    S::Error: Into<BoxError>,
    S::Future: Send,
    S::Response: Send + 'static,
    Req: Send + 'static,
{
    let service_lock = ServiceLock::new(service);
    for _ in 0..workers {
        let mut worker = Worker::new(&service_lock, workers == 1, channel);
        let task = tokio::spawn(poll_fn(move |cx| worker.poll(cx)));
        channel.register(task.abort_handle());
    }
}

/// One worker. The fields are dropped in the order of their declaration: first the running calls, then the call that
/// was about to begin, then the guard of the service.
pub(super) struct Worker<S, Req>
where
    S: Service<Req>,
{
    running: CallSet<RunningCall<S::Future, Req, S::Response>>,
    pending: Option<PendingCall<Req, S::Response>>,
    service_guard: Option<ServiceGuard<S>>,
    service_lock: ServiceLock<S>,
    /// Whether the queue has no other worker, so that this worker never releases the service lock.
    is_only_worker: bool,
    guard: WorkerGuard<Req, S::Response>,
}

/// The result of an attempt to begin the next call.
enum Next {
    /// The service was called. The call's future is in the slot with this index and has not been polled yet.
    Call(usize),
    /// No future was made: the call was cancelled, or the service returned an error from `poll_ready` or panicked.
    Nothing,
    /// The channel is closed and empty, so there is no next call.
    End,
}

/// How many calls a worker begins in one poll before it yields to other tasks of the runtime. In Tokio's cooperative
/// budget, a task has the same number of operations per poll.
const MAX_STARTS_PER_POLL: usize = 128;

impl<S, Req> Worker<S, Req>
where
    S: Service<Req>,
    S::Error: Into<BoxError>,
{
    pub(super) fn new(
        service_lock: &ServiceLock<S>,
        is_only_worker: bool,
        channel: &Arc<Channel<Req, S::Response>>,
    ) -> Self {
        Self {
            running: CallSet::new(),
            pending: None,
            service_guard: None,
            service_lock: service_lock.clone(),
            is_only_worker,
            guard: WorkerGuard::enter(channel),
        }
    }

    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        for _ in 0..MAX_STARTS_PER_POLL {
            self.running.poll(cx);
            match self.poll_next(cx) {
                // The new call's future is polled at once, before the next call begins, so that calls reach the limits
                // below the queue in order. It is polled after the service lock was released, because the future may
                // compute for a long time.
                Poll::Ready(Next::Call(slot)) => self.running.poll_slot(slot),
                Poll::Ready(Next::Nothing) => {}
                Poll::Ready(Next::End) if self.running.is_empty() => return Poll::Ready(()),
                Poll::Ready(Next::End) | Poll::Pending => return Poll::Pending,
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Waits for the service lock, for a call, and for the service to be ready for the call. Then calls the service.
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Next> {
        let mut service_guard = match self.service_guard.take() {
            Some(guard) => guard,
            None => ready!(self.service_lock.poll_acquire(cx)),
        };
        let next = self.poll_make(service_guard.service(), cx);
        // A worker keeps the service lock while it waits for a call or for the service's readiness. The only worker of
        // a queue always keeps it.
        if next.is_pending() || self.is_only_worker {
            self.service_guard = Some(service_guard);
        }
        next
    }

    fn poll_make(&mut self, service: &mut S, cx: &mut Context<'_>) -> Poll<Next> {
        let pending = match self.pending.take() {
            Some(pending) => pending,
            None => match ready!(self.guard.channel.poll_next(cx)) {
                Some(message) => PendingCall(Some(message)),
                None => return Poll::Ready(Next::End),
            },
        };
        // The service's readiness is not polled for a call that is cancelled.
        if pending.message().is_cancelled() {
            return Poll::Ready(Next::Nothing);
        }
        let ready = match catch_unwind(|| service.poll_ready(cx).map_err(Into::into)) {
            Ok(Poll::Ready(ready)) => ready,
            Ok(Poll::Pending) => {
                // The call may have been cancelled after `is_cancelled` was checked, when the worker's waker was not
                // registered yet. So `poll_cancelled` checks again when it registers the waker.
                if pending.message().poll_cancelled(cx).is_ready() {
                    return Poll::Ready(Next::Nothing);
                }
                self.pending = Some(pending);
                return Poll::Pending;
            }
            Err(panic) => Err(panic),
        };
        let message = pending.into_message();
        let channel = &self.guard.channel;
        let slot = self
            .running
            .insert(|running| running.make(channel, message, ready, service));
        Poll::Ready(slot.map_or(Next::Nothing, Next::Call))
    }
}

/// A call that a worker took from the channel and that has not begun. If the worker is dropped before the call begins,
/// the call is cancelled.
struct PendingCall<Req, Res>(Option<Arc<Message<Req, Res>>>);

impl<Req, Res> PendingCall<Req, Res> {
    fn message(&self) -> &Message<Req, Res> {
        self.0.as_ref().expect("the message is there until `into_message`")
    }

    fn into_message(mut self) -> Arc<Message<Req, Res>> {
        self.0.take().expect("the message is there until `into_message`")
    }
}

impl<Req, Res> Drop for PendingCall<Req, Res> {
    fn drop(&mut self) {
        if let Some(message) = &self.0 {
            let _ = catch_unwind(|| message.cancel());
        }
    }
}

pin_project! {
    /// The future of one call, or an empty future, which a slot of the call set keeps between two calls. If the worker
    /// is dropped before the call ends, the call is cancelled.
    struct RunningCall<F, Req, Res> {
        #[pin]
        future: Option<F>,
        // Whether the waker of the call's slot is registered to be woken when the caller cancels the call.
        is_watching: bool,
        call: Option<StartedCall<Req, Res>>,
    }

    impl<F, Req, Res> PinnedDrop for RunningCall<F, Req, Res> {
        fn drop(this: Pin<&mut Self>) {
            let mut this = this.project();
            if let Some(call) = this.call.take() {
                let _ = catch_unwind(|| this.future.set(None));
                call.end(None);
            }
        }
    }
}

/// What a running call has besides its future: its scope (event and span) and the guard that counts it as in flight.
struct StartedCall<Req, Res> {
    scope: Scope,
    in_flight: InFlightGuard<Req, Res>,
}

impl<Req, Res> StartedCall<Req, Res> {
    /// Writes a failure to the call's event and returns the failure. The layers below cannot write it, because it is a
    /// panic or an error from `poll_ready`. Writing formats the error, which runs user code: if that panics, the call
    /// fails with that panic instead.
    fn fail(&self, error: BoxError) -> BoxError {
        let Err(panic) = catch_unwind(|| self.scope.fail(&error)) else {
            return error;
        };
        let _ = catch_unwind(|| drop(error));
        let _ = catch_unwind(|| self.scope.fail(&panic));
        panic
    }

    /// Ends the call with `result`, or as cancelled if `result` is `None`.
    fn end(self, result: Option<Result<Res, BoxError>>) {
        let Self { scope, in_flight } = self;
        let message = in_flight.leave();
        // Each step is wrapped in `catch_unwind` because it may drop user values: a response that the caller does not
        // fetch, or a tracing span.
        match result {
            Some(result) => {
                // The scope is dropped before the caller is woken, so that the caller has the last handle to the event
                // and frees the event's memory on the thread that allocated it.
                let _ = catch_unwind(move || drop(scope));
                let _ = catch_unwind(move || message.finish(result));
            }
            None => {
                let _ = catch_unwind(|| scope.cancel());
                let _ = catch_unwind(move || message.cancel());
                let _ = catch_unwind(move || drop(scope));
            }
        }
    }
}

impl<F, Req, Res> Default for RunningCall<F, Req, Res> {
    fn default() -> Self {
        Self {
            future: None,
            is_watching: false,
            call: None,
        }
    }
}

impl<F, Req, Res, E> RunningCall<F, Req, Res>
where
    F: Future<Output = Result<Res, E>>,
    E: Into<BoxError>,
{
    /// Calls the service, or fails the call if `ready` is an error. Returns `Ready` if the call has ended already,
    /// because it was cancelled or has failed.
    fn make<S>(
        mut self: Pin<&mut Self>,
        channel: &Arc<Channel<Req, Res>>,
        message: Arc<Message<Req, Res>>,
        ready: Result<(), BoxError>,
        service: &mut S,
    ) -> Poll<()>
    where
        S: Service<Req, Future = F>,
    {
        let Some((req, scope)) = message.begin() else {
            return Poll::Ready(());
        };
        let mut this = self.as_mut().project();
        *this.is_watching = false;
        let call = this.call.insert(StartedCall {
            scope,
            in_flight: InFlightGuard::enter(channel, message),
        });
        let made = match ready {
            Ok(()) => catch_unwind(|| {
                let _entered = call.scope.enter();
                this.future.set(Some(service.call(req)));
            }),
            Err(error) => {
                let _ = catch_unwind(|| drop(req));
                Err(error)
            }
        };
        match made {
            Ok(()) => Poll::Pending,
            Err(error) => {
                let error = call.fail(error);
                self.conclude(Some(Err(error)))
            }
        }
    }

    /// Ends the call. The call's future, and with it the call's permit, is dropped before the caller is woken with the
    /// result, so that a caller that makes another call at once finds the permit free.
    fn conclude(self: Pin<&mut Self>, result: Option<Result<Res, BoxError>>) -> Poll<()> {
        let mut this = self.project();
        let _ = catch_unwind(|| this.future.set(None));
        if let Some(call) = this.call.take() {
            call.end(result);
        }
        Poll::Ready(())
    }
}

impl<F, Req, Res, E> Future for RunningCall<F, Req, Res>
where
    F: Future<Output = Result<Res, E>>,
    E: Into<BoxError>,
{
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut this = self.as_mut().project();
        let (Some(future), Some(call)) = (this.future.as_mut().as_pin_mut(), this.call.as_mut()) else {
            return Poll::Ready(());
        };
        if call.in_flight.message().is_cancelled() {
            return self.conclude(None);
        }
        let polled = catch_unwind(|| {
            let _entered = call.scope.enter();
            future.poll(cx).map_err(Into::into)
        });
        let result = match polled {
            Ok(Poll::Ready(result)) => result,
            Ok(Poll::Pending) => {
                // The waker has to be registered only once per call, because a call's future stays in its slot and is
                // always polled with the waker of that slot.
                if *this.is_watching || call.in_flight.message().poll_cancelled(cx).is_pending() {
                    *this.is_watching = true;
                    return Poll::Pending;
                }
                return self.conclude(None);
            }
            Err(panic) => Err(call.fail(panic)),
        };
        self.conclude(Some(result))
    }
}
