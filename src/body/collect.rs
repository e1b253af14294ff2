//! [`CollectLayer`]: reads the whole body of each response within the call, up to a maximum size.

use super::{
    failure::{FAILURE_TIMEOUT, FailureReader},
    read::{BoundedReader, ReadStep, head_arrived},
};
use crate::{
    error::{BodyTooLarge, BoxError},
    event::{self, BodyProgress, Value},
};
use bytes::Bytes;
use http::{Request, Response, response::Parts};
use http_body::Body;
use pin_project_lite::pin_project;
use std::{
    fmt,
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};
use tower_layer::Layer;
use tower_service::Service;

/// Reads the body of each response to its end, up to a number of bytes, and returns it as [`Bytes`]. The layer is
/// placed around the client, so that the call holds its permit and keeps its event open until the last byte has
/// arrived.
///
/// [`new`](Self::new) takes the maximum size of a body, which has no default. A body is recorded in the event of its
/// call only if [`record`](Self::record) is set.
///
/// A response that is not a success (2xx) is always returned, whatever happens to its body: the body is cut off at the
/// maximum size, after the [`failure_timeout`](Self::failure_timeout), or where it breaks off. See the [module
/// docs](super#failures). The body of a success is waited for without a limit: set a timeout or a
/// [deadline](crate::deadline) for the call. When that ends the call, the attempt in the event has the status of the
/// response, if its head has arrived.
///
/// ```
/// use tower::{Layer, service_fn};
/// use tower_outbound::body::CollectLayer;
/// # let client = service_fn(async |_: http::Request<()>| Ok::<_,
/// tower::BoxError>(http::Response::new(String::new())));
///
/// // At most 10 MB, recorded in the event.
/// let client = CollectLayer::new(10_000_000).record().layer(client);
/// ```
#[derive(Clone, Copy, Debug)]
pub struct CollectLayer {
    limit: usize,
    is_recorded: bool,
    failure_timeout: Duration,
}

/// The service of [`CollectLayer`].
///
/// # Errors
///
/// Returns the errors of the client, [`BodyTooLarge`] if the body of a success is above the maximum size, and
/// [`BodyFailed`](crate::error::BodyFailed) if reading the body of a success fails.
#[derive(Clone, Debug)]
pub struct Collect<S> {
    inner: S,
    layer: CollectLayer,
}

pin_project! {
    /// The future of [`Collect`]: makes the call, and reads the body of its response.
    ///
    /// # Panics
    ///
    /// Panics if it has to wait for the body of a failure outside a Tokio runtime with its timer enabled. May panic when
    /// polled after it has completed.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future ends the call, and discards what was read of the body.
    #[must_use = "futures do nothing unless polled"]
    pub struct ResponseFuture<F, B> {
        #[pin]
        state: State<F, B>,
        layer: CollectLayer,
    }
}

pin_project! {
    #[project = StateProj]
    enum State<F, B> {
        /// The call was made, and the head of its response has not arrived.
        Calling { #[pin] future: F },
        /// The head of a success has arrived, and its body is being read.
        Reading { parts: Option<Parts>, #[pin] reader: BoundedReader<B> },
        /// The response is not a success, and its body is being read.
        ReadingFailure { parts: Option<Parts>, #[pin] reader: FailureReader<B> },
    }
}

// === impl CollectLayer ===

impl CollectLayer {
    /// Creates a layer that accepts bodies of at most `limit` bytes. A call whose success has a larger body fails with
    /// [`BodyTooLarge`]: before the body is read if its [`size_hint`](Body::size_hint) is above the limit, or else at
    /// the first byte above the limit. A larger body of a failure is cut off.
    #[must_use]
    pub const fn new(limit: usize) -> Self {
        Self {
            limit,
            is_recorded: false,
            failure_timeout: FAILURE_TIMEOUT,
        }
    }

    /// Sets how long the body of a response that is not a success (2xx) is read. The call then goes on with what has
    /// arrived. Default: 15 s.
    #[must_use]
    pub const fn failure_timeout(mut self, timeout: Duration) -> Self {
        self.failure_timeout = timeout;
        self
    }

    /// Records the body of each response in the event of its call, with secrets redacted. For a body that is not UTF-8,
    /// only its length is recorded. Default: bodies are not recorded, only their sizes and the times at which their
    /// first and last bytes arrived.
    #[must_use]
    pub const fn record(mut self) -> Self {
        self.is_recorded = true;
        self
    }
}

impl<S> Layer<S> for CollectLayer {
    type Service = Collect<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Collect { inner, layer: *self }
    }
}

// === impl Collect ===

impl<S, B, R> Service<Request<B>> for Collect<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    S::Error: Into<BoxError>,
    R: Body<Data = Bytes>,
    R::Error: Into<BoxError>,
{
    type Response = Response<Bytes>;
    type Error = BoxError;
    type Future = ResponseFuture<S::Future, R>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, req: Request<B>) -> Self::Future {
        ResponseFuture {
            state: State::Calling {
                future: self.inner.call(req),
            },
            layer: self.layer,
        }
    }
}

// === impl ResponseFuture ===

impl<F, B, E> Future for ResponseFuture<F, B>
where
    F: Future<Output = Result<Response<B>, E>>,
    E: Into<BoxError>,
    B: Body<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    type Output = Result<Response<Bytes>, BoxError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        let limit = this.layer.limit;
        loop {
            let (parts, bytes, progress) = match this.state.as_mut().project() {
                StateProj::Calling { future } => {
                    let (parts, body) = ready!(future.poll(cx)).map_err(Into::into)?.into_parts();
                    if !body.is_end_stream() {
                        head_arrived(parts.status);
                    }
                    let next = if !parts.status.is_success() {
                        State::ReadingFailure {
                            reader: FailureReader::new(body, limit, this.layer.failure_timeout, parts.status),
                            parts: Some(parts),
                        }
                    } else if body.size_hint().lower() > limit as u64 {
                        return Poll::Ready(Err(BodyTooLarge::new(limit).into()));
                    } else {
                        State::Reading {
                            parts: Some(parts),
                            reader: BoundedReader::new(body, limit),
                        }
                    };
                    this.state.set(next);
                    continue;
                }
                StateProj::Reading { parts, mut reader } => match ready!(reader.as_mut().poll_read(cx))? {
                    ReadStep::Read => continue,
                    ReadStep::TooLarge => return Poll::Ready(Err(BodyTooLarge::new(limit).into())),
                    ReadStep::End => {
                        let (bytes, progress) = reader.take();
                        (parts, bytes, progress)
                    }
                },
                StateProj::ReadingFailure { parts, reader } => {
                    let (bytes, progress) = ready!(reader.poll_read(cx));
                    (parts, bytes, progress)
                }
            };
            this.layer.record_body(progress, &bytes);
            let parts = parts.take().expect("`ResponseFuture` polled after completion");
            return Poll::Ready(Ok(Response::from_parts(parts, bytes)));
        }
    }
}

impl CollectLayer {
    /// Records in the current event how many bytes the body of a response has and when the first and the last of them
    /// arrived, and the body itself if [`record`](Self::record) is set.
    fn record_body(self, progress: BodyProgress, bytes: &Bytes) {
        let Some(event) = event::current() else { return };
        event.set_body_progress(progress);
        if self.is_recorded {
            event.set_response_body(match std::str::from_utf8(bytes) {
                Ok(text) => Value::from(text),
                Err(_) => Value::from(format!("[{} bytes]", bytes.len())),
            });
        }
    }
}

impl<F, B> fmt::Debug for ResponseFuture<F, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("body::collect::ResponseFuture").finish_non_exhaustive()
    }
}
