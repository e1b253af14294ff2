//! The executor as a Tower service.

use super::{Executor, Shared, call_future::CallFuture};
use crate::{error::Error, event::EventHandle, queue::Queue};
use http::{Request, Response};
use std::{
    fmt,
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};
use tower_service::Service;

/// The response to a call made through the executor as a service.
///
/// # Cancel safety
///
/// Dropping it cancels the call, unless the response has come: then the body decides, if it is streamed.
#[must_use = "dropping it cancels the call"]
pub struct ResponseFuture<B, R> {
    call: Result<CallFuture<B, R>, Option<Error>>,
    event: Option<EventHandle>,
}

impl<B, R> Service<Request<B>> for Executor<B, R> {
    type Response = Response<R>;
    type Error = Error;
    type Future = ResponseFuture<B, R>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        let queue = self.shared.handle(&mut self.ready)?;
        queue.poll_ready(cx).map_err(Error::new)
    }

    fn call(&mut self, mut req: Request<B>) -> Self::Future {
        let refused = |error| ResponseFuture {
            call: Err(Some(error)),
            event: None,
        };
        let queue = match self.shared.handle(&mut self.ready) {
            Ok(queue) => queue,
            Err(error) => return refused(error),
        };
        let prepared = self
            .shared
            .check(&req)
            .and_then(|cost| self.shared.prepare(&mut req, cost));
        if let Err(error) = prepared {
            return refused(error);
        }
        let (event, future) = self.shared.call(queue, req);
        ResponseFuture {
            call: Ok(future),
            event: Some(event),
        }
    }
}

impl<B, R> Shared<B, R> {
    /// A clone's own handle, for as long as its queue takes calls.
    fn handle<'a>(
        &self,
        own: &'a mut Option<Queue<Request<B>, Response<R>>>,
    ) -> Result<&'a mut Queue<Request<B>, Response<R>>, Error> {
        if own.as_ref().is_none_or(Queue::is_closed) {
            *own = Some(self.queue()?);
        }
        own.as_mut().ok_or_else(Error::not_running)
    }
}

// === impl ResponseFuture ===

impl<B, R> ResponseFuture<B, R> {
    /// The call's event; `None` if the call was refused at once.
    #[must_use]
    pub const fn event(&self) -> Option<&EventHandle> {
        self.event.as_ref()
    }
}

impl<B, R> Future for ResponseFuture<B, R> {
    type Output = Result<Response<R>, Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut self.call {
            Ok(future) => Pin::new(future).poll(cx),
            Err(error) => Poll::Ready(Err(error.take().expect("a future is not polled after it was ready"))),
        }
    }
}

impl<B, R> fmt::Debug for ResponseFuture<B, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("executor::ResponseFuture").finish_non_exhaustive()
    }
}
