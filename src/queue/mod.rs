//! A bounded queue in front of a service, whose calls are tasks of the runtime.
//!
//! In plain Tower a call proceeds only while its caller polls the response future. That is not enough when calls share
//! limits: a call whose caller does not poll it would keep its permit, or its place ahead of other calls, and those
//! calls would wait for it.
//!
//! [`QueueLayer`] separates the calls from their callers. [`Queue`] is a handle that is cheap to clone, even if the
//! service cannot be cloned. A call waits in the queue until the service is ready for it. Then the service is called,
//! and a task of its own drives the call's future until it completes. The caller's [`ResponseFuture`] only waits for
//! the result.
//!
//! # Guarantees
//!
//! - **Bounded.** A call has a *place* in the queue until the call begins. While all places are taken, `poll_ready`
//!   waits, and [`try_call`](Queue::try_call) refuses the call and returns its request. No call is lost.
//! - **In order.** Calls begin in the order in which the queue accepted them, and by default reach the layers below in
//!   that order, too: see [`workers`](QueueLayer::workers). With a [schedule](QueueLayer::schedule), it chooses.
//! - **Independent.** Each call is scheduled by the runtime as a task of its own. A call that computes, blocks, or
//!   always has more to do delays no other call that has begun, and the next ones by at most 10 ms.
//! - **Cancellation.** Dropping the [`ResponseFuture`] cancels the call. The place of a queued call is free at once; a
//!   running call is dropped by its task. A [detached](ResponseFuture::detach) call continues without its future.
//! - **Deadlines.** With [`QueueLayer::deadline`], a call ends at its deadline, whether it is queued or running, and
//!   whether or not its future is polled.
//! - **Final results.** When the future returns, the call is over: the inner service's future was dropped, and with it
//!   all that the call has held.
//! - **Readiness reserves nothing.** A handle that is ready and not called does not hold a place. If the handle had to
//!   wait until it was ready and is not called within 5 ms, the next waiting caller is woken. If the handle is called
//!   when the place has been taken, the response future waits for another place.
//! - **Panics are contained.** A panic of the service, in `poll_ready`, in `call` or in the call's future, fails only
//!   the call in which it happened, with [`Panicked`](crate::error::Panicked). An error from `poll_ready` fails only
//!   the call that was about to begin.
//! - **Shutdown.** [`close`](Queue::close), or dropping the last handle, stops accepting calls and lets the accepted
//!   ones finish. [`abort`](Queue::abort) stops accepting calls and cancels the accepted ones. Every waiting caller
//!   gets a response or an error.
//! - **Context.** The caller's tracing span and its [event](crate::event) are current while the call runs.
//!
//! The calls run on the runtime in which the layer was applied, each on a *worker*, a task that runs one call at a time.
//! The service's `poll_ready` and `call` should not block, since one worker at a time uses the service; the futures may.
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

mod bound;
mod channel;
mod door;
mod ending;
#[cfg(all(test, tower_outbound_loom))]
mod interleavings;
mod message;
mod response_future;
mod runtime;
mod scheduled;
mod timer;
mod turn;
mod wakers;
mod worker;
mod workers;

pub use response_future::ResponseFuture;

use crate::{
    deadline::{Deadline, PendingCost},
    error::{BoxError, Closed, InvalidConfig, Refused},
    event::Scope,
    rate::{Cost, RequestCost},
    schedule::{Flow, Schedule, ScheduledCall},
    semaphore::{Acquire, Permit, Semaphore},
    sync::Mutex,
};
use bound::Binding;
use channel::Channel;
use std::{
    fmt,
    marker::PhantomData,
    sync::Arc,
    task::{Context, Poll, ready},
};
use tokio::time::Instant;
use tower_layer::Layer;
use tower_service::Service;
use worker::{SharedService, Worker};

/// Puts a [`Queue`] in front of a service. See the [module docs](self).
pub struct QueueLayer<Req> {
    capacity: usize,
    workers: usize,
    deadline: Option<fn(&Req) -> Option<Deadline>>,
    schedule: Option<Arc<QueueSchedule<Req>>>,
    request: PhantomData<fn(Req)>,
}

/// A schedule, and what it has to know about a call.
struct QueueSchedule<Req> {
    schedule: Schedule,
    describe: Box<DescribeCall<Req>>,
}

/// Returns whose call a request is, and what it costs.
type DescribeCall<Req> = dyn Fn(&Req) -> (Flow, Cost) + Send + Sync;

/// A handle to a queue. Clones are handles to the same queue. See the [module docs](self).
pub struct Queue<Req, Res> {
    /// Shared by all handles to the queue, and by nothing else, so that the queue is closed when its last handle is
    /// dropped.
    close_on_drop: Arc<CloseOnDrop<Req, Res>>,
    /// Acquires the place in the queue for this handle's next call.
    acquire: Acquire,
    deadline: Option<fn(&Req) -> Option<Deadline>>,
    schedule: Option<Arc<QueueSchedule<Req>>>,
    /// The flow to which this handle is bound.
    binding: Option<Box<Binding<Req, Res>>>,
}

