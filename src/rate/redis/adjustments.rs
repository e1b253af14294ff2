//! [`Adjustments`]: a member's estimates at the store, and the corrections of them that it has yet to report.

use super::amounts::Amounts;
use crate::rate::limits::Cost;

/// The estimates that the store knows of this member, and their corrections.
///
/// Everything that is reserved is an estimate until it is settled. A call that is dropped before it was admitted used
/// nothing. A call that is not settled used what was reserved.
#[derive(Debug, Default)]
pub(super) struct Adjustments {
    /// How often the store has forgotten this member's estimates.
    generation: u64,
    /// Reserved in this generation, and not settled yet.
    estimated: Amounts,
    /// Reserved and not used.
    credit: Amounts,
    /// Used on top of what was reserved.
    debit: Amounts,
}

impl Adjustments {
    pub(super) const fn generation(&self) -> u64 {
        self.generation
    }

    pub(super) const fn estimated(&self) -> Amounts {
        self.estimated
    }

    /// Whether there is nothing to correct.
    pub(super) fn is_empty(&self) -> bool {
        self.credit == Amounts::ZERO && self.debit == Amounts::ZERO
    }

    pub(super) fn on_reserved(&mut self, cost: Cost) {
        self.estimated = self.estimated.saturating_add(cost.into());
    }

    /// Records that `used` was used of what was `reserved` in `generation`.
    ///
    /// A store that has forgotten the estimate charges what was used on top of it, but refunds nothing.
    pub(super) fn settle(&mut self, generation: u64, reserved: Cost, used: Cost) {
        let (reserved, used) = (Amounts::from(reserved), Amounts::from(used));
        self.debit = self.debit.saturating_add(used.saturating_sub(reserved));
        if generation == self.generation {
            self.estimated = self.estimated.saturating_sub(reserved);
            self.credit = self.credit.saturating_add(reserved.saturating_sub(used));
        }
    }

    /// Takes what there is to correct: credit and debit.
    pub(super) fn take(&mut self) -> (Amounts, Amounts) {
        (std::mem::take(&mut self.credit), std::mem::take(&mut self.debit))
    }

    /// Begins a new generation: the store has forgotten all estimates of this member.
    pub(super) fn on_state_lost(&mut self) {
        self.generation += 1;
        self.estimated = Amounts::ZERO;
        self.credit = Amounts::ZERO;
    }
}
