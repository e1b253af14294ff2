//! Corrections of what the buckets hold: by what a provider reports, and by what calls turn out to use.

use super::Buckets;
use crate::{
    clock::LazyNow,
    rate::{budget::Budget, cost::Cost},
};
#[cfg(feature = "http")]
use crate::{clock::nanos_between, rate::level_history::LevelHistory};
use std::time::Duration;
#[cfg(feature = "http")]
use tokio::time::Instant;

impl Buckets {
    /// Lowers what the bucket of one rate holds to `remaining`, and never raises it. Does nothing if `budget` and
    /// `period` do not identify a rate.
    pub(in crate::rate) fn lower(
        &mut self,
        budget: Budget,
        period: Option<Duration>,
        remaining: u64,
        now: &mut LazyNow,
    ) {
        self.fill_if_idle(now);
        let index = self.limits.index_of(budget, period);
        if let Some((_, bucket)) = index.and_then(|index| self.buckets.get_mut(index)) {
            bucket.lower(remaining);
        }
    }

    /// Lowers what the bucket of one rate holds to what it would hold now if it had held `remaining` when the provider
    /// received a call that was sent at `sent`. Never raises what the bucket holds. Does nothing if `budget` and `period`
    /// do not identify a rate.
    #[cfg(feature = "http")]
    pub(in crate::rate) fn lower_since(
        &mut self,
        budget: Budget,
        period: Option<Duration>,
        remaining: u64,
        sent: Instant,
        now: &mut LazyNow,
    ) {
        self.fill_if_idle(now);
        let Some(index) = self.limits.index_of(budget, period) else {
            return;
        };
        let now = self.time(now);
        let sent = nanos_between(self.epoch, sent);
        let Some((_, bucket)) = self.buckets.get_mut(index) else {
            return;
        };
        let lowest = self.histories.get(index).and_then(|history| history.lowest_since(sent));
        match lowest {
            Some(lowest) => {
                let level = bucket.level();
                let lowest = if level.wrapping_sub(lowest) < 0 { level } else { lowest };
                bucket.lower_since(remaining, lowest);
            }
            // What was charged since is not known, for example because the limits were changed.
            None => bucket.lower_before(remaining, now.saturating_sub(sent)),
        }
    }

    /// Records that a call is sent now, for a later [`lower_since`](Self::lower_since).
    #[cfg(feature = "http")]
    pub(in crate::rate) fn mark_sent(&mut self, now: &mut LazyNow) {
        self.fill_if_idle(now);
        let now = self.time(now);
        if self.histories.is_empty() {
            self.histories = self.buckets.iter().map(|_| LevelHistory::default()).collect();
        }
        for ((_, bucket), history) in self.buckets.iter().zip(&mut self.histories) {
            history.record(now, bucket.level());
        }
    }

    /// Replaces the charged cost `estimate` by what the call really `used`. `number` is the number of estimates that were
    /// charged before this one. Returns a budget whose debt was cut off at the largest one.
    pub(in crate::rate) fn settle(
        &mut self,
        estimate: &Cost,
        number: u64,
        used: &Cost,
        now: &mut LazyNow,
    ) -> Option<Budget> {
        self.fill_if_idle(now);
        self.used_shares.get_or_insert_default().record(estimate, used);
        let mut cut_off = None;
        for (budget, bucket) in &mut self.buckets {
            if bucket.settle(estimate.of(*budget), used.of(*budget), number) {
                cut_off = Some(*budget);
            }
        }
        cut_off
    }

    /// Raises each bucket that is in debt to 0.
    pub(in crate::rate) fn forgive_debts(&mut self, now: &mut LazyNow) {
        self.fill_if_idle(now);
        self.buckets.iter_mut().for_each(|(_, bucket)| bucket.forgive_debt());
    }
}
