//! [`Answer`]: what comes back for a call.

use crate::{error::Error, queue};
use http::{Request, Response};
use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};
use tokio::sync::oneshot;

/// What comes back for a call: by its queue, or, if it is streamed, by a shorter way as soon as there is a head.
///
/// Dropped before that, the call is cancelled.
pub(super) struct Answer<B, R> {
    /// Until this is dropped.
    call: Option<queue::ResponseFuture<Request<B>, Response<R>>>,
    head: Option<oneshot::Receiver<Response<R>>>,
    /// The call goes on without us: nobody waits for it, or the head came, and the body decides.
    is_detached: bool,
}

/// Lets the response of a request come by the shorter way.
pub(super) type Offer<B, R> = fn(&mut Request<B>) -> oneshot::Receiver<Response<R>>;

impl<B, R> Answer<B, R> {
    pub(super) const fn new(
        call: queue::ResponseFuture<Request<B>, Response<R>>,
        head: Option<oneshot::Receiver<Response<R>>>,
    ) -> Self {
        Self {
            call: Some(call),
            head,
            is_detached: false,
        }
    }

    pub(super) async fn accepted(&mut self) -> Result<(), Error> {
        match &mut self.call {
            Some(call) => call.accepted().await.map_err(Error::new),
            None => Ok(()),
        }
    }

    /// Ends the call, and with it the body that is still on its way.
    pub(super) fn cancel(&self) {
        if let Some(call) = &self.call {
            call.cancel_accepted();
        }
    }

    /// Lets the call run on without anybody waiting for it.
    pub(super) fn detach(mut self) {
        self.is_detached = true;
    }
}

impl<B, R> Future for Answer<B, R> {
    type Output = Result<Response<R>, Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if let Some(head) = &mut self.head {
            match Pin::new(head).poll(cx) {
                Poll::Ready(Ok(response)) => {
                    self.head = None;
                    self.is_detached = true;
                    return Poll::Ready(Ok(response));
                }
                // It comes by the queue.
                Poll::Ready(Err(_)) => self.head = None,
                Poll::Pending => {}
            }
        }
        let call = self.call.as_mut().expect("it is there until this is dropped");
        Pin::new(call).poll(cx).map_err(Error::new)
    }
}

impl<B, R> Drop for Answer<B, R> {
    fn drop(&mut self) {
        if let Some(call) = self.call.take().filter(|_| self.is_detached) {
            call.detach();
        }
    }
}
