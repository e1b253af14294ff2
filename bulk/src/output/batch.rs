//! A result in the form of OpenAI's Batch API, which vLLM and others write and read, too.

use super::{
    answer::{self, Answer, Readable},
    result::{Finished, Identity, Style},
};
use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};

#[derive(Serialize)]
struct Line<'a> {
    id: String,
    custom_id: Box<RawValue>,
    response: Option<Response<'a>>,
    error: Option<Error>,
    /// What the form has no place for. Readers ignore fields that they do not know; --resume needs it.
    bulk: Bulk<'a>,
}

#[derive(Serialize)]
struct Response<'a> {
    status_code: u16,
    request_id: String,
    body: Body<'a>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Body<'a> {
    Readable(Option<Readable<'a>>),
    Base64(String),
}

#[derive(Serialize)]
struct Error {
    code: String,
    message: String,
}

#[derive(Serialize)]
struct Bulk<'a> {
    line: u64,
    #[serde(flatten)]
    identity: Identity,
    #[serde(skip_serializing_if = "Option::is_none")]
    metadata: Option<&'a RawValue>,
    /// The type of a body that is in base64.
    #[serde(skip_serializing_if = "Option::is_none")]
    content_type: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    request: Option<Box<RawValue>>,
}

/// The result line as JSON, without the newline. A failure has an error, and its response if there was one.
pub(super) fn to_json(finished: &Finished, answer: Option<&Answer>, style: &Style) -> serde_json::Result<Vec<u8>> {
    let id = finished.event().map(|event| event.request_id.to_string());
    let id = id.unwrap_or_else(|| format!("line-{}", finished.line()));
    // Readers join answers to requests by `custom_id`, and expect one.
    let custom_id = match finished.custom_id() {
        Some(custom_id) => custom_id.to_owned(),
        None => to_raw_value(&format!("line-{}", finished.line()))?,
    };
    let response = finished.response().zip(answer).map(|(response, answer)| Response {
        status_code: response.status().as_u16(),
        request_id: answer::request_id(&answer.headers).unwrap_or(&id).to_owned(),
        body: answer
            .base64()
            .map_or_else(|| Body::Readable(answer.readable()), Body::Base64),
    });
    serde_json::to_vec(&Line {
        custom_id,
        response,
        error: finished.problem().map(|problem| Error {
            code: problem.kind,
            message: problem.message,
        }),
        bulk: Bulk {
            line: finished.line(),
            identity: finished.identity(style),
            metadata: finished.metadata(),
            content_type: answer.and_then(|answer| answer.content_type.as_deref()),
            request: finished.echo(style),
        },
        id: format!("batch_req_{id}"),
    })
}
