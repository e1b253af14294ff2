//! The whole stack behind one handle: start, submit, stop.
//!
//! An [`Executor`] makes http calls with a client, in order, under a concurrency limit and under rates of requests and
//! tokens, and keeps an [event] for each of them. The [stack] shows the layers and their order.
//!
//! # Examples
//!
//! ```
//! # #[tokio::main(flavor = "current_thread", start_paused = true)]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use http::{Request, Response};
//! use tower_outbound::{Call, Executor, Rate, executor::Shutdown};
//!
//! // Any client that is a service: hyper's, reqwest's, or a function.
//! let client = tower::service_fn(async |_: Request<String>| Ok::<_, std::io::Error>(Response::new("hello")));
//!
//! let executor = Executor::builder()
//!     .concurrency_limit(5)
//!     .requests(Rate::per_second(10))
//!     .tokens(Rate::per_minute(10_000))
//!     .build(client)?;
//! executor.start()?;
//!
//! let request = Request::post("http://localhost/v1/chat").body(String::from("{}"))?;
//! let call = executor.submit(Call::from(request).tokens(500)).await?;
//! println!("submitted {}", call.request_id());
//! assert_eq!(*call.await?.body(), "hello");
//!
//! let report = executor.stop(Shutdown::Graceful).await;
//! assert_eq!(report.cancelled, 0);
//! # Ok(())
//! # }
//! ```
//!
//! It is a Tower service itself, from `Request<B>` to `Response<R>`, for whoever takes one. There, dropping the
//! response future cancels the call.

mod builder;
mod call;
mod call_future;
mod closure;
mod config;
mod monitor;
mod service;
pub mod stack;

pub use builder::ExecutorBuilder;
pub use call::{Call, CallHandle, TrySubmitError};
pub use closure::{Closure, ClosureClient, IntoHeaderMap, IntoHttpResponse};
pub use config::Config;
pub use monitor::Monitor;
pub use service::ResponseFuture;

use crate::{
    clock,
    concurrency::Concurrency,
    deadline::{Deadline, PendingDemand, Timer},
    error::{Error, InvalidConfig, Refused},
    event::{self, Describe, EventHandle, Events, RequestDetails, Scope, Stage, Totals, Writer},
    queue::Queue,
    rate::{ApiTokens, Bursts, Cost, Limiter, RequestCost},
};
use call_future::{CallFuture, EarlyOutcome, OpenEarlyResponse};
use http::{Request, Response};
use std::{
    fmt,
    future::Future,
    mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{runtime::Handle, time};

/// Makes calls: queued, limited, paced and recorded. See the [module docs](self).
///
/// Its clones share everything. Dropping the last one aborts what is queued or in flight.
pub struct Executor<B, R> {
    shared: Arc<Shared<B, R>>,
    /// This clone's own handle, when it is used as a service: made ready by `poll_ready`, used by `call`.
    ready: Option<Queue<Request<B>, Response<R>>>,
}

/// Spawns the workers and returns the queue in front of them. Here the types of the client and of all layers end.
type Start<B, R> = Box<dyn Fn() -> Result<Queue<Request<B>, Response<R>>, InvalidConfig> + Send + Sync>;

struct Shared<B, R> {
    start: Start<B, R>,
    /// If responses are streamed.
    open_early_response: Option<OpenEarlyResponse<B, R>>,
    describe: Box<dyn Describe<Request<B>, Response<R>> + Send + Sync>,
    cost: Box<dyn RequestCost<Request<B>> + Send + Sync>,
    timeout: Option<Duration>,
    demand: Option<Arc<PendingDemand>>,
    monitor: Monitor,
    bursts: Arc<Bursts>,
    state: Mutex<State<B, R>>,
    starting: Mutex<()>,
}

/// What an executor is made of.
struct Parts<B, R> {
    start: Start<B, R>,
    open_early_response: Option<OpenEarlyResponse<B, R>>,
    describe: Box<dyn Describe<Request<B>, Response<R>> + Send + Sync>,
    cost: Box<dyn RequestCost<Request<B>> + Send + Sync>,
    timeout: Option<Duration>,
    limiter: Limiter,
    concurrency: Concurrency,
}

enum State<B, R> {
    Stopped,
    Running(Queue<Request<B>, Response<R>>),
    /// Takes no more calls; may still have some.
    Stopping(Queue<Request<B>, Response<R>>),
}

/// How to [stop](Executor::stop) an executor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shutdown {
    /// Take no more calls, and finish all that were accepted, however long it takes.
    Graceful,
    /// The same, but only for so long; then cancel what is left.
    Within(Duration),
    /// Cancel everything now.
    Immediate,
}

