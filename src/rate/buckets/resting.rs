//! When buckets that nobody uses are what new ones would be, so that they need not be kept.

use super::{Admitted, Buckets, MAX_CATCH_UP_NANOS};
use crate::clock::LazyNow;
use std::time::Duration;
use tokio::time::Instant;

impl Buckets {
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
