//! [`Channel`]: the accepted calls of a queue in order, and which worker begins the next one.
//!
//! A worker begins a call if it has the *turn*, which one worker at a time has: it takes the first call, waits until
//! the inner service is ready, calls it, and gives the turn back. A worker is woken, or spawned, for a queued call when
//! the turn is free and fewer than [`workers`](super::QueueLayer::workers) calls are *starting*. A call starts from the
//! moment a worker is woken for it until its future was polled once. So calls reach the layers below in order.
//!
//! No call depends on one task being scheduled, because that task may be stuck behind a caller that computes on the
//! same thread: starts that make no progress for [`START_TIMEOUT`] are no longer waited for, and a worker that was woken
//! because the service is ready, and has not run yet, may lose the turn to another.

use super::{
    CallContext,
    message::{EarlyEnd, Ended, Message},
    runtime::Runtime,
    scheduled::{ChannelSchedule, ScheduledCalls},
    timer::Timer,
    wakers::{ReadyWaker, TimerWaker},
    workers::Workers,
};
use crate::{
    clock,
    panic::{self, catch_unwind},
    schedule::Schedule,
    semaphore::{Permit, Semaphore},
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};
use std::{
    collections::{BTreeMap, VecDeque},
    mem,
    sync::{Arc, PoisonError, Weak},
    task::Waker,
    time::Duration,
};
use tokio::{sync::Notify, time::Instant};

/// A function that spawns the worker with an id.
type SpawnWorker<Req, Res> = dyn Fn(&Arc<Channel<Req, Res>>, usize) + Send + Sync;

/// The part of a queue that its handles, response futures and workers share.
pub(super) struct Channel<Req, Res> {
    /// A semaphore with one permit for each place in the queue.
    places: Semaphore,
    /// How many calls may start at once.
    pub(super) max_starting: usize,
    /// Whether the worker that has the turn gives it back. It is taken back when the state is locked next.
    pub(super) turn_given_back: AtomicBool,
    /// Spawns a worker with this id.
    spawn: Box<SpawnWorker<Req, Res>>,
    runtime: Runtime,
    pub(super) timer: Timer,
    /// The waker with which the service is polled.
    ready_waker: Waker,
    closed: AtomicBool,
    /// Whether the workers are to end their calls.
    pub(super) aborted: AtomicBool,
    /// Whether the workers are to end the calls that are not on the wire.
    pub(super) only_sent: AtomicBool,
    in_flight: AtomicUsize,
    /// `None` if calls begin in the order in which they were accepted.
    schedule: Option<Box<ChannelSchedule>>,
    state: Mutex<ChannelState<Req, Res>>,
    /// Notified after `is_ended` was set.
    ended: Notify,
}

pub(super) struct ChannelState<Req, Res> {
    pub(super) calls: VecDeque<Arc<Message<Req, Res>>>,
    /// The calls of a channel with a schedule, of which none is in `calls`.
    pub(super) scheduled: Option<Box<ScheduledCalls<Req, Res>>>,
    /// How many messages in `calls` have ended early. May be too high: a message that ends after it was taken out is
    /// counted, too. Such a message has no request any more and stays in `calls` until it is taken out or a sweep
    /// removes it.
    pub(super) dead: usize,
    /// The call that has been taken out of `calls` and waits until the service is ready.
    pub(super) pending: Option<Arc<Message<Req, Res>>>,
    pub(super) turn: Turn,
    /// Whether the service's waker was woken since the service was last polled.
    pub(super) is_ready: bool,
    pub(super) workers: Workers,
    /// How many calls of the current epoch are starting.
    pub(super) starting: usize,
    /// How many starts have ended.
    pub(super) starts_ended: u64,
    /// When the timer checks whether `starts_ended` has changed from this number, because queued calls wait for the
    /// starting ones. `None` if none does.
    pub(super) check: Option<(Instant, u64)>,
    /// The number of times that the starting calls took too long and ceased to be counted.
    pub(super) epoch: StartEpoch,
    /// The calls that have a deadline, by the deadline and the address of the message.
    pub(super) deadlines: BTreeMap<(Instant, usize), Arc<Message<Req, Res>>>,
    /// Whether the queue is closed and the last worker has ended.
    is_ended: bool,
}

