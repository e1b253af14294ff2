//! What kind of failure the result of an attempt is, what the server says about it, and what to do.

use crate::client::{Untrusted, causes};
use http::{Response, StatusCode, header};
use hyper::body::Bytes;
use serde_json::Value;
use std::{error::Error as StdError, fmt, io, time::Duration};
use tower_outbound::{error::BadResponse, provider::Provider};

/// The longest text of a failure that is kept, in characters. Much less is shown, so that a key in what is shown is not
/// cut in two here, and can be recognized.
const MAX_TEXT: usize = 2_000;

/// The largest error document that is read, in bytes.
const MAX_DOCUMENT: usize = 64 << 10;

/// A failed attempt.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) kind: Kind,
    pub(super) status: Option<u16>,
    /// What the server or the connection says, in one line of at most [`MAX_TEXT`] characters. It may repeat a key.
    pub(super) message: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    Key,
    Forbidden,
    Quota,
    Model,
    NoSuchPath,
    WaitTooLong,
    UnknownHost,
    Certificate,
    Refused,
    Timeout,
    Connection,
    Throttled,
    Overloaded,
    Redirect,
    BadRequest,
    ServerError,
    /// Any other failure, such as a response that is too large, or one that is no answer.
    BadAnswer,
}

impl Kind {
    /// Returns whether the cause stays the same for every further request, whatever the request holds.
    pub(super) const fn is_final(self) -> bool {
        matches!(
            self,
            Self::Key
                | Self::Forbidden
                | Self::Quota
                | Self::Model
                | Self::NoSuchPath
                | Self::WaitTooLong
                | Self::UnknownHost
                | Self::Certificate
                | Self::Redirect
        )
    }

    /// What the user can do, where that does not depend on the key.
    pub(super) const fn advice(self) -> Option<&'static str> {
        Some(match self {
            Self::Forbidden => "May this key use this API?",
            Self::Quota => "The account has no credit or quota left: see the provider's billing page",
            Self::Model => "Is the name of the model right, and may this key use it?",
            Self::NoSuchPath => "Is the path of the URL right?",
            Self::WaitTooLong => "--max-wait sets the longest wait; --resume continues later",
            Self::UnknownHost => "Is the URL right, and is there a network?",
            Self::Certificate => "--ca FILE names certificates to trust",
            Self::Redirect => "Redirects are not followed: is the URL right?",
            Self::Refused => "Is the server running? Retrying",
            _ => return None,
        })
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Key => "the key is refused",
            Self::Forbidden => "access is refused",
            Self::Quota => "the quota is used up",
            Self::Model => "the model is refused",
            Self::NoSuchPath => "there is no such path",
            Self::WaitTooLong => "the wait is too long",
            Self::UnknownHost => "the host is unknown",
            Self::Certificate => "the certificate is not trusted",
            Self::Refused => "the connection is refused",
            Self::Timeout => "the time is over",
            Self::Connection => "the connection failed",
            Self::Throttled => "the provider throttles",
            Self::Overloaded => "the provider is overloaded",
            Self::Redirect => "the server redirects",
            Self::BadRequest => "the request is refused",
            Self::ServerError => "the server failed",
            Self::BadAnswer => "the answer is none",
        })
    }
}

impl Failure {
    /// The failure of a response without a 2xx status. `delay` is the wait that the provider asks for, and `max_wait`
    /// the longest that the run may wait.
    pub(super) fn of_response(
        provider: Provider,
        response: &Response<Bytes>,
        delay: Option<Duration>,
        max_wait: Duration,
    ) -> Self {
        let document = ErrorDocument::of(response);
        let status = response.status();
        let is_throttled = matches!(status.as_u16(), 429 | 503 | 529)
            || (status == StatusCode::FORBIDDEN && provider == Provider::GitHub);
        let message = document.message(response);
        let (kind, message) = match delay.filter(|delay| is_throttled && *delay > max_wait) {
            Some(delay) => {
                let delay = Duration::from_secs(delay.as_secs());
                let message = format!("{message}; it asks to wait {}", humantime::format_duration(delay));
                (Kind::WaitTooLong, message)
            }
            // Anthropic sends a delay with the 429 of a rate limit, but not with that of the account's spend limit.
            None if status == StatusCode::TOO_MANY_REQUESTS && provider == Provider::Anthropic && delay.is_none() => {
                (Kind::Quota, message)
            }
            None => (document.kind(provider, status), message),
        };
        Self {
            kind,
            status: Some(status.as_u16()),
            message,
        }
    }

