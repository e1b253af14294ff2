//! Header maps for serde: a text for each name, or a list of them where a name stands several times.

use http::{HeaderMap, HeaderName, HeaderValue};
use serde::{Deserialize, Deserializer, Serializer, de::Error, ser::SerializeMap};
use std::{borrow::Cow, collections::BTreeMap};

#[derive(Deserialize)]
#[serde(untagged)]
enum Values {
    One(String),
    Many(Vec<String>),
}

pub(super) fn serialize<S: Serializer>(headers: &HeaderMap, serializer: S) -> Result<S::Ok, S::Error> {
    let mut map = serializer.serialize_map(Some(headers.keys_len()))?;
    for name in headers.keys() {
        let values: Vec<Cow<'_, str>> = headers
            .get_all(name)
            .iter()
            .map(|value| String::from_utf8_lossy(value.as_bytes()))
            .collect();
        match values.as_slice() {
            [one] => map.serialize_entry(name.as_str(), one)?,
            many => map.serialize_entry(name.as_str(), many)?,
        }
    }
    map.end()
}

pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<HeaderMap, D::Error> {
    let mut headers = HeaderMap::new();
    for (name, values) in BTreeMap::<String, Values>::deserialize(deserializer)? {
        let name: HeaderName = name.parse().map_err(D::Error::custom)?;
        let values = match values {
            Values::One(value) => vec![value],
            Values::Many(values) => values,
        };
        for value in values {
            headers.append(
                &name,
                HeaderValue::from_bytes(value.as_bytes()).map_err(D::Error::custom)?,
            );
        }
    }
    Ok(headers)
}
