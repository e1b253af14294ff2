//! [`UsedShares`]: how much of their estimates calls turn out to use, to predict how long a call will wait.

use super::{
    budget::{Budget, BudgetName},
    cost::Cost,
};

/// How much of their estimates calls turn out to use, for each budget.
///
/// Before the first settlement, requests are taken to be used as estimated, and everything else not at all: nothing is
/// known about it yet, and a prediction should not refuse a call because of tokens that may be refunded.
#[derive(Clone, Debug)]
pub(super) struct UsedShares {
    requests: UsedShare,
    tokens: UsedShare,
    input_tokens: UsedShare,
    output_tokens: UsedShare,
    /// The shares of the budgets that are not built in, of all that estimates have named: also of those that have no
    /// rate, which new limits may give them.
    named: Vec<(BudgetName, UsedShare)>,
}

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
        match budget {
            Budget::Requests => self.requests,
            Budget::Tokens => self.tokens,
            Budget::InputTokens => self.input_tokens,
            Budget::OutputTokens => self.output_tokens,
            Budget::Named(name) => {
                let found = self.named.iter().find(|(of, _)| *of == name);
                found.map_or_else(UsedShare::default, |(_, share)| *share)
            }
        }
    }

    /// Learns from a call that was charged `estimate` and has `used` what it has. What is used above an estimate counts
    /// as the estimate, so that one absurd number does not refuse all later calls.
    pub(super) fn record(&mut self, estimate: &Cost, used: &Cost) {
        self.requests.record(estimate.requests, used.requests);
        self.tokens.record(estimate.tokens, used.tokens);
        self.input_tokens.record(estimate.input_tokens, used.input_tokens);
        self.output_tokens.record(estimate.output_tokens, used.output_tokens);
        for (name, amount) in estimate.named.into_values().filter(|(_, amount)| *amount > 0) {
            let at = self.named.iter().position(|(of, _)| *of == name).unwrap_or_else(|| {
                self.named.push((name, UsedShare::default()));
                self.named.len() - 1
            });
            self.named[at].1.record(amount, used.named.of(name).unwrap_or(0));
        }
    }
}

impl Default for UsedShares {
    fn default() -> Self {
        Self {
            requests: UsedShare { charged: 1, used: 1 },
            tokens: UsedShare::default(),
            input_tokens: UsedShare::default(),
            output_tokens: UsedShare::default(),
            named: Vec::new(),
        }
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
    fn each_name_has_a_share_of_its_own_however_many_there_are() {
        let mut shares = UsedShares::default();
        let names: Vec<_> = (0..10_u64).map(|number| format!("share-{number}")).collect();
        for (number, name) in (0..).zip(&names) {
            shares.record(
                &Cost::none().with(&**name, 1_000),
                &Cost::none().with(&**name, 100 * number),
            );
        }
        for (number, name) in (0..).zip(&names) {
            assert_eq!(shares.of(Budget::from(&**name)).of(10_000), 1_000 * number);
        }
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
