//! Buckets that are made for a key when they are needed, and are forgotten when they are at rest.

use super::{Admitted, Buckets, MAX_CATCH_UP_NANOS};
use crate::{clock::LazyNow, error::InvalidConfig, rate::limits::Limits};
use std::time::{Duration, SystemTime};
use tokio::time::Instant;

impl Buckets {
    /// Creates buckets that lack so many units each at the time `now`, in the order of the limits. At that time, the
    /// wall clock shows `wall_clock`.
    pub(in crate::rate) fn with_missing(
        limits: Limits,
        missing: &[u128],
        now: Instant,
        wall_clock: SystemTime,
    ) -> Result<Self, InvalidConfig> {
        let mut buckets = Self::new(limits, wall_clock)?;
        buckets.epoch = now;
        for ((_, bucket), missing) in buckets.buckets.iter_mut().zip(missing) {
            bucket.set_missing(*missing);
        }
        Ok(buckets)
    }

    /// Returns how many nanoseconds it takes until what the buckets hold is all there is to know about them: until the
    /// pause ends, and until no call is admitted as of an earlier time any more. 0 if it is. No call must wait.
    pub(in crate::rate) fn time_until_rest(&mut self, now: &mut LazyNow) -> u64 {
        let time = self.time(now);
        let until_credited = match self.last_admission.lateness {
            0 => 0,
            _ => self.last_admission.at.saturating_add(MAX_CATCH_UP_NANOS + 1),
        };
        self.pauses.until().max(until_credited).saturating_sub(time)
    }

    /// Fills the buckets up to the present, after which no call is admitted as of an earlier time. No call must wait.
    pub(in crate::rate) fn end_credit(&mut self, now: &mut LazyNow) {
        let time = self.time(now);
        self.fill_to(time);
        self.last_admission = Admitted::default();
    }

    /// Returns how many nanoseconds it takes until all buckets are full if nothing is taken before. No call must wait.
    pub(in crate::rate) fn time_until_full(&mut self, now: &mut LazyNow) -> u64 {
        self.fill_if_idle(now);
        let full = self.buckets.iter().map(|(_, bucket)| bucket.time_until_full());
        full.fold(0, u64::max)
    }

    /// Returns how many units each bucket lacks, in the order of the limits. No call must wait.
    pub(in crate::rate) fn missing(&mut self, now: &mut LazyNow) -> impl Iterator<Item = u128> + '_ {
        self.fill_if_idle(now);
        self.buckets.iter().map(|(_, bucket)| bucket.missing())
    }

    /// Returns when the buckets will not differ from new ones if nothing is charged before: when all are full and the
    /// lateness of the last admission is not made up for any more. `None` if that is now. No call may wait, and all
    /// estimates must be settled.
    pub(in crate::rate) fn full_at(&mut self, now: &mut LazyNow) -> Option<Instant> {
        let time = self.time(now);
        let longest = self.buckets.iter().map(|(_, bucket)| bucket.time_until_full()).max();
        let Admitted { at, lateness, .. } = self.last_admission;
        let full_at = match longest.unwrap_or(0) {
            0 => 0,
            longest => self.filled_to.saturating_add(longest),
        };
        let forgotten_at = if lateness > 0 { at + MAX_CATCH_UP_NANOS + 1 } else { 0 };
        let full_at = full_at.max(forgotten_at);
        let instant = || self.epoch.checked_add(Duration::from_nanos(full_at));
        (full_at > time).then(|| instant().unwrap_or_else(|| super::far_future(self.epoch)))
    }
}
