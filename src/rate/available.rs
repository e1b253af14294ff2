//! [`Available`]: what the buckets of a rate limiter hold, as its users see it.

use super::{
    budget::Budget,
    cost::{Named, PerBudget},
};
use tokio::time::Instant;

/// What the buckets of a rate limiter hold at one instant, and the end of its pause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Available {
    /// The number of requests that the buckets hold: the minimum over all rates of requests. `None` if requests are not
    /// limited.
    pub requests: Option<u64>,
    /// The number of tokens that the buckets hold: the minimum over all rates of tokens. `None` if tokens are not
    /// limited.
    pub tokens: Option<u64>,
    /// The number of tokens of prompts that the buckets hold, or `None` if they are not limited.
    pub input_tokens: Option<u64>,
    /// The number of tokens of answers that the buckets hold, or `None` if they are not limited.
    pub output_tokens: Option<u64>,
    named: Named<Option<u64>>,
    /// The end of the current pause, before which no call is admitted. `None` without a pause.
    pub paused_until: Option<Instant>,
}

// === impl Available ===

impl Available {
    pub(super) fn new(available: PerBudget<Option<u64>>, paused_until: Option<Instant>) -> Self {
        Self {
            requests: available.requests,
            tokens: available.tokens,
            input_tokens: available.input_tokens,
            output_tokens: available.output_tokens,
            named: available.named,
            paused_until,
        }
    }

    /// Returns how much of `budget`, which may be its name, the buckets hold: the minimum over all of its rates. `None`
    /// if the budget is not limited.
    #[must_use]
    pub fn of(&self, budget: impl Into<Budget>) -> Option<u64> {
        match budget.into() {
            Budget::Requests => self.requests,
            Budget::Tokens => self.tokens,
            Budget::InputTokens => self.input_tokens,
            Budget::OutputTokens => self.output_tokens,
            Budget::Named(name) => self.named.of(name).flatten(),
        }
    }
}
