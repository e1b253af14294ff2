//! How a worker gets the [turn](super::channel) and begins the next call, and how it gives the turn back.

use super::{
    channel::{Channel, ChannelState, Next, StartEpoch, Turn},
    message::{EarlyEnd, Message},
};
use crate::{
    panic::{self, catch_unwind},
    sync::atomic::Ordering,
};
use std::{mem, sync::Arc, task::Context};

// === impl Channel ===

impl<Req, Res> Channel<Req, Res> {
    /// Returns what the worker does next, which has no call, or whose call, if `epoch` is given, has ended in its first
    /// poll.
    pub(super) fn next(self: &Arc<Self>, id: usize, epoch: Option<StartEpoch>, cx: &Context<'_>) -> Next<Req, Res> {
        let mut dropped = Vec::new();
        let mut state = self.lock();
        state.workers.set_waker(id, cx.waker());
        // The worker is counted anew below if it begins a call.
        let was_woken_for = state.workers.take_assignment(id);
        for epoch in was_woken_for.into_iter().chain(epoch) {
            state.end_start(epoch);
        }
        let may_take = match state.turn {
            Turn::Free => true,
            Turn::Taken => false,
            Turn::Waits(waiting) => waiting == id || state.is_ready,
        };
        if may_take && state.drop_dead_calls(&mut dropped) {
            // The service's readiness is not waited for any more.
            state.free_turn(id);
        }
        let next = if may_take && state.starting < self.max_starting {
            state.free_turn(id);
            state.take_next()
        } else {
            None
        };
        // The idle workers that are to end.
        let mut idle = Vec::new();
        let next = match next {
            Some(next) => {
                state.starting += 1;
                state.turn = Turn::Taken;
                state.is_ready = false;
                next
            }
            None if self.is_closed() && !state.has_call() => {
                idle = state.workers.take_idle();
                Next::End
            }
            None if state.turn == Turn::Waits(id) => Next::Wait,
            None if state.workers.has_spare(self.in_flight()) => {
                // Another one that is no longer needed ends, too, and so on.
                idle.extend(state.workers.take_surplus(self.in_flight()));
                Next::End
            }
            None => {
                state.workers.set_idle(id);
                Next::Wait
            }
        };
        let check = state.watch_starts(self.max_starting);
        drop(state);
        // The last reference to a message may be dropped, which runs user code.
        for message in dropped {
            let _ = catch_unwind(move || drop(message));
        }
        idle.into_iter().for_each(panic::wake);
        if let Some(at) = check {
            self.arm(at);
        }
        next
    }

    /// Keeps the call until the service is ready. Returns `false` if the service is to be polled again, because its
    /// waker was woken meanwhile, or if the call has ended or is to be ended.
    /// Without a call, waits until the schedule can choose one.
    pub(super) fn wait_until_ready(
        &self,
        id: usize,
        message: Option<&Arc<Message<Req, Res>>>,
        epoch: StartEpoch,
    ) -> bool {
        let mut state = self.lock();
        let is_ended = message.is_some_and(|message| message.ends_early() || self.is_stopped());
        if mem::take(&mut state.is_ready) || is_ended {
            return false;
        }
        state.end_start(epoch);
        state.turn = Turn::Waits(id);
        state.pending = message.cloned();
        true
    }

    /// Gives the turn back, after the service was called.
    pub(super) fn give_back_turn(self: &Arc<Self>) {
        self.turn_given_back.store(true, Ordering::Release);
        if self.max_starting == 1 {
            // No other call may begin before this one has started, so no worker has to be woken now: the lock is saved.
            return;
        }
        let mut state = self.lock();
        let assigned = state.assign(self.max_starting);
        drop(state);
        self.carry_out(assigned);
    }

    /// Gives the turn back, because the call has ended before it began.
    pub(super) fn not_begun(self: &Arc<Self>, message: &Message<Req, Res>, epoch: StartEpoch) {
        // The call has ended already, unless the service was dropped.
        let _ = catch_unwind(|| message.end_early(EarlyEnd::Cancelled));
        self.remove_deadline(message);
        self.turn_given_back.store(true, Ordering::Release);
        self.started(epoch);
    }

    /// Gives the turn back, because no call waits that could be chosen.
    pub(super) fn not_chosen(self: &Arc<Self>, epoch: StartEpoch) {
        self.turn_given_back.store(true, Ordering::Release);
        self.started(epoch);
    }

    /// Notes that a call has started, because its future was polled once, or that it has ended without.
    pub(super) fn started(self: &Arc<Self>, epoch: StartEpoch) {
        let mut state = self.lock();
        state.end_start(epoch);
        let assigned = state.assign(self.max_starting);
        drop(state);
        self.carry_out(assigned);
    }
}

// === impl ChannelState ===

impl<Req, Res> ChannelState<Req, Res> {
    /// Takes the call that goes next, or says that the schedule is to choose it. The caller counts it as starting.
    fn take_next(&mut self) -> Option<Next<Req, Res>> {
        let message = self.pending.take().or_else(|| self.calls.pop_front());
        let is_any = message.is_some()
            || self
                .scheduled
                .as_ref()
                .is_some_and(|scheduled| scheduled.is_in_line || scheduled.shared.waiting() > 0);
        is_any.then_some(Next::Begin(message, self.epoch))
    }

    /// Frees the turn. If another worker than `id` waits for the service with it, that one becomes idle.
    fn free_turn(&mut self, id: usize) {
        if let Turn::Waits(waiting) = self.turn {
            if waiting != id {
                self.workers.set_idle(waiting);
            }
        }
        self.turn = Turn::Free;
    }

    /// Takes out the first calls as long as they have ended. Returns whether the pending call was one of them, or there
    /// was none.
    fn drop_dead_calls(&mut self, dropped: &mut Vec<Arc<Message<Req, Res>>>) -> bool {
        dropped.extend(self.pending.take_if(|message| message.ends_early()));
        if self.pending.is_some() {
            return false;
        }
        while self.calls.front().is_some_and(|message| message.ends_early()) {
            self.dead = self.dead.saturating_sub(1);
            dropped.extend(self.calls.pop_front());
        }
        true
    }
}
