//! Saving what the buckets hold, and restoring it.

use super::Buckets;
use crate::{
    clock::LazyNow,
    error::InvalidConfig,
    rate::saved::{SavedLimits, SavedRate},
};

const NANOS_PER_MS: u64 = 1_000_000;

impl Buckets {
    /// Returns what the buckets hold, with the time of the wall clock.
    pub(in crate::rate) fn save(&mut self, now: &mut LazyNow) -> SavedLimits {
        let time = self.time(now);
        let elapsed = time.saturating_sub(self.filled_to);
        let rates = self.buckets.iter().zip(self.limits.rates());
        let saved = rates
            .map(|((_, bucket), (budget, rate))| SavedRate::new(budget, &rate, bucket.whole_balance_after(elapsed)));
        SavedLimits::new(self.wall_epoch.saturating_add(time) / NANOS_PER_MS, saved.collect())
    }

    /// Sets what each bucket holds to what was saved, and what its rate has added since.
    pub(in crate::rate) fn restore(&mut self, saved: &SavedLimits, now: &mut LazyNow) -> Result<(), InvalidConfig> {
        let held = saved.held_of(&self.limits)?;
        let time = self.time(now);
        self.fill_to(time);
        let saved_at = saved.saved_at_ms().saturating_mul(NANOS_PER_MS);
        let age = self.wall_epoch.saturating_add(time).saturating_sub(saved_at);
        for ((_, bucket), held) in self.buckets.iter_mut().zip(held) {
            if let Some(held) = held {
                bucket.restore(held, age);
            }
        }
        Ok(())
    }
}