/// Who may begin the next call.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Turn {
    Free,
    /// A worker is asking for the service's readiness or calling the service.
    Taken,
    /// The worker with this id waits until the service is ready for the pending call.
    Waits(usize),
}

/// The number of the epoch in which a call began to start: see [`START_TIMEOUT`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct StartEpoch(pub(super) u64);

/// What a worker without a call does next.
pub(super) enum Next<Req, Res> {
    /// It has the turn and begins this call, or without one the call that the schedule chooses.
    Begin(Option<Arc<Message<Req, Res>>>, StartEpoch),
    /// It waits until it is woken.
    Wait,
    /// It ends.
    End,
}

/// A worker that is to be woken or spawned for a queued call, which is done without the lock.
#[must_use]
pub(super) enum Assigned {
    /// `None` if the worker was spawned and has not been polled yet: its first poll is still to come.
    Wake(Option<Waker>),
    Spawn(usize),
}

/// How often it is checked that the starting calls make progress while queued calls wait for them. If none of them has
/// started since the last check, they are no longer waited for. So a call that computes or blocks in its first poll, and
/// a worker that is woken and not scheduled, delay the others for at most twice this long.
const START_TIMEOUT: Duration = Duration::from_millis(5);

/// The number of dead messages above which the channel is swept, that is, its dead messages are removed, provided that
/// they are more than half of its messages. Thus sweeps cost a constant time per dead call, and a few dead messages,
/// whose memory does not matter, cause no sweep.
const SWEEP_THRESHOLD: usize = 64;

// === impl Channel ===

impl<Req, Res> Channel<Req, Res>
where
    Req: Send + 'static,
    Res: Send + 'static,
{
    /// Creates a channel and its first worker. `spawn` spawns a worker with the id that it is given.
    pub(super) fn new(
        places: Semaphore,
        max_starting: usize,
        schedule: Option<Schedule>,
        spawn: impl Fn(&Arc<Self>, usize) + Send + Sync + 'static,
    ) -> Arc<Self> {
        let state = ChannelState {
            calls: VecDeque::new(),
            scheduled: schedule
                .as_ref()
                .map(|schedule| Box::new(ScheduledCalls::new(schedule))),
            dead: 0,
            pending: None,
            turn: Turn::Free,
            is_ready: false,
            workers: Workers::new(),
            starting: 0,
            starts_ended: 0,
            check: None,
            epoch: StartEpoch::default(),
            deadlines: BTreeMap::new(),
            is_ended: false,
        };
        let channel = Arc::new_cyclic(|channel: &Weak<Self>| Self {
            places,
            max_starting,
            turn_given_back: AtomicBool::new(false),
            spawn: Box::new(spawn),
            runtime: Runtime::current(),
            timer: Timer::new(Arc::new(TimerWaker(channel.clone())).into()),
            ready_waker: Arc::new(ReadyWaker(channel.clone())).into(),
            closed: AtomicBool::new(false),
            aborted: AtomicBool::new(false),
            only_sent: AtomicBool::new(false),
            in_flight: AtomicUsize::new(0),
            schedule: schedule.map(|schedule| Box::new(ChannelSchedule::new(schedule))),
            state: Mutex::new(state),
            ended: Notify::new(),
        });
        channel.use_schedule();
        let first = {
            let mut state = channel.lock();
            let first = state.workers.add();
            state.workers.set_idle(first);
            first
        };
        (channel.spawn)(&channel, first);
        channel
    }
}

impl<Req, Res> Channel<Req, Res> {
    pub(super) const fn places(&self) -> &Semaphore {
        &self.places
    }

    pub(super) const fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    pub(super) fn schedule(&self) -> Option<&ChannelSchedule> {
        self.schedule.as_deref()
    }

    pub(super) const fn ready_waker(&self) -> &Waker {
        &self.ready_waker
    }

