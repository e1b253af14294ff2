//! [`ReportedError`]: the error that a JSON document reports in place of an answer.
//!
//! | document | reports an error if |
//! |---|---|
//! | any object | `error` is not null, false, zero or empty, and no field of [`ANSWERS`] holds something, or `ok` or `success` is false |
//! | any object | `type` or `object` is `error` (Anthropic, vLLM) |
//! | any object | `errors` is a list of objects with a `message`, and `data` is null or `success` false (GraphQL, Cloudflare) |
//! | OpenAI chat and its copies | each element of `choices` has an `error`, or the `finish_reason` is `error` (OpenRouter) |
//! | OpenAI responses | `object` is `response`, and `status` is `failed` or `cancelled`; `incomplete` is an answer |
//! | an event of such a stream | `type` is `response.failed` |
//! | a list (Gemini) | its last element has an `error` and nothing else |

use super::outline::Outline;
use http::StatusCode;

/// The error that a JSON document reports in place of an answer. Its texts are not redacted.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct ReportedError {
    /// The code or type of the error, as the document has it.
    pub(super) code: Option<String>,
    pub(super) message: Option<String>,
    /// The status that the error stands for. `None` if the document does not tell.
    pub(super) status: Option<StatusCode>,
}

/// The fields that hold the answer of a known API. An object in which one of them holds something is an answer, also if
/// it has a field `error`.
const ANSWERS: [&str; 15] = [
    "candidates",
    "choices",
    "content",
    "data",
    "documents",
    "embedding",
    "embeddings",
    "generated_text",
    "output",
    "output_text",
    "outputs",
    "predictions",
    "result",
    "results",
    "text",
];

/// What codes and types of errors stand for, by a part of their names in lower case. The first entry that fits counts.
const STATUSES: [(&str, u16); 37] = [
    // No credit, for which waiting is of no use: whatever the number beside it.
    ("insufficient_quota", 402),
    ("billing", 402),
    ("payment", 402),
    ("spend_limit", 402),
    ("rate_limit", 429),
    ("ratelimit", 429),
    ("too_many_requests", 429),
    ("resource_exhausted", 429),
    ("throttl", 429),
    ("overloaded", 529),
    ("unavailable", 503),
    ("no_capacity", 503),
    ("timeout", 504),
    ("timed_out", 504),
    ("deadline_exceeded", 504),
    ("server_error", 500),
    ("internal", 500),
    ("api_error", 500),
    ("bad_gateway", 502),
    ("api_key", 401),
    ("authentication", 401),
    ("unauthenticated", 401),
    ("unauthorized", 401),
    ("invalid_auth", 401),
    ("permission", 403),
    ("forbidden", 403),
    ("access_denied", 403),
    ("not_found", 404),
    ("notfound", 404),
    ("too_large", 413),
    ("context_length", 400),
    ("content_", 400),
    ("bad_request", 400),
    ("badrequest", 400),
    ("failed_precondition", 400),
    ("invalid", 400),
    ("unsupported", 400),
];

// === impl ReportedError ===

impl ReportedError {
    /// Returns the error that a document, or the data of an event in a stream, reports. `None` if it is an answer.
    pub(super) fn find(document: &Outline) -> Option<Self> {
        if let Outline::List(elements) = document {
            return elements
                .last()
                .filter(|last| last.has_only("error"))
                .and_then(Self::find);
        }
        if document.text("type") == Some("response.failed") {
            return Some(Self::of_response(document.get("response").unwrap_or(document)));
        }
        if document.text("object") == Some("response") {
            let has_failed = matches!(document.text("status"), Some("failed" | "cancelled"));
            return has_failed.then(|| Self::of_response(document));
        }
        if let Some(error) = Self::of_choices(document) {
            return Some(error);
        }
        let is = |field: &&str| document.get(field).is_some_and(Outline::is_something);
        let is_denied = ["ok", "success"]
            .iter()
            .any(|field| document.get(field) == Some(&Outline::Flag(false)));
        if ANSWERS.iter().any(is) && !is_denied {
            return None;
        }
        let is_error = |field| document.text(field) == Some("error");
        match document.get("error").filter(|error| error.is_something()) {
            Some(error @ Outline::Object(_)) => Some(Self::of(error)),
            // The error is a text, and what belongs to it may be beside it.
            Some(error) => Some(Self::of_text(error, document)),
            None if is_error("type") || is_error("object") => Some(Self::of(document)),
            None => Self::of_list(document),
        }
    }

