//! A limit on how many calls are in flight at once.
//!
//! Tower's `ConcurrencyLimit` takes a permit in `poll_ready`. A service that was made ready and is not called keeps its
//! permit, and the calls of other clones wait for that permit, possibly forever. Also, the limit cannot be changed once
//! the service is built.
//!
//! [`ConcurrencyLimitLayer`] takes a permit in `call`, and releases it when the call's future completes or is dropped.
//! `poll_ready` waits until a permit is available to this clone of the service, and reserves nothing. If a clone that
//! had to wait is not called within 5 ms after it was woken, the next waiting clone or call is woken. Permits are handed
//! out in the order in which services and futures began to wait. The [limit](Concurrency) can be read and changed at run
//! time.
//!
//! A call that finds no permit waits for one in its future. It has the position among the waiters that its service had.
//!
//! - **A future that is not polled blocks no other call.** If a call's future is not polled within 5 to 10 ms after the
//!   call was made, while another call or clone waits for a permit, the call loses its permit to that one, and waits for
//!   another permit like a new call. Afterwards, calls take their permits when their futures are polled, until one has
//!   done so, so that such futures do not add up.
//! - **Readiness comes last.** `poll_ready` does not ask the inner service whether it is ready. The call's future does
//!   so when a permit is available, and calls the inner service at once. While the inner service is not ready, the call
//!   holds no permit. If the permits are taken when it is ready, the call gives the readiness back: it continues with a
//!   clone of the inner service. So the inner service's error from `poll_ready` is the result of the call, and the limit
//!   does not bound how many calls wait for an inner service that is not ready. (In an executor it does: there the inner
//!   service is a [`RateLimit`](crate::rate::RateLimit), which is always ready and waits itself for the service below.)
//! - **Outside the rate limit.** Place this layer above a [`RateLimitLayer`](crate::RateLimitLayer), as an executor does. Below
//!   it, a call whose rates are available waits for a permit, and holds up the calls that wait for the rates behind it. That
//!   is logged once with `tracing` as a warning, where calls have [events](crate::event).
//! - **Cooperative.** A call counts as one unit of the cooperative budget of its [Tokio task](tokio::task::coop).
//!
//! # Examples
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), tower::BoxError> {
//! use tower::{Service, ServiceBuilder, ServiceExt, service_fn};
//! use tower_outbound::ConcurrencyLimitLayer;
//!
//! let layer = ConcurrencyLimitLayer::new(5)?;
//! let limit = layer.limit().clone();
//! let mut service = ServiceBuilder::new()
//!     .layer(layer)
//!     .service(service_fn(async |name: &'static str| Ok::<_, tower::BoxError>(name.len())));
//!
//! assert_eq!(service.ready().await?.call("hello").await?, 5);
//! limit.set(2)?;
//! assert_eq!(limit.in_flight(), 0);
//! # Ok(())
//! # }
//! ```

use crate::{
    coop,
    error::InvalidConfig,
    event::{WaitCause, WaitTimer},
    on_turn::OnTurn,
    semaphore::{
        Acquire, Claim, Permit, Semaphore,
        granted::{self, Found, PollPermit},
    },
};
use pin_project_lite::pin_project;
use std::{
    fmt,
    future::Future,
    mem,
    pin::Pin,
    task::{Context, Poll, ready},
};
use tower_layer::Layer;
use tower_service::Service;

/// Limits how many calls are in flight at once. See the [module docs](self).
#[derive(Clone, Debug)]
pub struct ConcurrencyLimitLayer {
    limit: Concurrency,
}

/// A service with a limited number of calls in flight, counted over all its clones. See the [module docs](self).
#[derive(Debug)]
pub struct ConcurrencyLimit<S> {
    inner: S,
    acquire: Acquire,
    /// Measures a wait in `poll_ready` that is part of a call, as when a retry waits until the service is ready.
    wait: WaitTimer,
    /// Whether `poll_ready` has consumed the unit of cooperative budget that the next call counts for.
    is_counted: bool,
}

/// A limit on the calls in flight, which can be read and changed at run time, and shared by several services.
///
/// Clones are handles to the same limit.
#[derive(Clone)]
pub struct Concurrency {
    permits: Semaphore,
}

pin_project! {
    /// The response future of a [`ConcurrencyLimit`].
    ///
    /// The future confirms the permit that the call has taken, or waits for one, asks the inner service to be ready,
    /// calls it, and holds the permit until the call has completed or the future is dropped.
    ///
    /// # Errors
    ///
    /// The error of the inner service, from `poll_ready` or from its call.
    ///
    /// # Panics
    ///
    /// Panics if the future is polled after it has completed.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future drops the inner call and then releases the permit. If the call still waits for a permit, it
    /// gives up its position among the waiters.
    #[must_use = "futures do nothing unless polled"]
    pub struct ResponseFuture<S, Req>
    where
        S: Service<Req>,
    {
        #[pin]
        state: State<S, Req, S::Future>,
    }
}

pin_project! {
    #[project = StateProj]
    enum State<S, Req, F> {
        /// The call waits for a permit and for the inner service to be ready.
        Waiting {
            turn: Turn,
            inner: OnTurn<S>,
            wait: WaitTimer,
            req: Option<Req>,
            is_counted: bool,
        },
        /// The call is in flight and holds a permit.
        // `permit` is declared after `future`, and the fields of a variant are dropped in this order. So the inner call
        // ends before its permit is released.
        Calling { #[pin] future: F, permit: Permit },
        /// The future has returned the result of the call.
        Done,
    }
}

/// How a call that is not in flight gets its permit.
enum Turn {
    /// The call has taken a permit when it was made. Its future confirms that when it is polled.
    Claimed(Claim),
    /// The call waits for a permit, and holds none.
    Waiting(Acquire),
    /// A schedule has given the call this permit, and it cannot be claimed.
    Granted(Option<Permit>),
    /// The call is a further attempt of one that a schedule has chosen, and waits for its turn there again.
    Scheduled(Box<(Box<dyn PollPermit>, Option<Acquire>)>),
}

// === impl ConcurrencyLimitLayer ===

impl ConcurrencyLimitLayer {
    /// Creates a layer that allows `limit` calls in flight, counted over all services that this layer and its clones
    /// make.
    ///
    /// # Errors
    ///
    /// Returns [`InvalidConfig`] if `limit` is zero.
    pub fn new(limit: usize) -> Result<Self, InvalidConfig> {
        Concurrency::new(limit).map(Self::with_limit)
    }

    /// Creates a layer that uses `limit`, which other layers may use, too. The calls of the services of all these
    /// layers count together.
    #[must_use]
    pub const fn with_limit(limit: Concurrency) -> Self {
        Self { limit }
    }

    /// Returns the limit of this layer, to read or change the limit.
    #[must_use]
    pub const fn limit(&self) -> &Concurrency {
        &self.limit
    }
}

impl<S> Layer<S> for ConcurrencyLimitLayer {
    type Service = ConcurrencyLimit<S>;

    fn layer(&self, inner: S) -> Self::Service {
        ConcurrencyLimit {
            inner,
            acquire: self.limit.permits.acquire(),
            wait: WaitTimer::default(),
            is_counted: false,
        }
    }
}

// === impl Concurrency ===

impl Concurrency {
    /// Creates a limit that allows `limit` calls in flight.
    ///
    /// # Errors
    ///
    /// Returns [`InvalidConfig`] if `limit` is zero.
    pub fn new(limit: usize) -> Result<Self, InvalidConfig> {
        Ok(Self {
            permits: Semaphore::new(InvalidConfig::positive("concurrency_limit", limit)?),
        })
    }

    pub(crate) const fn permits(&self) -> &Semaphore {
        &self.permits
    }

    /// Returns the limit, that is, how many calls may be in flight.
    #[must_use]
    pub fn get(&self) -> usize {
        self.permits.total()
    }

    /// Returns how many calls are in flight, that is, hold a permit. A call that was made and whose future was not polled
    /// yet is counted, too, unless it found no permit or has lost it. After the limit was lowered, more calls than the limit may be in flight
    /// until enough calls have ended.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.permits.held()
    }

    /// Changes the limit. A higher limit takes effect at once, also for calls that are waiting already. A lower limit
    /// does not stop calls in flight: it takes effect as they end.
    ///
    /// # Errors
    ///
    /// Returns [`InvalidConfig`] if `limit` is zero. The limit is not changed then.
    pub fn set(&self, limit: usize) -> Result<(), InvalidConfig> {
        self.permits
            .set_total(InvalidConfig::positive("concurrency_limit", limit)?);
        Ok(())
    }
}

impl fmt::Debug for Concurrency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Concurrency")
            .field("limit", &self.get())
            .field("in_flight", &self.in_flight())
            .finish()
    }
}

