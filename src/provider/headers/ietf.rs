//! The IETF's rate-limit fields ([draft
//! 10](https://datatracker.ietf.org/doc/html/draft-ietf-httpapi-ratelimit-headers-10)), which have changed from draft
//! to draft. Servers use the fields of all these drafts:
//!
//! | draft | fields |
//! |---|---|
//! | 02 to 06 | `RateLimit-Limit: 100, 100;w=60`, `RateLimit-Remaining: 50`, `RateLimit-Reset: 30`, `RateLimit-Policy: 100;w=60` |
//! | 07 | `RateLimit: limit=100, remaining=50, reset=30` |
//! | 08 to 10 | `RateLimit-Policy: "name";q=100;w=60` and `RateLimit: "name";r=50;t=30` |

use super::Reader;
use crate::provider::info::{Reset, Unit, Window};
use http::HeaderName;
use sfv::{BareItem, Dictionary, FieldType, Item, List, ListEntry, Parameters, Parser};
use std::time::Duration;

static LIMIT: HeaderName = HeaderName::from_static("ratelimit-limit");
static REMAINING: HeaderName = HeaderName::from_static("ratelimit-remaining");
static RESET: HeaderName = HeaderName::from_static("ratelimit-reset");
static POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");
static RATE_LIMIT: HeaderName = HeaderName::from_static("ratelimit");

/// The maximum number of limits that are read from one response. Real responses have a few limits. Without a bound, a
/// hostile response could make the list of limits very long.
const MAX_WINDOWS: usize = 16;

pub(in crate::provider) fn read(reader: &Reader<'_>, windows: &mut Vec<Window>) {
    let policies = items(reader, &POLICY);
    let named = items_or_none(reader, &RATE_LIMIT);
    match named {
        Some(limits) if !limits.is_empty() => read_named(&policies, &limits, windows),
        _ if reader.headers().contains_key(&RATE_LIMIT) => read_dictionary(reader, &policies, windows),
        _ if reader.headers().contains_key(&REMAINING) => read_separate_fields(reader, &policies, windows),
        // No field reports what remains of the limits. The policies are read nevertheless, for the amounts and periods
        // of the limits.
        _ => read_named(&policies, &[], windows),
    }
    windows.truncate(MAX_WINDOWS);
}

/// Reads the fields of drafts 08 to 10, in which an item of `RateLimit-Policy` and an item of `RateLimit` with the same
/// name describe one limit.
fn read_named(policies: &[Item], limits: &[Item], windows: &mut Vec<Window>) {
    let is_of = |limit: &Item, policy: &Item| is_same_name(&limit.bare_item, &policy.bare_item);
    for policy in policies.iter().take(MAX_WINDOWS) {
        let limit = limits.iter().find(|limit| is_of(limit, policy));
        if let Some(window) = window_of_policy(policy) {
            with_limit(window, limit).add_to(windows);
        }
    }
    for limit in limits.iter().take(MAX_WINDOWS) {
        if !policies.iter().any(|policy| is_of(limit, policy)) {
            with_limit(Window::new(Unit::Requests, None), Some(limit)).add_to(windows);
        }
    }
}

/// Adds the remaining amount and the reset time of an item of the field `RateLimit` to `window`.
fn with_limit(window: Window, limit: Option<&Item>) -> Window {
    let number = |key| number(&limit?.params, key);
    Window {
        remaining: number("r"),
        reset: number("t").map(more),
        ..window
    }
}

/// Reads the fields of draft 07, in which `RateLimit` is a dictionary that describes one limit, and policies have no
/// names.
fn read_dictionary(reader: &Reader<'_>, policies: &[Item], windows: &mut Vec<Window>) {
    let Some(dictionary) = parsed::<Dictionary>(reader, &RATE_LIMIT) else {
        return;
    };
    let number = |key: &str| match dictionary.get(key) {
        Some(ListEntry::Item(item)) => integer(&item.bare_item),
        _ => None,
    };
    let limit = number("limit");
    let window = Window {
        limit,
        remaining: number("remaining"),
        reset: number("reset").map(more),
        ..Window::new(Unit::Requests, period_of(policies, limit))
    };
    window.add_to(windows);
}

