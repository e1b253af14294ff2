//! [`SharedRateLimiter`]: a [`RateLimiter`](crate::RateLimiter) whose buckets many processes share.

use super::{coordinator::WaiterStep, driver::SharedCoordinator, quota_config::QuotaConfig, waiters::Reservation};
use crate::{
    error::{AcquireError, CostExceedsBurst, InvalidConfig},
    panic,
    rate::{
        Bursts,
        buckets::Available,
        estimate::{Charge, Estimate},
        limits::{Budget, Cost, Limits},
    },
};
use std::{
    fmt,
    future::{Future, poll_fn},
    pin::Pin,
    sync::{Arc, Weak},
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::time::{Instant, Sleep, sleep_until};

/// A limiter of requests and tokens that all processes share that name the same quota on the same server.
///
/// It is used like a [`RateLimiter`](crate::RateLimiter): by [`RateLimitLayer::new`](crate::RateLimitLayer::new),
/// [`ExecutorBuilder::limiter`](crate::ExecutorBuilder::limiter) and wherever else a [`Limiter`](crate::rate::Limiter)
/// is taken. Clones share one connection. See the [module docs](super) for what it guarantees.
///
/// # Examples
///
/// ```no_run
/// # async fn run() -> Result<(), Box<dyn std::error::Error>> {
/// use tower_outbound::{Cost, Limits, Rate, rate::redis::SharedRateLimiter};
///
/// let limits = Limits::new().requests(Rate::per_minute(500).burst(10)).tokens(Rate::per_minute(30_000));
/// let limiter = SharedRateLimiter::connect("redis://127.0.0.1/", "openai:gpt-5", limits)?;
/// limiter.acquire(Cost::tokens(1_200)).await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct SharedRateLimiter {
    handle: Arc<Handle>,
}

/// When the last one is dropped, the driver says goodbye.
struct Handle {
    office: Arc<SharedCoordinator>,
}

/// How the store is, as this process sees it. Numbers only grow, but for `members` and `latency`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct StoreStatus {
    /// Whether it answers. False too before the first answer.
    pub is_up: bool,
    /// Processes that share the quota, this one included, by the last answer.
    pub members: u64,
    /// Round trips that were begun.
    pub calls: u64,
    /// Those that failed.
    pub failures: u64,
    /// How often the store was given up as lost.
    pub losses: u64,
    /// How often it had lost the state of the limits and began anew.
    pub forgotten: u64,
    /// Calls admitted without it: see [`OnStoreLoss`](super::OnStoreLoss).
    pub degraded: u64,
    /// Reservations that were used too late (by more than 5 ms, or in a pause), and were made anew.
    pub late: u64,
    /// How long the last round trip took.
    pub latency: Duration,
}

/// A wait for a reservation and for its moment.
pub(in crate::rate) struct SharedAdmission {
    limiter: SharedRateLimiter,
    number: Option<u64>,
    sleep: Option<Pin<Box<Sleep>>>,
    /// If what it asks for is an estimate: what was reserved.
    estimate: Option<Option<Reservation>>,
}

/// A reservation whose true cost is to be told.
struct ReservedCharge {
    limiter: SharedRateLimiter,
    grant: Reservation,
}

// === impl SharedRateLimiter ===

impl SharedRateLimiter {
    /// The limits of `quota`, kept by the server at `url`: `redis://[user:password@]host[:port][/db]`, or `rediss://` for
    /// TLS (feature `redis-tls`). Does not connect yet.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`] names the field: the URL, or a number that makes no sense in the limits.
    pub fn connect(url: &str, quota: &str, limits: Limits) -> Result<Self, InvalidConfig> {
        super::Builder::new(limits).connect(url, quota)
    }

    /// All settings.
    pub const fn builder(limits: Limits) -> super::Builder {
        super::Builder::new(limits)
    }

    pub(super) fn new(office: SharedCoordinator) -> Self {
        let office = Arc::new(office);
        Self {
            handle: Arc::new(Handle { office }),
        }
    }

    pub(super) fn office(&self) -> Weak<SharedCoordinator> {
        Arc::downgrade(&self.handle.office)
    }

