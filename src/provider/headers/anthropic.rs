//! Anthropic's headers ([rate limits](https://docs.anthropic.com/en/api/rate-limits)):
//! `anthropic-ratelimit-tokens-limit` and so on. All limits are per minute. The time at which a limit is reset is a
//! date in the format of RFC 3339.
//!
//! The headers of Anthropic's separate quotas (priority tier, fast mode, subscriptions) are not read, as the limits of
//! these quotas do not apply to ordinary calls.

use super::Reader;
use crate::provider::info::{Reset, Unit, Window};
use http::HeaderName;
use std::time::Duration;

/// Returns the three header names of one limit: `anthropic-ratelimit-…-limit`, `…-remaining` and `…-reset`.
macro_rules! names {
    ($what:literal) => {
        [
            HeaderName::from_static(concat!("anthropic-ratelimit-", $what, "-limit")),
            HeaderName::from_static(concat!("anthropic-ratelimit-", $what, "-remaining")),
            HeaderName::from_static(concat!("anthropic-ratelimit-", $what, "-reset")),
        ]
    };
}

static LIMITS: [([HeaderName; 3], Unit); 4] = [
    (names!("requests"), Unit::Requests),
    (names!("tokens"), Unit::Tokens),
    (names!("input-tokens"), Unit::InputTokens),
    (names!("output-tokens"), Unit::OutputTokens),
];

pub(in crate::provider) fn read(reader: &Reader<'_>, windows: &mut Vec<Window>) {
    for ([limit, remaining, reset], unit) in &LIMITS {
        let window = Window {
            limit: reader.number(limit),
            remaining: reader.number(remaining),
            reset: reader.time_until_rfc3339(reset).map(Reset::Full),
            ..Window::new(*unit, Some(Duration::from_secs(60)))
        };
        window.add_to(windows);
    }
}
