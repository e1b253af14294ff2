//! [`Slot`]: one accepted call, between the caller who waits for it and the worker who drives it.

use crate::{
    error::{BoxError, Cancelled},
    event::Scope,
    line::count::Held,
};
use std::{
    fmt, mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
};

/// Shared by the caller's future, the backlog and the worker.
pub(super) struct Slot<Req, Res> {
    state: Mutex<State<Req, Res>>,
}

struct State<Req, Res> {
    stage: Stage<Req, Res>,
    /// Who waits for the response.
    caller: Option<Waker>,
    /// Who has to know when the caller cancels.
    worker: Option<Waker>,
}

enum Stage<Req, Res> {
    /// In the backlog, or in a worker's hands until the service is ready for it.
    Queued(Queued<Req>),
    /// Called; a worker drives it.
    Running,
    /// The response waits to be fetched.
    Done(Result<Res, BoxError>),
    /// Fetched.
    Over,
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
    pub(super) fn new(queued: Queued<Req>) -> Arc<Self> {
        let state = State {
            stage: Stage::Queued(queued),
            caller: None,
            worker: None,
        };
        Arc::new(Self {
            state: Mutex::new(state),
        })
    }

    /// The caller waits.
    pub(super) fn poll_response(&self, cx: &mut Context<'_>) -> Poll<Result<Res, BoxError>> {
        let mut state = self.lock();
        if let Stage::Done(_) = state.stage {
            if let Stage::Done(result) = mem::replace(&mut state.stage, Stage::Over) {
                return Poll::Ready(result);
            }
        }
        assert!(
            !matches!(state.stage, Stage::Over),
            "a future is not polled after it was ready"
        );
        let before = remember(&mut state.caller, cx.waker());
        drop(state);
        drop(before);
        Poll::Pending
    }

    /// The call is not wanted any more. Returns whether it was still queued; if it runs, its worker drops it.
    pub(super) fn cancel(&self) -> bool {
        let mut state = self.lock();
        if !matches!(state.stage, Stage::Queued(_) | Stage::Running) {
            return false;
        }
        let stage = mem::replace(&mut state.stage, Stage::Done(Err(Cancelled::new().into())));
        let wakers = [state.caller.take(), state.worker.take()];
        drop(state);
        wakers.into_iter().flatten().for_each(Waker::wake);
        match stage {
            Stage::Queued(queued) => {
                queued.scope.cancel();
                true
            }
            Stage::Running | Stage::Done(_) | Stage::Over => false,
        }
    }

    pub(super) fn is_queued(&self) -> bool {
        matches!(self.lock().stage, Stage::Queued(_))
    }

    /// A worker has the call in hand: whether it is still wanted, now and until the waker says otherwise.
    pub(super) fn poll_wanted(&self, cx: &Context<'_>) -> bool {
        let mut state = self.lock();
        if !matches!(state.stage, Stage::Queued(_) | Stage::Running) {
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
        if !matches!(state.stage, Stage::Queued(_)) {
            return None;
        }
        match mem::replace(&mut state.stage, Stage::Running) {
            Stage::Queued(queued) => Some(queued),
            Stage::Running | Stage::Done(_) | Stage::Over => None,
        }
    }

    /// The worker is done with the call. If it was cancelled meanwhile, that stays.
    pub(super) fn finish(&self, result: Result<Res, BoxError>) {
        let mut state = self.lock();
        if matches!(state.stage, Stage::Queued(_) | Stage::Running) {
            let before = mem::replace(&mut state.stage, Stage::Done(result));
            let caller = state.caller.take();
            // Neither a request nor a response is dropped under the lock.
            drop(state);
            drop(before);
            if let Some(caller) = caller {
                caller.wake();
            }
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
            Stage::Done(_) => "Done",
            Stage::Over => "Over",
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
