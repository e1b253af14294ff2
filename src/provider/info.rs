//! [`RateLimitInfo`]: what the headers of a response report, in the same form for all providers.

use std::time::Duration;

/// What the headers of a response report about its provider's limits.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct RateLimitInfo {
    /// The delay before the next attempt: `retry-after-ms`, or else `Retry-After` ([RFC
    /// 9110](https://www.rfc-editor.org/rfc/rfc9110#field.retry-after)) in seconds, with a fraction if there is one, or
    /// as a date, which is compared with the `Date` of the response.
    pub retry_after: Option<Duration>,
    /// Whether another attempt is of use, in the opinion of the server: `x-should-retry`, which OpenAI sends.
    pub should_retry: Option<bool>,
    /// The tokens that the call used, where a header reports that (Mistral).
    pub tokens_used: Option<u64>,
    /// The limits, in the order in which the provider documents them.
    pub windows: Vec<Window>,
}

/// One limit of a provider.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Window {
    /// What the limit counts.
    pub unit: Unit,
    /// The time in which the limit applies; `None` if it is neither sent nor documented.
    pub period: Option<Duration>,
    /// The amount that is allowed per period.
    pub limit: Option<u64>,
    /// What is left of that amount.
    pub remaining: Option<u64>,
    /// When more of the amount, or all of it, is available again.
    pub reset: Option<Reset>,
}

/// What a limit counts.
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

/// When a limit allows more again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reset {
    /// After this time the whole amount is available. OpenAI, for example, refills continuously: half of what is
    /// missing is available after half the time.
    Full(Duration),
    /// After this time more is available than now, but not necessarily the whole amount.
    More(Duration),
}

// === impl RateLimitInfo ===

impl RateLimitInfo {
    /// Whether a limit is used up, or the response has a delay before the next attempt. GitHub reports so with a 403
    /// that it is a limit, rather than a missing permission.
    pub(crate) fn is_limited(&self) -> bool {
        self.windows.iter().any(|window| window.remaining == Some(0)) || self.retry_after.is_some()
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

    /// Adds the window to the others, unless the response has neither its limit nor its remaining amount.
    pub(super) fn add_to(self, windows: &mut Vec<Self>) {
        if self.limit.is_some() || self.remaining.is_some() {
            windows.push(self);
        }
    }
}
