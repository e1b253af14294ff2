//! [GitHub's](https://docs.github.com/en/rest/using-the-rest-api/rate-limits-for-the-rest-api) headers,
//! `x-ratelimit-limit` and so on. The limit is by the hour, and all of it is back at `x-ratelimit-reset`.

use super::Reader;
use crate::provider::{Reset, Unit, Window};
use std::time::Duration;

pub(in crate::provider) fn read(reader: &Reader<'_>, windows: &mut Vec<Window>) {
    let window = Window {
        limit: reader.number("x-ratelimit-limit"),
        remaining: reader.number("x-ratelimit-remaining"),
        reset: reader.until_epoch("x-ratelimit-reset").map(Reset::Full),
        ..Window::new(Unit::Requests, Some(Duration::from_secs(60 * 60)))
    };
    window.add_to(windows);
}
