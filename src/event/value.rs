//! [`Value`]: a JSON value for metadata, payloads and bodies.
//!
//! [`Value`] is a type of this crate and not `serde_json::Value`, because events would otherwise make serde_json a
//! dependency of every user.

use crate::redact;
use std::{collections::BTreeMap, fmt};

/// A JSON value, as events record it.
///
/// With the feature `serde`, `serde_json::to_value` and `serde_json::from_value` convert between this type and
/// `serde_json::Value`.
///
/// ```
/// use tower_outbound::event::Value;
///
/// let value = Value::from([("id", Value::from(7)), ("tags", Value::from(vec!["a", "b"]))]);
/// assert_eq!(value.to_string(), r#"{"id":7,"tags":["a","b"]}"#);
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(untagged))]
pub enum Value {
    /// `null`
    #[default]
    Null,
    /// `true` or `false`
    Bool(bool),
    /// An integer that fits into an `i64`.
    Integer(i64),
    /// An integer above `i64::MAX`.
    Unsigned(u64),
    /// A floating-point number.
    Float(f64),
    /// A text.
    String(String),
    /// A list.
    Array(Vec<Self>),
    /// An object: its fields by their names.
    Object(BTreeMap<String, Self>),
}

impl Value {
    /// Returns the text, if the value is a [`String`](Self::String).
    #[must_use]
    pub fn as_str(&self) -> Option<&str> {
        if let Self::String(text) = self {
            Some(text)
        } else {
            None
        }
    }

    /// Returns the integer, if the value is an [`Integer`](Self::Integer).
    #[must_use]
    pub fn as_i64(&self) -> Option<i64> {
        if let Self::Integer(integer) = self {
            Some(*integer)
        } else {
            None
        }
    }

    /// Returns the value of the field `name`, if this is an [`Object`](Self::Object) that has such a field.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Self> {
        if let Self::Object(fields) = self {
            fields.get(name)
        } else {
            None
        }
    }

    /// Redacts the values of fields whose name suggests a credential, and the secrets that can be recognized in
    /// strings.
    pub(super) fn redacted(self) -> Self {
        match self {
            Self::String(text) => Self::String(redact::text(&text).into_owned()),
            Self::Array(values) => Self::Array(values.into_iter().map(Self::redacted).collect()),
            Self::Object(fields) => Self::Object(redacted_fields(fields)),
            Self::Null | Self::Bool(_) | Self::Integer(_) | Self::Unsigned(_) | Self::Float(_) => self,
        }
    }
}

/// Redacts the values of fields whose name suggests a credential. In other values and in the names of fields, the
/// secrets that can be recognized are redacted.
pub(super) fn redacted_fields(fields: BTreeMap<String, Value>) -> BTreeMap<String, Value> {
    let redacted = |(name, value): (String, Value)| {
        // A number, a boolean or `null` is no credential, whatever its field is called.
        let can_be_secret = matches!(value, Value::String(_) | Value::Array(_) | Value::Object(_));
        let value = if can_be_secret && redact::is_secret(&name) {
            redact::REDACTED.into()
        } else {
            value.redacted()
        };
        // The name of a field may contain a secret as well, for example if it is a URL.
        (redact::text(&name).into_owned(), value)
    };
    fields.into_iter().map(redacted).collect()
}

/// Writes the value as JSON.
impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Null => f.write_str("null"),
            Self::Bool(value) => value.fmt(f),
            Self::Integer(integer) => integer.fmt(f),
            Self::Unsigned(integer) => integer.fmt(f),
            // JSON has no infinity and no NaN: `null` is written instead.
            Self::Float(number) if !number.is_finite() => f.write_str("null"),
            Self::Float(number) => write!(f, "{number:?}"),
            Self::String(text) => write_quoted(text, f),
            Self::Array(values) => {
                f.write_str("[")?;
                for (index, value) in values.iter().enumerate() {
                    let comma = if index > 0 { "," } else { "" };
                    write!(f, "{comma}{value}")?;
                }
                f.write_str("]")
            }
            Self::Object(fields) => {
                f.write_str("{")?;
                for (index, (name, value)) in fields.iter().enumerate() {
                    f.write_str(if index > 0 { "," } else { "" })?;
                    write_quoted(name, f)?;
                    write!(f, ":{value}")?;
                }
                f.write_str("}")
            }
        }
    }
}

fn write_quoted(text: &str, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    f.write_str("\"")?;
    for letter in text.chars() {
        match letter {
            '"' => f.write_str("\\\"")?,
            '\\' => f.write_str("\\\\")?,
            '\n' => f.write_str("\\n")?,
            letter if letter.is_control() => write!(f, "\\u{:04x}", u32::from(letter))?,
            letter => write!(f, "{letter}")?,
        }
    }
    f.write_str("\"")
}

impl From<bool> for Value {
    fn from(value: bool) -> Self {
        Self::Bool(value)
    }
}

impl From<i32> for Value {
    fn from(integer: i32) -> Self {
        Self::Integer(integer.into())
    }
}

impl From<u32> for Value {
    fn from(integer: u32) -> Self {
        Self::Integer(integer.into())
    }
}

impl From<i64> for Value {
    fn from(integer: i64) -> Self {
        Self::Integer(integer)
    }
}

impl From<u64> for Value {
    fn from(integer: u64) -> Self {
        i64::try_from(integer).map_or(Self::Unsigned(integer), Self::Integer)
    }
}

impl From<usize> for Value {
    fn from(integer: usize) -> Self {
        (integer as u64).into()
    }
}

impl From<f64> for Value {
    fn from(number: f64) -> Self {
        Self::Float(number)
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::String(text.to_owned())
    }
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Self::String(text)
    }
}

impl<T: Into<Self>> From<Vec<T>> for Value {
    fn from(values: Vec<T>) -> Self {
        Self::Array(values.into_iter().map(Into::into).collect())
    }
}

impl<T: Into<Self>> From<Option<T>> for Value {
    fn from(value: Option<T>) -> Self {
        value.map_or(Self::Null, Into::into)
    }
}

impl<K: Into<String>, const N: usize> From<[(K, Self); N]> for Value {
    fn from(fields: [(K, Self); N]) -> Self {
        Self::Object(fields.into_iter().map(|(name, value)| (name.into(), value)).collect())
    }
}

impl From<BTreeMap<String, Self>> for Value {
    fn from(fields: BTreeMap<String, Self>) -> Self {
        Self::Object(fields)
    }
}
