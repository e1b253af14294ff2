//! The workers: they take the next call when the service is ready for it, and drive it to its end.
//!
//! One worker at a time has the service, and with it the acquire: it waits for a call, asks the service to be ready *for
//! that call*, calls it, and passes the service on. So calls start in the order in which they came, however many
//! workers there are, and nobody holds a service ready without a call to use it.
//!
//! What is below may panic. That fails the one call it happened in.

use super::{
    call_set::CallSet,
    channel::{Channel, InFlight, WorkerGuard},
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

/// Spawns `workers` tasks that work on the channel until it is closed and empty.
///
/// # Panics
///
/// Outside a Tokio runtime.
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

/// Dropped, it first drops the calls it drives, then the one it was about to begin, then the service.
pub(super) struct Worker<S, Req>
where
    S: Service<Req>,
{
    call_set: CallSet<RunningCall<S::Future, Req, S::Response>>,
    pending: Option<PendingCall<Req, S::Response>>,
    service_guard: Option<ServiceGuard<S>>,
    service_lock: ServiceLock<S>,
    /// Nobody else wants the service.
    is_only_worker: bool,
    guard: WorkerGuard<Req, S::Response>,
}

/// What a worker goes on with.
enum Next {
    /// The call in this slot, which has been made.
    Call(usize),
    /// A call that was cancelled, or could not be made.
    Nothing,
    /// There will be no more.
    End,
}

/// So many calls are begun before the worker lets other tasks run.
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
            call_set: CallSet::new(),
            pending: None,
            service_guard: None,
            service_lock: service_lock.clone(),
            is_only_worker,
            guard: WorkerGuard::enter(channel),
        }
    }

    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        for _ in 0..MAX_STARTS_PER_POLL {
            self.call_set.poll(cx);
            match self.poll_next(cx) {
                Poll::Ready(Next::Call(slot)) => self.call_set.poll_slot(slot),
                Poll::Ready(Next::Nothing) => {}
                Poll::Ready(Next::End) if self.call_set.is_empty() => return Poll::Ready(()),
                Poll::Ready(Next::End) | Poll::Pending => return Poll::Pending,
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Waits for the acquire, a call, and the service to be ready for it, and makes the call. Its first poll is for when
    /// the service has been passed on: it may compute.
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Next> {
        let mut service_guard = match self.service_guard.take() {
            Some(service_guard) => service_guard,
            None => ready!(self.service_lock.poll_acquire(cx)),
        };
        let next = self.poll_make(service_guard.service(), cx);
        // Who waits keeps the acquire; so does who is alone.
        if next.is_pending() || self.is_only_worker {
            self.service_guard = Some(service_guard);
        }
        next
    }

    fn poll_make(&mut self, service: &mut S, cx: &mut Context<'_>) -> Poll<Next> {
        let pending = match self.pending.take() {
            Some(pending) => pending,
            None => match ready!(self.guard.0.poll_next(cx)) {
                Some(message) => PendingCall(Some(message)),
                None => return Poll::Ready(Next::End),
            },
        };
        // Not asked to be ready for a call that is not wanted any more.
        if !pending.call().is_wanted() {
            return Poll::Ready(Next::Nothing);
        }
        let ready = match catch_unwind(|| service.poll_ready(cx).map_err(Into::into)) {
            Ok(Poll::Ready(ready)) => ready,
            Ok(Poll::Pending) => {
                // If it was cancelled meanwhile, its waker is not there to say so.
                if !pending.call().poll_wanted(cx) {
                    return Poll::Ready(Next::Nothing);
                }
                self.pending = Some(pending);
                return Poll::Pending;
            }
            Err(panic) => Err(panic),
        };
        let message = pending.begin();
        let slot = self.call_set.slot(|drive| drive.make(message, ready, service));
        Poll::Ready(slot.map_or(Next::Nothing, Next::Call))
    }
}

/// A call in a worker's hands. Dropped before it begins, with the worker, it is cancelled.
struct PendingCall<Req, Res>(Option<Arc<Message<Req, Res>>>);

impl<Req, Res> PendingCall<Req, Res> {
    fn call(&self) -> &Message<Req, Res> {
        self.0.as_ref().expect("it is pending until it begins")
    }

    fn begin(mut self) -> Arc<Message<Req, Res>> {
        self.0.take().expect("it is pending until it begins")
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
    /// Drives one call, if there is one. Dropped before the end, with the worker, the call is cancelled.
    struct RunningCall<F, Req, Res> {
        #[pin]
        future: Option<F>,
        // Whether the caller can wake us to say that it has cancelled.
        is_watched: bool,
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

/// A call that has begun.
struct StartedCall<Req, Res> {
    scope: Scope,
    in_flight: InFlight<Req, Res>,
}

impl<Req, Res> StartedCall<Req, Res> {
    /// Nobody further in could write this failure. The error may panic when it is asked what it says: then that is the
    /// failure.
    fn fail(&self, error: BoxError) -> BoxError {
        let Err(panic) = catch_unwind(|| self.scope.fail(&error)) else {
            return error;
        };
        let _ = catch_unwind(|| drop(error));
        let _ = catch_unwind(|| self.scope.fail(&panic));
        panic
    }

    /// The call is over: with a result, or cancelled.
    fn end(self, result: Option<Result<Res, BoxError>>) {
        let Self { scope, in_flight } = self;
        let message = in_flight.leave();
        // With the message may go a response that nobody waits for, and with the scope a span. What they do when they are
        // dropped is their own affair.
        match result {
            Some(result) => {
                // First the scope: whoever hears of the result is the last to know the event, and frees it where it was
                // made.
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
            is_watched: false,
            call: None,
        }
    }
}

impl<F, Req, Res, E> RunningCall<F, Req, Res>
where
    F: Future<Output = Result<Res, E>>,
    E: Into<BoxError>,
{
    /// Makes the call, if it is still wanted. Ready if it is over already.
    fn make<S>(
        mut self: Pin<&mut Self>,
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
        *this.is_watched = false;
        let call = this.call.insert(StartedCall {
            scope,
            in_flight: InFlight::enter(message),
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

    /// The call is gone, and its permit is free, before anybody hears what came of it.
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
        if !call.in_flight.call().is_wanted() {
            return self.conclude(None);
        }
        let polled = catch_unwind(|| {
            let _entered = call.scope.enter();
            future.poll(cx).map_err(Into::into)
        });
        let result = match polled {
            Ok(Poll::Ready(result)) => result,
            Ok(Poll::Pending) => {
                // A call keeps its slot, and so its waker: once is enough.
                if *this.is_watched || call.in_flight.call().poll_wanted(cx) {
                    *this.is_watched = true;
                    return Poll::Pending;
                }
                return self.conclude(None);
            }
            Err(panic) => Err(call.fail(panic)),
        };
        self.conclude(Some(result))
    }
}
