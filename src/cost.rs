//! [`Cost`]: what a call takes of each budget; and [`PerBudget`], a value for each budget.

use crate::budget::{Budget, BudgetName};
use crate::tokens::ApiTokens;
use std::fmt;

/// What one call takes of each budget that a rate limit counts. Most calls take one request.
///
/// A limiter charges those amounts for whose budgets it has rates. So one cost can name more than one provider counts,
/// such as the tokens in total and apart: [`input_output_tokens`](Self::input_output_tokens).
///
/// ```
/// use tower_outbound::{Cost, rate::Budget};
///
/// let cost = Cost::input_output_tokens(900, 300).with("images", 2);
/// assert_eq!((cost.requests, cost.tokens, cost.of(Budget::OutputTokens)), (1, 1_200, 300));
/// assert_eq!(cost.of("images"), 2);
/// ```
#[derive(Clone, Copy, Default)]
pub struct Cost {
    /// The number of requests, usually 1.
    pub requests: u64,
    /// The number of the API's tokens, such as a language model's: those of the prompt and of the answer together.
    pub tokens: u64,
    /// The number of tokens of the prompt, for providers that limit them apart.
    pub input_tokens: u64,
    /// The number of tokens of the answer, for providers that limit them apart.
    pub output_tokens: u64,
    pub(crate) named: Named<u64>,
}

/// A value for each built-in budget, and for a few budgets that the user has named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PerBudget<T> {
    pub(crate) requests: T,
    pub(crate) tokens: T,
    pub(crate) input_tokens: T,
    pub(crate) output_tokens: T,
    pub(crate) named: Named<T>,
}

/// The values of the budgets that the user has named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Named<T> {
    /// The names come before all places that are free.
    names: [Option<BudgetName>; MAX_NAMED],
    values: [T; MAX_NAMED],
}

/// The largest number of budgets, besides the built-in ones, that one cost or the limits of one limiter can name. They
/// are stored in the cost itself, so that it is copied without an allocation.
pub(crate) const MAX_NAMED: usize = 4;

// === impl Cost ===

impl Cost {
    /// Returns the cost of one request, and nothing else.
    #[must_use]
    pub const fn request() -> Self {
        Self::tokens(0)
    }

    /// Returns the cost of one request and `tokens` API tokens.
    ///
    /// Limits of input tokens and of output tokens are charged nothing, of which an executor warns once. Where a provider has such limits, and it is known
    /// only how many tokens there are in total, use `Cost::from(ApiTokens(tokens))`.
    #[must_use]
    pub const fn tokens(tokens: u64) -> Self {
        Self {
            requests: 1,
            tokens,
            ..Self::none()
        }
    }

    /// Returns the cost of one request with so many tokens in its prompt and in its answer. Their sum is the number of
    /// [`tokens`](Self::tokens).
    #[must_use]
    pub const fn input_output_tokens(input: u64, output: u64) -> Self {
        Self {
            requests: 1,
            tokens: input.saturating_add(output),
            input_tokens: input,
            output_tokens: output,
            ..Self::none()
        }
    }

    /// Returns the cost of nothing, which every limiter admits.
    #[must_use]
    pub const fn none() -> Self {
        Self {
            requests: 0,
            tokens: 0,
            input_tokens: 0,
            output_tokens: 0,
            named: Named {
                names: [None; MAX_NAMED],
                values: [0; MAX_NAMED],
            },
        }
    }

    /// Returns this cost with another amount of `budget`, which may be the name of the budget.
    ///
    /// # Panics
    ///
    /// If the cost would have amounts of more than four budgets that are not built in: a limiter counts no more.
    #[must_use]
    #[track_caller]
    pub fn with(mut self, budget: impl Into<Budget>, amount: u64) -> Self {
        match budget.into() {
            Budget::Requests => self.requests = amount,
            Budget::Tokens => self.tokens = amount,
            Budget::InputTokens => self.input_tokens = amount,
            Budget::OutputTokens => self.output_tokens = amount,
            Budget::Named(name) => match self.named.entry(name) {
                Some(value) => *value = amount,
                None => panic!("a cost has at most {MAX_NAMED} budgets that are not built in"),
            },
        }
        self
    }

