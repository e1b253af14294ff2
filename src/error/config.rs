//! [`InvalidConfig`]: a setting that is out of range or contradicts another.

use std::{borrow::Cow, error::Error as StdError, fmt};

/// A setting that is out of range or contradicts another, found when a limit, a layer or an executor is built.
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

    /// Returns `value` if it is at least 1, and otherwise an error that names `field`.
    pub(crate) fn positive(field: &'static str, value: usize) -> Result<usize, Self> {
        if value == 0 {
            Err(Self::new(field, "must be above zero, is 0"))
        } else {
            Ok(value)
        }
    }

    /// Returns `value` if it is between 1 and `max`, and otherwise an error that names `field`.
    pub(crate) fn positive_up_to(max: usize, field: &'static str, value: usize) -> Result<usize, Self> {
        if value > max {
            return Err(Self::new(field, format!("must be {max} at most, is {value}")));
        }
        Self::positive(field, value)
    }

    /// Returns this error with another name for the setting: the name under which the user has set it.
    pub(crate) fn renamed(self, field: String) -> Self {
        Self {
            field: field.into(),
            ..self
        }
    }

    /// Returns the name of the invalid setting, as the builder or the configuration spells it.
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
