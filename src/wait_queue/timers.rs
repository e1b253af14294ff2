//! [`Timers`]: the timers of one wait queue, one for each Tokio runtime that has waiters in the queue.
//!
//! The waiters have no timers themselves, because only the first waiter needs a timer, and the first waiter may never
//! be polled again. All timers of a queue are armed for the same deadline. A timer fires only while its runtime is
//! driven, so the waiters of one runtime must not depend on the timer of another one, which may not be driven or may be
//! shut down.
//!
//! A timer is a [`Sleep`] whose waker advances the queue itself, on the thread that drives the runtime's timers. A task
//! that waits for a `Sleep` would be a task to schedule: the scheduler may place it behind a task that computes, on the
//! same thread, from where no other thread may take it.
//!
//! Arming a `Sleep` may run its waker at once, which locks the queue. So a timer is armed without the queue's lock: it
//! is taken out of the queue ([`Timers::take_unarmed`]), armed ([`UnarmedTimer::arm`]) and put back
//! ([`Timers::put_back`]).
//!
//! Arming a `Sleep` that is due before all other timers of its runtime makes Tokio wake the thread that waits for them,
//! which takes a system call, and the thread finds nothing to do. So a timer has two `Sleep`s. One is due when the first
//! waiter is to be notified. The other is due when this waiter has to have responded, and is armed at the same time:
//! while the waiter is notified and takes what it waits for, that `Sleep` is before the one that is armed for the next
//! waiter.

use super::resource::HANDOFF_TIMEOUT;
use crate::panic::catch_unwind;
use std::{
    future::Future,
    mem,
    pin::{Pin, pin},
    task::{Context, Waker},
    time::Duration,
};
use tokio::{
    runtime::{Handle, Id},
    task::coop,
    time::{self, Instant, Sleep},
};

/// When the timers of a queue have to fire.
#[derive(Clone, Copy, Debug)]
pub(super) enum Deadline {
    /// A notified waiter has to respond by this instant, or a holder may have to give something back then. Mostly the
    /// deadline has changed before. So a timer that fires earlier is left as it is: when it fires, it is armed for the
    /// deadline of that time.
    Handoff(Instant),
    /// The first waiter waits until this instant. A timer that fires earlier is armed again: waking an idle thread for
    /// nothing costs more.
    Turn(Instant),
}

/// The timers of one wait queue.
#[derive(Default)]
pub(super) struct Timers {
    timers: Vec<Timer>,
}

/// The timer of one runtime.
struct Timer {
    runtime: Handle,
    /// `None` if the timer was never armed, or is taken out.
    alarm: Option<Alarm>,
    state: TimerState,
}

enum TimerState {
    /// The timer was never armed, or has fired.
    Unarmed,
    /// The timer fires at the instant `at`, and once more at `then`, if that is there. It may fire earlier if its
    /// runtime is shut down.
    Armed { at: Instant, then: Option<Instant> },
    /// A thread has taken the timer out to arm it.
    TakenOut,
}

/// The `Sleep`s of a timer, and the waker that each of them wakes when it fires.
struct Alarm {
    /// Fires at the deadline.
    first: Option<Pin<Box<Sleep>>>,
    /// Fires [`HANDOFF_TIMEOUT`] after a [`Deadline::Turn`]. `None` for a [`Deadline::Handoff`].
    second: Option<Pin<Box<Sleep>>>,
    waker: Waker,
}

/// A timer that was taken out of the queue to be armed. It must be [put back](Timers::put_back).
pub(super) struct UnarmedTimer {
    runtime: Handle,
    alarm: Option<Alarm>,
    deadline: Deadline,
}

/// A timer that [`UnarmedTimer::arm`] has tried to arm, to be [put back](Timers::put_back).
pub(super) struct ArmedTimer {
    runtime: Handle,
    deadline: Instant,
    /// The timer, and whether it is armed: if not, it fired while it was armed. `None` if the runtime has no timers
    /// enabled.
    alarm: Option<(Alarm, TimerState)>,
}

