//! [`Executor`]: all layers of this crate behind one handle, with `start`, `submit` and `stop`.
//!
//! An [`Executor`] makes http calls with a client, in the order in which they were submitted, under a concurrency limit
//! and under rates of requests and tokens. It keeps a record of each call, the call's [event]. [`stack`] shows the
//! executor's layers and their order.
//!
//! # Examples
//!
//! ```
//! # #[tokio::main(flavor = "current_thread", start_paused = true)]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use http::{Request, Response};
//! use tower_outbound::{Call, Executor, Rate, executor::Shutdown};
//!
//! // A client is any service from http requests to http responses: hyper's, reqwest's, or a function.
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
//! # Calls that make calls
//!
//! A call, for example a closure, may submit further calls to its own executor. If it awaits them, it keeps its permit
//! of the concurrency limit meanwhile, so that fewer calls run than the limit allows. If all permits are held by calls
//! that await a call without a permit, none of them could ever go on: then the last of these calls gets an error with
//! [`is_deadlock`](crate::Error::is_deadlock) from the handle or the `submit` that it awaits. This is found only if the
//! call polls the handle itself, or in a task that carries its event ([`instrument`](crate::EventHandle::instrument)),
//! and if no other executor shares the concurrency limit. A call that needs further calls had better return first and
//! let its caller submit them, or detach them by dropping their handles.
//!
//! An executor is also a Tower service from `Request<B>` to `Response<R>`. Dropping that service's response future
//! cancels the call, while dropping a [`CallHandle`] lets the call run on.
//!
//! [event]: crate::event

mod builder;
mod call;
mod call_future;
mod closure;
mod config;
mod inner;
mod monitor;
mod nested;
mod rate_settings;
mod service;
mod shutdown;
pub mod stack;

pub use builder::ExecutorBuilder;
pub use call::{Call, CallHandle, TrySubmitError};
pub use closure::{Closure, ClosureClient, IntoHeaderMap, IntoHttpResponse};
pub use config::{BudgetRate, Config};
pub use monitor::Monitor;
pub use service::ResponseFuture;
pub use shutdown::{Shutdown, StopReport};

use crate::{error::Error, queue::Queue};
use http::{Request, Response};
use inner::{ExecutorInner, ExecutorParts, RunState};
use std::{fmt, sync::Arc};
use tokio::{runtime::Handle, task::coop::consume_budget};

/// Makes http calls that are queued, limited, paced and recorded. See the [module docs](self).
///
/// Clones share one queue, its calls and its limits. When the last clone is dropped, all queued and running calls are
/// cancelled.
pub struct Executor<B, R> {
    inner: Arc<ExecutorInner<B, R>>,
    /// The queue handle that `poll_ready` makes ready and `call` uses when this clone of the executor is used as a
    /// Tower service. `None` until this clone is first used as a service.
    queue: Option<Queue<Request<B>, Response<R>>>,
}

// === impl Executor ===

impl Executor<(), ()> {
    /// Returns a builder of executors whose settings all have their default values.
    pub fn builder() -> ExecutorBuilder {
        ExecutorBuilder::new()
    }
}

impl<B, R> Executor<B, R> {
    fn new(parts: ExecutorParts<B, R>) -> Self {
        Self {
            inner: Arc::new(ExecutorInner::new(parts)),
            queue: None,
        }
    }

    /// Makes the queue and the stack below it, and begins to accept calls, which run on the current runtime.
    ///
    /// An executor that was stopped can be started again. Its rate limits are not reset: what calls have used before
    /// the stop still counts.
    ///
    /// # Errors
    ///
    /// Fails with [`is_already_running`](Error::is_already_running) if the executor is running, or if an earlier `stop`
    /// has not finished. Outside a Tokio runtime, `start` fails with an error whose message names the missing runtime.
    pub fn start(&self) -> Result<(), Error> {
        Handle::try_current().map_err(|_| Error::no_runtime())?;
        self.inner.start()
    }

    /// Whether the executor accepts calls.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.inner.queue().is_ok()
    }

    /// Submits a call, and waits until there is a place for it in the queue. If the queue is full, callers get places
    /// in the order in which they began to wait, or as the [schedule](crate::schedule) says.
    ///
    /// # Errors
    ///
    /// - [`is_not_running`](Error::is_not_running) if the executor was not started, or was stopped.
    /// - [`is_closed`](Error::is_closed) if the executor is stopped while the call waits for a place in the queue.
    /// - [`is_cost_exceeds_burst`](Error::is_cost_exceeds_burst) if the call costs more than the burst of a rate, so
    ///   that it could never be admitted.
    /// - [`is_deadline_exceeded`](Error::is_deadline_exceeded) if the wait for the limits would make the call miss its
    ///   deadline, or if the deadline passes before there is a place in the queue.
    /// - An error that contains an [`http::Error`] if the call's URL, method or a header is malformed.
    ///
    /// # Cancel safety
    ///
    /// If the future of `submit` is dropped while the call waits for a place in the queue, the call is not made, and
    /// the call's event ends with the status CANCELLED.
    pub async fn submit(&self, call: impl Into<Call<B>>) -> Result<CallHandle<B, R>, Error> {
        // A loop of submits that need not wait yields now and then, as one of Tokio's own operations would.
        consume_budget().await;
        let mut queue = self.inner.queue().map_err(|error| self.inner.refused(error))?;
        let request = call.into().into_request();
        let request = request.map_err(|error| self.inner.refused(Error::new(error)))?;
        let mut future = self.inner.submit(&mut queue, request)?;
        future.accepted().await?;
        Ok(CallHandle::new(future))
    }

    /// Submits a call if the queue has a free place for it now; never waits for a place.
    ///
    /// # Errors
    ///
    /// Fails with the errors of [`submit`](Self::submit). If the queue is full or closed, the error is
    /// [`Refused`](TrySubmitError::Refused), which holds the request. A refused call leaves no event, except if the
    /// executor is stopped while `try_submit` runs: then the call's event ends with the status CANCELLED.
    #[allow(clippy::result_large_err, reason = "it hands the request back")]
    pub fn try_submit(&self, call: impl Into<Call<B>>) -> Result<CallHandle<B, R>, TrySubmitError<B>> {
        let mut queue = self.inner.queue().map_err(|error| self.inner.refused(error))?;
        let request = call.into().into_request();
        let request = request.map_err(|error| self.inner.refused(Error::new(error)))?;
        let future = self.inner.try_submit(&mut queue, request)?;
        Ok(CallHandle::new(future))
    }

    /// Returns a handle that shows the depth of the queue, the calls in flight, the limits, the totals by outcome and
    /// all events.
    #[must_use]
    pub fn monitor(&self) -> Monitor {
        self.inner.monitor().clone()
    }
}

impl<B, R> Clone for Executor<B, R> {
    fn clone(&self) -> Self {
        Self {
            inner: self.inner.clone(),
            // A queue handle waits for a place on behalf of one clone only, so it is not copied: the new clone gets a
            // queue handle when it is first used as a service.
            queue: None,
        }
    }
}

impl<B, R> fmt::Debug for Executor<B, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match &*self.inner.state() {
            RunState::Stopped => "stopped",
            RunState::Running(_) => "running",
            RunState::Stopping(_) => "stopping",
        };
        f.debug_struct("Executor")
            .field("state", &state)
            .field("monitor", self.inner.monitor())
            .finish()
    }
}
