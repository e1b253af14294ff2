//! [`Reader`]: reads the headers of a response as numbers, times and flags. A malformed header counts as not sent.
//!
//! Each family of header names has a file with functions `read…(&Reader, &mut Vec<Window>)`. To add a provider, add its
//! function to the file of the family whose names it uses, or to a new file; a variant of [`Provider`](super::Provider)
//! in `dialect.rs`; and its literal headers as a test in `tests/feedback.rs`.

pub(super) mod anthropic;
pub(super) mod github;
pub(super) mod ietf;
pub(super) mod openai;

use http::{HeaderMap, HeaderName, header};
use std::{
    cell::{Cell, OnceCell},
    time::{Duration, SystemTime},
};

/// Reads the headers of one response, and remembers whether one was malformed.
pub(in crate::provider) struct Reader<'a> {
    headers: &'a HeaderMap,
    /// The time on the client's clock.
    now: SystemTime,
    /// The time that dates in the headers are compared with, read when the first of them is: see
    /// [`server_now`](Self::server_now).
    server_now: OnceCell<SystemTime>,
    /// The name of the first malformed header of the response.
    malformed: Cell<Option<&'static str>>,
}

// The names that are read for every provider. Names are parsed when the program is compiled, and not for each response.
static RETRY_AFTER_MS: HeaderName = HeaderName::from_static("retry-after-ms");
static SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

/// The upper bound of all times in headers: 366 days. Longer times, also those that do not fit into a `Duration`, are
/// cut to this bound.
const MAX_DURATION: Duration = Duration::from_secs(366 * 24 * 60 * 60);

// === impl Reader ===

impl<'a> Reader<'a> {
    pub(in crate::provider) const fn new(headers: &'a HeaderMap, now: SystemTime) -> Self {
        Self {
            headers,
            now,
            server_now: OnceCell::new(),
            malformed: Cell::new(None),
        }
    }

    pub(in crate::provider) const fn headers(&self) -> &'a HeaderMap {
        self.headers
    }

    pub(in crate::provider) fn mark_malformed(&self, name: &'static HeaderName) {
        if self.malformed.get().is_none() {
            self.malformed.set(Some(name.as_str()));
        }
    }

    /// Logs the name of the first malformed header, once per response. The value of a header may be confidential and is
    /// not logged.
    pub(in crate::provider) fn log_malformed(&self) {
        if let Some(header) = self.malformed.get() {
            tracing::debug!(target: "tower_outbound", header, "Ignored a rate-limit header that could not be parsed");
        }
    }

    /// Parses the value of the first header called `name`. Returns `None` if the header is absent or malformed.
    pub(in crate::provider) fn parsed<T>(
        &self,
        name: &'static HeaderName,
        parse: impl FnOnce(&str) -> Option<T>,
    ) -> Option<T> {
        let value = self.headers.get(name)?;
        let parsed = value.to_str().ok().and_then(|text| parse(text.trim_ascii()));
        if parsed.is_none() {
            self.mark_malformed(name);
        }
        parsed
    }

    /// Reads a header that is a number. `-1`, which Azure sends for an unknown number, is `None` without being
    /// malformed.
    pub(in crate::provider) fn number(&self, name: &'static HeaderName) -> Option<u64> {
        self.parsed(name, |text| match text {
            "-1" => Some(None),
            _ => parse_number(text).map(Some),
        })?
    }

    /// Returns whether another attempt is of use, in the opinion of the server: `x-should-retry`.
    pub(in crate::provider) fn should_retry(&self) -> Option<bool> {
        self.flag(&SHOULD_RETRY)
    }

    /// Reads a header that is `true` or `false`, in upper or lower case.
    fn flag(&self, name: &'static HeaderName) -> Option<bool> {
        self.parsed(name, |text| match text {
            _ if text.eq_ignore_ascii_case("true") => Some(true),
            _ if text.eq_ignore_ascii_case("false") => Some(false),
            _ => None,
        })
    }

    /// Reads a header that is a duration in Go's format (`6m0s`, `2m59.56s`, `12ms`), or a number of seconds.
    pub(in crate::provider) fn duration(&self, name: &'static HeaderName) -> Option<Duration> {
        self.parsed(name, |text| parse_seconds(text).or_else(|| parse_go_duration(text)))
    }

    pub(in crate::provider) fn seconds(&self, name: &'static HeaderName) -> Option<Duration> {
        self.parsed(name, parse_seconds)
    }

    /// Returns the delay before the next attempt that the server requests: OpenAI's `retry-after-ms`, which is more
    /// exact, or else `Retry-After` ([RFC 9110](https://www.rfc-editor.org/rfc/rfc9110#field.retry-after)), which is a
    /// number of seconds or a date.
    pub(in crate::provider) fn retry_after(&self) -> Option<Duration> {
        let millis = self.parsed(&RETRY_AFTER_MS, |text| Some(parse_seconds(text)? / 1_000));
        millis.or_else(|| {
            self.parsed(&header::RETRY_AFTER, |text| {
                parse_seconds(text).or_else(|| Some(self.time_until(httpdate::parse_http_date(text).ok()?)))
            })
        })
    }

    /// Reads a header that is a date in the format of RFC 3339, and returns the time until that date.
    pub(in crate::provider) fn time_until_rfc3339(&self, name: &'static HeaderName) -> Option<Duration> {
        let date = self.parsed(name, |text| text.parse::<jiff::Timestamp>().ok())?;
        Some(self.time_until(date.into()))
    }

    /// Reads a header that is a date as a number of seconds since 1970, and returns the time until that date.
    pub(in crate::provider) fn time_until_epoch_seconds(&self, name: &'static HeaderName) -> Option<Duration> {
        let seconds = self.number(name)?;
        let date = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds));
        Some(date.map_or(MAX_DURATION, |date| self.time_until(date)))
    }

    /// Returns the time until `date`, or zero if the date has passed.
    fn time_until(&self, date: SystemTime) -> Duration {
        date.duration_since(self.server_now())
            .unwrap_or_default()
            .min(MAX_DURATION)
    }

    /// Returns the `Date` of the response if it has one, so that dates are compared with the clock of the server that
    /// wrote them, or else the time on the client's clock.
    fn server_now(&self) -> SystemTime {
        *self.server_now.get_or_init(|| {
            let date = self.parsed(&header::DATE, |text| httpdate::parse_http_date(text).ok());
            date.unwrap_or(self.now)
        })
    }
}

// === Parsing ===

/// Parses a number that has only ASCII digits: no sign, no fraction.
fn parse_number(text: &str) -> Option<u64> {
    let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    is_number.then(|| text.parse().ok()).flatten()
}

/// Parses a number of seconds, optionally with a fraction: some servers send `Retry-After` with a fraction, although
/// RFC 9110 does not allow that.
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

/// Parses a duration in Go's format: `10h17m5.7s`.
pub(crate) fn parse_go_duration(text: &str) -> Option<Duration> {
    let duration: jiff::SignedDuration = text.parse().ok()?;
    Duration::try_from(duration)
        .ok()
        .map(|duration| duration.min(MAX_DURATION))
}
