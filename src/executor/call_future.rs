//! [`CallFuture`]: resolves to the response of a submitted call.

use crate::{deadline::DeadlineTimer, error::Error, event::EventHandle, queue};
use http::{Request, Response};
use std::{
    future::{Future, poll_fn},
    pin::{Pin, pin},
    task::{Context, Poll, ready},
};
use tokio::sync::oneshot;

/// Resolves to the response of a submitted call: by its queue, or by the early-response channel of a streamed call.
///
/// Dropped before that, it cancels the call, unless it was detached.
pub(super) struct CallFuture<B, R> {
    /// The call in its queue. `None` once the call was ended at its deadline.
    queued: Option<queue::ResponseFuture<Request<B>, Response<R>>>,
    /// `None` for a call without a deadline whose response is not streamed, and after the deadline.
    early: Option<Box<EarlyOutcome<R>>>,
    /// Whether the call runs on when this is dropped: the caller has dropped its handle, or has an early response,
    /// whose body decides when the call ends.
    is_detached: bool,
}

/// What may end a call for its caller before the queue does.
pub(super) struct EarlyOutcome<R> {
    /// The receiving end of the early-response channel. `None` if responses are not streamed, and once it has resolved.
    pub(super) response: Option<oneshot::Receiver<Response<R>>>,
    /// Ends the call at its deadline while it is queued. (Below the queue, the deadline layer does so whether or not
    /// this future is polled.)
    pub(super) timer: Option<(DeadlineTimer, EventHandle)>,
}

/// Adds the sending end of an early-response channel to a request, and returns the receiving end.
pub(super) type OpenEarlyResponse<B, R> = fn(&mut Request<B>) -> oneshot::Receiver<Response<R>>;

// === impl CallFuture ===

impl<B, R> CallFuture<B, R> {
    pub(super) const fn new(
        queued: queue::ResponseFuture<Request<B>, Response<R>>,
        early: Option<Box<EarlyOutcome<R>>>,
    ) -> Self {
        Self {
            queued: Some(queued),
            early,
            is_detached: false,
        }
    }

    /// Waits until the call has a place in the queue.
    pub(super) async fn accepted(&mut self) -> Result<(), Error> {
        poll_fn(|cx| {
            let Some(queued) = &mut self.queued else {
                return Poll::Ready(Ok(()));
            };
            if let Poll::Ready(accepted) = pin!(queued.accepted()).poll(cx) {
                return Poll::Ready(accepted.map_err(Error::new));
            }
            self.poll_deadline(cx).map(Err)
        })
        .await
    }

    /// Ready once the deadline has passed; the call has then been ended.
    fn poll_deadline(&mut self, cx: &mut Context<'_>) -> Poll<Error> {
        let timer = self.early.as_mut().and_then(|early| early.timer.as_mut());
        let Some((timer, event)) = timer else {
            return Poll::Pending;
        };
        let error = ready!(timer.poll(cx));
        event.fail(&error.into());
        self.early = None;
        self.queued = None;
        Poll::Ready(error.into())
    }

    /// Ready once the response has arrived by the early-response channel.
    fn poll_early_response(&mut self, cx: &mut Context<'_>) -> Poll<Response<R>> {
        let Some(early) = &mut self.early else {
            return Poll::Pending;
        };
        let Some(receiver) = &mut early.response else {
            return Poll::Pending;
        };
        let received = ready!(Pin::new(receiver).poll(cx));
        early.response = None;
        match received {
            Ok(response) => {
                self.is_detached = true;
                Poll::Ready(response)
            }
            // The channel was closed without a response: the result comes by the queue.
            Err(_) => Poll::Pending,
        }
    }

    /// Ends the call. A body that is still being read breaks off.
    pub(super) fn cancel(&self) {
        if let Some(queued) = &self.queued {
            queued.cancel_accepted();
        }
    }

    /// Lets the call run on without its caller.
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
        let queued = self.queued.as_mut().expect("a future is not polled after it was ready");
        match Pin::new(queued).poll(cx) {
            Poll::Pending if self.early.is_some() => self.poll_deadline(cx).map(Err),
            polled => polled.map_err(Error::new),
        }
    }
}

impl<B, R> Drop for CallFuture<B, R> {
    fn drop(&mut self) {
        if let Some(queued) = self.queued.take().filter(|_| self.is_detached) {
            queued.detach();
        }
    }
}
