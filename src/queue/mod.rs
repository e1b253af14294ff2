//! A bounded queue whose workers drive the calls.
//!
//! [`QueueLayer`] puts it in front of any service, clone or not, and makes it a cheap handle that can be cloned at
//! will: calls wait in order, and *workers*, tasks of the queue's own, make them and drive them to their end. So a
//! response future that nobody polls stalls nobody, and a call can run on without anybody waiting for it.
//!
//! # What is promised
//!
//! - **Bounded.** When all places are pending, `poll_ready` waits, or [`try_call`](Queue::try_call) refuses and hands the
//!   request back. Nothing is lost.
//! - **In order.** Calls begin in the order in which they came.
//! - **Cancel.** Dropping the [response future](ResponseFuture) cancels the call: if it is queued, its place is free at
//!   once; if it runs, it is dropped. [`detach`](ResponseFuture::detach) lets it run on.
//! - **Fair.** A handle that was made ready but is not called holds no place for longer than 5 ms, so that it starves
//!   nobody. If another takes the place first, the call waits for one in its future.
//! - **Contained.** A panic below, in `poll_ready`, `call` or the future, fails [that call](crate::error::Panicked) and
//!   no other; so does an error from `poll_ready`.
//! - **An end.** [`close`](Queue::close) takes no more and finishes what was accepted; so does dropping the last
//!   handle. [`abort`](Queue::abort) cancels everything. Whoever waits is told.
//! - The caller's tracing span, and its [event](crate::event), follow the call over the queue.
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

/// A handle to a queue. See the [module docs](self).
pub struct Queue<Req, Res> {
    handle: Arc<Handle<Req, Res>>,
    acquire: Acquire,
}

/// What all handles share. Dropped with the last of them.
struct Handle<Req, Res> {
    channel: Arc<Channel<Req, Res>>,
}

/// The response to a queued call.
///
/// # Errors
///
/// What the service below returned, or [`Closed`], [`Cancelled`] or
/// [`Panicked`](crate::error::Panicked).
///
/// # Cancel safety
///
/// Dropping it cancels the call.
#[must_use = "dropping it cancels the call; `detach` lets it run"]
pub struct ResponseFuture<Req, Res> {
    state: State<Req, Res>,
}

enum State<Req, Res> {
    /// Has no place yet.
    WaitingForPlace(WaitingForPlace<Req, Res>),
    /// Queued, call_set or done.
    Accepted { message: Arc<Message<Req, Res>> },
    /// Cancelled before it had a place.
    Cancelled,
    /// Given up, or detached.
    Finished,
}

/// A call that waits for a place.
struct WaitingForPlace<Req, Res> {
    acquire: Option<Acquire>,
    /// In a box, so that the future of the others is small.
    call: Option<Box<UnqueuedCall<Req>>>,
    channel: Arc<Channel<Req, Res>>,
}

struct UnqueuedCall<Req> {
    req: Option<Req>,
    scope: Scope,
    /// Who waits for the response.
    caller: Option<Waker>,
}

// === impl QueueLayer ===

impl<Req> QueueLayer<Req> {
    /// A queue with so many places, and one worker.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`] if the capacity is zero.
    pub fn new(capacity: usize) -> Result<Self, InvalidConfig> {
        let capacity = InvalidConfig::positive("queue_capacity", capacity)?;
        Ok(Self {
            capacity,
            workers: 1,
            request: PhantomData,
        })
    }

    /// How many tasks drive the calls. Default: one, which can drive any number of them.
    ///
    /// More workers let the calls' own computing spread over several threads. They do not change how many calls run at
    /// once, nor the order in which they begin; two that begin in the same moment may reach the wire in either order.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`] if it is zero, or above 65,536.
    pub fn workers(mut self, workers: usize) -> Result<Self, InvalidConfig> {
        self.workers = InvalidConfig::workers(workers)?;
        Ok(self)
    }
}

