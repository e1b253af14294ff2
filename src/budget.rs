//! [`Budget`]: what a provider counts, by name.

use crate::error::InvalidConfig;
use std::{
    fmt,
    num::NonZeroU16,
    str::FromStr,
    sync::{Mutex, MutexGuard, PoisonError},
};

/// What a provider counts and a [`Rate`](crate::Rate) limits: requests, tokens, or something that the user names.
///
/// Wherever a budget is asked for, its name can be given as a string: the names of the built-in budgets, or any other.
///
/// ```
/// use tower_outbound::rate::Budget;
///
/// assert_eq!(Budget::from("input_tokens"), Budget::InputTokens);
/// assert_eq!(Budget::from("images").name(), "images");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Budget {
    /// The number of requests: `requests`.
    Requests,
    /// The number of the API's tokens, such as a language model's, of the prompt and of the answer together: `tokens`.
    Tokens,
    /// The number of tokens of the prompt: `input_tokens`.
    InputTokens,
    /// The number of tokens of the answer: `output_tokens`.
    OutputTokens,
    /// What the user has named, such as `images`, seconds of audio, or a currency in its smallest unit.
    Named(BudgetName),
}

/// The name of a budget that is not built in. It is created from a string by [`Budget::from`].
///
/// A name consists of 1 to 64 lower-case letters, digits, `_`, `-` and `.`. Whether it is valid is checked when limits
/// with it are built into a limiter, or by `Budget`'s [`FromStr`]. A process remembers each name that it has used, at
/// most 1,024, so names should not come from requests.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct BudgetName(NonZeroU16);

/// The names of all budgets that this process has used, each at the position of its number minus 1.
static NAMES: Mutex<Vec<&'static str>> = Mutex::new(Vec::new());

/// The largest number of names. Further ones are all the same invalid name.
const MAX_NAMES: u16 = 1_024;
/// The longest valid name, in bytes.
const MAX_LENGTH: usize = 64;

// === impl Budget ===

impl Budget {
    /// Returns the name of the budget, as in errors and in the text form of limits.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Requests => "requests",
            Self::Tokens => "tokens",
            Self::InputTokens => "input_tokens",
            Self::OutputTokens => "output_tokens",
            Self::Named(name) => name.as_str(),
        }
    }

    /// Returns an error if the name of the budget is not valid.
    pub(crate) fn check(self) -> Result<(), InvalidConfig> {
        let Self::Named(name) = self else { return Ok(()) };
        if name.0.get() > MAX_NAMES {
            return Err(InvalidConfig::new(
                "budget",
                format!("must be one of at most {MAX_NAMES} names in a process"),
            ));
        }
        check_name(name.as_str())
    }
}

fn check_name(name: &str) -> Result<(), InvalidConfig> {
    if is_valid(name) {
        return Ok(());
    }
    let name = shortened(name);
    Err(InvalidConfig::new(
        "budget",
        format!("must be a name of 1 to {MAX_LENGTH} of the characters a-z, 0-9, _, - and ., is {name:?}"),
    ))
}

/// Returns the beginning of a name that is too long, which is enough for an error to show, and is too long itself.
fn shortened(name: &str) -> &str {
    let end = name.char_indices().nth(MAX_LENGTH + 1).map(|(end, _)| end);
    end.and_then(|end| name.get(..end)).unwrap_or(name)
}

fn is_valid(name: &str) -> bool {
    let is_valid = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"_-.".contains(&byte);
    (1..=MAX_LENGTH).contains(&name.len()) && name.bytes().all(is_valid)
}

/// Returns the built-in budget with this name, or else the budget that the user names so.
impl From<&str> for Budget {
    fn from(name: &str) -> Self {
        match name {
            "requests" => Self::Requests,
            "tokens" => Self::Tokens,
            "input_tokens" => Self::InputTokens,
            "output_tokens" => Self::OutputTokens,
            name => Self::Named(BudgetName::of(name)),
        }
    }
}

impl FromStr for Budget {
    type Err = InvalidConfig;

    /// Returns the budget with this name.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`] for a name that is not valid, and if the process has used 1,024 other names. A name that is not
    /// valid is not remembered.
    fn from_str(name: &str) -> Result<Self, InvalidConfig> {
        check_name(name)?;
        let budget = Self::from(name);
        budget.check().map(|()| budget)
    }
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

// === impl BudgetName ===

impl BudgetName {
    /// Returns the number of this name in the process, and stores the name if it is new.
    fn of(name: &str) -> Self {
        let mut names = names();
        if let Some(at) = names.iter().position(|known| *known == name) {
            return Self::at(at);
        }
        if names.len() >= usize::from(MAX_NAMES) {
            return Self(NonZeroU16::MAX);
        }
        // A name that is too long is invalid, so only its beginning is kept, for the error.
        let kept = shortened(name);
        if let Some(at) = names.iter().position(|known| *known == kept) {
            return Self::at(at);
        }
        names.push(String::leak(kept.to_owned()));
        Self::at(names.len() - 1)
    }

    fn at(position: usize) -> Self {
        let number = u16::try_from(position + 1).ok().and_then(NonZeroU16::new);
        Self(number.unwrap_or(NonZeroU16::MAX))
    }

    /// Returns the name.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        names()
            .get(usize::from(self.0.get() - 1))
            .copied()
            .unwrap_or("too many names")
    }
}

fn names() -> MutexGuard<'static, Vec<&'static str>> {
    NAMES.lock().unwrap_or_else(PoisonError::into_inner)
}

impl fmt::Debug for BudgetName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_str().fmt(f)
    }
}

// === serde ===

#[cfg(feature = "serde")]
impl serde::Serialize for Budget {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

#[cfg(feature = "serde")]
impl<'de> serde::Deserialize<'de> for Budget {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        name.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_the_same_budget_each_time() {
        let images = Budget::from("images");
        assert_eq!(images, Budget::from("images"));
        assert_ne!(images, Budget::from("seconds"));
        assert_eq!(
            (images.name(), format!("{images:>8}")),
            ("images", "  images".to_owned())
        );
        assert_eq!(format!("{images:?}"), "Named(\"images\")");
    }

    #[test]
    fn built_in_budgets_are_found_by_their_names() {
        for budget in [
            Budget::Requests,
            Budget::Tokens,
            Budget::InputTokens,
            Budget::OutputTokens,
        ] {
            assert_eq!(budget.name().parse(), Ok(budget));
        }
    }

    #[test]
    fn a_name_that_is_not_valid_is_an_error_that_shows_it() {
        for name in ["", "Images", "a b", "a:b", "é", &"x".repeat(65), &"x".repeat(1_000)] {
            let error = name.parse::<Budget>().unwrap_err();
            assert_eq!(error.field(), "budget");
            assert!(error.to_string().contains(&name[..name.len().min(64)]), "{error}");
        }
    }
}
