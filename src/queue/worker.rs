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
use crate::{
    clock,
    error::{BoxError, Panicked},
    event::Scope,
};
use pin_project_lite::pin_project;
use std::{
    future::{Future, poll_fn},
    panic::{AssertUnwindSafe, catch_unwind},
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
        let mut worker = Worker {
            running: Running::new(),
            taken: None,
            in_hand: None,
            baton: baton.clone(),
            is_alone: workers == 1,
            at_work: AtWork::enter(backlog),
        };
        let task = tokio::spawn(poll_fn(move |cx| worker.poll(cx)));
        backlog.employ(task.abort_handle());
    }
}

/// Dropped, it first drops the calls it drives, then the one it was about to begin, then the service.
struct Worker<S, Req>
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

/// So many calls are begun before the worker lets other tasks run.
const AT_A_STRETCH: usize = 128;

impl<S, Req> Worker<S, Req>
where
    S: Service<Req>,
    S::Error: Into<BoxError>,
{
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        for _ in 0..AT_A_STRETCH {
            self.running.poll(cx);
            match self.poll_begin(cx) {
                Poll::Ready(Some(())) => {}
                Poll::Ready(None) if self.running.is_empty() => return Poll::Ready(()),
                Poll::Ready(None) | Poll::Pending => return Poll::Pending,
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Waits for the turn, a call, and the service to be ready for it, and begins the call. `None` when there will be
    /// no more.
    fn poll_begin(&mut self, cx: &mut Context<'_>) -> Poll<Option<()>> {
        let mut in_hand = match self.in_hand.take() {
            Some(in_hand) => in_hand,
            None => ready!(self.baton.poll_take(cx)),
        };
        let begun = self.poll_begin_with(in_hand.service(), cx);
        // Who waits keeps the turn; so does who is alone.
        if begun.is_pending() || self.is_alone {
            self.in_hand = Some(in_hand);
        }
        begun
    }

    fn poll_begin_with(&mut self, service: &mut S, cx: &mut Context<'_>) -> Poll<Option<()>> {
        let taken = match self.taken.take() {
            Some(taken) => taken,
            None => match ready!(self.at_work.0.poll_next(cx)) {
                Some(slot) => Taken(Some(slot)),
                None => return Poll::Ready(None),
            },
        };
        // Not asked to be ready for a call that is not wanted any more.
        if !taken.call().is_wanted() {
            return Poll::Ready(Some(()));
        }
        let ready = match guarded(|| service.poll_ready(cx)) {
            Ok(Poll::Ready(ready)) => ready.map_err(Into::into),
            Ok(Poll::Pending) => {
                // If it was cancelled meanwhile, its waker is not there to say so.
                if !taken.call().poll_wanted(cx) {
                    return Poll::Ready(Some(()));
                }
                self.taken = Some(taken);
                return Poll::Pending;
            }
            Err(panic) => Err(panic),
        };
        let slot = taken.begin();
        // From here to the wire, or to where it has to wait, the call goes at one go.
        let _moment = clock::shared();
        self.running.start(|drive, cx| drive.begin(slot, ready, service, cx));
        Poll::Ready(Some(()))
    }
}

/// Turns a panic into an error. What panicked is used again: a service that cannot bear that says so by panicking
/// again.
fn guarded<T>(f: impl FnOnce() -> T) -> Result<T, BoxError> {
    catch_unwind(AssertUnwindSafe(f)).map_err(|payload| Panicked::from_payload(&*payload).into())
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
            slot.cancel();
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
    /// The call is over: with a result, or cancelled.
    fn end(self, result: Option<Result<Res, BoxError>>) {
        let Self { scope, in_flight } = self;
        let slot = in_flight.leave();
        // With the slot may go a response that nobody waits for. What it does when it is dropped is its own affair.
        let _ = guarded(move || match result {
            Some(result) => {
                // First: whoever hears of the result is the last to know the event, and frees it where it was made.
                drop(scope);
                slot.finish(result);
            }
            None => {
                scope.cancel();
                slot.cancel();
            }
        });
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
    /// Makes the call, if it is still wanted, and polls it for the first time.
    #[inline]
    fn begin<S>(
        mut self: Pin<&mut Self>,
        slot: Arc<Slot<Req, Res>>,
        ready: Result<(), BoxError>,
        service: &mut S,
        cx: &mut Context<'_>,
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
        let polled = match ready {
            Ok(()) => guarded(|| {
                let _entered = call.scope.enter();
                this.future.set(Some(service.call(req)));
                this.future.as_mut().as_pin_mut().map(|future| future.poll(cx))
            }),
            Err(error) => {
                let _ = guarded(|| drop(req));
                Err(error)
            }
        };
        self.come_back(polled, cx)
    }

    fn come_back(
        self: Pin<&mut Self>,
        polled: Result<Option<Poll<Result<Res, E>>>, BoxError>,
        cx: &Context<'_>,
    ) -> Poll<()> {
        let mut this = self.project();
        let Some(call) = this.call.as_mut() else {
            return Poll::Ready(());
        };
        let result = match polled {
            Ok(Some(Poll::Pending)) => {
                // A call keeps its seat, and so its waker: once is enough.
                if *this.is_watched || call.in_flight.call().poll_wanted(cx) {
                    *this.is_watched = true;
                    return Poll::Pending;
                }
                None
            }
            Ok(Some(Poll::Ready(result))) => Some(result.map_err(Into::into)),
            Ok(None) => None,
            // It panicked, or could not be made.
            Err(error) => {
                call.scope.fail(&error);
                Some(Err(error))
            }
        };
        // The call is gone, and its permit is free, before anybody hears what came of it.
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
        let Some(call) = this.call.as_mut() else {
            return Poll::Ready(());
        };
        let polled = if call.in_flight.call().is_wanted() {
            guarded(|| {
                let _entered = call.scope.enter();
                this.future.as_mut().as_pin_mut().map(|future| future.poll(cx))
            })
        } else {
            Ok(None)
        };
        self.come_back(polled, cx)
    }
}