    /// Reads an error object: `code`, `type`, `status` and `message` in any combination.
    pub(super) fn of(error: &Outline) -> Self {
        let names = ["code", "status", "type"].map(|field| error.text(field).filter(|name| *name != "error"));
        let number = [error.get("code"), error.get("status")]
            .into_iter()
            .flatten()
            .find_map(status_number);
        let names = || names.into_iter().flatten().filter(|name| name.parse::<u16>().is_err());
        let mut named = names().filter_map(named_status);
        // A number does not tell whether a limit goes away by waiting, but a name beside it does.
        let unpaid = named.clone().find(|status| *status == 402);
        Self {
            status: unpaid.or(number).or_else(|| named.next()).and_then(status),
            code: names().next().map(str::to_owned),
            message: error.text("message").map(str::to_owned),
        }
    }

    /// Reads an error that is a text, such as `"error": "channel_not_found"`. What is beside it (`code`, `status`,
    /// `message`) counts, too.
    fn of_text(error: &Outline, document: &Outline) -> Self {
        let beside = Self::of(document);
        let text = error.as_text();
        // Nothing is decided by a sentence, which may change at any time. A code has no spaces.
        let code = text.filter(|text| !text.contains(char::is_whitespace));
        Self {
            status: beside.status.or_else(|| status(named_status(code?)?)),
            code: code.map(str::to_owned).or(beside.code),
            message: text.filter(|_| code.is_none()).map(str::to_owned).or(beside.message),
        }
    }

    /// Reads a response of OpenAI's Responses API that has failed or was cancelled.
    fn of_response(response: &Outline) -> Self {
        match response.get("error") {
            Some(error) => Self::of(error),
            None => Self {
                code: response.text("status").map(str::to_owned),
                ..Self::default()
            },
        }
    }

    /// Returns the error of the first choice, if each choice has an error in place of the end of its answer.
    fn of_choices(document: &Outline) -> Option<Self> {
        let choices = document.get("choices")?.elements();
        let has_failed = |choice: &Outline| {
            choice.get("error").is_some_and(Outline::is_something) || choice.text("finish_reason") == Some("error")
        };
        let first = choices.first().filter(|_| choices.iter().all(has_failed))?;
        let error = first.get("error").or_else(|| document.get("error"));
        Some(error.map_or_else(Self::default, Self::of))
    }

    /// Returns the first of a list of `errors`, if the document tells that there is no answer beside them.
    fn of_list(document: &Outline) -> Option<Self> {
        let first = document.get("errors")?.elements().first()?;
        let has_failed = document.has_null("data") || document.get("success") == Some(&Outline::Flag(false));
        (has_failed && first.text("message").is_some()).then(|| Self::of(first))
    }

    /// Whether the cause may go away by waiting: the status is 408, 409, 429 or 5xx, or not told. A gateway that sends
    /// an error with the status 200 has mostly been failed by the provider behind it.
    pub(super) fn is_transient(&self) -> bool {
        self.status
            .is_none_or(|status| status.is_server_error() || matches!(status.as_u16(), 408 | 409 | 429))
    }
}

/// Returns the number of a status of a failure, from a number or a text with a number.
fn status_number(value: &Outline) -> Option<u16> {
    let number = match value {
        Outline::Number(number) => *number as u16,
        Outline::Text(text) => text.parse().ok()?,
        _ => return None,
    };
    (400..600).contains(&number).then_some(number)
}

/// Returns the status that the name of an error stands for.
fn named_status(name: &str) -> Option<u16> {
    let name = name.to_ascii_lowercase();
    STATUSES
        .iter()
        .find(|(part, _)| name.contains(part))
        .map(|(_, status)| *status)
}

fn status(number: u16) -> Option<StatusCode> {
    StatusCode::from_u16(number).ok()
}
