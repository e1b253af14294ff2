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
    /// The timer fires at this instant. It may fire earlier if its runtime is shut down.
    Armed(Instant),
    /// A thread has taken the timer out to arm it.
    TakenOut,
}

/// A `Sleep`, and the waker that it wakes when it fires.
struct Alarm {
    sleep: Pin<Box<Sleep>>,
    waker: Waker,
}

/// A timer that was taken out of the queue to be armed. It must be [put back](Timers::put_back).
pub(super) struct UnarmedTimer {
    runtime: Handle,
    alarm: Option<Alarm>,
    deadline: Instant,
}

/// A timer that [`UnarmedTimer::arm`] has tried to arm, to be [put back](Timers::put_back).
pub(super) struct ArmedTimer {
    runtime: Handle,
    deadline: Instant,
    /// The timer, and whether it is armed: if not, it fired while it was armed. `None` if the runtime has no timers
    /// enabled.
    alarm: Option<(Alarm, bool)>,
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

    pub(super) const fn is_empty(&self) -> bool {
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
            deadline: deadline.at(),
        })
    }

    /// Puts back a timer that was taken out. Returns `false` if the timer fired at once because its deadline had passed:
    /// the queue must be advanced before the timer is armed again.
    ///
    /// A timer that fired before its deadline belongs to a runtime that is being shut down. Such a timer is removed, and
    /// so is one that its runtime could not create. It stays in `armed`, to be dropped without the queue's lock.
    pub(super) fn put_back(&mut self, armed: &mut ArmedTimer, now: impl FnOnce() -> Instant) -> bool {
        let id = armed.runtime.id();
        let Some(index) = self.timers.iter().position(|timer| timer.runtime.id() == id) else {
            return true;
        };
        let deadline = armed.deadline;
        match armed.alarm {
            Some((_, true)) => {
                self.timers[index].set(armed, TimerState::Armed(deadline));
                true
            }
            Some((_, false)) if deadline <= now() => {
                self.timers[index].set(armed, TimerState::Unarmed);
                false
            }
            Some((_, false)) | None => {
                self.timers.swap_remove(index);
                true
            }
        }
    }

    /// Marks the timer of `runtime` as not armed: it has fired.
    pub(super) fn fired(&mut self, runtime: Id) {
        let timer = self.timers.iter_mut().find(|timer| timer.runtime.id() == runtime);
        if let Some(Timer {
            state: state @ TimerState::Armed(_),
            ..
        }) = timer
        {
            *state = TimerState::Unarmed;
        }
    }

    /// Removes the timers, which nothing waits for any more, and returns them. A timer that fires within
    /// [`HANDOFF_TIMEOUT`] stays: often the next waiter comes before that, and uses it.
    pub(super) fn retire(&mut self, now: Instant) -> Self {
        let fires_soon = |timer: &Timer| match timer.state {
            TimerState::Unarmed => false,
            TimerState::Armed(at) => at <= now + HANDOFF_TIMEOUT,
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
            (TimerState::Armed(armed), Deadline::Handoff(at)) => at < *armed,
            (TimerState::Armed(armed), Deadline::Turn(at)) => at < *armed || at > *armed + RESOLUTION,
        }
    }

    /// Takes over what `armed` has taken out.
    fn set(&mut self, armed: &mut ArmedTimer, state: TimerState) {
        self.alarm = armed.alarm.take().map(|(alarm, _)| alarm);
        self.state = state;
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
            let mut alarm = match alarm {
                Some(mut alarm) => {
                    if alarm.sleep.deadline() < deadline {
                        // A `Sleep` that is reset to a later deadline still wakes the thread at the earlier one.
                        let _entered = runtime.enter();
                        alarm.sleep.set(time::sleep_until(deadline));
                    }
                    alarm
                }
                None => {
                    let _entered = runtime.enter();
                    Alarm {
                        sleep: Box::pin(time::sleep_until(deadline)),
                        waker: waker(runtime.id()),
                    }
                }
            };
            let is_armed = alarm.arm(deadline);
            (alarm, is_armed)
        });
        ArmedTimer {
            runtime,
            deadline,
            alarm: alarm.ok(),
        }
    }
}

// === impl Alarm ===

impl Alarm {
    /// Arms the timer. Returns `false` if it fires at once: its deadline has passed, or its runtime is shut down.
    fn arm(&mut self, deadline: Instant) -> bool {
        // `reset` enters the `Sleep` in the list of the runtime's timers, also the first time. If the runtime is shut
        // down, the timer has fired then. To poll it would panic.
        self.sleep.as_mut().reset(deadline);
        // Polling stores the waker. It must do so even if the task that happens to run on this thread has used up its
        // cooperative budget, so it is not counted.
        !self.sleep.is_elapsed()
            && pin!(coop::unconstrained(self.sleep.as_mut()))
                .poll(&mut Context::from_waker(&self.waker))
                .is_pending()
    }
}
