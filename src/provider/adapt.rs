//! [`Adaptation`]: finds the limits of a provider from its 429 responses, when no header reports the limits.
//!
//! A 429 means that the limits of the limiter are too high, and lowers all its rates by a tenth. Successful responses
//! raise the rates by a hundredth for each second without a 429, up to the configured amounts. The rates thus settle
//! just below what the provider allows.
//!
//! The adaptation resembles TCP's congestion control, which also decreases by a factor. It decreases less and increases
//! more slowly than TCP does, as a provider's limit changes less often than the capacity of a network path.

use crate::rate::{Limiter, Limits};
use std::sync::{Mutex, PoisonError};
use tokio::time::Instant;

/// The factor by which each 429 multiplies the rates.
const DECREASE: f64 = 0.9;
/// The factor by which each second without a 429 multiplies the rates.
const INCREASE_PER_SECOND: f64 = 1.01;
/// The lowest rates, as a fraction of the configured amounts. Without a lower bound, a long outage that is answered
/// with 429s would lower the rates further and further.
const MIN_FACTOR: f64 = 0.01;

/// The state of the adaptation of one limiter, shared by all clones of a [`FeedbackLayer`](super::FeedbackLayer).
pub(super) struct Adaptation {
    state: Mutex<AdaptationState>,
}

struct AdaptationState {
    /// The configured limits. The limits in force are the configured ones multiplied by `factor`.
    configured: Limits,
    /// The limits that the adaptation set last. If the limiter now has other limits, user code has changed them.
    applied: Limits,
    /// The factor by which the configured limits are multiplied, from [`MIN_FACTOR`] to 1.
    factor: f64,
    /// When the adaptation last changed the limits.
    changed: Instant,
}

impl Adaptation {
    pub(super) fn new(limiter: &Limiter) -> Self {
        let configured = limiter.limits();
        Self {
            state: Mutex::new(AdaptationState {
                applied: configured.clone(),
                configured,
                factor: 1.0,
                changed: Instant::now(),
            }),
        }
    }

    /// Lowers the limits after a 429. `started` is when the call that got the 429 was sent.
    pub(super) fn on_throttled(&self, limiter: &Limiter, started: Instant) {
        self.change(limiter, |state| {
            // A 429 of a call that was sent before the limits were last changed is ignored: it does not mean that the
            // current limits are too high. Otherwise each of the calls in flight would lower the limits once more.
            (started >= state.changed).then(|| (state.factor * DECREASE).max(MIN_FACTOR))
        });
    }

    /// Raises lowered limits after a successful response, by a hundredth for each second since the limits were last
    /// changed. Does nothing in the first second after a change.
    pub(super) fn on_success(&self, limiter: &Limiter) {
        self.change(limiter, |state| {
            let seconds = state.changed.elapsed().as_secs_f64();
            (state.factor < 1.0 && seconds >= 1.0).then(|| (state.factor * INCREASE_PER_SECOND.powf(seconds)).min(1.0))
        });
    }

    /// Sets the limits of the limiter to the configured ones, multiplied by the factor that `change` returns. If
    /// `change` returns `None`, nothing changes.
    fn change(&self, limiter: &Limiter, change: impl FnOnce(&AdaptationState) -> Option<f64>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(factor) = change(&state) else { return };
        let limits = limiter.limits();
        if limits != state.applied {
            // User code has set other limits, which become the configured ones. The factor that was found for the
            // previous limits does not apply to them, and starts again at 1.
            state.configured = limits;
            state.factor = 1.0;
        } else {
            state.factor = factor;
        }
        let scaled = state.configured.scaled(state.factor);
        state.changed = Instant::now();
        // Setting the limits fails if a scaled rate is too low to be represented. The limits of the limiter then stay
        // as they are.
        if limiter.set_limits(scaled.clone()).is_ok() {
            state.applied = scaled;
        }
    }
}
