//! [`OnStoreLoss`]: what to do when the store does not answer, and when to believe that it is lost.

use std::time::Duration;
use tokio::time::Instant;

/// What a member does while the store of the shared limits is lost to it.
///
/// Reservations that were made before stay valid in any case: they are paid for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum OnStoreLoss {
    /// It goes on with its own share: each rate divided by the number of members, with nothing saved up. What it has
    /// taken meanwhile is charged when the store is back.
    ///
    /// If all members lose the store, they stay within the limits together. If only some do, they may take their shares
    /// on top of what the others take: at most `rate x (share of those that are cut off) x T`.
    #[default]
    LocalShare,
    /// Nobody is admitted until the store is back. Calls wait until their deadline, or as long as
    /// [`patience`](super::Builder::patience) says. The limits hold whatever happens.
    Closed,
    /// Everybody is admitted at once: there is no limit. It is charged when the store is back.
    Open,
}

/// After so many failures in a row the store is lost.
const FAILURES: u32 = 3;

/// Whether the store is believed to be there.
#[derive(Debug, Default)]
pub(super) struct CircuitBreaker {
    failures: u32,
    /// When to ask again after a failure.
    next: Option<Instant>,
}

impl CircuitBreaker {
    pub(super) const fn is_open(&self) -> bool {
        self.failures >= FAILURES
    }

    /// When to ask at the earliest.
    pub(super) const fn next(&self) -> Option<Instant> {
        self.next
    }

    /// Returns whether the store was lost until now.
    pub(super) fn succeeded(&mut self) -> bool {
        let was_open = self.is_open();
        *self = Self::default();
        was_open
    }

    /// Returns whether the store is lost from now on.
    pub(super) fn failed(&mut self, now: Instant) -> bool {
        let was_open = self.is_open();
        self.failures = self.failures.saturating_add(1);
        // Doubled each time from 50 ms up to a second, and scattered, so that a fleet does not come back all at once.
        let most = if self.is_open() {
            let doublings = (self.failures - FAILURES).min(5);
            Duration::from_millis(50 << doublings).min(Duration::from_secs(1))
        } else {
            Duration::from_millis(40)
        };
        self.next = Some(now + most.mul_f64(0.5 + 0.5 * fastrand::f64()));
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
        assert!(!breaker.failed(now) && !breaker.failed(now));
        assert!(!breaker.succeeded());
        assert!(!breaker.failed(now) && !breaker.failed(now) && breaker.failed(now));
        assert!(breaker.is_open() && !breaker.failed(now));
        assert!(breaker.succeeded() && !breaker.is_open());
        assert_eq!(breaker.next(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_lost_store_is_asked_every_second_at_most_and_every_half_second_at_least() {
        let mut breaker = CircuitBreaker::default();
        let now = Instant::now();
        for failure in 1..=40 {
            breaker.failed(now);
            let wait = breaker.next().unwrap() - now;
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
