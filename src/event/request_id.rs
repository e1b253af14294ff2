//! [`RequestId`]: the name of a call.

use std::{fmt, sync::Arc};
use uuid::Uuid;

/// The name of a call: a random UUID (version 4), or a text that the caller chose.
///
/// As an extension of an http request it names that request's event. Two ids are equal if their texts are.
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

/// A text in the canonical form of a UUID becomes the same id as that UUID; any other text is kept as it is.
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

/// The UUID, if the text is its canonical form: lower case, with hyphens. Other forms of the same UUID are different
/// texts, and so different ids.
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
        // Another form of the same UUID is another id, and is kept as it is.
        for other in [text.to_uppercase(), text.replace('-', ""), format!("{{{text}}}")] {
            let id = RequestId::from(other.as_str());
            assert_eq!(id.to_string(), other);
            assert_ne!(id, uuid);
        }
    }
}
