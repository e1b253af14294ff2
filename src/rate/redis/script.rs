//! The Lua script that the server runs: `reserve.lua`, in which names are replaced by positions in lists.
//!
//! Lua reads an element of a list by its position faster than a field of a table by its name, and the stored state, the
//! requests and the replies are lists anyway. So the script is written with names such as `state.clock` and loaded with
//! positions such as `state[4]`, which are generated from the lists of names.

use super::wire::{ReplyNumbers, RequestNumbers};
use std::{cmp::Reverse, sync::LazyLock};

/// The version of the layout of the stored state, which is a part of the key under which the state is stored. Another
/// layout needs another version, so that members with different versions of this crate do not misread each other's
/// state.
pub(super) const VERSION: &str = "v2";

/// The script as it is loaded into the server. Its text is the same in all processes with the same version of this
/// crate, so the server compiles and caches it once.
pub(super) static SCRIPT: LazyLock<String> = LazyLock::new(|| generate(include_str!("reserve.lua")));

/// The names of the numbers that the stored state of a quota begins with, in their order. Times are in microseconds
/// since 1970.
const STATE: &[&str] = &[
    // The number of rates of the quota. Each rate has one bucket.
    "rates",
    // Distinguishes this stored state from earlier ones that were lost: the time of its creation, or a larger number.
    "incarnation",
    // How many requests of members this stored state has served.
    "sequence",
    // What the server's clock showed at the last request.
    "clock",
    // When the last request arrived that was not a probe (a request that only finds out whether a lost store is back).
    "last_contact",
    // The time that the balances stand for, with all refills up to it added and all reservations subtracted: the time of
    // the last reservation, or of the last request if that is later.
    "scheduled_until",
    // When the pause that a program has begun ends or has ended; 0 if there was none.
    "user_paused_until",
    // The same for the pause that the provider has asked for.
    "provider_paused_until",
    // The version of the limits in force: a later one is larger.
    "config_version",
    // 1 if this state began with full buckets, because the first member to send a request had seen no earlier state; 0
    // once a member reports that there was one.
    "began_full",
    // When the script last looked for members that have sent no request for 15 s.
    "swept_at",
    "members",
    // When the script last emptied the buckets; 0 if it never did.
    "emptied_at",
    // When the server deletes the key of this state.
    "expires_at",
    // The sums of all unsettled estimates of the members, in requests and in tokens.
    "estimated_requests",
    "estimated_tokens",
];

/// The names of the numbers of a bucket, in their order: budget (1 requests, 2 tokens), period of the rate in
/// nanoseconds, units that a microsecond brings, units in one request or token, units in a full bucket, units in the
/// largest debt, current balance in units, units withheld from refunds (what would have overflowed the bucket without the unsettled estimates). A unit is a fraction of a request or token,
/// so small that all these numbers are integers. In the stored state, the numbers of all buckets follow those of
/// `STATE`.
const BUCKET: &[&str] = &[
    "budget", "period", "fill", "unit", "capacity", "max_debt", "balance", "withheld",
];

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
        // Lua counts positions from 1.
        _ => format!("{table}[{}]", at + 1),
    };
    let mut elements = Vec::new();
    for (table, names) in [("state", STATE), ("bucket", BUCKET), ("reply", ReplyNumbers::NAMES)] {
        let named = names.iter().enumerate();
        elements.extend(named.map(|(at, name)| (format!("{table}.{name}"), element(table, at))));
    }
    // The longest names are replaced first, because one name may be the beginning of another.
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
             is_probe, user_pause, provider_pause, is_forgiving, batch, fallback_age, member_count, credit_requests, \
             credit_tokens, debit_requests, debit_tokens, fallback_requests, fallback_tokens, estimated_requests, \
             estimated_tokens, lowered, rates, costs, rest = read('<ddddddddddddddddddddddddd')\n\
             reply[13] = state[12] + state[bucket + 3] + state[bucket]"
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
