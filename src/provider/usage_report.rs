//! [`UsageReport`]: the numbers of tokens in a JSON document, in the formats of the large providers.
//!
//! | API | fields |
//! |---|---|
//! | OpenAI chat, Mistral, Groq | `usage.total_tokens`, or `usage.prompt_tokens` and `usage.completion_tokens` |
//! | OpenAI responses | the same under `usage` or `response.usage`, as `input_tokens` and `output_tokens` |
//! | Anthropic | `usage` or `message.usage`: `input_tokens`, `cache_creation_input_tokens`, `output_tokens` |
//! | Gemini | `usageMetadata.totalTokenCount`, or `promptTokenCount` and `candidatesTokenCount` |

use serde::Deserialize;
use serde_json::Value;

/// The usage that one document reports. Other fields are skipped while parsing.
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

/// The numbers of tokens that the documents of one response have reported so far. A later number replaces an earlier
/// one: in a stream the counts grow, or are sent once at the end.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct UsageTotals {
    total: Option<u64>,
    input: Option<u64>,
    output: Option<u64>,
}

impl UsageReport {
    /// Parses a document. A document that is not JSON, or has no usage, is an empty report.
    pub(super) fn read(text: &[u8]) -> Self {
        // Most events of a stream report no usage, and searching for the word is much cheaper than parsing.
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
    /// The total, as user code has read it.
    pub(super) fn of(tokens: u64) -> Self {
        Self {
            total: Some(tokens),
            ..Self::default()
        }
    }

    /// Replaces the numbers that the report has.
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

    /// The reported total, or else the sum of input and output. `None` if no number was reported.
    pub(super) fn tokens(&self) -> Option<u64> {
        self.total.or_else(|| sum(self.input, self.output))
    }
}

/// The sum of the numbers that are there. `None` if there is none.
fn sum(one: Option<u64>, other: Option<u64>) -> Option<u64> {
    match (one, other) {
        (None, None) => None,
        (one, other) => Some(one.unwrap_or(0).saturating_add(other.unwrap_or(0))),
    }
}