/// Reads the fields of drafts 02 to 06, in which a limit has three fields. In `RateLimit-Limit`, policies may follow
/// the amount of the limit.
fn read_separate_fields(reader: &Reader<'_>, policies: &[Item], windows: &mut Vec<Window>) {
    let limits = items(reader, &LIMIT);
    let limit = limits.first().and_then(|item| integer(&item.bare_item));
    let policies = if policies.is_empty() {
        limits.get(1..).unwrap_or_default()
    } else {
        policies
    };
    let window = Window {
        limit,
        remaining: reader.number(&REMAINING),
        reset: reader.seconds(&RESET).map(Reset::More),
        ..Window::new(Unit::Requests, period_of(policies, limit))
    };
    window.add_to(windows);
}

/// Returns the limit that a policy describes, or `None` if the policy counts something other than requests or tokens
/// (`content-bytes`, `concurrent-requests`).
fn window_of_policy(policy: &Item) -> Option<Window> {
    let params = &policy.params;
    let unit = match params
        .get("qu")
        .map(|unit| unit.as_string().map(sfv::StringRef::as_str))
    {
        None | Some(Some("requests")) => Unit::Requests,
        Some(Some("tokens")) => Unit::Tokens,
        Some(_) => return None,
    };
    // Up to draft 07, the item of a policy is itself the amount of the limit. Later drafts have the amount in the
    // parameter `q`.
    let limit = number(params, "q").or_else(|| integer(&policy.bare_item));
    Some(Window {
        limit,
        ..Window::new(unit, period(params))
    })
}

/// Returns the period of the policy whose amount is `limit`. If no policy has this amount but there is exactly one
/// policy, returns the period of that one.
fn period_of(policies: &[Item], limit: Option<u64>) -> Option<Duration> {
    let same = policies.iter().find(|policy| integer(&policy.bare_item) == limit);
    let only = policies.first().filter(|_| policies.len() == 1);
    same.or(only).and_then(|policy| period(&policy.params))
}

/// Returns the parameter `w` of a policy: its period in seconds. Zero is not a period.
fn period(params: &Parameters) -> Option<Duration> {
    number(params, "w")
        .filter(|seconds| *seconds > 0)
        .map(Duration::from_secs)
}

fn more(seconds: u64) -> Reset {
    Reset::More(Duration::from_secs(seconds))
}

/// Returns a parameter of an item if it is an integer of zero or more.
fn number(params: &Parameters, key: &str) -> Option<u64> {
    integer(params.get(key)?)
}

fn integer(item: &BareItem) -> Option<u64> {
    u64::try_from(i64::from(item.as_integer()?)).ok()
}

/// Returns whether two items of a list have the same name. A name may be written as a quoted string or as a bare word
/// (a "token" of RFC 9651).
fn is_same_name(one: &BareItem, other: &BareItem) -> bool {
    match (name(one), name(other)) {
        (Some(one), Some(other)) => one == other,
        _ => one == other,
    }
}

fn name(item: &BareItem) -> Option<&str> {
    let token = || item.as_token().map(sfv::TokenRef::as_str);
    item.as_string().map(sfv::StringRef::as_str).or_else(token)
}

/// Returns the items of a header field that is a list, without inner lists. A field that is not a list is marked as
/// malformed.
fn items(reader: &Reader<'_>, name: &'static HeaderName) -> Vec<Item> {
    let items = items_or_none(reader, name);
    if items.is_none() && reader.headers().contains_key(name) {
        reader.mark_malformed(name);
    }
    items.unwrap_or_default()
}

/// Returns the items of a header field that is a list, without inner lists. Returns `None` if the field is absent or is
/// not a list.
fn items_or_none(reader: &Reader<'_>, name: &'static HeaderName) -> Option<Vec<Item>> {
    let value = reader.headers().get(name)?;
    let list: List = Parser::new(value.as_bytes()).parse().ok()?;
    let items = list.into_iter().filter_map(|entry| match entry {
        ListEntry::Item(item) => Some(item),
        ListEntry::InnerList(_) => None,
    });
    Some(items.collect())
}

fn parsed<T: FieldType>(reader: &Reader<'_>, name: &'static HeaderName) -> Option<T> {
    let value = reader.headers().get(name)?;
    let parsed = Parser::new(value.as_bytes()).parse().ok();
    if parsed.is_none() {
        reader.mark_malformed(name);
    }
    parsed
}
