//! What the error of a call tells about its connection: [`never_sent`], whether the request did not reach the server;
//! [`is_transient`], whether the cause of the failure may go away by waiting.
//!
//! Clients wrap the errors of lower layers: reqwest wraps those of hyper, and hyper those of sockets and of HTTP/2. So
//! every error in the chain is looked at. Nothing is decided by the text of an error, which may change with any version
//! of a client.

use super::{
    BodyFailed, BodyTooLarge, Cancelled, Closed, CostExceedsBurst, DeadlineExceeded, Error, MAX_SOURCES, Panicked,
    RetryAfterTooLong,
};
use std::{
    error::Error as StdError,
    io::{self, ErrorKind},
    iter::successors,
};

/// Returns whether the error reports that the request did not reach the server: the connection could not be made, or
/// was closed before the request was written to it.
pub(crate) fn never_sent(error: &(dyn StdError + 'static)) -> bool {
    if chain(error).any(is_connect) {
        return true;
    }
    // An error of hyper is about a connection that was made. A socket error below it, such as an unreachable host, has
    // then ended a request that may have been sent.
    match chain(error).find_map(|error| error.downcast_ref::<hyper::Error>()) {
        Some(error) => error.is_canceled() || error.is_closed(),
        None => chain(error).filter_map(io_error_kind).any(is_unreachable),
    }
}

/// Returns whether the cause of a failure may go away by waiting: the connection could not be made or was lost, or a
/// timeout other than the call's [deadline](crate::deadline) ended the attempt.
pub(crate) fn is_transient(error: &(dyn StdError + 'static)) -> bool {
    !chain(error).any(is_final) && (never_sent(error) || chain(error).any(|error| is_timeout(error) || is_lost(error)))
}

/// Returns whether an error makes a retry useless: the call would fail in the same way again, or the caller has ended
/// it.
fn is_final(error: &(dyn StdError + 'static)) -> bool {
    error.is::<Closed>()
        || error.is::<Cancelled>()
        || error.is::<Panicked>()
        || error.is::<CostExceedsBurst>()
        || error.is::<DeadlineExceeded>()
        || error.is::<BodyTooLarge>()
        || error.is::<RetryAfterTooLong>()
        // The body of the request failed, or the request cannot be sent. An I/O error below it, such as the end of a
        // file that was to be sent, is not about the connection.
        || error.downcast_ref::<hyper::Error>().is_some_and(hyper::Error::is_user)
}

/// Returns whether this error of a chain reports a lost connection.
fn is_lost(error: &(dyn StdError + 'static)) -> bool {
    if let Some(error) = error.downcast_ref::<hyper::Error>() {
        // Every other error of hyper is about the connection or one HTTP/2 stream on it: closed before, in or after the
        // head, broken off in the body, GOAWAY, a refused or reset stream. A response that cannot be parsed would be
        // the same after a retry.
        return !error.is_user() && !error.is_parse();
    }
    if let Some(error) = error.downcast_ref::<BodyFailed>() {
        return error.is_transient();
    }
    io_error_kind(error).is_some_and(|kind| {
        matches!(
            kind,
            ErrorKind::ConnectionReset
                | ErrorKind::ConnectionAborted
                | ErrorKind::NotConnected
                | ErrorKind::BrokenPipe
                | ErrorKind::TimedOut
                | ErrorKind::UnexpectedEof
        )
    })
}

const fn is_unreachable(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::ConnectionRefused
            | ErrorKind::HostUnreachable
            | ErrorKind::NetworkUnreachable
            | ErrorKind::AddrNotAvailable
            | ErrorKind::NetworkDown
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

/// Returns the first error of type `E` among the error and its causes.
pub(crate) fn find<'a, E: StdError + 'static>(error: &'a (dyn StdError + 'static)) -> Option<&'a E> {
    chain(error).find_map(|error| error.downcast_ref())
}

fn io_error_kind(error: &(dyn StdError + 'static)) -> Option<ErrorKind> {
    error.downcast_ref::<io::Error>().map(io::Error::kind)
}

/// Returns the error and its causes, outermost first, at most [`MAX_SOURCES`] of them.
fn chain<'a>(error: &'a (dyn StdError + 'static)) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    successors(Some(error), |error| cause(*error)).take(MAX_SOURCES)
}

/// Returns the next error in the chain. The [`source`](StdError::source) of an `io::Error` skips the error that it
/// wraps, and that of an executor's [`Error`] is a redacted copy, so their wrapped errors are returned instead.
fn cause<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a (dyn StdError + 'static)> {
    if let Some(error) = error.downcast_ref::<Error>() {
        return Some(&*error.inner);
    }
    let wrapped = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
    match wrapped {
        Some(wrapped) => Some(wrapped),
        None => error.source(),
    }
}
