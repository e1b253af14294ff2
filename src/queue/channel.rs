//! [`Channel`]: the accepted calls in order, and the state that the queue's handles and its workers share.

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

/// Shared by the queue's handles, its response futures and its workers.
pub(super) struct Channel<Req, Res> {
    /// One permit for each place in the queue.
    places: Semaphore,
    closed: AtomicBool,
    state: CachePadded<Mutex<ChannelState<Req, Res>>>,
    in_flight: CachePadded<AtomicUsize>,
    /// Notified when `is_ended` is set.
    ended: Notify,
}

struct ChannelState<Req, Res> {
    calls: VecDeque<Arc<Message<Req, Res>>>,
    /// An upper bound of how many of `calls` are cancelled. A cancelled message has no request any more and stays in
    /// `calls` until a worker takes it or a sweep removes it.
    cancelled: usize,
    /// The worker that waits for a call. Only the worker that holds the service waits, so there is one at most.
    idle_worker: Option<Waker>,
    worker_tasks: Vec<AbortHandle>,
    /// How many [`WorkerGuard`]s there are.
    live_workers: usize,
    /// The last worker has ended, and every call that it left has been cancelled.
    is_ended: bool,
}

/// Counts a call as in flight until it is dropped.
pub(super) struct InFlight<Req, Res> {
    channel: Arc<Channel<Req, Res>>,
    /// `None` after [`leave`](Self::leave).
    message: Option<Arc<Message<Req, Res>>>,
}

/// Counts a worker as alive until it is dropped. The drop of the last one closes the channel and cancels the calls that
/// are left, so that no caller waits for a worker that does not exist.
pub(super) struct WorkerGuard<Req, Res> {
    channel: Arc<Channel<Req, Res>>,
}

/// Cancelled messages are swept out of the channel when there are more than this many, and more than half of the
/// messages there are cancelled. So a sweep costs each cancelled call a constant time, and small queues, for which the
/// memory does not matter, are not swept.
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

    /// Registers a worker's task, so that [`abort`](Self::abort) can end it.
    pub(super) fn register(&self, worker: AbortHandle) {
        self.lock().worker_tasks.push(worker);
    }

    /// Accepts a call that has its place. If the channel is closed, the request stays in `req` and the scope is
    /// returned.
    #[inline]
    pub(super) fn push(
        &self,
        req: &mut Option<Req>,
        scope: Scope,
        place: Permit,
    ) -> Result<Arc<Message<Req, Res>>, Scope> {
        // Before the lock is taken: subscribers to events are woken here.
        scope.queued();
        if self.is_closed() {
            return Err(scope);
        }
        let message = Message::new(req, scope, place);
        let mut state = self.lock();
        if self.is_closed() {
            // Closed since the first check, which only spares the allocation.
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

    /// Waits for the next call in order. Returns `None` once the channel is closed and empty.
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

    /// Cancels one call, queued or running.
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

    /// Accepts no more calls. The workers end when they have finished the accepted ones.
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

    /// Accepts no more calls and cancels the accepted ones. The workers drop the calls that are running, and end.
    pub(super) fn abort(&self) {
        self.close();
        self.cancel_all();
        let tasks = mem::take(&mut self.lock().worker_tasks);
        tasks.iter().for_each(AbortHandle::abort);
    }

    pub(super) fn is_ended(&self) -> bool {
        self.lock().is_ended
    }

    /// Waits until the last worker has ended and every call has a result.
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
            // This drops the request. If that panics, the other calls still have to be cancelled.
            let _ = catch_unwind(|| message.cancel());
        }
    }

    fn lock(&self) -> MutexGuard<'_, ChannelState<Req, Res>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl InFlight ===

impl<Req, Res> InFlight<Req, Res> {
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

    /// Ends the count, and returns the message.
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

impl<Req, Res> Drop for InFlight<Req, Res> {
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

    #[inline]
    pub(super) const fn channel(&self) -> &Arc<Channel<Req, Res>> {
        &self.channel
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
            // Last: `ended` promises that every call has a result by then.
            self.channel.lock().is_ended = true;
            self.channel.ended.notify_waiters();
        }
    }
}