/// What ended *while* an executor was stopped, and how: the calls that were still there when the stop began. What ended
/// since the executor was built is told by [`Monitor::totals`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct StopReport {
    /// Calls that ended with a response.
    pub completed: u64,
    /// Calls that ended with an error.
    pub failed: u64,
    /// Calls that were cancelled.
    pub cancelled: u64,
    /// Calls that were not over yet. None, unless a call of the executor's own stopped it
    /// [gracefully](Shutdown::Graceful): it does not wait for itself, nor for the others.
    pub left: u64,
    /// How long it took.
    pub elapsed: Duration,
}

// === impl Executor ===

impl Executor<(), ()> {
    /// A builder with all defaults.
    pub fn builder() -> ExecutorBuilder {
        ExecutorBuilder::new()
    }
}

impl<B, R> Executor<B, R> {
    fn new(parts: Parts<B, R>) -> Self {
        let bursts = parts.limiter.bursts();
        let shared = Shared {
            start: parts.start,
            open_early_response: parts.open_early_response,
            describe: parts.describe,
            cost: parts.cost,
            // Who waits for what is only of interest where calls have deadlines.
            demand: parts.timeout.map(|_| Arc::default()),
            timeout: parts.timeout,
            monitor: Monitor::new(parts.limiter, parts.concurrency, Events::new()),
            bursts,
            state: Mutex::new(State::Stopped),
            starting: Mutex::new(()),
        };
        Self {
            shared: Arc::new(shared),
            ready: None,
        }
    }

    /// Starts to take calls. An executor that was stopped can be started again; its limits go on where they were.
    ///
    /// # Errors
    ///
    /// [`is_already_running`](Error::is_already_running) if it runs, or has not stopped yet. Also outside a Tokio
    /// runtime.
    pub fn start(&self) -> Result<(), Error> {
        Handle::try_current().map_err(|_| Error::no_runtime())?;
        // One start at a time; the client and the layers are cloned without the lock that everybody needs.
        let _starting = self.shared.starting.lock().unwrap_or_else(PoisonError::into_inner);
        match &*self.shared.lock() {
            State::Running(queue) | State::Stopping(queue) if !queue.is_ended() => {
                return Err(Error::already_running());
            }
            State::Running(_) | State::Stopping(_) | State::Stopped => {}
        }
        let queue = (self.shared.start)()?;
        self.shared.monitor.watch(queue.places());
        let before = mem::replace(&mut *self.shared.lock(), State::Running(queue));
        drop(before);
        Ok(())
    }

