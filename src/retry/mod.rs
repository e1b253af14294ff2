//! [`RetryPolicy`]: decides which calls are retried, and after which delay.
//!
//! [`RetryPolicy`] is a policy for tower's [`RetryLayer`](tower::retry::RetryLayer), made for metered APIs: it reads
//! the provider's headers and error documents, waits as long as the server requests, and notes the reason for each
//! retry in the event of the call. Where the policy is placed in the stack is shown in
//! [`provider`](crate::provider#order).
//!
//! [`never_sent`] recognizes errors of requests that did not reach the server, and so have cost nothing.

mod backoff;
mod bodies;
mod no_retry;
mod policy;
mod verdict;

pub use backoff::Delay;
pub use bodies::{ByClone, ByWholeBody, CloneBody, InspectBody};
pub use policy::RetryPolicy;

use crate::error::{BoxError, transport};

/// Returns true if the error reports that the request did not reach the server, and so has cost nothing: the connection
/// could not be made, or was closed before the request was written to it.
///
/// The error and its [sources](std::error::Error::source) are searched for
/// - an [`io::Error`](std::io::Error) whose kind is a refused connection, an unreachable host or network, or an
///   unavailable address, unless hyper reports it for a connection that was made,
/// - a [`hyper::Error`](https://docs.rs/hyper/1/hyper/struct.Error.html#method.is_canceled) that reports a request
///   which was not written to its connection,
/// - a [`reqwest::Error`](https://docs.rs/reqwest/latest/reqwest/struct.Error.html#method.is_connect) that reports a
///   failure to connect (feature `reqwest`).
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
    transport::never_sent(&**error)
}
