//! Anthropic's headers ([rate limits](https://docs.anthropic.com/en/api/rate-limits)):
//! `anthropic-ratelimit-tokens-limit` and so on. All limits are per minute, and a reset is a date as RFC 3339 writes
//! it.
//!
//! The headers of separate quotas (priority tier, fast mode, subscriptions) are not read: their limits are not those of
//! ordinary calls.

use super::Reader;
use crate::provider::info::{Reset, Unit, Window};
use std::time::Duration;

/// `anthropic-ratelimit-…-limit`, `…-remaining` and `…-reset`.
macro_rules! names {
    ($what:literal) => {
        [
            concat!("anthropic-ratelimit-", $what, "-limit"),
            concat!("anthropic-ratelimit-", $what, "-remaining"),
            concat!("anthropic-ratelimit-", $what, "-reset"),
        ]
    };
}

pub(in crate::provider) fn read(reader: &Reader<'_>, windows: &mut Vec<Window>) {
    for ([limit, remaining, reset], unit) in [
        (names!("requests"), Unit::Requests),
        (names!("tokens"), Unit::Tokens),
        (names!("input-tokens"), Unit::InputTokens),
        (names!("output-tokens"), Unit::OutputTokens),
    ] {
        let window = Window {
            limit: reader.number(limit),
            remaining: reader.number(remaining),
            reset: reader.time_until_rfc3339(reset).map(Reset::Full),
            ..Window::new(unit, Some(Duration::from_secs(60)))
        };
        window.add_to(windows);
    }
}