// === impl ConcurrencyLimit ===

impl<S, Req> Service<Req> for ConcurrencyLimit<S>
where
    S: Service<Req> + Clone,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = ResponseFuture<S, Req>;

    /// Waits until a permit is available. Takes no permit, and does not ask the inner service whether it is ready.
    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        // No permit is taken in `poll_ready`: if no call followed, the permit would be kept from the other clones.
        // Waiting for a permit never fails, because this semaphore is never closed.
        if coop::poll_counted(cx, |cx| self.acquire.poll_ready_for_call(cx)).is_pending() {
            self.wait.wait_for_in_call(WaitCause::Permit);
            return Poll::Pending;
        }
        self.wait.end();
        self.is_counted = true;
        Poll::Ready(Ok(()))
    }

    #[inline]
    fn call(&mut self, req: Req) -> Self::Future {
        let turn = match granted::take(self.acquire.semaphore()) {
            Some(Found::Permit(permit)) => match permit.into_claim() {
                Ok(claim) => Turn::Claimed(claim),
                Err(permit) => Turn::Granted(Some(permit)),
            },
            Some(Found::Again(attempt)) => Turn::Scheduled(Box::new((attempt, Some(self.acquire.clone())))),
            None => match self.acquire.claim() {
                Ok(claim) => Turn::Claimed(claim),
                // The future gets the acquirer with its position among the waiters.
                Err(acquire) => Turn::Waiting(acquire),
            },
        };
        ResponseFuture {
            state: State::Waiting {
                turn,
                inner: OnTurn::new(self.inner.clone()),
                wait: WaitTimer::default(),
                req: Some(req),
                is_counted: mem::take(&mut self.is_counted),
            },
        }
    }
}

