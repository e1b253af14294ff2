//! [`StreamBody`]: the body of a streamed response, which reports its end to the call.

use crate::{
    error::{BodyFailed, BoxError, Cancelled},
    event::BodyProgress,
};
use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;
use std::{
    fmt, mem,
    pin::Pin,
    task::{Context, Poll, ready},
};
use tokio::sync::oneshot;

pin_project! {
    /// The body of a response whose call goes on until the body has ended: until it was read to its end, has failed, or
    /// was dropped.
    ///
    /// # Errors
    ///
    /// The errors of the client's body are passed on unchanged. When the call is ended by a cancellation, a deadline or
    /// an immediate stop of its executor, the next frame of the body is the error [`Cancelled`]. After an error, the
    /// body is empty.
    ///
    /// # Cancel safety
    ///
    /// Dropping the body before its end cancels the call: the permit of the call is released, and its event ends as
    /// CANCELLED.
    pub struct StreamBody<B> {
        #[pin]
        content: Content<B>,
        // The link to the call. `None` if the call does not wait for the end of this body, and after the end was
        // reported.
        call: Option<CallLink>,
    }
}

pin_project! {
    #[project = ContentProj]
    enum Content<B> {
        /// The unread rest of a body that is in memory. Empty after the body was read, and after an error.
        Buffered { bytes: Bytes },
        /// The body that the client returned, which still has to be read.
        Live { #[pin] body: B },
    }
}

/// How the body of a response has ended, with the number and the arrival times of the bytes that had arrived.
pub(super) enum BodyEnd {
    /// The body was read to its end.
    Complete(BodyProgress),
    /// Reading the body failed.
    Failed(BodyProgress, BodyFailed),
    /// The body was dropped before its end.
    Dropped(BodyProgress),
}

/// Connects a body with its call: reports the end of the body to the call, and the end of the call to the body.
///
/// The end of the body is reported at most once. Dropping the link reports [`BodyEnd::Dropped`], unless the end was
/// reported before.
struct CallLink {
    progress: BodyProgress,
    end: Option<oneshot::Sender<BodyEnd>>,
}

// === impl StreamBody ===

impl<B> StreamBody<B> {
    /// Creates a body that does not report its end, for a call that does not wait for the end of its body.
    pub(super) const fn unwatched(body: B) -> Self {
        Self {
            content: Content::Live { body },
            call: None,
        }
    }

    /// Creates a body from bytes that are in memory. This body does not report its end, as the call does not wait for
    /// that.
    pub(super) const fn buffered(bytes: Bytes) -> Self {
        Self {
            content: Content::Buffered { bytes },
            call: None,
        }
    }

    /// Creates a body that reports its end to the call through the channel `end`. When the call drops the receiver of
    /// the channel, the body fails.
    pub(super) fn watched(body: B, end: oneshot::Sender<BodyEnd>) -> Self {
        Self {
            content: Content::Live { body },
            call: Some(CallLink {
                progress: BodyProgress::default(),
                end: Some(end),
            }),
        }
    }

    /// Detaches the body from its call, without telling the call that the body has ended. This is for a body that no
    /// call waits for: if it stayed attached, it would fail as soon as its call has ended.
    pub(super) fn unwatch(mut self) -> Self {
        if let Some(mut call) = self.call.take() {
            call.end = None;
        }
        self
    }

    /// Returns the body if it is in memory, or `None` if it has to be read.
    ///
    /// In a streamed call, the body of a response that is not a success (2xx) is held in memory: the
    /// call has read at most its first 64 KiB, and has dropped the rest.
    #[must_use]
    pub const fn bytes(&self) -> Option<&Bytes> {
        match &self.content {
            Content::Buffered { bytes } => Some(bytes),
            Content::Live { .. } => None,
        }
    }
}

impl<B> Body for StreamBody<B>
where
    B: Body<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let mut this = self.project();
        if this.call.as_mut().is_some_and(|call| call.poll_ended(cx).is_ready()) {
            *this.call = None;
            this.content.set(Content::Buffered { bytes: Bytes::new() });
            return Poll::Ready(Some(Err(Cancelled::new().into())));
        }
        let (frame, is_last) = match this.content.as_mut().project() {
            ContentProj::Buffered { bytes } => {
                let bytes = mem::take(bytes);
                ((!bytes.is_empty()).then(|| Ok(Frame::data(bytes))), true)
            }
            ContentProj::Live { mut body } => {
                let frame = ready!(body.as_mut().poll_frame(cx)).map(|frame| frame.map_err(Into::into));
                (frame, body.is_end_stream())
            }
        };
        let frame = match frame {
            Some(Ok(frame)) => {
                if let Some(call) = this.call {
                    call.progress.add(frame.data_ref().map_or(0, Bytes::len));
                }
                if is_last {
                    report(this.call, BodyEnd::Complete);
                }
                Some(Ok(frame))
            }
            Some(Err(error)) => {
                // The reader of the body gets the error itself. As the error cannot be cloned, the call gets a copy of
                // its text.
                let copy = BodyFailed::new(&*error);
                report(this.call, |progress| BodyEnd::Failed(progress, copy));
                this.content.set(Content::Buffered { bytes: Bytes::new() });
                Some(Err(error))
            }
            None => {
                report(this.call, BodyEnd::Complete);
                None
            }
        };
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        match &self.content {
            Content::Buffered { bytes } => bytes.is_empty(),
            Content::Live { body } => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Content::Buffered { bytes } => SizeHint::with_exact(bytes.len() as u64),
            Content::Live { body } => body.size_hint(),
        }
    }
}

impl<B> fmt::Debug for StreamBody<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StreamBody")
            .field("is_watched", &self.call.is_some())
            .finish_non_exhaustive()
    }
}

/// Reports the end of the body to its call, if the call waits for that and the end was not reported before.
fn report(call: &mut Option<CallLink>, end: impl FnOnce(BodyProgress) -> BodyEnd) {
    if let Some(mut call) = call.take() {
        call.report(end);
    }
}

// === impl CallLink ===

impl CallLink {
    /// Returns `Ready` when the call has ended before its body. The body then fails instead of being read further.
    fn poll_ended(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match &mut self.end {
            Some(end) => end.poll_closed(cx),
            None => Poll::Pending,
        }
    }

    fn report(&mut self, end: impl FnOnce(BodyProgress) -> BodyEnd) {
        if let Some(sender) = self.end.take() {
            // Sending the report fails if the call has already ended. The failure is ignored, as an ended call needs no
            // report.
            let _ = sender.send(end(self.progress));
        }
    }
}

impl Drop for CallLink {
    fn drop(&mut self) {
        self.report(BodyEnd::Dropped);
    }
}
