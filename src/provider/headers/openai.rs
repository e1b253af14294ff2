//! OpenAI's headers ([rate limits](https://platform.openai.com/docs/guides/rate-limits)), `x-ratelimit-limit-tokens`
//! and so on, and the headers of other providers that use the same pattern of names.

use super::Reader;
use crate::provider::info::{RateLimitInfo, Reset, Unit, Window};
use http::HeaderName;
use std::time::Duration;

/// The names of the three headers that describe one limit: its amount, what remains of it, and when it is reset.
type Names = [HeaderName; 3];

/// Returns the three header names of one limit: `x-ratelimit-limit-…`, `x-ratelimit-remaining-…` and
/// `x-ratelimit-reset-…`.
macro_rules! names {
    ($what:literal) => {
        [
            HeaderName::from_static(concat!("x-ratelimit-limit-", $what)),
            HeaderName::from_static(concat!("x-ratelimit-remaining-", $what)),
            HeaderName::from_static(concat!("x-ratelimit-reset-", $what)),
        ]
    };
}

static REQUESTS: Names = names!("requests");
static TOKENS: Names = names!("tokens");
static PROJECT_TOKENS: Names = names!("project-tokens");
static TOKENS_USAGE_BASED: Names = names!("tokens_usage_based");

static AZURE_REQUESTS_PERIOD: HeaderName = HeaderName::from_static("x-ratelimit-renewalperiod-requests");
static AZURE_TOKENS_PERIOD: HeaderName = HeaderName::from_static("x-ratelimit-renewalperiod-tokens");

static MISTRAL_REQUESTS: Names = names!("req-minute");
static MISTRAL_TOKENS: Names = names!("tokens-minute");
static MISTRAL_TOKENS_USED: HeaderName = HeaderName::from_static("x-ratelimit-tokens-query-cost");

static CEREBRAS: [(Names, Unit, Option<Duration>); 6] = [
    (names!("requests-minute"), Unit::Requests, MINUTE),
    (names!("requests-hour"), Unit::Requests, HOUR),
    (names!("requests-day"), Unit::Requests, DAY),
    (names!("tokens-minute"), Unit::Tokens, MINUTE),
    (names!("tokens-hour"), Unit::Tokens, HOUR),
    (names!("tokens-day"), Unit::Tokens, DAY),
];

const MINUTE: Option<Duration> = Some(Duration::from_secs(60));
const HOUR: Option<Duration> = Some(Duration::from_secs(60 * 60));
const DAY: Option<Duration> = Some(Duration::from_secs(24 * 60 * 60));

/// Reads OpenAI's headers. The period of the limit of requests is a minute or a day, depending on the account. No
/// header reports this period, so it is `None`.
///
/// Limits of tokens are also read from headers that end in `project-tokens` (the limit of a project) and in
/// `tokens_usage_based` (an older name that some accounts receive).
pub(in crate::provider) fn read(reader: &Reader<'_>, windows: &mut Vec<Window>) {
    window(reader, &REQUESTS, Unit::Requests, None).add_to(windows);
    for names in [&TOKENS, &PROJECT_TOKENS, &TOKENS_USAGE_BASED] {
        window(reader, names, Unit::Tokens, MINUTE).add_to(windows);
    }
}

/// Reads the headers of Azure OpenAI and of GitHub Models. Only GitHub Models sends the period of each limit.
pub(in crate::provider) fn read_azure(reader: &Reader<'_>, windows: &mut Vec<Window>) {
    let period = |name| reader.seconds(name).filter(|period| !period.is_zero());
    let requests = period(&AZURE_REQUESTS_PERIOD);
    let tokens = period(&AZURE_TOKENS_PERIOD).or(MINUTE);
    window(reader, &REQUESTS, Unit::Requests, requests).add_to(windows);
    window(reader, &TOKENS, Unit::Tokens, tokens).add_to(windows);
}

/// Reads Groq's headers. Groq counts requests per day ([rate limits](https://console.groq.com/docs/rate-limits)).
pub(in crate::provider) fn read_groq(reader: &Reader<'_>, windows: &mut Vec<Window>) {
    window(reader, &REQUESTS, Unit::Requests, DAY).add_to(windows);
    window(reader, &TOKENS, Unit::Tokens, MINUTE).add_to(windows);
}

/// Reads Mistral's headers. Mistral does not send when a limit is reset: its limits are sliding windows of a minute.
pub(in crate::provider) fn read_mistral(reader: &Reader<'_>, info: &mut RateLimitInfo) {
    window(reader, &MISTRAL_REQUESTS, Unit::Requests, MINUTE).add_to(&mut info.windows);
    window(reader, &MISTRAL_TOKENS, Unit::Tokens, MINUTE).add_to(&mut info.windows);
    info.tokens_used = reader.number(&MISTRAL_TOKENS_USED);
}

/// Reads Cerebras's headers, which report limits per minute, hour and day at once ([rate
/// limits](https://inference-docs.cerebras.ai/support/rate-limits)).
pub(in crate::provider) fn read_cerebras(reader: &Reader<'_>, windows: &mut Vec<Window>) {
    for (names, unit, period) in &CEREBRAS {
        window(reader, names, *unit, *period).add_to(windows);
    }
}

fn window(
    reader: &Reader<'_>,
    [limit, remaining, reset]: &'static Names,
    unit: Unit,
    period: Option<Duration>,
) -> Window {
    Window {
        limit: reader.number(limit),
        remaining: reader.number(remaining),
        reset: reader.duration(reset).map(Reset::Full),
        ..Window::new(unit, period)
    }
}
