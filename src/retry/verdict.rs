//! [`Verdict`]: whether the response of a failed call is worth a retry, and after which delay.

#[cfg(feature = "json")]
use crate::error::BadResponse;
use crate::provider::{Provider, RateLimitInfo};
use http::StatusCode;
use std::time::Duration;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The call is not retried: its response or error is returned to the caller.
    Final,
    /// The call may be retried.
    Retry {
        /// The delay that the server requests, if it requests one.
        delay: Option<Duration>,
        /// Whether the server may have processed the request in spite of the failure.
        may_be_processed: bool,
    },
}

/// The parts of a failure (4xx, 5xx) on which the [`Verdict`] depends.
pub(super) struct ResponseView<'a> {
    pub(super) provider: Option<Provider>,
    pub(super) status: StatusCode,
    pub(super) info: &'a RateLimitInfo,
    /// The body of the response, if it is in memory.
    pub(super) body: Option<&'a [u8]>,
}

/// What the JSON error document in the body of a response reports about a failure.
#[derive(Default)]
struct ErrorDocument {
    /// Whether the cause of the failure does not go away by waiting.
    is_permanent: bool,
    /// The delay before the next attempt that the server requests in the error document.
    delay: Option<Duration>,
    /// Whether the document reports a secondary rate limit of GitHub, which its headers need not show.
    is_secondary_limit: bool,
}

/// The delay that GitHub asks for when [a limit is
/// exceeded](https://docs.github.com/en/rest/using-the-rest-api/rate-limits-for-the-rest-api#exceeding-the-rate-limit)
/// and no header tells one. A client that comes back sooner may be banned.
const GITHUB_DELAY: Duration = Duration::from_secs(60);

// === impl ResponseView ===

impl ResponseView<'_> {
    /// Decides whether the failure is worth a retry. A delay in the headers takes precedence over a delay in the body,
    /// and the header `x-should-retry` takes precedence over the status and the body.
    pub(super) fn verdict(&self) -> Verdict {
        let document = ErrorDocument::read(self);
        let is_github_limit = self.provider == Some(Provider::GitHub) && matches!(self.status.as_u16(), 403 | 429);
        let untold = is_github_limit.then_some(GITHUB_DELAY);
        let delay = self.info.retry_after.or(document.delay).or(untold);
        match self.info.should_retry {
            Some(true) => Verdict::Retry {
                delay,
                may_be_processed: false,
            },
            None if self.may_pass(&document) => Verdict::Retry {
                delay,
                // A 503 and Anthropic's 529 report that the server is overloaded and has not begun.
                may_be_processed: self.status.is_server_error() && !matches!(self.status.as_u16(), 503 | 529),
            },
            Some(false) | None => Verdict::Final,
        }
    }

    /// Decides whether a response that is not an answer, in spite of its successful status, is worth a retry.
    #[cfg(feature = "json")]
    pub(super) fn verdict_of_bad_response(&self, error: &BadResponse) -> Verdict {
        let document = ErrorDocument::read(self);
        let may_pass = error.is_transient() && !document.is_permanent;
        if self.info.should_retry.unwrap_or(may_pass) {
            Verdict::Retry {
                delay: self.info.retry_after.or(document.delay),
                may_be_processed: !error.is_throttled(),
            }
        } else {
            Verdict::Final
        }
    }

    /// Returns whether the cause of the failure may go away by waiting, by the status and the error document of the
    /// response.
    fn may_pass(&self, document: &ErrorDocument) -> bool {
        match self.status.as_u16() {
            429 if document.is_permanent => false,
            // Anthropic sends `retry-after` with the 429 of a rate limit, but not with the 429 of the spend limit, for
            // which waiting is of no use. A 429 of Anthropic without that header is not retried.
            429 => self.provider != Some(Provider::Anthropic) || self.info.retry_after.is_some(),
            // GitHub sends a 403 for an exceeded limit as well as for a missing permission, for which waiting is of no
            // use. Only a 403 that reports an exceeded limit, in its headers or its error document, is retried.
            403 => self.provider == Some(Provider::GitHub) && (self.info.is_limited() || document.is_secondary_limit),
            408 | 409 | 500..=599 => true,
            _ => false,
        }
    }
}

// === impl ErrorDocument ===

impl ErrorDocument {
    #[cfg(not(feature = "json"))]
    fn read(response: &ResponseView<'_>) -> Self {
        let _ = response.body;
        Self::default()
    }

    /// Reads the error document in the body of a failure, unless the body is above 64 KiB. Error documents are shorter.
    #[cfg(feature = "json")]
    fn read(response: &ResponseView<'_>) -> Self {
        const MAX_BYTES: usize = 64 * 1024;
        let body = response.body.filter(|body| body.len() <= MAX_BYTES);
        let body = body.and_then(|body| serde_json::from_slice::<serde_json::Value>(body).ok());
        // Gemini may send a list whose first element is the error document.
        let error = body
            .as_ref()
            .map(|body| body.get(0).unwrap_or(body))
            .and_then(|body| body.get("error"));
        match (response.provider, error) {
            (Some(Provider::GitHub), _) => Self {
                is_secondary_limit: body.is_some_and(|body| {
                    let message = body.get("message").and_then(serde_json::Value::as_str);
                    message.is_some_and(|message| message.contains("secondary rate limit"))
                }),
                ..Self::default()
            },
            (Some(Provider::Gemini), Some(error)) => Self::of_gemini(error),
            (_, Some(error)) => Self {
                // OpenAI sends `insufficient_quota` for an account without credit: waiting is of no use.
                is_permanent: ["code", "type"]
                    .iter()
                    .any(|field| error.get(field).is_some_and(|text| text == "insufficient_quota")),
                ..Self::default()
            },
            (_, None) => Self::default(),
        }
    }

    /// Reads Gemini's error document. A limit per day, or a limit of zero (the account has no quota for the model),
    /// does not go away by waiting. The period of a limit is in the `quotaId` of a violation. A limit of zero is only
    /// reported in the message. The delay is in a detail of type `RetryInfo`.
    #[cfg(feature = "json")]
    fn of_gemini(error: &serde_json::Value) -> Self {
        use serde_json::Value;
        let text = |value: &Value, field: &str| value.get(field).and_then(Value::as_str).map(str::to_owned);
        let details = error
            .get("details")
            .and_then(Value::as_array)
            .map_or(&[][..], Vec::as_slice);
        let violations = details
            .iter()
            .filter_map(|detail| detail.get("violations")?.as_array())
            .flatten();
        let is_per_day = violations
            .filter_map(|violation| text(violation, "quotaId"))
            .any(|id| id.contains("PerDay"));
        // Searches the message for `limit: 0`, but not for `limit: 0.5` or `limit: 05`.
        let is_zero = text(error, "message").is_some_and(|message| {
            message.match_indices("limit: 0").any(|(at, found)| {
                let next = message[at + found.len()..].chars().next();
                next.is_none_or(|next| !next.is_ascii_digit() && next != '.')
            })
        });
        let delay = details.iter().find_map(|detail| text(detail, "retryDelay"));
        Self {
            is_permanent: is_per_day || is_zero,
            delay: delay.and_then(|delay| crate::provider::parse_go_duration(&delay)),
            ..Self::default()
        }
    }
}
