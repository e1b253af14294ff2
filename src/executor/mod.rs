//! All layers behind one handle: start, submit, stop.
//!
//! An [`Executor`] makes http calls with a client: in order, under a concurrency limit and under rates of requests and
//! tokens. It keeps an [event] for each call. Its layers and their order are shown in [`stack`].
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
//! An executor is also a Tower service from `Request<B>` to `Response<R>`. Used as such, dropping the response future
//! cancels the call, while dropping a [`CallHandle`] lets it run on.
//!
//! [event]: crate::event

mod builder;
mod call;
mod call_future;
mod closure;
mod config;
mod inner;
mod monitor;
mod service;
mod shutdown;
pub mod stack;

pub use builder::ExecutorBuilder;
pub use call::{Call, CallHandle, TrySubmitError};
pub use closure::{Closure, ClosureClient, IntoHeaderMap, IntoHttpResponse};
pub use config::Config;
pub use monitor::Monitor;
pub use service::ResponseFuture;
pub use shutdown::{Shutdown, StopReport};

use crate::{
    clock,
    error::{Error, Refused},
    queue::Queue,
};
use call_future::CallFuture;
use http::{Request, Response};
use inner::{Inner, Parts, RunState};
use std::{fmt, sync::Arc};
use tokio::runtime::Handle;

/// Makes http calls that are queued, limited, paced and recorded. See the [module docs](self).
///
/// Clones share everything. When the last one is dropped, all queued and running calls are cancelled.
pub struct Executor<B, R> {
    inner: Arc<Inner<B, R>>,
    /// The queue handle of this clone, used as a service only: `poll_ready` makes it ready and `call` uses it.
    queue: Option<Queue<Request<B>, Response<R>>>,
}

// === impl Executor ===

impl Executor<(), ()> {
    /// Returns a builder with all defaults.
    pub fn builder() -> ExecutorBuilder {
        ExecutorBuilder::new()
    }
}

impl<B, R> Executor<B, R> {
    fn new(parts: Parts<B, R>) -> Self {
        Self {
            inner: Arc::new(Inner::new(parts)),
            queue: None,
        }
    }

    /// Spawns the workers and begins to accept calls.
    ///
    /// An executor that was stopped can be started again; its limits continue from where they were.
    ///
    /// # Errors
    ///
    /// [`is_already_running`](Error::is_already_running) if it is running, or a stop of it has not finished. Another
    /// error outside a Tokio runtime.
    pub fn start(&self) -> Result<(), Error> {
        Handle::try_current().map_err(|_| Error::no_runtime())?;
        self.inner.start()
    }

    /// Whether it accepts calls.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.inner.queue().is_ok()
    }

    /// Submits a call, and waits until there is a place for it in the queue. Waiting callers get places in order.
    ///
    /// # Errors
    ///
    /// - [`is_not_running`](Error::is_not_running) before `start` and after `stop`.
    /// - [`is_closed`](Error::is_closed) if the executor is stopped while the call waits for a place.
    /// - [`is_cost_exceeds_burst`](Error::is_cost_exceeds_burst) if the call costs more than a limit can ever admit.
    /// - [`is_deadline_exceeded`](Error::is_deadline_exceeded) if its limits would make it miss its deadline, or the
    ///   deadline passes before there is a place.
    /// - An [`http::Error`] if the call's URL, method or a header is malformed.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped while it waits, the call is not made, and its event ends as CANCELLED.
    pub async fn submit(&self, call: impl Into<Call<B>>) -> Result<CallHandle<B, R>, Error> {
        let mut queue = self.inner.queue()?;
        let mut request = call.into().into_request().map_err(Error::new)?;
        let cost = self.inner.check(&request)?;
        self.inner.prepare(&mut request, cost)?;
        let (event, mut future) = self.inner.enqueue(&mut queue, request);
        future.accepted().await?;
        Ok(CallHandle::new(event, future))
    }

    /// Submits a call if there is a place for it in the queue now.
    ///
    /// # Errors
    ///
    /// As [`submit`](Self::submit). If the queue is full or closed, the error is [`Refused`](TrySubmitError::Refused)
    /// and returns the request. A refused call leaves no event, except when the executor is stopped during
    /// `try_submit`: that event ends as CANCELLED.
    #[allow(clippy::result_large_err, reason = "it hands the request back")]
    pub fn try_submit(&self, call: impl Into<Call<B>>) -> Result<CallHandle<B, R>, TrySubmitError<B>> {
        let mut queue = self.inner.queue()?;
        let mut request = call.into().into_request().map_err(Error::new)?;
        let cost = self.inner.check(&request)?;
        let place = match queue.try_place() {
            Ok(Some(place)) => place,
            Ok(None) => return Err(TrySubmitError::Refused(Refused::full(request))),
            Err(_) => return Err(TrySubmitError::Refused(Refused::closed(request))),
        };
        // After the place was taken, so that a refused request is returned unchanged.
        self.inner.prepare(&mut request, cost)?;
        let _cached_now = clock::cache();
        let (event, scope) = self.inner.open_event(&request);
        let early = self.inner.early_outcome(&mut request, &event);
        let queued = queue.call_at(place, request, scope).map_err(TrySubmitError::Refused)?;
        Ok(CallHandle::new(event, CallFuture::new(queued, early)))
    }

    /// Returns a handle that shows queue depth, calls in flight, limits, totals by outcome and all events.
    #[must_use]
    pub fn monitor(&self) -> Monitor {
        self.inner.monitor().clone()
    }
}

impl<B, R> Clone for Executor<B, R> {
    fn clone(&self) -> Self {
        Self {
            inner: self.inner.clone(),
            // A queue handle may be waiting for a place, or have one: it belongs to one clone.
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
