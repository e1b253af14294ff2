//! The headers of one request or response, as they are kept until the record is read, and their redaction.

use super::{REDACTED, names::is_secret, text::text};
use http::{HeaderMap, HeaderName, HeaderValue};
use std::{borrow::Cow, fmt};

/// Headers as they were sent or received, to be redacted when they are shown. Only the values of headers that are
/// secret for certain are not kept: those that are marked as sensitive, and those that the user has named.
///
/// Redacting the headers of one call costs more than all else that is recorded of it, and most records are never read.
#[derive(Clone)]
pub(crate) enum UnredactedHeaders {
    /// All headers in one piece of memory, since that takes half the instructions that a copy of the map takes, half
    /// its memory, and does not keep the read buffer of the client alive. Each header is the length of its name (2 bytes),
    /// the length of its value (2 bytes), its name and its value. [`NOT_KEPT`] is the length of a value that is not
    /// kept.
    Packed(Box<[u8]>),
    /// A copy of the map, which shares the values: for headers that are too long to be copied.
    Shared(Box<HeaderMap>),
}

/// The size in bytes up to which headers are packed. Longer ones are shared.
const MAX_PACKED: usize = 8 * 1_024;

/// The length of a value that was secret for certain, and is not kept.
const NOT_KEPT: u16 = u16::MAX;

impl UnredactedHeaders {
    /// Copies the headers. The values of the headers named in `also`, and those marked as sensitive, are not copied.
    #[inline]
    pub(crate) fn new(headers: &HeaderMap, also: &[HeaderName]) -> Self {
        if headers.is_empty() {
            Self::default()
        } else {
            Self::copied(headers, also)
        }
    }

    fn copied(headers: &HeaderMap, also: &[HeaderName]) -> Self {
        let is_secret = |name: &HeaderName, value: &HeaderValue| value.is_sensitive() || also.contains(name);
        let size: usize = headers
            .iter()
            .map(|(name, value)| 4 + name.as_str().len() + value.len())
            .sum();
        if size > MAX_PACKED {
            return Self::shared(headers, is_secret);
        }
        let mut packed = Vec::with_capacity(size);
        for (name, value) in headers {
            let name_text = name.as_str().as_bytes();
            let (length, bytes) = if is_secret(name, value) {
                (NOT_KEPT, &[][..])
            } else {
                (length(value.as_bytes()), value.as_bytes())
            };
            let [a, b] = self::length(name_text).to_le_bytes();
            let [c, d] = length.to_le_bytes();
            packed.extend_from_slice(&[a, b, c, d]);
            packed.extend_from_slice(name_text);
            packed.extend_from_slice(bytes);
        }
        Self::Packed(packed.into_boxed_slice())
    }

    fn shared(headers: &HeaderMap, is_secret: impl Fn(&HeaderName, &HeaderValue) -> bool) -> Self {
        let mut headers = headers.clone();
        for (name, value) in &mut headers {
            if is_secret(name, value) {
                *value = removed();
            }
        }
        Self::Shared(Box::new(headers))
    }

    /// Returns the headers without secrets. The whole value of a header is redacted if its name means a credential, or
    /// if the value was not kept. Other values are redacted as free text: see [`text`].
    pub(crate) fn redacted(self) -> HeaderMap {
        let mut headers = match self {
            Self::Packed(packed) => unpacked(&packed),
            Self::Shared(headers) => *headers,
        };
        for (name, value) in &mut headers {
            if value.is_sensitive() || is_secret(name.as_str()) {
                *value = removed();
            } else if let Some(clean) = redacted_value(value) {
                *value = clean;
            }
        }
        headers
    }
}

impl Default for UnredactedHeaders {
    fn default() -> Self {
        Self::Packed(Box::default())
    }
}

/// Shows the headers without secrets.
impl fmt::Debug for UnredactedHeaders {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.clone().redacted().fmt(f)
    }
}

fn length(bytes: &[u8]) -> u16 {
    u16::try_from(bytes.len()).expect("what is packed is at most 8 KiB")
}