    /// Returns the amount of `budget`, which may be the name of the budget. 0 if the cost has none of it.
    #[inline]
    #[must_use]
    pub fn of(&self, budget: impl Into<Budget>) -> u64 {
        self.amount(budget.into())
    }

    /// Does what [`of`](Self::of) does. A limiter asks for each of its rates, several times a call, so the budgets that
    /// most limits have come first.
    #[inline]
    pub(crate) fn amount(&self, budget: Budget) -> u64 {
        if budget == Budget::Requests {
            self.requests
        } else if budget == Budget::Tokens {
            self.tokens
        } else {
            self.amount_of_other(budget)
        }
    }

    #[cold]
    #[inline(never)]
    fn amount_of_other(&self, budget: Budget) -> u64 {
        match budget {
            Budget::Requests => self.requests,
            Budget::Tokens => self.tokens,
            Budget::InputTokens => self.input_tokens,
            Budget::OutputTokens => self.output_tokens,
            Budget::Named(name) => self.named.of(name).unwrap_or(0),
        }
    }

    /// Returns the budgets of which this cost has an amount above zero, with the amounts.
    pub fn amounts(&self) -> impl Iterator<Item = (Budget, u64)> + '_ {
        PerBudget::from(*self).into_values().filter(|(_, amount)| *amount > 0)
    }

    /// Whether the cost has amounts of other budgets than requests and tokens.
    #[inline]
    pub(crate) const fn has_more_than_requests_and_tokens(&self) -> bool {
        self.input_tokens > 0 || self.output_tokens > 0 || self.has_named()
    }

    /// Whether the cost has amounts of budgets that are not built in, be they zero.
    #[inline]
    pub(crate) const fn has_named(&self) -> bool {
        self.named.names[0].is_some()
    }

    /// Whether this cost has no more of any budget than `other`.
    pub(crate) fn is_within(&self, other: &Self) -> bool {
        self.requests <= other.requests
            && self.tokens <= other.tokens
            && self.input_tokens <= other.input_tokens
            && self.output_tokens <= other.output_tokens
            && self
                .named
                .into_values()
                .all(|(name, amount)| amount <= other.of(Budget::Named(name)))
    }

    /// Returns what this cost has of each budget above `other`.
    pub(crate) fn above(&self, other: &Self) -> Self {
        let mut above = Self {
            requests: self.requests.saturating_sub(other.requests),
            tokens: self.tokens.saturating_sub(other.tokens),
            input_tokens: self.input_tokens.saturating_sub(other.input_tokens),
            output_tokens: self.output_tokens.saturating_sub(other.output_tokens),
            ..*self
        };
        for (name, amount) in self.named.into_values() {
            let budget = Budget::Named(name);
            above = above.with(budget, amount.saturating_sub(other.of(budget)));
        }
        above
    }
}

/// One request with so many tokens, of which it is not known how many are of the prompt and how many of the answer. Either
/// may be all of them, so limits of input tokens and of output tokens are charged all of them, too.
///
/// ```
/// use tower_outbound::{ApiTokens, Cost};
///
/// let cost = Cost::from(ApiTokens(750));
/// assert_eq!((cost.tokens, cost.input_tokens, cost.output_tokens), (750, 750, 750));
/// ```
impl From<ApiTokens> for Cost {
    fn from(ApiTokens(tokens): ApiTokens) -> Self {
        Self {
            input_tokens: tokens,
            output_tokens: tokens,
            ..Self::tokens(tokens)
        }
    }
}

/// Costs are equal if they have the same amount of each budget.
impl PartialEq for Cost {
    fn eq(&self, other: &Self) -> bool {
        if !self.has_named() && !other.has_named() {
            let built_in = |cost: &Self| (cost.requests, cost.tokens, cost.input_tokens, cost.output_tokens);
            return built_in(self) == built_in(other);
        }
        let has_all_of = |one: &Self, other: &Self| one.amounts().all(|(budget, amount)| other.of(budget) == amount);
        has_all_of(self, other) && has_all_of(other, self)
    }
}

impl Eq for Cost {}

impl fmt::Debug for Cost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut fields = f.debug_struct("Cost");
        for (budget, amount) in self.amounts() {
            fields.field(budget.name(), &amount);
        }
        fields.finish()
    }
}

// === impl Named ===

