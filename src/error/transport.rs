//! [`never_sent`]: whether the request of a failed call did not reach the server. [`is_transient`]: whether the cause
//! of a failure may go away by waiting.

use crate::error::{
    BodyTooLarge, BoxError, Cancelled, Closed, CostExceedsBurst, DeadlineExceeded, Panicked, RetryAfterTooLong, sources,
};
use std::{
    error::Error as StdError,
    io::{self, ErrorKind},
    iter::once,
};

/// Returns true if the error reports that the connection to the server could not be made: the request was not sent, and
/// has cost nothing.
///
/// The error and its [sources](std::error::Error::source) are searched for an [`io::Error`](std::io::Error) whose kind
/// is a refused connection, an unreachable host or network, or an unavailable address. With the feature `reqwest`, they
/// are also searched for a
/// [`reqwest::Error`](https://docs.rs/reqwest/latest/reqwest/struct.Error.html#method.is_connect) that reports a
/// failure to connect.
///
/// With [`ByUsage::unless_sent`](crate::rate::ByUsage::unless_sent), this function makes failed calls cost nothing if
/// their request was not sent:
///
/// ```
/// use tower_outbound::{retry::never_sent, rate::ByUsage};
///
/// let settlement = ByUsage::default().unless_sent(never_sent);
/// ```
#[must_use]
#[allow(clippy::borrowed_box, reason = "`fn(&BoxError) -> bool` is what it is passed as")]
pub fn never_sent(error: &BoxError) -> bool {
    chain(error).any(|error| {
        is_connect(error)
            || io_error_kind(error).is_some_and(|kind| {
                matches!(
                    kind,
                    ErrorKind::ConnectionRefused
                        | ErrorKind::HostUnreachable
                        | ErrorKind::NetworkUnreachable
                        | ErrorKind::AddrNotAvailable
                        | ErrorKind::NetworkDown
                )
            })
    })
}

/// Returns whether the cause of a failure may go away by waiting: the connection could not be made or was lost, or a
/// timeout other than the call's [deadline](crate::deadline) ended the attempt.
#[allow(clippy::borrowed_box, reason = "`fn(&BoxError) -> bool` is what it is passed as")]
pub(super) fn is_transient(error: &BoxError) -> bool {
    !chain(error).any(is_final)
        && (never_sent(error)
            || chain(error).any(|error| is_timeout(error) || io_error_kind(error).is_some_and(is_lost)))
}

/// Returns whether an error of this crate makes a retry useless: the call would fail in the same way again, or the
/// caller has ended it.
fn is_final(error: &(dyn StdError + 'static)) -> bool {
    error.is::<Closed>()
        || error.is::<Cancelled>()
        || error.is::<Panicked>()
        || error.is::<CostExceedsBurst>()
        || error.is::<DeadlineExceeded>()
        || error.is::<BodyTooLarge>()
        || error.is::<RetryAfterTooLong>()
}

const fn is_lost(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::ConnectionReset
            | ErrorKind::ConnectionAborted
            | ErrorKind::NotConnected
            | ErrorKind::BrokenPipe
            | ErrorKind::TimedOut
            | ErrorKind::UnexpectedEof
    )
}

fn is_timeout(error: &(dyn StdError + 'static)) -> bool {
    #[cfg(feature = "reqwest")]
    if error
        .downcast_ref::<reqwest::Error>()
        .is_some_and(reqwest::Error::is_timeout)
    {
        return true;
    }
    error.is::<tokio::time::error::Elapsed>() || error.is::<tower::timeout::error::Elapsed>()
}

#[cfg(feature = "reqwest")]
fn is_connect(error: &(dyn StdError + 'static)) -> bool {
    error
        .downcast_ref::<reqwest::Error>()
        .is_some_and(reqwest::Error::is_connect)
}

#[cfg(not(feature = "reqwest"))]
const fn is_connect(_: &(dyn StdError + 'static)) -> bool {
    false
}

/// Returns the kind of an I/O error. An `io::Error` may contain another one, which may contain a further one: the
/// innermost of them is the cause, and its kind is returned. The chain of [`source`](StdError::source) skips such inner
/// errors: the `source` of an `io::Error` is not its inner error, but the source of that inner error.
fn io_error_kind(error: &(dyn StdError + 'static)) -> Option<ErrorKind> {
    let mut error = error.downcast_ref::<io::Error>()?;
    while let Some(inner) = error.get_ref().and_then(|inner| inner.downcast_ref()) {
        error = inner;
    }
    Some(error.kind())
}

/// Returns the error and its sources, outermost first.
#[allow(clippy::borrowed_box, reason = "its callers have a `&BoxError`")]
fn chain(error: &BoxError) -> impl Iterator<Item = &(dyn StdError + 'static)> {
    let first: &(dyn StdError + 'static) = &**error;
    once(first).chain(sources(first))
}
