//! [`CloneBody`] and [`InspectBody`]: what a [`RetryPolicy`](super::RetryPolicy) does with the bodies of requests and
//! responses.
//!
//! Both traits are implemented for a default ([`ByClone`], [`ByWholeBody`]) and for closures, so that a policy can be
//! made for bodies whose types belong to other crates, and for which these traits could not be implemented.

use crate::body::WholeBody;

/// How a [`RetryPolicy`](super::RetryPolicy) clones the body of a request, to be able to send it again.
///
/// Implemented for [`ByClone`], and for closures and functions from `&B` to `Option<B>`.
pub trait CloneBody<B> {
    /// Returns a clone of the body, or `None` if the body can be sent only once: the call is then not retried.
    fn clone_body(&self, body: &B) -> Option<B>;
}

/// How a [`RetryPolicy`](super::RetryPolicy) looks into the body of a response, which may contain an error document.
///
/// Implemented for [`ByWholeBody`], and for closures and functions from `&R` to `Option<&[u8]>`.
pub trait InspectBody<R> {
    /// Returns the bytes of the body, or `None` if they are not in memory.
    fn bytes<'a>(&self, body: &'a R) -> Option<&'a [u8]>;
}

/// Clones bodies that implement [`Clone`], such as `String`, `Bytes` and `Full`.
#[derive(Clone, Copy, Debug, Default)]
pub struct ByClone;

/// Looks into bodies that implement [`WholeBody`], such as `Bytes` and [`StreamBody`](crate::body::StreamBody).
#[derive(Clone, Copy, Debug, Default)]
pub struct ByWholeBody;

impl<B: Clone> CloneBody<B> for ByClone {
    fn clone_body(&self, body: &B) -> Option<B> {
        Some(body.clone())
    }
}

impl<B, F: Fn(&B) -> Option<B>> CloneBody<B> for F {
    fn clone_body(&self, body: &B) -> Option<B> {
        self(body)
    }
}

impl<R: WholeBody> InspectBody<R> for ByWholeBody {
    fn bytes<'a>(&self, body: &'a R) -> Option<&'a [u8]> {
        body.whole()
    }
}

impl<R, F: Fn(&R) -> Option<&[u8]>> InspectBody<R> for F {
    fn bytes<'a>(&self, body: &'a R) -> Option<&'a [u8]> {
        self(body)
    }
}