impl<S: Clone> Clone for ConcurrencyLimit<S> {
    fn clone(&self) -> Self {
        Self {
            inner: self.inner.clone(),
            acquire: self.acquire.clone(),
            wait: WaitTimer::default(),
            is_counted: false,
        }
    }
}

// === impl Turn ===

impl Turn {
    /// Waits until a permit is available and `inner` is ready, takes the permit, and returns it.
    fn poll_permit<S, Req>(
        &mut self,
        inner: &mut OnTurn<S>,
        wait: &mut WaitTimer,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Permit, S::Error>>
    where
        S: Service<Req> + Clone,
    {
        loop {
            match self {
                Self::Claimed(claim) => match claim.confirm() {
                    Ok(permit) => match inner.poll_ready(cx)? {
                        Poll::Ready(()) => return Poll::Ready(Ok(permit)),
                        Poll::Pending => {
                            wait.wait_for(WaitCause::Service);
                            *self = Self::Waiting(permit.release());
                            return Poll::Pending;
                        }
                    },
                    Err(acquire) => *self = Self::Waiting(acquire),
                },
                Self::Granted(permit) => {
                    let is_ready = inner.poll_ready(cx)?.is_ready();
                    let permit = permit.take().expect("a granted permit is taken once");
                    if is_ready {
                        return Poll::Ready(Ok(permit));
                    }
                    wait.wait_for(WaitCause::Service);
                    *self = if permit.is_of_none() {
                        // The call is about to be refused by its rate limit.
                        Self::Granted(Some(permit))
                    } else {
                        Self::Waiting(permit.release())
                    };
                    return Poll::Pending;
                }
                Self::Scheduled(scheduled) => {
                    let (attempt, acquire) = &mut **scheduled;
                    let Poll::Ready(permit) = attempt.poll_permit(cx) else {
                        // The schedule chooses the attempt again when its permit and its budgets are there.
                        wait.wait_for(WaitCause::Turn);
                        return Poll::Pending;
                    };
                    let acquire = acquire.take().expect("a scheduled attempt ends once");
                    *self = match permit {
                        Some((permit, in_flight)) => Self::Granted(Some(permit.counted_by(in_flight))),
                        None => Self::Waiting(acquire),
                    };
                }
                Self::Waiting(acquire) => {
                    if acquire.poll_ready(cx).is_pending() {
                        wait.wait_for(WaitCause::Permit);
                        inner.give_back();
                        return Poll::Pending;
                    }
                    if inner.poll_ready(cx)?.is_pending() {
                        wait.wait_for(WaitCause::Service);
                        return Poll::Pending;
                    }
                    // Never fails, because this semaphore is never closed. Without a permit, which another call has
                    // taken in the meantime, the loop waits again.
                    if let Ok(Some(permit)) = acquire.try_acquire() {
                        acquire.reopen_claims();
                        return Poll::Ready(Ok(permit));
                    }
                }
            }
        }
    }
}

// === impl ResponseFuture ===

impl<S, Req> Future for ResponseFuture<S, Req>
where
    S: Service<Req> + Clone,
{
    type Output = Result<S::Response, S::Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        loop {
            match this.state.as_mut().project() {
                StateProj::Waiting {
                    turn,
                    inner,
                    wait,
                    req,
                    is_counted,
                } => {
                    if !*is_counted {
                        ready!(coop::poll_unit(cx));
                        *is_counted = true;
                    }
                    let permit = ready!(turn.poll_permit::<S, Req>(inner, wait, cx));
                    wait.end();
                    let permit = match permit {
                        Ok(permit) => permit,
                        Err(error) => {
                            this.state.set(State::Done);
                            return Poll::Ready(Err(error));
                        }
                    };
                    let req = req.take().expect("the request is there until it is called");
                    let future = inner.call(req);
                    this.state.set(State::Calling { future, permit });
                }
                StateProj::Calling { future, .. } => {
                    let result = ready!(future.poll(cx));
                    this.state.set(State::Done);
                    return Poll::Ready(result);
                }
                StateProj::Done => panic!("`ResponseFuture` polled after completion"),
            }
        }
    }
}

impl<S: Service<Req>, Req> fmt::Debug for ResponseFuture<S, Req> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let permit = match &self.state {
            State::Calling { permit, .. } => Some(permit),
            State::Waiting { .. } | State::Done => None,
        };
        f.debug_struct("concurrency::ResponseFuture")
            .field("permit", &permit)
            .finish_non_exhaustive()
    }
}
