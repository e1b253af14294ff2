//! The IETF's fields, which have changed from draft to draft.
//!
//! | draft | fields |
//! |---|---|
//! | 02 to 06 | `RateLimit-Limit: 100, 100;w=60`, `RateLimit-Remaining: 50`, `RateLimit-Reset: 30`, `RateLimit-Policy: 100;w=60` |
//! | 07 | `RateLimit: limit=100, remaining=50, reset=30` |
//! | 08 to 10 | `RateLimit-Policy: "name";q=100;w=60` and `RateLimit: "name";r=50;t=30` |

use super::Reader;
use crate::provider::{Reset, Unit, Window};
use sfv::{BareItem, Dictionary, FieldType, Item, List, ListEntry, Parameters, Parser};
use std::time::Duration;

const LIMIT: &str = "ratelimit-limit";
const POLICY: &str = "ratelimit-policy";
const RATE_LIMIT: &str = "ratelimit";

/// A response has no more than a few of them.
const MOST_WINDOWS: usize = 16;

pub(in crate::provider) fn read(reader: &Reader<'_>, windows: &mut Vec<Window>) {
    let policies = items(reader, POLICY);
    let named = items_or_none(reader, RATE_LIMIT);
    match named {
        Some(limits) if !limits.is_empty() => read_named(&policies, &limits, windows),
        _ if reader.headers().contains_key(RATE_LIMIT) => read_dictionary(reader, &policies, windows),
        _ if reader.headers().contains_key("ratelimit-remaining") => read_three(reader, &policies, windows),
        // Policies alone say what the limits are.
        _ => read_named(&policies, &[], windows),
    }
    windows.truncate(MOST_WINDOWS);
}

/// From draft 08 on: the items of both fields belong together by their names.
fn read_named(policies: &[Item], limits: &[Item], windows: &mut Vec<Window>) {
    let is_of = |limit: &Item, policy: &Item| is_same(&limit.bare_item, &policy.bare_item);
    for policy in policies.iter().take(MOST_WINDOWS) {
        let limit = limits.iter().find(|limit| is_of(limit, policy));
        if let Some(window) = window_of_policy(policy) {
            with_limit(window, limit).add_to(windows);
        }
    }
    for limit in limits.iter().take(MOST_WINDOWS) {
        if !policies.iter().any(|policy| is_of(limit, policy)) {
            with_limit(Window::new(Unit::Requests, None), Some(limit)).add_to(windows);
        }
    }
}

fn with_limit(window: Window, limit: Option<&Item>) -> Window {
    let number = |key| number(&limit?.params, key);
    Window {
        remaining: number("r"),
        reset: number("t").map(more),
        ..window
    }
}

/// Draft 07.
fn read_dictionary(reader: &Reader<'_>, policies: &[Item], windows: &mut Vec<Window>) {
    let Some(dictionary) = parsed::<Dictionary>(reader, RATE_LIMIT) else {
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

/// Drafts 02 to 06. The limit may be followed by policies.
fn read_three(reader: &Reader<'_>, policies: &[Item], windows: &mut Vec<Window>) {
    let limits = items(reader, LIMIT);
    let limit = limits.first().and_then(|item| integer(&item.bare_item));
    let policies = if policies.is_empty() {
        limits.get(1..).unwrap_or_default()
    } else {
        policies
    };
    let window = Window {
        limit,
        remaining: reader.number("ratelimit-remaining"),
        reset: reader.seconds("ratelimit-reset").map(Reset::More),
        ..Window::new(Unit::Requests, period_of(policies, limit))
    };
    window.add_to(windows);
}

/// `None` if it counts something else.
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
    // In old drafts the item itself is the quota.
    let limit = number(params, "q").or_else(|| integer(&policy.bare_item));
    Some(Window {
        limit,
        ..Window::new(unit, period(params))
    })
}

/// The period of the policy with this quota; or of the only one.
fn period_of(policies: &[Item], limit: Option<u64>) -> Option<Duration> {
    let same = policies.iter().find(|policy| integer(&policy.bare_item) == limit);
    let only = policies.first().filter(|_| policies.len() == 1);
    same.or(only).and_then(|policy| period(&policy.params))
}

fn period(params: &Parameters) -> Option<Duration> {
    number(params, "w")
        .filter(|seconds| *seconds > 0)
        .map(Duration::from_secs)
}

fn more(seconds: u64) -> Reset {
    Reset::More(Duration::from_secs(seconds))
}

fn number(params: &Parameters, key: &str) -> Option<u64> {
    integer(params.get(key)?)
}

fn integer(item: &BareItem) -> Option<u64> {
    u64::try_from(i64::from(item.as_integer()?)).ok()
}

/// A name may be written as a string or as a token.
fn is_same(one: &BareItem, other: &BareItem) -> bool {
    match (name(one), name(other)) {
        (Some(one), Some(other)) => one == other,
        _ => one == other,
    }
}

fn name(item: &BareItem) -> Option<&str> {
    let token = || item.as_token().map(sfv::TokenRef::as_str);
    item.as_string().map(sfv::StringRef::as_str).or_else(token)
}

/// The items of a list; those that are lists themselves are left out.
fn items(reader: &Reader<'_>, name: &'static str) -> Vec<Item> {
    let items = items_or_none(reader, name);
    if items.is_none() && reader.headers().contains_key(name) {
        reader.is_malformed(name);
    }
    items.unwrap_or_default()
}

fn items_or_none(reader: &Reader<'_>, name: &'static str) -> Option<Vec<Item>> {
    let value = reader.headers().get(name)?;
    let list: List = Parser::new(value.as_bytes()).parse().ok()?;
    let items = list.into_iter().filter_map(|entry| match entry {
        ListEntry::Item(item) => Some(item),
        ListEntry::InnerList(_) => None,
    });
    Some(items.collect())
}

fn parsed<T: FieldType>(reader: &Reader<'_>, name: &'static str) -> Option<T> {
    let value = reader.headers().get(name)?;
    let parsed = Parser::new(value.as_bytes()).parse().ok();
    if parsed.is_none() {
        reader.is_malformed(name);
    }
    parsed
}
