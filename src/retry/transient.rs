//! What went wrong with a call: did it reach the server, and is it of use to try again?

use crate::error::{
    BodyTooLarge, BoxError, Cancelled, Closed, CostExceedsBurst, DeadlineExceeded, Panicked, RetryAfterTooLong, sources,
};
use std::{
    error::Error as StdError,
    io::{self, ErrorKind},
    iter::once,
};

/// Whether the connection could not be made: the request was never sent, and has cost nothing.
///
/// It is found by the first [`io::Error`](std::io::Error) in the chain of sources, and with the feature `reqwest` by
/// reqwest's own word.
///
/// ```
/// use tower_outbound::{retry::never_sent, rate::ByUsage};
///
/// let settlement = ByUsage::default().unless_sent(never_sent);
/// ```
#[must_use]
#[allow(clippy::borrowed_box, reason = "as it comes")]
pub fn never_sent(error: &BoxError) -> bool {
    chain(error).any(|error| {
        is_connect(error)
            || kind(error).is_some_and(|kind| {
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

/// Whether it is of use to try again: the connection could not be made or was lost, or it took too long.
#[allow(clippy::borrowed_box, reason = "as it comes")]
pub(super) fn is_transient(error: &BoxError) -> bool {
    !chain(error).any(is_final)
        && (never_sent(error) || chain(error).any(|error| is_timeout(error) || kind(error).is_some_and(is_lost)))
}

/// Ours, which come out the same every time, or say that nobody wants the call any more.
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

/// Of an io error in an io error, the innermost is the one that happened; it does not stand in the chain.
fn kind(error: &(dyn StdError + 'static)) -> Option<ErrorKind> {
    let mut error = error.downcast_ref::<io::Error>()?;
    while let Some(inner) = error.get_ref().and_then(|inner| inner.downcast_ref()) {
        error = inner;
    }
    Some(error.kind())
}

#[allow(clippy::borrowed_box, reason = "as it comes")]
fn chain(error: &BoxError) -> impl Iterator<Item = &(dyn StdError + 'static)> {
    let first: &(dyn StdError + 'static) = &**error;
    once(first).chain(sources(first))
}
