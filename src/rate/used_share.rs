//! [`UsedShares`]: how much of their estimates calls turn out to use, to predict how long a call will wait.

use super::{
    budget::Budget,
    cost::{Cost, PerBudget},
};

/// How much of their estimates calls turn out to use, for each budget.
///
/// Before the first settlement, requests are taken to be used as estimated, and everything else not at all: nothing is
/// known about it yet, and a prediction should not refuse a call because of tokens that may be refunded.
#[derive(Clone, Copy, Debug)]
pub(super) struct UsedShares(PerBudget<UsedShare>);

/// The share of estimates that is used: a moving average over the last settled calls, weighted by their estimates.
#[derive(Clone, Copy, Debug)]
pub(super) struct UsedShare {
    charged: u64,
    used: u64,
}

/// Each settled call takes this part of the weight of the earlier ones.
const AVERAGE_LENGTH: u64 = 16;
/// Larger estimates count as this number, so that sums do not overflow.
const MAX_ESTIMATE: u64 = 1 << 40;

// === impl UsedShares ===

impl UsedShares {
    pub(super) fn of(&self, budget: Budget) -> UsedShare {
        self.0.of(budget)
    }

    /// Learns from a call that was charged `estimate` and has `used` what it has. What is used above an estimate counts
    /// as the estimate, so that one absurd number does not refuse all later calls.
    pub(super) fn record(&mut self, estimate: &Cost, used: &Cost) {
        for (budget, amount) in estimate.amounts() {
            if let Some(share) = self.0.entry(budget) {
                share.record(amount, used.of(budget));
            }
        }
    }
}

impl Default for UsedShares {
    fn default() -> Self {
        Self(PerBudget {
            requests: UsedShare { charged: 1, used: 1 },
            ..PerBudget::default()
        })
    }
}

// === impl UsedShare ===

impl Default for UsedShare {
    fn default() -> Self {
        Self { charged: 1, used: 0 }
    }
}

impl UsedShare {
    fn record(&mut self, estimate: u64, used: u64) {
        if estimate == 0 {
            return;
        }
        // Both numbers are multiplied by the length of the average, so that small ones are not lost in the division.
        let estimate = estimate.min(MAX_ESTIMATE) * AVERAGE_LENGTH;
        let used = used.saturating_mul(AVERAGE_LENGTH).min(estimate);
        let faded = |sum: u64| sum - sum / AVERAGE_LENGTH;
        self.charged = faded(self.charged) + estimate;
        self.used = (faded(self.used) + used).min(self.charged);
    }

    /// Returns what calls that are charged `estimates` in total are expected to use, rounded up.
    pub(super) fn of(self, estimates: u128) -> u128 {
        if self.used == self.charged {
            return estimates;
        }
        let (used, charged) = (u128::from(self.used), u128::from(self.charged));
        match estimates.checked_mul(used) {
            Some(product) => product.div_ceil(charged),
            // The share is below 1 and has 64 bits at most, so the division can come first for so large a number.
            None => (estimates / charged + 1).saturating_mul(used),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shares(settled: &[(u64, u64)]) -> UsedShares {
        let mut shares = UsedShares::default();
        for (estimate, used) in settled {
            shares.record(&Cost::tokens(*estimate), &Cost::tokens(*used));
        }
        shares
    }

    #[test]
    fn the_share_follows_what_calls_use() {
        let unknown = shares(&[]);
        assert_eq!(
            (unknown.of(Budget::Tokens).of(6_000), unknown.of(Budget::Requests).of(3)),
            (0, 3)
        );
        let tenth = shares(&[(6_000, 600)]).of(Budget::Tokens);
        assert_eq!(tenth.of(60_000), 6_000);
        let full = shares(&[(6_000, 0), (100, u64::MAX)]);
        assert!(full.of(Budget::Tokens).of(1_000) < 30);
        let relearned = shares(&[(100, 0); 9].into_iter().chain([(100, 100); 100]).collect::<Vec<_>>());
        assert!((99..=100).contains(&relearned.of(Budget::Tokens).of(100)));
    }

    #[test]
    fn the_largest_numbers_do_not_overflow() {
        let half = shares(&[(u64::MAX, 1 << 39), (u64::MAX, 1 << 39)]).of(Budget::Tokens);
        assert!(half.of(u128::MAX) > u128::MAX / 3);
        assert_eq!(
            shares(&[(u64::MAX, u64::MAX); 99]).of(Budget::Requests).of(u128::MAX),
            u128::MAX
        );
    }
}
