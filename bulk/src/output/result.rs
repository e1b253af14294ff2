//! One line of the file of results: what became of one request.

use super::{
    LOCAL,
    answer::{Answer, Readable, in_one_line},
    batch,
};
use crate::{
    args::OutputFormat,
    input::{Admitted, Malformed, Request, without_secrets},
    price::{Money, Price},
};
use http::{Response, Uri};
use hyper::body::Bytes;
use serde::Serialize;
use serde_json::value::RawValue;
use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};
use tower_outbound::{
    NetworkRequestEvent, RequestStatus,
    error::{CostExceedsBurst, Error},
};

/// A request that has ended, or a line that is none.
pub(crate) struct Finished {
    line: u64,
    custom_id: Option<Box<RawValue>>,
    /// `None` for a malformed line.
    request: Option<Request>,
    end: End,
    cost: Option<Money>,
    /// The place of the result of a malformed line in memory. That of another result is in its request.
    admitted: Option<Admitted>,
}

enum End {
    /// The executor accepted the request, and recorded its event.
    Event {
        event: Box<NetworkRequestEvent>,
        response: Option<Response<Bytes>>,
    },
    /// The request was not sent, because it never could be.
    Refused { kind: &'static str, message: String },
}

/// What is the same in all result lines of a run.
pub(super) struct Style {
    pub(super) format: OutputFormat,
    /// The URL of requests whose line names none; `None` is the local provider.
    pub(super) default_url: Option<Uri>,
    /// Whether the request is repeated in its result.
    pub(super) echo: bool,
}

/// The fields of a result line. Times are in UTC.
#[derive(Serialize)]
struct Line<'a> {
    line: u64,
    custom_id: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    metadata: Option<&'a RawValue>,
    #[serde(flatten)]
    identity: Identity,
    request_id: Option<String>,
    http_status: Option<u16>,
    attempts: usize,
    error: Option<Problem>,
    tokens: u64,
    tokens_used: Option<u64>,
    /// In the currency of the prices; `null` if no prices are given, or if the answer reports no usage.
    cost: Option<Box<RawValue>>,
    created_at: Option<String>,
    queued_at: Option<String>,
    processing_started_at: Option<String>,
    call_started_at: Option<String>,
    completed_at: Option<String>,
    in_queue_ms: Option<f64>,
    waiting_ms: Option<f64>,
    calling_ms: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    response_headers: Option<&'a BTreeMap<String, String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content_type: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content_encoding: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    response_base64: Option<String>,
    /// The length of the response in bytes, if only its beginning is kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    response_truncated: Option<usize>,
    response: Option<Readable<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    request: Option<Box<RawValue>>,
}

/// The fields by which a later run knows which request is done, and who answered it.
#[derive(Serialize)]
pub(super) struct Identity {
    /// The hash of the line; none for a malformed line, which is read again.
    hash: Option<String>,
    /// The host of the API. A later run recognizes results of the local provider, which it may overwrite, by this
    /// field.
    host: Option<String>,
    /// Scheme, host, port and path: user information and query may hold keys.
    url: Option<String>,
    /// The answer is invented by the local provider.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    demonstration: bool,
    status: &'static str,
}

/// The error of a request.
#[derive(Clone, Serialize)]
pub(crate) struct Problem {
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(crate) message: String,
}

// === impl Finished ===

impl Finished {
    /// A request that the executor accepted. `response` is the response of its last attempt, also that of a failure.
    pub(crate) fn with_event(request: Request, event: NetworkRequestEvent, response: Option<Response<Bytes>>) -> Self {
        let event = Box::new(event);
        Self::new(request, End::Event { event, response })
    }

    pub(crate) fn refused(request: Request, error: &Error, message: String) -> Self {
        let kind = if error.find::<CostExceedsBurst>().is_some() {
            "CostExceedsBurst"
        } else {
            "Refused"
        };
        Self::new(request, End::Refused { kind, message })
    }

    /// A line of the input that is not a request.
    pub(crate) fn malformed(malformed: Malformed) -> Self {
        Self {
            line: malformed.line,
            custom_id: malformed.custom_id,
            request: None,
            end: End::Refused {
                kind: "MalformedLine",
                message: malformed.reason,
            },
            cost: None,
            admitted: malformed.admitted,
        }
    }

    fn new(request: Request, end: End) -> Self {
        Self {
            line: request.line,
            custom_id: request.custom_id.clone(),
            request: Some(request),
            end,
            cost: None,
            admitted: None,
        }
    }

    /// Computes what the request has cost, by the usage that its answer reports.
    ///
    /// The answer of a failed request counts as well, if it reports usage. Attempts before the last one do not: their
    /// answers are not kept, and providers do not charge for the common ones, such as 429 and 503.
    pub(crate) fn priced(mut self, price: &Price) -> Self {
        self.cost = self.response().and_then(|response| price.of_answer(response.body()));
        self
    }

    /// What the request has cost: `None` without [prices](Self::priced), or if its answer reports no usage.
    pub(crate) const fn cost(&self) -> Option<Money> {
        self.cost
    }

    pub(crate) const fn line(&self) -> u64 {
        self.line
    }

    pub(crate) fn status(&self) -> RequestStatus {
        self.event().map_or(RequestStatus::Failed, |event| event.status)
    }

    pub(crate) fn tokens(&self) -> u64 {
        self.request.as_ref().map_or(0, |request| request.tokens)
    }

    pub(crate) fn event(&self) -> Option<&NetworkRequestEvent> {
        match &self.end {
            End::Event { event, .. } => Some(event),
            End::Refused { .. } => None,
        }
    }

