//! [`Verdict`]: whether a response is worth another attempt.

use crate::provider::{Provider, RateLimitInfo};
use http::StatusCode;
use std::time::Duration;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is what it is.
    Final,
    /// In this time, if the server says when.
    Again(Option<Duration>),
}

/// What a response says.
pub(super) struct ResponseView<'a> {
    pub(super) provider: Option<Provider>,
    pub(super) status: StatusCode,
    pub(super) info: &'a RateLimitInfo,
    pub(super) body: Option<&'a [u8]>,
}

impl ResponseView<'_> {
    pub(super) fn verdict(&self) -> Verdict {
        let reason = Reason::read(self);
        let delay = self.info.retry_after.or(reason.delay);
        match self.info.should_retry {
            Some(true) => Verdict::Again(delay),
            None if self.may_pass(&reason) => Verdict::Again(delay),
            Some(false) | None => Verdict::Final,
        }
    }

    /// Whether waiting may help.
    fn may_pass(&self, reason: &Reason) -> bool {
        match self.status.as_u16() {
            429 if reason.is_final => false,
            // Without a time to come back at, it is the cap on what may be spent.
            429 => self.provider != Some(Provider::Anthropic) || self.info.retry_after.is_some(),
            403 => self.provider == Some(Provider::GitHub) && self.is_githubs_limit(),
            408 | 409 | 500..=599 => true,
            _ => false,
        }
    }

    fn is_githubs_limit(&self) -> bool {
        let is_used_up = self.info.windows.iter().any(|window| window.remaining == Some(0));
        is_used_up || self.info.retry_after.is_some()
    }
}

/// What the body says.
#[derive(Default)]
struct Reason {
    /// It will not go away by waiting.
    is_final: bool,
    delay: Option<Duration>,
}

impl Reason {
    #[cfg(not(feature = "json"))]
    fn read(said: &ResponseView<'_>) -> Self {
        let _ = said.body;
        Self::default()
    }

    /// Only of responses that are no success, and short.
    #[cfg(feature = "json")]
    fn read(said: &ResponseView<'_>) -> Self {
        const MOST: usize = 64 * 1024;
        let body = said.body.filter(|body| !said.status.is_success() && body.len() <= MOST);
        let body = body.and_then(|body| serde_json::from_slice::<serde_json::Value>(body).ok());
        // Gemini may put the error into a list.
        let error = body
            .as_ref()
            .map(|body| body.get(0).unwrap_or(body))
            .and_then(|body| body.get("error"));
        match (said.provider, error) {
            (Some(Provider::Gemini), Some(error)) => Self::of_gemini(error),
            (_, Some(error)) => Self {
                is_final: ["code", "type"]
                    .iter()
                    .any(|field| error.get(field).is_some_and(|text| text == "insufficient_quota")),
                delay: None,
            },
            (_, None) => Self::default(),
        }
    }

    /// A quota by the day, or one of zero, does not come back by waiting.
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
        let is_by_the_day = violations
            .filter_map(|violation| text(violation, "quotaId"))
            .any(|id| id.contains("PerDay"));
        let is_zero = text(error, "message").is_some_and(|message| {
            message.match_indices("limit: 0").any(|(at, found)| {
                let next = message[at + found.len()..].chars().next();
                next.is_none_or(|next| !next.is_ascii_digit() && next != '.')
            })
        });
        let delay = details.iter().find_map(|detail| text(detail, "retryDelay"));
        Self {
            is_final: is_by_the_day || is_zero,
            delay: delay.and_then(|delay| crate::provider::duration(&delay)),
        }
    }
}
