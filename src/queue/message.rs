//! [`Message`]: one accepted call, between its caller and the worker that drives it.

use crate::{
    error::{BoxError, Cancelled},
    event::Scope,
    panic,
    semaphore::Permit,
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
};
use std::{
    fmt, mem,
    sync::{Arc, PoisonError},
    task::{Context, Poll, Waker},
};

/// Shared by the caller's [`ResponseFuture`](super::ResponseFuture), the channel and the worker.
///
/// Wakers are woken, and user values dropped, only after the lock is released: both run user code, which may come back
/// to this message.
pub(super) struct Message<Req, Res> {
    /// Whether the stage is `Done` because the call was cancelled. Readable without the lock.
    cancelled: AtomicBool,
    state: Mutex<MessageState<Req, Res>>,
}

struct MessageState<Req, Res> {
    stage: Stage,
    payload: Payload<Req, Res>,
    /// The caller's event and span, while the call is queued.
    scope: Option<Scope>,
    /// The place in the queue, while the call is queued.
    place: Option<Permit>,
    /// Woken when there is a response.
    caller: Option<Waker>,
    /// Woken when the caller cancels the call.
    worker: Option<Waker>,
}

#[derive(Clone, Copy, PartialEq)]
enum Stage {
    /// In the channel, or taken by a worker that waits for the service to be ready.
    Queued,
    /// Begun: a worker drives the inner service's future.
    Running,
    /// Has a response, which the caller may have fetched already.
    Done,
}

/// The request, and later the response. They share their memory, and both are moved as seldom as possible, since they
/// may be large. Each is `None` after it was taken.
enum Payload<Req, Res> {
    Request(Option<Req>),
    Response(Option<Result<Res, BoxError>>),
}

// === impl Message ===

impl<Req, Res> Message<Req, Res> {
    /// Makes a message, and moves the request out of `req` directly to its place in the allocation.
    #[inline]
    pub(super) fn new(req: &mut Option<Req>, scope: Scope, place: Permit) -> Arc<Self> {
        let mut message = Arc::new(Self {
            cancelled: AtomicBool::new(false),
            state: Mutex::new(MessageState {
                stage: Stage::Queued,
                payload: Payload::Request(None),
                scope: Some(scope),
                place: Some(place),
                caller: None,
                worker: None,
            }),
        });
        if let Some(Self { state, .. }) = Arc::get_mut(&mut message) {
            state.get_mut().unwrap_or_else(PoisonError::into_inner).payload = Payload::Request(req.take());
        }
        message
    }

    /// Waits for the response.
    pub(super) fn poll_response(&self, cx: &mut Context<'_>) -> Poll<Result<Res, BoxError>> {
        let mut state = self.lock();
        if state.stage == Stage::Done {
            let result = match &mut state.payload {
                Payload::Response(result) => result.take(),
                Payload::Request(_) => None,
            };
            return Poll::Ready(result.expect("a `ResponseFuture` is not polled after it has completed"));
        }
        let replaced = register(&mut state.caller, cx.waker());
        drop(state);
        drop(replaced);
        Poll::Pending
    }

    /// Ends the call with [`Cancelled`], unless it has ended already. Returns whether it was still queued. A call that
    /// is running is dropped by its worker.
    pub(super) fn cancel(&self) -> bool {
        let mut state = self.lock();
        let stage = mem::replace(&mut state.stage, Stage::Done);
        if stage == Stage::Done {
            return false;
        }
        let payload = mem::replace(
            &mut state.payload,
            Payload::Response(Some(Err(Cancelled::new().into()))),
        );
        let (scope, place) = (state.scope.take(), state.place.take());
        let wakers = [state.caller.take(), state.worker.take()];
        self.cancelled.store(true, Ordering::Release);
        drop(state);
        drop(place);
        wakers.into_iter().flatten().for_each(panic::wake);
        if let Some(scope) = scope {
            scope.cancel();
        }
        // Last: dropping a request runs user code, which may panic.
        drop(payload);
        stage == Stage::Queued
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }

    /// Returns `Ready` if the call is cancelled. Otherwise the worker is woken when it is.
    pub(super) fn poll_cancelled(&self, cx: &Context<'_>) -> Poll<()> {
        let mut state = self.lock();
        if state.stage == Stage::Done {
            return Poll::Ready(());
        }
        let replaced = register(&mut state.worker, cx.waker());
        drop(state);
        drop(replaced);
        Poll::Pending
    }

    /// Begins the call, and frees its place in the queue. Returns its request and its scope, or `None` if it was
    /// cancelled.
    #[inline]
    pub(super) fn begin(&self) -> Option<(Req, Scope)> {
        let mut state = self.lock();
        if state.stage != Stage::Queued {
            return None;
        }
        state.stage = Stage::Running;
        let (scope, place) = (state.scope.take()?, state.place.take());
        let Payload::Request(req) = &mut state.payload else {
            return None;
        };
        let req = req.take()?;
        drop(state);
        drop(place);
        Some((req, scope))
    }

    /// Ends the call with this result, unless it was cancelled after it had begun.
    pub(super) fn finish(&self, result: Result<Res, BoxError>) {
        let mut state = self.lock();
        if state.stage != Stage::Running {
            drop(state);
            drop(result);
            return;
        }
        state.stage = Stage::Done;
        state.payload = Payload::Response(Some(result));
        let (caller, worker) = (state.caller.take(), state.worker.take());
        drop(state);
        drop(worker);
        if let Some(caller) = caller {
            panic::wake(caller);
        }
    }

    fn lock(&self) -> MutexGuard<'_, MessageState<Req, Res>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<Req, Res> fmt::Debug for Message<Req, Res> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.lock();
        f.write_str(match (state.stage, &state.payload) {
            (Stage::Queued, _) => "Queued",
            (Stage::Running, _) => "Running",
            (Stage::Done, Payload::Response(Some(_))) => "Done",
            (Stage::Done, _) => "Fetched",
        })
    }
}

/// Stores `waker` in `slot`, unless the waker there wakes the same task. Returns the replaced waker, to be dropped
/// after the lock is released: dropping it may drop a task, and with that the future of this very message.
fn register(slot: &mut Option<Waker>, waker: &Waker) -> Option<Waker> {
    match slot {
        Some(registered) if registered.will_wake(waker) => None,
        _ => slot.replace(waker.clone()),
    }
}
