//! [`WholeBody`]: a body that may be there as a whole, to be looked into.

use super::StreamBody;
use bytes::Bytes;

/// A body that may be there as a whole, to be looked into without being read.
pub trait WholeBody {
    /// The body, if it is there as a whole.
    fn whole(&self) -> Option<&[u8]>;
}

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

/// There as a whole if it is that of a response that is no success.
impl<B> WholeBody for StreamBody<B> {
    fn whole(&self) -> Option<&[u8]> {
        self.bytes().map(|bytes| &bytes[..])
    }
}

#[cfg(feature = "reqwest")]
impl WholeBody for reqwest::Body {
    fn whole(&self) -> Option<&[u8]> {
        self.as_bytes()
    }
}
