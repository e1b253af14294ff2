//! [`Timer`]: the one timer of a queue, for the deadlines of its calls and for a call that is slow to start.
//!
//! The timer is armed at once on the thread that learns of an earlier instant, and its waker runs on the thread that
//! drives the runtime's timers. No task has to be scheduled for either: a task could be stuck behind a caller that
//! computes on the same thread.
#![cfg_attr(
    tower_outbound_loom,
    allow(dead_code, unused_imports, reason = "there is no time under loom")
)]

use super::runtime::Runtime;
use crate::{
    panic::catch_unwind,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
};
use std::{
    future::Future,
    pin::{Pin, pin},
    sync::PoisonError,
    task::{Context, Poll, Waker},
};
use tokio::{
    task::coop::unconstrained,
    time::{Instant, Sleep},
};

pub(super) struct Timer {
    state: Mutex<TimerState>,
    /// Whether the timer has fired and no thread has acted on that yet.
    fired: AtomicBool,
    /// Wakes the owner of the timer when it fires.
    waker: Waker,
}

#[derive(Default)]
struct TimerState {
    /// Tokio's timer, made when the queue first needs one.
    sleep: Option<Pin<Box<Sleep>>>,
    /// The instant at which the timer fires. `None` if it is not armed.
    armed: Option<Instant>,
    /// Whether the timer cannot be used: the runtime has no timers, or is being shut down.
    is_unusable: bool,
}

impl Timer {
    pub(super) fn new(waker: Waker) -> Self {
        Self {
            state: Mutex::default(),
            fired: AtomicBool::new(false),
            waker,
        }
    }

    /// Makes Tokio's timer, for a call that has a deadline.
    ///
    /// # Panics
    ///
    /// Panics if the runtime's timer is not enabled.
    #[cfg(not(tower_outbound_loom))]
    pub(super) fn prepare(&self, at: Instant, runtime: &Runtime) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.sleep.is_none() {
            state.sleep = Some(Box::pin(runtime.sleep_until(at)));
        }
    }

    #[cfg(tower_outbound_loom)]
    pub(super) fn prepare(&self, _: Instant, _: &Runtime) {}

    /// Arms the timer for `at`, unless it fires earlier already. Returns whether it has fired meanwhile, so that the
    /// caller has to act on it.
    #[cfg(not(tower_outbound_loom))]
    pub(super) fn arm(&self, at: Instant, runtime: &Runtime) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.is_unusable || state.armed.is_some_and(|armed| armed <= at) {
            return false;
        }
        // Tokio panics while the runtime is being shut down, when all calls are cancelled anyway, and if it has no timers.
        // Then calls without a deadline run nevertheless, and only starts that take too long are not noticed.
        // Without `unconstrained`, a task that has used up its cooperative budget would not arm the timer here.
        let polled = catch_unwind(|| {
            let sleep = state.sleep.get_or_insert_with(|| Box::pin(runtime.sleep_until(at)));
            sleep.as_mut().reset(at);
            pin!(unconstrained(sleep.as_mut())).poll(&mut Context::from_waker(&self.waker))
        });
        let Ok(polled) = polled else {
            state.is_unusable = true;
            return false;
        };
        state.armed = Some(at).filter(|_| polled.is_pending());
        drop(state);
        // A deadline that passes while the timer is being armed wakes the waker on this thread, inside the poll above.
        // `fire` then could not lock the state and has left the rest to this caller.
        let has_fired = self.fired.swap(false, Ordering::AcqRel);
        has_fired || polled == Poll::Ready(())
    }

    /// Under loom there is no time, so the timer never fires.
    #[cfg(tower_outbound_loom)]
    pub(super) fn arm(&self, _: Instant, _: &Runtime) -> bool {
        false
    }

    /// Notes that the timer has fired. Returns whether the caller has to act on it; if not, the thread that is arming
    /// the timer does.
    pub(super) fn fire(&self) -> bool {
        self.fired.store(true, Ordering::Release);
        let Ok(mut state) = self.state.try_lock() else {
            return false;
        };
        // A runtime that is being shut down fires its timers before their time.
        state.is_unusable |= state.armed.take().is_some_and(|armed| Instant::now() < armed);
        drop(state);
        self.fired.swap(false, Ordering::AcqRel)
    }
}