/// What a call has besides its request while it waits to begin.
pub(crate) struct CallContext {
    /// The caller's event and span, in which the call will run.
    pub(crate) scope: Scope,
    /// The instant at which the queue ends the call.
    pub(crate) deadline: Option<Instant>,
    /// Counts the call's cost among that of the calls that have not reached the limits.
    pub(crate) demand: Option<PendingCost>,
    /// What the schedule of the queue has to know about the call, if it has one.
    pub(crate) scheduled: Option<Arc<ScheduledCall>>,
}

/// Closes the queue when dropped. The handles share one `CloseOnDrop`, which is dropped with the last handle.
struct CloseOnDrop<Req, Res> {
    channel: Arc<Channel<Req, Res>>,
}

/// The largest number of calls that may start at once: more than any machine has threads.
const MAX_WORKERS: usize = 65_536;

// === impl QueueLayer ===

impl<Req> QueueLayer<Req> {
    /// Creates a layer whose queues have `capacity` places, and whose calls start one at a time.
    ///
    /// # Errors
    ///
    /// Returns [`InvalidConfig`] if `capacity` is zero.
    pub fn new(capacity: usize) -> Result<Self, InvalidConfig> {
        let capacity = InvalidConfig::positive("queue_capacity", capacity)?;
        Ok(Self {
            capacity,
            workers: 1,
            deadline: None,
            schedule: None,
            request: PhantomData,
        })
    }

    /// Sets how many calls may start at once. Default: 1.
    ///
    /// A call starts from the moment it leaves the queue until its future was polled once, which is when it has reached
    /// the limits below, or has been sent if it need not wait for them. With one worker, calls reach the layers below
    /// the queue in the order in which the queue accepted them, on any runtime. With more workers, calls start on
    /// several threads at once, which helps if they compute much before they first wait; then calls that begin one
    /// right after the other may reach the layers below in either order.
    ///
    /// The number of workers changes neither how many calls run at once nor the order in which calls begin. A call that
    /// takes longer than 5 to 10 ms to start is no longer waited for, so it does not hold up the calls behind it.
    ///
    /// # Errors
    ///
    /// Returns [`InvalidConfig`] if `workers` is zero or above 65,536.
    pub fn workers(mut self, workers: usize) -> Result<Self, InvalidConfig> {
        self.workers = InvalidConfig::positive_up_to(MAX_WORKERS, "workers", workers)?;
        Ok(self)
    }

    /// Ends each call at the deadline that `deadline` returns for its request, with
    /// [`DeadlineExceeded`](crate::error::DeadlineExceeded). Default: calls have no deadline.
    ///
    /// A call ends at its deadline whether it is queued or running, and whether or not its future is polled; only while
    /// it waits for a place in the queue, its future has to be polled. A queued call gives its place back, a running
    /// one is dropped.
    ///
    /// ```
    /// # use tower_outbound::{Deadline, QueueLayer};
    /// // The deadline in the extensions of an http request.
    /// let layer = QueueLayer::<http::Request<String>>::new(100)?.deadline(Deadline::of);
    /// # Ok::<_, tower_outbound::error::InvalidConfig>(())
    /// ```
    ///
    /// # Panics
    ///
    /// In a runtime whose timer is not enabled, a call that has a deadline panics when it is queued.
    #[must_use]
    pub fn deadline(mut self, deadline: fn(&Req) -> Option<Deadline>) -> Self {
        self.deadline = Some(deadline);
        self
    }
}

impl<Req: 'static> QueueLayer<Req> {
    /// Lets `schedule` decide which call goes next. `flow` says whose call it is, and `cost` what the limiter of the schedule
    /// charges it. Default: calls begin in the order in which the queue accepted them.
    ///
    /// With a schedule, `poll_ready` is always ready, because it does not know yet whose call will follow. A call without a
    /// place in the queue waits for it in the schedule already, and begins even if its future is not polled.
    ///
    /// ```
    /// # use tower_outbound::{Concurrency, Limits, QueueLayer, Rate, RateLimiter, Schedule};
    /// # use tower_outbound::{rate::ByExtension, schedule::{Flow, Level}};
    /// let (concurrency, limiter) = (Concurrency::new(10)?, RateLimiter::new(Limits::new().requests(Rate::per_second(5)))?);
    /// let schedule = Schedule::new()
    ///     .level(Level::by("tenant"))
    ///     .concurrency(concurrency.clone())
    ///     .limiter(limiter.clone());
    /// let layer = QueueLayer::<http::Request<String>>::new(100)?.schedule(schedule, Flow::of, ByExtension)?;
    /// // Below it come `ConcurrencyLimitLayer::with_limit(concurrency)` and `RateLimitLayer::new(limiter)`.
    /// # Ok::<_, tower_outbound::error::InvalidConfig>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Returns [`InvalidConfig`] if the schedule has more than 3 levels or more than 256 classes.
    pub fn schedule(
        mut self,
        schedule: Schedule,
        flow: impl Fn(&Req) -> Flow + Send + Sync + 'static,
        cost: impl RequestCost<Req> + Send + Sync + 'static,
    ) -> Result<Self, InvalidConfig> {
        schedule.check()?;
        self.schedule = Some(Arc::new(QueueSchedule {
            schedule,
            describe: Box::new(move |req| (flow(req), cost.cost(req))),
        }));
        Ok(self)
    }
}

