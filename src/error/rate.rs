//! Errors of rate limits.

use super::{BoxError, StoreProblem};
use std::{
    error::Error as StdError,
    fmt,
    time::{Duration, SystemTime},
};

/// The call costs more than the bucket of a rate can ever hold, so it could never be admitted. Nothing was charged to
/// any rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CostExceedsBurst {
    budget: &'static str,
    cost: u64,
    burst: u64,
}

/// A rate that [refuses](crate::Rate::refuse) calls instead of letting them wait does not hold the cost of the call.
/// Nothing was charged to any rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exhausted {
    budget: &'static str,
    cost: u64,
    left: u64,
    retry_after: Duration,
    resets_at: SystemTime,
}

/// A [`KeyedRateLimiter`](crate::KeyedRateLimiter) or a [`Schedule`](crate::Schedule) holds as many keys as it may, and none
/// of them can be forgotten for a new one: each owes something, or is waited for or paused. Nothing was charged to any rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooManyKeys {
    max: usize,
    retry_after: Option<Duration>,
}

/// The Redis store of the shared rate limits was unavailable for as long as a call may wait for it. Nothing was charged
/// to any rate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreUnavailable {
    problem: StoreProblem,
    waited: Duration,
}

/// The reason why a rate limiter did not admit a call. Nothing was charged to any rate.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum AcquireError {
    /// The call costs more than the bucket of a rate can ever hold.
    CostExceedsBurst(CostExceedsBurst),
    /// A rate that refuses calls does not hold the cost of the call.
    Exhausted(Exhausted),
    /// The call's key is new, and the limiter by key holds as many keys as it may.
    TooManyKeys(TooManyKeys),
    /// The rate limits are shared, and their Redis store was unavailable.
    StoreUnavailable(StoreUnavailable),
    /// The cost is not available now. It is available after this time, if no call that comes later takes it before. The
    /// calls that wait already are taken into account. The time is never zero.
    ///
    /// Only the methods return it that do not wait, such as [`try_acquire`](crate::RateLimiter::try_acquire).
    NotYet(Duration),
    /// Only the Redis store of the shared rate limits knows whether the cost is available, and to ask it takes a round
    /// trip. Only the methods return it that do not wait.
    NeedsStore,
}

/// Why the buckets of a rate limiter do not admit a call, and do not let it wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rejected {
    CostExceedsBurst(CostExceedsBurst),
    Exhausted(Exhausted),
}

// === impl CostExceedsBurst ===

impl CostExceedsBurst {
    pub(crate) const fn new(budget: &'static str, cost: u64, burst: u64) -> Self {
        Self { budget, cost, burst }
    }

    /// Returns the amount of the [budget](Self::budget) that the call costs.
    #[must_use]
    pub const fn cost(&self) -> u64 {
        self.cost
    }

    /// Returns the burst of the rate, which is the most that its bucket can hold of the [budget](Self::budget).
    #[must_use]
    pub const fn burst(&self) -> u64 {
        self.burst
    }

    /// Returns the name of the budget whose burst the cost of the call exceeds, such as `requests`.
    #[must_use]
    pub const fn budget(&self) -> &'static str {
        self.budget
    }
}

impl fmt::Display for CostExceedsBurst {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { budget, cost, burst } = self;
        write!(
            f,
            "the call costs {cost} {budget}, more than the burst of {burst}: raise the burst or split the call"
        )
    }
}

impl StdError for CostExceedsBurst {}

// === impl Exhausted ===

impl Exhausted {
    pub(crate) const fn new(
        budget: &'static str,
        cost: u64,
        left: u64,
        retry_after: Duration,
        resets_at: SystemTime,
    ) -> Self {
        Self {
            budget,
            cost,
            left,
            retry_after,
            resets_at,
        }
    }

    /// Returns the name of the budget that is exhausted, such as `micro_usd`.
    #[must_use]
    pub const fn budget(&self) -> &'static str {
        self.budget
    }

    /// Returns what the call costs of the [`budget`](Self::budget).
    #[must_use]
    pub const fn cost(&self) -> u64 {
        self.cost
    }

    /// Returns what is left of the [`budget`](Self::budget).
    #[must_use]
    pub const fn left(&self) -> u64 {
        self.left
    }

    /// Returns how long after the refusal the cost of the call is available if nothing else is charged before. Never
    /// zero.
    #[must_use]
    pub const fn retry_after(&self) -> Duration {
        self.retry_after
    }

    /// Returns when, by the wall clock, the cost of the call is available if nothing else is charged before: for a rate
    /// by the calendar, the start of the next day or month.
    #[must_use]
    pub const fn resets_at(&self) -> SystemTime {
        self.resets_at
    }
}

