//! [`UsageReport`]: the token counts that a JSON document reports, in the formats of the large providers.
//!
//! | API | fields |
//! |---|---|
//! | OpenAI chat, Mistral, Groq | `usage` or `x_groq.usage`: `total_tokens`, `prompt_tokens` with `prompt_tokens_details.cached_tokens`, `completion_tokens` with `completion_tokens_details.reasoning_tokens` |
//! | OpenAI responses | `usage` or `response.usage`: `total_tokens`, `input_tokens` with `input_tokens_details`, `output_tokens` with `output_tokens_details` |
//! | Anthropic | `usage` or `message.usage`: `input_tokens`, `cache_creation_input_tokens`, `cache_read_input_tokens`, `output_tokens` |
//! | Gemini | `usageMetadata`: `totalTokenCount`, `promptTokenCount` with `cachedContentTokenCount`, `toolUsePromptTokenCount`, `candidatesTokenCount`, `thoughtsTokenCount` |
//! | Bedrock (Converse) | `usage`: `totalTokens`, `inputTokens`, `cacheWriteInputTokens`, `cacheReadInputTokens`, `outputTokens` |
//!
//! Only these numbers are kept. All other values are skipped while the document is parsed, whatever their types are: a
//! value of an unexpected type does not hide the counts beside it.

use crate::tokens::TokenUsage;
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
    x_groq: ObjectOrNone<Nested>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Nested {
    usage: ObjectOrNone<TokenCounts>,
}

/// What the fields of a usage count. Several providers' names may stand for the same, and a relay may report some of
/// them as 0, so the largest number counts. A value that is not a number counts as absent.
#[derive(Clone, Copy, Debug, Default)]
struct TokenCounts {
    total: Option<u64>,
    input: Option<u64>,
    output: Option<u64>,
    /// Tokens of the prompt that are not among those of `input`, and count: written to the cache, or results of tools.
    further_input: Option<u64>,
    /// Tokens of the prompt that are among those of `input`, and were read from the cache.
    cached: Option<u64>,
    /// Tokens of the prompt that are not among those of `input`, do not count, and were read from the cache.
    uncounted_cached: Option<u64>,
    /// Tokens of the answer that are among those of `output`, and were used for reasoning.
    reasoning: Option<u64>,
    /// Tokens of the answer that are not among those of `output`, and were used for reasoning.
    further_reasoning: Option<u64>,
}

/// The names of the fields of a usage.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(field_identifier)]
enum CountField {
    #[serde(rename = "total_tokens", alias = "totalTokenCount", alias = "totalTokens")]
    Total,
    #[serde(
        rename = "input_tokens",
        alias = "prompt_tokens",
        alias = "promptTokenCount",
        alias = "inputTokens"
    )]
    Input,
    #[serde(
        rename = "output_tokens",
        alias = "completion_tokens",
        alias = "candidatesTokenCount",
        alias = "outputTokens"
    )]
    Output,
    #[serde(
        rename = "cache_creation_input_tokens",
        alias = "cacheWriteInputTokens",
        alias = "toolUsePromptTokenCount"
    )]
    FurtherInput,
    #[serde(rename = "cached_tokens", alias = "cachedContentTokenCount")]
    Cached,
    #[serde(rename = "cache_read_input_tokens", alias = "cacheReadInputTokens")]
    UncountedCached,
    #[serde(rename = "reasoning_tokens")]
    Reasoning,
    #[serde(rename = "thoughtsTokenCount")]
    FurtherReasoning,
    /// An object with numbers that are parts of the numbers beside it.
    #[serde(
        rename = "prompt_tokens_details",
        alias = "completion_tokens_details",
        alias = "input_tokens_details",
        alias = "output_tokens_details"
    )]
    Details,
    #[serde(other)]
    Other,
}

/// A JSON object that holds the [`TokenCounts::cached`] or [`TokenCounts::reasoning`] of the usage around it.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
struct Details {
    cached_tokens: Count,
    reasoning_tokens: Count,
}

/// A number of tokens. Any other JSON value is read as `None`.
#[derive(Clone, Copy, Debug, Default)]
struct Count(Option<u64>);

/// A JSON object that is read as a `T`. Any other JSON value is skipped and read as `None`.
#[derive(Debug)]
struct ObjectOrNone<T>(Option<T>);

