//! [`Channel`]: the accepted calls of a queue in order, and the other state that the queue's handles and workers share.

use super::message::Message;
use crate::{
    event::Scope,
    panic::catch_unwind,
    semaphore::{Permit, Semaphore},
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};
use crossbeam_utils::CachePadded;
use std::{
    collections::VecDeque,
    mem,
    sync::{Arc, PoisonError},
    task::{Context, Poll, Waker},
};
use tokio::{sync::Notify, task::AbortHandle};

/// The part of a queue that its handles, response futures and workers share.
pub(super) struct Channel<Req, Res> {
    /// A semaphore with one permit for each place in the queue.
    places: Semaphore,
    closed: AtomicBool,
    state: CachePadded<Mutex<ChannelState<Req, Res>>>,
    in_flight: CachePadded<AtomicUsize>,
    /// Notified when the last worker has ended, after `is_ended` was set.
    ended: Notify,
}

struct ChannelState<Req, Res> {
    calls: VecDeque<Arc<Message<Req, Res>>>,
    /// How many messages in `calls` are cancelled. May be too high: a message that is cancelled after a worker has
    /// taken it out is counted, too. A cancelled message has no request any more and stays in `calls` until a worker
    /// takes it out or a sweep removes it.
    cancelled: usize,
    /// The waker of the worker that waits for a call. There is at most one, because only the worker that holds the
    /// service waits for calls.
    idle_worker: Option<Waker>,
    worker_tasks: Vec<AbortHandle>,
    /// How many [`WorkerGuard`]s exist, that is, how many workers have not ended.
    live_workers: usize,
    /// Whether the last worker has ended and every call that was left has been cancelled.
    is_ended: bool,
}

/// A guard that counts one call as in flight until the guard is dropped.
pub(super) struct InFlightGuard<Req, Res> {
    channel: Arc<Channel<Req, Res>>,
    /// The call's message. `None` after [`leave`](Self::leave) has returned it.
    message: Option<Arc<Message<Req, Res>>>,
}

/// A guard that counts one worker as alive until the guard is dropped. When the last guard is dropped, it closes the
/// channel and cancels the calls that are left, whose callers would otherwise wait forever.
pub(super) struct WorkerGuard<Req, Res> {
    pub(super) channel: Arc<Channel<Req, Res>>,
}

/// The number of cancelled messages above which the channel is swept, that is, its cancelled messages are removed,
/// provided that they are more than half of its messages. Thus sweeps cost a constant time per cancelled call, and a
/// few cancelled messages, whose memory does not matter, cause no sweep.
const SWEEP_THRESHOLD: usize = 64;

// === impl Channel ===

impl<Req, Res> Channel<Req, Res> {
    pub(super) fn new(places: Semaphore) -> Arc<Self> {
        let state = ChannelState {
            calls: VecDeque::new(),
            cancelled: 0,
            idle_worker: None,
            worker_tasks: Vec::new(),
            live_workers: 0,
            is_ended: false,
        };
        Arc::new(Self {
            places,
            closed: AtomicBool::new(false),
            state: CachePadded::new(Mutex::new(state)),
            in_flight: CachePadded::default(),
            ended: Notify::new(),
        })
    }

    pub(super) const fn places(&self) -> &Semaphore {
        &self.places
    }

