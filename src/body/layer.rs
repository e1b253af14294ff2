//! [`BodyLayer`]: lets each call last until the body of its response has ended.
//!
//! [`BodyLayer`] is placed around the client. It sends the response to the caller through the early-response channel,
//! past the layers above it in the stack, while the *call* goes on until the body has ended. Every layer above
//! therefore keeps what it holds for the call (a permit, the event, an estimate of tokens, a deadline) until the body
//! has ended, and does not have to handle bodies.
//!
//! The early-response channel is opened by [`StreamLayer`](super::StreamLayer), or by
//! [`Executor::submit`](crate::Executor::submit) if the executor was [built for
//! streams](crate::ExecutorBuilder::build_streaming). If no caller waits on the channel, because the channel was not
//! opened or the call was detached (it runs without a caller that waits for its response), the response is returned
//! through the layers, and the call ends when the head of the response has arrived.

use super::{
    early_response::EarlyResponse,
    failure::{FAILURE_TIMEOUT, FailureReader},
    read::head_arrived,
    stream_body::{BodyEnd, StreamBody},
};
use crate::{
    error::{BoxError, Cancelled},
    event::{self, BodyProgress},
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
use tokio::sync::oneshot;
use tower_layer::Layer;
use tower_service::Service;

/// Lets each call last until the body of its response has ended. The layer is placed around the client, with a
/// [`StreamLayer`](super::StreamLayer) on top of the stack.
///
/// If a streamed call gets a response that is not a success (2xx), its body is read within the call, up to 64 KiB and
/// for at most [`failure_timeout`](Self::failure_timeout). See the [module docs](super#failures).
#[derive(Clone, Copy, Debug)]
pub struct BodyLayer {
    failure_timeout: Duration,
}

/// The service of [`BodyLayer`].
///
/// # Errors
///
/// Returns the errors of the client, [`BodyFailed`](crate::error::BodyFailed) if the body of the response fails, and
/// [`Cancelled`] if the caller drops the body before its end.
#[derive(Clone, Debug)]
pub struct BodyService<S> {
    inner: S,
    layer: BodyLayer,
}

pin_project! {
    /// The future of [`BodyService`]: a call to the client that lasts until the body of its response has ended.
    ///
    /// # Panics
    ///
    /// Panics if it has to wait for the body of a failure outside a Tokio runtime with its timer enabled. May panic when
    /// polled after it has completed.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future ends the call. If the caller has the response already, the next frame of the response's body
    /// is the error [`Cancelled`].
    #[must_use = "futures do nothing unless polled"]
    pub struct ResponseFuture<F, B> {
        #[pin]
        state: State<F, B>,
        early_response: Option<EarlyResponse<StreamBody<B>>>,
        layer: BodyLayer,
    }
}

pin_project! {
    #[project = StateProj]
    enum State<F, B> {
        /// The call was made, and the head of its response has not arrived.
        Calling { #[pin] future: F },
        /// The response is not a success, and its body is being read.
        ReadingFailure { parts: Option<Parts>, #[pin] reader: FailureReader<B> },
        /// The caller has the response, and its body has not ended.
        Streaming { parts: Option<Parts>, end: oneshot::Receiver<BodyEnd> },
    }
}

/// The maximum number of bytes that are read of the body of a response that is not a success. Error documents are
/// shorter. Without a bound, a server that sends a body without end would keep the call from ending.
const MAX_FAILURE_BYTES: usize = 64 * 1024;

// === impl BodyLayer ===

impl BodyLayer {
    /// Creates the layer with the default settings.
    #[must_use]
    pub const fn new() -> Self {
        Self {
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
}

impl Default for BodyLayer {
    fn default() -> Self {
        Self::new()
    }
}

impl<S> Layer<S> for BodyLayer {
    type Service = BodyService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        BodyService { inner, layer: *self }
    }
}

// === impl BodyService ===

impl<S, B, R> Service<Request<B>> for BodyService<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    S::Error: Into<BoxError>,
    R: Body<Data = Bytes> + Send + 'static,
    R::Error: Into<BoxError>,
{
    type Response = Response<StreamBody<R>>;
    type Error = BoxError;
    type Future = ResponseFuture<S::Future, R>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, mut req: Request<B>) -> Self::Future {
        let early_response = EarlyResponse::take(&mut req);
        ResponseFuture {
            state: State::Calling {
                future: self.inner.call(req),
            },
            early_response,
            layer: self.layer,
        }
    }
}

// === impl ResponseFuture ===

impl<F, B, E> Future for ResponseFuture<F, B>
where
    F: Future<Output = Result<Response<B>, E>>,
    E: Into<BoxError>,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    type Output = Result<Response<StreamBody<B>>, BoxError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        loop {
            let next = match this.state.as_mut().project() {
                StateProj::Calling { future } => {
                    let response = ready!(future.poll(cx)).map_err(Into::into)?;
                    let (parts, body) = response.into_parts();
                    let Some(early_response) = this.early_response.as_ref().filter(|_| !body.is_end_stream()) else {
                        return Poll::Ready(Ok(Response::from_parts(parts, StreamBody::unwatched(body))));
                    };
                    head_arrived(parts.status);
                    if parts.status.is_success() {
                        match deliver(early_response, parts, body) {
                            Ok(state) => state,
                            Err(response) => return Poll::Ready(Ok(response)),
                        }
                    } else {
                        let timeout = this.layer.failure_timeout;
                        State::ReadingFailure {
                            reader: FailureReader::new(body, MAX_FAILURE_BYTES, timeout, parts.status),
                            parts: Some(parts),
                        }
                    }
                }
                StateProj::ReadingFailure { parts, reader } => {
                    let (bytes, progress) = ready!(reader.poll_read(cx));
                    record(progress);
                    let parts = parts.take().expect("`ResponseFuture` polled after completion");
                    return Poll::Ready(Ok(Response::from_parts(parts, StreamBody::buffered(bytes))));
                }
                StateProj::Streaming { parts, end } => {
                    // A `StreamBody` always reports its end through the channel, also when the body is dropped. The
                    // channel is thus never closed without a report, and the value for that case is not used.
                    let end = ready!(Pin::new(end).poll(cx)).unwrap_or(BodyEnd::Dropped(BodyProgress::default()));
                    let parts = parts.take().expect("`ResponseFuture` polled after completion");
                    return Poll::Ready(outcome(parts, end));
                }
            };
            this.state.set(next);
        }
    }
}

/// Sends the response to the caller through the early-response channel. If no caller waits for an early response,
/// returns the response with a body that does not report its end to the call.
#[allow(clippy::result_large_err, reason = "returns the response that was not sent")]
fn deliver<F, B: Send + 'static>(
    early_response: &EarlyResponse<StreamBody<B>>,
    parts: Parts,
    body: B,
) -> Result<State<F, B>, Response<StreamBody<B>>> {
    let (reporter, end) = oneshot::channel();
    let response = Response::from_parts(parts.clone(), StreamBody::watched(body, reporter));
    match early_response.send(response) {
        Ok(()) => Ok(State::Streaming {
            parts: Some(parts),
            end,
        }),
        Err(response) => Err(response.map(StreamBody::unwatch)),
    }
}

/// Returns the result of a call whose body has ended, for the layers above in the stack. These layers get the response
/// with an empty body, since the caller has the real one.
fn outcome<B>(parts: Parts, end: BodyEnd) -> Result<Response<StreamBody<B>>, BoxError> {
    match end {
        BodyEnd::Complete(progress) => {
            record(progress);
            Ok(Response::from_parts(parts, StreamBody::buffered(Bytes::new())))
        }
        BodyEnd::Failed(progress, error) => {
            record(progress);
            Err(error.into())
        }
        BodyEnd::Dropped(progress) => {
            record(progress);
            // The caller cancels a streamed call by dropping the body of its response.
            if let Some(event) = event::current() {
                event.cancel();
            }
            Err(Cancelled::new().into())
        }
    }
}

fn record(progress: BodyProgress) {
    if let Some(event) = event::current() {
        event.set_body_progress(progress);
    }
}

impl<F, B> fmt::Debug for ResponseFuture<F, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("body::ResponseFuture").finish_non_exhaustive()
    }
}
