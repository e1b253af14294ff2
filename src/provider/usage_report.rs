//! [`UsageReport`]: the token counts that a JSON document reports, in the formats of the large providers.
//!
//! | API | fields |
//! |---|---|
//! | OpenAI chat, Mistral, Groq | `usage.total_tokens`, or `usage.prompt_tokens` and `usage.completion_tokens` |
//! | OpenAI responses | `total_tokens`, or `input_tokens` and `output_tokens`, under `usage` or `response.usage` |
//! | Anthropic | `usage` or `message.usage`: `input_tokens`, `cache_creation_input_tokens`, `output_tokens` |
//! | Gemini | `usageMetadata.totalTokenCount`, or `promptTokenCount` and `candidatesTokenCount` |
//!
//! Only these numbers are kept. All other values are skipped while the document is parsed, whatever their types are: a
//! value of an unexpected type does not hide the counts beside it.

use serde::{
    Deserialize, Deserializer,
    de::{IgnoredAny, MapAccess, SeqAccess, Visitor, value::MapAccessDeserializer},
};
use serde_json::Value;
use std::{fmt, marker::PhantomData, str};

/// The numbers of tokens used that one JSON document reports.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct UsageReport {
    usage: ObjectOrNone<TokenCounts>,
    #[serde(rename = "usageMetadata")]
    usage_metadata: ObjectOrNone<TokenCounts>,
    message: ObjectOrNone<Nested>,
    response: ObjectOrNone<Nested>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Nested {
    usage: ObjectOrNone<TokenCounts>,
}

/// The fields of a usage that are numbers of tokens. A value that is not a number counts as absent.
#[derive(Clone, Copy, Debug, Default)]
struct TokenCounts([Option<u64>; CountField::Other as usize]);

/// The names of the fields of a usage.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(field_identifier)]
enum CountField {
    #[serde(rename = "total_tokens")]
    TotalTokens,
    #[serde(rename = "totalTokenCount")]
    TotalTokenCount,
    #[serde(rename = "input_tokens")]
    InputTokens,
    #[serde(rename = "prompt_tokens")]
    PromptTokens,
    #[serde(rename = "promptTokenCount")]
    PromptTokenCount,
    #[serde(rename = "cache_creation_input_tokens")]
    CacheCreationInputTokens,
    #[serde(rename = "output_tokens")]
    OutputTokens,
    #[serde(rename = "completion_tokens")]
    CompletionTokens,
    #[serde(rename = "candidatesTokenCount")]
    CandidatesTokenCount,
    /// Any other name. Must be the last variant, as its number is the length of [`TokenCounts`].
    #[serde(other)]
    Other,
}

/// A JSON object that is read as a `T`. Any other JSON value is skipped and read as `None`.
#[derive(Debug)]
struct ObjectOrNone<T>(Option<T>);

/// The token counts that the JSON documents of one response have reported so far. The count in a later document
/// replaces the earlier count: in a stream the counts grow, or are sent once at the end.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct UsageTotals {
    total: Option<u64>,
    input: Option<u64>,
    output: Option<u64>,
}

// === impl UsageReport ===

impl UsageReport {
    /// Parses a JSON document. Returns an empty report if the document is not JSON or reports no numbers of tokens.
    pub(super) fn read(text: &[u8]) -> Self {
        // Only a document with the word `usage` is parsed. Most events of a stream report no usage, and searching for
        // the word is much cheaper than parsing. JSON is UTF-8.
        str::from_utf8(text)
            .ok()
            .filter(|text| text.contains("usage"))
            .and_then(|text| serde_json::from_str(text).ok())
            .unwrap_or_default()
    }

    fn usage(&self) -> Option<&TokenCounts> {
        fn nested(nested: &ObjectOrNone<Nested>) -> Option<&TokenCounts> {
            nested.0.as_ref()?.usage.0.as_ref()
        }
        let top_level = self.usage.0.as_ref().or(self.usage_metadata.0.as_ref());
        top_level
            .or_else(|| nested(&self.message))
            .or_else(|| nested(&self.response))
    }
}

// === impl TokenCounts ===

impl TokenCounts {
    /// Returns the first of `fields` that is a number.
    fn first(&self, fields: &[CountField]) -> Option<u64> {
        fields.iter().find_map(|field| self.0[*field as usize])
    }
}

impl<'de> Deserialize<'de> for TokenCounts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;

        impl<'de> Visitor<'de> for Fields {
            type Value = TokenCounts;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object with numbers of tokens")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<TokenCounts, A::Error> {
                let mut counts = TokenCounts::default();
                while let Some(field) = map.next_key::<CountField>()? {
                    match counts.0.get_mut(field as usize) {
                        Some(count) => *count = map.next_value::<Value>()?.as_u64(),
                        None => {
                            map.next_value::<IgnoredAny>()?;
                        }
                    }
                }
                Ok(counts)
            }
        }

        deserializer.deserialize_map(Fields)
    }
}

// === impl ObjectOrNone ===

impl<T> Default for ObjectOrNone<T> {
    fn default() -> Self {
        Self(None)
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for ObjectOrNone<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AnyValue<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for AnyValue<T> {
            type Value = Option<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("any value")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Option<T>, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map)).map(Some)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Option<T>, A::Error> {
                IgnoredAny.visit_seq(seq).map(|_| None)
            }

            fn visit_bool<E>(self, _: bool) -> Result<Option<T>, E> {
                Ok(None)
            }

            fn visit_i64<E>(self, _: i64) -> Result<Option<T>, E> {
                Ok(None)
            }

            fn visit_u64<E>(self, _: u64) -> Result<Option<T>, E> {
                Ok(None)
            }

            fn visit_f64<E>(self, _: f64) -> Result<Option<T>, E> {
                Ok(None)
            }

            fn visit_str<E>(self, _: &str) -> Result<Option<T>, E> {
                Ok(None)
            }

            fn visit_unit<E>(self) -> Result<Option<T>, E> {
                Ok(None)
            }
        }

        deserializer.deserialize_any(AnyValue(PhantomData)).map(Self)
    }
}

// === impl UsageTotals ===

impl UsageTotals {
    /// Returns totals with the number of tokens that the `read` function of user code has returned.
    pub(super) fn of(tokens: u64) -> Self {
        Self {
            total: Some(tokens),
            ..Self::default()
        }
    }

    /// Replaces those numbers of tokens that `report` contains, and keeps the others.
    pub(super) fn update(&mut self, report: &UsageReport) {
        use CountField as Field;
        let Some(usage) = report.usage() else { return };
        let input = sum(
            usage.first(&[Field::InputTokens, Field::PromptTokens, Field::PromptTokenCount]),
            usage.first(&[Field::CacheCreationInputTokens]),
        );
        let output = [
            Field::OutputTokens,
            Field::CompletionTokens,
            Field::CandidatesTokenCount,
        ];
        self.total = usage
            .first(&[Field::TotalTokens, Field::TotalTokenCount])
            .or(self.total);
        self.input = input.or(self.input);
        self.output = usage.first(&output).or(self.output);
    }

    /// Returns the reported total of tokens, or else the sum of input and output tokens. `None` if no number was
    /// reported.
    pub(super) fn tokens(&self) -> Option<u64> {
        self.total.or_else(|| sum(self.input, self.output))
    }
}

/// Returns the sum of the numbers that are present, or `None` if both are absent.
fn sum(one: Option<u64>, other: Option<u64>) -> Option<u64> {
    match (one, other) {
        (None, None) => None,
        (one, other) => Some(one.unwrap_or(0).saturating_add(other.unwrap_or(0))),
    }
}
