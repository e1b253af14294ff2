//! The wakers of a [`Channel`]: [`TimerWaker`], that of its timer, and [`ReadyWaker`], that of the service's readiness.
//!
//! Both do their work on the thread that wakes them, and leave none to a task that would have to be scheduled first.

use super::{
    channel::{Channel, Turn},
    message::EarlyEnd,
};
use crate::panic::{self, catch_unwind};
use std::{
    sync::{Arc, Weak},
    task::Wake,
};
use tokio::time::Instant;

/// The waker of the channel's [`Timer`]. It does not keep the channel alive.
pub(super) struct TimerWaker<Req, Res>(pub(super) Weak<Channel<Req, Res>>);

/// The waker with which the service is polled. It does not keep the channel alive.
pub(super) struct ReadyWaker<Req, Res>(pub(super) Weak<Channel<Req, Res>>);

// === impl Channel ===

impl<Req, Res> Channel<Req, Res> {
    /// Arms the timer for `at`, unless it fires earlier already.
    pub(super) fn arm(self: &Arc<Self>, at: Instant) {
        let mut next = Some(at);
        while let Some(at) = next.take() {
            if self.timer.arm(at, self.runtime()) {
                next = self.timer_fired();
            }
        }
    }

    /// Ends the calls whose deadline has passed, and lets queued calls begin that have waited too long for a call to
    /// start. Returns when this has to be done next.
    fn timer_fired(self: &Arc<Self>) -> Option<Instant> {
        let now = Instant::now();
        let mut due = Vec::new();
        let (assigned, change, next) = {
            let mut state = self.lock();
            while let Some(first) = state.deadlines.first_entry() {
                if first.key().0 > now {
                    break;
                }
                due.push(first.remove());
            }
            if let Some((_, started)) = state.check.take_if(|(at, _)| *at <= now) {
                if started == state.starts_ended && state.starting >= self.max_starting && state.has_call() {
                    state.epoch.0 += 1;
                    state.starting = 0;
                }
            }
            let (blocked_until, due) = state.schedule_due(now);
            let change = state.schedule_changed(self.max_starting, due);
            let assigned = state.assign(self.max_starting);
            state.watch_starts(self.max_starting);
            let deadline = state.deadlines.first_key_value().map(|((deadline, _), _)| *deadline);
            let check = state.check.map(|(at, _)| at);
            let next = deadline.into_iter().chain(check).chain(blocked_until).min();
            (assigned, change, next)
        };
        let offers_end = self.give_places_now();
        let next = next.into_iter().chain(offers_end).min();
        self.carry_out(assigned);
        self.carry_out_change(change);
        for message in due {
            let _ = catch_unwind(|| self.end_early(&message, EarlyEnd::DeadlinePassed));
        }
        next
    }
}

// === impl TimerWaker and ReadyWaker ===

impl<Req, Res> Wake for TimerWaker<Req, Res>
where
    Req: Send + 'static,
    Res: Send + 'static,
{
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let Some(channel) = self.0.upgrade() else { return };
        if channel.timer.fire() {
            if let Some(next) = channel.timer_fired() {
                channel.arm(next);
            }
        }
    }
}

impl<Req, Res> Wake for ReadyWaker<Req, Res>
where
    Req: Send + 'static,
    Res: Send + 'static,
{
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let Some(channel) = self.0.upgrade() else { return };
        let waiting = {
            let mut state = channel.lock();
            state.is_ready = true;
            match state.turn {
                Turn::Waits(worker) => state.workers.waker(worker),
                Turn::Free | Turn::Taken => None,
            }
        };
        waiting.into_iter().for_each(panic::wake);
    }
}
