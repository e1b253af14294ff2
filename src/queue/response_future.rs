//! [`ResponseFuture`]: waits for a place in the queue and then for the result of the call.

use super::{
    CallContext,
    channel::Channel,
    message::{EarlyEnd, Message},
};
use crate::{
    error::{BoxError, Closed},
    semaphore::Acquire,
};
use std::{
    fmt,
    future::{Future, poll_fn},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker, ready},
};
use tokio::time::{Sleep, sleep_until};

/// The response future of a queued call.
///
/// The future has to be polled only until the call has a place in the queue: from then on the call runs whether or not
/// the future is polled. Most calls have a place as soon as they are made; see [`is_accepted`](Self::is_accepted).
///
/// # Errors
///
/// The future returns the error of the inner service, or:
///
/// - [`Closed`] if the queue was closed before the call had a place,
/// - [`DeadlineExceeded`](crate::error::DeadlineExceeded) if the call had not ended by its deadline,
/// - [`Cancelled`](crate::error::Cancelled) if the call was cancelled, the queue was aborted, or the queue's runtime was
///   shut down,
/// - [`Panicked`](crate::error::Panicked) if the service panicked.
///
/// # Panics
///
/// The future may panic when it is polled after it has completed.
///
/// # Cancel safety
///
/// Dropping the future cancels the call, unless the call has completed or is [detached](Self::detach).
#[must_use = "dropping it cancels the call; `detach` lets it run"]
pub struct ResponseFuture<Req, Res> {
    state: State<Req, Res>,
}

enum State<Req, Res> {
    /// The call waits for a place in the queue.
    ///
    /// Boxed, because space for it, and for the request, would make the futures of accepted calls larger, too.
    WaitingForPlace(Box<WaitingForPlace<Req, Res>>),
    /// The call was accepted: it had a place in the queue, and is queued, is running, or has a response.
    Accepted {
        message: Arc<Message<Req, Res>>,
        channel: Arc<Channel<Req, Res>>,
    },
    /// The call waits in the queue's schedule, with or without a place in the queue, or it was chosen since.
    Scheduled {
        message: Arc<Message<Req, Res>>,
        channel: Arc<Channel<Req, Res>>,
    },
    /// The call was ended before it had a place.
    EndedEarly(EarlyEnd),
    /// The future has returned the call's result, or the call was detached.
    Finished,
}

/// A call that waits for a place in the queue, with the acquirer of that place.
struct WaitingForPlace<Req, Res> {
    acquire: Option<Acquire>,
    /// `None` once the call has been accepted or has ended.
    call: Option<UnqueuedCall<Req>>,
    channel: Arc<Channel<Req, Res>>,
}

/// A call that has no place in the queue yet. It becomes a [`Message`] when it has a place.
struct UnqueuedCall<Req> {
    req: Option<Req>,
    context: CallContext,
    /// The timer of the call's deadline, made when the call first waits.
    timer: Option<Pin<Box<Sleep>>>,
    /// The waker of the task that polls the response future, woken when the call is cancelled.
    caller: Option<Waker>,
}

// === impl ResponseFuture ===

impl<Req, Res> ResponseFuture<Req, Res> {
    /// Waits until the call has a place in the queue. Returns at once if the call [was accepted](Self::is_accepted)
    /// already, or was cancelled.
    ///
    /// # Errors
    ///
    /// Returns [`Closed`] if the queue was closed before the call had a place, and
    /// [`DeadlineExceeded`](crate::error::DeadlineExceeded) if the call's deadline passed before.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe: if its future is dropped, the call keeps its position among those that wait for a
    /// place.
    pub async fn accepted(&mut self) -> Result<(), BoxError> {
        poll_fn(|cx| self.poll_accepted(cx)).await
    }

    /// Returns whether the call has been accepted into the queue, even if it has left the queue since. After this
    /// future has completed, that is no longer known, and the method returns `false`.
    #[must_use]
    pub fn is_accepted(&self) -> bool {
        match &self.state {
            State::Accepted { .. } => true,
            State::Scheduled { message, .. } => message.is_accepted(),
            State::WaitingForPlace(_) | State::EndedEarly(_) | State::Finished => false,
        }
    }

    /// Drops this future without cancelling the call. The call's response is dropped. A call that has no place in the
    /// queue yet is not made: await [`accepted`](Self::accepted) before detaching it.
    pub fn detach(mut self) {
        self.state = State::Finished;
    }

    /// Cancels the call. The place of a queued call is free at once; a running call is dropped by its task. The future
    /// then returns [`Cancelled`](crate::error::Cancelled), unless the call had a response already.
    pub fn cancel(&mut self) {
        if let State::WaitingForPlace(waiting) = &mut self.state {
            let caller = waiting.call.as_mut().and_then(|call| call.caller.take());
            self.end_waiting(EarlyEnd::Cancelled);
            caller.into_iter().for_each(Waker::wake);
        }
        self.cancel_accepted();
    }

