//! A bounded queue in front of a service. Its worker tasks drive the calls.
//!
//! In plain Tower a call proceeds only while its caller polls the response future. That is not enough when calls share
//! limits: a call whose caller does not poll it would keep its permit, or its place ahead of other calls, and those
//! calls would wait for it.
//!
//! [`QueueLayer`] separates the calls from their callers. [`Queue`] is a handle that is cheap to clone, even if the
//! service cannot be cloned. A call waits in the queue for its turn. Then a *worker*, a task that the layer spawns,
//! calls the service and polls the call's future until it completes. The caller's [`ResponseFuture`] only waits for the
//! result.
//!
//! # Guarantees
//!
//! - **Bounded.** A call has a *place* in the queue until the call begins. While all places are taken, `poll_ready`
//!   waits, and [`try_call`](Queue::try_call) refuses the call and returns its request. No call is lost.
//! - **In order.** Calls begin in the order in which the queue accepted them.
//! - **Cancellation.** Dropping the [`ResponseFuture`] cancels the call. The place of a queued call is free at once; a
//!   running call is dropped by its worker. A [detached](ResponseFuture::detach) call continues without its future.
//! - **Readiness reserves nothing.** A handle that is ready and not called does not hold a place. If the handle had to
//!   wait until it was ready and is not called within 5 ms, the next waiting caller is woken. If the handle is called
//!   when the place has been taken, the response future waits for another place.
//! - **Panics are contained.** A panic of the service, in `poll_ready`, in `call` or in the call's future, fails only
//!   the call in which it happened, with [`Panicked`](crate::error::Panicked). An error from `poll_ready` fails only
//!   the call that was about to begin.
//! - **Shutdown.** [`close`](Queue::close), or dropping the last handle, stops accepting calls and lets the accepted
//!   ones finish. [`abort`](Queue::abort) stops accepting calls and cancels the accepted ones. Every waiting caller
//!   gets a response or an error.
//! - **Context.** The caller's tracing span and its [event](crate::event) are current while a worker runs the call.
//!
//! # Examples
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), tower::BoxError> {
//! use tower::{Service, ServiceBuilder, ServiceExt, service_fn};
//! use tower_outbound::QueueLayer;
//!
//! let mut queue = ServiceBuilder::new()
//!     .layer(QueueLayer::new(100)?)
//!     .service(service_fn(async |name: String| Ok::<_, std::io::Error>(format!("hello {name}"))));
//!
//! let response = queue.ready().await?.call("you".into());
//! assert_eq!(queue.depth(), 1);
//! assert_eq!(response.await?, "hello you");
//!
//! queue.close();
//! queue.ended().await;
//! # Ok(())
//! # }
//! ```

mod call_set;
mod channel;
#[cfg(all(test, tower_outbound_loom))]
mod interleavings;
mod message;
mod service_lock;
mod worker;

use crate::{
    error::{BoxError, Cancelled, Closed, InvalidConfig, Refused},
    event::Scope,
    semaphore::{Acquire, Permit, Semaphore},
};
use channel::Channel;
use message::Message;
use std::{
    fmt,
    future::{Future, poll_fn},
    marker::PhantomData,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker, ready},
};
use tower_layer::Layer;
use tower_service::Service;

/// Puts a [`Queue`] in front of a service. See the [module docs](self).
pub struct QueueLayer<Req> {
    capacity: usize,
    workers: usize,
    request: PhantomData<fn(Req)>,
}

/// A handle to a queue. Clones are handles to the same queue. See the [module docs](self).
pub struct Queue<Req, Res> {
    /// Shared by all handles to the queue, and by nothing else, so that the queue is closed when its last handle is
    /// dropped.
    close_on_drop: Arc<CloseOnDrop<Req, Res>>,
    /// Acquires the place in the queue for this handle's next call.
    acquire: Acquire,
}

/// Closes the queue when dropped. The handles share one `CloseOnDrop`, which is dropped with the last handle.
struct CloseOnDrop<Req, Res> {
    channel: Arc<Channel<Req, Res>>,
}

