//! [`Outline`]: a JSON value, reduced to what tells an answer from an error.

use serde::de::{Deserialize, DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use std::fmt;

/// A JSON value, reduced to what tells an answer from an error: the fields in [`FIELDS`], down to [`MAX_DEPTH`] levels,
/// with the beginnings of their texts and lists. All other values are skipped while the document is parsed, so that
/// the outline of a document of many megabytes is small.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Outline {
    Null,
    Flag(bool),
    Number(f64),
    Text(String),
    List(Vec<Self>),
    Object(Fields),
    /// A value that is not null, below the deepest level.
    Skipped,
}

/// The fields of a JSON object.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Fields {
    known: Vec<(&'static str, Outline)>,
    /// Whether the object has fields that are not in [`FIELDS`] and not null.
    has_others: bool,
}

/// Reads an outline of the levels that are left.
#[derive(Clone, Copy)]
struct Levels(u8);

/// The name of a field: one of [`FIELDS`], or `None` for any other.
struct FieldName(Option<&'static str>);

/// The fields that are kept. An outline of a document without them has no fields.
const FIELDS: [&str; 30] = [
    "candidates",
    "choices",
    "code",
    "content",
    "data",
    "documents",
    "done",
    "embedding",
    "embeddings",
    "error",
    "errors",
    "finishReason",
    "finish_reason",
    "generated_text",
    "index",
    "message",
    "object",
    "ok",
    "output",
    "output_text",
    "outputs",
    "predictions",
    "promptFeedback",
    "response",
    "result",
    "results",
    "status",
    "success",
    "text",
    "type",
];

/// The levels of objects and lists that are kept. The deepest value that is looked at is the message of an error in a
/// choice in a list: four levels below the document.
const MAX_DEPTH: u8 = 6;
/// The longest text that is kept, in bytes. The 300 characters of a message that are shown have up to 1,200; some
/// secrets are only recognized by what follows them, such as a password by the `@` after it.
const MAX_TEXT: usize = 4_000;
/// The elements of a list that are kept: the first ones, and the last one in the place of the last of them.
const MAX_ELEMENTS: usize = 64;

// === impl Outline ===

impl Outline {
    /// Parses a JSON document. The whole document is checked to be JSON.
    pub(super) fn read(text: &str) -> serde_json::Result<Self> {
        let mut document = serde_json::Deserializer::from_str(text);
        let outline = Levels(MAX_DEPTH).deserialize(&mut document)?;
        document.end()?;
        Ok(outline)
    }

    /// Returns a field of an object, if the object has it and it is not null.
    pub(super) fn get(&self, name: &str) -> Option<&Self> {
        let Self::Object(fields) = self else { return None };
        let found = fields.known.iter().find(|(known, _)| *known == name);
        found.map(|(_, value)| value).filter(|value| **value != Self::Null)
    }

    /// Returns whether this is an object with one field, which is not null.
    pub(super) fn has_only(&self, name: &str) -> bool {
        matches!(self, Self::Object(fields) if fields.known.len() == 1 && !fields.has_others)
            && self.get(name).is_some()
    }

    /// Returns whether an object has a field that is null.
    pub(super) fn has_null(&self, name: &str) -> bool {
        let Self::Object(fields) = self else { return false };
        fields
            .known
            .iter()
            .any(|(known, value)| *known == name && *value == Self::Null)
    }

    /// Returns the text in a field of an object, unless it is empty.
    pub(super) fn text(&self, name: &str) -> Option<&str> {
        self.get(name)?.as_text().filter(|text| !text.is_empty())
    }

    pub(super) fn as_text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }

    pub(super) fn elements(&self) -> &[Self] {
        match self {
            Self::List(elements) => elements,
            _ => &[],
        }
    }

    /// Returns whether the value holds something: it is neither null, false, zero nor empty. An object whose fields are
    /// all null is empty, such as the `error` of OpenAI's fine-tuning jobs.
    pub(super) fn is_something(&self) -> bool {
        match self {
            Self::Null => false,
            Self::Flag(flag) => *flag,
            Self::Number(number) => *number != 0.0,
            Self::Text(text) => !text.is_empty(),
            Self::List(elements) => !elements.is_empty(),
            Self::Object(fields) => fields.has_others || fields.known.iter().any(|(_, value)| *value != Self::Null),
            Self::Skipped => true,
        }
    }
}

// === impl Levels ===

impl<'de> DeserializeSeed<'de> for Levels {
    type Value = Outline;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Outline, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Levels {
    type Value = Outline;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_unit<E: Error>(self) -> Result<Outline, E> {
        Ok(Outline::Null)
    }

    fn visit_bool<E: Error>(self, flag: bool) -> Result<Outline, E> {
        Ok(Outline::Flag(flag))
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<Outline, E> {
        Ok(Outline::Number(number as f64))
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<Outline, E> {
        Ok(Outline::Number(number as f64))
    }

    fn visit_f64<E: Error>(self, number: f64) -> Result<Outline, E> {
        Ok(Outline::Number(number))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Outline, E> {
        let mut end = text.len().min(MAX_TEXT);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        Ok(Outline::Text(text[..end].to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Outline, A::Error> {
        let Some(below) = self.0.checked_sub(1) else {
            IgnoredAny.visit_seq(seq)?;
            return Ok(Outline::Skipped);
        };
        let mut elements = Vec::new();
        while let Some(element) = seq.next_element_seed(Self(below))? {
            if elements.len() == MAX_ELEMENTS {
                elements.pop();
            }
            elements.push(element);
        }
        Ok(Outline::List(elements))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Outline, A::Error> {
        let Some(below) = self.0.checked_sub(1) else {
            IgnoredAny.visit_map(map)?;
            return Ok(Outline::Skipped);
        };
        let mut fields = Fields::default();
        while let Some(FieldName(name)) = map.next_key()? {
            match name {
                Some(name) => {
                    // If a name is there twice, the last one counts, as for most parsers. So an outline has each name
                    // once, however often a document has it.
                    fields.known.retain(|(known, _)| *known != name);
                    fields.known.push((name, map.next_value_seed(Self(below))?));
                }
                None => fields.has_others |= map.next_value::<Option<IgnoredAny>>()?.is_some(),
            }
        }
        Ok(Outline::Object(fields))
    }
}

// === impl FieldName ===

impl<'de> Deserialize<'de> for FieldName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Name;

        impl Visitor<'_> for Name {
            type Value = FieldName;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the name of a field")
            }

            fn visit_str<E: Error>(self, name: &str) -> Result<FieldName, E> {
                Ok(FieldName(FIELDS.into_iter().find(|field| *field == name)))
            }
        }

        deserializer.deserialize_str(Name)
    }
}
