//! Methods of a [`Bucket`] that comes from a cell or becomes one: see `keyed`.

use super::Bucket;

impl Bucket {
    /// Returns how many units the bucket lacks: more than its capacity if it is in debt.
    pub(in crate::rate) const fn missing(&self) -> u128 {
        self.capacity.abs_diff(self.balance)
    }

    /// Sets the balance of a new bucket to what one holds that lacks so many units.
    pub(in crate::rate) fn set_missing(&mut self, units: u128) {
        let units = i128::try_from(units).unwrap_or(i128::MAX);
        self.balance = self.capacity.saturating_sub(units);
    }

    /// Returns the number of ticks until the bucket is full if nothing is taken before; 0 if it is.
    pub(in crate::rate) fn time_until_full(&self) -> u64 {
        match self.missing() {
            0 => 0,
            _ if self.fill == 0 => self.until_window_ends().unwrap_or(u64::MAX),
            missing => u64::try_from(missing.div_ceil(u128::from(self.fill))).unwrap_or(u64::MAX),
        }
    }
}