    pub(super) fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Acquire)
    }

    #[inline]
    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Registers a worker's task, so that [`abort`](Self::abort) can abort the task.
    pub(super) fn register(&self, worker: AbortHandle) {
        self.lock().worker_tasks.push(worker);
    }

    /// Accepts a call that holds `place`, and returns its message. If the channel is closed, the request stays in `req`
    /// and the call's scope (its event and its span) is returned.
    #[inline]
    pub(super) fn push(
        &self,
        req: &mut Option<Req>,
        scope: Scope,
        place: Permit,
    ) -> Result<Arc<Message<Req, Res>>, Scope> {
        // The event gets the status QUEUED before the lock is taken, because a new status wakes subscribers to events,
        // which runs user code.
        scope.queued();
        if self.is_closed() {
            return Err(scope);
        }
        let message = Message::new(req, scope, place);
        let mut state = self.lock();
        if self.is_closed() {
            // The channel was closed after the first check, which was made without the lock. (The first check only
            // saves allocating a message if the channel is closed already.)
            drop(state);
            let (request, scope) = message
                .begin()
                .expect("a message that was never shared is not cancelled");
            *req = Some(request);
            return Err(scope);
        }
        state.calls.push_back(message.clone());
        let idle_worker = state.idle_worker.take();
        drop(state);
        if let Some(worker) = idle_worker {
            worker.wake();
        }
        Ok(message)
    }

    /// Waits for the next call that is not cancelled, in the order in which calls were accepted. Returns `None` once
    /// the channel is closed and empty.
    #[inline]
    pub(super) fn poll_next(&self, cx: &Context<'_>) -> Poll<Option<Arc<Message<Req, Res>>>> {
        let mut state = self.lock();
        while let Some(message) = state.calls.pop_front() {
            if !message.is_cancelled() {
                return Poll::Ready(Some(message));
            }
            state.cancelled = state.cancelled.saturating_sub(1);
        }
        if self.is_closed() {
            return Poll::Ready(None);
        }
        state.idle_worker = Some(cx.waker().clone());
        Poll::Pending
    }

    /// Cancels one call, whether it is queued or running.
    pub(super) fn cancel(&self, message: &Message<Req, Res>) {
        if message.cancel() {
            let mut state = self.lock();
            state.cancelled += 1;
            if state.cancelled > SWEEP_THRESHOLD && state.cancelled > state.calls.len() / 2 {
                state.calls.retain(|message| !message.is_cancelled());
                state.cancelled = 0;
            }
        }
    }

    /// Stops accepting calls. The workers end when they have finished the accepted calls.
    pub(super) fn close(&self) {
        let idle_worker = {
            let mut state = self.lock();
            self.closed.store(true, Ordering::Release);
            state.idle_worker.take()
        };
        self.places.close();
        if let Some(worker) = idle_worker {
            worker.wake();
        }
    }

    /// Stops accepting calls, and cancels the accepted ones. The workers drop their running calls and end.
    pub(super) fn abort(&self) {
        self.close();
        self.cancel_all();
        let tasks = mem::take(&mut self.lock().worker_tasks);
        tasks.iter().for_each(AbortHandle::abort);
    }

    pub(super) fn is_ended(&self) -> bool {
        self.lock().is_ended
    }

    /// Waits until the last worker has ended. Every call has a result then.
    pub(super) async fn ended(&self) {
        loop {
            let ended = self.ended.notified();
            tokio::pin!(ended);
            ended.as_mut().enable();
            if self.is_ended() {
                return;
            }
            ended.await;
        }
    }

    fn cancel_all(&self) {
        let calls = mem::take(&mut self.lock().calls);
        for message in calls {
            // Cancelling a call drops its request, which runs user code. A panic of that code is caught, because the
            // other calls still have to be cancelled.
            let _ = catch_unwind(|| message.cancel());
        }
    }

    fn lock(&self) -> MutexGuard<'_, ChannelState<Req, Res>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl InFlightGuard ===

impl<Req, Res> InFlightGuard<Req, Res> {
    #[inline]
    pub(super) fn enter(channel: &Arc<Channel<Req, Res>>, message: Arc<Message<Req, Res>>) -> Self {
        channel.in_flight.fetch_add(1, Ordering::AcqRel);
        Self {
            channel: channel.clone(),
            message: Some(message),
        }
    }

    pub(super) fn message(&self) -> &Message<Req, Res> {
        self.message.as_ref().expect("the message is there until `leave`")
    }

    /// Stops counting the call as in flight, and returns the call's message.
    #[inline]
    pub(super) fn leave(mut self) -> Arc<Message<Req, Res>> {
        self.end().expect("the message is there until `leave`")
    }

    fn end(&mut self) -> Option<Arc<Message<Req, Res>>> {
        let message = self.message.take()?;
        self.channel.in_flight.fetch_sub(1, Ordering::AcqRel);
        Some(message)
    }
}

impl<Req, Res> Drop for InFlightGuard<Req, Res> {
    fn drop(&mut self) {
        self.end();
    }
}

// === impl WorkerGuard ===

impl<Req, Res> WorkerGuard<Req, Res> {
    pub(super) fn enter(channel: &Arc<Channel<Req, Res>>) -> Self {
        channel.lock().live_workers += 1;
        Self {
            channel: channel.clone(),
        }
    }
}

impl<Req, Res> Drop for WorkerGuard<Req, Res> {
    fn drop(&mut self) {
        let is_last = {
            let mut state = self.channel.lock();
            state.live_workers -= 1;
            state.live_workers == 0
        };
        if is_last {
            self.channel.close();
            self.channel.cancel_all();
            // `is_ended` is set only after all remaining calls have been cancelled: `ended` promises that every call
            // has a result.
            self.channel.lock().is_ended = true;
            self.channel.ended.notify_waiters();
        }
    }
}
