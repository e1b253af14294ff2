//! [`OnStoreLoss`]: what a member does while the store is lost; [`CircuitBreaker`]: decides when the store counts as
//! lost and when to send the next request to it; [`LossLog`]: what is logged of it.

use crate::error::StoreProblem;
use std::time::Duration;
use tokio::time::Instant;

/// What a member (a process that shares the limits) does while it cannot reach the store, that is, the server.
///
/// With every variant, calls still use the reservations that the store made before the loss, because the shared buckets
/// were charged for them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum OnStoreLoss {
    /// The member admits calls at its own share of the limits: each rate divided by the number of members, without a
    /// burst. What the member admits during the loss is charged to the shared buckets when the store is back.
    ///
    /// If all members lose the store, they stay within the limits together. If only some members lose it, these may
    /// admit their shares on top of what the other members admit: at most
    /// `rate x (share of the members that are cut off) x T` in a time T.
    #[default]
    LocalShare,
    /// The member admits no call until the store is back. Calls wait until their deadline, or until their
    /// [`patience`](super::Builder::patience) ends. The limits are not exceeded, as long as there is one store: in a split
    /// brain, where two servers accept writes, each of them admits the whole rate.
    Closed,
    /// The member admits every call at once, without any limit. What the member admits during the loss is charged to
    /// the shared buckets when the store is back.
    Open,
}

/// The number of failed requests in a row after which the store counts as lost.
const MAX_FAILURES: u32 = 3;
/// The longest wait before the next request after a failure, while the store does not count as lost yet.
const MAX_RETRY_DELAY: Duration = Duration::from_millis(40);
/// The longest wait before the first probe of a lost store. Each further failure doubles the wait, up to
/// `MAX_PROBE_DELAY`.
const FIRST_PROBE_DELAY: Duration = Duration::from_millis(50);
/// The longest wait between two probes of a lost store, however many have failed.
const MAX_PROBE_DELAY: Duration = Duration::from_secs(1);

/// Counts how many requests to the store have failed in a row. The circuit breaker is open while the store counts as
/// lost.
#[derive(Debug, Default)]
pub(super) struct CircuitBreaker {
    failures: u32,
    /// When the first of the requests that failed in a row was sent; `None` if the last request succeeded.
    failing_since: Option<Instant>,
    retry_at: Option<Instant>,
}

/// How often a loss that lasts is logged.
const WARNING_INTERVAL: Duration = Duration::from_secs(30);

/// Logs that the store is lost, at once and then every [`WARNING_INTERVAL`] while it lasts: a process that goes on by
/// itself otherwise looks as if nothing was wrong.
#[derive(Debug, Default)]
pub(super) struct LossLog {
    /// When the loss was logged last, and how many calls had been admitted without the store when it began; `None` while
    /// the store is not lost.
    warned: Option<Warned>,
}

#[derive(Clone, Copy, Debug)]
struct Warned {
    at: Instant,
    lost_at: Instant,
    admitted_before: u64,
}

impl CircuitBreaker {
    pub(super) const fn is_open(&self) -> bool {
        self.failures >= MAX_FAILURES
    }

    /// Returns when the first of the requests that failed in a row was sent; `None` if the last request succeeded.
    pub(super) const fn failing_since(&self) -> Option<Instant> {
        self.failing_since
    }

    /// Returns the earliest time at which the next request to the store may be sent; `None` if the last request
    /// succeeded.
    pub(super) const fn retry_at(&self) -> Option<Instant> {
        self.retry_at
    }

    /// Records that a request to the store succeeded. Returns whether the store counted as lost until then.
    pub(super) fn on_success(&mut self) -> bool {
        let was_open = self.is_open();
        *self = Self::default();
        was_open
    }

    /// Counts the failure of a request that was sent at `sent_at`. Returns whether this failure makes the store count
    /// as lost.
    pub(super) fn on_failure(&mut self, sent_at: Instant, now: Instant) -> bool {
        let was_open = self.is_open();
        self.failures = self.failures.saturating_add(1);
        self.failing_since.get_or_insert(sent_at);
        let longest = if self.is_open() {
            let doublings = (self.failures - MAX_FAILURES).min(5);
            (FIRST_PROBE_DELAY * (1 << doublings)).min(MAX_PROBE_DELAY)
        } else {
            MAX_RETRY_DELAY
        };
        // The wait is random, so that members that lost the store together do not all send their next requests at the
        // same time.
        self.retry_at = Some(now + longest.mul_f64(0.5 + 0.5 * fastrand::f64()));
        !was_open && self.is_open()
    }
}

impl LossLog {
    /// Called for each failure while the store is lost. `admitted` counts the calls that this process has ever admitted
    /// without the store.
    pub(super) fn on_failure(
        &mut self,
        problem: StoreProblem,
        on_store_loss: OnStoreLoss,
        admitted: u64,
        failing_since: Instant,
        now: Instant,
    ) {
        let warned = self.warned.get_or_insert(Warned {
            at: now,
            lost_at: failing_since,
            admitted_before: admitted,
        });
        let is_first = warned.at == now;
        if !is_first && now - warned.at < WARNING_INTERVAL {
            return;
        }
        warned.at = now;
        let lost_for = now - warned.lost_at;
        if is_first {
            tracing::warn!(
                %problem,
                ?on_store_loss,
                "The store of the shared limits is lost: check the server. It is probed at least once a second"
            );
        } else {
            tracing::warn!(
                %problem,
                ?on_store_loss,
                ?lost_for,
                admitted_without_store = admitted - warned.admitted_before,
                "The store of the shared limits is still lost: this process does not share its limits with others"
            );
        }
    }

    /// Called when the store has replied after a loss.
    pub(super) fn on_return(&mut self, members: u64, now: Instant) {
        let lost_for = self.warned.take().map(|warned| now - warned.lost_at);
        tracing::info!(
            members,
            lost_for = ?lost_for.unwrap_or_default(),
            "The store of the shared limits is back: calls are admitted by it again"
        );
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
    async fn the_waits_between_probes_grow_to_at_most_a_second() {
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
