//! [`Expected::check`]: whether the body of a successful response (2xx) is an answer.

use super::{
    events::{Event, EventReader},
    outline::Outline,
    reported_error::ReportedError,
};
use http::{
    HeaderMap, Method, Request, Response, StatusCode,
    header::{ACCEPT, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE},
};
use serde::de::IgnoredAny;
use std::{collections::BTreeMap, str};

/// Why the body of a successful response is not an answer.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Defect {
    Reported(ReportedError),
    Empty,
    Html,
    NotJson,
    Truncated,
}

/// What a request lets its sender expect of the response.
#[derive(Clone, Debug)]
pub(super) struct Expected {
    method: Method,
    format: Format,
    accepts_html: bool,
}

/// The format of the answer that a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    /// The header `accept` names JSON, and no other format.
    Json,
    /// The body of the request is JSON, and `accept` does not ask for something else.
    Like,
    /// Anything.
    Any,
}

/// What the body of a response is, by its content type, or by its first bytes if that does not tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Json,
    /// A JSON document in each line.
    JsonLines,
    Events,
    Html,
    Text,
    Untold,
    /// Audio, images and video, which are only checked to be there.
    Media,
    Other,
}

/// What was seen so far of a stream of JSON documents.
#[derive(Default)]
struct Stream {
    has_documents: bool,
    /// Whether its format is one that tells its end.
    has_end: bool,
    has_ended: bool,
    /// Whether there was an event that is neither a document nor a known end.
    has_other: bool,
    /// Whether its format is OpenAI's chat format, in which an answer has at least one choice.
    is_chat: bool,
    /// Whether the documents of a chat name their format, as OpenAI's do. Then `[DONE]` is the end.
    is_named_chat: bool,
    /// Whether each choice of a chat, or candidate of Gemini, has ended, by its index. They need not end together.
    choices: BTreeMap<u64, bool>,
    defect: Option<Defect>,
}

// === impl Expected ===

impl Expected {
    /// Reads what `request` asks for. `body` is its body, if that is in memory.
    pub(super) fn of<B>(request: &Request<B>, body: Option<&[u8]>) -> Self {
        let accept = request.headers().get(ACCEPT).and_then(|accept| accept.to_str().ok());
        let accept = accept.unwrap_or("*/*").to_ascii_lowercase();
        let mut accepted = accept
            .split(',')
            .map(|kind| kind.split(';').next().unwrap_or(kind).trim());
        let is_json = |kind: &str| kind.contains("json") || kind == "text/event-stream";
        let is_any = |kind: &str| kind == "*/*";
        let has_json = has_json(request.headers(), body);
        let accepts_html = if accepted.clone().any(is_any) {
            !has_json || accept.contains("html")
        } else {
            accept.contains("html") || accept.contains("text/*")
        };
        let format = if accept.contains("json") && accepted.clone().all(is_json) {
            Format::Json
        } else if has_json && accepted.any(|kind| is_any(kind) || is_json(kind) || kind == "application/*") {
            Format::Like
        } else {
            Format::Any
        };
        Self {
            method: request.method().clone(),
            format,
            accepts_html,
        }
    }

    /// Returns what is wrong with the body of a successful response, if it is not an answer.
    pub(super) fn check<R>(&self, response: &Response<R>, body: &[u8]) -> Result<(), Defect> {
        let headers = response.headers();
        if self.method == Method::HEAD || matches!(response.status().as_u16(), 204 | 205) {
            return Ok(());
        }
        // A compressed body, which the client has not decompressed, cannot be read here.
        if headers.get(CONTENT_ENCODING).is_some_and(|coding| coding != "identity") {
            return Ok(());
        }
        let length = headers.get(CONTENT_LENGTH).and_then(|length| length.to_str().ok());
        if length
            .and_then(|length| length.parse().ok())
            .is_some_and(|length: u64| length > body.len() as u64)
        {
            return Err(Defect::Truncated);
        }
        let body = body.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(body).trim_ascii();
        let kind = Kind::of(headers, body);
        if body.is_empty() {
            return if self.promises_body(response.status(), kind) {
                Err(Defect::Empty)
            } else {
                Ok(())
            };
        }
        match kind {
            Kind::Json => check_document(body),
            Kind::JsonLines => check_lines(body),
            Kind::Events => check_events(body),
            Kind::Html if self.accepts_html => Ok(()),
            Kind::Html => Err(Defect::Html),
            Kind::Untold if self.format != Format::Any => check_document(body),
            Kind::Text if self.format == Format::Json => check_document(body),
            // A text may be the answer. It is also how some servers label JSON.
            Kind::Text | Kind::Untold if body.starts_with(b"{") => match check_document(body) {
                Err(Defect::NotJson) => Ok(()),
                checked => checked,
            },
            Kind::Text | Kind::Untold | Kind::Media | Kind::Other => Ok(()),
        }
    }

