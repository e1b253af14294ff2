//! How a [`Channel`] with a schedule accepts calls, and which of them begins next.
//!
//! All calls of such a channel are in the schedule's tree, also those that still wait for a place in the queue. So the order
//! of the calls does not depend on who has a place. The worker that has the turn [chooses](Channel::poll_choose) the next
//! call when what it needs is there.

use super::{
    CallContext,
    bound::ReadyWaiter,
    channel::{Assigned, Channel, ChannelState, Turn},
    door::Door,
    message::{EarlyEnd, Message},
};
use crate::{
    clock,
    error::{AcquireError, BoxError, TooManyKeys},
    panic::{self, catch_unwind},
    schedule::{
        CallKey, Chosen, Dispatcher, Effects, Eligible, FlowKey, Grant, PushError, Pushed, Schedule, Scheduled,
        ScheduledCall, Shared, Ticket,
    },
    semaphore::{Acquire, Permit, Semaphore},
    sync::Mutex,
    wait_queue::HANDOFF_TIMEOUT,
};
use slab::Slab;
use std::{
    collections::VecDeque,
    ptr,
    sync::{Arc, PoisonError, Weak},
    task::{Context, Poll, Waker},
};
use tokio::time::Instant;

/// The part of a scheduled channel that is not under its lock.
pub(super) struct ChannelSchedule {
    pub(super) schedule: Schedule,
    /// Locked only by the worker that has the turn.
    dispatcher: Mutex<Dispatcher>,
}

/// A call that was chosen, with what it was given.
type ChosenMessage<Req, Res> = (Arc<Message<Req, Res>>, Box<Grant>);

/// The calls of a scheduled channel.
pub(super) struct ScheduledCalls<Req, Res> {
    pub(super) shared: Arc<Shared>,
    /// The calls that wait, and the handles that wait at the door. The index of each is its key there.
    waiting: Slab<Waiting<Req, Res>>,
    next_order: u64,
    door: Door,
    /// The handles that were offered a place and were not called yet, by their order, and until when.
    offers: VecDeque<(Instant, u64)>,
    /// Whether the dispatcher may stand in the line of the permits or of the limiter, which it leaves when no call waits.
    pub(super) is_in_line: bool,
}

/// What waits in a scheduled channel.
enum Waiting<Req, Res> {
    Call(Entry<Req, Res>),
    Handle(Arc<ReadyWaiter>),
}

/// What happens to a free place.
enum Given<Req, Res> {
    Place(Arc<Message<Req, Res>>, Permit),
    Offer(Arc<ReadyWaiter>),
}

/// A call that waits.
struct Entry<Req, Res> {
    message: Arc<Message<Req, Res>>,
    call: Arc<ScheduledCall>,
    /// Its place in the tree.
    id: usize,
    /// The number of its flow at the door.
    flow: usize,
    /// The order in which it came to the door.
    order: u64,
    has_place: bool,
}

/// A call that was cancelled and is still in the tree of the schedule.
pub(super) struct CancelledCall<Req, Res> {
    key: CallKey,
    entry: Entry<Req, Res>,
}

impl ChannelSchedule {
    pub(super) fn new(schedule: Schedule) -> Self {
        let dispatcher = Mutex::new(schedule.dispatcher());
        Self { schedule, dispatcher }
    }
}

impl<Req, Res> ScheduledCalls<Req, Res> {
    pub(super) fn new(schedule: &Schedule) -> Self {
        Self {
            shared: schedule.shared().clone(),
            waiting: Slab::new(),
            next_order: 0,
            door: Door::default(),
            offers: VecDeque::new(),
            is_in_line: false,
        }
    }

    /// Returns the key and the order of the next call or handle that is added.
    fn next_key(&mut self) -> CallKey {
        self.next_order += 1;
        CallKey {
            // The places of the queue, and the handles, are far fewer than 2^32.
            index: u32::try_from(self.waiting.vacant_key()).unwrap_or(u32::MAX),
            order: self.next_order,
        }
    }

