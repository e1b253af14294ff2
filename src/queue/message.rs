//! [`Message`]: one accepted call, which its caller, the channel and the worker that runs it share.

use super::CallContext;
use crate::{
    deadline::PendingCost,
    error::{BoxError, Cancelled, Closed, DeadlineExceeded},
    event::Scope,
    panic::{self, catch_unwind},
    semaphore::Permit,
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
};
use std::{
    fmt, mem,
    sync::{Arc, PoisonError},
    task::{Context, Poll, Waker},
    time::Duration,
};
use tokio::time::Instant;

/// One accepted call, shared by the caller's [`ResponseFuture`](super::ResponseFuture), the channel and the worker that
/// runs the call.
///
/// Wakers are woken, and user values dropped, only after the message's lock is released: both run user code, which may
/// use this message and would deadlock.
pub(super) struct Message<Req, Res> {
    /// The instant at which the queue ends the call. `None` if the call has no deadline.
    deadline: Option<Instant>,
    /// Whether the call was ended, or is to be ended, before it has a response. An atomic, so that it can be read
    /// without the lock.
    ends_early: AtomicBool,
    /// Whether the call has had a place in the queue, or has begun. Set only for the calls of a scheduled queue.
    is_accepted: AtomicBool,
    /// The key of the call in a scheduled queue.
    key: AtomicU32,
    state: Mutex<MessageState<Req, Res>>,
}

struct MessageState<Req, Res> {
    stage: MessageStage,
    content: Content<Req, Res>,
    /// What the call has only while it is queued. `None` once the call has begun or has ended.
    queued: Option<QueuedParts>,
    /// The waker of the task that polls the response future, woken when there is a response.
    caller: Option<Waker>,
}

struct QueuedParts {
    /// The caller's event and span, in which the call will run.
    scope: Scope,
    /// The call's place in the queue.
    place: Permit,
    /// Counts the call's cost among that of the calls that have not reached the limits.
    demand: Option<PendingCost>,
}

#[derive(Clone, Copy, PartialEq)]
enum MessageStage {
    /// The call is in the channel, or was taken out and waits until the service is ready.
    Queued,
    /// The call has begun: the worker with this id drives the future that the inner service returned.
    Running(usize),
    /// The call has begun, and its worker is to drop the future and to end the call for this reason.
    Ending(EarlyEnd),
    /// The call was ended in the queue, and its event is being written.
    EndingInQueue,
    /// The call has a response or an error, which the caller may have fetched already.
    Done,
}

/// Why a call ends before it has a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum EarlyEnd {
    /// The caller has cancelled the call or dropped its future, or the queue was aborted.
    Cancelled,
    /// The call's deadline has passed.
    DeadlinePassed,
    /// The queue was closed before the call had a place.
    Closed,
}

/// What [`Message::end_early`] has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// The call was queued, and has ended.
    InQueue,
    /// The call is running, and the worker with this id has to be woken to end it.
    ByWorker(usize),
    /// Nothing: the call had ended, or was being ended.
    Before,
}

/// The request of a call, and later its response, in the same memory. Both may be large, so they are moved as rarely as
/// possible. Each option is `None` after its value was taken.
enum Content<Req, Res> {
    Request(Option<Req>),
    Response(Option<Result<Res, BoxError>>),
}

// === impl EarlyEnd ===

impl EarlyEnd {
    pub(super) fn into_error(self) -> BoxError {
        match self {
            Self::Cancelled => Cancelled::new().into(),
            Self::DeadlinePassed => DeadlineExceeded::new(Duration::ZERO, Duration::ZERO).into(),
            Self::Closed => Closed::new().into(),
        }
    }

    /// Writes the end to the call's event.
    pub(super) fn record(self, scope: &Scope) {
        match self {
            Self::Cancelled | Self::Closed => scope.cancel(),
            Self::DeadlinePassed => scope.fail(&self.into_error()),
        }
    }
}

// === impl Message ===

