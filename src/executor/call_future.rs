//! [`CallFuture`]: what comes back for a call.

use crate::{deadline::Timer, error::Error, event::EventHandle, queue};
use http::{Request, Response};
use std::{
    future::{Future, poll_fn},
    pin::{Pin, pin},
    task::{Context, Poll, ready},
};
use tokio::sync::oneshot;

/// What comes back for a call: by its queue, or, if it is streamed, by a shorter way as soon as there is a response.
///
/// Dropped before that, the call is cancelled.
pub(super) struct CallFuture<B, R> {
    /// Until this is dropped, or the time is up.
    call: Option<queue::ResponseFuture<Request<B>, Response<R>>>,
    /// Mostly it comes by its queue, whenever that is.
    early: Option<Box<EarlyOutcome<R>>>,
    /// The call goes on without us: nobody waits for it, or the response came, and the body decides.
    is_detached: bool,
}

/// By which other way a response may come, and until when.
pub(super) struct EarlyOutcome<R> {
    pub(super) response: Option<oneshot::Receiver<Response<R>>>,
    /// The call is ended at its deadline, wherever it is. (On the wire, the layer for that does so in any case.)
    pub(super) timer: Option<(Timer, EventHandle)>,
}

/// Lets the response of a request come by the shorter way.
pub(super) type OpenEarlyResponse<B, R> = fn(&mut Request<B>) -> oneshot::Receiver<Response<R>>;

impl<B, R> CallFuture<B, R> {
    pub(super) const fn new(
        call: queue::ResponseFuture<Request<B>, Response<R>>,
        early: Option<Box<EarlyOutcome<R>>>,
    ) -> Self {
        Self {
            call: Some(call),
            early,
            is_detached: false,
        }
    }

    /// Waits until the call has a place in the queue.
    pub(super) async fn accepted(&mut self) -> Result<(), Error> {
        poll_fn(|cx| {
            let Some(call) = &mut self.call else {
                return Poll::Ready(Ok(()));
            };
            if let Poll::Ready(accepted) = pin!(call.accepted()).poll(cx) {
                return Poll::Ready(accepted.map_err(Error::new));
            }
            self.poll_deadline(cx).map(Err)
        })
        .await
    }

    /// Ready when the time is up: the call is ended.
    fn poll_deadline(&mut self, cx: &mut Context<'_>) -> Poll<Error> {
        let timer = self.early.as_mut().and_then(|early| early.timer.as_mut());
        let Some((timer, event)) = timer else {
            return Poll::Pending;
        };
        let error = ready!(timer.poll(cx));
        event.fail(&error.into());
        self.early = None;
        self.call = None;
        Poll::Ready(error.into())
    }

    /// Ready when the response has come by the shorter way.
    fn poll_early_response(&mut self, cx: &mut Context<'_>) -> Poll<Response<R>> {
        let Some(early) = &mut self.early else {
            return Poll::Pending;
        };
        let Some(response) = &mut early.response else {
            return Poll::Pending;
        };
        let came = ready!(Pin::new(response).poll(cx));
        early.response = None;
        match came {
            Ok(response) => {
                self.is_detached = true;
                Poll::Ready(response)
            }
            // It comes by the queue.
            Err(_) => Poll::Pending,
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

impl<B, R> Future for CallFuture<B, R> {
    type Output = Result<Response<R>, Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if let Poll::Ready(response) = self.poll_early_response(cx) {
            return Poll::Ready(Ok(response));
        }
        let call = self.call.as_mut().expect("a future is not polled after it was ready");
        match Pin::new(call).poll(cx) {
            Poll::Pending if self.early.is_some() => self.poll_deadline(cx).map(Err),
            polled => polled.map_err(Error::new),
        }
    }
}

impl<B, R> Drop for CallFuture<B, R> {
    fn drop(&mut self) {
        if let Some(call) = self.call.take().filter(|_| self.is_detached) {
            call.detach();
        }
    }
}
