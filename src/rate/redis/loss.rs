//! [`OnStoreLoss`]: what a member does while the store is lost; [`CircuitBreaker`]: when it counts as lost.

use std::time::Duration;
use tokio::time::Instant;

/// What a member does while the store of the shared limits is lost to it.
///
/// Reservations that the store made before stay valid in any case: they are paid for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum OnStoreLoss {
    /// The member admits calls at its own share of the limits: each rate divided by the number of members, with no
    /// burst. What it admits meanwhile is charged when the store is back.
    ///
    /// If all members lose the store, they stay within the limits together. If only some of them do, they may admit
    /// their shares on top of what the other members admit: at most
    /// `rate x (share of the members that are cut off) x T`.
    #[default]
    LocalShare,
    /// The member admits no call until the store is back. Calls wait until their deadline, or until their
    /// [`patience`](super::Builder::patience) ends. The limits hold in every case.
    Closed,
    /// The member admits every call at once: there is no limit. What it admits is charged when the store is back.
    Open,
}

/// The number of failures in a row after which the store counts as lost.
const MAX_FAILURES: u32 = 3;
/// The longest wait before a request is repeated after one of the first failures.
const FIRST_RETRIES: Duration = Duration::from_millis(40);
/// The longest wait before the first probe of a lost store. It is doubled with each further failure.
const FIRST_PROBE: Duration = Duration::from_millis(50);
/// The longest wait before any probe.
const LAST_PROBE: Duration = Duration::from_secs(1);

/// Counts failures in a row. It is open while the store counts as lost.
#[derive(Debug, Default)]
pub(super) struct CircuitBreaker {
    failures: u32,
    /// When the first of the failed requests was sent.
    failing_since: Option<Instant>,
    retry_at: Option<Instant>,
}

impl CircuitBreaker {
    pub(super) const fn is_open(&self) -> bool {
        self.failures >= MAX_FAILURES
    }

    /// When the first of the failures in a row was sent; `None` if the last request succeeded.
    pub(super) const fn failing_since(&self) -> Option<Instant> {
        self.failing_since
    }

    /// The earliest time for the next request; `None` if the last one succeeded.
    pub(super) const fn retry_at(&self) -> Option<Instant> {
        self.retry_at
    }

    /// Returns whether the store was lost until now.
    pub(super) fn on_success(&mut self) -> bool {
        let was_open = self.is_open();
        *self = Self::default();
        was_open
    }

    /// Counts the failure of a request that was sent at `sent_at`. Returns whether the store is lost from now on.
    pub(super) fn on_failure(&mut self, sent_at: Instant, now: Instant) -> bool {
        let was_open = self.is_open();
        self.failures = self.failures.saturating_add(1);
        self.failing_since.get_or_insert(sent_at);
        let longest = if self.is_open() {
            let doublings = (self.failures - MAX_FAILURES).min(5);
            (FIRST_PROBE * (1 << doublings)).min(LAST_PROBE)
        } else {
            FIRST_RETRIES
        };
        // Scattered, so that the members do not all come back at the same time.
        self.retry_at = Some(now + longest.mul_f64(0.5 + 0.5 * fastrand::f64()));
        !was_open && self.is_open()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn three_failures_in_a_row_open_it_and_one_success_closes_it() {
        let mut breaker = CircuitBreaker::default();
        let now = Instant::now();
        let later = now + Duration::from_secs(1);
        assert!(!breaker.on_failure(now, now) && !breaker.on_failure(now, now));
        assert!(!breaker.on_success());
        assert!(!breaker.on_failure(now, now) && !breaker.on_failure(later, later) && breaker.on_failure(later, later));
        assert!(breaker.is_open() && !breaker.on_failure(later, later));
        assert_eq!(breaker.failing_since(), Some(now));
        assert!(breaker.on_success() && !breaker.is_open());
        assert_eq!((breaker.retry_at(), breaker.failing_since()), (None, None));
    }

    #[tokio::test(start_paused = true)]
    async fn a_lost_store_is_probed_every_second_at_most_and_every_half_second_at_least() {
        let mut breaker = CircuitBreaker::default();
        let now = Instant::now();
        for failure in 1..=40 {
            breaker.on_failure(now, now);
            let wait = breaker.retry_at().unwrap() - now;
            let bounds = match failure {
                1..=2 => 20..=40,
                3 => 25..=50,
                4 => 50..=100,
                5 => 100..=200,
                6 => 200..=400,
                7 => 400..=800,
                _ => 500..=1_000,
            };
            assert!(bounds.contains(&wait.as_millis()), "{failure}: {wait:?}");
        }
    }
}
