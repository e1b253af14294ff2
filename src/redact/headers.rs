//! Removes secrets from header maps.

use super::{REDACTED, names::is_secret, text::text};
use http::{HeaderMap, HeaderName, HeaderValue};
use std::borrow::Cow;

/// Returns a copy of the headers without secrets. The whole value of a header is redacted if its name means a
/// credential or is in `also`, or if the value is marked as sensitive. Other values are redacted as free text: see
/// [`text`].
pub(crate) fn headers(headers: &HeaderMap, also: &[HeaderName]) -> HeaderMap {
    if headers.is_empty() {
        return HeaderMap::new();
    }
    let redacted = || {
        let mut value = HeaderValue::from_static(REDACTED);
        value.set_sensitive(true);
        value
    };
    headers
        .iter()
        .map(|(name, value)| {
            let is_secret = value.is_sensitive() || also.contains(name) || is_secret(name.as_str());
            // The value of a harmless header may contain a secret: that of a `Location` or `Referer` is a URL.
            let value = match value.to_str() {
                _ if is_secret => redacted(),
                Ok(value_text) => match text(value_text) {
                    Cow::Borrowed(_) => value.clone(),
                    Cow::Owned(clean) => HeaderValue::from_str(&clean).unwrap_or_else(|_| redacted()),
                },
                Err(_) => match text(&String::from_utf8_lossy(value.as_bytes())) {
                    Cow::Borrowed(_) => value.clone(),
                    Cow::Owned(_) => redacted(),
                },
            };
            (name.clone(), value)
        })
        .collect()
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
        let clean = headers(&map, &[HeaderName::from_static("x-mine")]);
        for name in ["authorization", "x-mine", "x-marked"] {
            assert_eq!(clean[name], REDACTED, "{name}");
        }
        assert_eq!(clean["location"], "https://h/?sig=[redacted]");
        assert_eq!(clean["accept"], "*/*");
        assert_eq!(clean["x-odd"].as_bytes(), b"\xff");
        assert!(!format!("{clean:?}").contains("s3"));
    }
}
