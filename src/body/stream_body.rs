//! [`StreamBody`]: the body of a response, which reports its end to its call.

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
    /// The body of a response whose call goes on until the body has ended: read to its end, failed, or dropped.
    ///
    /// # Errors
    ///
    /// The errors of the client's body are passed on unchanged. When the call is ended by a cancellation, a deadline or
    /// an immediate stop of its executor, the next frame is the error [`Cancelled`]. The body is empty after an error.
    ///
    /// # Cancel safety
    ///
    /// Dropping it before its end cancels the call: the permit is released, and the event ends as CANCELLED.
    pub struct StreamBody<B> {
        #[pin]
        content: Content<B>,
        // `None` if the call does not wait for this body, and after the end was reported.
        call: Option<CallLink>,
    }
}

pin_project! {
    #[project = ContentProj]
    enum Content<B> {
        /// What is left of a body that is in memory: nothing after it was read, and after an error.
        Buffered { bytes: Bytes },
        /// The client's body.
        Live { #[pin] body: B },
    }
}

/// How a body has ended, and what had arrived of it.
pub(super) enum BodyEnd {
    /// It was read to its end.
    Complete(BodyProgress),
    /// Reading it failed.
    Failed(BodyProgress, BodyFailed),
    /// It was dropped before its end.
    Dropped(BodyProgress),
}

/// Connects a body with its call: reports the end of the body to the call, and the end of the call to the body.
///
/// The end is reported exactly once. Dropping the link reports [`BodyEnd::Dropped`], if nothing was reported before.
struct CallLink {
    progress: BodyProgress,
    end: Option<oneshot::Sender<BodyEnd>>,
}

// === impl StreamBody ===

impl<B> StreamBody<B> {
    /// A body whose call does not wait for its end.
    pub(super) const fn unwatched(body: B) -> Self {
        Self {
            content: Content::Live { body },
            call: None,
        }
    }

    /// A body that is in memory, of a call that does not wait for its end.
    pub(super) const fn buffered(bytes: Bytes) -> Self {
        Self {
            content: Content::Buffered { bytes },
            call: None,
        }
    }

    /// A body whose end is reported to its call through `end`. The body fails when the receiver is dropped.
    pub(super) fn watched(body: B, end: oneshot::Sender<BodyEnd>) -> Self {
        Self {
            content: Content::Live { body },
            call: Some(CallLink {
                progress: BodyProgress::default(),
                end: Some(end),
            }),
        }
    }

    /// Separates the body from its call, without a report.
    pub(super) fn unwatch(mut self) -> Self {
        if let Some(mut call) = self.call.take() {
            call.end = None;
        }
        self
    }

    /// Returns the body if it is in memory, or `None` if it has to be read.
    ///
    /// The body of a response that is not a success was read within the call, up to 64 KiB.
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
                // The reader gets the error itself, the call a copy of its text.
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

/// Reports the end of the body to its call, if the call waits for it and it was not reported before.
fn report(call: &mut Option<CallLink>, end: impl FnOnce(BodyProgress) -> BodyEnd) {
    if let Some(mut call) = call.take() {
        call.report(end);
    }
}

// === impl CallLink ===

impl CallLink {
    /// Ready when the call has ended before the body, which is then of no use.
    fn poll_ended(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match &mut self.end {
            Some(end) => end.poll_closed(cx),
            None => Poll::Pending,
        }
    }

    fn report(&mut self, end: impl FnOnce(BodyProgress) -> BodyEnd) {
        if let Some(sender) = self.end.take() {
            // Fails if the call has ended meanwhile: then there is no receiver to report to.
            let _ = sender.send(end(self.progress));
        }
    }
}

impl Drop for CallLink {
    fn drop(&mut self) {
        self.report(BodyEnd::Dropped);
    }
}
