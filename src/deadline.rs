//! Deadlines that cover a whole call: its time in the queue, its wait for the rate and concurrency limits, and the http
//! request itself.
//!
//! A call behind a rate limit may have to wait for minutes, and its caller is often not interested in a response that
//! late. A timeout around the client does not help, since it begins when the wait for the limits is over.
//!
//! A [`Deadline`] is an instant that travels with the request. [`DeadlineLayer`] compares the deadline with the wait
//! that the rate limiter computes. A call that could not be admitted in time is refused at once, with
//! [`DeadlineExceeded`], and takes no permit and uses none of the rate limits. Any other call is dropped at its
//! deadline, whether it waits or is in flight. The [`Executor`](crate::Executor) also checks the deadline when a call
//! is submitted, and enforces it in the queue.
//!
//! # Examples
//!
//! ```
//! # #[tokio::main(flavor = "current_thread", start_paused = true)]
//! # async fn main() {
//! use std::{convert::Infallible, time::Duration};
//! use tower::{Layer, ServiceExt, service_fn};
//! use tower_outbound::{DeadlineLayer, error::DeadlineExceeded};
//!
//! let slow = service_fn(async |_: http::Request<()>| {
//!     tokio::time::sleep(Duration::from_secs(60)).await;
//!     Ok::<_, Infallible>(http::Response::new(()))
//! });
//! let service = DeadlineLayer::new().timeout(Duration::from_secs(5)).layer(slow);
//!
//! let error = service.oneshot(http::Request::new(())).await.unwrap_err();
//! assert!(error.is::<DeadlineExceeded>());
//! # }
//! ```

use crate::{
    error::{BoxError, DeadlineExceeded},
    rate::{self, ByExtension, Cost, Demand, RateLimiter, RequestCost},
};
use http::Request;
use pin_project_lite::pin_project;
use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};
use tokio::time::{Instant, Sleep, sleep_until};
use tower_layer::Layer;
use tower_service::Service;

/// The instant by which a call has to end. It is an extension of the call's http request.
///
/// ```
/// use std::time::Duration;
/// use tower_outbound::Deadline;
///
/// let request = http::Request::get("http://localhost/").extension(Deadline::after(Duration::from_secs(30))).body(())?;
/// # Ok::<_, http::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline(Instant);

/// A layer that ends calls at their [`Deadline`], and refuses calls that could not be admitted before it. See the
/// [module docs](self).
///
/// Place this layer around the limits and below the [queue](crate::queue), which polls the calls: then a deadline holds
/// whether or not the caller polls its response future. In the queue, a deadline is kept by
/// [`QueueLayer::deadline`](crate::QueueLayer::deadline).
#[derive(Clone, Debug)]
pub struct DeadlineLayer<K = ByExtension> {
    limits: Option<(RateLimiter, K)>,
    timeout: Option<Duration>,
    /// Whether calls are only refused, because the queue above ends them at their deadline.
    only_refuses: bool,
}

/// A service whose calls end at their [`Deadline`]. See the [module docs](self).
#[derive(Clone, Debug)]
pub struct DeadlineService<S, K = ByExtension> {
    inner: S,
    layer: DeadlineLayer<K>,
}

/// The deadline that the [`timeout`](DeadlineLayer::timeout) of a layer gives a call: an extension of the call's http
/// request, for a retry below. It is not a [`Deadline`], because a second [`DeadlineLayer`] below, for example one for
/// each attempt, would then ignore its own timeout.
#[cfg(feature = "http")]
#[derive(Clone, Copy)]
struct TimeoutDeadline(Deadline);

pin_project! {
    /// The response future of a [`DeadlineService`].
    ///
    /// # Errors
    ///
    /// [`DeadlineExceeded`], at the first poll if the call was refused, or at the deadline if the call has not ended by
    /// then. Otherwise the inner service's error.
    ///
    /// # Panics
    ///
    /// The future of a call with a deadline panics if it has to wait outside a Tokio runtime with its timer enabled.
    /// Every future may panic when polled after it has completed.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future drops the inner call.
    #[must_use = "futures do nothing unless polled"]
    pub struct ResponseFuture<F> {
        #[pin]
        state: State<F>,
        timer: Option<Box<DeadlineTimer>>,
    }
}

