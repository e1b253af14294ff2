//! How long a new call would wait.

use super::Buckets;
use crate::{
    clock::LazyNow,
    rate::{cost::Cost, demand::Demand, used_share::UsedShares},
};
use std::time::Duration;

impl Buckets {
    /// Returns how long a new call of this cost has to wait behind the waiters in the limiter's queue, if nothing is
    /// settled before.
    pub(in crate::rate) fn wait(&mut self, cost: &Cost, now: &mut LazyNow) -> Duration {
        let wait = match self.queued() {
            None => self.time_until(cost),
            Some(queued) => {
                let waits = self.buckets.iter().filter(|(_, bucket)| !bucket.refuses());
                let waits = waits.map(|(budget, bucket)| {
                    bucket.time_until_sum(queued.demand.of(*budget) + u128::from(cost.of(*budget)))
                });
                waits.fold(0, u64::max)
            }
        };
        self.wait_from_filled(wait, now)
    }

    /// Returns how long a new call of this cost will probably wait, behind the waiters in the limiter's queue and
    /// behind `ahead`, the summed costs of the calls that will join the queue before it. Estimates, those of the calls
    /// before it and those that are charged already, count as what calls turn out to use of them.
    pub(in crate::rate) fn expected_wait(&mut self, cost: &Cost, ahead: &Demand, now: &mut LazyNow) -> Duration {
        let unknown = UsedShares::default();
        let shares = self.used_shares.as_deref().unwrap_or(&unknown);
        let waiters = self.queued();
        let waits = self.buckets.iter().filter(|(_, bucket)| !bucket.refuses());
        let waits = waits.map(|(budget, bucket)| {
            let share = shares.of(*budget);
            let (ahead, queued) = (ahead.of(*budget), waiters.map_or(0, |queued| queued.demand.of(*budget)));
            let queued_estimates = waiters.map_or(0, |queued| queued.estimates.of(*budget));
            let ahead = if self.has_estimates { share.of(ahead) } else { ahead };
            let before = (queued - queued_estimates).saturating_add(share.of(queued_estimates).saturating_add(ahead));
            bucket.expected_time_until(before.saturating_add(cost.of(*budget).into()), share)
        });
        let wait = waits.fold(0, u64::max);
        self.wait_from_filled(wait, now)
    }

    /// Returns how much time is left if a call is admitted `wait` nanoseconds after `filled_to`, or when the pause ends
    /// if that is later.
    fn wait_from_filled(&mut self, wait: u64, now: &mut LazyNow) -> Duration {
        let now = self.time(now);
        // While calls wait, the buckets are filled only up to `filled_to`, which may be in the past, and the waiters
        // have not been charged. So the time that the buckets need for all these costs is counted from `filled_to`, not
        // from the present.
        let admission = self.filled_to.saturating_add(wait).max(self.pauses.until());
        Duration::from_nanos(admission.saturating_sub(now))
    }
}