    /// The failure of an attempt without a response, or with one that is none.
    pub(super) fn of_error(error: &(dyn StdError + 'static)) -> Self {
        let last = causes(error).last().unwrap_or(error).to_string();
        let is = |is: fn(&reqwest::Error) -> bool| {
            causes(error).any(|cause| cause.downcast_ref::<reqwest::Error>().is_some_and(is))
        };
        let io = causes(error).find_map(|cause| cause.downcast_ref::<io::Error>().map(io::Error::kind));
        // The type of the error of a resolver is private to the client, and the kind of its I/O error has no name.
        let is_unknown_host = causes(error).any(|cause| cause.to_string() == "dns error");
        let bad = causes(error).find_map(|cause| cause.downcast_ref::<BadResponse>());
        let (kind, message) = if error.is::<Untrusted>() {
            (Kind::Certificate, error.to_string())
        } else if let Some(bad) = bad {
            // The status is a 2xx, but the body reports another one.
            let kind = match bad.reported_status().map_or(0, |status| status.as_u16()) {
                401 => Kind::Key,
                402 => Kind::Quota,
                403 => Kind::Forbidden,
                404 => Kind::NoSuchPath,
                429 => Kind::Throttled,
                503 | 529 => Kind::Overloaded,
                _ => Kind::BadAnswer,
            };
            (kind, error.to_string())
        } else if is_unknown_host {
            (Kind::UnknownHost, format!("the host cannot be found: {last}"))
        } else if io == Some(io::ErrorKind::ConnectionRefused) {
            (Kind::Refused, last)
        } else if is(reqwest::Error::is_timeout) || io == Some(io::ErrorKind::TimedOut) {
            let what = if is(reqwest::Error::is_connect) {
                "no connection in time"
            } else {
                "no response in time"
            };
            (Kind::Timeout, what.into())
        } else if io.is_some() || is(reqwest::Error::is_connect) || is(reqwest::Error::is_request) {
            (Kind::Connection, format!("no response: {last}"))
        } else {
            (Kind::BadAnswer, error.to_string())
        };
        Self {
            kind,
            status: None,
            message: one_line(&message),
        }
    }
}

/// The error in the body of a response, in the forms of the providers and of those who copy them.
struct ErrorDocument {
    error: Option<Value>,
}

impl ErrorDocument {
    fn of(response: &Response<Bytes>) -> Self {
        let body = response.body();
        let read = || serde_json::from_slice::<Value>(body).ok();
        let mut error = (body.len() <= MAX_DOCUMENT).then(read).flatten();
        // Gemini may send a list that holds the error document alone.
        if let Some(Value::Array(list)) = &mut error {
            error = list.pop();
        }
        Self { error }
    }

    fn text(&self, field: &str) -> Option<&str> {
        let error = self.error.as_ref()?;
        let inner = error.get("error").filter(|inner| inner.is_object()).unwrap_or(error);
        inner.get(field)?.as_str()
    }

    fn kind(&self, provider: Provider, status: StatusCode) -> Kind {
        let codes = [self.text("code"), self.text("type"), self.text("status")];
        let names = |names: &[&str]| codes.iter().flatten().any(|code| names.contains(code));
        if status == StatusCode::PAYMENT_REQUIRED
            || names(&["insufficient_quota", "billing_error", "billing_hard_limit_reached"])
        {
            return Kind::Quota;
        }
        if status.is_client_error() && names(&["model_not_found", "invalid_model", "model_not_available"]) {
            return Kind::Model;
        }
        let says = |text: &str| self.text("message").is_some_and(|message| message.contains(text));
        match status.as_u16() {
            401 => Kind::Key,
            // Gemini answers a wrong key with 400, and Anthropic an account without credit.
            400 if says("API key not valid") => Kind::Key,
            400 if says("credit balance is too low") => Kind::Quota,
            // GitHub sends a 403 for an exceeded limit, too.
            403 if provider == Provider::GitHub && says("rate limit") => Kind::Throttled,
            403 => Kind::Forbidden,
            404 if says("model") => Kind::Model,
            404 | 405 => Kind::NoSuchPath,
            // Gemini names the limit that is exceeded. That of a day does not pass by waiting.
            429 if provider == Provider::Gemini && self.names_limit_of_a_day() => Kind::Quota,
            429 => Kind::Throttled,
            503 | 529 => Kind::Overloaded,
            300..=399 => Kind::Redirect,
            400..=499 => Kind::BadRequest,
            _ => Kind::ServerError,
        }
    }

