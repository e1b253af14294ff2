//! DeadlineService: over the queue, the limits and the call.
//!
//! A call that cannot make it is refused at once, with the wait that was computed, and takes nothing. Others are ended
//! when their time is up, wherever they are.

use crate::{
    error::{BoxError, DeadlineExceeded},
    rate::{ByExtension, Cost, Limiter, RequestCost},
};
use http::Request;
use pin_project_lite::pin_project;
use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};
use tokio::time::{Instant, Sleep, sleep_until};
use tower_layer::Layer;
use tower_service::Service;

/// When an http request has to be over: an extension of the request.
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

/// Ends calls at their [`Deadline`], and refuses those that cannot make it. See the [module docs](self).
///
/// It stands around the limits, below the queue: what it ends is ended whether or not somebody waits.
#[derive(Clone, Debug)]
pub struct DeadlineLayer<K = ByExtension> {
    limits: Option<(Limiter, K)>,
    timeout: Option<Duration>,
}

/// A service whose calls have deadlines. See the [module docs](self).
#[derive(Clone, Debug)]
pub struct DeadlineService<S, K = ByExtension> {
    inner: S,
    layer: DeadlineLayer<K>,
}

pin_project! {
    /// A call that is ended at its deadline.
    ///
    /// # Cancel safety
    ///
    /// Dropping it drops the call.
    #[must_use = "futures do nothing unless polled"]
    pub struct ResponseFuture<F> {
        #[pin]
        state: State<F>,
        timer: Option<Box<Timer>>,
    }
}

pin_project! {
    #[project = StateProj]
    enum State<F> {
        Refused { error: Option<DeadlineExceeded> },
        Calling { #[pin] future: F },
    }
}

/// Goes off at the deadline. Its moment is only given to tokio when there is something to wait for.
pub(crate) struct Timer {
    deadline: Deadline,
    sleep: Option<Pin<Box<Sleep>>>,
}

/// What those calls will take that are on their way to the limiter's line.
#[derive(Debug, Default)]
pub(crate) struct PendingDemand {
    requests: AtomicU64,
    tokens: AtomicU64,
}

/// One of them, until this is dropped: an extension of a request with a deadline, which is taken out below the queue.
#[derive(Clone)]
pub(crate) struct PendingDemandGuard(#[allow(dead_code, reason = "it is there to be dropped")] Arc<DemandShare>);

struct DemandShare {
    demand: Arc<PendingDemand>,
    cost: Cost,
}

// === impl Deadline ===

impl Deadline {
    /// At this moment.
    #[must_use]
    pub const fn at(deadline: Instant) -> Self {
        Self(deadline)
    }

    /// So long from now. A time that is too long to be told is one of thirty years.
    #[must_use]
    pub fn after(timeout: Duration) -> Self {
        let now = Instant::now();
        let far = || now + Duration::from_secs(30 * 365 * 24 * 60 * 60);
        Self(now.checked_add(timeout).unwrap_or_else(far))
    }

    /// The moment.
    #[must_use]
    pub const fn instant(self) -> Instant {
        self.0
    }

    #[inline]
    pub(crate) fn of<B>(request: &Request<B>) -> Option<Self> {
        let extensions = request.extensions();
        if extensions.is_empty() {
            return None;
        }
        extensions.get().copied()
    }

    /// Whether a call that would have to wait so long can still make it.
    pub(crate) fn allows(self, wait: Duration) -> Result<(), DeadlineExceeded> {
        let now = Instant::now();
        let left = self.0.saturating_duration_since(now);
        // To go at the last moment is too late.
        if wait >= left {
            return Err(DeadlineExceeded::new(wait, left));
        }
        Ok(())
    }
}

// === impl DeadlineLayer ===

impl DeadlineLayer {
    /// Ends calls at the [`Deadline`] among their request's extensions.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            limits: None,
            timeout: None,
        }
    }
}

impl<K> DeadlineLayer<K> {
    /// Calls without a deadline have this long, from when they come here.
    #[must_use]
    pub const fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// Refuses calls that would have to wait for this limiter beyond their deadline. It costs what `cost` says.
    #[must_use]
    pub fn limiter<N>(self, limiter: impl Into<Limiter>, cost: N) -> DeadlineLayer<N> {
        DeadlineLayer {
            limits: Some((limiter.into(), cost)),
            timeout: self.timeout,
        }
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

    fn call(&mut self, mut req: Request<B>) -> Self::Future {
        let DeadlineLayer { limits, timeout } = &self.layer;
        let own = Deadline::of(&req);
        if own.is_some() {
            // It has come to where the limiter sees it.
            req.extensions_mut().remove::<PendingDemandGuard>();
        }
        let deadline = own.or_else(|| timeout.map(Deadline::after));
        let wait = |(limiter, cost): &(Limiter, K)| limiter.wait(cost.cost(&req), (0, 0));
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
            timer: deadline.map(|deadline| Box::new(Timer::new(deadline))),
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
                let error = error.take().expect("a future is not polled after it was ready");
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

// === impl Timer ===

impl Timer {
    pub(crate) const fn new(deadline: Deadline) -> Self {
        Self { deadline, sleep: None }
    }

    /// Ready when the time is up.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<DeadlineExceeded> {
        let sleep = self.sleep.get_or_insert_with(|| Box::pin(sleep_until(self.deadline.0)));
        sleep
            .as_mut()
            .poll(cx)
            .map(|()| DeadlineExceeded::new(Duration::ZERO, Duration::ZERO))
    }
}

// === impl PendingDemand ===

impl PendingDemand {
    /// One more.
    pub(crate) fn add(self: &Arc<Self>, cost: Cost) -> PendingDemandGuard {
        self.requests.fetch_add(cost.requests, Ordering::AcqRel);
        self.tokens.fetch_add(cost.tokens, Ordering::AcqRel);
        PendingDemandGuard(Arc::new(DemandShare {
            demand: self.clone(),
            cost,
        }))
    }

    pub(crate) fn cost(&self) -> (u128, u128) {
        let load = |number: &AtomicU64| number.load(Ordering::Acquire).into();
        (load(&self.requests), load(&self.tokens))
    }
}

impl Drop for DemandShare {
    fn drop(&mut self) {
        self.demand.requests.fetch_sub(self.cost.requests, Ordering::AcqRel);
        self.demand.tokens.fetch_sub(self.cost.tokens, Ordering::AcqRel);
    }
}
