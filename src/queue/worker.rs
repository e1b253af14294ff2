//! The workers: they take the next call when the service is ready for it, and drive it to its end.
//!
//! One worker at a time has the service, and with it the turn: it waits for a call, asks the service to be ready *for
//! that call*, calls it, and passes the service on. So calls start in the order in which they came, however many
//! workers there are, and nobody holds a service ready without a call to use it.
//!
//! What is below may panic. That fails the one call it happened in.

use super::{
    backlog::{AtWork, Backlog, InFlight},
    slot::{Queued, Slot},
};
use crate::{
    error::{BoxError, Panicked},
    event::Scope,
};
use futures_util::{StreamExt, stream::FuturesUnordered};
use pin_project_lite::pin_project;
use std::{
    future::{Future, poll_fn},
    panic::{AssertUnwindSafe, catch_unwind},
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
};
use tokio::sync::Mutex;
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
    let turn = Arc::new(Mutex::new(service));
    for _ in 0..workers {
        let at_work = AtWork::enter(backlog);
        let task = tokio::spawn(work(turn.clone(), at_work));
        backlog.employ(task.abort_handle());
    }
}

async fn work<S, Req>(turn: Arc<Mutex<S>>, at_work: AtWork<Req, S::Response>)
where
    S: Service<Req>,
    S::Error: Into<BoxError>,
{
    let backlog = &at_work.0;
    let mut calls = FuturesUnordered::new();
    let mut next = pin!(next_call(turn.clone(), backlog));
    let mut more = true;
    while more || !calls.is_empty() {
        // `next` is kept when a call ends first: the call in its hands is not lost. Running calls come first, so that a
        // call has had its first poll, and taken its permit, before the next one is begun.
        tokio::select! {
            biased;
            Some(()) = calls.next(), if !calls.is_empty() => {}
            call = next.as_mut(), if more => match call {
                Some(call) => {
                    calls.push(call);
                    next.set(next_call(turn.clone(), backlog));
                }
                None => more = false,
            },
        }
    }
}

/// Waits for the turn, a call, and the service to be ready for it, and makes the call. `None` when there will be no
/// more.
async fn next_call<S, Req>(
    turn: Arc<Mutex<S>>,
    backlog: &Arc<Backlog<Req, S::Response>>,
) -> Option<Drive<S::Future, Req, S::Response>>
where
    S: Service<Req>,
    S::Error: Into<BoxError>,
{
    let mut service = turn.lock().await;
    loop {
        let taken = Taken(backlog.next().await?);
        let slot = &taken.0;
        let ready = poll_fn(|cx| {
            if !slot.poll_wanted(cx) {
                return Poll::Ready(None);
            }
            guarded(|| service.poll_ready(cx)).map_or_else(
                |panic| Poll::Ready(Some(Err(panic))),
                |poll| poll.map(|ready| Some(ready.map_err(Into::into))),
            )
        });
        // None: cancelled while it waited.
        let Some(ready) = ready.await else { continue };
        let Some(Queued { req, mut scope, place }) = slot.begin() else {
            continue;
        };
        drop(place);
        let in_flight = InFlight::enter(backlog);
        let called = match ready {
            Ok(()) => guarded(|| scope.enter(|| service.call(req))),
            Err(error) => {
                let _ = guarded(|| drop(req));
                Err(error)
            }
        };
        match called {
            Ok(future) => {
                let call = Driven {
                    slot: slot.clone(),
                    scope,
                    in_flight,
                };
                return Some(Drive {
                    future: Some(future),
                    call: Some(call),
                });
            }
            Err(error) => {
                scope.fail(&error);
                slot.finish(Err(error));
            }
        }
    }
}

/// Turns a panic into an error. What panicked is used again: a service that cannot bear that says so by panicking
/// again.
fn guarded<T>(f: impl FnOnce() -> T) -> Result<T, BoxError> {
    catch_unwind(AssertUnwindSafe(f)).map_err(|payload| Panicked::from_payload(&*payload).into())
}

/// A call in a worker's hands. Dropped before it begins, with the worker, it is cancelled.
struct Taken<Req, Res>(Arc<Slot<Req, Res>>);

impl<Req, Res> Drop for Taken<Req, Res> {
    fn drop(&mut self) {
        if self.0.is_queued() {
            self.0.cancel();
        }
    }
}

pin_project! {
    /// Drives one call. Dropped before the end, with the worker, the call is cancelled.
    struct Drive<F, Req, Res> {
        #[pin]
        future: Option<F>,
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
    slot: Arc<Slot<Req, Res>>,
    scope: Scope,
    in_flight: InFlight<Req, Res>,
}

impl<Req, Res> Driven<Req, Res> {
    /// The call is over: with a result, or cancelled.
    fn end(self, result: Option<Result<Res, BoxError>>) {
        let Self { slot, scope, in_flight } = self;
        drop(in_flight);
        // With the slot may go a response that nobody waits for. What it does when it is dropped is its own affair.
        let _ = guarded(move || match result {
            Some(result) => slot.finish(result),
            None => {
                scope.cancel();
                slot.cancel();
            }
        });
    }
}

impl<F, Req, Res, E> Future for Drive<F, Req, Res>
where
    F: Future<Output = Result<Res, E>>,
    E: Into<BoxError>,
{
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut this = self.project();
        let (Some(future), Some(call)) = (this.future.as_mut().as_pin_mut(), this.call.as_mut()) else {
            return Poll::Ready(());
        };
        let mut result = None;
        if call.slot.poll_wanted(cx) {
            match guarded(|| call.scope.enter(|| future.poll(cx))) {
                Ok(Poll::Pending) => return Poll::Pending,
                Ok(Poll::Ready(done)) => result = Some(done.map_err(Into::into)),
                Err(panic) => {
                    call.scope.fail(&panic);
                    result = Some(Err(panic));
                }
            }
        }
        // The call is gone, and its permit is free, before anybody hears what came of it.
        let _ = guarded(|| this.future.set(None));
        if let Some(call) = this.call.take() {
            call.end(result);
        }
        Poll::Ready(())
    }
}
