//! [`Amounts`]: a number of requests and a number of the API's tokens, which are counted side by side.

use crate::rate::{budget::Budget, cost::Cost};
use std::ops::Index;

/// One value for each [`Budget`]: one for requests and one for tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct PerBudget<T> {
    pub(super) requests: T,
    pub(super) tokens: T,
}

/// A number of requests and a number of tokens.
pub(super) type Amounts = PerBudget<u64>;

impl<T> PerBudget<T> {
    pub(super) fn from_fn(mut value: impl FnMut(Budget) -> T) -> Self {
        Self {
            requests: value(Budget::Requests),
            tokens: value(Budget::Tokens),
        }
    }
}

impl<T> Index<Budget> for PerBudget<T> {
    type Output = T;

    fn index(&self, budget: Budget) -> &T {
        match budget {
            Budget::Requests => &self.requests,
            // The limits of a shared limiter have no other budgets.
            _ => &self.tokens,
        }
    }
}

impl Amounts {
    pub(super) const ZERO: Self = Self { requests: 0, tokens: 0 };

    pub(super) const fn saturating_add(self, other: Self) -> Self {
        Self {
            requests: self.requests.saturating_add(other.requests),
            tokens: self.tokens.saturating_add(other.tokens),
        }
    }

    pub(super) const fn saturating_sub(self, other: Self) -> Self {
        Self {
            requests: self.requests.saturating_sub(other.requests),
            tokens: self.tokens.saturating_sub(other.tokens),
        }
    }
}

impl From<Cost> for Amounts {
    fn from(cost: Cost) -> Self {
        Self {
            requests: cost.requests,
            tokens: cost.tokens,
        }
    }
}