impl fmt::Display for Exhausted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            budget,
            cost,
            left,
            retry_after,
            ..
        } = self;
        write!(
            f,
            "the call costs {cost} {budget}, of which {left} are left: retry in {retry_after:?}"
        )
    }
}

impl StdError for Exhausted {}

// === impl TooManyKeys ===

impl TooManyKeys {
    pub(crate) const fn new(max: usize, retry_after: Option<Duration>) -> Self {
        Self { max, retry_after }
    }

    /// Returns the largest number of keys that may be held.
    #[must_use]
    pub const fn max(&self) -> usize {
        self.max
    }

    /// Returns the time after which a key may be forgotten, so that there is room for a new one: no key is before. Never
    /// zero. `None` if all keys are waited for or have open estimates, so that the time is not known.
    #[must_use]
    pub const fn retry_after(&self) -> Option<Duration> {
        self.retry_after
    }
}

impl fmt::Display for TooManyKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { max, retry_after } = self;
        write!(f, "{max} keys are held, which is the maximum, and all are in use: ")?;
        match retry_after {
            Some(wait) => write!(f, "retry in {wait:?}, or raise the maximum"),
            None => f.write_str("retry later, or raise the maximum"),
        }
    }
}

impl StdError for TooManyKeys {}

// === impl Rejected ===

impl From<Rejected> for AcquireError {
    fn from(rejected: Rejected) -> Self {
        match rejected {
            Rejected::CostExceedsBurst(error) => Self::CostExceedsBurst(error),
            Rejected::Exhausted(error) => Self::Exhausted(error),
        }
    }
}

// === impl StoreUnavailable ===

impl StoreUnavailable {
    #[cfg(feature = "redis")]
    pub(crate) const fn new(problem: StoreProblem, waited: Duration) -> Self {
        Self { problem, waited }
    }

    /// Returns why the last request to the store failed.
    #[must_use]
    pub const fn problem(&self) -> StoreProblem {
        self.problem
    }

    /// Returns how long the call waited for the Redis store.
    #[must_use]
    pub const fn waited(&self) -> Duration {
        self.waited
    }
}

impl fmt::Display for StoreUnavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { problem, waited } = self;
        write!(
            f,
            "the store of the shared limits is unavailable ({problem}); the call waited {waited:?} for it"
        )
    }
}

impl StdError for StoreUnavailable {}

// === impl AcquireError ===

impl From<Exhausted> for AcquireError {
    fn from(error: Exhausted) -> Self {
        Self::Exhausted(error)
    }
}

impl From<TooManyKeys> for AcquireError {
    fn from(error: TooManyKeys) -> Self {
        Self::TooManyKeys(error)
    }
}

impl From<CostExceedsBurst> for AcquireError {
    fn from(error: CostExceedsBurst) -> Self {
        Self::CostExceedsBurst(error)
    }
}

impl AcquireError {
    /// Returns the error inside this enum, without the enum, so that a caller can find the error by its own type.
    pub(crate) fn into_reason(self) -> BoxError {
        match self {
            Self::CostExceedsBurst(error) => error.into(),
            Self::Exhausted(error) => error.into(),
            Self::TooManyKeys(error) => error.into(),
            Self::StoreUnavailable(error) => error.into(),
            // A call that waits fails for none of the other reasons.
            error => error.into(),
        }
    }

    /// Returns the time after which to retry. `None` if a retry cannot succeed under the current limits, or if the time
    /// is not known.
    #[must_use]
    pub const fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::NotYet(wait) => Some(*wait),
            Self::Exhausted(error) => Some(error.retry_after()),
            Self::TooManyKeys(error) => error.retry_after(),
            Self::CostExceedsBurst(_) | Self::StoreUnavailable(_) | Self::NeedsStore => None,
        }
    }
}

impl fmt::Display for AcquireError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CostExceedsBurst(error) => error.fmt(f),
            Self::Exhausted(error) => error.fmt(f),
            Self::TooManyKeys(error) => error.fmt(f),
            Self::StoreUnavailable(error) => error.fmt(f),
            Self::NotYet(wait) => write!(f, "the rate limit is reached: retry in {wait:?}"),
            Self::NeedsStore => f.write_str(
                "whether the cost is available is known to the store of the shared limits only: use `acquire`",
            ),
        }
    }
}

impl StdError for AcquireError {}