/// The token counts that the JSON documents of one response have reported so far. The count in a later document
/// replaces the earlier count: in a stream the counts grow, or are sent once at the end.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct UsageTotals {
    counts: TokenCounts,
    /// What the reader of the user has returned, if no document has reported a usage since then.
    custom: Option<TokenUsage>,
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
            .or_else(|| nested(&self.x_groq))
    }
}

// === impl TokenCounts ===

impl TokenCounts {
    /// Replaces those counts that `later` has, and keeps the others.
    fn update(&mut self, later: &Self) {
        *self = Self {
            total: later.total.or(self.total),
            input: later.input.or(self.input),
            output: later.output.or(self.output),
            further_input: later.further_input.or(self.further_input),
            cached: later.cached.or(self.cached),
            uncounted_cached: later.uncounted_cached.or(self.uncounted_cached),
            reasoning: later.reasoning.or(self.reasoning),
            further_reasoning: later.further_reasoning.or(self.further_reasoning),
        };
    }

    fn usage(&self) -> TokenUsage {
        let input = sum(self.input, self.further_input);
        let mut output = sum(self.output, self.further_reasoning);
        // A total beside which the cache is read may include what does not count.
        let total = self.total.filter(|_| self.uncounted_cached.unwrap_or(0) == 0);
        if let (Some(total), Some(input), Some(tokens)) = (total, input, output) {
            // Some providers count the reasoning in the total only.
            output = Some(tokens.max(total.saturating_sub(input)));
        }
        TokenUsage {
            cached_input: self.cached.max(self.uncounted_cached),
            reasoning: self.reasoning.max(self.further_reasoning),
            total: total.or_else(|| sum(input, output)).or(self.total),
            input,
            output,
        }
    }

    /// Returns where the number of the field is kept. `None` if its value is not a number that is kept.
    fn slot(&mut self, field: CountField) -> Option<&mut Option<u64>> {
        Some(match field {
            CountField::Total => &mut self.total,
            CountField::Input => &mut self.input,
            CountField::Output => &mut self.output,
            CountField::FurtherInput => &mut self.further_input,
            CountField::Cached => &mut self.cached,
            CountField::UncountedCached => &mut self.uncounted_cached,
            CountField::Reasoning => &mut self.reasoning,
            CountField::FurtherReasoning => &mut self.further_reasoning,
            CountField::Details | CountField::Other => return None,
        })
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
                    if let Some(slot) = counts.slot(field) {
                        *slot = map.next_value::<Count>()?.0.max(*slot);
                    } else if matches!(field, CountField::Details) {
                        let ObjectOrNone(details) = map.next_value::<ObjectOrNone<Details>>()?;
                        let details = details.unwrap_or_default();
                        counts.cached = details.cached_tokens.0.max(counts.cached);
                        counts.reasoning = details.reasoning_tokens.0.max(counts.reasoning);
                    } else {
                        map.next_value::<IgnoredAny>()?;
                    }
                }
                Ok(counts)
            }
        }

        deserializer.deserialize_map(Fields)
    }
}

impl<'de> Deserialize<'de> for Count {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Value::deserialize(deserializer).map(|value| Self(value.as_u64()))
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
    /// Returns totals with what the reader of the user has returned.
    pub(super) fn of(usage: TokenUsage) -> Self {
        Self {
            custom: Some(usage),
            ..Self::default()
        }
    }

    /// Replaces those numbers of tokens that `report` contains, and keeps the others.
    pub(super) fn update(&mut self, report: &UsageReport) {
        if let Some(counts) = report.usage() {
            self.custom = None;
            self.counts.update(counts);
        }
    }

    /// Returns the usage that was reported. `None` if no number was reported.
    pub(super) fn usage(&self) -> Option<TokenUsage> {
        let usage = self.custom.unwrap_or_else(|| self.counts.usage());
        usage.counted().map(|_| usage)
    }
}

/// Returns the sum of the numbers that are present, or `None` if both are absent.
fn sum(one: Option<u64>, other: Option<u64>) -> Option<u64> {
    match (one, other) {
        (None, None) => None,
        (one, other) => Some(one.unwrap_or(0).saturating_add(other.unwrap_or(0))),
    }
}
