//! [`WholeBody`]: a body that can be looked at without being read, if all of it is in memory.

use super::StreamBody;
use bytes::Bytes;

/// A request or response body that can be looked at without being read, if all of it is in memory.
///
/// The [retry policy](crate::retry::RetryPolicy) looks into error documents with it, and the
/// [estimates](crate::provider#estimates) look into prompts.
pub trait WholeBody {
    /// Returns the whole body, or `None` if it is still to be read.
    fn whole(&self) -> Option<&[u8]>;
}

/// Always `None`: there is nothing to look at.
impl WholeBody for () {
    fn whole(&self) -> Option<&[u8]> {
        None
    }
}

impl WholeBody for Bytes {
    fn whole(&self) -> Option<&[u8]> {
        Some(self)
    }
}

impl WholeBody for Vec<u8> {
    fn whole(&self) -> Option<&[u8]> {
        Some(self)
    }
}

impl WholeBody for String {
    fn whole(&self) -> Option<&[u8]> {
        Some(self.as_bytes())
    }
}

impl WholeBody for &str {
    fn whole(&self) -> Option<&[u8]> {
        Some(self.as_bytes())
    }
}

/// The body of a response that is not a success, or its first 64 KiB: see [`StreamBody::bytes`].
impl<B> WholeBody for StreamBody<B> {
    fn whole(&self) -> Option<&[u8]> {
        self.bytes().map(|bytes| &bytes[..])
    }
}

/// `None` if the body is a stream.
#[cfg(feature = "reqwest")]
impl WholeBody for reqwest::Body {
    fn whole(&self) -> Option<&[u8]> {
        self.as_bytes()
    }
}
