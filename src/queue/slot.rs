//! [`Slot`]: one accepted call, between the caller who waits for it and the worker who drives it.

use super::backlog::Backlog;
use crate::{
    error::{BoxError, Cancelled},
    event::Scope,
    line::count::Held,
};
use std::{
    fmt, mem,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Waker},
};

/// Shared by the caller's future, the backlog and the worker.
pub(super) struct Slot<Req, Res> {
    backlog: Arc<Backlog<Req, Res>>,
    cancelled: AtomicBool,
    state: Mutex<State<Req, Res>>,
}

struct State<Req, Res> {
    stage: Stage<Req, Res>,
    /// Who waits for the response.
    caller: Option<Waker>,
    /// Who has to know when the caller cancels.
    worker: Option<Waker>,
}

/// The options are there to be taken out of their place.
enum Stage<Req, Res> {
    /// In the backlog, or in a worker's hands until the service is ready for it.
    Queued(Option<Queued<Req>>),
    /// Called; a worker drives it.
    Running,
    /// The response waits to be fetched, or was.
    Done(Option<Result<Res, BoxError>>),
}

/// All that a call brings along.
pub(super) struct Queued<Req> {
    pub(super) req: Req,
    pub(super) scope: Scope,
    /// Given back when the call begins.
    pub(super) place: Held,
}

// === impl Slot ===

impl<Req, Res> Slot<Req, Res> {
    /// Without its call, which is put where it stays: a request is not small.
    pub(super) fn empty(backlog: Arc<Backlog<Req, Res>>) -> Arc<Self> {
        Arc::new(Self {
            backlog,
            cancelled: AtomicBool::new(false),
            state: Mutex::new(State {
                stage: Stage::Queued(None),
                caller: None,
                worker: None,
            }),
        })
    }

    #[inline]
    pub(super) fn put(&self, req: Req, scope: Scope, place: Held) {
        self.lock().stage = Stage::Queued(Some(Queued { req, scope, place }));
    }

    pub(super) const fn backlog(&self) -> &Arc<Backlog<Req, Res>> {
        &self.backlog
    }

    /// The caller waits.
    pub(super) fn poll_response(&self, cx: &mut Context<'_>) -> Poll<Result<Res, BoxError>> {
        let mut state = self.lock();
        if let Stage::Done(result) = &mut state.stage {
            return Poll::Ready(result.take().expect("a future is not polled after it was ready"));
        }
        let before = remember(&mut state.caller, cx.waker());
        drop(state);
        drop(before);
        Poll::Pending
    }

    /// The call is not wanted any more. Returns whether it was still queued; if it runs, its worker drops it.
    pub(super) fn cancel(&self) -> bool {
        let mut state = self.lock();
        if matches!(state.stage, Stage::Done(_)) {
            return false;
        }
        let stage = mem::replace(&mut state.stage, Stage::Done(Some(Err(Cancelled::new().into()))));
        let wakers = [state.caller.take(), state.worker.take()];
        self.cancelled.store(true, Ordering::Release);
        drop(state);
        wakers.into_iter().flatten().for_each(Waker::wake);
        match stage {
            Stage::Queued(Some(queued)) => {
                queued.scope.cancel();
                true
            }
            Stage::Queued(None) | Stage::Running | Stage::Done(_) => false,
        }
    }

    /// Whether somebody still wants the call.
    pub(super) fn is_wanted(&self) -> bool {
        !self.cancelled.load(Ordering::Acquire)
    }

    /// A worker has the call in hand and cannot go on: whether it is still wanted, now and until the waker says
    /// otherwise.
    pub(super) fn poll_wanted(&self, cx: &Context<'_>) -> bool {
        let mut state = self.lock();
        if matches!(state.stage, Stage::Done(_)) {
            return false;
        }
        let before = remember(&mut state.worker, cx.waker());
        drop(state);
        drop(before);
        true
    }

    /// A worker begins the call, unless it has been cancelled.
    pub(super) fn begin(&self) -> Option<Queued<Req>> {
        let mut state = self.lock();
        let Stage::Queued(queued) = &mut state.stage else {
            return None;
        };
        let queued = queued.take();
        state.stage = Stage::Running;
        queued
    }

    /// The worker is done with the call. If it was cancelled meanwhile, that stays.
    pub(super) fn finish(&self, result: Result<Res, BoxError>) {
        let mut state = self.lock();
        if !matches!(state.stage, Stage::Running) {
            // What came too late is not dropped under the lock.
            drop(state);
            drop(result);
            return;
        }
        state.stage = Stage::Done(Some(result));
        let wakers = [state.caller.take(), state.worker.take()];
        drop(state);
        let [caller, _] = wakers;
        if let Some(caller) = caller {
            caller.wake();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<Req, Res>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<Req, Res> fmt::Debug for Slot<Req, Res> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.lock().stage {
            Stage::Queued(_) => "Queued",
            Stage::Running => "Running",
            Stage::Done(Some(_)) => "Done",
            Stage::Done(None) => "Over",
        })
    }
}

/// Returns the waker that stood there before, to be dropped without the lock: it may drop a task, and with it this
/// call.
fn remember(slot: &mut Option<Waker>, waker: &Waker) -> Option<Waker> {
    match slot {
        Some(known) if known.will_wake(waker) => None,
        _ => slot.replace(waker.clone()),
    }
}
