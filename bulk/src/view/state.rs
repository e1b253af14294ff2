//! [`Snapshot`]: everything that is shown of a run at one instant, as plain values.

use crate::{
    limits::{Bounds, Pace},
    price::Money,
};
use std::time::{Duration, SystemTime};

/// The state of a run at one instant. Views draw it and know nothing else.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Snapshot {
    pub(crate) now: SystemTime,
    pub(crate) elapsed: Duration,
    /// The number of requests that this run sends; `None` if it is not known, because the input is a pipe.
    pub(crate) total: Option<u64>,
    pub(crate) ended: Ended,
    pub(crate) status_429: u64,
    pub(crate) queued: u64,
    pub(crate) in_flight: u64,
    pub(crate) concurrency: u64,
    /// The requests that have failed and wait for another attempt.
    pub(crate) waiting_to_retry: u64,
    /// The requests and the tokens per minute, where they are limited.
    pub(crate) budgets: Vec<BudgetLevel>,
    pub(crate) pause: Option<PauseView>,
    pub(crate) waits_for: Cause,
    pub(crate) time_left: Option<TimeLeft>,
    pub(crate) max_cost: Option<Money>,
    pub(crate) last_failure: Option<String>,
}

/// The sums over all requests that have ended.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Ended {
    pub(crate) completed: u64,
    pub(crate) failed: u64,
    pub(crate) cancelled: u64,
    /// The requests that took more than one attempt.
    pub(crate) retried: u64,
    /// The estimated tokens of the requests that have ended.
    pub(crate) estimated: u64,
    /// The tokens that were used, or the estimate where an answer reports none.
    pub(crate) tokens: u64,
    /// `None` if no prices are given.
    pub(crate) cost: Option<Money>,
    /// The time on the wire of all attempts, and their number.
    pub(crate) calling: Duration,
    pub(crate) attempts: u64,
}

/// The level of a bucket.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct BudgetLevel {
    pub(crate) cause: Cause,
    pub(crate) pace: Pace,
    pub(crate) available: u64,
}

/// A pause of the limiter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PauseView {
    pub(crate) until: SystemTime,
    /// Who paused the run, and why: `the provider: 429 Too Many Requests, Retry-After 75`.
    pub(crate) by: String,
}

/// How long the rest of the run takes, and what it waits for most.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct TimeLeft {
    pub(crate) time: Duration,
    pub(crate) by: Cause,
}

/// What a run waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Cause {
    Requests,
    Tokens,
    InputTokens,
    OutputTokens,
    /// Another limit of the command line, such as one per day.
    Budget,
    Permits,
    Pause,
    Retries,
    Answers,
    Input,
}

/// What is left to do, for [`TimeLeft::of`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Rest {
    /// The requests that have not been sent yet.
    pub(crate) requests: u64,
    /// The tokens that they are expected to use.
    pub(crate) tokens: u64,
    /// How long the further limits take for these requests.
    pub(crate) further: Duration,
    /// The mean time of an attempt on the wire.
    pub(crate) calling: Duration,
    pub(crate) pause: Duration,
}

// === impl Cause ===

impl Cause {
    pub(crate) const ALL: [Self; 10] = [
        Self::Requests,
        Self::Tokens,
        Self::InputTokens,
        Self::OutputTokens,
        Self::Budget,
        Self::Permits,
        Self::Pause,
        Self::Retries,
        Self::Answers,
        Self::Input,
    ];

    /// Returns what is waited for, as it follows "waiting for" and "limited by".
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Requests => "requests per minute",
            Self::Tokens => "tokens per minute",
            Self::InputTokens => "input tokens per minute",
            Self::OutputTokens => "output tokens per minute",
            Self::Budget => "a limit of --budget",
            Self::Permits => "concurrency",
            Self::Pause => "the end of a pause",
            Self::Retries => "retries",
            Self::Answers => "answers",
            Self::Input => "input",
        }
    }

    /// Returns the name for narrow views.
    pub(crate) const fn short_name(self) -> &'static str {
        match self {
            Self::Requests => "requests",
            Self::Tokens => "tokens",
            Self::InputTokens => "input",
            Self::OutputTokens => "output",
            Self::Budget => "--budget",
            Self::Permits => "in flight",
            Self::Pause => "pause",
            Self::Retries => "retries",
            Self::Answers => "answers",
            Self::Input => "input",
        }
    }
}

// === impl Ended ===

impl Ended {
    pub(crate) const fn requests(&self) -> u64 {
        self.completed + self.failed + self.cancelled
    }

    pub(crate) fn mean_calling(&self) -> Duration {
        let attempts = u32::try_from(self.attempts).unwrap_or(u32::MAX);
        self.calling.checked_div(attempts).unwrap_or_default()
    }

    /// Returns how many tokens an estimate of this many turns out to be, as far as requests have ended.
    pub(crate) fn expected(&self, estimated: u64) -> u64 {
        if self.estimated == 0 {
            return estimated;
        }
        (estimated as f64 * (self.tokens as f64 / self.estimated as f64)) as u64
    }
}

// === impl BudgetLevel ===

impl BudgetLevel {
    /// Returns for how many mean requests the bucket holds enough. The mean of the tokens of prompts, and of those of
    /// answers, is taken to be that of all tokens, which is more.
    fn requests_left(&self, mean_tokens: f64) -> f64 {
        let cost = match self.cause {
            Cause::Tokens | Cause::InputTokens | Cause::OutputTokens => mean_tokens.max(1.0),
            _ => 1.0,
        };
        self.available as f64 / cost
    }
}

