//! [`Message`]: one accepted call, which its caller and the worker that drives it share.

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

/// One accepted call, shared by the caller's [`ResponseFuture`](super::ResponseFuture), the channel and the worker.
///
/// Wakers are woken, and user values dropped, only after the message's lock is released: both run user code, which may
/// use this message and would deadlock.
pub(super) struct Message<Req, Res> {
    /// Whether the call was cancelled before it had a response. An atomic, so that it can be read without the lock.
    cancelled: AtomicBool,
    state: Mutex<MessageState<Req, Res>>,
}

struct MessageState<Req, Res> {
    stage: MessageStage,
    content: Content<Req, Res>,
    /// The caller's event and span, in which the call will run. `None` once the call has begun or was cancelled.
    scope: Option<Scope>,
    /// The call's place in the queue. `None` once the call has begun or was cancelled.
    place: Option<Permit>,
    /// The waker of the task that polls the response future, woken when there is a response.
    caller: Option<Waker>,
    /// The worker's waker for this call, woken when the caller cancels the call.
    worker: Option<Waker>,
}

#[derive(Clone, Copy, PartialEq)]
enum MessageStage {
    /// The call is in the channel, or was taken by a worker that waits for the service to be ready.
    Queued,
    /// The call has begun: a worker drives the future that the inner service returned.
    Running,
    /// The call has a response or an error, which the caller may have fetched already.
    Done,
}

/// The request of a call, and later its response, in the same memory. Both may be large, so they are moved as rarely as
/// possible. Each option is `None` after its value was taken.
enum Content<Req, Res> {
    Request(Option<Req>),
    Response(Option<Result<Res, BoxError>>),
}

// === impl Message ===

impl<Req, Res> Message<Req, Res> {
    /// Creates a message. Moves the request, which may be large, out of `req` directly into the message's allocation.
    #[inline]
    pub(super) fn new(req: &mut Option<Req>, scope: Scope, place: Permit) -> Arc<Self> {
        let mut message = Arc::new(Self {
            cancelled: AtomicBool::new(false),
            state: Mutex::new(MessageState {
                stage: MessageStage::Queued,
                content: Content::Request(None),
                scope: Some(scope),
                place: Some(place),
                caller: None,
                worker: None,
            }),
        });
        if let Some(Self { state, .. }) = Arc::get_mut(&mut message) {
            state.get_mut().unwrap_or_else(PoisonError::into_inner).content = Content::Request(req.take());
        }
        message
    }

    /// Waits for the call's response, and takes it out of the message.
    pub(super) fn poll_response(&self, cx: &mut Context<'_>) -> Poll<Result<Res, BoxError>> {
        let mut state = self.lock();
        if state.stage == MessageStage::Done {
            let result = match &mut state.content {
                Content::Response(result) => result.take(),
                Content::Request(_) => None,
            };
            return Poll::Ready(result.expect("`ResponseFuture` polled after completion"));
        }
        let replaced = register(&mut state.caller, cx.waker());
        drop(state);
        drop(replaced);
        Poll::Pending
    }

    /// Cancels the call: its result becomes [`Cancelled`], unless the call has a result already. Returns whether the
    /// call was still queued. If the call is running, its worker is woken and drops the call's future.
    pub(super) fn cancel(&self) -> bool {
        let mut state = self.lock();
        let stage = mem::replace(&mut state.stage, MessageStage::Done);
        if stage == MessageStage::Done {
            return false;
        }
        let content = mem::replace(
            &mut state.content,
            Content::Response(Some(Err(Cancelled::new().into()))),
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
        // The request is dropped last: dropping it runs user code, which may panic.
        drop(content);
        stage == MessageStage::Queued
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }

    /// Returns `Ready` if the call was cancelled. Otherwise registers the worker's waker, to be woken when the call is
    /// cancelled.
    pub(super) fn poll_cancelled(&self, cx: &Context<'_>) -> Poll<()> {
        let mut state = self.lock();
        if state.stage == MessageStage::Done {
            return Poll::Ready(());
        }
        let replaced = register(&mut state.worker, cx.waker());
        drop(state);
        drop(replaced);
        Poll::Pending
    }

    /// Begins the call: frees its place in the queue, and returns its request and its scope (event and span). Returns
    /// `None` if the call was cancelled.
    #[inline]
    pub(super) fn begin(&self) -> Option<(Req, Scope)> {
        let mut state = self.lock();
        if state.stage != MessageStage::Queued {
            return None;
        }
        state.stage = MessageStage::Running;
        let (scope, place) = (state.scope.take()?, state.place.take());
        let Content::Request(req) = &mut state.content else {
            return None;
        };
        let req = req.take()?;
        drop(state);
        drop(place);
        Some((req, scope))
    }

    /// Ends the call with `result`. If the call was cancelled while it was running, `result` is dropped instead.
    pub(super) fn finish(&self, result: Result<Res, BoxError>) {
        let mut state = self.lock();
        if state.stage != MessageStage::Running {
            drop(state);
            drop(result);
            return;
        }
        state.stage = MessageStage::Done;
        state.content = Content::Response(Some(result));
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
        f.write_str(match (state.stage, &state.content) {
            (MessageStage::Queued, _) => "Queued",
            (MessageStage::Running, _) => "Running",
            (MessageStage::Done, Content::Response(Some(_))) => "Done",
            (MessageStage::Done, _) => "Fetched",
        })
    }
}

/// Stores `waker` in `slot`, unless the stored waker wakes the same task already. Returns the replaced waker, which the
/// caller drops after it has released the message's lock: dropping a waker may drop a task, and with it this message's
/// response future, whose drop locks the message again.
fn register(slot: &mut Option<Waker>, waker: &Waker) -> Option<Waker> {
    match slot {
        Some(registered) if registered.will_wake(waker) => None,
        _ => slot.replace(waker.clone()),
    }
}
