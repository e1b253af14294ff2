//! The response in a result line: its body as it came, and the headers that matter later.

use super::assemble;
use base64::{Engine, engine::general_purpose::STANDARD};
use http::{HeaderMap, Response, header};
use hyper::body::Bytes;
use serde::Serialize;
use serde_json::value::RawValue;
use std::{borrow::Cow, collections::BTreeMap};

/// The most that is kept of the body of a failure, in bytes.
const MAX_FAILURE: usize = 64 << 10;

/// The longest value of a header that is kept, in bytes.
const MAX_HEADER: usize = 1_024;

/// Headers by which providers find a call again, beside those that name a rate limit.
const HEADERS: [&str; 15] = [
    "apim-request-id",
    "cf-ray",
    "request-id",
    "retry-after",
    "retry-after-ms",
    "x-amz-request-id",
    "x-amzn-requestid",
    "x-correlation-id",
    "x-generation-id",
    "x-github-request-id",
    "x-goog-request-id",
    "x-ms-request-id",
    "x-request-id",
    "x-should-retry",
    "x-trace-id",
];

/// The body of a response in the way in which a line of JSON can hold it.
#[derive(Debug)]
pub(super) enum Body {
    /// JSON as it came. Line breaks in it, which are never inside of a string, are spaces.
    Json(Box<RawValue>),
    Text(String),
    Binary(Bytes),
}

/// A response in a result line.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) body: Option<Body>,
    /// The type of a body that is neither JSON nor text.
    pub(super) content_type: Option<String>,
    /// The coding of a body that was not decoded.
    pub(super) content_encoding: Option<String>,
    /// The length of a body that was too long to be kept, in bytes.
    pub(super) truncated: Option<usize>,
    pub(super) headers: BTreeMap<String, String>,
}

impl Answer {
    /// Takes what is kept of a response. Of the body of a failure, 64 KiB are kept.
    pub(super) fn of(response: &Response<Bytes>, is_failure: bool) -> Self {
        let headers = response.headers();
        let mut truncated = None;
        let mut body = body(response.body(), headers);
        if is_failure && response.body().len() > MAX_FAILURE {
            truncated = Some(response.body().len());
            body = Some(cut(response.body()));
        }
        let is_binary = matches!(body, Some(Body::Binary(_)));
        let field = |name| text_of(headers, name).filter(|_| is_binary);
        Self {
            body,
            content_type: field(header::CONTENT_TYPE),
            content_encoding: field(header::CONTENT_ENCODING),
            truncated,
            headers: kept(headers),
        }
    }

    /// The body as JSON or as text.
    pub(super) fn readable(&self) -> Option<Readable<'_>> {
        match self.body.as_ref()? {
            Body::Json(json) => Some(Readable::Json(json)),
            Body::Text(text) => Some(Readable::Text(text)),
            Body::Binary(_) => None,
        }
    }

    /// A body that is neither JSON nor text, in base64.
    pub(super) fn base64(&self) -> Option<String> {
        match self.body.as_ref()? {
            Body::Binary(bytes) => Some(STANDARD.encode(bytes)),
            _ => None,
        }
    }
}

