//! [`UsageReport`]: the token counts that a JSON document reports, in the formats of the large providers.
//!
//! | API | fields |
//! |---|---|
//! | OpenAI chat, Mistral, Groq | `usage.total_tokens`, or `usage.prompt_tokens` and `usage.completion_tokens` |
//! | OpenAI responses | `total_tokens`, or `input_tokens` and `output_tokens`, under `usage` or `response.usage` |
//! | Anthropic | `usage` or `message.usage`: `input_tokens`, `cache_creation_input_tokens`, `output_tokens` |
//! | Gemini | `usageMetadata.totalTokenCount`, or `promptTokenCount` and `candidatesTokenCount` |

use serde::Deserialize;
use serde_json::Value;

/// The numbers of tokens used that one JSON document reports. The other fields of the document are skipped while
/// parsing.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct UsageReport {
    usage: Option<Value>,
    #[serde(rename = "usageMetadata")]
    usage_metadata: Option<Value>,
    message: Option<Nested>,
    response: Option<Nested>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Nested {
    usage: Option<Value>,
}

/// The token counts that the JSON documents of one response have reported so far. The count in a later document
/// replaces the earlier count: in a stream the counts grow, or are sent once at the end.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct UsageTotals {
    total: Option<u64>,
    input: Option<u64>,
    output: Option<u64>,
}

impl UsageReport {
    /// Parses a JSON document. Returns an empty report if the document is not JSON or reports no numbers of tokens.
    pub(super) fn read(text: &[u8]) -> Self {
        // Only a document with the word `usage` is parsed. Most events of a stream report no usage, and searching for
        // the word is much cheaper than parsing.
        let mentions_usage = text.windows(5).any(|word| word == b"usage");
        if mentions_usage {
            serde_json::from_slice(text).unwrap_or_default()
        } else {
            Self::default()
        }
    }

    fn usage(&self) -> Option<&Value> {
        fn nested(nested: Option<&Nested>) -> Option<&Value> {
            nested.and_then(|nested| nested.usage.as_ref())
        }
        let top_level = self.usage.as_ref().or(self.usage_metadata.as_ref());
        top_level
            .or_else(|| nested(self.message.as_ref()))
            .or_else(|| nested(self.response.as_ref()))
    }
}

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
        let Some(usage) = report.usage() else { return };
        let number = |names: &[&str]| names.iter().find_map(|name| usage.get(name)?.as_u64());
        let input = sum(
            number(&["input_tokens", "prompt_tokens", "promptTokenCount"]),
            number(&["cache_creation_input_tokens"]),
        );
        self.total = number(&["total_tokens", "totalTokenCount"]).or(self.total);
        self.input = input.or(self.input);
        self.output = number(&["output_tokens", "completion_tokens", "candidatesTokenCount"]).or(self.output);
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
