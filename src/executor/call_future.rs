//! [`CallFuture`]: resolves to the response of a submitted call.

use super::nested::{NestedWait, NestedWaits};
use crate::{error::Error, event::EventHandle, queue};
use http::{Request, Response};
use std::{
    future::{Future, poll_fn},
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll, ready},
};
use tokio::sync::oneshot;

/// Resolves to the response of a submitted call. The response comes from the queue when the call has ended, or, if
/// responses are streamed, from the early-response channel when the response's head has arrived.
///
/// Dropping the future before it has resolved cancels the call, unless the future was detached.
pub(super) struct CallFuture<B, R> {
    /// The queue's future for the call. It is taken when this future is dropped.
    queued: Option<queue::ResponseFuture<Request<B>, Response<R>>>,
    /// The receiving end of the early-response channel. `None` if responses are not streamed, and after the channel has
    /// delivered a response or was closed.
    early_response: Option<Box<oneshot::Receiver<Response<R>>>>,
    event: EventHandle,
    nested_waits: Arc<NestedWaits>,
    /// Counts the call that awaits this one, if it is a call of the same executor that holds a permit.
    nested_wait: Option<Box<NestedWait>>,
    /// Whether the call runs on when this future is dropped. `true` in a [`CallHandle`](super::CallHandle) that does not cancel
    /// its call, and after an early response: then the response's body decides when the call ends.
    is_detached: bool,
}

/// A function that adds the sending end of an early-response channel to the extensions of a request, and returns the
/// receiving end.
pub(super) type OpenEarlyResponse<B, R> = fn(&mut Request<B>) -> oneshot::Receiver<Response<R>>;

// === impl CallFuture ===

impl<B, R> CallFuture<B, R> {
    pub(super) const fn new(
        queued: queue::ResponseFuture<Request<B>, Response<R>>,
        early_response: Option<Box<oneshot::Receiver<Response<R>>>>,
        event: EventHandle,
        nested_waits: Arc<NestedWaits>,
    ) -> Self {
        Self {
            queued: Some(queued),
            early_response,
            event,
            nested_waits,
            nested_wait: None,
            is_detached: false,
        }
    }

    /// Returns the call's event.
    pub(super) const fn event(&self) -> &EventHandle {
        &self.event
    }

    /// Waits until the call has a place in the queue. Fails if the queue is closed, or the call's deadline passes,
    /// before that.
    pub(super) async fn accepted(&mut self) -> Result<(), Error> {
        poll_fn(|cx| {
            let Some(queued) = &mut self.queued else {
                return Poll::Ready(Ok(()));
            };
            let accepted = pin!(queued.accepted()).poll(cx);
            if let Poll::Ready(accepted) = accepted {
                return Poll::Ready(accepted.map_err(Error::new));
            }
            self.poll_deadlock().map(Err)
        })
        .await
    }

    /// Ready if the call can never begin, because it is awaited by a call of the same executor whose permit it needs.
    /// Then the call is cancelled.
    fn poll_deadlock(&mut self) -> Poll<Error> {
        match self.nested_waits.check(&self.event, &mut self.nested_wait) {
            Ok(()) => Poll::Pending,
            Err(deadlock) => {
                self.queued = None;
                Poll::Ready(Error::new(deadlock))
            }
        }
    }

    /// Waits until the response has arrived through the early-response channel, and returns it. Pending forever if
    /// there is no such channel.
    fn poll_early_response(&mut self, cx: &mut Context<'_>) -> Poll<Response<R>> {
        let Some(receiver) = &mut self.early_response else {
            return Poll::Pending;
        };
        let received = ready!(Pin::new(&mut **receiver).poll(cx));
        self.early_response = None;
        match received {
            Ok(response) => {
                self.is_detached = true;
                Poll::Ready(response)
            }
            // The early-response channel was closed without a response: the result of the call comes from the queue.
            Err(_) => Poll::Pending,
        }
    }

    /// Cancels the call if it has not ended. The next frame of a streamed response body that has not ended is then the
    /// error [`Cancelled`](crate::error::Cancelled). A call that still waits for a place in the queue is not cancelled.
    pub(super) fn cancel(&self) {
        if let Some(queued) = &self.queued {
            queued.cancel_accepted();
        }
    }

    /// Cancels the call when this future is dropped before it has resolved.
    pub(super) fn attached(mut self) -> Self {
        self.is_detached = false;
        self
    }

    /// Lets the call run on when this future is dropped.
    pub(super) fn detached(mut self) -> Self {
        self.is_detached = true;
        self
    }
}

impl<B, R> Future for CallFuture<B, R> {
    type Output = Result<Response<R>, Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if let Poll::Ready(response) = self.poll_early_response(cx) {
            return Poll::Ready(Ok(response));
        }
        let queued = self.queued.as_mut().expect("`CallHandle` polled after completion");
        match Pin::new(queued).poll(cx) {
            Poll::Pending => self.poll_deadlock().map(Err),
            polled @ Poll::Ready(_) => {
                self.nested_wait = None;
                polled.map_err(Error::new)
            }
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