pin_project! {
    #[project = StateProj]
    enum State<F> {
        /// The call could not be admitted before its deadline. The inner service was not called.
        Refused { error: Option<DeadlineExceeded> },
        /// The inner service runs the call.
        Calling { #[pin] future: F },
    }
}

/// A timer that expires at a deadline. Its Tokio timer is created at the first poll, so a call that completes without
/// waiting does not pay for one.
struct DeadlineTimer {
    deadline: Deadline,
    sleep: Option<Pin<Box<Sleep>>>,
}

/// The sum of the costs of all calls that were submitted to the executor and have not reached its limits.
///
/// The rate limiter does not count these calls, but a new call has to wait behind them. The
/// numbers are read for a prediction only, so they need no ordering with other memory.
#[derive(Debug, Default)]
pub(crate) struct PendingDemand {
    requests: AtomicU64,
    tokens: AtomicU64,
    input_tokens: AtomicU64,
    output_tokens: AtomicU64,
    /// The sum over the calls whose costs have budgets that are not built in.
    named: Mutex<Demand>,
}

/// Counts the cost of one call in the [`PendingDemand`] until this guard is dropped, which happens when the call has
/// left the queue and its future was polled once: from then on, the limiter counts it.
pub(crate) struct PendingCost {
    demand: Arc<PendingDemand>,
    requests: u64,
    tokens: u64,
    input_tokens: u64,
    output_tokens: u64,
    /// The rest of the cost, if there is any. Most costs have built-in budgets only, and a queued call should take little
    /// memory.
    named: Option<Box<Cost>>,
}

// === impl Deadline ===

impl Deadline {
    /// Creates a deadline from the instant by which a call has to end.
    #[must_use]
    pub const fn at(deadline: Instant) -> Self {
        Self(deadline)
    }

    /// Makes a deadline that is `timeout` from now, or thirty years from now if an [`Instant`] cannot represent that.
    #[must_use]
    pub fn after(timeout: Duration) -> Self {
        let now = Instant::now();
        let far = || now + Duration::from_secs(30 * 365 * 24 * 60 * 60);
        Self(now.checked_add(timeout).unwrap_or_else(far))
    }

    /// Returns the instant by which the call has to end.
    #[must_use]
    pub const fn instant(self) -> Instant {
        self.0
    }

    /// Returns the deadline in the extensions of an http request.
    #[inline]
    #[must_use]
    pub fn of<B>(request: &Request<B>) -> Option<Self> {
        let extensions = request.extensions();
        if extensions.is_empty() {
            return None;
        }
        extensions.get().copied()
    }

    /// Returns the time until the deadline that ends a call: the [`Deadline`] of its request, or else the one that a
    /// layer further out gives the call. `None` if the call has none.
    #[cfg(feature = "http")]
    pub(crate) fn time_left<B>(request: &Request<B>) -> Option<Duration> {
        let by_timeout = || request.extensions().get::<TimeoutDeadline>().map(|deadline| deadline.0);
        let deadline = Self::of(request).or_else(by_timeout)?;
        Some(deadline.0.saturating_duration_since(Instant::now()))
    }

    /// Returns an error if a call that has to wait for `wait` would not be admitted before the deadline.
    pub(crate) fn allows(self, wait: Duration) -> Result<(), DeadlineExceeded> {
        let now = Instant::now();
        let left = self.0.saturating_duration_since(now);
        // A call that is admitted at the deadline itself has no time left, so it is refused.
        if wait >= left {
            return Err(DeadlineExceeded::new(wait, left));
        }
        Ok(())
    }
}

// === impl DeadlineLayer ===

impl DeadlineLayer {
    /// Creates a layer that ends each call at the [`Deadline`] in the extensions of its request. A call without that
    /// extension has no deadline, unless [`timeout`](DeadlineLayer::timeout) gives it one.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            limits: None,
            timeout: None,
            only_refuses: false,
        }
    }
}

impl<K> DeadlineLayer<K> {
    /// Gives each call without a [`Deadline`] one that is `timeout` after the service is called. Default: such calls
    /// have no deadline.
    #[must_use]
    pub const fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// Refuses calls that `limiter` could not admit before their deadline. `cost` computes what the limiter charges a
    /// call. Default: a call is refused only if its deadline has passed already when the service is called.
    #[must_use]
    pub fn limiter<N>(self, limiter: RateLimiter, cost: N) -> DeadlineLayer<N> {
        DeadlineLayer {
            limits: Some((limiter, cost)),
            timeout: self.timeout,
            only_refuses: self.only_refuses,
        }
    }

    /// Only refuses calls, and does not end them at their deadline: for a stack whose queue does so.
    #[must_use]
    pub(crate) const fn only_refuse(mut self) -> Self {
        self.only_refuses = true;
        self
    }
}

impl Default for DeadlineLayer {
    fn default() -> Self {
        Self::new()
    }
}

impl<S, K: Clone> Layer<S> for DeadlineLayer<K> {
    type Service = DeadlineService<S, K>;

    fn layer(&self, inner: S) -> Self::Service {
        DeadlineService {
            inner,
            layer: self.clone(),
        }
    }
}

// === impl DeadlineService ===

