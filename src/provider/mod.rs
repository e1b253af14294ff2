//! What a response says of its provider's limits, and what to make of it.
//!
//! [`Provider::rate_limit_info`] reads the headers; [`FeedbackLayer`] acts on what they say. Headers are read leniently and
//! trusted carefully: what is absent, malformed or `-1` says nothing, and is told to `tracing` at level DEBUG, by the
//! name of the header.

mod adapt;
#[cfg(feature = "json")]
mod estimate;
pub mod feedback;
mod headers;
#[cfg(feature = "json")]
pub mod usage;
#[cfg(feature = "json")]
mod usage_report;

#[cfg(feature = "json")]
pub use estimate::{AverageEstimate, CharacterEstimate};
pub use feedback::{Feedback, FeedbackLayer};
#[cfg(feature = "json")]
pub(crate) use headers::duration;
#[cfg(feature = "json")]
pub use usage::{MeteredBody, Usage, UsageLayer};

use headers::{Reader, anthropic, github, ietf, openai, retry_after};
use http::HeaderMap;
use std::{
    fmt,
    str::FromStr,
    time::{Duration, SystemTime},
};

/// What a response says of its provider's limits.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct RateLimitInfo {
    /// When to come back: `retry-after-ms`, or else `Retry-After`
    /// ([RFC 9110](https://www.rfc-editor.org/rfc/rfc9110#field.retry-after), fractions too), a date measured against the
    /// response's own.
    pub retry_after: Option<Duration>,
    /// Whether it is of use to try again: `x-should-retry`.
    pub should_retry: Option<bool>,
    /// How many tokens the call used, where a header says that (Mistral).
    pub tokens_used: Option<u64>,
    /// The limits, and what is left of them.
    pub windows: Vec<Window>,
}

/// One of a provider's limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Window {
    /// What is counted.
    pub unit: Unit,
    /// In what time; `None` if the provider does not say.
    pub period: Option<Duration>,
    /// The limit.
    pub limit: Option<u64>,
    /// What is left of it.
    pub remaining: Option<u64>,
    /// When there is more, or all of it again.
    pub reset: Option<Reset>,
}

/// What a provider counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Unit {
    /// Requests.
    Requests,
    /// Tokens, in and out.
    Tokens,
    /// Tokens of what is asked.
    InputTokens,
    /// Tokens of what is answered.
    OutputTokens,
}

/// When a limit is eased.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reset {
    /// In this time all of it is there again. OpenAI, for one, fills continuously: half of it is there in half the time.
    Full(Duration),
    /// In this time there is more of it.
    More(Duration),
}

/// Whose words the headers are in.
///
/// `Display` and `FromStr` use small letters: `openai`, `azure-openai`, …
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Provider {
    /// OpenAI, and whoever imitates it.
    OpenAi,
    /// Azure OpenAI and GitHub Models.
    AzureOpenAi,
    /// Anthropic.
    Anthropic,
    /// Gemini: it says when to come back in the body of a 429, and nothing in headers.
    Gemini,
    /// Groq: OpenAI's names, but requests are counted by the day.
    Groq,
    /// Mistral.
    Mistral,
    /// Cerebras.
    Cerebras,
    /// GitHub's REST API.
    GitHub,
    /// The IETF's `RateLimit` and `RateLimit-Policy`
    /// ([draft 10](https://datatracker.ietf.org/doc/html/draft-ietf-httpapi-ratelimit-headers-10) and its predecessors).
    Ietf,
}

/// A text that is no [`Provider`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParseProviderError(());

impl Provider {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::OpenAi,
        Self::AzureOpenAi,
        Self::Anthropic,
        Self::Gemini,
        Self::Groq,
        Self::Mistral,
        Self::Cerebras,
        Self::GitHub,
        Self::Ietf,
    ];

    /// What a response's headers say. Dates are measured against the header `Date`; without one, against `now`.
    ///
    /// ```
    /// use http::HeaderMap;
    /// use std::time::{Duration, SystemTime};
    /// use tower_outbound::provider::{Provider, Unit};
    ///
    /// let mut headers = HeaderMap::new();
    /// headers.insert("x-ratelimit-limit-tokens", 150_000.into());
    /// headers.insert("x-ratelimit-remaining-tokens", 149_984.into());
    /// headers.insert("retry-after", 2.into());
    /// let info = Provider::OpenAi.rate_limit_info(&headers, SystemTime::now());
    /// assert_eq!(info.retry_after, Some(Duration::from_secs(2)));
    /// assert_eq!((info.windows[0].unit, info.windows[0].remaining), (Unit::Tokens, Some(149_984)));
    /// ```
    #[must_use]
    pub fn rate_limit_info(self, headers: &HeaderMap, now: SystemTime) -> RateLimitInfo {
        let reader = Reader::new(headers, now);
        let mut info = RateLimitInfo {
            retry_after: retry_after::read(&reader),
            should_retry: reader.flag("x-should-retry"),
            ..RateLimitInfo::default()
        };
        match self {
            Self::OpenAi => openai::read(&reader, &mut info.windows),
            Self::AzureOpenAi => openai::read_azure(&reader, &mut info.windows),
            Self::Anthropic => anthropic::read(&reader, &mut info.windows),
            Self::Gemini => {}
            Self::Groq => openai::read_groq(&reader, &mut info.windows),
            Self::Mistral => {
                openai::read_mistral(&reader, &mut info.windows);
                info.tokens_used = reader.number("x-ratelimit-tokens-query-cost");
            }
            Self::Cerebras => openai::read_cerebras(&reader, &mut info.windows),
            Self::GitHub => github::read(&reader, &mut info.windows),
            Self::Ietf => ietf::read(&reader, &mut info.windows),
        }
        reader.tell();
        info
    }

    const fn name(self) -> &'static str {
        match self {
            Self::OpenAi => "openai",
            Self::AzureOpenAi => "azure-openai",
            Self::Anthropic => "anthropic",
            Self::Gemini => "gemini",
            Self::Groq => "groq",
            Self::Mistral => "mistral",
            Self::Cerebras => "cerebras",
            Self::GitHub => "github",
            Self::Ietf => "ietf",
        }
    }
}

impl Window {
    fn new(unit: Unit, period: Option<Duration>) -> Self {
        Self {
            unit,
            period,
            limit: None,
            remaining: None,
            reset: None,
        }
    }

    /// Adds it to the others, if it says anything.
    fn add_to(self, windows: &mut Vec<Self>) {
        if self.limit.is_some() || self.remaining.is_some() {
            windows.push(self);
        }
    }
}

impl fmt::Display for Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Provider {
    type Err = ParseProviderError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let provider = Self::ALL.into_iter().find(|provider| provider.name() == name);
        provider.ok_or(ParseProviderError(()))
    }
}

impl fmt::Display for ParseProviderError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("must be one of ")?;
        for (at, provider) in Provider::ALL.iter().enumerate() {
            write!(f, "{}{provider}", if at == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

impl std::error::Error for ParseProviderError {}
