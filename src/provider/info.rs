//! [`RateLimitInfo`]: what the headers of a response report about the provider's limits, in the same form for all
//! providers.

use crate::rate::{Budget, Limits, Rate};
use std::time::Duration;

/// What the headers of a response report about the limits of the provider.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct RateLimitInfo {
    /// The delay before the next attempt that the server requests: the header `retry-after-ms`, or else `Retry-After`
    /// ([RFC 9110](https://www.rfc-editor.org/rfc/rfc9110#field.retry-after)) in seconds, with a fraction if there is
    /// one, or as a date, which is compared with the `Date` of the response. With
    /// [`Provider::GitHub`](super::Provider::GitHub), and without these headers, the time until `x-ratelimit-reset` if
    /// `x-ratelimit-remaining` is zero.
    pub retry_after: Option<Duration>,
    /// Whether another attempt is of use, in the opinion of the server: the header `x-should-retry`, which OpenAI
    /// sends.
    pub should_retry: Option<bool>,
    /// The number of tokens that the call used, if a header reports it (Mistral).
    pub tokens_used: Option<u64>,
    /// The limits of the provider, in the order in which the provider documents them. With
    /// [`Provider::Ietf`](super::Provider::Ietf), they are in the order in which the response has them.
    pub windows: Vec<Window>,
}

/// One limit of a provider, and what is left of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Window {
    /// What the limit counts, such as requests.
    pub unit: Unit,
    /// The period in which the limit applies, such as a minute. `None` if the provider neither sends nor documents it.
    pub period: Option<Duration>,
    /// The amount that the limit allows per period.
    pub limit: Option<u64>,
    /// What is left of the amount that the limit allows.
    pub remaining: Option<u64>,
    /// When more of the limit's amount, or all of it, is available again.
    pub reset: Option<Reset>,
}

/// What a limit of a provider counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Unit {
    /// Requests.
    Requests,
    /// Tokens of the prompt and of the answer together.
    Tokens,
    /// Tokens of the prompt.
    InputTokens,
    /// Tokens of the answer.
    OutputTokens,
}

/// When more of a limit's amount is available again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reset {
    /// After this time, the whole amount of the limit is available. OpenAI, for example, refills an amount
    /// continuously: half of what is missing is available after half of this time.
    Full(Duration),
    /// After this time, more of the limit's amount is available than now, but not necessarily all of it.
    More(Duration),
}

// === impl RateLimitInfo ===

impl RateLimitInfo {
    /// Returns whether a limit is used up, or the response has a delay before the next attempt. A 403 of GitHub with
    /// one of these is due to a limit, rather than to a missing permission.
    pub(crate) fn is_limited(&self) -> bool {
        self.windows.iter().any(|window| window.remaining == Some(0)) || self.retry_after.is_some()
    }
}

// === impl Unit ===

impl Unit {
    /// Returns the budget of a limiter that counts the same.
    #[must_use]
    pub const fn budget(self) -> Budget {
        match self {
            Self::Requests => Budget::Requests,
            Self::Tokens => Budget::Tokens,
            Self::InputTokens => Budget::InputTokens,
            Self::OutputTokens => Budget::OutputTokens,
        }
    }
}

// === impl Window ===

impl Window {
    pub(super) const fn new(unit: Unit, period: Option<Duration>) -> Self {
        Self {
            unit,
            period,
            limit: None,
            remaining: None,
            reset: None,
        }
    }

    /// Returns the index of the rate that this limit applies to: the one with the same budget and period.
    ///
    /// A limit without a period may be that of a minute or of a day. The time until it is full tells which: the rest of
    /// the limit takes that long to be filled. If that tells nothing, it is the rate with the same amount, or the only
    /// rate of the budget.
    pub(super) fn index_in(&self, limits: &Limits) -> Option<usize> {
        let of_budget = || {
            let rates = limits.rates().enumerate();
            rates.filter(|(_, (budget, _))| *budget == self.unit.budget())
        };
        let with_period = |period| of_budget().find(|(_, (_, rate))| rate.period() == period);
        let found = match self.period.or_else(|| self.period_from_reset()) {
            Some(period) => with_period(period),
            None => {
                let is_same = |rate: &Rate| self.limit.is_some_and(|limit| rate.amount() == limit as f64);
                let mut same = of_budget().filter(|(_, (_, rate))| is_same(rate));
                let same = same.next().filter(|_| same.next().is_none());
                let mut all = of_budget();
                same.or_else(|| all.next().filter(|_| all.next().is_none()))
            }
        };
        found.map(|(index, _)| index)
    }

    /// Returns a minute or a day if the time until the limit is full tells that it is filled in about this time.
    fn period_from_reset(&self) -> Option<Duration> {
        let (Some(limit), Some(remaining), Some(Reset::Full(reset))) = (self.limit, self.remaining, self.reset) else {
            return None;
        };
        let missing = limit.checked_sub(remaining).filter(|missing| *missing > 0)?;
        let period = reset.as_secs_f64() * limit as f64 / missing as f64;
        let periods = [60, 24 * 60 * 60].map(Duration::from_secs);
        periods
            .into_iter()
            .find(|of| (0.5..2.0).contains(&(period / of.as_secs_f64())))
    }

    /// Returns what the provider's bucket can hold, as far as this limit tells: what it holds, and what the rate adds
    /// until it is full.
    pub(super) fn capacity(&self, amount: f64, period: Duration) -> Option<u64> {
        let limit = self.limit?;
        let (Some(remaining), Some(Reset::Full(reset))) = (self.remaining, self.reset) else {
            return Some(limit);
        };
        // The time may be rounded to a second.
        let missing = amount * (reset.as_secs_f64() + 1.0) / period.as_secs_f64();
        Some(limit.min(remaining.saturating_add(missing as u64)))
    }

    /// Adds this limit to `windows`, unless the response reports neither its amount nor what remains of it.
    pub(super) fn add_to(self, windows: &mut Vec<Self>) {
        if self.limit.is_some() || self.remaining.is_some() {
            windows.push(self);
        }
    }
}
