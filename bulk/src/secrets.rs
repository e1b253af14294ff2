//! [`Secrets`]: the keys of a run. A server may repeat a key in an error, which is shown without it.

use http::HeaderMap;
use std::{borrow::Cow, fmt, sync::Arc};

/// The shortest value that counts as a secret, in bytes. A shorter one, such as a version, stands in many texts that hold
/// no secret.
const MIN_LENGTH: usize = 8;

/// The secrets that are sent with each request. Clones share them.
#[derive(Clone, Default)]
pub(crate) struct Secrets(Arc<[String]>);

impl Secrets {
    /// The values of the sensitive headers, without a scheme such as `Bearer`.
    pub(crate) fn of(headers: &HeaderMap) -> Self {
        let values = headers.values().filter(|value| value.is_sensitive());
        let values = values.filter_map(|value| value.to_str().ok());
        let secrets = values.map(|value| value.rsplit(' ').next().unwrap_or(value).to_owned());
        Self(secrets.filter(|secret| secret.len() >= MIN_LENGTH).collect())
    }

    /// Returns the text with `…` in place of each secret.
    pub(crate) fn hide<'a>(&self, text: &'a str) -> Cow<'a, str> {
        let mut text = Cow::Borrowed(text);
        for secret in &*self.0 {
            if text.contains(secret) {
                text = text.replace(secret, "…").into();
            }
        }
        text
    }
}

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Secrets").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::{HeaderValue, header};

    #[test]
    fn a_secret_of_a_header_is_hidden_also_without_its_scheme() {
        let mut key = HeaderValue::from_static("Bearer secret-key");
        key.set_sensitive(true);
        let mut headers = HeaderMap::new();
        headers.insert(header::AUTHORIZATION, key);
        headers.insert("x-team", HeaderValue::from_static("search-team"));
        let secrets = Secrets::of(&headers);
        assert_eq!(secrets.hide("no secret-key, search-team"), "no …, search-team");
        assert!(!format!("{secrets:?}").contains("secret-key"));
    }
}
