//! GitHub's headers ([rate limits](https://docs.github.com/en/rest/using-the-rest-api/rate-limits-for-the-rest-api)):
//! `x-ratelimit-limit` and so on. The limit is per hour, and its whole amount is available again at the time in
//! `x-ratelimit-reset`, in seconds since 1970.

use super::Reader;
use crate::provider::info::{Reset, Unit, Window};
use std::time::Duration;

pub(in crate::provider) fn read(reader: &Reader<'_>, windows: &mut Vec<Window>) {
    let window = Window {
        limit: reader.number("x-ratelimit-limit"),
        remaining: reader.number("x-ratelimit-remaining"),
        reset: reader.time_until_epoch_seconds("x-ratelimit-reset").map(Reset::Full),
        ..Window::new(Unit::Requests, Some(Duration::from_secs(60 * 60)))
    };
    window.add_to(windows);
}
