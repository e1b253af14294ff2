//! [`Adaptation`]: finds the limits of a provider by its 429s, when no header reports them.
//!
//! A 429 means that the limits are too high: all rates are lowered by a tenth. While there is none, they rise by a
//! hundredth per second, up to the configured amounts. So they settle just below what the provider allows.
//!
//! This resembles TCP's congestion control, which also decreases by a factor, with a smaller decrease and a slower
//! increase: a provider's limit changes less often than the capacity of a network path.

use crate::rate::{Limiter, Limits};
use std::sync::{Mutex, PoisonError};
use tokio::time::Instant;

/// The factor of a 429.
const DECREASE: f64 = 0.9;
/// The factor of a second without a 429.
const INCREASE_PER_SECOND: f64 = 1.01;
/// The lowest amounts, as a part of the configured ones. Without it, a long outage that is answered with 429s would
/// lower the rates without bound.
const MIN_FACTOR: f64 = 0.01;

/// The state of the adaptation of one limiter, shared by all clones of a [`FeedbackLayer`](super::FeedbackLayer).
pub(super) struct Adaptation {
    state: Mutex<State>,
}

struct State {
    /// The limits as they were configured, by which `factor` is multiplied.
    configured: Limits,
    /// The limits that were set last. If the limiter has others, they were changed by user code.
    applied: Limits,
    /// From [`MIN_FACTOR`] to 1.
    factor: f64,
    /// When the limits were set last.
    changed: Instant,
}

impl Adaptation {
    pub(super) fn new(limiter: &Limiter) -> Self {
        let configured = limiter.limits();
        Self {
            state: Mutex::new(State {
                applied: configured.clone(),
                configured,
                factor: 1.0,
                changed: Instant::now(),
            }),
        }
    }

    /// Lowers the limits after a 429. `started` is when the call was sent.
    pub(super) fn on_throttled(&self, limiter: &Limiter, started: Instant) {
        self.change(limiter, |state| {
            // A call that was in flight when the limits were lowered was sent at the old rate. Its 429 would lower the
            // limits once for each call in flight.
            (started >= state.changed).then(|| (state.factor * DECREASE).max(MIN_FACTOR))
        });
    }

    /// Raises lowered limits after a success, by the time since they were changed, at most once a second.
    pub(super) fn on_success(&self, limiter: &Limiter) {
        self.change(limiter, |state| {
            let seconds = state.changed.elapsed().as_secs_f64();
            (state.factor < 1.0 && seconds >= 1.0).then(|| (state.factor * INCREASE_PER_SECOND.powf(seconds)).min(1.0))
        });
    }

    /// Sets the limits to the configured ones times the factor that `change` returns. `None` changes nothing.
    fn change(&self, limiter: &Limiter, change: impl FnOnce(&State) -> Option<f64>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(factor) = change(&state) else { return };
        let limits = limiter.limits();
        if limits != state.applied {
            // User code has set other limits. They are the configured ones from now on, and the factor that was found
            // for the previous ones does not apply to them.
            state.configured = limits;
            state.factor = 1.0;
        } else {
            state.factor = factor;
        }
        let scaled = state.configured.scaled(state.factor);
        state.changed = Instant::now();
        // Fails if a scaled rate is too low to be represented: the limits stay as they are.
        if limiter.set_limits(scaled.clone()).is_ok() {
            state.applied = scaled;
        }
    }
}