/// The response future of a queued call.
///
/// The future has to be polled only until the call has a place in the queue: from then on the workers drive the call.
/// Most calls have a place as soon as they are made; see [`is_accepted`](Self::is_accepted).
///
/// # Errors
///
/// The future returns the error of the inner service, or:
///
/// - [`Closed`] if the queue was closed before the call had a place,
/// - [`Cancelled`] if the call was cancelled, the queue was aborted, or the runtime of the queue's workers was shut
///   down,
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
    WaitingForPlace(WaitingForPlace<Req, Res>),
    /// The call was accepted: it had a place in the queue, and is queued, is running, or has a response.
    Accepted {
        message: Arc<Message<Req, Res>>,
        channel: Arc<Channel<Req, Res>>,
    },
    /// The call was cancelled before it had a place.
    Cancelled,
    /// The future has returned the call's result, or the call was detached.
    Finished,
}

/// A call that waits for a place in the queue, with the acquirer of that place.
struct WaitingForPlace<Req, Res> {
    acquire: Option<Acquire>,
    /// The waiting call is boxed, because space for its request would make the futures of accepted calls larger, too.
    call: Option<Box<UnqueuedCall<Req>>>,
    channel: Arc<Channel<Req, Res>>,
}

/// A call that has no place in the queue yet. It becomes a [`Message`] when it has a place.
struct UnqueuedCall<Req> {
    req: Option<Req>,
    scope: Scope,
    /// The waker of the task that polls the response future, woken when the call is cancelled.
    caller: Option<Waker>,
}

/// The largest number of workers of a queue: more than any machine has threads, and few enough to be spawned.
const MAX_WORKERS: usize = 65_536;

// === impl QueueLayer ===

impl<Req> QueueLayer<Req> {
    /// Creates a layer whose queues have `capacity` places and one worker each.
    ///
    /// # Errors
    ///
    /// Returns [`InvalidConfig`] if `capacity` is zero.
    pub fn new(capacity: usize) -> Result<Self, InvalidConfig> {
        let capacity = InvalidConfig::positive("queue_capacity", capacity)?;
        Ok(Self {
            capacity,
            workers: 1,
            request: PhantomData,
        })
    }

    /// Sets how many worker tasks drive the calls of a queue. Default: 1.
    ///
    /// One worker can drive any number of calls at once. More workers spread the computation of the calls' futures over
    /// several threads. The number of workers changes neither how many calls run at once nor the order in which calls
    /// begin. But with several workers, two calls that begin one right after the other may reach the layers below the
    /// queue in either order, because different threads poll their futures.
    ///
    /// # Errors
    ///
    /// Returns [`InvalidConfig`] if `workers` is zero or above 65,536.
    pub fn workers(mut self, workers: usize) -> Result<Self, InvalidConfig> {
        self.workers = InvalidConfig::positive_up_to(MAX_WORKERS, "workers", workers)?;
        Ok(self)
    }
}

/// Each service that the layer makes is a separate queue with its own workers.
///
/// # Panics
///
/// Panics if `layer` is called outside a Tokio runtime, where the workers cannot be spawned.
impl<S, Req> Layer<S> for QueueLayer<Req>
where
    S: Service<Req> + Send + 'static,
    S::Error: Into<BoxError>,
    S::Future: Send,
    S::Response: Send + 'static,
    Req: Send + 'static,
{
    type Service = Queue<Req, S::Response>;

    fn layer(&self, inner: S) -> Self::Service {
        let places = Semaphore::new(self.capacity);
        let channel = Channel::new(places.clone());
        worker::spawn(inner, self.workers, &channel);
        Queue {
            close_on_drop: Arc::new(CloseOnDrop { channel }),
            acquire: places.acquire(),
        }
    }
}

impl<Req> Clone for QueueLayer<Req> {
    fn clone(&self) -> Self {
        Self { ..*self }
    }
}

impl<Req> fmt::Debug for QueueLayer<Req> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QueueLayer")
            .field("capacity", &self.capacity)
            .field("workers", &self.workers)
            .finish()
    }
}

// === impl Queue ===

impl<Req, Res> Queue<Req, Res> {
    /// Queues a call if the queue has a free place now and no other caller waits for a place.
    ///
    /// # Errors
    ///
    /// Returns [`Refused`], which contains the request, if the queue is full or closed, or another caller waits for a
    /// place.
    pub fn try_call(&mut self, req: Req) -> Result<ResponseFuture<Req, Res>, Refused<Req>> {
        match self.try_place() {
            Ok(Some(place)) => self.call_at(place, req, Scope::capture()),
            Ok(None) => Err(Refused::full(req)),
            Err(_) => Err(Refused::closed(req)),
        }
    }