    /// Waits until `cost` can be taken, and takes it.
    ///
    /// # Errors
    ///
    /// [`AcquireError::CostExceedsBurst`], at once, if a bucket can never hold that much.
    /// [`AcquireError::StoreUnavailable`] if the store is lost, nobody is to be admitted without it
    /// ([`Closed`](super::OnStoreLoss::Closed)), and [patience](super::Builder::patience) is over.
    ///
    /// # Panics
    ///
    /// Outside a Tokio runtime with its timer and its I/O enabled.
    ///
    /// # Cancel safety
    ///
    /// Dropped while it waits, it loses its place in line. What was reserved for it is given back, as far as that lets
    /// nobody exceed the limits.
    pub async fn acquire(&self, cost: Cost) -> Result<(), AcquireError> {
        let mut admission = self.admission(false);
        poll_fn(|cx| admission.poll(cost, cx)).await
    }

    /// Like [`acquire`](Self::acquire), for a cost that is only estimated: see
    /// [`RateLimiter::acquire_estimate`](crate::RateLimiter::acquire_estimate).
    ///
    /// # Errors
    ///
    /// As [`acquire`](Self::acquire).
    ///
    /// # Cancel safety
    ///
    /// As [`acquire`](Self::acquire).
    pub async fn acquire_estimate(&self, cost: Cost) -> Result<Estimate, AcquireError> {
        let mut admission = self.admission(true);
        poll_fn(|cx| admission.poll(cost, cx)).await?;
        Ok(admission.estimate(cost).expect("the admission is an estimate"))
    }

    /// Corrects a charge, as [`Estimate::settle`].
    pub fn settle(&self, estimate: Estimate, used: Cost) {
        estimate.settle(used);
    }

    /// What could go at once, by the store's last answer; what has come in since then is not counted.
    #[must_use]
    pub fn available(&self) -> Available {
        let now = Instant::now();
        self.look(|coordinator| {
            let [requests, tokens] = coordinator.left(now);
            Available {
                requests,
                tokens,
                paused_until: coordinator.paused(now),
            }
        })
    }

    /// Whether `cost` could pass at all.
    ///
    /// # Errors
    ///
    /// [`CostExceedsBurst`] if it could not.
    pub fn check(&self, cost: Cost) -> Result<(), CostExceedsBurst> {
        self.bursts().check(cost)
    }

    /// The limits, as they are known here.
    #[must_use]
    pub fn limits(&self) -> Limits {
        self.look(|coordinator| coordinator.config().limits().clone())
    }

    /// Replaces the limits of all members, at once also for those who wait. What is in a bucket stays there, up to the
    /// new burst. Others hear of it with the next answer they get.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`] names the field; nothing is changed then.
    pub fn set_limits(&self, limits: Limits) -> Result<(), InvalidConfig> {
        let config = QuotaConfig::new(limits)?;
        let wakers = self.look(|coordinator| coordinator.configure(config));
        wakers.into_iter().for_each(panic::wake);
        self.handle.office.call();
        Ok(())
    }

    /// Somebody who knows says what is left of a rate: see [`RateLimiter::lower`](crate::RateLimiter::lower).
    pub fn lower(&self, budget: Budget, period: Option<Duration>, left: u64) {
        self.look(|coordinator| coordinator.lower(budget, period, left));
        self.handle.office.call();
    }

    /// Somebody who knows says what a rate is: see [`RateLimiter::adopt`](crate::RateLimiter::adopt). It is adopted for
    /// all members.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`] for an amount of zero; nothing is changed then.
    pub fn adopt(&self, budget: Budget, period: Option<Duration>, amount: u64) -> Result<bool, InvalidConfig> {
        let limits = self.limits();
        let Some(changed) = limits
            .position(budget, period)
            .and_then(|at| limits.with_amount(at, amount))
        else {
            return Ok(false);
        };
        self.set_limits(changed).map(|()| true)
    }

    /// Admits nobody for this long, in no process. Only ever extends a pause.
    ///
    /// Here it holds at once; elsewhere as soon as the server has told the others. What they have reserved for the time
    /// of the pause is given back.
    pub fn pause_for(&self, pause: Duration) {
        let now = Instant::now();
        // A time that cannot be told is a very long one.
        let far = || now + Duration::from_secs(60 * 60 * 24 * 365);
        self.pause_until(now.checked_add(pause).unwrap_or_else(far));
    }

