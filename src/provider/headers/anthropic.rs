//! Anthropic's headers, `anthropic-ratelimit-tokens-limit` and so on. All limits are by the minute.
//!
//! Those of other quotas (priority, fast, subscriptions) are left alone: they say nothing of these.

use super::Reader;
use crate::provider::{Reset, Unit, Window};
use std::time::Duration;

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
            reset: reader.until(reset).map(Reset::Full),
            ..Window::new(unit, Some(Duration::from_secs(60)))
        };
        window.add_to(windows);
    }
}
