//! The settlement of estimates in one bucket: refunds, debits, and what is withheld from refunds.
//!
//! # Refunds and the withheld part
//!
//! A call may be charged an estimate of its cost, which is settled later with the true cost. Debiting a difference is
//! simple. Refunding one is not: had the true cost been charged from the start, the bucket might have been full in the
//! meantime and would have overflowed, and what overflows is lost. A refund must not bring back what would have been
//! lost, or more than `burst + rate x T` of true usage could pass in a window of length T.
//!
//! For example, a full bucket of capacity 10 is charged an estimate of 8, which leaves a balance of 2. The bucket gains
//! 5, so the balance is 7. If the true cost turns out to be 0, a bucket that was charged the true cost would have been
//! full all the time and would have lost those 5. A refund of 8 must therefore raise the balance by 3 only, to 10. If
//! another call takes the 7 before the settlement, the refund is still 3: without the estimate the bucket would hold
//! `10 - 7 = 3`.
//!
//! To withhold from a refund what would have overflowed, a bucket keeps two sums: `estimated`, the charged estimates
//! that are not settled yet (8 in the example above), and `withheld`, the part of `estimated` that would have
//! overflowed by now if all these estimates had a true cost of 0 (5 in the example). A refund is reduced by `withheld`.
//!
//! When a call is settled, its true cost is known, and a bucket that was charged it has been lower by as much ever since
//! the charge. If all of `withheld` would have overflowed after that charge, it would have overflowed less by the true
//! cost. So the true cost is subtracted from `withheld` before the refund. With a true cost of 3 in the example, a bucket
//! that was charged 3 would have lost 2, and the refund of 5 raises the balance by 3, to 10. With a true cost of 6, it
//! would have lost nothing, and the whole refund of 2 is given.
//!
//! Nothing is subtracted for a call that was charged when a part of `withheld` had overflowed already: that part would
//! have overflowed whatever the call used. How large it was then is not kept for each call, so too much may be withheld,
//! and never too little.

use super::{Bucket, Rest};

/// What a bucket counts for its estimates, in units.
#[derive(Clone, Debug, Default)]
pub(super) struct Unsettled {
    /// The sum of the charged estimates that are not settled yet.
    pub(super) estimated: i128,
    /// The part of `estimated` that a refund does not give back: without the estimates, the bucket would have
    /// overflowed by as much. See the [module docs](self).
    pub(super) withheld: i128,
    /// The number of estimates that this bucket has been charged.
    pub(super) charged: u64,
    /// The value of `charged` when `withheld` last rose from 0: nothing was withheld when those were charged. 0 if
    /// `withheld` has a part that does not depend on what a call has used, which is a debt that was forgotten.
    pub(super) charged_without: u64,
    /// The sum of all settlements: refunds less debits. It may wrap around.
    #[cfg(feature = "http")]
    pub(super) settled: i128,
    /// The number of estimates that the limiter had charged before this bucket's rate was added. They were not charged
    /// to this bucket, so it does not refund them.
    pub(super) charged_before: u64,
}

impl Bucket {
    /// Records that the limiter has charged `estimates` estimates before this bucket's rate was added. Default: 0.
    pub(in crate::rate) fn set_charged_before(&mut self, estimates: u64) {
        if estimates > 0 {
            self.unsettled_mut().charged_before = estimates;
        }
    }

    #[inline]
    pub(super) fn unsettled_mut(&mut self) -> &mut Unsettled {
        &mut self.rest.get_or_insert_default().unsettled
    }

    /// Returns the sum of the unsettled estimates, in units.
    pub(in crate::rate) fn estimated(&self) -> i128 {
        self.rest.as_ref().map_or(0, |rest| rest.unsettled.estimated)
    }

    /// Returns the part of the unsettled estimates, in units, that no refund gives back.
    pub(super) fn withheld(&self) -> i128 {
        self.rest.as_ref().map_or(0, |rest| rest.unsettled.withheld)
    }

    /// Returns the sum of all settlements, in units. Only differences of it have a meaning, as it may wrap around.
    #[cfg(feature = "http")]
    pub(in crate::rate) fn settled(&self) -> i128 {
        self.rest.as_ref().map_or(0, |rest| rest.unsettled.settled)
    }

