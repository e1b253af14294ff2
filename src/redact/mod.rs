//! Removes secrets from headers, URLs and texts.
//!
//! Recorded data is redacted before it is stored. A URL or an error of the client is redacted only when it is shown,
//! because redacting needs a copy, which would often not be used. So no reader, serializer or `Debug` output ever
//! contains a secret. Names decide what is secret: the value of a header, a query parameter or a quoted field is
//! removed if its name suggests a credential.

// The modules from the lowest to the highest, each of which imports only from those before it: names, credentials, url,
// text, headers.
mod credentials;
mod headers;
mod names;
mod text;
mod url;

pub(crate) use self::{headers::headers, names::is_secret, text::text, url::uri};

/// The text that replaces a secret.
pub(crate) const REDACTED: &str = "[redacted]";
