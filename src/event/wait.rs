//! [`Wait`] and [`WaitCause`]: what a call has waited for, and how long.

use crate::budget::Budget;
use std::{fmt, str::FromStr, time::Duration};

/// What a call waits for before it is on the wire, or between two attempts.
///
/// `Display` and `FromStr` use the [names](Self::name) of the causes: `place`, `turn`, …, and for a budget
/// `budget:requests`, `budget:tokens`, ….
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum WaitCause {
    /// A place in the queue, which was full.
    Place,
    /// Its turn in the queue. A call leaves the queue when the service below is ready for it: in an executor, when a permit
    /// of the concurrency limit is free. With a [`Schedule`](crate::Schedule), it leaves when its permit and its budgets are
    /// there, so this includes the waits for both.
    Turn,
    /// A permit of a [concurrency limit](crate::concurrency), because the most calls that it allows were in flight. It is
    /// the wait of a call that was made: a service that waits until it is ready has no call yet. So in an executor, it is
    /// the wait of retries.
    Permit,
    /// A [rate](crate::Rate) of this budget, which was the last of the call's budgets to be available.
    Budget(Budget),
    /// The end of a [pause](crate::RateLimiter::pause_for) of the rate limiter, such as one that the provider has asked for.
    Pause,
    /// The delay before a further attempt: a backoff, or the time that the provider has asked for.
    Backoff,
    /// The service below the limits, which was not ready, such as a client without a free connection.
    Service,
}

/// How long a call has waited for one [cause](WaitCause), in all its attempts together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct Wait {
    /// What the call has waited for.
    #[cfg_attr(feature = "serde", serde(with = "super::formats::text"))]
    pub cause: WaitCause,
    /// How long. In JSON, it is a number of seconds.
    #[cfg_attr(feature = "serde", serde(rename = "seconds", with = "super::formats::seconds"))]
    pub duration: Duration,
}

/// The error of parsing a text that is not the name of a [`WaitCause`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParseWaitCauseError {
    /// The text that was parsed, of which at most [`MAX_TEXT`] characters are kept.
    text: String,
}

const MAX_TEXT: usize = 64;

/// The waits of one call, at most one for each cause.
#[derive(Clone, Debug, Default)]
pub(super) struct Waits(Vec<Wait>);

// === impl WaitCause ===

impl WaitCause {
    /// The causes that are not budgets.
    const SIMPLE: [Self; 6] = [
        Self::Place,
        Self::Turn,
        Self::Permit,
        Self::Pause,
        Self::Backoff,
        Self::Service,
    ];

    /// Returns a short name for metrics and logs: `place`, `turn`, `permit`, `budget`, `pause`, `backoff` or `service`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Place => "place",
            Self::Turn => "turn",
            Self::Permit => "permit",
            Self::Budget(_) => "budget",
            Self::Pause => "pause",
            Self::Backoff => "backoff",
            Self::Service => "service",
        }
    }

    /// Returns the budget, if the call has waited for one.
    #[must_use]
    pub const fn budget(self) -> Option<Budget> {
        match self {
            Self::Budget(budget) => Some(budget),
            _ => None,
        }
    }
}

impl fmt::Display for WaitCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.budget() {
            Some(budget) => write!(f, "{}:{}", self.name(), budget.name()),
            None => f.write_str(self.name()),
        }
    }
}

impl FromStr for WaitCause {
    type Err = ParseWaitCauseError;

    /// Parses what `Display` writes.
    ///
    /// # Errors
    ///
    /// [`ParseWaitCauseError`] if the text is not exactly the name of a cause, or if it names a budget whose name is not
    /// valid.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let budget = text.strip_prefix("budget:").and_then(|name| name.parse().ok());
        let simple = || Self::SIMPLE.into_iter().find(|cause| cause.name() == text);
        budget
            .map(Self::Budget)
            .or_else(simple)
            .ok_or_else(|| ParseWaitCauseError {
                text: text.chars().take(MAX_TEXT).collect(),
            })
    }
}

impl fmt::Display for ParseWaitCauseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = WaitCause::SIMPLE.map(WaitCause::name).join(", ");
        write!(
            f,
            "invalid cause of a wait {:?}: expected one of {names}, or budget:NAME",
            self.text
        )
    }
}

impl std::error::Error for ParseWaitCauseError {}

// === impl Waits ===

impl Waits {
    /// Adds a wait. One that took no time is not kept.
    pub(super) fn add(&mut self, cause: WaitCause, duration: Duration) {
        if duration.is_zero() {
            return;
        }
        match self.0.iter_mut().find(|wait| wait.cause == cause) {
            Some(wait) => wait.duration = wait.duration.saturating_add(duration),
            None => self.0.push(Wait { cause, duration }),
        }
    }

    pub(super) fn as_slice(&self) -> &[Wait] {
        &self.0
    }

    pub(super) fn into_vec(self) -> Vec<Wait> {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cause_is_parsed_from_its_own_name() {
        let budgets = [Budget::Tokens, Budget::from("images")].map(WaitCause::Budget);
        for cause in WaitCause::SIMPLE.into_iter().chain(budgets) {
            assert_eq!(cause.to_string().parse(), Ok(cause));
        }
        assert_eq!(WaitCause::Budget(Budget::Tokens).to_string(), "budget:tokens");
        assert_eq!(
            "budget:No".parse::<WaitCause>().unwrap_err().to_string(),
            "invalid cause of a wait \"budget:No\": expected one of place, turn, permit, pause, backoff, service, or \
             budget:NAME"
        );
    }

    #[test]
    fn waits_for_one_cause_are_added_up() {
        let mut waits = Waits::default();
        waits.add(WaitCause::Permit, Duration::from_secs(1));
        waits.add(WaitCause::Turn, Duration::ZERO);
        waits.add(WaitCause::Pause, Duration::from_secs(2));
        waits.add(WaitCause::Permit, Duration::from_secs(3));
        let waits: Vec<_> = waits
            .as_slice()
            .iter()
            .map(|wait| (wait.cause, wait.duration.as_secs()))
            .collect();
        assert_eq!(waits, [(WaitCause::Permit, 4), (WaitCause::Pause, 2)]);
    }
}
