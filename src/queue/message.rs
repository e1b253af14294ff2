//! [`Message`]: one accepted call, between the caller who waits for it and the worker who drives it.

use super::channel::Channel;
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

/// Shared by the caller's future, the channel and the worker.
pub(super) struct Message<Req, Res> {
    channel: Arc<Channel<Req, Res>>,
    /// The stage is Done because of that: to be told without the lock.
    cancelled: AtomicBool,
    state: Mutex<State<Req, Res>>,
}

struct State<Req, Res> {
    stage: Stage,
    body: Body<Req, Res>,
    /// As long as it is queued.
    scope: Option<Scope>,
    place: Option<Permit>,
    /// Who waits for the response.
    caller: Option<Waker>,
    /// Who has to know when the caller cancels.
    worker: Option<Waker>,
}

#[derive(Clone, Copy, PartialEq)]
enum Stage {
    /// In the channel, or in a worker's hands until the service is ready for it.
    Queued,
    /// Called; a worker drives it.
    CallSet,
    /// The response waits to be fetched, or was.
    Done,
}

/// What goes in and comes out. Neither is small, and neither is moved more than it must be.
///
/// The options are there to be pending out of their place.
enum Body<Req, Res> {
    Request(Option<Req>),
    Response(Option<Result<Res, BoxError>>),
}

// === impl Message ===

impl<Req, Res> Message<Req, Res> {
    /// The request is pending from where it is to where it stays.
    #[inline]
    pub(super) fn new(
        channel: Arc<Channel<Req, Res>>,
        req: &mut Option<Req>,
        scope: Scope,
        place: Permit,
    ) -> Arc<Self> {
        let mut message = Arc::new(Self {
            channel,
            cancelled: AtomicBool::new(false),
            state: Mutex::new(State {
                stage: Stage::Queued,
                body: Body::Request(None),
                scope: Some(scope),
                place: Some(place),
                caller: None,
                worker: None,
            }),
        });
        if let Some(Self { state, .. }) = Arc::get_mut(&mut message) {
            state.get_mut().unwrap_or_else(PoisonError::into_inner).body = Body::Request(req.take());
        }
        message
    }

    pub(super) const fn channel(&self) -> &Arc<Channel<Req, Res>> {
        &self.channel
    }

    /// The caller waits.
    pub(super) fn poll_response(&self, cx: &mut Context<'_>) -> Poll<Result<Res, BoxError>> {
        let mut state = self.lock();
        if state.stage == Stage::Done {
            let result = match &mut state.body {
                Body::Response(result) => result.take(),
                Body::Request(_) => None,
            };
            return Poll::Ready(result.expect("a future is not polled after it was ready"));
        }
        let before = remember(&mut state.caller, cx.waker());
        drop(state);
        drop(before);
        Poll::Pending
    }

    /// The call is not wanted any more. Returns whether it was still queued; if it runs, its worker drops it.
    pub(super) fn cancel(&self) -> bool {
        let mut state = self.lock();
        let stage = mem::replace(&mut state.stage, Stage::Done);
        if stage == Stage::Done {
            return false;
        }
        let body = mem::replace(&mut state.body, Body::Response(Some(Err(Cancelled::new().into()))));
        let (scope, place) = (state.scope.take(), state.place.take());
        let wakers = [state.caller.take(), state.worker.take()];
        self.cancelled.store(true, Ordering::Release);
        drop(state);
        // Nothing of others' is dropped or woken under the lock.
        drop(place);
        wakers.into_iter().flatten().for_each(panic::wake);
        if let Some(scope) = scope {
            scope.cancel();
        }
        drop(body);
        stage == Stage::Queued
    }

    /// Whether somebody still wants the call.
    pub(super) fn is_wanted(&self) -> bool {
        !self.cancelled.load(Ordering::Acquire)
    }

    /// A worker has the call in hand and cannot go on: whether it is still wanted, now and until the waker says
    /// otherwise.
    pub(super) fn poll_wanted(&self, cx: &Context<'_>) -> bool {
        let mut state = self.lock();
        if state.stage == Stage::Done {
            return false;
        }
        let before = remember(&mut state.worker, cx.waker());
        drop(state);
        drop(before);
        true
    }

    /// A worker begins the call, unless it has been cancelled. Its place is free.
    #[inline]
    pub(super) fn begin(&self) -> Option<(Req, Scope)> {
        let mut state = self.lock();
        if state.stage != Stage::Queued {
            return None;
        }
        state.stage = Stage::CallSet;
        let (scope, place) = (state.scope.take()?, state.place.take());
        let Body::Request(req) = &mut state.body else {
            return None;
        };
        let req = req.take()?;
        drop(state);
        drop(place);
        Some((req, scope))
    }

    /// The worker is done with the call. If it was cancelled meanwhile, that stays.
    pub(super) fn finish(&self, result: Result<Res, BoxError>) {
        let mut state = self.lock();
        if state.stage != Stage::CallSet {
            // What came too late is not dropped under the lock.
            drop(state);
            drop(result);
            return;
        }
        state.stage = Stage::Done;
        state.body = Body::Response(Some(result));
        let (caller, worker) = (state.caller.take(), state.worker.take());
        drop(state);
        drop(worker);
        if let Some(caller) = caller {
            panic::wake(caller);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<Req, Res>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<Req, Res> fmt::Debug for Message<Req, Res> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.lock();
        f.write_str(match (state.stage, &state.body) {
            (Stage::Queued, _) => "Queued",
            (Stage::CallSet, _) => "CallSet",
            (Stage::Done, Body::Response(Some(_))) => "Done",
            (Stage::Done, _) => "Over",
        })
    }
}

/// Returns the waker that stood there before, to be dropped without the lock: it may drop a task, and with it this
/// call.
fn remember(message: &mut Option<Waker>, waker: &Waker) -> Option<Waker> {
    match message {
        Some(known) if known.will_wake(waker) => None,
        _ => message.replace(waker.clone()),
    }
}
