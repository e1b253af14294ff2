//! [`Channel`]: the accepted calls, in order, and the life of those who work on them.

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

/// Shared by the queue's handles and its workers.
pub(super) struct Channel<Req, Res> {
    places: Semaphore,
    closed: AtomicBool,
    state: CachePadded<Mutex<State<Req, Res>>>,
    in_flight: CachePadded<AtomicUsize>,
    ended: Notify,
}

struct State<Req, Res> {
    calls: VecDeque<Arc<Message<Req, Res>>>,
    /// How many of `calls` were cancelled at most. Their requests are gone; their shells are swept out now and then.
    stale: usize,
    /// The worker that waits for a call: one at a time does.
    consumer: Option<Waker>,
    workers: Vec<AbortHandle>,
    working: usize,
    /// The last worker is gone, and whoever waited for it has been told.
    is_ended: bool,
}

/// A call is in flight as long as this lives.
pub(super) struct InFlight<Req, Res>(Option<Arc<Message<Req, Res>>>);

/// A worker is at work as long as this lives. When the last one goes, nothing is left waiting.
pub(super) struct WorkerGuard<Req, Res>(pub(super) Arc<Channel<Req, Res>>);

/// Shells are swept out when there are more than these, and more than there are calls.
const SWEEP_THRESHOLD: usize = 64;

// === impl Channel ===

impl<Req, Res> Channel<Req, Res> {
    pub(super) fn new(places: Semaphore) -> Arc<Self> {
        let state = State {
            calls: VecDeque::new(),
            stale: 0,
            consumer: None,
            workers: Vec::new(),
            working: 0,
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

    pub(super) fn register(&self, worker: AbortHandle) {
        self.lock().workers.push(worker);
    }

    /// Accepts a call, which has its place. If the queue was closed meanwhile, the request stays where it is, and the
    /// scope comes back.
    #[inline]
    pub(super) fn push(
        self: &Arc<Self>,
        req: &mut Option<Req>,
        scope: Scope,
        place: Permit,
    ) -> Result<Arc<Message<Req, Res>>, Scope> {
        // It has its place. Told without the lock: others may be listening.
        scope.queued();
        if self.is_closed() {
            return Err(scope);
        }
        let message = Message::new(self.clone(), req, scope, place);
        let mut state = self.lock();
        if self.is_closed() {
            // Just now.
            drop(state);
            let (back, scope) = message.begin().expect("nobody else knows of it");
            *req = Some(back);
            return Err(scope);
        }
        state.calls.push_back(message.clone());
        let consumer = state.consumer.take();
        drop(state);
        if let Some(consumer) = consumer {
            consumer.wake();
        }
        Ok(message)
    }

    /// The next call in order; `None` once the channel is closed and empty.
    #[inline]
    pub(super) fn poll_next(&self, cx: &Context<'_>) -> Poll<Option<Arc<Message<Req, Res>>>> {
        let mut state = self.lock();
        while let Some(message) = state.calls.pop_front() {
            if message.is_wanted() {
                return Poll::Ready(Some(message));
            }
            state.stale = state.stale.saturating_sub(1);
        }
        if self.is_closed() {
            return Poll::Ready(None);
        }
        state.consumer = Some(cx.waker().clone());
        Poll::Pending
    }

    /// Cancels one call, queued or call_set.
    pub(super) fn cancel(&self, message: &Message<Req, Res>) {
        if message.cancel() {
            let mut state = self.lock();
            state.stale += 1;
            if state.stale > SWEEP_THRESHOLD && state.stale > state.calls.len() / 2 {
                state.calls.retain(|message| message.is_wanted());
                state.stale = 0;
            }
        }
    }

    /// Takes no more calls. The workers finish what is there, and go.
    pub(super) fn close(&self) {
        let consumer = {
            let mut state = self.lock();
            self.closed.store(true, Ordering::Release);
            state.consumer.take()
        };
        self.places.close();
        if let Some(consumer) = consumer {
            consumer.wake();
        }
    }

    /// Takes no more calls and cancels those that are there. The workers drop what they drive, and go.
    pub(super) fn abort(&self) {
        self.close();
        self.cancel_all();
        let workers = mem::take(&mut self.lock().workers);
        workers.iter().for_each(AbortHandle::abort);
    }

    pub(super) fn is_ended(&self) -> bool {
        self.lock().is_ended
    }

    /// Waits until the last worker is gone, and everybody has been told.
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
            // With it goes its request. One that panics when it is dropped must not keep the others waiting.
            let _ = catch_unwind(|| message.cancel());
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<Req, Res>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl InFlight ===

impl<Req, Res> InFlight<Req, Res> {
    #[inline]
    pub(super) fn enter(call: Arc<Message<Req, Res>>) -> Self {
        call.channel().in_flight.fetch_add(1, Ordering::AcqRel);
        Self(Some(call))
    }

    pub(super) fn call(&self) -> &Message<Req, Res> {
        self.0.as_ref().expect("it is in flight until it leaves")
    }

    #[inline]
    pub(super) fn leave(mut self) -> Arc<Message<Req, Res>> {
        self.end().expect("it is in flight until it leaves")
    }

    fn end(&mut self) -> Option<Arc<Message<Req, Res>>> {
        let call = self.0.take()?;
        call.channel().in_flight.fetch_sub(1, Ordering::AcqRel);
        Some(call)
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
        channel.lock().working += 1;
        Self(channel.clone())
    }
}

impl<Req, Res> Drop for WorkerGuard<Req, Res> {
    fn drop(&mut self) {
        let last = {
            let mut state = self.0.lock();
            state.working -= 1;
            state.working == 0
        };
        if last {
            self.0.close();
            // Only then: whoever waits for the end must not find a call that does not know of it.
            self.0.cancel_all();
            self.0.lock().is_ended = true;
            self.0.ended.notify_waiters();
        }
    }
}