    /// Whether it takes calls.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.shared.queue().is_ok()
    }

    /// Submits a call, and waits until there is a place for it in the queue. Who waits is served in order.
    ///
    /// # Errors
    ///
    /// [`is_not_running`](Error::is_not_running) before `start` and after `stop`; [`is_closed`](Error::is_closed) if it
    /// is stopped before there is a place; [`is_cost_exceeds_burst`](Error::is_cost_exceeds_burst) if no limit could
    /// ever let the call pass; [`is_deadline_exceeded`](Error::is_deadline_exceeded) if it could not pass in time, or
    /// there was no place in time; an [`http::Error`] if the call's URL, method or a header is malformed.
    ///
    /// # Cancel safety
    ///
    /// Dropped while it waits, the call is not made; its event ends as CANCELLED.
    pub async fn submit(&self, call: impl Into<Call<B>>) -> Result<CallHandle<B, R>, Error> {
        let mut queue = self.shared.queue()?;
        let mut request = call.into().into_request().map_err(Error::new)?;
        let cost = self.shared.check(&request)?;
        self.shared.prepare(&mut request, cost)?;
        let (event, mut future) = self.shared.call(&mut queue, request);
        future.accepted().await?;
        Ok(CallHandle::new(event, future))
    }

    /// Submits a call if there is a place for it in the queue now.
    ///
    /// # Errors
    ///
    /// As [`submit`](Self::submit). If the queue is full or closed, the error is [`Refused`](TrySubmitError::Refused)
    /// and has the request in it. A call that is refused leaves no event, unless the executor is stopped at this very moment:
    /// then it ends as CANCELLED.
    #[allow(clippy::result_large_err, reason = "it hands the request back")]
    pub fn try_submit(&self, call: impl Into<Call<B>>) -> Result<CallHandle<B, R>, TrySubmitError<B>> {
        let mut queue = self.shared.queue()?;
        let mut request = call.into().into_request().map_err(Error::new)?;
        let cost = self.shared.check(&request)?;
        let place = match queue.try_place() {
            Ok(Some(place)) => place,
            Ok(None) => return Err(TrySubmitError::Refused(Refused::full(request))),
            Err(_) => return Err(TrySubmitError::Refused(Refused::closed(request))),
        };
        // Only now: a request that is handed back is as it came.
        self.shared.prepare(&mut request, cost)?;
        let _cached_now = clock::cache();
        let (event, scope) = self.shared.open(&request);
        let early = self.shared.expect(&mut request, &event);
        let call = queue.call_at(place, request, scope).map_err(TrySubmitError::Refused)?;
        Ok(CallHandle::new(event, CallFuture::new(call, early)))
    }

    /// Stops to take calls, deals with those that are there, and waits until the last one is over.
    ///
    /// Whoever waits in `submit` for a place is refused. Stopping an executor that does not run does nothing. A second,
    /// harder stop while a first one waits takes effect at once.
    ///
    /// A call of this executor can stop it, too. It would wait for itself, so a graceful stop does not wait then: the
    /// report says how many calls are [left](StopReport::left), and those are finished. Any other stop cancels the call
    /// that waits for it. (The call is known by its [event](crate::event::current): a task that it spawns, and waits
    /// for, has to carry that over, or it waits for ever.)
    ///
    /// # Panics
    ///
    /// [`Shutdown::Within`], outside a Tokio runtime with its timer enabled. Nothing is stopped then.
    ///
    /// # Cancel safety
    ///
    /// Dropped, the stop goes on without anybody waiting for it, except that [`Shutdown::Within`] no longer cancels
    /// what is left.
    pub async fn stop(&self, how: Shutdown) -> StopReport {
        if let Shutdown::Within(_) = how {
            // Panics here, where nothing has been changed, if there is no timer.
            drop(time::sleep(Duration::ZERO));
        }
        let queue = {
            let mut state = self.shared.lock();
            match mem::replace(&mut *state, State::Stopped) {
                State::Stopped => return StopReport::default(),
                State::Running(queue) | State::Stopping(queue) => {
                    *state = State::Stopping(queue.clone());
                    queue
                }
            }
        };
        let begun = time::Instant::now();
        let before = self.shared.monitor.totals();
        queue.close();
        match how {
            Shutdown::Graceful if self.shared.is_calling() => {
                let left = (queue.depth() + queue.in_flight()) as u64;
                return self.shared.report(before, begun, left);
            }
            Shutdown::Graceful => {}
            Shutdown::Within(limit) => {
                if time::timeout(limit, queue.ended()).await.is_err() {
                    queue.abort();
                }
            }
            Shutdown::Immediate => queue.abort(),
        }
        queue.ended().await;
        {
            let mut state = self.shared.lock();
            if matches!(&*state, State::Stopping(stopping) if stopping.is_same(&queue)) {
                *state = State::Stopped;
            }
        }
        self.shared.report(before, begun, 0)
    }

    /// Starts, runs `work` with this executor, and stops gracefully.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use tower_outbound::{Call, Executor};
    /// # let executor = Executor::builder().build_for_closures::<String>()?;
    /// let event = executor
    ///     .run(async |executor| {
    ///         let hello = || async { Ok::<_, std::io::Error>((200, String::from("hello"))) };
    ///         executor.submit(Call::new(hello)).await.map(|call| call.event().clone())
    ///     })
    ///     .await??;
    /// assert_eq!(event.status().to_string(), "COMPLETED");
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// As [`start`](Self::start).
    ///
    /// # Cancel safety
    ///
    /// Dropped, or if `work` panics, everything that was submitted is cancelled.
    pub async fn run<F, Fut>(&self, work: F) -> Result<Fut::Output, Error>
    where
        F: FnOnce(Self) -> Fut,
        Fut: Future,
    {
        self.start()?;
        let abort = AbortOnDrop(Some(self.shared.clone()));
        let result = work(self.clone()).await;
        self.stop(Shutdown::Graceful).await;
        abort.disarm();
        Ok(result)
    }

    /// A handle to watch it by: queue depth, calls in flight, limits, totals by outcome, all events.
    #[must_use]
    pub fn monitor(&self) -> Monitor {
        self.shared.monitor.clone()
    }
}

impl<B, R> Clone for Executor<B, R> {
    fn clone(&self) -> Self {
        // A place in line belongs to one handle alone.
        Self {
            shared: self.shared.clone(),
            ready: None,
        }
    }
}

