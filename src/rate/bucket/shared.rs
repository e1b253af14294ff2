//! Methods of a [`Bucket`] that are only needed for limits that several processes share in Redis.

use super::Bucket;

/// The largest sum of unsettled estimates, in units, that the Redis script counts.
#[cfg(test)]
const MAX_SHARED_ESTIMATED: i128 = 1 << 52;

impl Bucket {
    /// Debits `amount`, which one process (a member) admitted from its own share of a shared rate while it could not
    /// reach the Redis store. The share is one of `shares` equal ones. If the bucket was emptied during that time,
    /// `since_emptied` is the number of ticks since then, and at most what one share filled in those ticks is debited:
    /// emptying the bucket has already accounted for what was used before.
    ///
    /// A bucket of the calendar has no fill that a share could be of, so the whole amount is debited.
    #[cfg(test)]
    pub(in crate::rate) fn debit_share(&mut self, amount: u64, since_emptied: Option<u64>, shares: u64) {
        let filled = since_emptied.filter(|_| self.fill > 0).map_or(i128::MAX, |ticks| {
            let all = u128::from(ticks) * u128::from(self.fill);
            all.div_ceil(u128::from(shares.max(1))) as i128
        });
        self.debit_units(self.saturating_units(amount).min(filled));
    }

    /// Sets the sum of the unsettled estimates, in requests or tokens.
    #[cfg(test)]
    pub(in crate::rate) fn set_estimated(&mut self, amount: u64) {
        self.set_estimated_units(self.saturating_units(amount).min(MAX_SHARED_ESTIMATED));
    }

    /// Whether the bucket is an [allowance](super::BucketKind::is_allowance).
    pub(in crate::rate) fn is_allowance(&self) -> bool {
        self.refuses || self.window().is_some()
    }

    /// Lowers a positive balance to 0. A debt remains.
    pub(in crate::rate) fn empty(&mut self) {
        self.balance = self.balance.min(0);
    }

    /// Takes `amount` for a call that is made up to `lateness` ticks later. The bucket of a
    /// [strict](super::super::Rate::strict) rate loses what will have overflowed by then, at the provider, too.
    pub(in crate::rate) fn take_reserved(&mut self, amount: u64, lateness: u64) {
        if self.is_strict && amount > 0 {
            self.overflow(lateness, false, 0);
        }
        self.take(amount, false);
    }

    /// Lets `elapsed` ticks pass in which the bucket gains nothing, unless a window of the calendar begins.
    pub(in crate::rate) fn skip(&mut self, elapsed: u64) {
        if self.fill == 0 {
            self.advance_window(elapsed);
        }
    }

    /// Takes `units` that were charged to a bucket which was lost, down to the largest debt.
    #[cfg(test)]
    pub(in crate::rate) fn charge_lost(&mut self, units: i128) {
        self.balance = (self.balance - units).max(-self.max_debt);
        self.update_withheld();
    }

    /// Moves the time of a bucket of the calendar back, because the clock was set back.
    #[cfg(test)]
    pub(in crate::rate) fn step_back(&mut self, back: u64) {
        if let Some(window) = self.rest.as_mut().and_then(|rest| rest.window.as_mut()) {
            window.step_back(back);
        }
    }

    /// Returns the number of ticks until the bucket is full if nothing is taken before.
    #[cfg(test)]
    pub(in crate::rate) fn until_full(&self) -> u64 {
        let missing = self.capacity.abs_diff(self.balance);
        if self.fill == 0 {
            return self.until_window_ends().filter(|_| missing > 0).unwrap_or(0);
        }
        u64::try_from(missing.div_ceil(u128::from(self.fill))).unwrap_or(u64::MAX)
    }
}