/// Returns the headers that are packed as [`UnredactedHeaders::Packed`] describes.
fn unpacked(mut packed: &[u8]) -> HeaderMap {
    let mut headers = HeaderMap::new();
    while let [a, b, c, d, rest @ ..] = packed {
        let length = u16::from_le_bytes([*c, *d]);
        let (name, rest) = rest.split_at(u16::from_le_bytes([*a, *b]).into());
        let (value, rest) = rest.split_at(if length == NOT_KEPT { 0 } else { length.into() });
        packed = rest;
        // The value may have been created without a check of its bytes, by `from_maybe_shared_unchecked`.
        let value = HeaderValue::from_bytes(value).ok().filter(|_| length != NOT_KEPT);
        if let Ok(name) = HeaderName::from_bytes(name) {
            headers.append(name, value.unwrap_or_else(removed));
        }
    }
    headers
}

/// Returns the value without the secrets that can be recognized in it, as in the URL of a `Location`. `None` if there
/// are none.
fn redacted_value(value: &HeaderValue) -> Option<HeaderValue> {
    match value.to_str() {
        Ok(value_text) => match text(value_text) {
            Cow::Borrowed(_) => None,
            Cow::Owned(clean) => Some(HeaderValue::from_str(&clean).unwrap_or_else(|_| removed())),
        },
        Err(_) => match text(&String::from_utf8_lossy(value.as_bytes())) {
            Cow::Borrowed(_) => None,
            Cow::Owned(_) => Some(removed()),
        },
    }
}

fn removed() -> HeaderValue {
    let mut value = HeaderValue::from_static(REDACTED);
    value.set_sensitive(true);
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    fn marked(text: &'static str) -> HeaderValue {
        let mut value = HeaderValue::from_static(text);
        value.set_sensitive(true);
        value
    }

    #[test]
    fn a_header_is_redacted_by_its_name_by_its_mark_or_on_request() {
        // Short headers are packed, long ones are shared.
        for filler in [1, 2 * MAX_PACKED] {
            let mut map = HeaderMap::new();
            map.insert("authorization", HeaderValue::from_static("Bearer s3"));
            map.insert("x-mine", HeaderValue::from_static("s3"));
            map.insert("location", HeaderValue::from_static("https://u:p@h/?sig=s3"));
            map.insert("accept", HeaderValue::from_static("*/*"));
            map.append("x-odd", HeaderValue::from_bytes(b"\xff").unwrap());
            map.append("x-twice", HeaderValue::from_static("1"));
            map.append("x-twice", HeaderValue::from_static(""));
            map.insert("x-marked", marked("s3"));
            map.insert("x-filler", HeaderValue::from_str(&"f".repeat(filler)).unwrap());
            let kept = UnredactedHeaders::new(&map, &[HeaderName::from_static("x-mine")]);
            assert_eq!(matches!(kept, UnredactedHeaders::Shared(_)), filler > MAX_PACKED);
            let shown = format!("{kept:?}");
            let clean = kept.redacted();
            assert!(!shown.contains("s3") && shown == format!("{clean:?}"), "{shown}");
            assert_eq!(clean.len(), map.len());
            for name in ["authorization", "x-mine", "x-marked"] {
                assert_eq!(clean[name], REDACTED, "{name}");
                assert!(clean[name].is_sensitive(), "{name}");
            }
            assert_eq!(clean["location"], "https://h/?sig=[redacted]");
            assert_eq!(clean["accept"], "*/*");
            assert_eq!(clean["x-odd"].as_bytes(), b"\xff");
            assert_eq!(clean["x-filler"].len(), filler);
            assert!(clean.get_all("x-twice").iter().eq(["1", ""]));
        }
    }

    #[test]
    fn a_value_that_is_secret_for_certain_is_not_kept() {
        let map = HeaderMap::from_iter([
            (HeaderName::from_static("x-mine"), HeaderValue::from_static("s3cret")),
            (HeaderName::from_static("x-marked"), marked("s3cret")),
        ]);
        let UnredactedHeaders::Packed(packed) = UnredactedHeaders::new(&map, &[HeaderName::from_static("x-mine")])
        else {
            panic!("the headers are short");
        };
        assert!(!String::from_utf8_lossy(&packed).contains("s3cret"));
    }
}
