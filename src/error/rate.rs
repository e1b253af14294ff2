//! Errors of rate limits.

use super::BoxError;

use std::{borrow::Cow, error::Error as StdError, fmt, time::Duration};

/// The call costs more than a bucket can ever hold, so that waiting would never end. Nothing was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CostExceedsBurst {
    budget: &'static str,
    cost: u64,
    burst: u64,
}

/// The store that keeps shared limits does not answer, and waiting for it is over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreUnavailable {
    problem: Cow<'static, str>,
    waited: Duration,
}

/// Why a limiter let a call not pass. It has taken nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum AcquireError {
    /// It could never pass.
    CostExceedsBurst(CostExceedsBurst),
    /// The limits are shared, and their store is lost.
    StoreUnavailable(StoreUnavailable),
}

// === impl CostExceedsBurst ===

impl CostExceedsBurst {
    pub(crate) const fn new(budget: &'static str, cost: u64, burst: u64) -> Self {
        Self { budget, cost, burst }
    }

    /// What the call would have taken.
    #[must_use]
    pub const fn cost(&self) -> u64 {
        self.cost
    }

    /// The most the bucket can hold.
    #[must_use]
    pub const fn burst(&self) -> u64 {
        self.burst
    }

    /// Which budget: `requests` or `tokens`.
    #[must_use]
    pub const fn budget(&self) -> &'static str {
        self.budget
    }
}

impl fmt::Display for CostExceedsBurst {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { budget, cost, burst } = self;
        write!(f, "the call costs {cost} {budget}, more than the burst of {burst}")
    }
}

impl StdError for CostExceedsBurst {}

// === impl StoreUnavailable ===

impl StoreUnavailable {
    #[cfg(feature = "redis")]
    pub(crate) const fn new(problem: Cow<'static, str>, waited: Duration) -> Self {
        Self { problem, waited }
    }

    /// How long the call has waited for it.
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
            "the store of the shared limits is lost ({problem}), and was waited for {waited:?}"
        )
    }
}

impl StdError for StoreUnavailable {}

// === impl AcquireError ===

impl From<CostExceedsBurst> for AcquireError {
    fn from(error: CostExceedsBurst) -> Self {
        Self::CostExceedsBurst(error)
    }
}

impl AcquireError {
    /// The reason itself, so that it can be found by its type.
    pub(crate) fn into_reason(self) -> BoxError {
        match self {
            Self::CostExceedsBurst(error) => error.into(),
            Self::StoreUnavailable(error) => error.into(),
        }
    }
}

impl fmt::Display for AcquireError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CostExceedsBurst(error) => error.fmt(f),
            Self::StoreUnavailable(error) => error.fmt(f),
        }
    }
}

impl StdError for AcquireError {}
