//! GitHub's headers ([rate limits](https://docs.github.com/en/rest/using-the-rest-api/rate-limits-for-the-rest-api)):
//! `x-ratelimit-limit` and so on. The limit is per hour, and its whole amount is available again at the time in
//! `x-ratelimit-reset`, in seconds since 1970.

use super::Reader;
use crate::provider::info::{RateLimitInfo, Reset, Unit, Window};
use http::HeaderName;
use std::time::Duration;

static LIMIT: HeaderName = HeaderName::from_static("x-ratelimit-limit");
static REMAINING: HeaderName = HeaderName::from_static("x-ratelimit-remaining");
static RESET: HeaderName = HeaderName::from_static("x-ratelimit-reset");

/// Reads GitHub's headers. If nothing of the limit remains, [no request may be
/// made](https://docs.github.com/en/rest/using-the-rest-api/rate-limits-for-the-rest-api#exceeding-the-rate-limit)
/// before the limit is reset, unless a `retry-after` says otherwise: so the time of the reset is the delay that the
/// server requests.
pub(in crate::provider) fn read(reader: &Reader<'_>, info: &mut RateLimitInfo) {
    let window = Window {
        limit: reader.number(&LIMIT),
        remaining: reader.number(&REMAINING),
        reset: reader.time_until_epoch_seconds(&RESET).map(Reset::Full),
        ..Window::new(Unit::Requests, Some(Duration::from_secs(60 * 60)))
    };
    if let (Some(0), Some(Reset::Full(reset))) = (window.remaining, window.reset) {
        info.retry_after.get_or_insert(reset);
    }
    window.add_to(&mut info.windows);
}
