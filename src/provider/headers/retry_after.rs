//! `Retry-After`, and OpenAI's `retry-after-ms`, which is more exact.

use super::{Reader, seconds};
use std::time::Duration;

pub(in crate::provider) fn read(reader: &Reader<'_>) -> Option<Duration> {
    reader.milliseconds("retry-after-ms").or_else(|| {
        reader.parsed("retry-after", |text| {
            seconds(text).or_else(|| {
                let moment = httpdate::parse_http_date(text).ok()?;
                Some(reader.time_until(moment))
            })
        })
    })
}
