//! [`FailureReader`]: reads the body of a response that is not a success, as far as it arrives in time.

use super::read::{BoundedReader, ReadStep};
use crate::{
    error::BoxError,
    event::{self, BodyProgress},
};
use bytes::Bytes;
use http::StatusCode;
use http_body::Body;
use pin_project_lite::pin_project;
use std::{
    fmt,
    future::Future,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};
use tokio::time::{Instant, Sleep, sleep};

/// How long the body of a failure is read by default. An error document arrives with its head or soon after it, also
/// over a slow connection. A server in trouble may send the head alone, and neither a retry nor the permit of the call
/// should wait for minutes, as long as a call may take, for a document that does not come.
pub(super) const FAILURE_TIMEOUT: Duration = Duration::from_secs(15);

pin_project! {
    /// Reads the body of a response that is not a success: up to a number of bytes, and for a limited time.
    ///
    /// The status and the headers of such a response tell what has failed, and when to retry. So whatever happens to
    /// the body, the response is returned, with those bytes that have arrived: the body may be longer, take too long,
    /// or break off.
    pub(super) struct FailureReader<B> {
        #[pin]
        reader: BoundedReader<B>,
        status: StatusCode,
        timeout: Duration,
        // Created when the body is first waited for, so that a body that is there does not need a timer.
        timer: Option<Pin<Box<Sleep>>>,
    }
}

// === impl FailureReader ===

impl<B> FailureReader<B> {
    /// Creates a reader that keeps at most `limit` bytes, and returns after `timeout` at the latest. `status` is that
    /// of the response, for the event.
    pub(super) fn new(body: B, limit: usize, timeout: Duration, status: StatusCode) -> Self {
        Self {
            reader: BoundedReader::new(body, limit),
            status,
            timeout,
            timer: None,
        }
    }
}

impl<B> FailureReader<B>
where
    B: Body<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    /// Returns what has arrived of the body when it has ended, failed or reached a bound. A note in the event tells
    /// if the time or a failure has cut the body off.
    pub(super) fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<(Bytes, BodyProgress)> {
        let mut this = self.project();
        loop {
            match this.reader.as_mut().poll_read(cx) {
                Poll::Ready(Ok(ReadStep::Read)) if !this.reader.is_full() && !this.reader.is_end_stream() => continue,
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(error)) => note(format_args!(
                    "The body of the response {} is cut off: {}",
                    this.status,
                    error.message()
                )),
                Poll::Pending => {
                    let timer = this.timer.get_or_insert_with(|| Box::pin(sleep(*this.timeout)));
                    // The timer is polled for its wake-up alone. If the body has used up the cooperative budget of the
                    // task, the timer is pending whatever the time is.
                    let _ = timer.as_mut().poll(cx);
                    if Instant::now() < timer.deadline() {
                        return Poll::Pending;
                    }
                    note(format_args!(
                        "The body of the response {} is cut off: it did not end within {:?}",
                        this.status, this.timeout
                    ));
                }
            }
            return Poll::Ready(this.reader.take());
        }
    }
}

fn note(text: fmt::Arguments<'_>) {
    if let Some(event) = event::current() {
        event.log(text.to_string());
    }
}