    /// Adds a handle to those that wait at the door.
    fn add_handle(&mut self, path: &Arc<[FlowKey]>) -> Arc<ReadyWaiter> {
        let CallKey { index, order } = self.next_key();
        let weight = self.shared.weight_of(path);
        let flow = self.door.enter(path, weight, order, index, false);
        let waiter = ReadyWaiter::new(index, flow, order);
        self.waiting.insert(Waiting::Handle(waiter.clone()));
        waiter
    }

    /// Removes a handle, wherever it stands.
    fn remove_handle(&mut self, waiter: &ReadyWaiter) {
        let key = waiter.key as usize;
        let is_there =
            |waiting: &Waiting<_, _>| matches!(waiting, Waiting::Handle(other) if other.order == waiter.order);
        if self.waiting.get(key).is_some_and(is_there) {
            self.waiting.remove(key);
            self.door.leave(waiter.flow, waiter.order, false);
        }
        self.offers.retain(|(_, order)| *order != waiter.order);
    }

    /// Gives a free place to the next call at the door, or offers it to the next handle. `None` if no call and no handle waits,
    /// or all free places are offered.
    fn give(&mut self, places: &Semaphore) -> Option<Given<Req, Res>> {
        if !self.door.is_waiting() {
            return None;
        }
        let now = clock::now();
        while self.offers.front().is_some_and(|(until, _)| *until <= now) {
            self.offers.pop_front();
        }
        let free = places.total().saturating_sub(places.held());
        if free <= self.offers.len() {
            return None;
        }
        // `None` if a newcomer has taken the last free place just now.
        let place = Acquire::try_acquire(&mut places.acquire()).ok()??;
        let key = self.door.next()? as usize;
        if let Waiting::Call(entry) = self.waiting.get_mut(key)? {
            entry.has_place = true;
            return Some(Given::Place(entry.message.clone(), place));
        }
        let Some(Waiting::Handle(waiter)) = self.waiting.try_remove(key) else {
            return None;
        };
        // The handle does not have the place.
        self.door.leave(waiter.flow, waiter.order, true);
        self.offers.push_back((now + HANDOFF_TIMEOUT, waiter.order));
        Some(Given::Offer(waiter))
    }

    /// When the first offer ends.
    fn offers_end(&self) -> Option<Instant> {
        self.offers.front().map(|(until, _)| *until)
    }

    fn entry(&self, index: u32) -> Option<&Entry<Req, Res>> {
        match self.waiting.get(index as usize)? {
            Waiting::Call(entry) => Some(entry),
            Waiting::Handle(_) => None,
        }
    }

    fn entries(&self) -> impl Iterator<Item = &Entry<Req, Res>> {
        self.waiting.iter().filter_map(|(_, waiting)| match waiting {
            Waiting::Call(entry) => Some(entry),
            Waiting::Handle(_) => None,
        })
    }

    /// Removes the call with this key, if it still waits.
    fn remove(&mut self, key: CallKey) -> Option<Entry<Req, Res>> {
        self.entry(key.index).filter(|entry| entry.order == key.order)?;
        match self.waiting.remove(key.index as usize) {
            Waiting::Call(entry) => {
                self.door.leave(entry.flow, entry.order, entry.has_place);
                Some(entry)
            }
            Waiting::Handle(_) => None,
        }
    }
}

// === impl Channel ===

impl<Req, Res> Channel<Req, Res>
where
    Req: Send + 'static,
    Res: Send + 'static,
{
    /// Makes this the channel whose calls its schedule orders.
    ///
    /// # Panics
    ///
    /// If the schedule has another one.
    pub(super) fn use_schedule(self: &Arc<Self>) {
        if let Some(scheduled) = self.schedule() {
            let channel: Weak<dyn Scheduled> = Arc::<Self>::downgrade(self);
            let is_free = scheduled.schedule.set_queue(channel);
            assert!(is_free, "a schedule serves one queue at a time");
        }
    }
}

