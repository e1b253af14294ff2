//! [`Adjustments`]: the unsettled estimates of one member of the quota, and the corrections (true cost minus estimate)
//! that it has yet to report to the store.

use super::amounts::Amounts;
use crate::rate::budget::Budget;

/// The estimates that the store has charged for this member, and the corrections of them that are not reported yet.
///
/// Each reservation is an estimate until it is settled with what its call has really used. A call that is dropped
/// before it is admitted is settled with 0. A call that is never settled counts as having used what was reserved.
#[derive(Debug, Default)]
pub(super) struct Adjustments {
    /// How often the store has lost this member's estimates, which is the number of the current generation of
    /// estimates. A reservation of an earlier generation is not refunded, because the store no longer has its estimate.
    generation: u64,
    /// The sum of the reservations that are not settled yet, of those that the store has made since it last lost this
    /// member's estimates (in the current generation).
    estimated: Amounts,
    /// The sum of what was reserved and not used, which the store has to refund.
    credit: Amounts,
    /// The sum of what was used on top of what was reserved, which the store has to charge.
    debit: Amounts,
}

impl Adjustments {
    pub(super) const fn generation(&self) -> u64 {
        self.generation
    }

    pub(super) const fn estimated(&self) -> Amounts {
        self.estimated
    }

    /// Whether there is no correction to report.
    pub(super) fn is_empty(&self) -> bool {
        self.credit.is_zero() && self.debit.is_zero()
    }

    pub(super) fn on_reserved(&mut self, cost: Amounts) {
        self.estimated = self.estimated.saturating_add(cost);
    }

    /// Settles a reservation that was made when the store had lost this member's estimates `generation` times: its call
    /// has used `used` instead of what was `reserved`.
    ///
    /// What was used on top of the reservation is always charged. What was reserved and not used is refunded only if
    /// the store has not lost the estimates since.
    pub(super) fn settle(&mut self, generation: u64, reserved: Amounts, used: Amounts) {
        self.debit = self.debit.saturating_add(used.saturating_sub(reserved));
        if generation == self.generation {
            self.estimated = self.estimated.saturating_sub(reserved);
            self.credit = self.credit.saturating_add(reserved.saturating_sub(used));
        }
    }

    /// Takes the corrections that are not reported yet: what to refund (credit) and what to charge in addition (debit).
    pub(super) fn take(&mut self) -> (Amounts, Amounts) {
        (std::mem::take(&mut self.credit), std::mem::take(&mut self.debit))
    }

    /// Begins a new generation, because the store has lost all estimates of this member and cannot refund them any
    /// more.
    pub(super) fn on_state_lost(&mut self) {
        self.generation += 1;
        self.estimated = Amounts::default();
        self.credit = Amounts::default();
    }

    /// Forgets what the new limits do not count.
    pub(super) fn retain(&mut self, budgets: &[Budget]) {
        for sum in [&mut self.estimated, &mut self.credit, &mut self.debit] {
            *sum = sum.retain(budgets);
        }
    }
}
