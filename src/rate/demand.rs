//! [`Demand`]: the summed costs of calls.

use super::{
    budget::{Budget, BudgetName},
    cost::{Cost, MAX_NAMED},
};
use std::ops::{AddAssign, SubAssign};

/// The sum of the costs of calls that a rate limiter has not admitted yet.
///
/// It has a sum for each budget that the calls name, also for those that no rate limits now: the limits may be replaced
/// while the calls wait. So it has room for more names than one [`Cost`], and is not stored in itself as that is.
#[derive(Clone, Debug, Default)]
pub(crate) struct Demand {
    pub(crate) requests: u128,
    pub(crate) tokens: u128,
    input_tokens: u128,
    output_tokens: u128,
    /// The sums of the budgets that are not built in. None of them is 0, so that names that calls no longer use take no
    /// place.
    named: Vec<(BudgetName, u128)>,
}

// === impl Demand ===

impl Demand {
    #[inline]
    pub(crate) fn of(&self, budget: Budget) -> u128 {
        match budget {
            Budget::Requests => self.requests,
            Budget::Tokens => self.tokens,
            Budget::InputTokens => self.input_tokens,
            Budget::OutputTokens => self.output_tokens,
            Budget::Named(name) => {
                let found = self.named.iter().find(|(of, _)| *of == name);
                found.map_or(0, |(_, sum)| *sum)
            }
        }
    }

    /// Returns the mean cost of `calls` calls whose costs are summed here, rounded up. Of the budgets that are not built
    /// in, it has as many as a cost has room for.
    pub(crate) fn mean(&self, calls: usize) -> Cost {
        let mean = |sum: u128| u64::try_from(sum.div_ceil(calls.max(1) as u128)).unwrap_or(u64::MAX);
        let built_in = Cost {
            requests: mean(self.requests),
            tokens: mean(self.tokens),
            input_tokens: mean(self.input_tokens),
            output_tokens: mean(self.output_tokens),
            ..Cost::none()
        };
        let named = self.named.iter().take(MAX_NAMED);
        named.fold(built_in, |cost, (name, sum)| {
            cost.with(Budget::Named(*name), mean(*sum))
        })
    }

    /// Adds the sums of `other`.
    pub(crate) fn add(&mut self, other: &Self) {
        self.requests = self.requests.saturating_add(other.requests);
        self.tokens = self.tokens.saturating_add(other.tokens);
        self.input_tokens = self.input_tokens.saturating_add(other.input_tokens);
        self.output_tokens = self.output_tokens.saturating_add(other.output_tokens);
        for (name, sum) in &other.named {
            match self.named.iter_mut().find(|(of, _)| of == name) {
                Some((_, known)) => *known = known.saturating_add(*sum),
                None => self.named.push((*name, *sum)),
            }
        }
    }

    /// Changes the sum of each budget by the amount in `cost`.
    #[inline]
    fn change(&mut self, cost: &Cost, change: impl Fn(&mut u128, u128)) {
        change(&mut self.requests, cost.requests.into());
        change(&mut self.tokens, cost.tokens.into());
        change(&mut self.input_tokens, cost.input_tokens.into());
        change(&mut self.output_tokens, cost.output_tokens.into());
        if cost.has_named() {
            self.change_named(cost, change);
        }
    }

    #[cold]
    fn change_named(&mut self, cost: &Cost, change: impl Fn(&mut u128, u128)) {
        for (name, amount) in cost.named.into_values().filter(|(_, amount)| *amount > 0) {
            let at = self.named.iter().position(|(of, _)| *of == name).unwrap_or_else(|| {
                self.named.push((name, 0));
                self.named.len() - 1
            });
            let (_, sum) = &mut self.named[at];
            change(sum, amount.into());
            if *sum == 0 {
                self.named.swap_remove(at);
            }
        }
    }
}

impl AddAssign<&Cost> for Demand {
    fn add_assign(&mut self, cost: &Cost) {
        self.change(cost, |sum, amount| *sum = sum.saturating_add(amount));
    }
}

impl SubAssign<&Cost> for Demand {
    fn sub_assign(&mut self, cost: &Cost) {
        self.change(cost, |sum, amount| *sum = sum.saturating_sub(amount));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn demand_is_the_sum_of_the_costs_that_are_in_it() {
        let mut demand = Demand::default();
        let cost = Cost::tokens(u64::MAX).with("images", 7);
        demand += &cost;
        demand += &cost;
        assert_eq!(demand.of(Budget::Tokens), 2 * u128::from(u64::MAX));
        assert_eq!(demand.of(Budget::from("images")), 14);
        demand -= &cost;
        demand -= &cost;
        assert_eq!((demand.of(Budget::Tokens), demand.named.len()), (0, 0));
    }

    #[test]
    fn demand_has_a_sum_of_each_name_however_many_the_calls_use() {
        let mut demand = Demand::default();
        let names: Vec<_> = (0..20_u64).map(|number| format!("unit-{number}")).collect();
        let costs: Vec<_> = names
            .chunks(2)
            .map(|names| Cost::request().with(&*names[0], 3).with(&*names[1], u64::MAX))
            .collect();
        costs.iter().for_each(|cost| demand += cost);
        for names in names.chunks(2) {
            let sums = (demand.of(Budget::from(&*names[0])), demand.of(Budget::from(&*names[1])));
            assert_eq!(sums, (3, u128::from(u64::MAX)));
        }
        costs.iter().rev().for_each(|cost| demand -= cost);
        assert_eq!((demand.of(Budget::Requests), demand.named.len()), (0, 0));
    }
}
