//! Times as RFC 3339 texts, for serde.

use serde::{Deserialize, Deserializer, Serializer, de::Error, ser};
use std::time::SystemTime;

/// The last second of the year 9999. Nothing later, and nothing before 1970, can be snapshot in such a text.
const LAST_SECOND: u64 = 253_402_300_799;

pub(super) fn serialize<S: Serializer>(time: &SystemTime, serializer: S) -> Result<S::Ok, S::Error> {
    let since = time.duration_since(SystemTime::UNIX_EPOCH);
    if !since.is_ok_and(|since| since.as_secs() <= LAST_SECOND) {
        return Err(ser::Error::custom(
            "a time before 1970 or after 9999 cannot be snapshot",
        ));
    }
    serializer.collect_str(&humantime::format_rfc3339_nanos(*time))
}

pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<SystemTime, D::Error> {
    let text = String::deserialize(deserializer)?;
    humantime::parse_rfc3339(&text).map_err(D::Error::custom)
}

pub(super) mod option {
    use super::{Deserialize, Deserializer, Serializer, SystemTime};

    pub(in super::super) fn serialize<S: Serializer>(
        time: &Option<SystemTime>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match time {
            Some(time) => super::serialize(time, serializer),
            None => serializer.serialize_none(),
        }
    }

    pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<SystemTime>, D::Error> {
        let text = Option::<String>::deserialize(deserializer)?;
        text.map(|text| humantime::parse_rfc3339(&text).map_err(serde::de::Error::custom))
            .transpose()
    }
}