    /// Cancels the call if it was accepted. A call that waits for a place is not changed.
    pub(crate) fn cancel_accepted(&self) {
        if let State::Accepted { message, channel } | State::Scheduled { message, channel } = &self.state {
            channel.end_early(message, EarlyEnd::Cancelled);
        }
    }

    #[inline]
    pub(super) fn accepted_as(message: Arc<Message<Req, Res>>, channel: &Arc<Channel<Req, Res>>) -> Self {
        Self {
            state: State::Accepted {
                message,
                channel: channel.clone(),
            },
        }
    }

    /// Creates the future of a call that waits in the schedule.
    pub(super) fn scheduled_as(message: Arc<Message<Req, Res>>, channel: &Arc<Channel<Req, Res>>) -> Self {
        Self {
            state: State::Scheduled {
                message,
                channel: channel.clone(),
            },
        }
    }

    /// Creates the future of a call that has no place in the queue yet.
    pub(super) fn waiting(
        channel: &Arc<Channel<Req, Res>>,
        acquire: Acquire,
        req: Option<Req>,
        context: CallContext,
    ) -> Self {
        Self {
            state: State::WaitingForPlace(Box::new(WaitingForPlace {
                acquire: Some(acquire),
                call: Some(UnqueuedCall {
                    req,
                    context,
                    timer: None,
                    caller: None,
                }),
                channel: channel.clone(),
            })),
        }
    }

    /// Ends a call that waits for a place.
    fn end_waiting(&mut self, why: EarlyEnd) {
        if let State::WaitingForPlace(waiting) = &self.state {
            if let Some(call) = &waiting.call {
                why.record(&call.context.scope);
            }
        }
        self.state = State::EndedEarly(why);
    }

    fn poll_accepted(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        if let State::Scheduled { message, .. } = &self.state {
            let accepted = ready!(message.poll_accepted(cx));
            if accepted.is_err() {
                self.state = State::Finished;
            }
            return Poll::Ready(accepted);
        }
        if let State::WaitingForPlace(waiting) = &mut self.state {
            let WaitingForPlace { acquire, call, channel } = &mut **waiting;
            let Poll::Ready(place) = Acquire::poll_acquire(acquire, cx) else {
                // The acquirer of the place stores the same waker, but drops it without waking the task when the call
                // is cancelled. So `cancel` needs this copy to wake the task.
                let Some(call) = call else { return Poll::Pending };
                call.caller = Some(cx.waker().clone());
                let Some(deadline) = call.context.deadline else {
                    return Poll::Pending;
                };
                let timer = call.timer.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
                ready!(timer.as_mut().poll(cx));
                self.end_waiting(EarlyEnd::DeadlinePassed);
                return Poll::Ready(Err(EarlyEnd::DeadlinePassed.into_error()));
            };
            let UnqueuedCall { mut req, context, .. } = call.take().expect("the call is there until it has a place");
            let pushed = match place {
                Ok(place) => {
                    context.scope.queued();
                    channel.push(&mut req, context, place)
                }
                Err(_) => Err(context),
            };
            match pushed {
                Ok(message) => {
                    let channel = channel.clone();
                    self.state = State::Accepted { message, channel };
                }
                Err(context) => {
                    context.scope.cancel();
                    self.state = State::Finished;
                    return Poll::Ready(Err(Closed::new().into()));
                }
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl<Req, Res> Future for ResponseFuture<Req, Res> {
    type Output = Result<Res, BoxError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        ready!(self.poll_accepted(cx))?;
        match &self.state {
            State::Accepted { message, .. } | State::Scheduled { message, .. } => {
                let result = ready!(message.poll_response(cx));
                self.state = State::Finished;
                Poll::Ready(result)
            }
            State::EndedEarly(why) => {
                let error = why.into_error();
                self.state = State::Finished;
                Poll::Ready(Err(error))
            }
            State::WaitingForPlace(_) | State::Finished => {
                panic!("`ResponseFuture` polled after completion")
            }
        }
    }
}

/// The future is `Unpin` even if the request and the response are not, because no field is structurally pinned.
impl<Req, Res> Unpin for ResponseFuture<Req, Res> {}

impl<Req, Res> Drop for ResponseFuture<Req, Res> {
    fn drop(&mut self) {
        self.cancel_accepted();
    }
}

impl<Req, Res> fmt::Debug for ResponseFuture<Req, Res> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_tuple("queue::ResponseFuture");
        match &self.state {
            State::WaitingForPlace(_) => debug.field(&"WaitingForPlace"),
            State::Accepted { message, .. } | State::Scheduled { message, .. } => debug.field(message),
            State::EndedEarly(why) => debug.field(why),
            State::Finished => debug.field(&"Finished"),
        };
        debug.finish()
    }
}
