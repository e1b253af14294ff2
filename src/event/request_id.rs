//! [`RequestId`]: the id of a call.

use std::{fmt, sync::Arc};
use uuid::Uuid;

/// The id of a call: a random UUID (version 4), or a text that the caller chose.
///
/// The caller chooses the id of a call by adding a `RequestId` to the extensions of its http request. Two ids are equal
/// if their texts are equal.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct RequestId(Name);

#[derive(Clone, PartialEq, Eq, Hash)]
enum Name {
    Random(Uuid),
    Given(Arc<str>),
}

impl RequestId {
    /// Creates a random id.
    #[must_use]
    pub fn random() -> Self {
        Self(Name::Random(Uuid::new_v4()))
    }
}

/// A text that is a UUID in canonical form becomes the same id as that UUID. Any other text is kept as it is.
impl From<&str> for RequestId {
    fn from(name: &str) -> Self {
        Self(canonical_uuid(name).map_or_else(|| Name::Given(name.into()), Name::Random))
    }
}

impl From<String> for RequestId {
    fn from(name: String) -> Self {
        name.as_str().into()
    }
}

impl From<Uuid> for RequestId {
    fn from(uuid: Uuid) -> Self {
        Self(Name::Random(uuid))
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Name::Random(uuid) => uuid.fmt(f),
            Name::Given(name) => name.fmt(f),
        }
    }
}

impl fmt::Debug for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

#[cfg(feature = "serde")]
impl serde::Serialize for RequestId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(feature = "serde")]
impl<'de> serde::Deserialize<'de> for RequestId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(Self::from)
    }
}

/// Parses a UUID in canonical form: lower case, with hyphens. Returns `None` for any other form of a UUID, which is a
/// different text and so a different id.
fn canonical_uuid(text: &str) -> Option<Uuid> {
    let uuid = Uuid::try_parse(text).ok()?;
    let mut canonical = Uuid::encode_buffer();
    (*uuid.hyphenated().encode_lower(&mut canonical) == *text).then_some(uuid)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn ids_are_equal_if_their_texts_are() {
        let text = "67e55044-10b1-426f-9247-bb680e5fe0c8";
        let uuid = RequestId::from(text.parse::<Uuid>().unwrap());
        assert_eq!(RequestId::from(text), uuid);
        assert!(HashSet::from([uuid.clone()]).contains(&RequestId::from(text.to_owned())));
        // Another form of the same UUID (upper case, without hyphens, in braces) is another id, and its text is kept.
        for other in [text.to_uppercase(), text.replace('-', ""), format!("{{{text}}}")] {
            let id = RequestId::from(other.as_str());
            assert_eq!(id.to_string(), other);
            assert_ne!(id, uuid);
        }
    }
}
