//! The Lua script that the server runs: `read_state.lua` and then `reserve.lua`, in which names are replaced by positions
//! in lists.
//!
//! Lua reads an element of a list by its position faster than a field of a table by its name, and the stored state, the
//! requests and the replies are lists anyway. So the script is written with names such as `state.clock` and loaded with
//! positions such as `state[4]`, which are generated from the lists of names.

use super::wire::{AMOUNT_LISTS, ReplyNumbers, RequestNumbers};
use std::{cmp::Reverse, sync::LazyLock};

/// The version of the layout of the stored state. The state begins with it, and so does each reply. Another layout needs
/// another version: a member that finds the state of another version under the key of its quota changes nothing, and
/// rejects its calls with an error that names both.
pub(super) const VERSION: i64 = 4;

/// The version of the first release with shared limits, which kept its state under a key of its own:
/// [`FIRST_KEY`].
const FIRST_VERSION: i64 = 2;

/// The last part of the name of the key of the stored state. It is the same in all later releases, so that members of
/// two releases find each other's state.
pub(super) const STATE_KEY: &str = "state";

/// The last part of the name of the key of the first release.
pub(super) const FIRST_KEY: &str = "v2";

/// The script as it is loaded into the server. Its text is the same in all processes with the same version of this
/// crate, so the server compiles and caches it once.
pub(super) static SCRIPT: LazyLock<String> =
    LazyLock::new(|| generate(concat!(include_str!("read_state.lua"), include_str!("reserve.lua"))));

/// The names of the numbers that the stored state of a quota begins with, in their order. Times are in microseconds
/// since 1970.
const STATE: &[&str] = &[
    // The version of the layout, which is the first number in all versions.
    "version",
    // The number of rates of the quota. Each rate has one bucket.
    "rates",
    // The number of budgets that the rates have.
    "budgets",
    // The number of special kinds: of rates that refuse calls, are strict or count by the calendar.
    "kinds",
    // The length in bytes of the names of the budgets.
    "names_length",
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
    // How many members were given less than they have demand for; those that have been given all since are counted until
    // the script looks for members to remove.
    "wanting",
    // Until when a cost that has to wait for longer than the script reserves ahead keeps its place at the head of all
    // members, and when it is expected to be admitted.
    "claimed_until",
    "claim_at",
]; // The sum of the unsettled estimates of all members follows, a number for each budget.

/// The names of the numbers of a bucket, in their order: position of the budget in the list of names, period of the rate in
/// nanoseconds (less than 0 if it is a window of the calendar), units that a microsecond brings, units in one request or token, units in a full bucket, units in the
/// largest debt, current balance in units, units withheld from refunds (what would have overflowed the bucket without the unsettled estimates). A unit is a fraction of a request or token,
/// so small that all these numbers are integers. In the stored state, the numbers of all buckets follow those of
/// `STATE` and the estimates.
const BUCKET: &[&str] = &[
    "budget", "period", "fill", "unit", "capacity", "max_debt", "balance", "withheld",
];

/// The names of the numbers of what makes a bucket special, in their order. In the stored state, they follow the numbers of
/// all buckets. Buckets that fill continuously, make calls wait and catch up have no such numbers, and cost nothing for
/// them.
const KIND: &[&str] = &[
    // The position of the bucket's first number in the state.
    "bucket",
    // 1 if a call whose cost the bucket does not hold is refused, otherwise 0.
    "refuses",
    // Of a strict rate: the units that it brings in the time by which a reservation may be used late. Otherwise 0.
    "lost_late",
    // How many days or months of the calendar a window has: 1 of one of them, or 0 of both if the bucket fills
    // continuously.
    "days",
    "months",
    // How long after midnight UTC a window begins.
    "start",
    // When the present window ends, in microseconds since 1970; 0 if the bucket fills continuously.
    "ends",
    // What was left of the present window when this state began, as far as is known: a member that has seen that a lost
    // state had less left lowers the bucket by the difference.
    "began_with",
];

/// The names of the numbers in the entry of a member, in their order. Its unsettled estimates of each budget follow.
const ENTRY: &[&str] = &[
    // When the member sent its last request.
    "seen_at",
    // The number of its last batch of corrections.
    "batch",
    // Up to when the member was given its part of the schedule.
    "served_until",
    // Until when the member counts as one with more demand than it was given.
    "wants_until",
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
        ("STATE_ZEROS", vec!["0"; STATE.len()].join(", ")),
        ("ESTIMATED +", format!("{} +", STATE.len())),
        ("AMOUNT_LISTS", AMOUNT_LISTS.to_string()),
        ("FIRST_VERSION", FIRST_VERSION.to_string()),
        ("VERSION", VERSION.to_string()),
        ("ENTRY_ZEROS", vec!["0"; ENTRY.len()].join(", ")),
        ("ENTRY_NUMBERS", ENTRY.len().to_string()),
        ("BUCKET_LENGTH", BUCKET.len().to_string()),
        ("KIND_LENGTH", KIND.len().to_string()),
    ];
    let element = |table: &str, at: usize| match (table, at) {
        ("bucket" | "kind", 0) => format!("state[{table}]"),
        ("bucket" | "kind", _) => format!("state[{table} + {at}]"),
        // Lua counts positions from 1.
        _ => format!("{table}[{}]", at + 1),
    };
    let mut elements = Vec::new();
    let tables = [
        ("state", STATE),
        ("bucket", BUCKET),
        ("kind", KIND),
        ("entry", ENTRY),
        ("reply", ReplyNumbers::NAMES),
    ];
    for (table, names) in tables {
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
            "local max_ahead, ahead, lead, incarnation, sequence, last_reservation, config_version, is_change, is_leaving, \
             is_probe, user_pause, provider_pause, is_forgiving, batch, fallback_age, member_count, lowered, rates, \
             budgets, kinds, costs, is_backlogged, rest = \
             read('<dddddddddddddddddddddd')\n\
             reply[13] = state[16] + state[bucket + 3] + state[bucket]"
        );
    }

    #[test]
    fn the_script_uses_no_name_that_is_in_no_list() {
        for table in ["state.", "bucket.", "kind.", "entry.", "reply."] {
            let unknown = SCRIPT
                .split(table)
                .skip(1)
                .find(|rest| rest.starts_with(|first: char| first.is_ascii_lowercase()));
            assert_eq!(unknown.and_then(|rest| rest.lines().next()), None, "{table}");
        }
    }
}