    /// The response of the last attempt.
    pub(crate) fn response(&self) -> Option<&Response<Bytes>> {
        match &self.end {
            End::Event { response, .. } => response.as_ref(),
            End::Refused { .. } => None,
        }
    }

    pub(crate) fn problem(&self) -> Option<Problem> {
        match &self.end {
            End::Event { event, .. } => event.error_type.clone().map(|kind| {
                // The message includes the sources of the error: "error sending request" without its cause is useless.
                let causes = event.error_details.iter().flat_map(|details| details.lines());
                let message: Vec<_> = event.error_message.as_deref().into_iter().chain(causes).collect();
                Problem {
                    kind,
                    message: message.join(": "),
                }
            }),
            End::Refused { kind, message } => Some(Problem {
                kind: (*kind).to_owned(),
                message: message.clone(),
            }),
        }
    }

    /// The result line as JSON, without the newline.
    pub(super) fn to_json(&self, style: &Style) -> serde_json::Result<Vec<u8>> {
        let is_failure = self.status() != RequestStatus::Completed;
        let answer = self.response().map(|response| Answer::of(response, is_failure));
        match style.format {
            OutputFormat::OpenaiBatch => batch::to_json(self, answer.as_ref(), style),
            OutputFormat::Lines => self.to_line(answer.as_ref(), style),
        }
    }

    fn to_line(&self, answer: Option<&Answer>, style: &Style) -> serde_json::Result<Vec<u8>> {
        let event = self.event();
        let at = |time: fn(&NetworkRequestEvent) -> Option<SystemTime>| {
            event
                .and_then(time)
                .map(|time| humantime::format_rfc3339_micros(time).to_string())
        };
        let took = |time: fn(&NetworkRequestEvent) -> Option<Duration>| event.and_then(time).map(milliseconds);
        serde_json::to_vec(&Line {
            line: self.line,
            custom_id: self.custom_id.as_deref(),
            metadata: self.metadata(),
            identity: self.identity(style),
            request_id: event.map(|event| event.request_id.to_string()),
            http_status: self.http_status(),
            attempts: event.map_or(0, |event| event.attempts.len()),
            error: self.problem(),
            tokens: self.tokens(),
            tokens_used: event.and_then(|event| event.api_tokens_used),
            cost: self.cost.and_then(Money::to_json),
            created_at: at(|event| Some(event.created_at)),
            queued_at: at(|event| event.queued_at),
            processing_started_at: at(|event| event.processing_started_at),
            call_started_at: at(|event| event.call_started_at),
            completed_at: at(|event| event.completed_at),
            in_queue_ms: took(NetworkRequestEvent::time_in_queue),
            waiting_ms: took(NetworkRequestEvent::time_waiting),
            calling_ms: took(NetworkRequestEvent::time_calling),
            response_headers: answer
                .map(|answer| &answer.headers)
                .filter(|headers| !headers.is_empty()),
            content_type: answer.and_then(|answer| answer.content_type.as_deref()),
            content_encoding: answer.and_then(|answer| answer.content_encoding.as_deref()),
            response_base64: answer.and_then(Answer::base64),
            response_truncated: answer.and_then(|answer| answer.truncated),
            response: answer.and_then(Answer::readable),
            request: self.echo(style),
        })
    }

    fn http_status(&self) -> Option<u16> {
        let of_event = self.event().and_then(|event| event.response_status_code);
        of_event.or_else(|| self.response().map(|response| response.status().as_u16()))
    }

    /// Frees the place that the result and its request have in memory.
    pub(super) fn release(&mut self) {
        self.admitted = None;
        if let Some(request) = &mut self.request {
            request.admitted = None;
        }
    }

    /// A request that was not sent.
    #[cfg(test)]
    pub(super) fn unsent(request: Request) -> Self {
        let message = "it was not sent".into();
        Self::new(
            request,
            End::Refused {
                kind: "Refused",
                message,
            },
        )
    }

    pub(super) fn custom_id(&self) -> Option<&RawValue> {
        self.custom_id.as_deref()
    }

    pub(super) fn metadata(&self) -> Option<&RawValue> {
        self.request.as_ref()?.metadata.as_deref()
    }

    pub(super) fn identity(&self, style: &Style) -> Identity {
        let url = self
            .request
            .as_ref()
            .map(|request| request.url.as_ref().or(style.default_url.as_ref()));
        // A URL without a host is a path of the local provider.
        let url = url.map(|url| url.filter(|url| url.host().is_some()));
        Identity {
            hash: self.request.as_ref().map(|request| hex(request.hash)),
            host: url.map(|url| url.map_or(LOCAL, |url| url.host().unwrap_or_default()).to_owned()),
            url: url.flatten().map(without_secrets),
            demonstration: url == Some(None),
            status: self.status().as_str(),
        }
    }

    /// The body of the request: JSON as it was sent, or text.
    pub(super) fn echo(&self, style: &Style) -> Option<Box<RawValue>> {
        let request = self.request.as_ref().filter(|_| style.echo)?;
        let text = std::str::from_utf8(&request.body)
            .ok()
            .filter(|text| !text.is_empty())?;
        match serde_json::from_str::<&RawValue>(text) {
            Ok(json) => Some(in_one_line(json)),
            Err(_) => serde_json::value::to_raw_value(text).ok(),
        }
    }
}

/// The hash of a request as results hold it: as a string, because many JSON parsers round 64-bit numbers.
pub(super) fn hex(hash: u64) -> String {
    format!("{hash:016x}")
}

/// Converts a time to milliseconds, exact to the microsecond.
fn milliseconds(time: Duration) -> f64 {
    time.as_micros() as f64 / 1_000.0
}
