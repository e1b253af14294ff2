//! [`Report`]: the numbers of tokens in a JSON document, in the shapes of the large providers.
//!
//! | whose | where |
//! |---|---|
//! | OpenAI chat, Mistral, Groq | `usage.total_tokens`, or `usage.prompt_tokens` and `usage.completion_tokens` |
//! | OpenAI responses | the same under `usage` or `response.usage`, as `input_tokens` and `output_tokens` |
//! | Anthropic | `usage` or `message.usage`: `input_tokens`, `cache_creation_input_tokens`, `output_tokens` |
//! | Gemini | `usageMetadata.totalTokenCount`, or `promptTokenCount` and `candidatesTokenCount` |

use serde::Deserialize;
use serde_json::Value;

/// What one document says. Everything else in it is skipped.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Report {
    usage: Option<Value>,
    #[serde(rename = "usageMetadata")]
    usage_metadata: Option<Value>,
    message: Option<Inner>,
    response: Option<Inner>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Inner {
    usage: Option<Value>,
}

/// What the documents of one response have said so far: later ones are right.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Reported {
    total: Option<u64>,
    input: Option<u64>,
    output: Option<u64>,
}

impl Report {
    /// Nothing, if it is none.
    pub(super) fn read(text: &[u8]) -> Self {
        // Most events of a stream have none.
        let worth = text.windows(5).any(|word| word == b"usage");
        if worth {
            serde_json::from_slice(text).unwrap_or_default()
        } else {
            Self::default()
        }
    }

    fn usage(&self) -> Option<&Value> {
        fn inner(inner: Option<&Inner>) -> Option<&Value> {
            inner.and_then(|inner| inner.usage.as_ref())
        }
        let own = self.usage.as_ref().or(self.usage_metadata.as_ref());
        own.or_else(|| inner(self.message.as_ref()))
            .or_else(|| inner(self.response.as_ref()))
    }
}

impl Reported {
    pub(super) fn total(tokens: u64) -> Self {
        Self {
            total: Some(tokens),
            ..Self::default()
        }
    }

    pub(super) fn add(&mut self, report: &Report) {
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

    pub(super) fn tokens(&self) -> Option<u64> {
        self.total.or_else(|| sum(self.input, self.output))
    }
}

/// Of what there is.
fn sum(one: Option<u64>, other: Option<u64>) -> Option<u64> {
    match (one, other) {
        (None, None) => None,
        (one, other) => Some(one.unwrap_or(0).saturating_add(other.unwrap_or(0))),
    }
}
