//! [`StreamBody`]: a response's body that tells its call when it is over.

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
use tokio::{sync::oneshot, time::Instant};

pin_project! {
    /// The body of a response whose call goes on until the body is over: read to its end, failed, or dropped.
    ///
    /// When the call is ended from the other side (cancelled, timed out, aborted with its executor), the next frame is
    /// the error [`Cancelled`].
    ///
    /// # Cancel safety
    ///
    /// Dropped before its end, the call is cancelled: its permit is free, and its event CANCELLED.
    pub struct StreamBody<B> {
        #[pin]
        content: Content<B>,
        call: Option<Watch>,
    }
}

pin_project! {
    #[project = ContentProj]
    enum Content<B> {
        /// Here as a whole, or gone.
        Whole { bytes: Bytes },
        /// On its way.
        Live { #[pin] body: B },
    }
}

/// How a body ended, and what of it progress by.
pub(super) enum End {
    Whole(BodyProgress),
    Failed(BodyProgress, BodyFailed),
    /// Nobody wanted the rest.
    Dropped(BodyProgress),
}

/// The body's side of its call.
struct Watch {
    progress: BodyProgress,
    end: Option<oneshot::Sender<End>>,
}

// === impl StreamBody ===

impl<B> StreamBody<B> {
    /// Of a call that does not wait for it.
    pub(super) const fn alone(body: B) -> Self {
        Self {
            content: Content::Live { body },
            call: None,
        }
    }

    pub(super) const fn whole(bytes: Bytes) -> Self {
        Self {
            content: Content::Whole { bytes },
            call: None,
        }
    }

    /// Of a call that is told by `end` when it is over.
    pub(super) fn watched(body: B, end: oneshot::Sender<End>) -> Self {
        Self {
            content: Content::Live { body },
            call: Some(Watch {
                progress: BodyProgress::default(),
                end: Some(end),
            }),
        }
    }

    /// Nobody waits for it any more.
    pub(super) fn left_alone(mut self) -> Self {
        if let Some(mut call) = self.call.take() {
            call.end = None;
        }
        self
    }

    /// The body, if it has been read as a whole already: that of a response that is no success.
    #[must_use]
    pub const fn bytes(&self) -> Option<&Bytes> {
        match &self.content {
            Content::Whole { bytes } => Some(bytes),
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
        if this.call.as_mut().is_some_and(|call| call.poll_is_over(cx).is_ready()) {
            *this.call = None;
            this.content.set(Content::Whole { bytes: Bytes::new() });
            return Poll::Ready(Some(Err(Cancelled::new().into())));
        }
        let (frame, is_last) = match this.content.as_mut().project() {
            ContentProj::Whole { bytes } => {
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
                    end(this.call, End::Whole);
                }
                Some(Ok(frame))
            }
            Some(Err(error)) => {
                let told = BodyFailed::new(&*error);
                end(this.call, |progress| End::Failed(progress, told));
                this.content.set(Content::Whole { bytes: Bytes::new() });
                Some(Err(error))
            }
            None => {
                end(this.call, End::Whole);
                None
            }
        };
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        match &self.content {
            Content::Whole { bytes } => bytes.is_empty(),
            Content::Live { body } => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Content::Whole { bytes } => SizeHint::with_exact(bytes.len() as u64),
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

fn end(call: &mut Option<Watch>, how: impl FnOnce(BodyProgress) -> End) {
    if let Some(mut call) = call.take() {
        call.tell(how);
    }
}

// === impl Watch ===

impl Watch {
    /// Ready when the call has been ended from the other side.
    fn poll_is_over(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match &mut self.end {
            Some(end) => end.poll_closed(cx),
            None => Poll::Pending,
        }
    }

    fn tell(&mut self, how: impl FnOnce(BodyProgress) -> End) {
        if let Some(end) = self.end.take() {
            // Fails if the call has just been ended from the other side.
            let _ = end.send(how(self.progress));
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.tell(End::Dropped);
    }
}

// === impl BodyProgress ===

impl BodyProgress {
    /// So many more, now.
    pub(super) fn add(&mut self, count: usize) {
        if count > 0 {
            let now = Instant::now();
            self.first.get_or_insert(now);
            self.last = Some(now);
            self.count = self.count.saturating_add(count as u64);
        }
    }
}
