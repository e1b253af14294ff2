//! The answers of the local provider, in the form that the path and the body of a request ask for: chats and responses
//! of OpenAI, messages of Anthropic, contents of Gemini, embeddings, and plain JSON for anything else.

use axum::{Json, body::Body};
use futures_util::stream;
use http::Request;
use hyper::body::Bytes;
use serde_json::{Value, json};
use std::{convert::Infallible, time::Duration};
use tokio::time::sleep;
use tower_outbound::{
    Cost,
    provider::{CharacterEstimate, Provider as Dialect},
    rate::RequestCost,
};

/// What a request asks for.
pub(super) struct Question {
    form: Form,
    body: Value,
    /// The tokens that the request is charged besides those of its answer.
    prompt: u64,
    /// The tokens that the answer uses.
    completion: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Chat,
    Responses,
    Messages,
    Contents,
    Embeddings,
    Other,
}

impl Question {
    /// Reads a request. Its answer uses `usage` percent of the tokens that the request allows.
    pub(super) fn read(request: &Request<Bytes>, dialect: Dialect, usage: u8) -> Self {
        let body: Value = serde_json::from_slice(request.body()).unwrap_or_default();
        let longest = [
            "/max_tokens",
            "/max_completion_tokens",
            "/max_output_tokens",
            "/generationConfig/maxOutputTokens",
        ];
        let longest = longest
            .iter()
            .find_map(|path| body.pointer(path)?.as_u64())
            .unwrap_or(0);
        let charged = CharacterEstimate::new().cost(request).tokens;
        Self {
            form: Form::of(request.uri().path(), &body, dialect),
            prompt: charged.saturating_sub(longest),
            completion: longest.min(charged).saturating_mul(u64::from(usage)).div_ceil(100),
            body,
        }
    }

    /// What the request takes of each built-in budget.
    pub(super) const fn cost(&self) -> Cost {
        Cost::input_output_tokens(self.prompt, self.completion)
    }

    const fn tokens(&self) -> u64 {
        self.prompt.saturating_add(self.completion)
    }

    pub(super) fn is_streamed(&self) -> bool {
        self.body.get("stream") == Some(&Value::Bool(true)) && matches!(self.form, Form::Chat | Form::Messages)
    }

    fn usage(&self) -> Value {
        let Self { prompt, completion, .. } = self;
        match self.form {
            Form::Messages | Form::Responses => json!({ "input_tokens": prompt, "output_tokens": completion }),
            _ => json!({
                "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
            }),
        }
    }

    fn text(&self) -> String {
        let question = ["messages", "contents", "input", "prompt"]
            .iter()
            .find_map(|field| self.body.get(field));
        let opening: String = question
            .and_then(last_text)
            .unwrap_or("a request")
            .chars()
            .take(40)
            .collect();
        format!("An answer to: {opening}…")
    }

    /// The answer to the admitted request with this number.
    pub(super) fn answer(&self, number: u64) -> Value {
        let (text, usage) = (self.text(), self.usage());
        let model = self.body.get("model").cloned().unwrap_or_default();
        match self.form {
            Form::Chat => json!({
                "id": format!("chatcmpl-{number:08}"),
                "object": "chat.completion",
                "model": model,
                "choices": [{
                    "index": 0,
                    "message": { "role": "assistant", "content": text },
                    "finish_reason": "stop",
                }],
                "usage": usage,
            }),
            Form::Responses => json!({
                "id": format!("resp_{number:08}"),
                "object": "response",
                "status": "completed",
                "model": model,
                "output": [{
                    "type": "message",
                    "role": "assistant",
                    "content": [{ "type": "output_text", "text": text }],
                }],
                "usage": usage,
            }),
            Form::Messages => json!({
                "id": format!("msg_{number:08}"),
                "type": "message",
                "role": "assistant",
                "model": model,
                "content": [{ "type": "text", "text": text }],
                "stop_reason": "end_turn",
                "usage": usage,
            }),
            Form::Contents => json!({
                "candidates": [{
                    "content": { "role": "model", "parts": [{ "text": text }] },
                    "finishReason": "STOP",
                }],
                "usageMetadata": {
                    "promptTokenCount": self.prompt,
                    "candidatesTokenCount": self.completion,
                    "totalTokenCount": self.tokens(),
                },
            }),
            Form::Embeddings => {
                let inputs = self.body.get("input").and_then(Value::as_array);
                // A list of token ids is one input.
                let inputs = inputs
                    .filter(|inputs| !inputs.iter().all(Value::is_number))
                    .map_or(1, Vec::len);
                let data: Vec<_> = (0..inputs)
                    .map(|index| json!({ "object": "embedding", "index": index, "embedding": [0.25, -0.5, 0.125] }))
                    .collect();
                json!({
                    "object": "list",
                    "model": model,
                    "data": data,
                    "usage": { "prompt_tokens": self.prompt, "total_tokens": self.prompt },
                })
            }
            Form::Other => json!({ "id": number, "object": "answer", "usage": usage }),
        }
    }

