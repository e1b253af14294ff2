//! [`BoundedReader`]: reads a body into memory, up to a number of bytes.

use crate::{
    error::{BodyFailed, BoxError},
    event::BodyProgress,
};
use bytes::Bytes;
use http_body::Body;
use pin_project_lite::pin_project;
use std::{
    mem,
    pin::Pin,
    task::{Context, Poll, ready},
};
use tokio::time::Instant;

pin_project! {
    /// A body and what was read of it: at most `limit` bytes.
    ///
    /// Whether a larger body is an error or is cut off is decided by the caller of [`poll_read`](Self::poll_read).
    pub(super) struct BoundedReader<B> {
        #[pin]
        body: B,
        limit: usize,
        bytes: Vec<u8>,
        progress: BodyProgress,
    }
}

/// What reading one frame has led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ReadStep {
    /// The frame was kept whole.
    Read,
    /// The frame had more bytes than there was room for. The first `limit` bytes of the body are kept.
    TooLarge,
    /// The body has ended.
    End,
}

// === impl BoundedReader ===

impl<B> BoundedReader<B> {
    pub(super) fn new(body: B, limit: usize) -> Self {
        Self {
            body,
            limit,
            bytes: Vec::new(),
            progress: BodyProgress::default(),
        }
    }

    /// Whether there is no room for another byte.
    pub(super) fn is_full(&self) -> bool {
        self.bytes.len() == self.limit
    }

    /// Takes what was read so far.
    pub(super) fn take(self: Pin<&mut Self>) -> (Bytes, BodyProgress) {
        let this = self.project();
        (mem::take(this.bytes).into(), *this.progress)
    }
}

impl<B> BoundedReader<B>
where
    B: Body<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    /// Reads the next frame.
    pub(super) fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<ReadStep, BodyFailed>> {
        let this = self.project();
        let frame = ready!(this.body.poll_frame(cx)).transpose();
        let Some(frame) = frame.map_err(|error| BodyFailed::new(&*error.into()))? else {
            return Poll::Ready(Ok(ReadStep::End));
        };
        let Ok(data) = frame.into_data() else {
            return Poll::Ready(Ok(ReadStep::Read));
        };
        this.progress.add(data.len());
        let room = *this.limit - this.bytes.len();
        this.bytes.extend_from_slice(&data[..data.len().min(room)]);
        Poll::Ready(Ok(if data.len() > room {
            ReadStep::TooLarge
        } else {
            ReadStep::Read
        }))
    }

    /// Whether the body is certain to have no further frame. The body may have ended although this is false.
    pub(super) fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
}

// === impl BodyProgress ===

impl BodyProgress {
    /// Counts `count` bytes that have arrived now. Zero bytes are not counted as an arrival.
    pub(super) fn add(&mut self, count: usize) {
        if count > 0 {
            let now = Instant::now();
            self.first.get_or_insert(now);
            self.last = Some(now);
            self.count = self.count.saturating_add(count as u64);
        }
    }
}
