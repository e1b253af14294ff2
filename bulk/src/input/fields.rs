//! The fields of a JSON object as they are written, so that what is sent is what the line holds.

use serde::{
    Deserialize, Deserializer,
    de::{IgnoredAny, MapAccess, Visitor},
};
use serde_json::value::RawValue;
use std::{borrow::Cow, fmt, ops::Range};

/// The fields of an object in their order. Names are without escapes, values as they are written.
pub(crate) struct Fields<'a> {
    text: &'a str,
    fields: Vec<(Cow<'a, str>, &'a RawValue)>,
}

impl<'a> Fields<'a> {
    /// Parses an object.
    ///
    /// # Errors
    ///
    /// What is wrong with the text if it is no JSON object, and where.
    pub(crate) fn parse(text: &'a str) -> Result<Self, String> {
        if !text.starts_with('{') && serde_json::from_str::<IgnoredAny>(text).is_ok() {
            return Err("not a JSON object".into());
        }
        let Map(fields) = serde_json::from_str(text).map_err(|error| {
            let reason = error.to_string();
            // The parser sees a single line, so the line number in its error is always 1 and is cut off.
            let reason = reason.split(" at line ").next().unwrap_or_default();
            format!("{reason}, at column {}", error.column())
        })?;
        Ok(Self { text, fields })
    }

    /// Returns the value of a field; the last one if there are several.
    pub(crate) fn get(&self, name: &str) -> Option<&'a RawValue> {
        let found = self.fields.iter().rev().find(|(field, _)| field == name);
        found.map(|(_, value)| *value)
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.fields.iter().map(|(name, _)| &**name)
    }

    /// Returns the range of a value in the text.
    pub(super) fn range_of(&self, value: &RawValue) -> Range<usize> {
        // The value is a part of the text, which `parse` has borrowed it from.
        let start = value.get().as_ptr().addr() - self.text.as_ptr().addr();
        start..start + value.get().len()
    }

    /// Returns the text without the fields for which `is_cut` returns true. All other bytes stay as they are. `None` if
    /// there is no such field.
    pub(super) fn without(&self, is_cut: impl Fn(&str) -> bool) -> Option<Vec<u8>> {
        if !self.names().any(&is_cut) {
            return None;
        }
        let mut kept = Vec::with_capacity(self.text.len());
        // The end of the value before the field; at first, the opening brace.
        let mut end = 1;
        let mut is_first = true;
        kept.push(b'{');
        for (name, value) in &self.fields {
            // From the end of the value before to the end of this value: a comma, if it is not the first field, the
            // name, and the value.
            let mut field = &self.text[end..self.range_of(value).end];
            end = self.range_of(value).end;
            if is_cut(name) {
                continue;
            }
            if is_first {
                let without_comma = field.trim_start().strip_prefix(',');
                field = without_comma.map_or(field, str::trim_start);
            }
            is_first = false;
            kept.extend_from_slice(field.as_bytes());
        }
        kept.extend_from_slice(&self.text.as_bytes()[end..]);
        Some(kept)
    }
}

struct Map<'a>(Vec<(Cow<'a, str>, &'a RawValue)>);

#[derive(Deserialize)]
struct Name<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'de> Deserialize<'de> for Map<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;

        impl<'de> Visitor<'de> for Fields {
            type Value = Map<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut fields = Vec::new();
                while let Some(Name(name)) = map.next_key()? {
                    fields.push((name, map.next_value()?));
                }
                Ok(Map(fields))
            }
        }

        deserializer.deserialize_map(Fields)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(text: &str) -> String {
        let fields = Fields::parse(text).unwrap();
        let kept = fields.without(|name| name == "id" || name == "meta");
        kept.map_or_else(|| text.to_owned(), |kept| String::from_utf8(kept).unwrap())
    }

    #[test]
    fn a_field_is_cut_out_and_all_other_bytes_stay() {
        for (text, expected) in [
            (r#"{"z": 1, "a": 1e0}"#, r#"{"z": 1, "a": 1e0}"#),
            (r#"{"id": 1, "z": 1.0 , "a":[ ]}"#, r#"{"z": 1.0 , "a":[ ]}"#),
            (r#"{ "z": 1, "id" : {"a":[1]}, "a": 2 }"#, r#"{ "z": 1, "a": 2 }"#),
            (r#"{"z":1 , "id":"x"}"#, r#"{"z":1}"#),
            (r#"{"id":1}"#, "{}"),
            (r#"{"id":1,"meta":2, "z":3,"id":4,"z":5}"#, r#"{"z":3,"z":5}"#),
            (
                r#"{"\u0069d":1,"big":123456789012345678901234567890}"#,
                r#"{"big":123456789012345678901234567890}"#,
            ),
        ] {
            assert_eq!(cut(text), expected);
        }
    }

    #[test]
    fn the_last_of_several_fields_of_a_name_counts() {
        let text = r#"{"a":1,"b":2,"a": 3}"#;
        let fields = Fields::parse(text).unwrap();
        assert_eq!(fields.get("a").unwrap().get(), "3");
        assert_eq!(&text[fields.range_of(fields.get("b").unwrap())], "2");
    }
}
