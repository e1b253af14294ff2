//! Header maps that may contain secrets, and their redaction.

use super::{REDACTED, names::is_secret, text::text};
use http::{HeaderMap, HeaderName, HeaderValue};
use std::{borrow::Cow, fmt, sync::Arc};

/// Headers as they were sent or received, to be redacted when they are shown.
///
/// Redacting the headers of one call costs more than all else that is recorded of it, and most records are never read.
/// A copy of a header map is cheap: its values are shared, not copied.
#[derive(Clone, Default)]
pub(crate) struct UnredactedHeaders {
    headers: HeaderMap,
    /// The names of headers to redact besides those whose name means a credential. Shared by all calls.
    also: Option<Arc<[HeaderName]>>,
}

impl UnredactedHeaders {
    pub(crate) fn new(headers: &HeaderMap, also: Option<&Arc<[HeaderName]>>) -> Self {
        Self {
            headers: headers.clone(),
            also: also.cloned(),
        }
    }

    /// Returns the headers without secrets. The whole value of a header is redacted if its name means a credential or
    /// is in `also`, or if the value is marked as sensitive. Other values are redacted as free text: see [`text`].
    pub(crate) fn redacted(self) -> HeaderMap {
        let also = self.also.as_deref().unwrap_or_default();
        let mut headers = self.headers;
        for (name, value) in &mut headers {
            if value.is_sensitive() || also.contains(name) || is_secret(name.as_str()) {
                *value = removed();
            } else if let Some(clean) = redacted_value(value) {
                *value = clean;
            }
        }
        headers
    }
}

/// Shows the headers without secrets.
impl fmt::Debug for UnredactedHeaders {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.clone().redacted().fmt(f)
    }
}

/// Returns the value without the secrets that can be recognized in it: the value of a `Location` or `Referer` is a URL.
/// `None` if there are none.
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

    #[test]
    fn a_header_is_redacted_by_its_name_by_its_mark_or_on_request() {
        let mut map = HeaderMap::new();
        map.insert("authorization", HeaderValue::from_static("Bearer s3"));
        map.insert("x-mine", HeaderValue::from_static("s3"));
        map.insert("location", HeaderValue::from_static("https://u:p@h/?sig=s3"));
        map.insert("accept", HeaderValue::from_static("*/*"));
        map.append("x-odd", HeaderValue::from_bytes(b"\xff").unwrap());
        let mut marked = HeaderValue::from_static("s3");
        marked.set_sensitive(true);
        map.insert("x-marked", marked);
        let kept = UnredactedHeaders::new(&map, Some(&[HeaderName::from_static("x-mine")].into()));
        assert!(!format!("{kept:?}").contains("s3"));
        let clean = kept.redacted();
        for name in ["authorization", "x-mine", "x-marked"] {
            assert_eq!(clean[name], REDACTED, "{name}");
        }
        assert_eq!(clean["location"], "https://h/?sig=[redacted]");
        assert_eq!(clean["accept"], "*/*");
        assert_eq!(clean["x-odd"].as_bytes(), b"\xff");
        assert!(!format!("{clean:?}").contains("s3"));
    }
}
