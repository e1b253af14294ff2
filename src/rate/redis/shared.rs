//! [`SharedLimiter`]: the rate limiter whose buckets many processes share. Its users see it as a
//! [`RateLimiter`](crate::RateLimiter).

use super::{
    coordinator::{Coordinator, WaiterStep},
    driver::SharedCoordinator,
    quota_config::QuotaConfig,
    waiters::Reservation,
};
use crate::{
    error::{AcquireError, InvalidConfig, StoreProblem, StoreUnavailable},
    panic,
    rate::{
        Bursts, Demand,
        available::Available,
        budget::Budget,
        cost::Cost,
        estimate::{Estimate, Settle, warn_of_cut_off},
        limits::Limits,
        pause::{Pause, PauseChange, PauseSource},
    },
};
use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::{Arc, Weak},
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::time::{Instant, Sleep, sleep_until, timeout};

/// How long a check of the store may take: longer than the time to connect.
const CHECK_TIMEOUT: Duration = Duration::from_secs(15);

/// A rate limiter whose limits are shared by all processes that name the same quota on the same server. Clones share one
/// connection.
#[derive(Clone)]
pub(in crate::rate) struct SharedLimiter {
    handle: Arc<Handle>,
}

/// The handle that all clones of a limiter share. It is dropped with the last clone, and this ends the driver (the task
/// that sends requests to the store). The driver itself does not hold this handle, only the coordinator.
struct Handle {
    shared: Arc<SharedCoordinator>,
}

/// The store of the shared limits (the Redis or Valkey server), as this process sees it. All numbers are counters that
/// only grow, except for `members` and `latency`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct StoreStatus {
    /// Whether the store counts as reachable: `false` until its first reply, and while it is lost.
    pub is_up: bool,
    /// Why the last request to the store failed; `None` if it succeeded, or if none has ended yet.
    pub problem: Option<StoreProblem>,
    /// The number of processes that share the quota, including this one, by the store's last reply. Never less than
    /// what [`Builder::members`](super::Builder::members) was set to.
    pub members: u64,
    /// The number of requests to the store that were begun.
    pub requests: u64,
    /// The number of requests to the store that failed or got no reply in time.
    pub failures: u64,
    /// How often this process has lost the store. A loss begins with the third request in a row that fails, and ends
    /// with a reply.
    pub losses: u64,
    /// How often the store replied, but had lost the state of the buckets. They were empty after each of these losses.
    pub state_losses: u64,
    /// The number of reservations made without the store, while it was lost: see [`OnStoreLoss`](super::OnStoreLoss).
    pub admitted_without_store: u64,
    /// The number of reservations that were given back, because they were not used within 5 ms of their time or because
    /// their time fell into a pause.
    pub expired_reservations: u64,
    /// How long the last completed round trip to the store took; 0 before the first.
    pub latency: Duration,
}

/// Waits for a reservation in the shared limits, and then for the time that was reserved.
pub(crate) struct SharedAdmission {
    limiter: SharedLimiter,
    /// The sequence number of the waiter in the coordinator; `None` before the first poll, and after the call was
    /// admitted or rejected.
    seq: Option<u64>,
    /// Whether a schedule gives what is reserved to the call that goes next then.
    is_of_schedule: bool,
    sleep: Option<Pin<Box<Sleep>>>,
    /// `None` if the cost is final, and not an estimate. For an estimate, `Some(None)` before the call is admitted, and
    /// afterwards `Some` of the reservation that was charged, which is needed to settle the estimate.
    estimate: Option<Option<Reservation>>,
}

/// The reservation by which an estimate was charged, and through which it is settled.
struct ReservedCharge {
    limiter: SharedLimiter,
    reservation: Reservation,
}

// === impl SharedLimiter ===

