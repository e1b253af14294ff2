//! [`RequestStatus`]: how far an outbound call has come, from PENDING to its outcome.

use std::{fmt, str::FromStr};

/// How far a call has come. The status of a call only moves forward, and ends as exactly one of
/// [`Completed`](Self::Completed), [`Failed`](Self::Failed) and [`Cancelled`](Self::Cancelled).
///
/// `Display` and `FromStr` use the names of the statuses in capitals: `PENDING`, `QUEUED`, …
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(rename_all = "UPPERCASE")
)]
pub enum RequestStatus {
    /// The call was made and waits for a place in the queue.
    #[default]
    Pending,
    /// The call has a place in the queue.
    Queued,
    /// The call was taken from the queue and waits for its concurrency and rate limits.
    Processing,
    /// The call is on the wire, or waits to be retried.
    Calling,
    /// The call has ended with a response that does not count as a failure. By default that is any response, whatever
    /// its status code.
    Completed,
    /// The call has ended with an error, or with a response that counts as a failure.
    Failed,
    /// The call was ended before there was a response or an error.
    Cancelled,
}

/// The error of parsing a text that is not the name of a [`RequestStatus`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParseStatusError {
    /// The text that was parsed, of which at most [`MAX_TEXT`] characters are kept.
    text: String,
}

const MAX_TEXT: usize = 64;

// === impl RequestStatus ===

impl RequestStatus {
    /// All seven statuses, in their order from `Pending` to `Cancelled`.
    pub const ALL: [Self; 7] = [
        Self::Pending,
        Self::Queued,
        Self::Processing,
        Self::Calling,
        Self::Completed,
        Self::Failed,
        Self::Cancelled,
    ];

    /// Whether a call with this status has ended.
    #[must_use]
    pub const fn is_terminal(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Cancelled)
    }

    /// Returns the name of the status in capitals, such as `PENDING`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "PENDING",
            Self::Queued => "QUEUED",
            Self::Processing => "PROCESSING",
            Self::Calling => "CALLING",
            Self::Completed => "COMPLETED",
            Self::Failed => "FAILED",
            Self::Cancelled => "CANCELLED",
        }
    }
}

impl fmt::Display for RequestStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for RequestStatus {
    type Err = ParseStatusError;

    /// Parses the name of a status in capitals, such as `PENDING`.
    ///
    /// # Errors
    ///
    /// [`ParseStatusError`] if the text is not exactly the name of one of the seven statuses, in capitals.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let status = Self::ALL.into_iter().find(|status| status.as_str() == text);
        status.ok_or_else(|| ParseStatusError {
            text: text.chars().take(MAX_TEXT).collect(),
        })
    }
}

// === impl ParseStatusError ===

impl fmt::Display for ParseStatusError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = RequestStatus::ALL.map(RequestStatus::as_str).join(", ");
        write!(f, "invalid request status {:?}: expected one of {names}", self.text)
    }
}

impl std::error::Error for ParseStatusError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_status_is_parsed_from_its_own_name() {
        for status in RequestStatus::ALL {
            assert_eq!(status.to_string().parse(), Ok(status));
        }
        assert_eq!("CALLING".parse(), Ok(RequestStatus::Calling));
        assert_eq!(
            "calling".parse::<RequestStatus>().unwrap_err().to_string(),
            "invalid request status \"calling\": expected one of PENDING, QUEUED, PROCESSING, CALLING, COMPLETED, \
             FAILED, CANCELLED"
        );
    }

    #[test]
    fn the_last_three_statuses_are_terminal() {
        let terminal: Vec<_> = RequestStatus::ALL
            .into_iter()
            .filter(|status| status.is_terminal())
            .collect();
        assert_eq!(
            terminal,
            [
                RequestStatus::Completed,
                RequestStatus::Failed,
                RequestStatus::Cancelled
            ]
        );
    }
}
