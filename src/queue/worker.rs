//! The workers: they take the next call when the service is ready for it, and drive it to its end.
//!
//! One worker at a time has the service, and with it the turn: it waits for a call, asks the service to be ready *for
//! that call*, calls it, and passes the service on. So calls start in the order in which they came, however many
//! workers there are, and nobody holds a service ready without a call to use it.
//!
//! What is below may panic. That fails the one call it happened in.

use super::{
    backlog::{AtWork, Backlog, InFlight},
    baton::{Baton, InHand},
    running::Running,
    slot::Slot,
};
use crate::{error::BoxError, event::Scope, guard::guarded};
use pin_project_lite::pin_project;
use std::{
    future::{Future, poll_fn},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};
use tower_service::Service;

/// Spawns `workers` tasks that work on the backlog until it is closed and empty.
///
/// # Panics
///
/// Outside a Tokio runtime.
pub(super) fn spawn<S, Req>(service: S, workers: usize, backlog: &Arc<Backlog<Req, S::Response>>)
where
    S: Service<Req> + Send + 'static,
    S::Error: Into<BoxError>,
    S::Future: Send,
    S::Response: Send + 'static,
    Req: Send + 'static,
{
    let baton = Baton::new(service);
    for _ in 0..workers {
        let mut worker = Worker::new(&baton, workers == 1, backlog);
        let task = tokio::spawn(poll_fn(move |cx| worker.poll(cx)));
        backlog.employ(task.abort_handle());
    }
}

/// Dropped, it first drops the calls it drives, then the one it was about to begin, then the service.
pub(super) struct Worker<S, Req>
where
    S: Service<Req>,
{
    running: Running<Drive<S::Future, Req, S::Response>>,
    taken: Option<Taken<Req, S::Response>>,
    in_hand: Option<InHand<S>>,
    baton: Baton<S>,
    /// Nobody else wants the service.
    is_alone: bool,
    at_work: AtWork<Req, S::Response>,
}

/// What a worker goes on with.
enum Next {
    /// The call in this seat, which has been made.
    Call(usize),
    /// A call that was cancelled, or could not be made.
    Nothing,
    /// There will be no more.
    End,
}

/// So many calls are begun before the worker lets other tasks run.
const AT_A_STRETCH: usize = 128;

