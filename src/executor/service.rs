//! The executor as a Tower service.

use super::{Executor, call_future::CallFuture, inner::ExecutorInner};
use crate::{error::Error, event::EventHandle, queue::Queue};
use http::{Request, Response};
use std::{
    fmt,
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};
use tower_service::Service;

/// The response future of an [`Executor`] that is used as a Tower service.
///
/// # Errors
///
/// The future returns the errors of [`Executor::submit`] if the call was refused, and otherwise those of a
/// [`CallHandle`](super::CallHandle).
///
/// # Panics
///
/// The future may panic when it is polled after it has completed.
///
/// # Cancel safety
///
/// Dropping the future cancels the call. If a streamed response has already been returned, dropping the future has no
/// effect; dropping the response's body cancels the call.
#[must_use = "dropping it cancels the call"]
pub struct ResponseFuture<B, R> {
    /// The future of the call, or the error with which the call was refused. `Err(None)` once that error was returned.
    call: Result<CallFuture<B, R>, Option<Error>>,
}

// === impl Executor ===

impl<B, R> Service<Request<B>> for Executor<B, R> {
    type Response = Response<R>;
    type Error = Error;
    type Future = ResponseFuture<B, R>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        let queue = self.inner.open_queue(&mut self.queue)?;
        queue.poll_ready(cx).map_err(Error::new)
    }

    fn call(&mut self, req: Request<B>) -> Self::Future {
        let call = match self.inner.open_queue(&mut self.queue) {
            Ok(queue) => self.inner.submit(queue, req).map_err(Some),
            Err(error) => Err(Some(self.inner.refused(error))),
        };
        ResponseFuture { call }
    }
}

impl<B, R> ExecutorInner<B, R> {
    /// Returns the queue handle that a clone of the executor keeps in `queue`. If there is none yet, or its queue was
    /// closed by a stop, stores a handle to the current queue first.
    fn open_queue<'a>(
        &self,
        queue: &'a mut Option<Queue<Request<B>, Response<R>>>,
    ) -> Result<&'a mut Queue<Request<B>, Response<R>>, Error> {
        if queue.as_ref().is_none_or(Queue::is_closed) {
            *queue = Some(self.queue()?);
        }
        queue.as_mut().ok_or_else(Error::not_running)
    }
}

// === impl ResponseFuture ===

impl<B, R> ResponseFuture<B, R> {
    /// Returns the call's event. `None` if the call was refused before it was queued.
    #[must_use]
    pub const fn event(&self) -> Option<&EventHandle> {
        match &self.call {
            Ok(future) => Some(future.event()),
            Err(_) => None,
        }
    }
}

impl<B, R> Future for ResponseFuture<B, R> {
    type Output = Result<Response<R>, Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut self.call {
            Ok(future) => Pin::new(future).poll(cx),
            Err(error) => Poll::Ready(Err(error.take().expect("`ResponseFuture` polled after completion"))),
        }
    }
}

impl<B, R> fmt::Debug for ResponseFuture<B, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("executor::ResponseFuture").finish_non_exhaustive()
    }
}
