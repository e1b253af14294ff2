//! [`InvalidConfig`]: a setting that was refused.

use std::{borrow::Cow, error::Error as StdError, fmt};

/// A setting that makes no sense, found when a limit, a layer or an executor is built.
///
/// ```
/// use tower_outbound::{Limits, Rate, RateLimiter};
///
/// let error = RateLimiter::new(Limits::new().requests(Rate::per_second(0))).unwrap_err();
/// assert_eq!(error.field(), "requests.amount");
/// assert_eq!(error.to_string(), "invalid requests.amount: must be above zero, is 0");
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidConfig {
    field: Cow<'static, str>,
    problem: String,
}

// === impl InvalidConfig ===

impl InvalidConfig {
    pub(crate) fn new(field: impl Into<Cow<'static, str>>, problem: impl Into<String>) -> Self {
        Self {
            field: field.into(),
            problem: problem.into(),
        }
    }

    pub(crate) fn positive(field: &'static str, value: usize) -> Result<usize, Self> {
        if value == 0 {
            Err(Self::new(field, "must be above zero, is 0"))
        } else {
            Ok(value)
        }
    }

    /// More than any machine has threads, and few enough to be spawned.
    pub(crate) fn workers(value: usize) -> Result<usize, Self> {
        const MOST: usize = 65_536;
        if value > MOST {
            return Err(Self::new("workers", format!("must be {MOST} at most, is {value}")));
        }
        Self::positive("workers", value)
    }

    pub(crate) fn renamed(self, field: String) -> Self {
        Self {
            field: field.into(),
            ..self
        }
    }

    /// The setting, as it is named in the builder or the config.
    #[must_use]
    pub fn field(&self) -> &str {
        &self.field
    }
}

impl fmt::Display for InvalidConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "invalid {}: {}", self.field, self.problem)
    }
}

impl StdError for InvalidConfig {}