/// The resolution of Tokio's timers.
const RESOLUTION: Duration = Duration::from_millis(1);

// === impl Deadline ===

impl Deadline {
    const fn at(self) -> Instant {
        match self {
            Self::Handoff(at) | Self::Turn(at) => at,
        }
    }
}

// === impl Timers ===

impl Timers {
    /// Returns whether `runtime` has a timer of this queue that was armed before, so that the runtime is known to have
    /// timers enabled. A timer that is taken out does not count.
    pub(super) fn has_armed(&self, runtime: &Handle) -> bool {
        let timer = self.timers.iter().find(|timer| timer.runtime.id() == runtime.id());
        timer.is_some_and(|timer| timer.alarm.is_some())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.timers.is_empty()
    }

    /// Adds a timer for `runtime`, unless the runtime has one already. The timer is not armed.
    pub(super) fn add(&mut self, runtime: Handle) {
        if self.timers.iter().all(|timer| timer.runtime.id() != runtime.id()) {
            self.timers.push(Timer {
                runtime,
                alarm: None,
                state: TimerState::Unarmed,
            });
        }
    }

    /// Returns whether a timer has to be armed for `deadline`.
    pub(super) fn need_arming(&self, deadline: Deadline) -> bool {
        self.timers.iter().any(|timer| timer.needs_arming(deadline))
    }

    /// Takes out a timer that has to be armed for `deadline`.
    pub(super) fn take_unarmed(&mut self, deadline: Deadline) -> Option<UnarmedTimer> {
        let timer = self.timers.iter_mut().find(|timer| timer.needs_arming(deadline))?;
        timer.state = TimerState::TakenOut;
        Some(UnarmedTimer {
            runtime: timer.runtime.clone(),
            alarm: timer.alarm.take(),
            deadline,
        })
    }

    /// Puts back a timer that was taken out. Returns `false` if the timer may have fired already because its deadline has
    /// passed: the queue must be advanced before the timer is armed again.
    ///
    /// A timer that fired before its deadline belongs to a runtime that is being shut down. Such a timer is removed, and
    /// so is one that its runtime could not create. It stays in `armed`, to be dropped without the queue's lock.
    pub(super) fn put_back(&mut self, armed: &mut ArmedTimer, now: impl FnOnce() -> Instant) -> bool {
        let id = armed.runtime.id();
        let Some(index) = self.timers.iter().position(|timer| timer.runtime.id() == id) else {
            return true;
        };
        let deadline = armed.deadline;
        match armed.alarm.take() {
            // Also a timer that was armed may have fired by now, while it was taken out.
            Some((alarm, _)) if deadline <= now() => {
                self.timers[index].put_back(alarm, TimerState::Unarmed);
                false
            }
            Some((alarm, state @ TimerState::Armed { .. })) => {
                self.timers[index].put_back(alarm, state);
                true
            }
            removed => {
                armed.alarm = removed;
                self.timers.swap_remove(index);
                true
            }
        }
    }

    /// Records that the timer of `runtime` has fired.
    pub(super) fn fired(&mut self, runtime: Id) {
        let timer = self.timers.iter_mut().find(|timer| timer.runtime.id() == runtime);
        if let Some(timer) = timer {
            timer.fired();
        }
    }

    /// Removes the timers, which nothing waits for any more, and returns them. A timer that fires within
    /// [`HANDOFF_TIMEOUT`] stays: often the next waiter comes before that, and uses it.
    pub(super) fn retire(&mut self, now: Instant) -> Self {
        let fires_soon = |timer: &Timer| match timer.state {
            TimerState::Unarmed => false,
            TimerState::Armed { at, then } => then.unwrap_or(at) <= now + HANDOFF_TIMEOUT,
            TimerState::TakenOut => true,
        };
        if self.timers.iter().all(fires_soon) {
            return Self::default();
        }
        let (kept, retired) = mem::take(&mut self.timers).into_iter().partition(fires_soon);
        self.timers = kept;
        Self { timers: retired }
    }
}