    /// Admits nobody until then: see [`pause_for`](Self::pause_for).
    pub fn pause_until(&self, until: Instant) {
        self.look(|coordinator| coordinator.pause(until));
        self.handle.office.call();
    }

    /// How the store is, as seen from here.
    #[must_use]
    pub fn store(&self) -> StoreStatus {
        let latency = self.handle.office.latency();
        self.look(|coordinator| StoreStatus {
            is_up: coordinator.is_up(),
            members: coordinator.members(),
            calls: coordinator.counts.calls,
            failures: coordinator.counts.failures,
            losses: coordinator.counts.losses,
            forgotten: coordinator.counts.forgotten,
            degraded: coordinator.counts.degraded,
            late: coordinator.counts.late,
            latency,
        })
    }

    pub(in crate::rate) fn wait(&self, cost: Cost, ahead: (u128, u128)) -> Duration {
        self.look(|coordinator| coordinator.wait(cost, ahead, Instant::now()))
    }

    pub(in crate::rate) fn bursts(&self) -> Arc<Bursts> {
        self.look(|coordinator| coordinator.bursts().clone())
    }

    pub(in crate::rate) fn admission(&self, is_estimate: bool) -> SharedAdmission {
        SharedAdmission {
            limiter: self.clone(),
            number: None,
            sleep: None,
            estimate: is_estimate.then_some(None),
        }
    }

    fn look<T>(&self, look: impl FnOnce(&mut super::coordinator::Coordinator) -> T) -> T {
        self.handle.office.look(look)
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.office.close();
    }
}

impl fmt::Debug for SharedRateLimiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedRateLimiter")
            .field("available", &self.available())
            .field("store", &self.store())
            .finish_non_exhaustive()
    }
}

// === impl SharedAdmission ===

impl SharedAdmission {
    pub(in crate::rate) fn poll(&mut self, cost: Cost, cx: &mut Context<'_>) -> Poll<Result<(), AcquireError>> {
        let office = &self.limiter.handle.office;
        loop {
            let (now, waker) = (Instant::now(), cx.waker().clone());
            let turn = office.look(|coordinator| coordinator.turn(&mut self.number, cost, waker, now))?;
            match turn {
                WaiterStep::Go(grant) => {
                    match &mut self.estimate {
                        Some(reserved) => *reserved = Some(grant),
                        None => office.look(|coordinator| coordinator.settle(grant, cost, cost)),
                    }
                    tracing::trace!(
                        requests = cost.requests,
                        tokens = cost.tokens,
                        at_store = grant.at_store,
                        "admitted by the shared limits"
                    );
                    return Poll::Ready(Ok(()));
                }
                WaiterStep::At(at) => match &mut self.sleep {
                    Some(sleep) => {
                        if sleep.deadline() != at {
                            sleep.as_mut().reset(at);
                        }
                        ready!(sleep.as_mut().poll(cx));
                    }
                    None => self.sleep = Some(Box::pin(sleep_until(at))),
                },
                WaiterStep::Queued | WaiterStep::Wait => {
                    office.check_timer();
                    office.call_if_needed(matches!(turn, WaiterStep::Queued));
                    return Poll::Pending;
                }
            }
        }
    }

    /// What was reserved, to be settled, if it is an estimate.
    pub(in crate::rate) fn estimate(&mut self, cost: Cost) -> Option<Estimate> {
        let grant = self.estimate.take()??;
        let limiter = self.limiter.clone();
        Some(Estimate::new(cost, ReservedCharge { limiter, grant }))
    }
}

impl Drop for SharedAdmission {
    fn drop(&mut self) {
        if let Some(number) = self.number {
            let office = &self.limiter.handle.office;
            office.look(|coordinator| coordinator.leave(number));
        }
    }
}

impl fmt::Debug for SharedAdmission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedAdmission")
            .field("number", &self.number)
            .finish_non_exhaustive()
    }
}

// === impl ReservedCharge ===

impl Charge for ReservedCharge {
    fn settle(&self, reserved: Cost, used: Cost) {
        let office = &self.limiter.handle.office;
        office.look(|coordinator| coordinator.settle(self.grant, reserved, used));
        if reserved != used {
            office.call_if_needed(true);
        }
    }
}
