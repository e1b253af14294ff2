//! [`BadResponse`]: a response with a successful status (2xx) that is no success.

use crate::redact;
use bytes::Bytes;
use http::{Response, StatusCode};
use std::{error::Error as StdError, fmt};

/// A response has a successful status (2xx), but its body is not an answer.
///
/// [`CheckLayer`](crate::body::CheckLayer) returns this error. It has the response: status, headers and body. `Debug`
/// and `Display` show neither the headers nor the body, which may contain secrets; of an error that the body reports,
/// they show the code and the message, redacted and cut off after 300 characters.
#[derive(Clone)]
pub struct BadResponse {
    reason: BadResponseReason,
    reported: Reported,
    response: Response<Bytes>,
}

/// Why the body of a successful response is not an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum BadResponseReason {
    /// The body reports an error in place of an answer, or an event of the stream does.
    ReportedError,
    /// There is no body, no event in the stream, or no choice in the completion.
    Empty,
    /// The body is a page for a browser, such as that of a proxy or a login.
    Html,
    /// The body, or the data of an event of the stream, is not JSON.
    NotJson,
    /// The body breaks off: in the middle of a JSON document, before the last event of the stream, or before its
    /// content length.
    Truncated,
}

/// What the body of the response reports of the error. Empty for all reasons but
/// [`ReportedError`](BadResponseReason::ReportedError).
#[derive(Clone, Debug, Default)]
pub(crate) struct Reported {
    pub(crate) code: Option<String>,
    pub(crate) message: Option<String>,
    pub(crate) status: Option<StatusCode>,
    /// Whether the cause of the error does not go away by waiting.
    pub(crate) is_final: bool,
}

/// The longest code or message that is kept, in characters.
const MAX_CHARACTERS: usize = 300;

// === impl BadResponse ===

impl BadResponse {
    pub(crate) fn new(reason: BadResponseReason, reported: Reported, response: Response<Bytes>) -> Self {
        let reported = Reported {
            code: reported.code.map(|code| shown(&code)),
            message: reported.message.map(|message| shown(&message)),
            ..reported
        };
        Self {
            reason,
            reported,
            response,
        }
    }

    /// Returns why the body is not an answer.
    #[must_use]
    pub const fn reason(&self) -> BadResponseReason {
        self.reason
    }

    /// Returns whether another attempt may succeed. A [`RetryPolicy`](crate::retry::RetryPolicy) retries such a call.
    ///
    /// An error that the body reports is transient if its [status](Self::reported_status) is 408, 409, 429 or 5xx, or
    /// is not known. An account without credit is not, whatever number is reported. All other
    /// [reasons](BadResponseReason) are transient.
    #[must_use]
    pub const fn is_transient(&self) -> bool {
        !self.reported.is_final
    }

    /// Returns whether the body reports that a rate limit was exceeded, or that the provider is overloaded: the
    /// [status](Self::reported_status) is 429, 503 or 529.
    #[must_use]
    pub fn is_throttled(&self) -> bool {
        let status = self.reported.status.map(|status| status.as_u16());
        matches!(status, Some(429 | 503 | 529))
    }

    /// Returns the status of the error that the body reports: the number in the body, or the one that the code or type
    /// of the error stands for, such as 529 for `overloaded_error` and 402 for `insufficient_quota`. `None` if the body
    /// reports no error, or one that is not known.
    #[must_use]
    pub const fn reported_status(&self) -> Option<StatusCode> {
        self.reported.status
    }

    /// Returns the code or type of the error that the body reports, such as `rate_limit_exceeded`, if it reports one.
    /// Redacted, and cut off after 300 characters.
    #[must_use]
    pub fn code(&self) -> Option<&str> {
        self.reported.code.as_deref()
    }

    /// Returns the message of the error that the body reports, if it reports one. Redacted, and cut off after 300
    /// characters.
    #[must_use]
    pub fn message(&self) -> Option<&str> {
        self.reported.message.as_deref()
    }

    /// Returns the response, with its whole body. Nothing of it is redacted.
    #[must_use]
    pub const fn response(&self) -> &Response<Bytes> {
        &self.response
    }

    /// Returns the [response](Self::response).
    #[must_use]
    pub fn into_response(self) -> Response<Bytes> {
        self.response
    }
}

impl fmt::Display for BadResponse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (status, bytes) = (self.response.status().as_u16(), self.response.body().len());
        write!(f, "the response is no success in spite of its status {status}: ")?;
        match self.reason {
            BadResponseReason::ReportedError => {
                f.write_str("its body reports an error")?;
                if let Some(status) = self.reported.status {
                    write!(f, " {}", status.as_u16())?;
                }
                for part in [&self.reported.code, &self.reported.message].into_iter().flatten() {
                    write!(f, ": {part}")?;
                }
                Ok(())
            }
            BadResponseReason::Empty => f.write_str("its body holds no answer"),
            BadResponseReason::Html => write!(f, "its body of {bytes} bytes is an HTML page"),
            BadResponseReason::NotJson => write!(f, "its body of {bytes} bytes is not JSON"),
            BadResponseReason::Truncated => write!(f, "its body breaks off after {bytes} bytes"),
        }
    }
}

impl fmt::Debug for BadResponse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BadResponse")
            .field("reason", &self.reason)
            .field("status", &self.response.status())
            .field("reported", &self.reported)
            .finish_non_exhaustive()
    }
}

impl StdError for BadResponse {}

/// Redacts a text of the body, and cuts it off.
fn shown(text: &str) -> String {
    let text = redact::text(text);
    match text.char_indices().nth(MAX_CHARACTERS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.into_owned(),
    }
}