/// Returns the budget that holds back the next request: the one that has enough for the fewest mean requests.
pub(crate) fn binding(budgets: &[BudgetLevel], mean_tokens: f64) -> Option<Cause> {
    let left = |level: &BudgetLevel| level.requests_left(mean_tokens);
    let least = budgets.iter().min_by(|one, other| left(one).total_cmp(&left(other)));
    least.map(|level| level.cause)
}

// === impl TimeLeft ===

impl TimeLeft {
    /// Returns how long the rest takes at least, by the limit that takes longest. `None` as long as nothing is known
    /// that limits the run.
    pub(crate) fn of(rest: &Rest, bounds: &Bounds, budgets: &[BudgetLevel]) -> Option<Self> {
        // How many tokens of prompts and of answers are left is not known apart.
        let known = budgets
            .iter()
            .filter(|level| matches!(level.cause, Cause::Requests | Cause::Tokens));
        let mut longest = known
            .map(|level| {
                let amount = if level.cause == Cause::Tokens {
                    rest.tokens
                } else {
                    rest.requests
                };
                let beyond = amount.saturating_sub(level.available) as f64;
                let time = Duration::from_secs_f64(beyond * 60.0 / level.pace.per_minute.max(1) as f64);
                Self { time, by: level.cause }
            })
            .max_by_key(|left| left.time);
        if !rest.further.is_zero() {
            let by_further = Self {
                time: rest.further,
                by: Cause::Budget,
            };
            longest = longest.into_iter().chain([by_further]).max_by_key(|left| left.time);
        }
        if !rest.calling.is_zero() {
            let rounds = rest.requests as f64 / bounds.concurrency.max(1) as f64;
            let by_permits = Self {
                time: rest.calling.mul_f64(rounds),
                by: Cause::Permits,
            };
            longest = longest.into_iter().chain([by_permits]).max_by_key(|left| left.time);
        }
        let mut left = longest?;
        if left.time < rest.calling {
            left.by = Cause::Answers;
        }
        if rest.pause > left.time {
            left.by = Cause::Pause;
        }
        left.time += rest.pause + rest.calling;
        Some(left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pace(per_minute: u64) -> Pace {
        Pace {
            per_minute,
            burst: 10,
            initial: 10,
            follows: false,
        }
    }

    fn budgets(requests: u64, tokens: u64) -> [BudgetLevel; 2] {
        [(Cause::Requests, requests, 60), (Cause::Tokens, tokens, 6_000)].map(|(cause, available, per_minute)| {
            BudgetLevel {
                cause,
                available,
                pace: pace(per_minute),
            }
        })
    }

    const BOUNDS: Bounds = Bounds {
        requests: None,
        tokens: None,
        further: crate::limits::Further::NONE,
        concurrency: 4,
    };

    const REST: Rest = Rest {
        requests: 120,
        tokens: 6_000,
        further: Duration::ZERO,
        calling: Duration::from_secs(1),
        pause: Duration::ZERO,
    };

    #[test]
    fn the_limit_that_takes_longest_gives_the_time_left() {
        let left = |rest: &Rest| TimeLeft::of(rest, &BOUNDS, &budgets(0, 0)).map(|left| (left.by, left.time.as_secs()));
        assert_eq!(left(&REST), Some((Cause::Requests, 121)));
        let many_tokens = Rest { tokens: 60_000, ..REST };
        assert_eq!(left(&many_tokens), Some((Cause::Tokens, 601)));
        let further = Rest {
            further: Duration::from_secs(500),
            ..REST
        };
        assert_eq!(left(&further), Some((Cause::Budget, 501)));
        let slow = Rest {
            calling: Duration::from_secs(10),
            ..REST
        };
        assert_eq!(left(&slow), Some((Cause::Permits, 310)));
        let paused = Rest {
            pause: Duration::from_secs(600),
            ..REST
        };
        assert_eq!(left(&paused), Some((Cause::Pause, 721)));
        let last = Rest {
            requests: 0,
            tokens: 0,
            ..REST
        };
        assert_eq!(left(&last), Some((Cause::Answers, 1)));
    }

    #[test]
    fn what_the_buckets_hold_takes_no_time() {
        let left = TimeLeft::of(&REST, &BOUNDS, &budgets(20, 0)).unwrap();
        assert_eq!((left.by, left.time.as_secs()), (Cause::Requests, 101));
    }

    #[test]
    fn without_limits_nothing_is_said_before_the_first_answer() {
        let rest = Rest {
            calling: Duration::ZERO,
            ..REST
        };
        assert_eq!(TimeLeft::of(&rest, &BOUNDS, &[]), None);
        assert_eq!(TimeLeft::of(&REST, &BOUNDS, &[]).unwrap().time.as_secs(), 31);
    }

    #[test]
    fn the_budget_that_is_enough_for_the_fewest_requests_binds() {
        assert_eq!(binding(&budgets(5, 400), 100.0), Some(Cause::Tokens));
        assert_eq!(binding(&budgets(5, 600), 100.0), Some(Cause::Requests));
        assert_eq!(binding(&[], 100.0), None);
    }

    #[test]
    fn the_tokens_left_are_expected_to_be_used_like_those_before() {
        let ended = Ended {
            estimated: 1_000,
            tokens: 250,
            ..Ended::default()
        };
        assert_eq!(ended.expected(4_000), 1_000);
        assert_eq!(Ended::default().expected(4_000), 4_000);
    }
}