impl<B, R> fmt::Debug for Executor<B, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match &*self.shared.lock() {
            State::Stopped => "stopped",
            State::Running(_) => "running",
            State::Stopping(_) => "stopping",
        };
        f.debug_struct("Executor")
            .field("state", &state)
            .field("monitor", &self.shared.monitor)
            .finish()
    }
}

// === impl Shared ===

impl<B, R> Shared<B, R> {
    fn lock(&self) -> MutexGuard<'_, State<B, R>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn queue(&self) -> Result<Queue<Request<B>, Response<R>>, Error> {
        match &*self.lock() {
            State::Running(queue) if !queue.is_closed() => Ok(queue.clone()),
            State::Running(_) | State::Stopping(_) | State::Stopped => Err(Error::not_running()),
        }
    }

    /// Refuses at once what could never be made.
    fn check(&self, request: &Request<B>) -> Result<Cost, Error> {
        let cost = self.cost.cost(request);
        self.bursts.check(cost)?;
        Ok(cost)
    }

    /// Refuses at once what could not be made in time, and writes into the request what is known of it.
    fn prepare(&self, request: &mut Request<B>, cost: Cost) -> Result<(), Error> {
        if cost.tokens > 0 && request.extensions().get::<ApiTokens>().is_none() {
            // So that the event knows it, and an estimate is made once.
            request.extensions_mut().insert(ApiTokens(cost.tokens));
        }
        let deadline = Deadline::of(request).or_else(|| self.timeout.map(Deadline::after));
        if let Some(deadline) = deadline {
            let demand = self.demand.as_ref().map_or((0, 0), |demand| demand.cost());
            deadline.allows(self.monitor.limiter().wait(cost, demand))?;
            request.extensions_mut().insert(deadline);
        }
        if let Some(demand) = &self.demand {
            request.extensions_mut().insert(demand.add(cost));
        }
        Ok(())
    }

    /// Opens the event and makes the call, at one moment.
    #[inline]
    fn call(
        &self,
        queue: &mut Queue<Request<B>, Response<R>>,
        mut request: Request<B>,
    ) -> (EventHandle, CallFuture<B, R>) {
        let _cached_now = clock::cache();
        let (event, scope) = self.open(&request);
        let early = self.expect(&mut request, &event);
        let call = queue.call_in(scope, &mut Some(request));
        (event, CallFuture::new(call, early))
    }

    /// Mostly nothing.
    #[inline]
    fn expect(&self, request: &mut Request<B>, event: &EventHandle) -> Option<Box<EarlyOutcome<R>>> {
        let deadline = Deadline::of(request);
        if deadline.is_none() && self.open_early_response.is_none() {
            return None;
        }
        Some(Box::new(EarlyOutcome {
            response: self
                .open_early_response
                .map(|open_early_response| open_early_response(request)),
            timer: deadline.map(|deadline| (Timer::new(deadline), event.clone())),
        }))
    }

    fn open(&self, request: &Request<B>) -> (EventHandle, Scope) {
        let describe = |details: &mut RequestDetails| self.describe.request(request, details);
        let (writer, span) = Writer::open(describe, Some(self.monitor.events().clone()), Stage::Queued);
        (writer.handle(), Scope::capture_with(writer, span))
    }

    /// Whether a call of this executor is being polled right now, and this is done by it.
    fn is_calling(&self) -> bool {
        event::current().is_some_and(|event| event.reports_to(self.monitor.events()))
    }

    fn report(&self, before: Totals, begun: time::Instant, left: u64) -> StopReport {
        let after = self.monitor.totals();
        StopReport {
            completed: after.completed - before.completed,
            failed: after.failed - before.failed,
            cancelled: after.cancelled - before.cancelled,
            left,
            elapsed: begun.elapsed(),
        }
    }

    fn abort(&self) {
        let queue = match &*self.lock() {
            State::Running(queue) | State::Stopping(queue) => queue.clone(),
            State::Stopped => return,
        };
        // Without the lock: requests are dropped and callers are woken.
        queue.abort();
    }
}

impl<B, R> Drop for Shared<B, R> {
    fn drop(&mut self) {
        self.abort();
    }
}

/// Aborts an executor whose work is dropped, or panics.
struct AbortOnDrop<B, R>(Option<Arc<Shared<B, R>>>);

impl<B, R> AbortOnDrop<B, R> {
    fn disarm(mut self) {
        self.0 = None;
    }
}

impl<B, R> Drop for AbortOnDrop<B, R> {
    fn drop(&mut self) {
        if let Some(shared) = &self.0 {
            shared.abort();
        }
    }
}