impl<S, K, B> Service<Request<B>> for DeadlineService<S, K>
where
    S: Service<Request<B>>,
    S::Error: Into<BoxError>,
    K: RequestCost<Request<B>>,
{
    type Response = S::Response;
    type Error = BoxError;
    type Future = ResponseFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, #[cfg_attr(not(feature = "http"), allow(unused_mut))] mut req: Request<B>) -> Self::Future {
        let DeadlineLayer {
            limits,
            timeout,
            only_refuses,
        } = &self.layer;
        let in_request = Deadline::of(&req);
        let deadline = in_request.or_else(|| {
            let deadline = Deadline::after((*timeout)?);
            #[cfg(feature = "http")]
            req.extensions_mut().insert(TimeoutDeadline(deadline));
            Some(deadline)
        });
        // A call that a schedule has chosen is charged already, and does not wait.
        let wait = |(limiter, cost): &(RateLimiter, K)| {
            if rate::is_charged(limiter) {
                return Duration::ZERO;
            }
            limiter.wait(&cost.cost(&req), &Demand::default())
        };
        let allowed = deadline.map_or(Ok(()), |deadline| {
            deadline.allows(limits.as_ref().map_or(Duration::ZERO, wait))
        });
        ResponseFuture {
            state: match allowed {
                Ok(()) => State::Calling {
                    future: self.inner.call(req),
                },
                Err(error) => State::Refused { error: Some(error) },
            },
            timer: deadline
                .filter(|_| !only_refuses)
                .map(|deadline| Box::new(DeadlineTimer::new(deadline))),
        }
    }
}

// === impl ResponseFuture ===

impl<F, T, E> Future for ResponseFuture<F>
where
    F: Future<Output = Result<T, E>>,
    E: Into<BoxError>,
{
    type Output = Result<T, BoxError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        match this.state.project() {
            StateProj::Refused { error } => {
                let error = error.take().expect("`ResponseFuture` polled after completion");
                Poll::Ready(Err(error.into()))
            }
            StateProj::Calling { future } => match (future.poll(cx), this.timer) {
                (Poll::Pending, Some(timer)) => timer.poll(cx).map(|error| Err(error.into())),
                (polled, _) => polled.map_err(Into::into),
            },
        }
    }
}

impl<F> fmt::Debug for ResponseFuture<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("deadline::ResponseFuture").finish_non_exhaustive()
    }
}

// === impl DeadlineTimer ===

impl DeadlineTimer {
    const fn new(deadline: Deadline) -> Self {
        Self { deadline, sleep: None }
    }

    /// Ready when the deadline has passed, with the error that the call returns.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<DeadlineExceeded> {
        let sleep = self.sleep.get_or_insert_with(|| Box::pin(sleep_until(self.deadline.0)));
        sleep
            .as_mut()
            .poll(cx)
            .map(|()| DeadlineExceeded::new(Duration::ZERO, Duration::ZERO))
    }
}

// === impl PendingDemand ===

impl PendingDemand {
    /// Adds the cost of a call to the pending demand until the returned guard is dropped.
    pub(crate) fn add(self: &Arc<Self>, cost: &Cost) -> PendingCost {
        self.requests.fetch_add(cost.requests, Ordering::Relaxed);
        for (sum, amount) in self.tokens_by_kind().into_iter().zip(tokens_by_kind(cost)) {
            if amount > 0 {
                sum.fetch_add(amount, Ordering::Relaxed);
            }
        }
        PendingCost {
            demand: self.clone(),
            requests: cost.requests,
            tokens: cost.tokens,
            input_tokens: cost.input_tokens,
            output_tokens: cost.output_tokens,
            named: cost.has_named().then(|| self.add_named(cost)),
        }
    }

    /// Adds what the cost has of budgets that are not built in, and returns it.
    #[cold]
    fn add_named(&self, cost: &Cost) -> Box<Cost> {
        let named = Box::new(Cost {
            requests: 0,
            tokens: 0,
            input_tokens: 0,
            output_tokens: 0,
            ..*cost
        });
        *self.named() += &named;
        named
    }

    /// Returns the summed costs of the calls that have not left the queue.
    pub(crate) fn sum(&self) -> Demand {
        let mut sum = self.named().clone();
        let [tokens, input_tokens, output_tokens] = self.tokens_by_kind().map(|sum| sum.load(Ordering::Relaxed));
        sum += &Cost {
            requests: self.requests.load(Ordering::Relaxed),
            tokens,
            input_tokens,
            output_tokens,
            ..Cost::none()
        };
        sum
    }

    const fn tokens_by_kind(&self) -> [&AtomicU64; 3] {
        [&self.tokens, &self.input_tokens, &self.output_tokens]
    }

    #[cold]
    fn remove_named(&self, named: &Cost) {
        *self.named() -= named;
    }

    fn named(&self) -> MutexGuard<'_, Demand> {
        self.named.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns the amounts in the order of [`PendingDemand::tokens_by_kind`].
const fn tokens_by_kind(cost: &Cost) -> [u64; 3] {
    [cost.tokens, cost.input_tokens, cost.output_tokens]
}

impl Drop for PendingCost {
    fn drop(&mut self) {
        let demand = &self.demand;
        demand.requests.fetch_sub(self.requests, Ordering::Relaxed);
        let own = [self.tokens, self.input_tokens, self.output_tokens];
        for (sum, amount) in demand.tokens_by_kind().into_iter().zip(own) {
            if amount > 0 {
                sum.fetch_sub(amount, Ordering::Relaxed);
            }
        }
        if let Some(named) = &self.named {
            demand.remove_named(named);
        }
    }
}
