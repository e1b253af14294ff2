//! [`Bursts`]: the largest cost that one call may have.

use super::{bucket::Bucket, budget::Budget, cost::Cost};
use crate::error::CostExceedsBurst;
use std::sync::{
    Mutex, MutexGuard, PoisonError,
    atomic::{AtomicU64, Ordering},
};

/// The largest cost that one call may have, per budget: the smallest burst of the budget's rates. Reading it does not
/// lock the limiter.
#[derive(Debug)]
pub(crate) struct Bursts {
    /// The bursts of the budgets of [`BUILT_IN`], in that order; `u64::MAX` for a budget that is not limited.
    built_in: [AtomicU64; BUILT_IN.len()],
    /// The bursts of the other budgets.
    named: Mutex<Vec<(Budget, u64)>>,
}

/// The budgets whose bursts are read without a lock.
const BUILT_IN: [Budget; 4] = [
    Budget::Requests,
    Budget::Tokens,
    Budget::InputTokens,
    Budget::OutputTokens,
];

// === impl Bursts ===

impl Bursts {
    pub(super) fn of(buckets: &[(Budget, Bucket)]) -> Self {
        let bursts = Self::default();
        bursts.set(&buckets.iter().map(|(budget, bucket)| (*budget, bucket.burst())));
        bursts
    }

    /// Sets the burst of each budget to the smallest burst that `all`, the bursts of all rates, has for the budget. A
    /// budget that is not in `all` is not limited.
    pub(super) fn set(&self, all: &(impl Iterator<Item = (Budget, u64)> + Clone)) {
        let mut named: Vec<(Budget, u64)> = Vec::new();
        for (budget, burst) in all.clone().filter(|(budget, _)| !BUILT_IN.contains(budget)) {
            match named.iter_mut().find(|(of, _)| *of == budget) {
                Some((_, least)) => *least = burst.min(*least),
                None => named.push((budget, burst)),
            }
        }
        *self.named() = named;
        for (budget, burst) in BUILT_IN.iter().zip(&self.built_in) {
            let bursts = all.clone().filter(|(of, _)| of == budget).map(|(_, burst)| burst);
            burst.store(bursts.min().unwrap_or(u64::MAX), Ordering::Release);
        }
    }

    /// Returns an error if `cost` exceeds the burst of a budget.
    pub(crate) fn check(&self, cost: &Cost) -> Result<(), CostExceedsBurst> {
        for (budget, burst) in BUILT_IN.into_iter().zip(&self.built_in) {
            let burst = burst.load(Ordering::Acquire);
            if cost.of(budget) > burst {
                return Err(CostExceedsBurst::new(budget.name(), cost.of(budget), burst));
            }
        }
        if cost.has_named() {
            let bursts = self.named();
            let exceeded = bursts.iter().find(|(budget, burst)| cost.of(*budget) > *burst);
            if let Some((budget, burst)) = exceeded {
                return Err(CostExceedsBurst::new(budget.name(), cost.of(*budget), *burst));
            }
        }
        Ok(())
    }

    fn named(&self) -> MutexGuard<'_, Vec<(Budget, u64)>> {
        self.named.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Bursts {
    fn default() -> Self {
        Self {
            built_in: [const { AtomicU64::new(u64::MAX) }; BUILT_IN.len()],
            named: Mutex::default(),
        }
    }
}
