//! The Lua script that the server runs: `reserve.lua`, with names replaced by positions.
//!
//! Lua reads a position in a list faster than a name in a table, and what is stored and sent are lists. So the script
//! is written with names and loaded with positions: both are generated from one list of names.

use super::wire::{ReplyNumbers, RequestNumbers};
use std::{cmp::Reverse, sync::LazyLock};

/// The layout of the stored state, as a part of its key. Another layout needs another version, so that members with
/// different layouts do not read each other's state.
pub(super) const VERSION: &str = "v1";

/// The script as it is loaded. It is the same text in every process of one version of this crate, so all of them use
/// one script on the server.
pub(super) static SCRIPT: LazyLock<String> = LazyLock::new(|| generate(include_str!("reserve.lua")));

/// The numbers that the stored state begins with, in their order. Times are in microseconds since 1970.
const STATE: &[&str] = &[
    // The number of buckets.
    "rates",
    // Distinguishes this state from earlier ones: the time of its creation, or more.
    "incarnation",
    // How many requests it has served.
    "sequence",
    // The server's clock at the last request.
    "clock",
    // The last request that was no probe.
    "last_contact",
    // Up to when the buckets are settled: the last reservation, or the last request if that is later.
    "scheduled_until",
    "paused_until",
    // The version of the limits: a later one is larger.
    "config_version",
    // 1 if it began with full buckets, because its first member knew no earlier state.
    "began_full",
    // When expired members were last looked for.
    "swept_at",
    "members",
    // When the buckets were last emptied; 0 if never.
    "emptied_at",
    // When the server deletes it.
    "expires_at",
    // The estimates of all members that are not settled.
    "estimated_requests",
    "estimated_tokens",
];

/// The numbers of each bucket, which follow, in their order: budget (1 requests, 2 tokens), units that a microsecond
/// brings, units in one request or token, units in a full bucket, units in it, units withheld from refunds.
const BUCKET: &[&str] = &["budget", "fill", "unit", "capacity", "balance", "withheld"];

fn generate(template: &str) -> String {
    let constants = [
        ("REQUEST_NAMES", RequestNumbers::NAMES.join(", ")),
        (
            "REQUEST_FORMAT",
            format!("'<{}'", "d".repeat(RequestNumbers::NAMES.len())),
        ),
        ("REPLY_ZEROS", vec!["0"; ReplyNumbers::NAMES.len()].join(", ")),
        ("REPLY_LENGTH", ReplyNumbers::NAMES.len().to_string()),
        ("STATE_LENGTH", STATE.len().to_string()),
        ("FIRST_BUCKET", (STATE.len() + 1).to_string()),
        ("BUCKET_LENGTH", BUCKET.len().to_string()),
    ];
    let element = |table: &str, at: usize| match (table, at) {
        ("bucket", 0) => "state[bucket]".to_owned(),
        ("bucket", _) => format!("state[bucket + {at}]"),
        // Lua counts from 1.
        _ => format!("{table}[{}]", at + 1),
    };
    let mut elements = Vec::new();
    for (table, names) in [("state", STATE), ("bucket", BUCKET), ("reply", ReplyNumbers::NAMES)] {
        let named = names.iter().enumerate();
        elements.extend(named.map(|(at, name)| (format!("{table}.{name}"), element(table, at))));
    }
    // The longest first: one name may be the beginning of another.
    elements.sort_by_key(|(name, _)| Reverse(name.len()));
    let mut script = template.to_owned();
    for (name, value) in constants {
        script = script.replace(name, &value);
    }
    for (name, value) in elements {
        script = script.replace(&name, &value);
    }
    script
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_positions() {
        let template = "local REQUEST_NAMES, rest = read(REQUEST_FORMAT)\n\
                        reply.now = state.members + bucket.unit + bucket.budget";
        assert_eq!(
            generate(template),
            "local max_ahead, incarnation, sequence, last_reservation, config_version, is_change, is_leaving, \
             is_probe, pause, batch, fallback_age, member_count, credit_requests, credit_tokens, debit_requests, \
             debit_tokens, fallback_requests, fallback_tokens, estimated_requests, estimated_tokens, lowered, rates, \
             costs, rest = read('<ddddddddddddddddddddddd')\n\
             reply[12] = state[11] + state[bucket + 2] + state[bucket]"
        );
    }

    #[test]
    fn the_script_uses_no_name_that_is_in_no_list() {
        for table in ["state.", "bucket.", "reply."] {
            let unknown = SCRIPT
                .split(table)
                .skip(1)
                .find(|rest| rest.starts_with(|first: char| first.is_ascii_lowercase()));
            assert_eq!(unknown.and_then(|rest| rest.lines().next()), None, "{table}");
        }
    }
}
