//! [`BoundedReader`]: reads an http body into memory, up to a number of bytes. [`head_arrived`]: records the status of a
//! response before its body is read.

use crate::{
    error::{BodyFailed, BoxError},
    event::{self, BodyProgress},
};
use bytes::Bytes;
use http::StatusCode;
use http_body::Body;
use pin_project_lite::pin_project;
use std::{
    mem,
    pin::Pin,
    task::{Context, Poll, ready},
};
use tokio::{task::coop::poll_proceed, time::Instant};

pin_project! {
    /// An http body, and what was read of it: at most `limit` bytes.
    ///
    /// The caller of [`poll_read`](Self::poll_read) decides whether a body of more than `limit` bytes is an error or is
    /// cut off.
    pub(super) struct BoundedReader<B> {
        #[pin]
        body: B,
        limit: usize,
        bytes: Vec<u8>,
        progress: BodyProgress,
    }
}

/// The result of reading one frame of a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ReadStep {
    /// All data of the frame is kept. A frame with trailers has no data.
    Read,
    /// The frame had more bytes than the reader had room for. The first `limit` bytes of the body are kept.
    TooLarge,
    /// The body has ended: it has no further frame.
    End,
}

/// Records the status of a response whose body has not ended. The attempt then has its status also if the body fails,
/// or if a timeout or a deadline ends the call while its body is read.
pub(super) fn head_arrived(status: StatusCode) {
    if let Some(event) = event::current() {
        event.head_arrived(status);
    }
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

    /// Returns whether the reader holds `limit` bytes, and so has no room for another byte.
    pub(super) fn is_full(&self) -> bool {
        self.bytes.len() == self.limit
    }

    /// Takes the bytes that were read so far, with their number and their arrival times.
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
    /// Reads the next frame of the body, and keeps its data up to `limit` bytes in all.
    ///
    /// Takes part in Tokio's cooperative scheduling. Otherwise a body that always has another frame, for example an
    /// empty one, would never let its task yield, so that no timeout around the call could end it.
    pub(super) fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<ReadStep, BodyFailed>> {
        let this = self.project();
        let budget = ready!(poll_proceed(cx));
        let frame = ready!(this.body.poll_frame(cx)).transpose();
        budget.made_progress();
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

    /// Returns whether the body is certain to have no further frame. If `false`, it may have ended all the same.
    pub(super) fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
}

// === impl BodyProgress ===

impl BodyProgress {
    /// Records that `count` bytes have arrived now. Does nothing for zero bytes, which are not an arrival.
    pub(super) fn add(&mut self, count: usize) {
        if count > 0 {
            let now = Instant::now();
            self.first.get_or_insert(now);
            self.last = Some(now);
            self.count = self.count.saturating_add(count as u64);
        }
    }
}
