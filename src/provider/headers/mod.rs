//! [`Reader`]: headers as numbers, times and flags. What is malformed says nothing, and is remembered by its name.

pub(super) mod anthropic;
pub(super) mod github;
pub(super) mod ietf;
pub(super) mod openai;
pub(super) mod retry_after;

use http::HeaderMap;
use std::{
    cell::Cell,
    time::{Duration, SystemTime},
};

/// The headers of one response.
pub(in crate::provider) struct Reader<'a> {
    headers: &'a HeaderMap,
    now: SystemTime,
    /// The first header that was malformed.
    malformed: Cell<Option<&'static str>>,
}

/// Whatever is said to take longer is said to take this long.
const MOST: Duration = Duration::from_secs(366 * 24 * 60 * 60);

impl<'a> Reader<'a> {
    pub(in crate::provider) fn new(headers: &'a HeaderMap, now: SystemTime) -> Self {
        let reader = Self {
            headers,
            now,
            malformed: Cell::new(None),
        };
        // The server's clock, by which it tells the time.
        let date = reader.parsed("date", |text| httpdate::parse_http_date(text).ok());
        Self {
            now: date.unwrap_or(now),
            ..reader
        }
    }

    pub(in crate::provider) const fn headers(&self) -> &'a HeaderMap {
        self.headers
    }

    pub(in crate::provider) fn is_malformed(&self, name: &'static str) {
        if self.malformed.get().is_none() {
            self.malformed.set(Some(name));
        }
    }

    /// Once for each response, and never the value.
    pub(in crate::provider) fn tell(&self) {
        if let Some(header) = self.malformed.get() {
            tracing::debug!(target: "tower_outbound", header, "ignored a header that could not be read");
        }
    }

    /// The value of the first header of this name, if it can be read.
    pub(in crate::provider) fn parsed<T>(
        &self,
        name: &'static str,
        parse: impl FnOnce(&str) -> Option<T>,
    ) -> Option<T> {
        let value = self.headers.get(name)?;
        let parsed = value.to_str().ok().and_then(|text| parse(text.trim()));
        if parsed.is_none() {
            self.is_malformed(name);
        }
        parsed
    }

    /// `-1` says that it is not known.
    pub(in crate::provider) fn number(&self, name: &'static str) -> Option<u64> {
        self.parsed(name, |text| match text {
            "-1" => Some(None),
            _ => number(text).map(Some),
        })?
    }

    pub(in crate::provider) fn flag(&self, name: &'static str) -> Option<bool> {
        self.parsed(name, |text| match text {
            _ if text.eq_ignore_ascii_case("true") => Some(true),
            _ if text.eq_ignore_ascii_case("false") => Some(false),
            _ => None,
        })
    }

    /// `6m0s`, `2m59.56s`, `12ms`; or a number of seconds.
    pub(in crate::provider) fn duration(&self, name: &'static str) -> Option<Duration> {
        self.parsed(name, |text| seconds(text).or_else(|| duration(text)))
    }

    pub(in crate::provider) fn seconds(&self, name: &'static str) -> Option<Duration> {
        self.parsed(name, seconds)
    }

    pub(in crate::provider) fn milliseconds(&self, name: &'static str) -> Option<Duration> {
        self.parsed(name, |text| Some(seconds(text)? / 1_000))
    }

    /// How long until a moment in the form of RFC 3339.
    pub(in crate::provider) fn until(&self, name: &'static str) -> Option<Duration> {
        let moment = self.parsed(name, |text| text.parse::<jiff::Timestamp>().ok())?;
        Some(self.time_until(moment.into()))
    }

    /// How long until a moment in seconds since 1970.
    pub(in crate::provider) fn until_epoch(&self, name: &'static str) -> Option<Duration> {
        let seconds = self.number(name)?;
        let moment = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds));
        Some(moment.map_or(MOST, |moment| self.time_until(moment)))
    }

    /// How long until a moment: nothing, if it has passed.
    pub(in crate::provider) fn time_until(&self, moment: SystemTime) -> Duration {
        moment.duration_since(self.now).unwrap_or_default().min(MOST)
    }
}

/// Digits, and nothing else.
pub(in crate::provider) fn number(text: &str) -> Option<u64> {
    let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    is_number.then(|| text.parse().ok()).flatten()
}

/// A number of seconds, with a fraction perhaps.
pub(in crate::provider) fn seconds(text: &str) -> Option<Duration> {
    let is_number = text.starts_with(|first: char| first.is_ascii_digit())
        && text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    let seconds: f64 = is_number.then(|| text.parse().ok()).flatten()?;
    Some(Duration::try_from_secs_f64(seconds).unwrap_or(MOST).min(MOST))
}

/// As Go writes it.
pub(crate) fn duration(text: &str) -> Option<Duration> {
    let duration: jiff::SignedDuration = text.parse().ok()?;
    Duration::try_from(duration).ok().map(|duration| duration.min(MOST))
}