    /// Takes a place if the queue has a free one now and no other caller waits for a place. The place can then be given
    /// to [`call_at`](Self::call_at).
    pub(crate) fn try_place(&mut self) -> Result<Option<Permit>, Closed> {
        self.acquire.try_acquire()
    }

    /// Queues a call that has taken `place` already.
    pub(crate) fn call_at(
        &self,
        place: Permit,
        req: Req,
        scope: Scope,
    ) -> Result<ResponseFuture<Req, Res>, Refused<Req>> {
        let mut req = Some(req);
        let channel = self.channel();
        match channel.push(&mut req, scope, place) {
            Ok(message) => Ok(ResponseFuture::accepted_as(message, channel)),
            // The call's scope (its event and its span) is dropped without cancelling the event: the caller may make
            // the call again in another queue, as part of the same event.
            Err(_) => Err(Refused::closed(req.expect("a refused call leaves its request"))),
        }
    }

    /// Queues a call whose event and span are in `scope`. If the queue has no free place, the returned future waits for
    /// one. Taking the request out of `req` saves moving it twice.
    #[inline]
    pub(crate) fn call_in(&mut self, scope: Scope, req: &mut Option<Req>) -> ResponseFuture<Req, Res> {
        let channel = &self.close_on_drop.channel;
        let scope = match self.acquire.try_acquire() {
            Ok(Some(place)) => match channel.push(req, scope, place) {
                Ok(message) => return ResponseFuture::accepted_as(message, channel),
                // The queue was closed just now. The returned future fails with `Closed` when it is polled.
                Err(scope) => scope,
            },
            Ok(None) | Err(_) => scope,
        };
        ResponseFuture {
            state: State::WaitingForPlace(WaitingForPlace {
                channel: channel.clone(),
                acquire: Some(self.acquire.replace()),
                call: Some(Box::new(UnqueuedCall {
                    req: req.take(),
                    scope,
                    caller: None,
                })),
            }),
        }
    }

    /// Returns how many calls are queued, that is, have a place in the queue and have not begun.
    #[must_use]
    pub fn depth(&self) -> usize {
        self.channel().places().held()
    }

    /// Returns how many places the queue has.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.channel().places().total()
    }

    /// Returns how many calls are running, that is, have begun and have not ended. They may be waiting for a limit in a
    /// layer below the queue.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.channel().in_flight()
    }

    /// Stops accepting calls, and lets the accepted ones finish. Calls that wait for a place fail with [`Closed`].
    pub fn close(&self) {
        self.channel().close();
    }

    /// Stops accepting calls, and cancels the accepted ones. The workers drop the running calls shortly after this
    /// method has returned; [`ended`](Self::ended) waits for that.
    pub fn abort(&self) {
        self.channel().abort();
    }

    /// Returns whether the queue was closed, so that it accepts no more calls.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.channel().is_closed()
    }

    /// Waits until the queue is closed and its last call has ended.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe: dropping its future changes nothing, and the method can be called again.
    pub async fn ended(&self) {
        self.channel().ended().await;
    }

    /// Returns whether the queue is closed and its last call has ended.
    #[must_use]
    pub fn is_ended(&self) -> bool {
        self.channel().is_ended()
    }

    /// Returns the semaphore of the queue's places, which shows the queue's depth. Unlike a handle, it does not keep
    /// the queue open.
    pub(crate) fn places(&self) -> Semaphore {
        self.channel().places().clone()
    }

    /// Returns whether `self` and `other` are handles to the same queue.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.close_on_drop, &other.close_on_drop)
    }

    fn channel(&self) -> &Arc<Channel<Req, Res>> {
        &self.close_on_drop.channel
    }
}

impl<Req, Res> Service<Req> for Queue<Req, Res> {
    type Response = Res;
    type Error = BoxError;
    type Future = ResponseFuture<Req, Res>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.acquire.poll_ready(cx).map_err(Into::into)
    }

    /// Queues the call. A call without a preceding `poll_ready` does not panic: if the queue has no free place, the
    /// future waits for one.
    fn call(&mut self, req: Req) -> Self::Future {
        self.call_in(Scope::capture(), &mut Some(req))
    }
}

impl<Req, Res> Clone for Queue<Req, Res> {
    fn clone(&self) -> Self {
        Self {
            close_on_drop: self.close_on_drop.clone(),
            acquire: self.acquire.clone(),
        }
    }
}

