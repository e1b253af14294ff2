//! What it costs to try to exceed a limit: see [`adapt`](super::adapt).

use std::time::Duration;
use tokio::time::Instant;

/// How many calls have to be accepted for each rejected one, before a limit that was found twice is tried to be exceeded
/// again.
const CALLS_PER_REJECTION: u32 = 200;
/// The longest time without trying.
const LONGEST_HOLD: Duration = Duration::from_secs(5 * 60);
/// Two limits that differ by less than this share are the same.
const SAME_LIMIT: f64 = 0.15;
/// An average of a shorter time says little.
const SHORTEST_AVERAGE: Duration = Duration::from_secs(5);

/// The average factor since the last rejection.
#[derive(Clone, Copy)]
pub(super) struct Average {
    since: Instant,
    until: Instant,
    /// The sum of the factors, each multiplied by the seconds in which it was in force, from `since` to `until`.
    sum: f64,
}

/// What an episode has cost, and the calls that were accepted since.
#[derive(Clone, Copy, Default)]
pub(super) struct Price {
    /// Whether the episode has found the same limit as the one before.
    pub(super) is_known: bool,
    pub(super) rejected: u32,
    pub(super) accepted: u32,
}

// === impl Average ===

impl Average {
    pub(super) const fn new(now: Instant) -> Self {
        Self {
            since: now,
            until: now,
            sum: 0.0,
        }
    }

    /// Adds the time until `now`, in which `factor` was in force.
    pub(super) fn add(&mut self, factor: f64, now: Instant) {
        self.sum += factor * now.duration_since(self.until).as_secs_f64();
        self.until = now;
    }

    /// Begins anew, and returns the average so far. `None` if it is one of a short time.
    pub(super) fn restart(&mut self, factor: f64, now: Instant) -> Option<f64> {
        self.add(factor, now);
        let time = now.duration_since(self.since);
        let average = (time >= SHORTEST_AVERAGE).then(|| self.sum / time.as_secs_f64());
        *self = Self::new(now);
        average
    }
}

// === impl Price ===

impl Price {
    /// Returns whether enough calls were accepted since the episode, or enough `time` has passed. What was found once may
    /// be wrong, so it is tried again soon.
    pub(super) fn is_paid(&self, time: Duration) -> bool {
        let price = self.rejected.saturating_mul(CALLS_PER_REJECTION);
        !self.is_known || self.accepted >= price || time > LONGEST_HOLD
    }
}

/// Returns whether two factors are so close that they are the same limit.
pub(super) fn is_same_limit(one: f64, other: f64) -> bool {
    (one / other - 1.0).abs() < SAME_LIMIT
}
