//! [`Usage`]: the tokens that an answer reports, apart by their price.
//!
//! | API | input | cached | output |
//! |---|---|---|---|
//! | OpenAI chat, Mistral, Groq | `prompt_tokens`, which include the cached | `prompt_tokens_details.cached_tokens` | `completion_tokens` |
//! | LiteLLM's proxy | `prompt_tokens`, which include the cached and the written | `prompt_tokens_details.cached_tokens` | `completion_tokens` |
//! | OpenAI responses | `input_tokens`, which include the cached | `input_tokens_details.cached_tokens` | `output_tokens` |
//! | Anthropic | `input_tokens`, without the cached and the written | `cache_read_input_tokens` | `output_tokens` |
//! | Gemini | `promptTokenCount`, which include the cached, and `toolUsePromptTokenCount` | `cachedContentTokenCount` | `candidatesTokenCount` and `thoughtsTokenCount` |
//!
//! The library reads usage, too, to settle what was charged to the limits; there, the kinds of tokens are added up.

use serde_json::Value;

/// The numbers of tokens that an answer reports, by their price.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Usage {
    /// Input tokens at the full price.
    pub(super) input: u64,
    /// Input tokens that were read from the provider's cache.
    pub(super) cached: u64,
    /// Input tokens that were written to the provider's cache for five minutes.
    pub(super) written: u64,
    pub(super) written_for_an_hour: u64,
    pub(super) output: u64,
}

impl Usage {
    /// Reads the usage of a whole body: a JSON document, an array of documents as Gemini streams them, or server-sent
    /// events. A later document of a stream replaces the numbers that an earlier one reported.
    pub(super) fn of_body(body: &[u8]) -> Option<Self> {
        // Most bodies without usage are not parsed: searching is much cheaper.
        if !mentions_usage(body) {
            return None;
        }
        let mut numbers = Numbers::default();
        match serde_json::from_slice::<Value>(body) {
            Ok(Value::Array(documents)) => documents.iter().for_each(|document| numbers.read(document)),
            Ok(document) => numbers.read(&document),
            Err(_) => {
                let events = body.split(|byte| *byte == b'\n');
                for event in events.filter(|event| mentions_usage(event)) {
                    let data = event.strip_prefix(b"data:").unwrap_or(event);
                    if let Ok(document) = serde_json::from_slice(data) {
                        numbers.read(&document);
                    }
                }
            }
        }
        numbers.usage()
    }
}

/// The numbers that the documents of one answer report under the names of their APIs.
#[derive(Default)]
struct Numbers {
    /// OpenAI's and Gemini's number of input tokens, which includes the cached and the written.
    input_with_cached: Option<u64>,
    /// Anthropic's number of input tokens, which does not.
    input_alone: Option<u64>,
    cached: Option<u64>,
    written: Option<u64>,
    written_for_an_hour: Option<u64>,
    output: Option<u64>,
}

impl Numbers {
    fn read(&mut self, document: &Value) {
        let places = ["/usage", "/usageMetadata", "/message/usage", "/response/usage"];
        let mut found = places.iter().filter_map(|place| document.pointer(place));
        let Some(usage) = found.find(|usage| usage.is_object()) else {
            return;
        };
        let number = |names: &[&str]| names.iter().find_map(|name| usage.pointer(name)?.as_u64());
        let update = |known: &mut Option<u64>, new: Option<u64>| *known = new.or(*known);

        // A proxy reports the fields of Anthropic beside those of OpenAI, whose meaning they do not change.
        let is_anthropic = usage.get("prompt_tokens").is_none() && has_form_of_anthropic(usage, document);
        let input = number(&["/prompt_tokens", "/input_tokens", "/promptTokenCount"]);
        if is_anthropic {
            update(&mut self.input_alone, input);
        } else {
            let by_tools = number(&["/toolUsePromptTokenCount"]).unwrap_or(0);
            update(
                &mut self.input_with_cached,
                input.map(|input| input.saturating_add(by_tools)),
            );
        }
        let cached = [
            "/prompt_tokens_details/cached_tokens",
            "/input_tokens_details/cached_tokens",
            "/cache_read_input_tokens",
            "/cachedContentTokenCount",
        ];
        update(&mut self.cached, number(&cached));
        update(&mut self.written, number(&["/cache_creation_input_tokens"]));
        let for_an_hour = number(&["/cache_creation/ephemeral_1h_input_tokens"]);
        update(&mut self.written_for_an_hour, for_an_hour);
        let output = number(&["/completion_tokens", "/output_tokens", "/candidatesTokenCount"]);
        let thoughts = number(&["/thoughtsTokenCount"]);
        if output.is_some() || thoughts.is_some() {
            self.output = Some(output.unwrap_or(0).saturating_add(thoughts.unwrap_or(0)));
        }
    }

    fn usage(self) -> Option<Usage> {
        if self.input_alone.is_none() && self.input_with_cached.is_none() && self.output.is_none() {
            return None;
        }
        let cached = self.cached.unwrap_or(0);
        let for_an_hour = self.written_for_an_hour.unwrap_or(0);
        let written = self.written.unwrap_or(0);
        let from_cache = cached.saturating_add(written);
        let without_cached = self.input_with_cached.unwrap_or(0).saturating_sub(from_cache);
        Some(Usage {
            input: self.input_alone.unwrap_or(without_cached),
            cached,
            written: written.saturating_sub(for_an_hour),
            written_for_an_hour: for_an_hour,
            output: self.output.unwrap_or(0),
        })
    }
}