impl<S, Req> Worker<S, Req>
where
    S: Service<Req>,
    S::Error: Into<BoxError>,
{
    pub(super) fn new(baton: &Baton<S>, is_alone: bool, backlog: &Arc<Backlog<Req, S::Response>>) -> Self {
        Self {
            running: Running::new(),
            taken: None,
            in_hand: None,
            baton: baton.clone(),
            is_alone,
            at_work: AtWork::enter(backlog),
        }
    }

    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        for _ in 0..AT_A_STRETCH {
            self.running.poll(cx);
            match self.poll_next(cx) {
                Poll::Ready(Next::Call(seat)) => self.running.serve(seat),
                Poll::Ready(Next::Nothing) => {}
                Poll::Ready(Next::End) if self.running.is_empty() => return Poll::Ready(()),
                Poll::Ready(Next::End) | Poll::Pending => return Poll::Pending,
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Waits for the turn, a call, and the service to be ready for it, and makes the call. Its first poll is for when
    /// the service has been passed on: it may compute.
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Next> {
        let mut in_hand = match self.in_hand.take() {
            Some(in_hand) => in_hand,
            None => ready!(self.baton.poll_take(cx)),
        };
        let next = self.poll_make(in_hand.service(), cx);
        // Who waits keeps the turn; so does who is alone.
        if next.is_pending() || self.is_alone {
            self.in_hand = Some(in_hand);
        }
        next
    }

    fn poll_make(&mut self, service: &mut S, cx: &mut Context<'_>) -> Poll<Next> {
        let taken = match self.taken.take() {
            Some(taken) => taken,
            None => match ready!(self.at_work.0.poll_next(cx)) {
                Some(slot) => Taken(Some(slot)),
                None => return Poll::Ready(Next::End),
            },
        };
        // Not asked to be ready for a call that is not wanted any more.
        if !taken.call().is_wanted() {
            return Poll::Ready(Next::Nothing);
        }
        let ready = match guarded(|| service.poll_ready(cx).map_err(Into::into)) {
            Ok(Poll::Ready(ready)) => ready,
            Ok(Poll::Pending) => {
                // If it was cancelled meanwhile, its waker is not there to say so.
                if !taken.call().poll_wanted(cx) {
                    return Poll::Ready(Next::Nothing);
                }
                self.taken = Some(taken);
                return Poll::Pending;
            }
            Err(panic) => Err(panic),
        };
        let slot = taken.begin();
        let seat = self.running.seat(|drive| drive.make(slot, ready, service));
        Poll::Ready(seat.map_or(Next::Nothing, Next::Call))
    }
}

/// A call in a worker's hands. Dropped before it begins, with the worker, it is cancelled.
struct Taken<Req, Res>(Option<Arc<Slot<Req, Res>>>);

impl<Req, Res> Taken<Req, Res> {
    fn call(&self) -> &Slot<Req, Res> {
        self.0.as_ref().expect("it is taken until it begins")
    }

    fn begin(mut self) -> Arc<Slot<Req, Res>> {
        self.0.take().expect("it is taken until it begins")
    }
}

impl<Req, Res> Drop for Taken<Req, Res> {
    fn drop(&mut self) {
        if let Some(slot) = &self.0 {
            let _ = guarded(|| slot.cancel());
        }
    }
}

pin_project! {
    /// Drives one call, if there is one. Dropped before the end, with the worker, the call is cancelled.
    struct Drive<F, Req, Res> {
        #[pin]
        future: Option<F>,
        // Whether the caller can wake us to say that it has cancelled.
        is_watched: bool,
        call: Option<Driven<Req, Res>>,
    }

    impl<F, Req, Res> PinnedDrop for Drive<F, Req, Res> {
        fn drop(this: Pin<&mut Self>) {
            let mut this = this.project();
            if let Some(call) = this.call.take() {
                let _ = guarded(|| this.future.set(None));
                call.end(None);
            }
        }
    }
}

/// A call that has begun.
struct Driven<Req, Res> {
    scope: Scope,
    in_flight: InFlight<Req, Res>,
}

impl<Req, Res> Driven<Req, Res> {
    /// Nobody further in could write this failure. The error may panic when it is asked what it says: then that is the
    /// failure.
    fn fail(&self, error: BoxError) -> BoxError {
        let Err(panic) = guarded(|| self.scope.fail(&error)) else {
            return error;
        };
        let _ = guarded(|| drop(error));
        let _ = guarded(|| self.scope.fail(&panic));
        panic
    }

    /// The call is over: with a result, or cancelled.
    fn end(self, result: Option<Result<Res, BoxError>>) {
        let Self { scope, in_flight } = self;
        let slot = in_flight.leave();
        // With the slot may go a response that nobody waits for, and with the scope a span. What they do when they are
        // dropped is their own affair.
        match result {
            Some(result) => {
                // First the scope: whoever hears of the result is the last to know the event, and frees it where it was
                // made.
                let _ = guarded(move || drop(scope));
                let _ = guarded(move || slot.finish(result));
            }
            None => {
                let _ = guarded(|| scope.cancel());
                let _ = guarded(move || slot.cancel());
                let _ = guarded(move || drop(scope));
            }
        }
    }
}

impl<F, Req, Res> Default for Drive<F, Req, Res> {
    fn default() -> Self {
        Self {
            future: None,
            is_watched: false,
            call: None,
        }
    }
}

impl<F, Req, Res, E> Drive<F, Req, Res>
where
    F: Future<Output = Result<Res, E>>,
    E: Into<BoxError>,
{
    /// Makes the call, if it is still wanted. Ready if it is over already.
    fn make<S>(
        mut self: Pin<&mut Self>,
        slot: Arc<Slot<Req, Res>>,
        ready: Result<(), BoxError>,
        service: &mut S,
    ) -> Poll<()>
    where
        S: Service<Req, Future = F>,
    {
        let Some((req, scope)) = slot.begin() else {
            return Poll::Ready(());
        };
        let mut this = self.as_mut().project();
        *this.is_watched = false;
        let call = this.call.insert(Driven {
            scope,
            in_flight: InFlight::enter(slot),
        });
        let made = match ready {
            Ok(()) => guarded(|| {
                let _entered = call.scope.enter();
                this.future.set(Some(service.call(req)));
            }),
            Err(error) => {
                let _ = guarded(|| drop(req));
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
        let _ = guarded(|| this.future.set(None));
        if let Some(call) = this.call.take() {
            call.end(result);
        }
        Poll::Ready(())
    }
}

impl<F, Req, Res, E> Future for Drive<F, Req, Res>
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
        let polled = guarded(|| {
            let _entered = call.scope.enter();
            future.poll(cx).map_err(Into::into)
        });
        let result = match polled {
            Ok(Poll::Ready(result)) => result,
            Ok(Poll::Pending) => {
                // A call keeps its seat, and so its waker: once is enough.
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