impl<Req, Res> fmt::Debug for Queue<Req, Res> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queue")
            .field("capacity", &self.capacity())
            .field("depth", &self.depth())
            .field("in_flight", &self.in_flight())
            .field("closed", &self.is_closed())
            .finish()
    }
}

// === impl CloseOnDrop ===

impl<Req, Res> Drop for CloseOnDrop<Req, Res> {
    fn drop(&mut self) {
        self.channel.close();
    }
}

// === impl ResponseFuture ===

impl<Req, Res> ResponseFuture<Req, Res> {
    /// Waits until the call has a place in the queue. Returns at once if the call [was accepted](Self::is_accepted)
    /// already, or was cancelled.
    ///
    /// # Errors
    ///
    /// Returns [`Closed`] if the queue was closed before the call had a place.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe: if its future is dropped, the call keeps its position among those that wait for a
    /// place.
    pub async fn accepted(&mut self) -> Result<(), Closed> {
        poll_fn(|cx| self.poll_accepted(cx)).await
    }

    /// Returns whether the call has been accepted into the queue, even if it has left the queue since. After this
    /// future has completed, that is no longer known, and the method returns `false`.
    #[must_use]
    pub const fn is_accepted(&self) -> bool {
        matches!(self.state, State::Accepted { .. })
    }

    /// Drops this future without cancelling the call. The call's response is dropped. A call that has no place in the
    /// queue yet is not made: await [`accepted`](Self::accepted) before detaching it.
    pub fn detach(mut self) {
        self.state = State::Finished;
    }

    /// Cancels the call. The place of a queued call is free at once; a running call is dropped by its worker. The
    /// future then returns [`Cancelled`], unless the call had a response already.
    pub fn cancel(&mut self) {
        if let State::WaitingForPlace(waiting) = &mut self.state {
            let call = waiting.call.take();
            self.state = State::Cancelled;
            if let Some(UnqueuedCall { scope, caller, .. }) = call.map(|call| *call) {
                scope.cancel();
                caller.into_iter().for_each(Waker::wake);
            }
        }
        self.cancel_accepted();
    }

    /// Cancels the call if it was accepted. A call that waits for a place is not changed.
    pub(crate) fn cancel_accepted(&self) {
        if let State::Accepted { message, channel } = &self.state {
            channel.cancel(message);
        }
    }

    #[inline]
    fn accepted_as(message: Arc<Message<Req, Res>>, channel: &Arc<Channel<Req, Res>>) -> Self {
        Self {
            state: State::Accepted {
                message,
                channel: channel.clone(),
            },
        }
    }

    fn poll_accepted(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Closed>> {
        if let State::WaitingForPlace(waiting) = &mut self.state {
            let WaitingForPlace { acquire, call, channel } = waiting;
            let Poll::Ready(place) = Acquire::poll_acquire(acquire, cx) else {
                // The acquirer of the place stores the same waker, but drops it without waking the task when the call
                // is cancelled. So `cancel` needs this copy to wake the task.
                if let Some(call) = call {
                    call.caller = Some(cx.waker().clone());
                }
                return Poll::Pending;
            };
            let UnqueuedCall { mut req, scope, .. } = *call.take().expect("the call is there until it has a place");
            let pushed = match place {
                Ok(place) => channel.push(&mut req, scope, place),
                Err(_) => Err(scope),
            };
            match pushed {
                Ok(message) => {
                    let channel = channel.clone();
                    self.state = State::Accepted { message, channel };
                }
                Err(scope) => {
                    scope.cancel();
                    self.state = State::Finished;
                    return Poll::Ready(Err(Closed::new()));
                }
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl<Req, Res> Future for ResponseFuture<Req, Res> {
    type Output = Result<Res, BoxError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if let Err(closed) = ready!(self.poll_accepted(cx)) {
            return Poll::Ready(Err(closed.into()));
        }
        match &self.state {
            State::Accepted { message, .. } => {
                let result = ready!(message.poll_response(cx));
                self.state = State::Finished;
                Poll::Ready(result)
            }
            State::Cancelled => Poll::Ready(Err(Cancelled::new().into())),
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
            State::Accepted { message, .. } => debug.field(message),
            State::Cancelled => debug.field(&"Cancelled"),
            State::Finished => debug.field(&"Finished"),
        };
        debug.finish()
    }
}