    /// The text of the answer as server-sent events: a word every 20 ms, and the usage at the end.
    pub(super) fn events(&self) -> Body {
        let is_messages = self.form == Form::Messages;
        let event = |data: &Value| match data["type"].as_str().filter(|_| is_messages) {
            Some(name) => format!("event: {name}\ndata: {data}\n\n"),
            None => format!("data: {data}\n\n"),
        };
        let word = |word: &str| {
            event(&if is_messages {
                json!({
                    "type": "content_block_delta", "index": 0, "delta": { "type": "text_delta", "text": word },
                })
            } else {
                json!({ "object": "chat.completion.chunk", "choices": [{ "index": 0, "delta": { "content": word } }] })
            })
        };
        let mut before = Vec::new();
        let after = if is_messages {
            let message = json!({ "type": "message", "role": "assistant", "content": [], "usage": self.usage() });
            before.push(event(&json!({ "type": "message_start", "message": message })));
            let block = json!({ "type": "text", "text": "" });
            before.push(event(
                &json!({ "type": "content_block_start", "index": 0, "content_block": block }),
            ));
            let stop = json!({ "stop_reason": "end_turn" });
            [
                event(&json!({ "type": "content_block_stop", "index": 0 })),
                event(&json!({ "type": "message_delta", "delta": stop, "usage": self.usage() })),
                event(&json!({ "type": "message_stop" })),
            ]
            .concat()
        } else {
            let stop = json!([{ "index": 0, "delta": {}, "finish_reason": "stop" }]);
            [
                event(&json!({ "object": "chat.completion.chunk", "choices": stop })),
                event(&json!({ "object": "chat.completion.chunk", "choices": [], "usage": self.usage() })),
                "data: [DONE]\n\n".to_owned(),
            ]
            .concat()
        };
        let text = self.text();
        let words = text
            .split_inclusive(' ')
            .map(|text| (Duration::from_millis(20), word(text)));
        let before = before.into_iter().map(|event| (Duration::ZERO, event));
        pieces(before.chain(words).chain([(Duration::ZERO, after)]).collect())
    }
}

impl Form {
    fn of(path: &str, body: &Value, dialect: Dialect) -> Self {
        if path.ends_with("/embeddings") {
            Self::Embeddings
        } else if path.ends_with("/responses") {
            Self::Responses
        } else if path.ends_with("/messages") || (dialect == Dialect::Anthropic && body.get("messages").is_some()) {
            Self::Messages
        } else if body.get("contents").is_some() {
            Self::Contents
        } else if body.get("messages").is_some() {
            Self::Chat
        } else {
            Self::Other
        }
    }
}

/// The last text in a list of messages, or in a part of one.
fn last_text(value: &Value) -> Option<&str> {
    match value {
        Value::String(text) => Some(text),
        Value::Array(parts) => parts.iter().rev().find_map(last_text),
        Value::Object(fields) => ["content", "parts", "text"]
            .iter()
            .find_map(|name| last_text(fields.get(*name)?)),
        _ => None,
    }
}

/// A body that is sent in pieces. Before each piece it waits for the piece's delay.
pub(super) fn pieces(pieces: Vec<(Duration, String)>) -> Body {
    Body::from_stream(stream::unfold(pieces.into_iter(), async |mut pieces| {
        let (after, piece) = pieces.next()?;
        sleep(after).await;
        Some((Ok::<_, Infallible>(Bytes::from(piece)), pieces))
    }))
}

pub(super) fn error(kind: &str, code: &str, message: &str) -> Json<Value> {
    Json(json!({ "error": { "type": kind, "code": code, "message": message } }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question(path: &str, body: &'static str, dialect: Dialect) -> Question {
        let request = Request::post(path).body(Bytes::from(body)).unwrap();
        Question::read(&request, dialect, 50)
    }

    #[test]
    fn the_form_of_the_answer_is_that_of_the_request() {
        let chat = r#"{"messages":[{"role":"user","content":"Hi"}],"max_tokens":8}"#;
        for (path, body, dialect, form) in [
            ("/v1/chat/completions", chat, Dialect::OpenAi, Form::Chat),
            ("/v1/chat/completions", chat, Dialect::Anthropic, Form::Messages),
            ("/v1/messages", chat, Dialect::OpenAi, Form::Messages),
            ("/v1/responses", r#"{"input":"Hi"}"#, Dialect::OpenAi, Form::Responses),
            (
                "/v1/embeddings",
                r#"{"input":["a","b"]}"#,
                Dialect::OpenAi,
                Form::Embeddings,
            ),
            (
                "/m:generateContent",
                r#"{"contents":[{"parts":[{"text":"Hi"}]}]}"#,
                Dialect::Gemini,
                Form::Contents,
            ),
            ("/repos/a/b", "", Dialect::GitHub, Form::Other),
        ] {
            assert_eq!(question(path, body, dialect).form, form, "{path}");
        }
    }

    #[test]
    fn an_answer_uses_a_part_of_the_tokens_that_the_request_allows() {
        let chat = r#"{"messages":[{"role":"user","content":"12345678"}],"max_tokens":9}"#;
        let question = question("/v1/chat/completions", chat, Dialect::OpenAi);
        assert_eq!((question.prompt, question.completion), (2, 5));
        assert_eq!(question.answer(1)["usage"]["total_tokens"], 7);
        assert_eq!(question.text(), "An answer to: 12345678…");
    }

    #[test]
    fn every_input_has_its_embedding() {
        let embeddings = |body| question("/v1/embeddings", body, Dialect::OpenAi).answer(1);
        for (body, count) in [
            (r#"{"input":"a"}"#, 1),
            (r#"{"input":["a","b"]}"#, 2),
            (r#"{"input":[1,2,3]}"#, 1),
        ] {
            assert_eq!(embeddings(body)["data"].as_array().unwrap().len(), count, "{body}");
        }
    }
}
