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
    /// The burst of requests, `u64::MAX` if they are not limited.
    requests: AtomicU64,
    /// The burst of tokens, `u64::MAX` if they are not limited.
    tokens: AtomicU64,
    /// The bursts of the other budgets that are limited. `None` if there are none, so that most limiters take little
    /// memory.
    others: Mutex<Option<Box<OtherBursts>>>,
}

#[derive(Debug, Default)]
struct OtherBursts(Vec<(Budget, u64)>);

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
        let (mut requests, mut tokens, mut others) = (u64::MAX, u64::MAX, OtherBursts::default());
        for (budget, burst) in all.clone() {
            let least = match budget {
                Budget::Requests => &mut requests,
                Budget::Tokens => &mut tokens,
                other => others.entry(other),
            };
            *least = burst.min(*least);
        }
        *self.others() = (!others.0.is_empty()).then(|| Box::new(others));
        self.requests.store(requests, Ordering::Release);
        self.tokens.store(tokens, Ordering::Release);
    }

    /// Returns an error if `cost` exceeds the burst of a budget.
    #[inline]
    pub(crate) fn check(&self, cost: &Cost) -> Result<(), CostExceedsBurst> {
        let (requests, tokens) = (&self.requests, &self.tokens);
        for (budget, amount, burst) in [
            (Budget::Requests, cost.requests, requests),
            (Budget::Tokens, cost.tokens, tokens),
        ] {
            let burst = burst.load(Ordering::Acquire);
            if amount > burst {
                return Err(CostExceedsBurst::new(budget.name(), amount, burst));
            }
        }
        if cost.has_more_than_requests_and_tokens() {
            return self.check_others(cost);
        }
        Ok(())
    }

    fn check_others(&self, cost: &Cost) -> Result<(), CostExceedsBurst> {
        let bursts = self.others();
        let mut bursts = bursts.iter().flat_map(|others| &others.0);
        match bursts.find(|(budget, burst)| cost.of(*budget) > *burst) {
            Some((budget, burst)) => Err(CostExceedsBurst::new(budget.name(), cost.of(*budget), *burst)),
            None => Ok(()),
        }
    }

    fn others(&self) -> MutexGuard<'_, Option<Box<OtherBursts>>> {
        self.others.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Bursts {
    fn default() -> Self {
        Self {
            requests: AtomicU64::new(u64::MAX),
            tokens: AtomicU64::new(u64::MAX),
            others: Mutex::default(),
        }
    }
}

impl OtherBursts {
    /// Returns the burst of `budget`, which is added if it is not there.
    fn entry(&mut self, budget: Budget) -> &mut u64 {
        let at = self.0.iter().position(|(of, _)| *of == budget).unwrap_or_else(|| {
            self.0.push((budget, u64::MAX));
            self.0.len() - 1
        });
        &mut self.0[at].1
    }
}