impl<Req, Res> Channel<Req, Res> {
    /// Accepts a call, which waits in the schedule from now on. Without a `place`, it waits for one in the queue as well; with
    /// one, its event has the status QUEUED already. If the channel is closed, the request stays in `req` and the call's
    /// context is returned.
    pub(super) fn push_scheduled(
        self: &Arc<Self>,
        req: &mut Option<Req>,
        context: CallContext,
        place: Option<Permit>,
        call: Arc<ScheduledCall>,
    ) -> Result<Arc<Message<Req, Res>>, CallContext> {
        if self.is_closed() {
            return Err(context);
        }
        if let Some(deadline) = context.deadline {
            // This panics in a runtime without timers, before the call is accepted.
            self.timer.prepare(deadline, self.runtime());
        }
        let has_place = place.is_some();
        let message = Message::new(req, context, place.unwrap_or_else(Permit::of_none));
        // What the levels say about the keys of the call that the schedule does not know.
        let mut specs = Vec::new();
        loop {
            let mut state = self.lock();
            if self.is_closed() {
                drop(state);
                return Err(message.take_back(req));
            }
            let Some(scheduled) = &mut state.scheduled else {
                drop(state);
                return Err(message.take_back(req));
            };
            let key = scheduled.next_key();
            let (pushed, effects) = scheduled.shared.try_push(&call, None, Ticket::Call(key), &specs);
            let Some(pushed) = pushed else {
                let shared = scheduled.shared.clone();
                // The functions of the levels are user code, so they are not called under the lock.
                drop(state);
                specs = shared.specs(call.path());
                continue;
            };
            let Pushed { id, weight } = match pushed {
                Ok(pushed) => pushed,
                Err(error) => {
                    drop(state);
                    self.carry_out_refusals(effects);
                    message.fail_in_queue(error_of(&error));
                    // The place that it had is free again.
                    self.give_places();
                    return Ok(message);
                }
            };
            let CallKey { index, order } = key;
            message.set_key(index, has_place);
            let flow = scheduled.door.enter(call.path(), weight, order, index, has_place);
            scheduled.waiting.insert(Waiting::Call(Entry {
                message: message.clone(),
                call,
                id,
                flow,
                order,
                has_place,
            }));
            if let Some(deadline) = message.deadline() {
                let key = (deadline, Arc::as_ptr(&message).addr());
                state.deadlines.insert(key, message.clone());
            }
            let next = state.schedule_changed(self.max_starting, effects.has_changed);
            let check = state.watch_starts(self.max_starting);
            drop(state);
            self.carry_out_change(next);
            self.carry_out_refusals(effects);
            if let Some(at) = message.deadline().into_iter().chain(check).min() {
                self.arm(at);
            }
            if !has_place {
                self.give_places();
            }
            return Ok(message);
        }
    }

    /// Ends what remains of a call that was cancelled: its place in the tree, and its place in the queue.
    pub(super) fn end_cancelled(self: &Arc<Self>, cancelled: Option<CancelledCall<Req, Res>>) {
        let Some(CancelledCall { key, entry }) = cancelled else {
            return;
        };
        if let Some(scheduled) = self.schedule() {
            scheduled.schedule.shared().cancel(entry.id, &Ticket::Call(key));
        }
        drop(entry);
        self.give_places();
    }