impl<T: Copy + Default> Named<T> {
    // Not inlined: most costs and limits have built-in budgets only, and a caller that handles only these is smaller.
    #[inline(never)]
    pub(crate) fn of(&self, name: BudgetName) -> Option<T> {
        let at = self.names.iter().position(|known| *known == Some(name))?;
        self.values.get(at).copied()
    }

    /// Returns each name that has a value, with the value.
    pub(crate) fn into_values(self) -> impl Iterator<Item = (BudgetName, T)> {
        let places = self.names.into_iter().zip(self.values);
        places.filter_map(|(name, value)| Some((name?, value)))
    }

    /// Returns the value of `name`, which is added if there is room for it.
    fn entry(&mut self, name: BudgetName) -> Option<&mut T> {
        let is_its_place = |place: &Option<BudgetName>| place.is_none_or(|known| known == name);
        let at = self.names.iter().position(is_its_place)?;
        self.names[at] = Some(name);
        self.values.get_mut(at)
    }
}

impl<T: Copy + Default> Default for Named<T> {
    fn default() -> Self {
        Self {
            names: [None; MAX_NAMED],
            values: [T::default(); MAX_NAMED],
        }
    }
}

// === impl PerBudget ===

impl<T: Copy + Default> PerBudget<T> {
    #[cfg(feature = "redis")]
    pub(crate) fn of(&self, budget: Budget) -> T {
        match budget {
            Budget::Requests => self.requests,
            Budget::Tokens => self.tokens,
            Budget::InputTokens => self.input_tokens,
            Budget::OutputTokens => self.output_tokens,
            Budget::Named(name) => self.named.of(name).unwrap_or_default(),
        }
    }

    /// Returns the value of `budget`, which is added if there is room for it: for [`MAX_NAMED`] budgets that are not
    /// built in.
    pub(crate) fn entry(&mut self, budget: Budget) -> Option<&mut T> {
        match budget {
            Budget::Requests => Some(&mut self.requests),
            Budget::Tokens => Some(&mut self.tokens),
            Budget::InputTokens => Some(&mut self.input_tokens),
            Budget::OutputTokens => Some(&mut self.output_tokens),
            Budget::Named(name) => self.named.entry(name),
        }
    }

    /// Returns the value of each budget, in the same order each time.
    pub(crate) fn into_values(self) -> impl Iterator<Item = (Budget, T)> {
        let built_in = [
            (Budget::Requests, self.requests),
            (Budget::Tokens, self.tokens),
            (Budget::InputTokens, self.input_tokens),
            (Budget::OutputTokens, self.output_tokens),
        ];
        let named = self.named.into_values();
        built_in
            .into_iter()
            .chain(named.map(|(name, value)| (Budget::Named(name), value)))
    }
}

impl<T: Copy + Default> Default for PerBudget<T> {
    fn default() -> Self {
        Self {
            requests: T::default(),
            tokens: T::default(),
            input_tokens: T::default(),
            output_tokens: T::default(),
            named: Named::default(),
        }
    }
}

impl From<Cost> for PerBudget<u64> {
    fn from(cost: Cost) -> Self {
        let Cost {
            requests,
            tokens,
            input_tokens,
            output_tokens,
            named,
        } = cost;
        Self {
            requests,
            tokens,
            input_tokens,
            output_tokens,
            named,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cost_has_an_amount_of_each_budget() {
        let cost = Cost::input_output_tokens(900, 300)
            .with("images", 2)
            .with(Budget::Requests, 3);
        let amounts: Vec<_> = cost.amounts().collect();
        let images = Budget::from("images");
        assert_eq!(
            amounts,
            [
                (Budget::Requests, 3),
                (Budget::Tokens, 1_200),
                (Budget::InputTokens, 900),
                (Budget::OutputTokens, 300),
                (images, 2),
            ]
        );
        assert_eq!((cost.of("seconds"), cost.with(images, 5).of(images)), (0, 5));
        assert_eq!(
            format!("{:?}", Cost::request().with("images", 2)),
            "Cost { requests: 1, images: 2 }"
        );
    }

    #[test]
    #[should_panic(expected = "at most 4 budgets that are not built in")]
    fn a_cost_has_no_fifth_budget_of_the_users_own() {
        let _ = ["a", "b", "c", "d", "e"]
            .into_iter()
            .fold(Cost::none(), |cost, name| cost.with(name, 1));
    }
}
