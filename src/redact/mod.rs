//! Removes secrets from headers, URLs and texts.
//!
//! Recorded data is redacted before it is stored, or, where copying it at once would be wasted (a URL, an error of the
//! client), before it is shown: no reader, serializer or `Debug` output ever contains the secret. Names decide: the
//! value of a header, a query parameter or a quoted field is removed if the name means a credential.

// Lowest first, imports point to the left: names, credentials, url, text, headers.
mod credentials;
mod headers;
mod names;
mod text;
mod url;

pub(crate) use self::{headers::headers, names::is_secret, text::text, url::uri};

/// The text that replaces a secret.
pub(crate) const REDACTED: &str = "[redacted]";