/// # Panics
///
/// `layer` spawns the workers, so it panics outside a Tokio runtime.
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
            handle: Arc::new(Handle { channel }),
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
    /// Makes a call if there is a place for it now.
    ///
    /// # Errors
    ///
    /// [`Refused`] if the queue is full, or others wait for a place, or it is closed; it holds the request.
    pub fn try_call(&mut self, req: Req) -> Result<ResponseFuture<Req, Res>, Refused<Req>> {
        match self.try_place() {
            Ok(Some(place)) => self.call_at(place, req, Scope::capture()),
            Ok(None) => Err(Refused::full(req)),
            Err(_) => Err(Refused::closed(req)),
        }
    }

    /// A place for a call that follows at once, if there is one now.
    pub(crate) fn try_place(&mut self) -> Result<Option<Permit>, Closed> {
        self.acquire.try_acquire()
    }

    pub(crate) fn call_at(
        &self,
        place: Permit,
        req: Req,
        scope: Scope,
    ) -> Result<ResponseFuture<Req, Res>, Refused<Req>> {
        let mut req = Some(req);
        match self.handle.channel.push(&mut req, scope, place) {
            Ok(message) => Ok(ResponseFuture {
                state: State::Accepted { message },
            }),
            // Who was refused may try elsewhere: the scope is dropped, not cancelled.
            Err(_) => Err(Refused::closed(req.expect("it was refused"))),
        }
    }

    /// Makes a call in a scope of its own. Takes the request.
    #[inline]
    pub(crate) fn call_in(&mut self, scope: Scope, req: &mut Option<Req>) -> ResponseFuture<Req, Res> {
        let channel = &self.handle.channel;
        let scope = match self.acquire.try_acquire() {
            Ok(Some(place)) => match channel.push(req, scope, place) {
                Ok(message) => {
                    return ResponseFuture {
                        state: State::Accepted { message },
                    };
                }
                // Closed: told when it is polled.
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

    /// How many calls are queued: those that have a place and have not begun.
    #[must_use]
    pub fn depth(&self) -> usize {
        self.handle.channel.places().held()
    }

    /// How many places there are.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.handle.channel.places().total()
    }

    /// How many calls have begun and are not over. Limits further down may still hold them up.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.handle.channel.in_flight()
    }

    /// Takes no more calls, and finishes all that were accepted. Those who wait for a place are refused.
    pub fn close(&self) {
        self.handle.channel.close();
    }

    /// Takes no more calls, and cancels all that were accepted.
    pub fn abort(&self) {
        self.handle.channel.abort();
    }

    /// Whether the queue takes no more calls.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.handle.channel.is_closed()
    }

    /// Waits until the queue is closed and its last call is over.
    ///
    /// # Cancel safety
    ///
    /// Nothing is lost.
    pub async fn ended(&self) {
        self.handle.channel.ended().await;
    }

    /// Whether the queue is closed and its last call is over.
    #[must_use]
    pub fn is_ended(&self) -> bool {
        self.handle.channel.is_ended()
    }

    pub(crate) fn places(&self) -> Semaphore {
        self.handle.channel.places().clone()
    }

    /// Whether both are handles to one queue.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.handle, &other.handle)
    }
}

impl<Req, Res> Service<Req> for Queue<Req, Res> {
    type Response = Res;
    type Error = BoxError;
    type Future = ResponseFuture<Req, Res>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.acquire.poll_ready(cx).map_err(Into::into)
    }

    /// Never panics: called without having been ready, the call waits for its place in its future.
    fn call(&mut self, req: Req) -> Self::Future {
        self.call_in(Scope::capture(), &mut Some(req))
    }
}

impl<Req, Res> Clone for Queue<Req, Res> {
    fn clone(&self) -> Self {
        Self {
            handle: self.handle.clone(),
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

// === impl Handle ===

impl<Req, Res> Drop for Handle<Req, Res> {
    fn drop(&mut self) {
        self.channel.close();
    }
}

// === impl ResponseFuture ===

impl<Req, Res> ResponseFuture<Req, Res> {
    /// Waits until the call has a place in the queue. Mostly it has one from the start.
    ///
    /// # Errors
    ///
    /// [`Closed`] if the queue was closed first.
    ///
    /// # Cancel safety
    ///
    /// Keeps its acquire: the response future goes on waiting where it was.
    pub async fn accepted(&mut self) -> Result<(), Closed> {
        poll_fn(|cx| self.poll_accepted(cx)).await
    }

    /// Whether the call has, or had, a place in the queue.
    #[must_use]
    pub const fn is_accepted(&self) -> bool {
        matches!(self.state, State::Accepted { .. })
    }

    /// Lets the call run on without anybody waiting for it. A call without a place is dropped: see
    /// [`accepted`](Self::accepted).
    pub fn detach(mut self) {
        self.state = State::Finished;
    }

    /// Ends the call: if it is queued, its place is free at once; if it runs, it is dropped. The future then returns
    /// [`Cancelled`], unless the response was there already.
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

    pub(crate) fn cancel_accepted(&self) {
        if let State::Accepted { message } = &self.state {
            message.channel().cancel(message);
        }
    }

    fn poll_accepted(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Closed>> {
        if let State::WaitingForPlace(waiting) = &mut self.state {
            let WaitingForPlace { acquire, call, channel } = waiting;
            let Poll::Ready(place) = Acquire::poll_acquire(acquire, cx) else {
                // It leaves the line when it is cancelled, and its waker with it.
                if let Some(call) = call {
                    call.caller = Some(cx.waker().clone());
                }
                return Poll::Pending;
            };
            let UnqueuedCall { mut req, scope, .. } = *call.take().expect("a call that waits for a place is there");
            let pushed = match place {
                Ok(place) => channel.push(&mut req, scope, place),
                Err(_) => Err(scope),
            };
            match pushed {
                Ok(message) => self.state = State::Accepted { message },
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
            State::Accepted { message } => {
                let result = ready!(message.poll_response(cx));
                self.state = State::Finished;
                Poll::Ready(result)
            }
            State::Cancelled => Poll::Ready(Err(Cancelled::new().into())),
            State::WaitingForPlace(_) | State::Finished => {
                panic!("a future is not polled after it was ready")
            }
        }
    }
}

/// Nothing in it is pinned.
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
            State::Accepted { message } => debug.field(message),
            State::Cancelled => debug.field(&"Cancelled"),
            State::Finished => debug.field(&"Finished"),
        };
        debug.finish()
    }
}