    /// Returns whether a response must have a body: no document of its content type is empty, or the request asks for
    /// JSON. A response to another method than `GET` and `POST` may do without, as may one that tells by its status
    /// that something was created or accepted.
    fn promises_body(&self, status: StatusCode, kind: Kind) -> bool {
        if !matches!(self.method, Method::GET | Method::POST) {
            return false;
        }
        match (kind, self.format) {
            (Kind::Json | Kind::JsonLines | Kind::Events | Kind::Media, _) => true,
            (_, Format::Json) => status == StatusCode::OK,
            (_, Format::Like) => status == StatusCode::OK && self.method == Method::POST,
            (_, Format::Any) => false,
        }
    }
}

/// Returns whether a request has a JSON body, by its content type, or by its first byte if it has none.
fn has_json(headers: &HeaderMap, body: Option<&[u8]>) -> bool {
    match headers.get(CONTENT_TYPE) {
        Some(kind) => kind.to_str().is_ok_and(|kind| kind.contains("json")),
        None => body.is_some_and(|body| matches!(body.trim_ascii_start().first(), Some(b'{' | b'['))),
    }
}

// === impl Kind ===

impl Kind {
    fn of(headers: &HeaderMap, body: &[u8]) -> Self {
        let kind = headers.get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
        let kind = kind.map(|kind| kind.split(';').next().unwrap_or(kind).trim().to_ascii_lowercase());
        let told = match kind.as_deref() {
            None | Some("") => Self::Untold,
            // Some servers send a document in place of the stream, for an error above all.
            Some("text/event-stream") if body.starts_with(b"{") => return Self::Json,
            Some("text/event-stream") => return Self::Events,
            Some("application/x-ndjson" | "application/ndjson" | "application/jsonl" | "application/x-jsonlines") => {
                return Self::JsonLines;
            }
            Some("application/json-seq") => return Self::Other,
            Some("application/json" | "text/json") => Self::Json,
            Some(kind) if kind.ends_with("+json") => Self::Json,
            Some("text/html" | "application/xhtml+xml") => return Self::Html,
            Some(kind) if kind.starts_with("text/") => Self::Text,
            Some(kind)
                if ["audio/", "image/", "video/"]
                    .iter()
                    .any(|start| kind.starts_with(start)) =>
            {
                return Self::Media;
            }
            Some(_) => return Self::Other,
        };
        // Some servers and proxies send pages and streams under the content type of the answer that was asked for.
        if is_html(body) && told != Self::Json {
            Self::Html
        } else if [&b"data:"[..], b"event:"].iter().any(|field| body.starts_with(field)) {
            Self::Events
        } else {
            told
        }
    }
}

fn is_html(body: &[u8]) -> bool {
    [&b"<!doctype html"[..], b"<html"].iter().any(|start| {
        body.get(..start.len())
            .is_some_and(|found| found.eq_ignore_ascii_case(start))
    })
}

// === Documents and streams ===

/// Parses a whole JSON document.
fn parse(text: &[u8]) -> Result<Outline, Defect> {
    let defect = if is_html(text) { Defect::Html } else { Defect::NotJson };
    let Ok(text) = str::from_utf8(text) else {
        return Err(defect);
    };
    Outline::read(text).or_else(|error| match error {
        error if error.is_eof() => Err(Defect::Truncated),
        // Some JSON has no value in Rust: half of a surrogate pair, a number beyond the range of an `f64`.
        _ if serde_json::from_str::<IgnoredAny>(text).is_ok() => {
            Ok(Outline::read(&without_surrogates(text)).unwrap_or(Outline::Skipped))
        }
        _ => Err(defect),
    })
}

/// Replaces each half of a surrogate pair in a JSON document, such as `\ud83d`, by the escape of the replacement
/// character.
fn without_surrogates(text: &str) -> String {
    let mut parts = text.split("\\u");
    let mut replaced = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let code = part.get(..4).and_then(|code| u16::from_str_radix(code, 16).ok());
        let is_surrogate = code.is_some_and(|code| (0xD800..0xE000).contains(&code));
        replaced.push_str("\\u");
        replaced.push_str(if is_surrogate { "fffd" } else { "" });
        replaced.push_str(if is_surrogate { &part[4..] } else { part });
    }
    replaced
}

fn check_document(text: &[u8]) -> Result<(), Defect> {
    let document = match parse(text) {
        // Some servers send a document in each line under the content type of one document.
        Err(Defect::NotJson) if lines(text).count() > 1 && lines(text).all(|line| line.starts_with(b"{")) => {
            return check_lines(text);
        }
        parsed => parsed?,
    };
    if let Some(error) = ReportedError::find(&document) {
        return Err(Defect::Reported(error));
    }
    // A completion without a single choice.
    let has_no_choice = document.has_null("choices")
        || document
            .get("choices")
            .is_some_and(|choices| choices.elements().is_empty());
    if has_no_choice && !matches!(document.text("object"), Some(object) if object.ends_with(".chunk")) {
        return Err(Defect::Empty);
    }
    Ok(())
}