impl<Req, Res> Message<Req, Res> {
    /// Creates a message. Moves the request, which may be large, out of `req` directly into the message's allocation.
    // Always inlined, so that the context and the place are not copied once more.
    #[inline(always)]
    pub(super) fn new(req: &mut Option<Req>, context: CallContext, place: Permit) -> Arc<Self> {
        let CallContext {
            scope,
            deadline,
            demand,
            scheduled: _,
        } = context;
        let mut message = Arc::new(Self {
            deadline,
            ends_early: AtomicBool::new(false),
            is_accepted: AtomicBool::new(false),
            key: AtomicU32::new(0),
            state: Mutex::new(MessageState {
                stage: MessageStage::Queued,
                content: Content::Request(None),
                queued: Some(QueuedParts { scope, place, demand }),
                caller: None,
            }),
        });
        if let Some(Self { state, .. }) = Arc::get_mut(&mut message) {
            state.get_mut().unwrap_or_else(PoisonError::into_inner).content = Content::Request(req.take());
        }
        message
    }

    pub(super) const fn deadline(&self) -> Option<Instant> {
        self.deadline
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

    /// Whether the call has ended or is to be ended before it has a response.
    pub(super) fn ends_early(&self) -> bool {
        self.ends_early.load(Ordering::Acquire)
    }

    /// Ends the call, unless it has a result already. A queued call ends at once. A running call ends when its worker,
    /// which the caller of this method has to wake, has dropped the call's future, and with it the call's permit.
    pub(super) fn end_early(&self, why: EarlyEnd) -> Ended {
        let mut state = self.lock();
        match state.stage {
            // It was given a place, or has begun without one, since the queue was closed: accepted calls are finished.
            MessageStage::Queued if why == EarlyEnd::Closed && self.is_accepted() => return Ended::Before,
            MessageStage::Running(_) if why == EarlyEnd::Closed => return Ended::Before,
            MessageStage::Queued => {}
            MessageStage::Running(worker) => {
                state.stage = MessageStage::Ending(why);
                self.ends_early.store(true, Ordering::Release);
                return Ended::ByWorker(worker);
            }
            MessageStage::Ending(_) | MessageStage::EndingInQueue | MessageStage::Done => return Ended::Before,
        }
        self.end_queued(state, why.into_error(), &|scope, _| why.record(scope));
        Ended::InQueue
    }

    /// Ends a queued call with an error that is not its caller's doing. Does nothing if it is not queued any more.
    pub(super) fn fail_in_queue(&self, error: BoxError) {
        let state = self.lock();
        if state.stage == MessageStage::Queued {
            self.end_queued(state, error, &|scope, error| scope.fail(error));
        }
    }

    /// Ends a queued call with `error`, and its event with `record`.
    fn end_queued(
        &self,
        mut state: MutexGuard<'_, MessageState<Req, Res>>,
        error: BoxError,
        record: &dyn Fn(&Scope, &BoxError),
    ) {
        state.stage = MessageStage::EndingInQueue;
        self.ends_early.store(true, Ordering::Release);
        let content = mem::replace(&mut state.content, Content::Response(None));
        let queued = state.queued.take();
        drop(state);
        if let Some(QueuedParts { scope, place, demand }) = queued {
            drop((place, demand));
            // The event ends before the caller is told, so that a caller that has the result finds the record final. Ending
            // it and dropping the span run user code (a subscriber), which may panic.
            let error = &error;
            let _ = catch_unwind(move || {
                record(&scope, error);
                drop(scope);
            });
        }
        let caller = {
            let mut state = self.lock();
            state.stage = MessageStage::Done;
            state.content = Content::Response(Some(Err(error)));
            state.caller.take()
        };
        caller.into_iter().for_each(panic::wake);
        // The request is dropped last: dropping it runs user code, which may panic.
        drop(content);
    }

    /// Returns the key of the call in a scheduled queue.
    pub(super) fn key(&self) -> u32 {
        self.key.load(Ordering::Relaxed)
    }

    /// Sets the key of a call in a scheduled queue, before it is known to others.
    pub(super) fn set_key(&self, key: u32, has_place: bool) {
        self.key.store(key, Ordering::Relaxed);
        self.is_accepted.store(has_place, Ordering::Release);
    }

    /// Whether a call of a scheduled queue has had a place, or has begun.
    pub(super) fn is_accepted(&self) -> bool {
        self.is_accepted.load(Ordering::Acquire)
    }

    /// Gives a call that waits for it a place in the queue.
    pub(super) fn give_place(&self, place: Permit) {
        let mut state = self.lock();
        let Some(queued) = &mut state.queued else {
            // The call has begun or ended meanwhile.
            drop(state);
            drop(place);
            return;
        };
        queued.place = place;
        let mark_queued = queued.scope.mark_queued();
        self.is_accepted.store(true, Ordering::Release);
        let caller = state.caller.take();
        drop(state);
        mark_queued();
        caller.into_iter().for_each(panic::wake);
    }

    /// Waits until a call of a scheduled queue is accepted, or has ended without.
    pub(super) fn poll_accepted(&self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        if self.is_accepted() {
            return Poll::Ready(Ok(()));
        }
        let mut state = self.lock();
        if self.is_accepted() {
            return Poll::Ready(Ok(()));
        }
        if state.stage == MessageStage::Done {
            match &state.content {
                // Any other failure is the result of the call, which its future returns.
                Content::Response(Some(Err(error))) if error.is::<Closed>() || error.is::<DeadlineExceeded>() => {}
                _ => return Poll::Ready(Ok(())),
            }
            let Content::Response(Some(Err(error))) = mem::replace(&mut state.content, Content::Response(None)) else {
                return Poll::Ready(Ok(()));
            };
            return Poll::Ready(Err(error));
        }
        let replaced = register(&mut state.caller, cx.waker());
        drop(state);
        drop(replaced);
        Poll::Pending
    }

    /// Returns why the worker of a running call has to end the call early, if it has to.
    pub(super) fn early_end(&self) -> Option<EarlyEnd> {
        if !self.ends_early() {
            return None;
        }
        match self.lock().stage {
            MessageStage::Ending(why) => Some(why),
            _ => None,
        }
    }

    /// Begins the call on the worker with this id: frees its place in the queue, and returns its request, its scope
    /// (event and span) and its pending cost. Returns `None` if the call has ended.
    #[inline]
    pub(super) fn begin(&self, worker: usize) -> Option<(Req, Scope, Option<PendingCost>)> {
        let mut state = self.lock();
        if state.stage != MessageStage::Queued {
            return None;
        }
        state.stage = MessageStage::Running(worker);
        let QueuedParts { scope, place, demand } = state.queued.take()?;
        let Content::Request(req) = &mut state.content else {
            return None;
        };
        let req = req.take()?;
        if place.is_of_none() {
            // A schedule may choose a call that still waits for its place.
            self.accept_without_place(state, &scope);
        } else {
            drop(state);
            drop(place);
        }
        Some((req, scope, demand))
    }

    #[cold]
    fn accept_without_place(&self, mut state: MutexGuard<'_, MessageState<Req, Res>>, scope: &Scope) {
        let caller = state.caller.take();
        drop(state);
        self.is_accepted.store(true, Ordering::Release);
        scope.queued();
        caller.into_iter().for_each(panic::wake);
    }

    /// Takes the request, the context and the place back out of a message that was never shared.
    pub(super) fn take_back(&self, req: &mut Option<Req>) -> CallContext {
        let mut state = self.lock();
        if let Content::Request(request) = &mut state.content {
            *req = request.take();
        }
        let QueuedParts { scope, place, demand } =
            state.queued.take().expect("a message that was not shared is queued");
        drop(state);
        drop(place);
        CallContext {
            scope,
            deadline: self.deadline,
            demand,
            scheduled: None,
        }
    }

    /// Gives a call that has begun its result, and wakes the caller.
    pub(super) fn finish(&self, result: Result<Res, BoxError>) {
        let mut state = self.lock();
        state.stage = MessageStage::Done;
        state.content = Content::Response(Some(result));
        let caller = state.caller.take();
        drop(state);
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
            (MessageStage::Queued | MessageStage::EndingInQueue, _) => "Queued",
            (MessageStage::Running(_) | MessageStage::Ending(_), _) => "Running",
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