fn has_form_of_anthropic(usage: &Value, document: &Value) -> bool {
    usage.get("cache_read_input_tokens").is_some()
        || usage.get("cache_creation_input_tokens").is_some()
        || document.get("type").is_some_and(|kind| kind == "message")
        || document.get("message").is_some()
}

/// Returns the most output tokens that a request allows, times the number of answers it asks for; 0 if its body sets no
/// bound.
pub(super) fn max_output(body: &[u8]) -> u64 {
    let Ok(body) = serde_json::from_slice::<Value>(body) else {
        return 0;
    };
    let number = |names: &[&str]| names.iter().find_map(|name| body.pointer(name)?.as_u64());
    let bound = number(&[
        "/max_completion_tokens",
        "/max_tokens",
        "/max_output_tokens",
        "/max_tokens_to_sample",
        "/generationConfig/maxOutputTokens",
        "/generation_config/max_output_tokens",
    ]);
    let answers = number(&["/n", "/generationConfig/candidateCount"]).unwrap_or(1).max(1);
    bound.unwrap_or(0).saturating_mul(answers)
}

fn mentions_usage(text: &[u8]) -> bool {
    text.windows(5).any(|word| word == b"usage")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage(input: u64, cached: u64, output: u64) -> Option<Usage> {
        Some(Usage {
            input,
            cached,
            output,
            ..Usage::default()
        })
    }

    #[test]
    fn cached_tokens_are_taken_from_the_input_where_it_includes_them() {
        for body in [
            r#"{"usage":{"prompt_tokens":100,"completion_tokens":7,"total_tokens":107,"prompt_tokens_details":{"cached_tokens":60}}}"#,
            r#"{"object":"response","usage":{"input_tokens":100,"input_tokens_details":{"cached_tokens":60},"output_tokens":7}}"#,
            r#"{"usageMetadata":{"promptTokenCount":90,"toolUsePromptTokenCount":10,"cachedContentTokenCount":60,"candidatesTokenCount":3,"thoughtsTokenCount":4}}"#,
            r#"{"type":"message","usage":{"input_tokens":40,"cache_read_input_tokens":60,"output_tokens":7}}"#,
        ] {
            assert_eq!(Usage::of_body(body.as_bytes()), usage(40, 60, 7), "{body}");
        }
    }

    #[test]
    fn a_proxy_that_reports_the_fields_of_two_apis_counts_no_token_twice() {
        let body = r#"{"object":"chat.completion","usage":{"prompt_tokens":100,"completion_tokens":7,"total_tokens":107,
            "prompt_tokens_details":{"cached_tokens":60},"cache_read_input_tokens":60,"cache_creation_input_tokens":10}}"#;
        let expected = Usage {
            input: 30,
            cached: 60,
            written: 10,
            output: 7,
            ..Usage::default()
        };
        assert_eq!(Usage::of_body(body.as_bytes()), Some(expected));
    }

    #[test]
    fn writes_to_the_cache_are_apart_by_their_time() {
        let body = r#"{"type":"message","usage":{"input_tokens":1,"cache_creation_input_tokens":30,"cache_read_input_tokens":0,
            "cache_creation":{"ephemeral_5m_input_tokens":20,"ephemeral_1h_input_tokens":10},"output_tokens":2}}"#;
        let expected = Usage {
            input: 1,
            written: 20,
            written_for_an_hour: 10,
            output: 2,
            ..Usage::default()
        };
        assert_eq!(Usage::of_body(body.as_bytes()), Some(expected));
    }

    #[test]
    fn the_last_numbers_of_a_stream_count() {
        let anthropic = "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"usage\":{\"input_tokens\":25,\"output_tokens\":1}}}\n\n\
             event: message_delta\ndata: {\"type\":\"message_delta\",\"usage\":{\"output_tokens\":15}}\n\n";
        assert_eq!(Usage::of_body(anthropic.as_bytes()), usage(25, 0, 15));
        let openai = "data: {\"choices\":[],\"usage\":null}\r\n\r\n\
             data: {\"choices\":[],\"usage\":{\"prompt_tokens\":9,\"completion_tokens\":2}}\r\n\r\ndata: [DONE]\r\n\r\n";
        assert_eq!(Usage::of_body(openai.as_bytes()), usage(9, 0, 2));
        let gemini = r#"[{"usageMetadata":{"promptTokenCount":4}},{"usageMetadata":{"promptTokenCount":4,"candidatesTokenCount":8}}]"#;
        assert_eq!(Usage::of_body(gemini.as_bytes()), usage(4, 0, 8));
    }

    #[test]
    fn an_answer_without_numbers_has_no_usage() {
        for body in ["", "usage", r#"{"usage":{}}"#, r#"{"usage":null}"#, r#"{"choices":[]}"#] {
            assert_eq!(Usage::of_body(body.as_bytes()), None, "{body}");
        }
    }

    #[test]
    fn the_most_output_is_that_of_every_answer_asked_for() {
        assert_eq!(max_output(br#"{"max_tokens":64,"n":3}"#), 192);
        assert_eq!(max_output(br#"{"generationConfig":{"maxOutputTokens":5}}"#), 5);
        assert_eq!(max_output(b"{}"), 0);
        assert_eq!(max_output(b"not JSON"), 0);
    }
}