/// Each service that the layer makes is a separate queue.
///
/// # Panics
///
/// Panics if `layer` is called outside a Tokio runtime, where the calls cannot be spawned, and if the layer has a
/// [schedule](QueueLayer::schedule) whose queue has not ended: a schedule serves one queue at a time.
impl<S, Req> Layer<S> for QueueLayer<Req>
where
    S: Service<Req> + Send + 'static,
    S::Error: Into<BoxError>,
    S::Future: Send + 'static,
    S::Response: Send + 'static,
    Req: Send + 'static,
{
    type Service = Queue<Req, S::Response>;

    fn layer(&self, inner: S) -> Self::Service {
        let places = Semaphore::new(self.capacity);
        let service = SharedService::new(Mutex::new(Some(inner)));
        let schedule = self.schedule.as_ref().map(|queue| queue.schedule.clone());
        let channel = Channel::new(places.clone(), self.workers, schedule, move |channel, id| {
            let worker = Worker::new(service.clone(), id, channel.clone());
            channel.runtime().spawn(worker);
        });
        Queue {
            close_on_drop: Arc::new(CloseOnDrop { channel }),
            acquire: places.acquire(),
            deadline: self.deadline,
            schedule: self.schedule.clone(),
            binding: None,
        }
    }
}

impl<Req> Clone for QueueLayer<Req> {
    fn clone(&self) -> Self {
        Self {
            schedule: self.schedule.clone(),
            ..*self
        }
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
            Ok(Some(place)) => {
                let context = self.context(&req, Scope::capture(), None);
                context.scope.queued();
                self.call_at(place, &mut Some(req), context)
            }
            Ok(None) => Err(Refused::full(req)),
            Err(_) => Err(Refused::closed(req)),
        }
    }

    /// Takes a place if the queue has a free one now and no other caller waits for a place. The place can then be given
    /// to [`call_at`](Self::call_at) or [`call_in`](Self::call_in).
    #[inline]
    pub(crate) fn try_place(&mut self) -> Result<Option<Permit>, Closed> {
        if self.schedule.is_some() && !self.may_take_place() {
            return Ok(None);
        }
        self.acquire.try_acquire()
    }

    /// Whether a free place of a queue with a schedule may go to this handle: it was offered one, or no call waits for one.
    #[cold]
    fn may_take_place(&mut self) -> bool {
        let is_offered = self.binding.as_mut().is_some_and(|binding| binding.leave());
        is_offered || !self.channel().has_unplaced()
    }

    /// Queues a call that has taken `place` already, and whose event has the status QUEUED.
    pub(crate) fn call_at(
        &self,
        place: Permit,
        req: &mut Option<Req>,
        context: CallContext,
    ) -> Result<ResponseFuture<Req, Res>, Refused<Req>> {
        let channel = self.channel();
        match Self::push(channel, req, context, place) {
            Ok(future) => Ok(future),
            // The call's scope (its event and its span) is dropped without cancelling the event: the caller may make
            // the call again in another queue, as part of the same event.
            Err(_) => Err(Refused::closed(req.take().expect("a refused call leaves its request"))),
        }
    }

    /// Queues a call. `place` is what [`try_place`](Self::try_place) has returned; if it is a place, the call's event has
    /// the status QUEUED. Without a place, the returned future waits for one. Taking the request out of `req` saves
    /// moving it twice.
    #[inline]
    pub(crate) fn call_in(
        &mut self,
        place: Option<Permit>,
        context: CallContext,
        req: &mut Option<Req>,
    ) -> ResponseFuture<Req, Res> {
        let channel = &self.close_on_drop.channel;
        let context = match place {
            None if context.scheduled.is_some() => match Self::push_scheduled(channel, req, context, None) {
                Ok(future) => return future,
                Err(context) => context,
            },
            Some(place) => match Self::push(channel, req, context, place) {
                Ok(future) => return future,
                // The queue was closed just now. The returned future fails with `Closed` when it is polled.
                Err(context) => context,
            },
            None => context,
        };
        ResponseFuture::waiting(channel, self.acquire.replace(), req.take(), context)
    }

    #[inline]
    fn push(
        channel: &Arc<Channel<Req, Res>>,
        req: &mut Option<Req>,
        context: CallContext,
        place: Permit,
    ) -> Result<ResponseFuture<Req, Res>, CallContext> {
        if context.scheduled.is_some() {
            return Self::push_scheduled(channel, req, context, Some(place));
        }
        let message = channel.push(req, context, place)?;
        Ok(ResponseFuture::accepted_as(message, channel))
    }

    #[cold]
    fn push_scheduled(
        channel: &Arc<Channel<Req, Res>>,
        req: &mut Option<Req>,
        mut context: CallContext,
        place: Option<Permit>,
    ) -> Result<ResponseFuture<Req, Res>, CallContext> {
        let Some(call) = context.scheduled.take() else {
            return Err(context);
        };
        let message = channel.push_scheduled(req, context, place, call)?;
        Ok(ResponseFuture::scheduled_as(message, channel))
    }

    /// Returns the context of a call with this request.
    pub(crate) fn context(&self, req: &Req, scope: Scope, demand: Option<PendingCost>) -> CallContext {
        CallContext {
            scope,
            deadline: self.deadline.and_then(|deadline| deadline(req)).map(Deadline::instant),
            demand,
            scheduled: self.schedule.as_ref().map(|queue| self.scheduled_call(queue, req)),
        }
    }

    /// Returns what the schedule has to know about a call with this request.
    #[cold]
    fn scheduled_call(&self, queue: &QueueSchedule<Req>, req: &Req) -> Arc<ScheduledCall> {
        let (flow, cost) = (queue.describe)(req);
        let flow = match &self.binding {
            Some(binding) => flow.with_keys(binding.flow.clone()),
            None => flow,
        };
        queue.schedule.call(&flow, cost)
    }

    /// Waits until a call of the flow to which the handle is bound would get a place, if it is bound to one. Ready with
    /// `false` if the queue is closed.
    #[cold]
    fn poll_ready_scheduled(&mut self, cx: &mut Context<'_>) -> Poll<bool> {
        if self.is_closed() {
            return Poll::Ready(false);
        }
        if let Some(binding) = &mut self.binding {
            ready!(binding.poll_ready(cx));
        }
        Poll::Ready(!self.is_closed())
    }

    /// Returns a handle whose calls belong to `flow`, whatever their requests say: one key for each level of the schedule.
    ///
    /// Its `poll_ready` waits until a call of the flow would get a place in the queue, as that of a queue without a schedule
    /// does. Like that, it reserves nothing: if the handle is not called within 5 ms, the next one that waits is woken. The
    /// handle of a queue without a schedule is returned as it is.
    #[must_use]
    pub fn of(&self, flow: impl Into<Flow>) -> Self {
        let mut handle = self.clone();
        handle.binding = self.schedule.as_ref().map(|queue| {
            let flow = flow.into();
            let path = queue.schedule.path_of(&flow);
            Box::new(Binding::new(self.channel().clone(), flow, path))
        });
        handle
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

    /// Stops accepting calls, and cancels the accepted ones. The running calls are dropped by their tasks shortly after
    /// this method has returned; [`ended`](Self::ended) waits for that.
    pub fn abort(&self) {
        self.channel().abort();
    }

    /// Stops accepting calls, finishes those that are on the wire, and cancels the others. The event of each call tells
    /// whether it is on the wire, so this is only for queues whose calls have events, as those of an executor.
    pub(crate) fn finish_sent(&self) {
        self.channel().finish_sent();
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

    /// Returns how many places others get before a new call of a flow gets one.
    pub(crate) fn places_ahead_of(&self, call: &ScheduledCall) -> u64 {
        self.channel().places_ahead_of(call)
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
        if self.schedule.is_some() && ready!(self.poll_ready_scheduled(cx)) {
            return Poll::Ready(Ok(()));
        }
        self.acquire.poll_ready(cx).map_err(Into::into)
    }

    /// Queues the call. A call without a preceding `poll_ready` does not panic: if the queue has no free place, the
    /// future waits for one.
    fn call(&mut self, req: Req) -> Self::Future {
        let place = self.try_place().unwrap_or_default();
        let context = self.context(&req, Scope::capture(), None);
        if place.is_some() {
            context.scope.queued();
        }
        self.call_in(place, context, &mut Some(req))
    }
}

impl<Req, Res> Clone for Queue<Req, Res> {
    fn clone(&self) -> Self {
        Self {
            close_on_drop: self.close_on_drop.clone(),
            acquire: self.acquire.clone(),
            deadline: self.deadline,
            schedule: self.schedule.clone(),
            binding: self.binding.clone(),
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
