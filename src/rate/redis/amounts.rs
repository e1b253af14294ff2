//! [`Amounts`]: a sum for each budget that the limits of a quota count.

use crate::rate::{
    budget::Budget,
    cost::{Cost, PerBudget},
};

/// A number of each budget: of requests, of tokens, and so on.
///
/// There is room for four budgets that are not built in, as many as limits can have. So costs are added
/// [as the limits count them](super::quota_config::QuotaConfig::amounts), and sums
/// [keep](Self::retain) only what the limits count when these change.
pub(super) type Amounts = PerBudget<u64>;

impl Amounts {
    pub(super) fn is_zero(&self) -> bool {
        self.into_values().all(|(_, amount)| amount == 0)
    }

    pub(super) fn saturating_add(self, other: Self) -> Self {
        self.with(other, u64::saturating_add)
    }

    pub(super) fn saturating_sub(self, other: Self) -> Self {
        self.with(other, u64::saturating_sub)
    }

    fn with(mut self, other: Self, change: impl Fn(u64, u64) -> u64) -> Self {
        for (budget, amount) in other.into_values().filter(|(_, amount)| *amount > 0) {
            if let Some(own) = self.entry(budget) {
                *own = change(*own, amount);
            }
        }
        self
    }

    /// Returns the amounts of these budgets, and nothing of any other.
    pub(super) fn retain(&self, budgets: &[Budget]) -> Self {
        let mut retained = Self::default();
        for budget in budgets {
            if let Some(amount) = retained.entry(*budget) {
                *amount = self.of(*budget);
            }
        }
        retained
    }

    /// Returns what a call with `cost` takes of these budgets.
    pub(super) fn of_cost(cost: &Cost, budgets: &[Budget]) -> Self {
        Self::from(*cost).retain(budgets)
    }
}