    fn names_limit_of_a_day(&self) -> bool {
        let details = self
            .error
            .as_ref()
            .and_then(|error| error.pointer("/error/details")?.as_array());
        let violations = details
            .into_iter()
            .flatten()
            .filter_map(|detail| detail.get("violations")?.as_array());
        let mut ids = violations
            .flatten()
            .filter_map(|violation| violation.get("quotaId")?.as_str());
        ids.any(|id| id.contains("PerDay"))
    }

    fn message(&self, response: &Response<Bytes>) -> String {
        let error = self.error.as_ref();
        let plain = error.and_then(|error| error.get("error")).and_then(Value::as_str);
        let message = self.text("message").or_else(|| self.text("detail")).or(plain);
        let text = String::from_utf8_lossy(&response.body()[..response.body().len().min(MAX_DOCUMENT)]);
        let content_type = response.headers().get(header::CONTENT_TYPE);
        let is_html = content_type.is_some_and(|kind| kind.as_bytes().starts_with(b"text/html"));
        match message {
            Some(message) => one_line(message),
            None if is_html => format!("HTML instead of JSON ({})", one_line(title(&text))),
            None if text.trim().is_empty() => response.status().canonical_reason().unwrap_or("no body").to_owned(),
            None => one_line(&text),
        }
    }
}

/// The title of an HTML page, or its beginning.
fn title(html: &str) -> &str {
    let titled = html
        .split_once("<title>")
        .and_then(|(_, rest)| rest.split_once("</title>"));
    titled.map_or_else(|| html.get(..80).unwrap_or(html), |(title, _)| title)
}

/// Returns the text in one line, without control characters, and cut after [`MAX_TEXT`]. Words that look
/// like keys are left out.
fn one_line(text: &str) -> String {
    let mut line = String::new();
    for word in text.split(|letter: char| letter.is_whitespace() || letter.is_control()) {
        if word.is_empty() {
            continue;
        }
        if !line.is_empty() {
            line.push(' ');
        }
        let looks_like_key = ["sk-", "gsk_", "AIza", "ghp_", "github_pat_", "csk-", "Bearer"]
            .iter()
            .any(|prefix| {
                word.trim_start_matches(|letter: char| !letter.is_alphanumeric())
                    .starts_with(prefix)
            });
        line.push_str(if looks_like_key { "…" } else { word });
        if line.len() > MAX_TEXT && line.chars().count() > MAX_TEXT {
            return line.chars().take(MAX_TEXT).chain(['…']).collect();
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(status: u16, body: &'static str) -> Failure {
        let response = Response::builder().status(status).body(Bytes::from(body)).unwrap();
        Failure::of_response(Provider::OpenAi, &response, None, HOUR)
    }

    const HOUR: Duration = Duration::from_secs(3_600);

    #[test]
    fn a_response_is_known_by_its_status_and_its_error_document() {
        for (status, body, kind) in [
            (401, r#"{"error":{"message":"Incorrect API key provided"}}"#, Kind::Key),
            (
                400,
                r#"[{"error":{"message":"API key not valid. Please pass a valid API key."}}]"#,
                Kind::Key,
            ),
            (402, "", Kind::Quota),
            (
                429,
                r#"{"error":{"message":"no","code":"insufficient_quota"}}"#,
                Kind::Quota,
            ),
            (429, r#"{"error":{"message":"slow down"}}"#, Kind::Throttled),
            (
                404,
                r#"{"error":{"message":"The model `x` does not exist"}}"#,
                Kind::Model,
            ),
            (
                404,
                r#"{"type":"error","error":{"type":"not_found_error","message":"model: x"}}"#,
                Kind::Model,
            ),
            (
                400,
                r#"{"message":"Invalid model: x","type":"invalid_model"}"#,
                Kind::Model,
            ),
            (404, "<html>", Kind::NoSuchPath),
            (403, "", Kind::Forbidden),
            (
                400,
                r#"{"error":{"message":"too many tokens for the model"}}"#,
                Kind::BadRequest,
            ),
            (302, "", Kind::Redirect),
            (529, "", Kind::Overloaded),
            (500, "", Kind::ServerError),
        ] {
            assert_eq!(failure(status, body).kind, kind, "{status} {body}");
        }
    }

    #[test]
    fn the_message_is_what_the_server_says_in_one_line() {
        assert_eq!(
            failure(401, r#"{"error":{"message":"Wrong\nkey"}}"#).message,
            "Wrong key"
        );
        assert_eq!(failure(400, r#"{"error":"bad"}"#).message, "bad");
        assert_eq!(failure(400, r#"{"detail":"bad"}"#).message, "bad");
        assert_eq!(failure(413, "").message, "Payload Too Large");
        assert_eq!(failure(500, "a\u{1b}[31mb").message, "a [31mb");
        let html = Response::builder().status(502).header("content-type", "text/html");
        let html = html.body(Bytes::from("<html><title>502 Bad Gateway</title>")).unwrap();
        let message = Failure::of_response(Provider::OpenAi, &html, None, HOUR).message;
        assert_eq!(message, "HTML instead of JSON (502 Bad Gateway)");
        assert_eq!(one_line(&"a".repeat(10_000)).chars().count(), MAX_TEXT + 1);
    }

    #[test]
    fn the_message_shows_no_key() {
        let message = failure(
            401,
            r#"{"error":{"message":"Incorrect API key: (sk-proj-abc) provided"}}"#,
        )
        .message;
        assert_eq!(message, "Incorrect API key: … provided");
    }

    #[test]
    fn a_delay_that_is_too_long_is_named() {
        let response = Response::builder()
            .status(429)
            .body(Bytes::from(r#"{"error":{"message":"slow down"}}"#));
        let day = Some(Duration::from_secs(86_400));
        let failure = Failure::of_response(Provider::OpenAi, &response.unwrap(), day, HOUR);
        assert_eq!(failure.kind, Kind::WaitTooLong);
        assert_eq!(failure.message, "slow down; it asks to wait 1day");
    }

    #[test]
    fn a_quota_that_waiting_does_not_bring_back_is_known_by_provider() {
        let kind = |provider, body: &'static str, delay| {
            let response = Response::builder().status(429).body(Bytes::from(body)).unwrap();
            Failure::of_response(provider, &response, delay, HOUR).kind
        };
        let second = Some(Duration::from_secs(1));
        assert_eq!(kind(Provider::Anthropic, "{}", None), Kind::Quota);
        assert_eq!(kind(Provider::Anthropic, "{}", second), Kind::Throttled);
        let per = |period: &'static str| {
            if period == "day" {
                r#"{"error":{"details":[{"violations":[{"quotaId":"RequestsPerDayPerModel"}]}]}}"#
            } else {
                r#"{"error":{"details":[{"violations":[{"quotaId":"RequestsPerMinutePerModel"}]}]}}"#
            }
        };
        assert_eq!(kind(Provider::Gemini, per("day"), None), Kind::Quota);
        assert_eq!(kind(Provider::Gemini, per("minute"), None), Kind::Throttled);
    }

    #[test]
    fn an_error_without_a_response_is_known_by_its_causes() {
        let refused = io::Error::from(io::ErrorKind::ConnectionRefused);
        assert_eq!(Failure::of_error(&refused).kind, Kind::Refused);
        let reset = io::Error::from(io::ErrorKind::ConnectionReset);
        assert_eq!(Failure::of_error(&reset).kind, Kind::Connection);
        assert_eq!(Failure::of_error(&fmt::Error).kind, Kind::BadAnswer);
    }
}
