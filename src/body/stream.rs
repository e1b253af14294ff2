//! [`StreamLayer`]: returns each response when its head has arrived, while the call goes on until the body has ended.

use super::{
    early_response::{EarlyResponseReceiver, open_early_response},
    stream_body::StreamBody,
};
use crate::{
    error::{BoxError, Cancelled, Panicked},
    event::Scope,
};
use http::{Request, Response};
use std::{
    fmt,
    future::{Future, poll_fn},
    pin::Pin,
    task::{Context, Poll, ready},
};
use tokio::task::JoinHandle;
use tower_layer::Layer;
use tower_service::Service;

/// Returns each response when its head has arrived, while the call goes on until the body has ended. The layer is
/// placed on top of a stack that has a [`BodyLayer`](super::BodyLayer) around its client.
///
/// Without a [`BodyLayer`](super::BodyLayer) further down the stack, a response is returned when the call has ended.
/// See the [module docs](super#streams).
#[derive(Clone, Copy, Debug, Default)]
pub struct StreamLayer(());

/// The service of [`StreamLayer`].
///
/// # Errors
///
/// Returns the errors of the inner service, [`Panicked`] if the call panics before the head of its response has
/// arrived, and [`Cancelled`] if the Tokio runtime shuts down before then.
#[derive(Clone, Debug)]
pub struct StreamService<S> {
    inner: S,
}

/// The future of [`StreamService`]: a call until the head of its response has arrived.
///
/// # Panics
///
/// Panics when polled after it has completed.
///
/// # Cancel safety
///
/// Dropping the future before the head of the response has arrived ends the call. After the future has returned the
/// response, the call ends when the body of the response does.
#[must_use = "dropping it ends the call"]
pub struct ResponseFuture<R> {
    /// Receives the early response. `None` once it is certain that no early response comes: the response is then the
    /// result of the call.
    early_response: Option<EarlyResponseReceiver<R>>,
    /// The task that runs the call. `None` after the future has completed.
    call: Option<JoinHandle<Result<Response<R>, BoxError>>>,
}

// === impl StreamLayer ===

impl StreamLayer {
    /// Creates the layer, which has no settings.
    #[must_use]
    pub const fn new() -> Self {
        Self(())
    }
}

impl<S> Layer<S> for StreamLayer {
    type Service = StreamService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        StreamService { inner }
    }
}

// === impl StreamService ===

/// # Panics
///
/// `call` panics outside a Tokio runtime, because it spawns a task that runs the call.
impl<S, B, R> Service<Request<B>> for StreamService<S>
where
    S: Service<Request<B>, Response = Response<StreamBody<R>>>,
    S::Future: Send + 'static,
    S::Error: Into<BoxError>,
    R: Send + 'static,
{
    type Response = S::Response;
    type Error = BoxError;
    type Future = ResponseFuture<StreamBody<R>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, mut req: Request<B>) -> Self::Future {
        let early_response = open_early_response(&mut req);
        let mut scope = Scope::capture();
        let mut call = Box::pin(self.inner.call(req));
        let call = tokio::spawn(poll_fn(move |cx| {
            let _entered = scope.enter();
            call.as_mut().poll(cx).map_err(Into::into)
        }));
        ResponseFuture {
            early_response: Some(early_response),
            call: Some(call),
        }
    }
}

// === impl ResponseFuture ===

impl<R> Future for ResponseFuture<R> {
    type Output = Result<Response<R>, BoxError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if let Some(early_response) = &mut self.early_response {
            match Pin::new(early_response).poll(cx) {
                Poll::Ready(Ok(response)) => {
                    // The caller has the response, and the call ends with its body: dropping this future must not abort
                    // the call any more.
                    self.call = None;
                    return Poll::Ready(Ok(response));
                }
                Poll::Ready(Err(_)) => self.early_response = None,
                Poll::Pending => {}
            }
        }
        let call = self.call.as_mut().expect("`ResponseFuture` polled after completion");
        let joined = ready!(Pin::new(call).poll(cx));
        self.call = None;
        Poll::Ready(match joined {
            Ok(result) => result,
            Err(error) => Err(match error.try_into_panic() {
                Ok(payload) => Panicked::from_payload(&*payload).into(),
                // The task did not panic, so it was cancelled. As this future has not aborted the task, the Tokio
                // runtime is shutting down.
                Err(_) => Cancelled::new().into(),
            }),
        })
    }
}

impl<R> Drop for ResponseFuture<R> {
    fn drop(&mut self) {
        if let Some(call) = &self.call {
            call.abort();
        }
    }
}

impl<R> fmt::Debug for ResponseFuture<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("body::stream::ResponseFuture").finish_non_exhaustive()
    }
}
