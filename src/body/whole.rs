//! [`WholeBody`]: an http body that can be looked at without being read, if all of it is in memory.

use super::StreamBody;
use bytes::Bytes;

/// A request or response body that can be looked at without being read, if all of it is in memory.
///
/// The [retry policy](crate::retry::RetryPolicy) uses this trait to look into error documents, and the
/// [estimates](crate::provider#estimates) use it to look into prompts.
pub trait WholeBody {
    /// Returns the bytes of the body, or `None` if the body still has to be read.
    fn whole(&self) -> Option<&[u8]>;
}

/// Returns `None`: the type `()` stands for a body without content.
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

/// Returns the bytes of a body that is in memory, such as the first 64 KiB of a response that is not a success: see
/// [`StreamBody::bytes`].
impl<B> WholeBody for StreamBody<B> {
    fn whole(&self) -> Option<&[u8]> {
        self.bytes().map(|bytes| &bytes[..])
    }
}

/// Returns `None` if the body is a stream, whose bytes are not in memory.
#[cfg(feature = "reqwest")]
impl WholeBody for reqwest::Body {
    fn whole(&self) -> Option<&[u8]> {
        self.as_bytes()
    }
}