/// A body that a reader of the line can use as it is.
#[derive(Serialize)]
#[serde(untagged)]
pub(super) enum Readable<'a> {
    Json(&'a RawValue),
    Text(&'a str),
}

fn body(bytes: &Bytes, headers: &HeaderMap) -> Option<Body> {
    if bytes.is_empty() {
        return None;
    }
    let content_type = text_of(headers, header::CONTENT_TYPE)
        .unwrap_or_default()
        .to_ascii_lowercase();
    let Ok(text) = std::str::from_utf8(bytes) else {
        return Some(Body::Binary(bytes.clone()));
    };
    if content_type.starts_with("text/event-stream") {
        let assembled = assemble::assemble(text);
        return Some(assembled.map_or_else(|| Body::Text(text.to_owned()), Body::Json));
    }
    // Text that happens to be a number or `null` stays text, where the provider calls it text.
    let is_text = content_type.starts_with("text/");
    let json = text.trim_start_matches('\u{feff}').trim_ascii();
    if (!is_text || json.starts_with(['{', '[']))
        && let Ok(json) = serde_json::from_str::<&RawValue>(json)
    {
        return Some(Body::Json(in_one_line(json)));
    }
    let is_coded = text_of(headers, header::CONTENT_ENCODING).is_some_and(|coding| coding != "identity");
    let is_media = [
        "image/",
        "audio/",
        "video/",
        "application/octet-stream",
        "application/pdf",
    ]
    .iter()
    .any(|kind| content_type.starts_with(kind));
    Some(if is_coded || is_media {
        Body::Binary(bytes.clone())
    } else {
        Body::Text(text.to_owned())
    })
}

/// Returns the JSON without line breaks. A string in JSON cannot hold one, so only whitespace between values changes.
pub(super) fn in_one_line(json: &RawValue) -> Box<RawValue> {
    let text = json.get();
    if !text.contains(['\n', '\r']) {
        return json.to_owned();
    }
    RawValue::from_string(text.replace(['\n', '\r'], " ")).unwrap_or_else(|_| json.to_owned())
}

/// Cuts off what is too long to be kept.
fn cut(bytes: &Bytes) -> Body {
    let kept = bytes.slice(..MAX_FAILURE);
    match std::str::from_utf8(&kept) {
        Ok(text) => Body::Text(text.to_owned()),
        // The cut is in the middle of a character.
        Err(error) if error.error_len().is_none() => {
            Body::Text(String::from_utf8_lossy(&kept[..error.valid_up_to()]).into_owned())
        }
        Err(_) => Body::Binary(kept),
    }
}

fn kept(headers: &HeaderMap) -> BTreeMap<String, String> {
    let is_kept = |name: &str| HEADERS.contains(&name) || name.contains("ratelimit") || name.contains("rate-limit");
    let mut kept = BTreeMap::<String, String>::new();
    for (name, value) in headers {
        let Ok(value) = value.to_str() else { continue };
        if !is_kept(name.as_str()) || value.len() > MAX_HEADER {
            continue;
        }
        kept.entry(name.as_str().to_owned())
            .and_modify(|earlier| *earlier = format!("{earlier}, {value}"))
            .or_insert_with(|| value.to_owned());
    }
    kept
}

/// The id that the provider gave to the call.
pub(super) fn request_id(headers: &BTreeMap<String, String>) -> Option<&str> {
    let names = [
        "x-request-id",
        "request-id",
        "apim-request-id",
        "x-amzn-requestid",
        "cf-ray",
    ];
    let found = names.iter().find_map(|name| headers.get(*name));
    found.map(|id| &**id)
}

fn text_of(headers: &HeaderMap, name: header::HeaderName) -> Option<String> {
    let value: Cow<'_, str> = String::from_utf8_lossy(headers.get(name)?.as_bytes());
    Some(value.into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(body: impl Into<Bytes>, headers: &[(&'static str, &'static str)], is_failure: bool) -> Answer {
        let mut response = Response::new(body.into());
        for (name, value) in headers {
            response.headers_mut().append(*name, value.parse().unwrap());
        }
        Answer::of(&response, is_failure)
    }

    fn readable(answer: &Answer) -> String {
        serde_json::to_string(&answer.readable()).unwrap()
    }

    #[test]
    fn json_is_kept_as_it_came() {
        let text = r#"{"z":1.10,"a":123456789012345678901234567890,"a":"\u0000\ud800","e":1E400}"#;
        assert_eq!(
            readable(&answer(text, &[("content-type", "application/json")], false)),
            text
        );
        assert_eq!(readable(&answer(text, &[], false)), text);
        assert_eq!(
            readable(&answer("{\r\n \"a\": \"\\n\"\n}\n", &[], false)),
            "{   \"a\": \"\\n\" }"
        );
    }

    #[test]
    fn text_is_kept_as_text() {
        for text in ["hello\nyou", "7", "null", "\"quoted\""] {
            let answer = answer(text, &[("content-type", "text/plain")], false);
            assert_eq!(readable(&answer), serde_json::to_string(text).unwrap());
        }
        assert_eq!(
            readable(&answer("{\"a\":", &[("content-type", "application/json")], false)),
            "\"{\\\"a\\\":\""
        );
    }

    #[test]
    fn other_bodies_are_base64_with_their_type() {
        for (bytes, kind) in [
            (&b"\xff\xfbID3"[..], "audio/mpeg"),
            (b"plain", "application/octet-stream"),
            (b"{\"a\":\"\xe9\"}", "application/json"),
        ] {
            let answer = answer(bytes, &[("content-type", kind)], false);
            assert_eq!(STANDARD.decode(answer.base64().unwrap()).unwrap(), bytes);
            assert_eq!(answer.content_type.as_deref(), Some(kind));
            assert!(answer.readable().is_none());
        }
        let coded = answer(&b"\x1f\x8b\x08\xff"[..], &[("content-encoding", "br")], false);
        assert_eq!(coded.content_encoding.as_deref(), Some("br"));
    }

    #[test]
    fn the_body_of_a_failure_is_bounded_and_that_of_a_success_is_not() {
        let long = "ä".repeat(MAX_FAILURE);
        let failure = answer(long.clone(), &[], true);
        assert_eq!(failure.truncated, Some(2 * MAX_FAILURE));
        assert_eq!(readable(&failure).len(), MAX_FAILURE + 2);
        assert_eq!(readable(&answer(long.clone(), &[], false)).len(), long.len() + 2);
    }

    #[test]
    fn only_headers_that_matter_later_are_kept() {
        let answer = answer(
            "{}",
            &[
                ("x-request-id", "req_1"),
                ("set-cookie", "secret"),
                ("authorization", "secret"),
                ("x-ratelimit-remaining-tokens", "9"),
                ("ratelimit", "a;r=1"),
                ("ratelimit", "b;r=2"),
                ("server", "x"),
            ],
            false,
        );
        assert_eq!(
            serde_json::to_string(&answer.headers).unwrap(),
            r#"{"ratelimit":"a;r=1, b;r=2","x-ratelimit-remaining-tokens":"9","x-request-id":"req_1"}"#
        );
        assert_eq!(request_id(&answer.headers), Some("req_1"));
    }
}