// === impl Timer ===

impl Timer {
    fn needs_arming(&self, deadline: Deadline) -> bool {
        match (&self.state, deadline) {
            (TimerState::Unarmed, _) => true,
            (TimerState::TakenOut, _) => false,
            (TimerState::Armed { at: armed, .. }, Deadline::Handoff(at)) => at < *armed,
            (TimerState::Armed { at: armed, .. }, Deadline::Turn(at)) => at < *armed || at > *armed + RESOLUTION,
        }
    }

    fn put_back(&mut self, alarm: Alarm, state: TimerState) {
        self.alarm = Some(alarm);
        self.state = state;
    }

    fn fired(&mut self) {
        if let TimerState::Armed { then, .. } = self.state {
            self.state = match then {
                Some(at) => TimerState::Armed { at, then: None },
                None => TimerState::Unarmed,
            };
        }
    }
}

// === impl UnarmedTimer ===

impl UnarmedTimer {
    /// Arms the timer. `waker` creates the waker of the timer of one runtime, if the timer has none yet.
    ///
    /// Must be called without the queue's lock, because the waker may be woken at once.
    pub(super) fn arm(self, waker: impl FnOnce(Id) -> Waker) -> ArmedTimer {
        let Self {
            runtime,
            alarm,
            deadline,
        } = self;
        // Tokio panics if the runtime has no timers, or has been shut down since it was taken out.
        let alarm = catch_unwind(|| {
            let _entered = runtime.enter();
            let mut alarm = alarm.unwrap_or_else(|| Alarm {
                first: None,
                second: None,
                waker: waker(runtime.id()),
            });
            let state = alarm.arm(deadline);
            (alarm, state)
        });
        ArmedTimer {
            runtime,
            deadline: deadline.at(),
            alarm: alarm.ok(),
        }
    }
}

// === impl Alarm ===

impl Alarm {
    /// Arms the timer. It is unarmed afterwards if it fires at once: its deadline has passed, or its runtime is shut
    /// down. Must be called in the context of its runtime.
    fn arm(&mut self, deadline: Deadline) -> TimerState {
        let at = deadline.at();
        // The `Sleep` that is due first is armed first, while the other one is still due before it.
        if !arm(&mut self.first, at, &self.waker) {
            return TimerState::Unarmed;
        }
        let then = match deadline {
            Deadline::Turn(at) => at.checked_add(HANDOFF_TIMEOUT),
            Deadline::Handoff(_) => None,
        };
        let then = then.filter(|then| arm(&mut self.second, *then, &self.waker));
        if then.is_none() {
            self.second = None;
        }
        TimerState::Armed { at, then }
    }
}

/// Arms `sleep`, or a new one. Returns `false` if it fires at once.
fn arm(sleep: &mut Option<Pin<Box<Sleep>>>, at: Instant, waker: &Waker) -> bool {
    let sleep = sleep.get_or_insert_with(|| Box::pin(time::sleep_until(at)));
    if sleep.deadline() < at && !sleep.is_elapsed() {
        // A `Sleep` that is reset to a later deadline still wakes the thread at the earlier one.
        sleep.set(time::sleep_until(at));
    }
    // `reset` enters the `Sleep` in the list of the runtime's timers, also the first time. If the runtime is shut down,
    // the timer has fired then. To poll it would panic.
    sleep.as_mut().reset(at);
    // Polling stores the waker. It must do so even if the task that happens to run on this thread has used up its
    // cooperative budget, so it is not counted.
    !sleep.is_elapsed()
        && pin!(coop::unconstrained(sleep.as_mut()))
            .poll(&mut Context::from_waker(waker))
            .is_pending()
}
