//! [`Adjustments`]: what a member has taken on trust from a store, and what it has yet to tell of it.

use crate::rate::limits::Cost;

/// Requests and tokens.
pub(super) type Amounts = [u64; 2];

pub(super) const NONE: Amounts = [0, 0];

pub(super) const fn amounts(cost: Cost) -> Amounts {
    [cost.requests, cost.tokens]
}

/// All that is reserved is an estimate, until it is known what was used: nothing, if the call was dropped before its
/// moment came; what was reserved, if nobody says otherwise.
#[derive(Debug, Default)]
pub(super) struct Adjustments {
    /// Which store it was, if there was another one, or one that has forgotten us.
    era: u64,
    /// ReservedCharge, and not known yet.
    estimated: Amounts,
    /// Not used, and to be given back.
    credit: Amounts,
    /// Used on top, and to be paid.
    debit: Amounts,
}

impl Adjustments {
    pub(super) fn new(era: u64) -> Self {
        Self { era, ..Self::default() }
    }

    pub(super) const fn era(&self) -> u64 {
        self.era
    }

    pub(super) const fn estimated(&self) -> Amounts {
        self.estimated
    }

    /// Whether there is anything to correct.
    pub(super) fn is_even(&self) -> bool {
        self.credit == NONE && self.debit == NONE
    }

    pub(super) fn reserved(&mut self, cost: Cost) {
        add(&mut self.estimated, amounts(cost));
    }

    /// What was reserved in that era has turned out to be used like this.
    pub(super) fn settle(&mut self, era: u64, reserved: Cost, used: Cost) {
        let (reserved, used) = (amounts(reserved), amounts(used));
        add(&mut self.debit, less(used, reserved));
        // A store that does not know of the estimate gives nothing back for it.
        if era == self.era {
            self.estimated = less(self.estimated, reserved);
            add(&mut self.credit, less(reserved, used));
        }
    }

    /// Takes what there is to correct, as credit and debit.
    pub(super) fn corrections(&mut self) -> (Amounts, Amounts) {
        (std::mem::take(&mut self.credit), std::mem::take(&mut self.debit))
    }

    /// The store does not know our estimates any more.
    pub(super) fn forgotten(&mut self) {
        self.era += 1;
        self.estimated = NONE;
        self.credit = NONE;
    }
}

pub(super) fn add(to: &mut Amounts, amounts: Amounts) {
    to[0] = to[0].saturating_add(amounts[0]);
    to[1] = to[1].saturating_add(amounts[1]);
}

pub(super) const fn less(from: Amounts, amounts: Amounts) -> Amounts {
    [from[0].saturating_sub(amounts[0]), from[1].saturating_sub(amounts[1])]
}
