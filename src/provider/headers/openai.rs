//! OpenAI's headers, `x-ratelimit-limit-tokens` and so on, and those of the providers that have taken them over.

use super::Reader;
use crate::provider::{Reset, Unit, Window};
use std::time::Duration;

/// The headers of one limit.
type Names = [&'static str; 3];

/// `x-ratelimit-limit-…`, `x-ratelimit-remaining-…` and `x-ratelimit-reset-…`.
macro_rules! names {
    ($what:literal) => {
        [
            concat!("x-ratelimit-limit-", $what),
            concat!("x-ratelimit-remaining-", $what),
            concat!("x-ratelimit-reset-", $what),
        ]
    };
}

const REQUESTS: Names = names!("requests");
const TOKENS: Names = names!("tokens");

const MINUTE: Option<Duration> = Some(Duration::from_secs(60));
const HOUR: Option<Duration> = Some(Duration::from_secs(60 * 60));
const DAY: Option<Duration> = Some(Duration::from_secs(24 * 60 * 60));

/// Requests are counted by the minute or by the day, which it does not say.
pub(in crate::provider) fn read(reader: &Reader<'_>, windows: &mut Vec<Window>) {
    window(reader, REQUESTS, Unit::Requests, None).add_to(windows);
    for names in [TOKENS, names!("project-tokens"), names!("tokens_usage_based")] {
        window(reader, names, Unit::Tokens, MINUTE).add_to(windows);
    }
}

/// The period is only told by GitHub Models.
pub(in crate::provider) fn read_azure(reader: &Reader<'_>, windows: &mut Vec<Window>) {
    let period = |name| reader.seconds(name).filter(|period| !period.is_zero());
    let requests = period("x-ratelimit-renewalperiod-requests");
    let tokens = period("x-ratelimit-renewalperiod-tokens").or(MINUTE);
    window(reader, REQUESTS, Unit::Requests, requests).add_to(windows);
    window(reader, TOKENS, Unit::Tokens, tokens).add_to(windows);
}

pub(in crate::provider) fn read_groq(reader: &Reader<'_>, windows: &mut Vec<Window>) {
    window(reader, REQUESTS, Unit::Requests, DAY).add_to(windows);
    window(reader, TOKENS, Unit::Tokens, MINUTE).add_to(windows);
}

pub(in crate::provider) fn read_mistral(reader: &Reader<'_>, windows: &mut Vec<Window>) {
    window(reader, names!("req-minute"), Unit::Requests, MINUTE).add_to(windows);
    window(reader, names!("tokens-minute"), Unit::Tokens, MINUTE).add_to(windows);
}

pub(in crate::provider) fn read_cerebras(reader: &Reader<'_>, windows: &mut Vec<Window>) {
    for (names, unit, period) in [
        (names!("requests-minute"), Unit::Requests, MINUTE),
        (names!("requests-hour"), Unit::Requests, HOUR),
        (names!("requests-day"), Unit::Requests, DAY),
        (names!("tokens-minute"), Unit::Tokens, MINUTE),
        (names!("tokens-hour"), Unit::Tokens, HOUR),
        (names!("tokens-day"), Unit::Tokens, DAY),
    ] {
        window(reader, names, unit, period).add_to(windows);
    }
}

fn window(reader: &Reader<'_>, [limit, remaining, reset]: Names, unit: Unit, period: Option<Duration>) -> Window {
    Window {
        limit: reader.number(limit),
        remaining: reader.number(remaining),
        reset: reader.duration(reset).map(Reset::Full),
        ..Window::new(unit, period)
    }
}