    pub(super) fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Acquire)
    }

    /// Counts a call as in flight.
    pub(super) fn enter(&self) {
        self.in_flight.fetch_add(1, Ordering::AcqRel);
    }

    /// Stops counting a call as in flight.
    pub(super) fn leave(&self) {
        self.in_flight.fetch_sub(1, Ordering::AcqRel);
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Accepts a call that holds `place`, and whose event has the status QUEUED already: a new status wakes subscribers to
    /// events, which runs user code, so it is not written under the lock. Returns the call's message. If the channel is
    /// closed, the request stays in `req` and the call's context is returned.
    #[inline]
    pub(super) fn push(
        self: &Arc<Self>,
        req: &mut Option<Req>,
        context: CallContext,
        place: Permit,
    ) -> Result<Arc<Message<Req, Res>>, CallContext> {
        if self.is_closed() {
            return Err(context);
        }
        if let Some(deadline) = context.deadline {
            // This panics in a runtime without timers, before the call is accepted.
            self.timer.prepare(deadline, &self.runtime);
        }
        let message = Message::new(req, context, place);
        let mut state = self.lock();
        if self.is_closed() {
            // The channel was closed after the first check, which only saves allocating a message.
            drop(state);
            return Err(message.take_back(req));
        }
        state.calls.push_back(message.clone());
        if let Some(deadline) = message.deadline() {
            let key = (deadline, Arc::as_ptr(&message).addr());
            state.deadlines.insert(key, message.clone());
        }
        let assigned = state.assign(self.max_starting);
        let check = state.watch_starts(self.max_starting);
        drop(state);
        self.carry_out(assigned);
        if let Some(at) = message.deadline().into_iter().chain(check).min() {
            self.arm(at);
        }
        Ok(message)
    }

    /// Ends one call early, whether it is queued or running.
    pub(super) fn end_early(self: &Arc<Self>, message: &Message<Req, Res>, why: EarlyEnd) {
        let ended = message.end_early(why);
        if ended == Ended::Before {
            return;
        }
        let mut state = self.lock();
        let (mut woken, mut removed, mut cancelled) = (None, None, None);
        match ended {
            Ended::Before => {}
            Ended::ByWorker(worker) => woken = state.workers.waker(worker),
            Ended::InQueue => {
                removed = state.remove_deadline(message);
                cancelled = state.cancel_scheduled(message);
                state.dead += usize::from(state.scheduled.is_none());
                if state.dead > SWEEP_THRESHOLD && state.dead > state.calls.len() / 2 {
                    state.calls.retain(|message| !message.ends_early());
                    state.dead = 0;
                }
                // The worker that waits until the service is ready for this call goes on to the next one.
                if let (Turn::Waits(worker), Some(pending)) = (state.turn, &state.pending) {
                    if std::ptr::eq(&**pending, message) {
                        woken = state.workers.waker(worker);
                    }
                }
            }
        }
        drop(state);
        drop(removed);
        woken.into_iter().for_each(panic::wake);
        self.end_cancelled(cancelled);
    }

    /// Stops accepting calls. The accepted calls are finished, and the workers end.
    pub(super) fn close(self: &Arc<Self>) {
        let wakers = {
            let mut state = self.lock();
            self.closed.store(true, Ordering::Release);
            state.workers.take_idle()
        };
        self.places.close();
        wakers.into_iter().for_each(panic::wake);
        self.close_unplaced();
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

    /// Removes a worker that has ended or was dropped. Returns whether it was the last one: then no call is left, and
    /// the service is to be dropped before [`set_ended`](Self::set_ended) is called.
    pub(super) fn remove_worker(self: &Arc<Self>, id: usize, epoch: Option<StartEpoch>) -> bool {
        let (removed, is_last, next) = {
            let mut state = self.lock();
            if let Some(epoch) = epoch {
                state.end_start(epoch);
            }
            if state.turn == Turn::Waits(id) {
                state.turn = Turn::Free;
            }
            let assignment = state.workers.take_assignment(id);
            if let Some(epoch) = assignment {
                state.end_start(epoch);
            }
            let removed = state.workers.remove(id);
            // A worker that was woken for a call and is dropped instead hands the call on.
            let next = assignment.and_then(|_| state.workers.any_idle());
            (removed, state.workers.is_empty(), next)
        };
        drop(removed);
        next.into_iter().for_each(panic::wake);
        if is_last {
            // The last worker of a queue that is not closed was dropped because its runtime is shut down.
            self.close();
            self.cancel_queued();
            let pending = self.lock().pending.take();
            drop(pending);
        }
        is_last
    }

    /// Tells everybody who waits for it that the last worker has ended.
    pub(super) fn set_ended(&self) {
        // The schedule is free before anybody can see that the queue has ended. From then on, the calls that wait in it are
        // those of another queue, so this one knows the schedule no more, and it releases it once.
        let scheduled = self.lock().scheduled.take();
        if let Some(scheduled) = scheduled {
            scheduled.shared.release_queue();
        }
        self.lock().is_ended = true;
        self.ended.notify_waiters();
    }

    /// Removes the deadline of a call that has ended.
    pub(super) fn remove_deadline(&self, message: &Message<Req, Res>) {
        if message.deadline().is_some() {
            let removed = self.lock().remove_deadline(message);
            drop(removed);
        }
    }

    /// Cancels the calls that have not been taken from the queue by a worker.
    pub(super) fn cancel_queued(self: &Arc<Self>) {
        let (pending, calls, scheduled) = {
            let mut state = self.lock();
            state.dead = 0;
            let scheduled = Self::scheduled_messages(&state);
            (state.pending.clone(), mem::take(&mut state.calls), scheduled)
        };
        for message in scheduled {
            let _ = catch_unwind(|| self.end_early(&message, EarlyEnd::Cancelled));
        }
        for message in pending.into_iter().chain(calls) {
            // Ending a call drops its request, which runs user code. A panic of that code is caught, because the other
            // calls still have to be cancelled.
            let _ = catch_unwind(|| message.end_early(EarlyEnd::Cancelled));
            self.remove_deadline(&message);
        }
        let waiting = {
            let state = self.lock();
            match state.turn {
                Turn::Waits(worker) => state.workers.waker(worker),
                Turn::Free | Turn::Taken => None,
            }
        };
        waiting.into_iter().for_each(panic::wake);
    }

    pub(super) fn carry_out(self: &Arc<Self>, assigned: Option<Assigned>) {
        match assigned {
            Some(Assigned::Wake(worker)) => worker.into_iter().for_each(panic::wake),
            Some(Assigned::Spawn(id)) => (self.spawn)(self, id),
            None => {}
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, ChannelState<Req, Res>> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if self.turn_given_back.load(Ordering::Acquire) {
            self.turn_given_back.store(false, Ordering::Relaxed);
            state.turn = Turn::Free;
        }
        state
    }
}

// === impl ChannelState ===

impl<Req, Res> ChannelState<Req, Res> {
    /// Whether a call is queued.
    pub(super) fn has_call(&self) -> bool {
        self.pending.is_some() || !self.calls.is_empty() || self.is_any_scheduled()
    }

    /// Whether a call waits in the schedule.
    fn is_any_scheduled(&self) -> bool {
        self.scheduled
            .as_ref()
            .is_some_and(|scheduled| scheduled.shared.waiting() > 0)
    }

    /// Assigns a worker to the next call, if one is queued, the turn is free and another call may start.
    #[inline]
    pub(super) fn assign(&mut self, max_starting: usize) -> Option<Assigned> {
        let is_free = match self.turn {
            Turn::Free => true,
            Turn::Taken => false,
            // The waiting worker was woken because the service is ready, and has not run yet.
            Turn::Waits(_) => self.is_ready,
        };
        if !is_free || self.starting >= max_starting || !self.has_call() {
            return None;
        }
        self.starting += 1;
        Some(match self.workers.assign(self.epoch) {
            Some(waker) => Assigned::Wake(waker),
            None => Assigned::Spawn(self.workers.add_assigned(self.epoch)),
        })
    }

    /// If queued calls wait for the starting ones, and no check of these is due yet, returns when it is due.
    #[inline]
    pub(super) fn watch_starts(&mut self, max_starting: usize) -> Option<Instant> {
        if self.check.is_some() || self.starting < max_starting || !self.has_call() {
            return None;
        }
        let at = clock::now() + START_TIMEOUT;
        self.check = Some((at, self.starts_ended));
        Some(at)
    }

    /// Stops counting a call as starting, unless its epoch is over.
    pub(super) fn end_start(&mut self, epoch: StartEpoch) {
        if epoch == self.epoch {
            self.starting -= 1;
        }
        self.starts_ended += 1;
    }

    fn remove_deadline(&mut self, message: &Message<Req, Res>) -> Option<Arc<Message<Req, Res>>> {
        let key = (message.deadline()?, std::ptr::from_ref(message).addr());
        self.deadlines.remove(&key)
    }
}
