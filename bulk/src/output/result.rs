//! One line of the file of results: what became of one request.

use crate::{
    input::Request,
    price::{Money, Price},
};
use http::Response;
use hyper::body::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::{Value, value::RawValue};
use std::time::{Duration, SystemTime};
use tower_outbound::{
    NetworkRequestEvent, RequestStatus,
    error::{CostExceedsBurst, Error},
};

/// A request that has ended.
pub(crate) struct Finished {
    request: Request,
    end: End,
    cost: Option<Money>,
}

enum End {
    /// The executor accepted the request, and recorded its event.
    Event {
        event: Box<NetworkRequestEvent>,
        response: Option<Response<Bytes>>,
    },
    /// The executor refused the request, because it could never be sent.
    Refused { kind: &'static str, message: String },
}

/// The fields of a result line. Times are in UTC.
#[derive(Serialize)]
struct Line<'a> {
    line: u64,
    custom_id: Option<&'a RawValue>,
    hash: String,
    request_id: Option<String>,
    /// The host of the API. A later run recognizes results of the local provider, which it may overwrite, by this
    /// field.
    host: &'a str,
    status: &'static str,
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
    response: Option<Value>,
}

/// The error of a request.
#[derive(Serialize)]
pub(crate) struct Problem {
    #[serde(rename = "type")]
    kind: String,
    pub(crate) message: String,
}

/// The fields of a result line that a later run reads.
#[derive(Deserialize)]
pub(crate) struct EarlierResult {
    pub(crate) hash: String,
    pub(crate) host: String,
    status: String,
}

// === impl Finished ===

impl Finished {
    pub(crate) fn with_event(request: Request, event: NetworkRequestEvent, response: Option<Response<Bytes>>) -> Self {
        Self {
            request,
            end: End::Event {
                event: Box::new(event),
                response,
            },
            cost: None,
        }
    }

    /// Computes what the request has cost, by the usage that its answer reports.
    ///
    /// The answer of a failed request counts as well, if it reports usage. Attempts before the last one do not: their
    /// answers are not kept, and providers do not charge for the common ones, such as 429 and 503.
    pub(crate) fn priced(mut self, price: Option<&Price>) -> Self {
        self.cost = price.and_then(|price| price.of_answer(self.http_response()?.body()));
        self
    }

    /// What the request has cost: `None` without [prices](Self::priced), or if its answer reports no usage.
    pub(crate) const fn cost(&self) -> Option<Money> {
        self.cost
    }

    /// The response with which the request ended, also if it counts as a failure.
    pub(crate) fn http_response(&self) -> Option<&Response<Bytes>> {
        match &self.end {
            End::Event { response, .. } => response.as_ref(),
            End::Refused { .. } => None,
        }
    }

    pub(crate) fn refused(request: Request, error: &Error) -> Self {
        let kind = if error.find::<CostExceedsBurst>().is_some() {
            "CostExceedsBurst"
        } else {
            "Refused"
        };
        Self {
            request,
            end: End::Refused {
                kind,
                message: error.to_string(),
            },
            cost: None,
        }
    }

    pub(crate) fn status(&self) -> RequestStatus {
        self.event().map_or(RequestStatus::Failed, |event| event.status)
    }

    pub(crate) const fn tokens(&self) -> u64 {
        self.request.tokens
    }

    pub(crate) fn event(&self) -> Option<&NetworkRequestEvent> {
        match &self.end {
            End::Event { event, .. } => Some(event),
            End::Refused { .. } => None,
        }
    }

    /// The result line as JSON, without the newline.
    pub(crate) fn to_json(&self, host: &str) -> serde_json::Result<Vec<u8>> {
        let event = self.event();
        let at = |time: fn(&NetworkRequestEvent) -> Option<SystemTime>| {
            event
                .and_then(time)
                .map(|time| humantime::format_rfc3339_micros(time).to_string())
        };
        let took = |time: fn(&NetworkRequestEvent) -> Option<Duration>| event.and_then(time).map(milliseconds);
        serde_json::to_vec(&Line {
            line: self.request.line,
            custom_id: self.request.custom_id.as_deref(),
            hash: hex(self.request.hash),
            request_id: event.map(|event| event.request_id.to_string()),
            host,
            status: self.status().as_str(),
            http_status: event.and_then(|event| event.response_status_code),
            attempts: event.map_or(0, |event| event.attempts.len()),
            error: self.problem(),
            tokens: self.request.tokens,
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
            response: self.response(),
        })
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

    /// The body of the response: as JSON if it is valid JSON, otherwise as a string.
    fn response(&self) -> Option<Value> {
        let End::Event {
            response: Some(response),
            ..
        } = &self.end
        else {
            return None;
        };
        let body = response.body();
        let text = || Value::String(String::from_utf8_lossy(body).into_owned());
        (!body.is_empty()).then(|| serde_json::from_slice(body).unwrap_or_else(|_| text()))
    }
}

// === impl EarlierResult ===

impl EarlierResult {
    pub(crate) fn is_completed(&self) -> bool {
        self.status == RequestStatus::Completed.as_str()
    }
}

/// The hash of a request as results hold it: as a string, because many JSON parsers round 64-bit numbers.
pub(crate) fn hex(hash: u64) -> String {
    format!("{hash:016x}")
}

/// Converts a time to milliseconds, exact to the microsecond.
fn milliseconds(time: Duration) -> f64 {
    time.as_micros() as f64 / 1_000.0
}
