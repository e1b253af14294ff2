//! [`Reader`]: the headers of a response as numbers, times and flags. What is malformed counts as not sent.
//!
//! Each family of headers has a file with functions `read…(&Reader, &mut Vec<Window>)`. To add a provider: add its
//! function here, in the file of the family whose names it uses or in a new one, a variant of
//! [`Provider`](super::Provider) in `dialect.rs`, and its literal headers as a test in `tests/feedback.rs`.

pub(super) mod anthropic;
pub(super) mod github;
pub(super) mod ietf;
pub(super) mod openai;

use http::HeaderMap;
use std::{
    cell::Cell,
    time::{Duration, SystemTime},
};

/// The headers of one response.
pub(in crate::provider) struct Reader<'a> {
    headers: &'a HeaderMap,
    /// The server's clock if the response has a `Date`, so that its dates are read by the clock that wrote them.
    now: SystemTime,
    /// The name of the first header that was malformed.
    malformed: Cell<Option<&'static str>>,
}

/// The bound for all times that are read: 366 days. Longer ones are cut to it, also those that do not fit a `Duration`.
const MAX_DURATION: Duration = Duration::from_secs(366 * 24 * 60 * 60);

// === impl Reader ===

impl<'a> Reader<'a> {
    pub(in crate::provider) fn new(headers: &'a HeaderMap, now: SystemTime) -> Self {
        let reader = Self {
            headers,
            now,
            malformed: Cell::new(None),
        };
        let date = reader.parsed("date", |text| httpdate::parse_http_date(text).ok());
        Self {
            now: date.unwrap_or(now),
            ..reader
        }
    }

    pub(in crate::provider) const fn headers(&self) -> &'a HeaderMap {
        self.headers
    }

    pub(in crate::provider) fn mark_malformed(&self, name: &'static str) {
        if self.malformed.get().is_none() {
            self.malformed.set(Some(name));
        }
    }

    /// Logs the name of the first malformed header, once per response. The value may be confidential and is not logged.
    pub(in crate::provider) fn log_malformed(&self) {
        if let Some(header) = self.malformed.get() {
            tracing::debug!(target: "tower_outbound", header, "Ignored a rate-limit header that could not be parsed");
        }
    }

    /// The value of the first header of this name, if it can be parsed.
    pub(in crate::provider) fn parsed<T>(
        &self,
        name: &'static str,
        parse: impl FnOnce(&str) -> Option<T>,
    ) -> Option<T> {
        let value = self.headers.get(name)?;
        let parsed = value.to_str().ok().and_then(|text| parse(text.trim()));
        if parsed.is_none() {
            self.mark_malformed(name);
        }
        parsed
    }

    /// A number. `-1`, which Azure sends for an unknown number, is `None` without being malformed.
    pub(in crate::provider) fn number(&self, name: &'static str) -> Option<u64> {
        self.parsed(name, |text| match text {
            "-1" => Some(None),
            _ => parse_number(text).map(Some),
        })?
    }

    /// `true` or `false`, in any case.
    pub(in crate::provider) fn flag(&self, name: &'static str) -> Option<bool> {
        self.parsed(name, |text| match text {
            _ if text.eq_ignore_ascii_case("true") => Some(true),
            _ if text.eq_ignore_ascii_case("false") => Some(false),
            _ => None,
        })
    }

    /// A duration as Go writes it (`6m0s`, `2m59.56s`, `12ms`), or a number of seconds.
    pub(in crate::provider) fn duration(&self, name: &'static str) -> Option<Duration> {
        self.parsed(name, |text| parse_seconds(text).or_else(|| parse_go_duration(text)))
    }

    pub(in crate::provider) fn seconds(&self, name: &'static str) -> Option<Duration> {
        self.parsed(name, parse_seconds)
    }

    /// The delay before the next attempt: OpenAI's `retry-after-ms`, which is more exact, or else `Retry-After`
    /// ([RFC 9110](https://www.rfc-editor.org/rfc/rfc9110#field.retry-after)): seconds or a date.
    pub(in crate::provider) fn retry_after(&self) -> Option<Duration> {
        let millis = self.parsed("retry-after-ms", |text| Some(parse_seconds(text)? / 1_000));
        millis.or_else(|| {
            self.parsed("retry-after", |text| {
                parse_seconds(text).or_else(|| Some(self.time_until(httpdate::parse_http_date(text).ok()?)))
            })
        })
    }

    /// The time until a date as RFC 3339 writes it.
    pub(in crate::provider) fn time_until_rfc3339(&self, name: &'static str) -> Option<Duration> {
        let date = self.parsed(name, |text| text.parse::<jiff::Timestamp>().ok())?;
        Some(self.time_until(date.into()))
    }

    /// The time until a date in seconds since 1970.
    pub(in crate::provider) fn time_until_epoch_seconds(&self, name: &'static str) -> Option<Duration> {
        let seconds = self.number(name)?;
        let date = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds));
        Some(date.map_or(MAX_DURATION, |date| self.time_until(date)))
    }

    /// The time until a date; zero if it has passed.
    fn time_until(&self, date: SystemTime) -> Duration {
        date.duration_since(self.now).unwrap_or_default().min(MAX_DURATION)
    }
}

// === Parsing ===

/// A number of ASCII digits only: no sign, no fraction.
fn parse_number(text: &str) -> Option<u64> {
    let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    is_number.then(|| text.parse().ok()).flatten()
}

/// A number of seconds, optionally with a fraction. Some servers send one although RFC 9110 does not allow it.
fn parse_seconds(text: &str) -> Option<Duration> {
    let is_number = text.starts_with(|first: char| first.is_ascii_digit())
        && text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    let seconds: f64 = is_number.then(|| text.parse().ok()).flatten()?;
    Some(
        Duration::try_from_secs_f64(seconds)
            .unwrap_or(MAX_DURATION)
            .min(MAX_DURATION),
    )
}

/// A duration as Go writes it: `10h17m5.7s`.
pub(crate) fn parse_go_duration(text: &str) -> Option<Duration> {
    let duration: jiff::SignedDuration = text.parse().ok()?;
    Duration::try_from(duration)
        .ok()
        .map(|duration| duration.min(MAX_DURATION))
}