    /// Waits until an eligible call can go, and takes it. Ready with `None` if no call waits.
    pub(super) fn poll_choose(
        self: &Arc<Self>,
        eligible: Eligible,
        cx: &mut Context<'_>,
    ) -> Poll<Option<ChosenMessage<Req, Res>>> {
        let Some(scheduled) = self.schedule() else {
            return Poll::Ready(None);
        };
        let shared = scheduled.schedule.shared();
        let mut dispatcher = scheduled.dispatcher.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            // A limiter panics that has to wait where the runtime has no timers. That fails the call which waits for it.
            let chosen = match catch_unwind(|| dispatcher.poll_choose(eligible, cx)) {
                Err(panic) => {
                    let key = dispatcher.take_after_panic(eligible);
                    if let Some(entry) = key.and_then(|key| self.take_scheduled(key)) {
                        self.fail(&entry.message, panic);
                    }
                    continue;
                }
                Ok(Poll::Ready(chosen)) => chosen,
                Ok(Poll::Pending) => {
                    self.set_in_line(true);
                    if let Some(at) = shared.next_at() {
                        self.arm(at);
                    }
                    return Poll::Pending;
                }
            };
            match chosen {
                Chosen::Nothing => {
                    self.set_in_line(false);
                    return Poll::Ready(None);
                }
                Chosen::Call(key, chosen) => {
                    let entry = self.take_scheduled(key);
                    // A call that was cancelled just now gives back what it was granted.
                    let Some(Entry { message, call, .. }) = entry else {
                        chosen.give_back(shared);
                        continue;
                    };
                    let grant = chosen.into_grant(call);
                    return Poll::Ready(Some((message, Box::new(grant))));
                }
                Chosen::Refused(key, error) => {
                    if let Some(entry) = self.take_scheduled(key) {
                        self.fail(&entry.message, error.into_reason());
                    }
                }
            }
        }
    }

    fn set_in_line(&self, is_in_line: bool) {
        if let Some(scheduled) = &mut self.lock().scheduled {
            scheduled.is_in_line = is_in_line;
        }
    }

    fn take_scheduled(&self, key: CallKey) -> Option<Entry<Req, Res>> {
        self.lock().scheduled.as_mut()?.remove(key)
    }

    fn fail(self: &Arc<Self>, message: &Message<Req, Res>, error: BoxError) {
        let _ = catch_unwind(|| message.fail_in_queue(error));
        self.remove_deadline(message);
        self.give_places();
    }

    /// Gives free places to the calls that wait for one, and offers them to handles.
    pub(super) fn give_places(self: &Arc<Self>) {
        if let Some(at) = self.give_places_now() {
            self.arm(at);
        }
    }

    /// Does what [`give_places`](Self::give_places) does. Returns when it has to be done again.
    pub(super) fn give_places_now(&self) -> Option<Instant> {
        loop {
            let given = {
                let mut state = self.lock();
                let scheduled = state.scheduled.as_mut()?;
                match scheduled.give(self.places()) {
                    Some(given) => given,
                    None => return scheduled.offers_end().filter(|_| scheduled.door.is_waiting()),
                }
            };
            match given {
                Given::Place(message, place) => {
                    let _ = catch_unwind(|| message.give_place(place));
                }
                Given::Offer(waiter) => waiter.offer(),
            }
        }
    }

    /// Lets a handle wait at the door until a call of its flow would get a place. `None` if it would get one now.
    pub(super) fn wait_at_door(self: &Arc<Self>, path: &Arc<[FlowKey]>) -> Option<Arc<ReadyWaiter>> {
        let waiter = {
            let mut state = self.lock();
            let scheduled = state.scheduled.as_mut().filter(|_| !self.is_closed())?;
            let free = self.places().total().saturating_sub(self.places().held());
            if free > scheduled.offers.len() && !scheduled.door.is_waiting() {
                return None;
            }
            scheduled.add_handle(path)
        };
        self.give_places();
        Some(waiter)
    }

    /// Returns how many places others get before a new call of this flow gets one.
    pub(super) fn places_ahead_of(&self, call: &ScheduledCall) -> u64 {
        let state = self.lock();
        state.scheduled.as_ref().map_or(0, |scheduled| {
            let weight = scheduled.shared.weight_of(call.path());
            scheduled.door.ahead_of(call.path(), weight)
        })
    }

    pub(super) fn leave_door(&self, waiter: &ReadyWaiter) {
        if let Some(scheduled) = &mut self.lock().scheduled {
            scheduled.remove_handle(waiter);
        }
    }

    /// Whether a call waits for a place, before which no newcomer gets one.
    pub(super) fn has_unplaced(&self) -> bool {
        let state = self.lock();
        state
            .scheduled
            .as_ref()
            .is_some_and(|scheduled| scheduled.door.is_waiting())
    }

    /// Ends the calls that wait for a place in a queue that was closed.
    pub(super) fn close_unplaced(self: &Arc<Self>) {
        let (messages, handles): (Vec<_>, Vec<_>) = {
            let state = self.lock();
            let Some(scheduled) = &state.scheduled else { return };
            let unplaced = scheduled.door.waiting();
            let entries = unplaced.iter().filter_map(|key| scheduled.entry(*key));
            let messages = entries.map(|entry| entry.message.clone()).collect();
            let handles = scheduled.waiting.iter().filter_map(|(_, waiting)| match waiting {
                Waiting::Handle(waiter) => Some(waiter.clone()),
                Waiting::Call(_) => None,
            });
            (messages, handles.collect())
        };
        // They find that the queue is closed.
        handles.iter().for_each(|handle| handle.offer());
        for message in messages {
            let _ = catch_unwind(|| self.end_early(&message, EarlyEnd::Closed));
        }
    }

    /// Returns the calls that wait.
    pub(super) fn scheduled_messages(state: &ChannelState<Req, Res>) -> Vec<Arc<Message<Req, Res>>> {
        let calls = state.scheduled.iter().flat_map(|scheduled| scheduled.entries());
        calls.map(|entry| entry.message.clone()).collect()
    }

    pub(super) fn carry_out_refusals(&self, effects: Effects) {
        if let Some(scheduled) = self.schedule() {
            scheduled.schedule.shared().carry_out(Effects {
                has_changed: false,
                ..effects
            });
        }
    }

    pub(super) fn carry_out_change(self: &Arc<Self>, next: ScheduleChange) {
        next.waker.into_iter().for_each(panic::wake);
        self.carry_out(next.assigned);
    }
}

