//! [`Adaptation`]: a limit that nobody tells is found by its 429s.
//!
//! Each 429 says that the limits are too high: they are lowered by a tenth. While there is none they rise again, a
//! hundredth in a second, up to what was configured. So they come to hover just below what the provider allows, whatever
//! it says (additive increase and multiplicative decrease, as in TCP, but slower: a provider's limit does not change
//! every second).

use crate::rate::{Limiter, Limits};
use std::sync::{Mutex, PoisonError};
use tokio::time::Instant;

/// By what a 429 lowers them.
const LOWER: f64 = 0.9;
/// By what a second raises them.
const RAISE: f64 = 1.01;
/// Never lower than this part of what was configured.
const LEAST: f64 = 0.01;

pub(super) struct Adaptation {
    state: Mutex<State>,
}

struct State {
    /// What was configured.
    told: Limits,
    /// What was made of it last.
    applied: Limits,
    factor: f64,
    changed: Instant,
}

impl Adaptation {
    pub(super) fn new(limiter: &Limiter) -> Self {
        let told = limiter.limits();
        Self {
            state: Mutex::new(State {
                applied: told.clone(),
                told,
                factor: 1.0,
                changed: Instant::now(),
            }),
        }
    }

    /// A call that began then was answered 429.
    pub(super) fn too_much(&self, limiter: &Limiter, begun: Instant) {
        self.change(limiter, |state| {
            // Those that were on their way when the limits were lowered say nothing of the new ones.
            (begun >= state.changed).then(|| (state.factor * LOWER).max(LEAST))
        });
    }

    /// A call succeeded.
    pub(super) fn went_well(&self, limiter: &Limiter) {
        self.change(limiter, |state| {
            let seconds = state.changed.elapsed().as_secs_f64();
            (state.factor < 1.0 && seconds >= 1.0).then(|| (state.factor * RAISE.powf(seconds)).min(1.0))
        });
    }

    fn change(&self, limiter: &Limiter, change: impl FnOnce(&State) -> Option<f64>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(factor) = change(&state) else { return };
        let limits = limiter.limits();
        if limits != state.applied {
            // Somebody else has changed them: what was learned was of others.
            state.told = limits;
            state.factor = 1.0;
        } else {
            state.factor = factor;
        }
        let scaled = state.told.scaled(state.factor);
        state.changed = Instant::now();
        // Fails for a rate that could not be counted: then they stay.
        if limiter.set_limits(scaled.clone()).is_ok() {
            state.applied = scaled;
        }
    }
}