impl SharedLimiter {
    pub(in crate::rate) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.handle, &other.handle)
    }

    pub(super) fn new(shared: SharedCoordinator) -> Self {
        let shared = Arc::new(shared);
        Self {
            handle: Arc::new(Handle { shared }),
        }
    }

    pub(super) fn downgrade(&self) -> Weak<SharedCoordinator> {
        Arc::downgrade(&self.handle.shared)
    }

    #[cfg(test)]
    pub(in crate::rate) async fn acquire(&self, cost: Cost) -> Result<(), AcquireError> {
        let mut admission = self.admission(false);
        std::future::poll_fn(|cx| admission.poll(cost, cx)).await
    }

    #[cfg(test)]
    pub(in crate::rate) async fn acquire_estimate(&self, cost: Cost) -> Result<Estimate, AcquireError> {
        let mut admission = self.admission(true);
        std::future::poll_fn(|cx| admission.poll(cost, cx)).await?;
        Ok(admission.estimate(cost).expect("the admission is an estimate"))
    }

    /// Returns why a call cannot be charged at once.
    pub(in crate::rate) fn cannot_try(&self, cost: Cost) -> AcquireError {
        match self.bursts().check(&cost) {
            Ok(()) => AcquireError::NeedsStore,
            Err(error) => error.into(),
        }
    }

    /// Returns what could be admitted at once, by the store's last reply. What the rates have added to the buckets
    /// since that reply is not counted.
    pub(in crate::rate) fn available(&self) -> Available {
        let now = Instant::now();
        self.with_coordinator(|coordinator| {
            let remaining = coordinator.remaining(now);
            Available::new(remaining, coordinator.paused_until(now))
        })
    }

    /// Returns the limits that this process uses: the limits that it has last set, or has last received from the store.
    pub(in crate::rate) fn limits(&self) -> Limits {
        self.with_coordinator(|coordinator| coordinator.config().limits().clone())
    }

    /// Replaces the limits of all members of the quota. What is in a bucket stays there, up to the new burst.
    ///
    /// The new limits apply at once in this process, also to waiting calls. The other members receive the new limits
    /// with the store's next reply to them.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`] names the invalid field. In that case nothing is changed.
    pub(in crate::rate) fn set_limits(&self, limits: Limits) -> Result<(), InvalidConfig> {
        let config = QuotaConfig::new(limits)?;
        let wakers = self.with_coordinator(|coordinator| coordinator.set_limits(config));
        wakers.into_iter().for_each(panic::wake);
        self.handle.shared.notify_driver();
        Ok(())
    }

    /// Lowers what remains of a rate to `remaining` for all members, for example to what the provider reports: see
    /// [`RateLimiter::lower`](crate::RateLimiter::lower).
    pub(in crate::rate) fn lower(&self, budget: Budget, period: Option<Duration>, remaining: u64) {
        self.with_coordinator(|coordinator| coordinator.lower(budget, period, remaining));
        self.handle.shared.notify_driver();
    }

    /// Lowers what remains of a rate to what is left now of `remaining`, which the provider held when it received a call
    /// that was sent at `sent`. What was charged since then is not subtracted: the next response reports it.
    #[cfg(feature = "http")]
    pub(in crate::rate) fn lower_since(&self, budget: Budget, period: Option<Duration>, remaining: u64, sent: Instant) {
        let elapsed = sent.elapsed();
        self.with_coordinator(|coordinator| coordinator.lower_since(budget, period, remaining, elapsed));
        self.handle.shared.notify_driver();
    }

    /// Replaces the amount of one rate for all members, for example with the limit that the provider reports: see
    /// [`RateLimiter::adopt`](crate::RateLimiter::adopt).
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`] for an amount that is not valid, such as 0. In that case nothing is changed.
    pub(in crate::rate) fn adopt(
        &self,
        budget: Budget,
        period: Option<Duration>,
        amount: u64,
    ) -> Result<bool, InvalidConfig> {
        let limits = self.limits();
        let Some(changed) = limits
            .index_of(budget, period)
            .and_then(|at| limits.with_amount(at, amount))
        else {
            return Ok(false);
        };
        self.set_limits(changed).map(|()| true)
    }

    /// Pauses all members: none of them admits a call for the time `pause` from now on. Replaces the pause that any member
    /// has set by this method or by [`pause_until`](Self::pause_until), so a shorter pause ends earlier, and a pause of
    /// zero ends at once. A pause of the provider is not changed: see [`resume`](Self::resume).
    ///
    /// The change applies at once in this process, and to the other members as soon as the server has announced it to
    /// them. Reservations whose time falls into the pause are given back, and made again after it.
    pub(in crate::rate) fn pause_for(&self, pause: Duration) {
        self.set_pause(PauseSource::User, pause);
    }

    /// Pauses all members until the given instant: see [`pause_for`](Self::pause_for).
    pub(in crate::rate) fn pause_until(&self, until: Instant) {
        self.pause_for(until.saturating_duration_since(Instant::now()));
    }

    /// Pauses all members at the request of the provider. Only extends an earlier pause of the provider.
    #[cfg(any(test, feature = "http"))]
    pub(in crate::rate) fn pause_for_provider(&self, pause: Duration) -> bool {
        !pause.is_zero() && self.set_pause(PauseSource::Provider, pause) == PauseChange::Begun
    }

    /// Ends all pauses of all members now, also a pause of the provider.
    ///
    /// The pauses end at once in this process, and for the other members as soon as the server has announced it to them.
    pub(in crate::rate) fn resume(&self) {
        for source in PauseSource::ALL {
            self.set_pause(source, Duration::ZERO);
        }
    }

    /// Returns the current pause as this process knows it, with its end and with who has begun it. If there are several,
    /// returns the one that ends last. `None` if the limiter is not paused.
    pub(in crate::rate) fn paused(&self) -> Option<Pause> {
        self.pause_since(Instant::now())
    }

    pub(in crate::rate) fn pause_since(&self, instant: Instant) -> Option<Pause> {
        self.with_coordinator(|coordinator| coordinator.pause_since(instant))
    }

    fn set_pause(&self, source: PauseSource, pause: Duration) -> PauseChange {
        let now = Instant::now();
        // If the end of the pause cannot be represented as an `Instant`, the pause lasts a year.
        let far = || now + Duration::from_secs(60 * 60 * 24 * 365);
        let until = now.checked_add(pause).unwrap_or_else(far);
        let change = self.with_coordinator(|coordinator| coordinator.set_pause(source, until, now));
        change.log(source, pause);
        self.handle.shared.notify_driver();
        change
    }

    /// Raises each bucket of the quota that is in debt to 0, for all members: see
    /// [`RateLimiter::forgive_debts`](crate::RateLimiter::forgive_debts). It takes effect with the next round trip to the
    /// store.
    pub(in crate::rate) fn forgive_debts(&self) {
        self.with_coordinator(Coordinator::forgive_debts);
        self.handle.shared.notify_driver();
    }

    pub(in crate::rate) fn expect_estimates(&self) {
        self.with_coordinator(Coordinator::expect_estimates);
    }

    /// Connects to the store, and runs the script there once without reserving anything.
    pub(in crate::rate) async fn check_store(&self) -> Result<(), StoreUnavailable> {
        let (shared, begun) = (&self.handle.shared, Instant::now());
        let store = shared.connect();
        let request = self.with_coordinator(|coordinator| coordinator.check_request(begun));
        let result = timeout(CHECK_TIMEOUT, store.call(&request)).await;
        let problem = match result {
            Ok(Ok(_)) => {
                // The driver keeps the connection.
                shared.notify_driver();
                return Ok(());
            }
            Ok(Err(error)) => error.problem,
            Err(_) => store.timeout_problem(),
        };
        Err(StoreUnavailable::new(problem, begun.elapsed()))
    }

    /// Returns the status of the store, as this process sees it.
    pub(in crate::rate) fn store_status(&self) -> StoreStatus {
        let latency = self.handle.shared.latency();
        self.with_coordinator(|coordinator| StoreStatus {
            is_up: coordinator.is_up(),
            problem: coordinator.problem(),
            members: coordinator.members(),
            requests: coordinator.counts.requests,
            failures: coordinator.counts.failures,
            losses: coordinator.counts.losses,
            state_losses: coordinator.counts.state_losses,
            admitted_without_store: coordinator.counts.admitted_without_store,
            expired_reservations: coordinator.counts.expired_reservations,
            latency,
        })
    }

    pub(in crate::rate) fn wait(&self, cost: &Cost, ahead: &Demand) -> Duration {
        self.with_coordinator(|coordinator| coordinator.wait(*cost, ahead.clone(), Instant::now()))
    }

    pub(in crate::rate) fn bursts(&self) -> Arc<Bursts> {
        self.with_coordinator(|coordinator| coordinator.bursts().clone())
    }

    pub(in crate::rate) fn admission(&self, is_estimate: bool) -> SharedAdmission {
        SharedAdmission {
            limiter: self.clone(),
            seq: None,
            is_of_schedule: false,
            sleep: None,
            estimate: is_estimate.then_some(None),
        }
    }

    /// Returns the admission of the call that a schedule chooses next.
    pub(in crate::rate) fn schedule_admission(&self) -> SharedAdmission {
        let mut admission = self.admission(true);
        admission.is_of_schedule = true;
        admission
    }

    fn with_coordinator<T>(&self, f: impl FnOnce(&mut Coordinator) -> T) -> T {
        self.handle.shared.with_coordinator(f)
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.close();
    }
}

impl fmt::Debug for SharedLimiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedLimiter")
            .field("available", &self.available())
            .field("store", &self.store_status())
            .finish_non_exhaustive()
    }
}

// === impl SharedAdmission ===

impl SharedAdmission {
    pub(in crate::rate) fn poll(&mut self, cost: Cost, cx: &mut Context<'_>) -> Poll<Result<(), AcquireError>> {
        let shared = &self.limiter.handle.shared;
        loop {
            let (now, waker) = (Instant::now(), cx.waker().clone());
            let (seq, is_of_schedule) = (&mut self.seq, self.is_of_schedule);
            let step = shared.with_coordinator(|coordinator| {
                let step = coordinator.poll_waiter(seq, cost, waker, now);
                if let (Ok(WaiterStep::Queued), Some(seq), true) = (&step, *seq, is_of_schedule) {
                    coordinator.set_of_schedule(seq);
                }
                step
            })?;
            match step {
                WaiterStep::Admitted(reservation) => {
                    match &mut self.estimate {
                        Some(reserved) => *reserved = Some(reservation),
                        None => shared.with_coordinator(|coordinator| coordinator.settle(reservation, cost, cost)),
                    }
                    tracing::trace!(
                        requests = cost.requests,
                        tokens = cost.tokens,
                        at_store = reservation.at_store,
                        "Admitted by the shared limits"
                    );
                    return Poll::Ready(Ok(()));
                }
                WaiterStep::ReservedAt(at) => match &mut self.sleep {
                    Some(sleep) => {
                        if sleep.deadline() != at {
                            sleep.as_mut().reset(at);
                        }
                        ready!(sleep.as_mut().poll(cx));
                    }
                    None => self.sleep = Some(Box::pin(sleep_until(at))),
                },
                WaiterStep::Queued => {
                    shared.check_timer();
                    shared.notify_driver();
                    return Poll::Pending;
                }
                WaiterStep::Waiting => {
                    // The driver that sends the waiter's request may have ended with its runtime. If so, another one is
                    // started.
                    shared.check_timer();
                    shared.ensure_driver();
                    return Poll::Pending;
                }
            }
        }
    }

    pub(in crate::rate) fn pause_since(&self, since: Instant) -> Option<Pause> {
        self.limiter.pause_since(since)
    }

    /// Returns the budget that a call of this cost probably waits for: the store does not say which.
    pub(in crate::rate) fn waits_for(&self, cost: &Cost) -> Budget {
        let limiter = &self.limiter;
        limiter.with_coordinator(|coordinator| coordinator.config().limits().slowest(cost))
    }

    /// Takes the estimate to settle later. Returns `None` if the cost is final, or if the call was not admitted.
    pub(in crate::rate) fn estimate(&mut self, cost: Cost) -> Option<Estimate> {
        let reservation = self.estimate.take()??;
        let limiter = self.limiter.clone();
        Some(Estimate::new(cost, ReservedCharge { limiter, reservation }))
    }
}

impl Drop for SharedAdmission {
    fn drop(&mut self) {
        if let Some(seq) = self.seq {
            let shared = &self.limiter.handle.shared;
            if shared.with_coordinator(|coordinator| coordinator.remove_waiter(seq)) {
                shared.notify_driver();
            }
        }
    }
}

impl fmt::Debug for SharedAdmission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedAdmission")
            .field("seq", &self.seq)
            .finish_non_exhaustive()
    }
}

// === impl ReservedCharge ===

impl Settle for ReservedCharge {
    fn settle(&self, reserved: Cost, used: Cost) {
        let shared = &self.limiter.handle.shared;
        let cut_off = shared.with_coordinator(|coordinator| {
            // What is given back tells nothing about what calls use.
            if used != Cost::none() {
                coordinator.record_used(reserved, used);
            }
            coordinator.settle(self.reservation, reserved, used);
            coordinator.cut_off(reserved, used)
        });
        if let Some(budget) = cut_off {
            warn_of_cut_off(budget, used);
        }
        if reserved != used {
            shared.notify_driver();
        }
    }
}
