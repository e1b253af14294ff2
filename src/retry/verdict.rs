//! [`Verdict`]: whether a response is worth a retry, and after which delay.

use crate::provider::{Provider, RateLimitInfo};
use http::StatusCode;
use std::time::Duration;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The result is returned.
    Final,
    /// The call may be retried, after the delay that the server requests, if it requests one.
    Retry { delay: Option<Duration> },
}

/// What a verdict depends on.
pub(super) struct ResponseView<'a> {
    pub(super) provider: Option<Provider>,
    pub(super) status: StatusCode,
    pub(super) info: &'a RateLimitInfo,
    /// The body, if it is in memory.
    pub(super) body: Option<&'a [u8]>,
}

/// What the error document in a body reports.
#[derive(Default)]
struct ErrorDocument {
    /// The failure does not pass by waiting.
    is_permanent: bool,
    /// The delay that the server requests.
    delay: Option<Duration>,
}

// === impl ResponseView ===

impl ResponseView<'_> {
    /// The delay in the headers takes precedence over that in the body, and `x-should-retry` over the status and the
    /// body.
    pub(super) fn verdict(&self) -> Verdict {
        let document = ErrorDocument::read(self);
        let delay = self.info.retry_after.or(document.delay);
        match self.info.should_retry {
            Some(true) => Verdict::Retry { delay },
            None if self.may_pass(&document) => Verdict::Retry { delay },
            Some(false) | None => Verdict::Final,
        }
    }

    /// Whether the failure may pass by waiting.
    fn may_pass(&self, document: &ErrorDocument) -> bool {
        match self.status.as_u16() {
            429 if document.is_permanent => false,
            // Anthropic sends the 429 of a rate limit with `retry-after`, that of the spend limit without.
            429 => self.provider != Some(Provider::Anthropic) || self.info.retry_after.is_some(),
            // GitHub sends a 403 for its limits as well as for a missing permission.
            403 => self.provider == Some(Provider::GitHub) && self.info.is_limited(),
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

    /// Reads the body of a response that is not a success, if it is at most 64 KiB long. Error documents are shorter.
    #[cfg(feature = "json")]
    fn read(response: &ResponseView<'_>) -> Self {
        const MAX_BYTES: usize = 64 * 1024;
        let body = response
            .body
            .filter(|body| !response.status.is_success() && body.len() <= MAX_BYTES);
        let body = body.and_then(|body| serde_json::from_slice::<serde_json::Value>(body).ok());
        // Gemini may send a list with the document as its first element.
        let error = body
            .as_ref()
            .map(|body| body.get(0).unwrap_or(body))
            .and_then(|body| body.get("error"));
        match (response.provider, error) {
            (Some(Provider::Gemini), Some(error)) => Self::of_gemini(error),
            (_, Some(error)) => Self {
                // OpenAI's code for an account without credit.
                is_permanent: ["code", "type"]
                    .iter()
                    .any(|field| error.get(field).is_some_and(|text| text == "insufficient_quota")),
                delay: None,
            },
            (_, None) => Self::default(),
        }
    }

    /// Gemini: a limit per day, or of zero (the account has no quota for the model), does not pass by waiting. The
    /// period is in the `quotaId` of a violation, the zero only in the message, the delay in a detail `RetryInfo`.
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
        // `limit: 0`, but not `limit: 0.5` or `limit: 05`.
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
        }
    }
}
