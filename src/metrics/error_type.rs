//! The attribute `error.type`.

use std::borrow::Cow;

/// The number of types of errors that a metric tells apart. The types of a program are few; those of further ones are
/// [`OTHER`].
pub(super) const MAX_ERROR_TYPES: usize = 64;

/// The value of an attribute in place of values that are not told apart, as OpenTelemetry's conventions have it.
pub(super) const OTHER: &str = "_OTHER";

/// Returns the `error.type` of a call or an attempt: the type of its error, or the status code of a response that
/// reports an error.
pub(super) fn error_type(error: Option<&str>, status_code: Option<u16>) -> Option<Cow<'_, str>> {
    let code = || {
        status_code
            .filter(|code| *code >= 400)
            .map(|code| code.to_string().into())
    };
    error.map(Cow::Borrowed).or_else(code)
}