/// Who has to look at the schedule, because it has changed.
#[must_use]
#[derive(Default)]
pub(super) struct ScheduleChange {
    waker: Option<Waker>,
    assigned: Option<Assigned>,
}

impl<Req, Res> ChannelState<Req, Res> {
    /// Called when another call may go next.
    pub(super) fn schedule_changed(&mut self, max_starting: usize, has_changed: bool) -> ScheduleChange {
        if !has_changed {
            return ScheduleChange::default();
        }
        let waker = match self.turn {
            Turn::Waits(worker) => self.workers.waker(worker),
            Turn::Free | Turn::Taken => None,
        };
        // A worker that is just choosing looks again before it waits.
        let was_ready = std::mem::replace(&mut self.is_ready, true);
        let assigned = match self.turn {
            Turn::Free => self.assign(max_starting),
            Turn::Waits(_) if was_ready => self.assign(max_starting),
            Turn::Waits(_) | Turn::Taken => None,
        };
        ScheduleChange { waker, assigned }
    }

    /// Returns when the schedule has to be looked at because a limit of a key holds enough again, if that is to come, and
    /// whether it has come.
    pub(super) fn schedule_due(&self, now: Instant) -> (Option<Instant>, bool) {
        let next = self.scheduled.as_ref().and_then(|scheduled| scheduled.shared.next_at());
        let is_due = next.is_some_and(|at| at <= now);
        (next.filter(|_| !is_due), is_due)
    }

    /// Removes a call that was not chosen from the schedule.
    pub(super) fn cancel_scheduled(&mut self, message: &Message<Req, Res>) -> Option<CancelledCall<Req, Res>> {
        let scheduled = self.scheduled.as_mut()?;
        let index = message.key();
        // Another call has the key if this one was taken out and has not begun yet.
        let entry = scheduled
            .entry(index)
            .filter(|entry| ptr::eq(&*entry.message, message))?;
        let order = entry.order;
        let key = CallKey { index, order };
        let entry = scheduled.remove(key)?;
        Some(CancelledCall { key, entry })
    }
}

impl<Req, Res> Scheduled for Channel<Req, Res>
where
    Req: Send + 'static,
    Res: Send + 'static,
{
    fn changed(self: Arc<Self>) {
        let next = self.lock().schedule_changed(self.max_starting, true);
        self.carry_out_change(next);
    }

    fn refuse(self: Arc<Self>, call: CallKey, error: AcquireError) {
        if let Some(entry) = self.take_scheduled(call) {
            self.fail(&entry.message, error.into_reason());
        }
    }
}

fn error_of(error: &PushError) -> BoxError {
    match error {
        PushError::Limits(error) => error.clone().into(),
        PushError::TooManyKeys(max) => TooManyKeys::new(*max, None).into(),
    }
}
