//! Removes secrets from headers, URLs and texts.
//!
//! Notes and error messages are redacted before they are stored. What a request or a response brings along (its URL, its
//! headers, its body) is stored as it is and redacted when it is shown, because redacting it costs far more than keeping
//! it, and most records are never read. So no reader, serializer or `Debug` output ever contains a secret. Names decide
//! what is secret: the value of a header, a query parameter or a quoted field is removed if its name suggests a
//! credential.

// The modules from the lowest to the highest, each of which imports only from those before it: names, credentials, url,
// text, headers.
mod credentials;
mod headers;
mod names;
mod text;
mod url;

pub(crate) use self::{headers::UnredactedHeaders, names::is_secret, text::text, url::uri};

/// The text that replaces a secret.
pub(crate) const REDACTED: &str = "[redacted]";