    /// Replaces the charged `estimate` by what the call really `used`. `number` is the number of estimates that the
    /// limiter had charged before. Returns whether the debt was cut off at the largest one.
    pub(in crate::rate) fn settle(&mut self, estimate: u64, used: u64, number: u64) -> bool {
        let is_cut_off = used > estimate && self.debit(used - estimate);
        let (units, used_units) = (self.saturating_units(estimate), self.saturating_units(used));
        let unsettled = self.unsettled_mut();
        if number < unsettled.charged_before {
            // This bucket's rate was added after the estimate had been charged, so the estimate was not charged to this
            // bucket: nothing is refunded, and `estimated` does not contain this one.
            return is_cut_off;
        }
        let remaining = unsettled.estimated.saturating_sub(units).max(0);
        if number - unsettled.charged_before < unsettled.charged_without {
            // Not more than the estimate, which is all that the call had a part in: `withheld` is not above `estimated`.
            let spared = if used < estimate { used_units } else { units };
            unsettled.withheld = unsettled.withheld.saturating_sub(spared).max(0);
        }
        if used < estimate {
            self.credit(estimate - used);
        }
        self.set_estimated_units(remaining);
        is_cut_off
    }

    /// Takes `amount`, which a call has used already, from the balance. The balance may become negative: a debt.
    /// Returns whether the debt was cut off at the largest one.
    pub(in crate::rate) fn debit(&mut self, amount: u64) -> bool {
        self.debit_units(self.saturating_units(amount))
    }

    pub(super) fn debit_units(&mut self, units: i128) -> bool {
        #[cfg(feature = "http")]
        {
            let unsettled = self.unsettled_mut();
            unsettled.settled = unsettled.settled.wrapping_sub(units);
        }
        self.balance = self.balance.saturating_sub(units);
        let cut_off = (-self.max_debt).saturating_sub(self.balance).max(0);
        if cut_off > 0 {
            self.balance = -self.max_debt;
            self.withhold(cut_off);
        }
        cut_off > 0
    }

    /// Withholds `debt`, which is forgotten, from the refunds of the unsettled estimates, as far as it may be due to
    /// them. Otherwise it would be given back twice.
    pub(super) fn withhold(&mut self, debt: i128) {
        if debt == 0 {
            return;
        }
        if let Some(Rest { unsettled, .. }) = self.rest.as_deref_mut() {
            unsettled.withheld = unsettled.withheld.saturating_add(debt).min(unsettled.estimated);
            unsettled.charged_without = 0;
        }
    }

    /// Refunds `amount`, which was charged as an estimate and not used. The part that a full bucket would have lost in
    /// the meantime is kept back: see the [module docs](self).
    pub(in crate::rate) fn credit(&mut self, amount: u64) {
        let units = self.saturating_units(amount);
        let Some(Rest { unsettled, .. }) = self.rest.as_deref_mut() else {
            return;
        };
        let refund = units.min(unsettled.estimated);
        let kept = refund.min(unsettled.withheld);
        #[cfg(feature = "http")]
        {
            unsettled.settled = unsettled.settled.wrapping_add(refund);
        }
        unsettled.withheld -= kept;
        let balance = self.balance.saturating_add(refund - kept).min(self.capacity);
        self.lost = self.lost.wrapping_add(refund - (balance - self.balance));
        self.balance = balance;
    }

    /// Raises the balance of a bucket in debt to 0.
    pub(in crate::rate) fn forgive_debt(&mut self) {
        let debt = (-self.balance).max(0);
        self.balance += debt;
        self.withhold(debt);
    }

    pub(super) fn set_estimated_units(&mut self, units: i128) {
        let unsettled = self.unsettled_mut();
        unsettled.estimated = units;
        unsettled.withheld = unsettled.withheld.min(units);
        self.update_withheld();
    }

    /// Raises the withheld part to that of the unsettled estimates that would have overflowed by now if all of them had
    /// a true cost of 0.
    #[inline]
    pub(super) fn update_withheld(&mut self) {
        self.withhold_overflow(self.balance);
    }

    /// Does what [`update_withheld`](Self::update_withheld) does, for a bucket that holds `balance`.
    #[inline]
    pub(super) fn withhold_overflow(&mut self, balance: i128) {
        let Some(Rest { unsettled, .. }) = self.rest.as_deref_mut() else {
            return;
        };
        let room = self.capacity.saturating_sub(balance);
        let overflowed = unsettled.estimated.saturating_sub(room);
        if unsettled.estimated > 0 && overflowed > unsettled.withheld {
            if unsettled.withheld == 0 {
                unsettled.charged_without = unsettled.charged;
            }
            unsettled.withheld = overflowed;
        }
    }
}