/// Returns the lines of a text that are not empty.
fn lines(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    let lines = text.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
    lines.filter(|line| !line.is_empty())
}

fn check_lines(body: &[u8]) -> Result<(), Defect> {
    let mut stream = Stream::default();
    for line in lines(body) {
        stream.read(b"", line);
        // In a stream of events, the data may be any text. A line has to be JSON.
        if stream.defect.is_none() && !line.starts_with(b"{") && line != b"[DONE]" {
            stream.defect = parse(line).err();
        }
    }
    stream.end()
}

fn check_events(body: &[u8]) -> Result<(), Defect> {
    let mut stream = Stream::default();
    let mut events = EventReader::new(usize::MAX);
    let mut on_event = |event: Event<'_>| stream.read(event.name, event.data.trim_ascii());
    // No event is above the limit.
    let _ = events.push(body, &mut on_event);
    let _ = events.finish(&mut on_event);
    stream.end()
}

impl Stream {
    /// Reads one document of the stream, which came with the event of this name.
    fn read(&mut self, name: &[u8], data: &[u8]) {
        let is_error = name == b"error";
        if self.defect.is_some() || (data.is_empty() && !is_error) {
            return;
        }
        if data == b"[DONE]" {
            self.has_ended = true;
            return;
        }
        self.has_documents = true;
        if !is_error && !data.starts_with(b"{") {
            self.has_other = true;
            return;
        }
        self.defect = match parse(data) {
            Ok(document) => {
                self.observe_end(&document);
                // In a stream, an error ends what came before, and is none of its answers.
                let error = document
                    .get("error")
                    .filter(|error| matches!(error, Outline::Object(_)));
                let error = error.filter(|error| error.is_something()).map(ReportedError::of);
                let found = ReportedError::find(&document).or(error);
                let found = found.or_else(|| is_error.then(|| ReportedError::of(&document)));
                found.map(Defect::Reported)
            }
            Err(_) if is_error => Some(Defect::Reported(ReportedError {
                message: (!data.is_empty()).then(|| String::from_utf8_lossy(data).into_owned()),
                ..ReportedError::default()
            })),
            Err(defect) => Some(defect),
        };
    }

    /// Finds out whether the stream has a format that tells its end, and whether this document is its end.
    fn observe_end(&mut self, document: &Outline) {
        let (has_end, is_end) = if let Some(choices) = document.get("choices") {
            // OpenAI chat ends with `[DONE]`, after the usage. Some servers that copy the format leave out both the
            // name of the format and `[DONE]`: the end of each choice is their end.
            self.is_chat = true;
            self.is_named_chat |= document.text("object") == Some("chat.completion.chunk");
            self.observe_choices(choices, "finish_reason");
            (true, false)
        } else if let Some(candidates) = document.get("candidates") {
            // Gemini: the last document of a candidate tells why it is the last.
            self.observe_choices(candidates, "finishReason");
            (true, false)
        } else if let Some(kind) = document.text("type") {
            // Anthropic, OpenAI's Responses API, and Cohere.
            let is_message = matches!(kind, "message_start" | "message_stop" | "message-start" | "message-end");
            let is_end = matches!(
                kind,
                "message_stop" | "response.completed" | "response.incomplete" | "message-end"
            );
            (is_message || kind.starts_with("response."), is_end)
        } else if let Some(kind) = document.text("event_type") {
            // Cohere's first version.
            (true, kind == "stream-end")
        } else if let Some(Outline::Flag(done)) = document.get("done") {
            // Ollama.
            (true, *done)
        } else {
            return;
        };
        self.has_end |= has_end;
        self.has_ended |= is_end;
    }

    /// Finds out which choices of a document have ended: those with a text in the field `end`. What comes after the end
    /// of a choice, such as the result of a filter, does not begin it anew.
    fn observe_choices(&mut self, choices: &Outline, end: &str) {
        for choice in choices.elements() {
            let index = match choice.get("index") {
                Some(Outline::Number(index)) => *index as u64,
                _ => 0,
            };
            *self.choices.entry(index).or_default() |= choice.text(end).is_some();
        }
    }

    fn end(self) -> Result<(), Defect> {
        let have_choices_ended = !self.choices.is_empty() && self.choices.values().all(|ended| *ended);
        let has_ended = self.has_ended || (have_choices_ended && !self.is_named_chat);
        match self.defect {
            Some(defect) => Err(defect),
            None if !self.has_documents => Err(Defect::Empty),
            None if self.has_end && !has_ended => Err(Defect::Truncated),
            // In a stream of documents, a text that is none is a document, or an end, that was damaged on the way.
            None if self.has_end && self.has_other => Err(Defect::NotJson),
            None if self.is_chat && self.choices.is_empty() => Err(Defect::Empty),
            None => Ok(()),
        }
    }
}
