//! [`RateLimitInfo`]: what the headers of a response report about the provider's limits, in the same form for all
//! providers.

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

    /// Adds this limit to `windows`, unless the response reports neither its amount nor what remains of it.
    pub(super) fn add_to(self, windows: &mut Vec<Self>) {
        if self.limit.is_some() || self.remaining.is_some() {
            windows.push(self);
        }
    }
}
