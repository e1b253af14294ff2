//! [`Coordinator`]: the logic of one member of the quota. It keeps the waiters of this process and what the store
//! replied last, and decides what to request from the store next. The [driver](super::driver) sends the requests.
//! Callers pass the time to the coordinator, which does no I/O, and holds no lock and no timer.

mod limits;
mod pause;
mod reply;
mod reports;
mod request;
mod server_clock;
mod store_view;

pub(super) use pause::PauseEnds;
use pause::PauseReport;
pub(super) use request::RequestSnapshot;

use self::{
    limits::SharedLimits, pause::MemberPauses, reports::Reports, server_clock::ServerClock, store_view::StoreView,
};
use super::{
    fallback::{LocalFallback, LocalShare},
    loss::{CircuitBreaker, LossLog, OnStoreLoss},
    problem::StoreError,
    quota_config::QuotaConfig,
    waiters::{MAX_LATENESS, Reservation, WaiterStage, Waiters},
    wire::Member,
};
use crate::{
    error::{AcquireError, CostExceedsBurst, StoreProblem, StoreUnavailable},
    rate::{
        Bursts, Demand,
        budget::Budget,
        cost::{Cost, PerBudget},
        pause::{Pause, PauseChange, PauseSource},
        used_share::UsedShares,
    },
};
use std::{sync::Arc, task::Waker};
use tokio::time::{Duration, Instant};

/// The largest number of costs in one request to the store.
const MAX_COSTS: usize = 1_000;

/// The settings of a member, which do not change after it was built.
#[derive(Clone, Debug)]
pub(super) struct MemberSettings {
    pub(super) member: Member,
    pub(super) on_loss: OnStoreLoss,
    pub(super) max_ahead: Duration,
    /// The number of members to assume if the store has counted fewer.
    pub(super) min_members: u64,
    pub(super) patience: Option<Duration>,
}

pub(super) struct Coordinator {
    settings: MemberSettings,
    pub(super) counts: Counts,
    waiters: Waiters,
    /// The sequence numbers of the waiters whose costs are in the request to the store that is in flight.
    in_flight: Vec<u64>,
    /// The largest number of costs in the next request to the store.
    most_costs: usize,
    /// The waiter whose cost has claimed the next reservation of all members, by the store's last reply.
    claim: Option<u64>,
    /// Whether the call that held the claim was dropped, which has not reached the store yet.
    is_claim_dropped: bool,

    limits: SharedLimits,
    pauses: MemberPauses,
    reports: Reports,
    /// Whether the debts of the buckets are to be forgiven, which has not reached the store yet.
    is_forgiving: bool,
    /// Whether this member charges estimates, as far as is known.
    has_estimates: bool,
    used_shares: UsedShares,

    store: StoreView,
    server_clock: ServerClock,
    breaker: CircuitBreaker,
    /// Logs the loss of the store, again and again while it lasts.
    loss_log: LossLog,
    /// Why the last request that failed has failed.
    last_problem: StoreProblem,
    /// Whether the store's last reply said that the state of the quota is that of another release. Calls are rejected then,
    /// and not admitted by local shares: the members of the other release admit the whole rates.
    is_other_version: bool,
    /// The schedule by which calls are admitted without the store; `Some` only while the store is lost.
    fallback: Option<LocalFallback>,

    /// When the last request to the store was sent.
    requested_at: Option<Instant>,
    /// When to request the costs of the waiters in the queue from the store; `None` if that may be done at once.
    retry_at: Option<Instant>,
    /// Whether the limiter was dropped, so that this member has to leave the quota.
    is_leaving: bool,
    /// Whether the request to the store that reports that this member leaves has ended, by a reply or by a failure.
    has_left: bool,
}

/// The counters of [`StoreStatus`](super::StoreStatus), which only grow.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    pub(super) requests: u64,
    pub(super) failures: u64,
    pub(super) losses: u64,
    pub(super) state_losses: u64,
    pub(super) admitted_without_store: u64,
    pub(super) expired_reservations: u64,
}

/// What a waiter has to do after it was polled.
pub(super) enum WaiterStep {
    /// The waiter is admitted, and removed.
    Admitted(Reservation),
    /// The waiter has a reservation for this instant, and has to poll again then.
    ReservedAt(Instant),
    /// The waiter was put into the queue, and has to notify the driver.
    Queued,
    /// The waiter only waits. It is woken when it is given a reservation or is rejected.
    Waiting,
}

impl Coordinator {
    pub(super) fn new(settings: MemberSettings, config: QuotaConfig) -> Self {
        Self {
            settings,
            counts: Counts::default(),
            waiters: Waiters::default(),
            in_flight: Vec::new(),
            most_costs: MAX_COSTS,
            claim: None,
            is_claim_dropped: false,
            limits: SharedLimits::new(config),
            pauses: MemberPauses::default(),
            reports: Reports::default(),
            is_forgiving: false,
            has_estimates: false,
            used_shares: UsedShares::default(),
            store: StoreView::default(),
            server_clock: ServerClock::default(),
            breaker: CircuitBreaker::default(),
            loss_log: LossLog::default(),
            last_problem: StoreProblem::NotConnected,
            is_other_version: false,
            fallback: None,
            requested_at: None,
            retry_at: None,
            is_leaving: false,
            has_left: false,
        }
    }

    // --- waiters

    /// Polls the waiter with the sequence number `seq`, or adds a waiter if `seq` is `None`. Afterwards `seq` is `Some`
    /// if the waiter still exists: then the caller has to remove the waiter if the call is dropped.
    pub(super) fn poll_waiter(
        &mut self,
        seq: &mut Option<u64>,
        cost: Cost,
        waker: Waker,
        now: Instant,
    ) -> Result<WaiterStep, AcquireError> {
        let Some(own) = *seq else {
            self.limits.check(cost)?;
            *seq = Some(self.waiters.push(cost, waker, now));
            return Ok(WaiterStep::Queued);
        };
        let reservation = match self.waiters.poll(own, waker) {
            WaiterStage::Waiting => return Ok(WaiterStep::Waiting),
            WaiterStage::Rejected(error) => {
                *seq = None;
                self.waiters.remove(own);
                return Err(error);
            }
            WaiterStage::Expired => {
                self.waiters.requeue(own);
                return Ok(WaiterStep::Queued);
            }
            WaiterStage::Reserved(reservation) => reservation,
        };
        if now < reservation.at {
            return Ok(WaiterStep::ReservedAt(reservation.at));
        }
        if now > reservation.at + MAX_LATENESS || self.paused_until(now).is_some() {
            // It is too late to use the reservation, or it falls into a pause: it is given back and another one is
            // requested.
            self.counts.expired_reservations += 1;
            self.waiters.requeue(own);
            self.settle(reservation, cost, Cost::default());
            return Ok(WaiterStep::Queued);
        }
        *seq = None;
        self.waiters.remove(own);
        Ok(WaiterStep::Admitted(reservation))
    }

    /// Lets a waiter not count among [what waits](Self::wait): a schedule gives its reservation to the call that goes next
    /// then, which is counted where it waits in the schedule.
    pub(super) fn set_of_schedule(&mut self, seq: u64) {
        self.waiters.set_of_schedule(seq);
    }

    /// Removes a waiter whose call was dropped, and gives back its reservation. Returns whether the driver has to be
    /// notified, because other calls of all members wait behind the claim of this one.
    pub(super) fn remove_waiter(&mut self, seq: u64) -> bool {
        let held_claim = self.claim.take_if(|claim| *claim == seq).is_some();
        self.is_claim_dropped |= held_claim;
        if let Some((cost, Some(reservation))) = self.waiters.remove(seq) {
            self.settle(reservation, cost, Cost::default());
        }
        held_claim
    }

    /// Settles a reservation: its call has used `used` instead of what was `reserved`.
    pub(super) fn settle(&mut self, reservation: Reservation, reserved: Cost, used: Cost) {
        let generation = reservation.generation;
        let config = self.limits.config();
        let (reserved, used) = (config.amounts(&reserved), config.amounts(&used));
        if reservation.is_from_store {
            self.reports.settle(generation, reserved, used);
        } else if self.fallback.as_ref().map(LocalFallback::generation) == Some(generation) {
            self.reports.settle_fallback(reserved, used);
        } else {
            // The local fallback that made the reservation has ended. All that it reserved is reported to the store as
            // used, so only what was used on top of the reservation still has to be charged.
            self.reports.settle_reported(reserved, used);
        }
    }

    /// Learns how much calls turn out to use: a call that was charged the estimate `reserved` has used `used`.
    pub(super) fn record_used(&mut self, reserved: Cost, used: Cost) {
        self.has_estimates = true;
        self.used_shares.record(&reserved, &used);
    }

    /// Declares that costs are charged as estimates, before the first of them is settled.
    pub(super) const fn expect_estimates(&mut self) {
        self.has_estimates = true;
    }

    /// Whether a debit of what was `used` above what was `reserved` is cut off in some bucket, even if that is full.
    /// Returns the budget of that bucket.
    pub(super) fn cut_off(&self, reserved: Cost, used: Cost) -> Option<Budget> {
        let config = self.config();
        let debit = config.amounts(&used).saturating_sub(config.amounts(&reserved));
        let mut specs = config.specs().iter();
        let cut_off = specs.find(|(budget, spec)| {
            u128::from(debit.of(*budget)).saturating_mul(spec.unit) > (spec.capacity + spec.max_debt).unsigned_abs()
        });
        cut_off.map(|(budget, _)| *budget)
    }

    /// Raises the buckets that are in debt to 0, for all members, with the next request to the store.
    pub(super) const fn forgive_debts(&mut self) {
        self.is_forgiving = true;
    }

    // --- limits and pauses

    pub(super) const fn bursts(&self) -> &Arc<Bursts> {
        self.limits.bursts()
    }

    pub(super) const fn config(&self) -> &Arc<QuotaConfig> {
        self.limits.config()
    }

    /// Sets the limits for all members. Returns the wakers of the waiters that are rejected, because they can no longer
    /// be admitted.
    pub(super) fn set_limits(&mut self, config: QuotaConfig) -> Vec<Waker> {
        self.limits.set(config);
        let mut wakers = Vec::new();
        self.on_limits_replaced(&mut wakers);
        wakers
    }

    /// Called when other limits apply in this process: what was computed from the former ones no longer holds.
    fn on_limits_replaced(&mut self, wakers: &mut Vec<Waker>) {
        if let Some(fallback) = &mut self.fallback {
            fallback.retry_at = None;
        }
        self.reports.retain(self.limits.config().budgets());
        self.retry_at = None;
        self.reject_too_large(wakers);
    }

    /// Rejects the waiters in the queue whose cost exceeds the burst of a bucket, and adds their wakers to `wakers`.
    fn reject_too_large(&mut self, wakers: &mut Vec<Waker>) {
        let limits = &self.limits;
        let reason = |cost| limits.check(cost).err().map(CostExceedsBurst::into);
        self.waiters.reject(|entry| reason(entry.cost), wakers);
    }

    pub(super) fn lower(&mut self, budget: Budget, period: Option<Duration>, remaining: u64) {
        self.limits.lower(budget, period, remaining);
    }

    #[cfg(feature = "http")]
    pub(super) fn lower_since(&mut self, budget: Budget, period: Option<Duration>, remaining: u64, elapsed: Duration) {
        self.limits.lower_since(budget, period, remaining, elapsed);
    }

    /// Sets the end of the pause of `source` for all members.
    pub(super) fn set_pause(&mut self, source: PauseSource, until: Instant, now: Instant) -> PauseChange {
        let change = self.pauses.set(source, until, now);
        if matches!(change, PauseChange::Shortened | PauseChange::Ended) {
            self.on_pause_shortened();
        }
        change
    }

    /// Takes over the pauses that the store has announced, because a member has changed them.
    pub(super) fn on_pauses(&mut self, ends: PauseEnds) {
        if self.pauses.on_store(PauseReport::default(), ends) {
            self.on_pause_shortened();
        }
        // The server announces its pauses also when something else has changed for those that wait: the limits, a debt, or
        // the claim of a call.
        self.retry_at = None;
    }

    /// Called when the last pause ends earlier: what waits for its end is requested at once.
    fn on_pause_shortened(&mut self) {
        self.retry_at = None;
        if let Some(fallback) = &mut self.fallback {
            fallback.retry_at = None;
        }
    }

    pub(super) fn paused_until(&self, now: Instant) -> Option<Instant> {
        self.pauses.until(now)
    }

    /// Returns the last pause if it ends after `instant`, which may be in the past.
    pub(super) fn pause_since(&self, instant: Instant) -> Option<Pause> {
        let until = self.pauses.until(instant)?;
        Some(Pause::new(self.pauses.source(), None, until))
    }

    // --- the store's status

    pub(super) const fn is_up(&self) -> bool {
        !self.breaker.is_open() && self.requested_at.is_some() && self.store.incarnation != 0
    }

    /// Returns why the last request to the store failed; `None` if it succeeded, or if there was none.
    pub(super) fn problem(&self) -> Option<StoreProblem> {
        self.breaker.failing_since().map(|_| self.last_problem)
    }

    pub(super) fn members(&self) -> u64 {
        self.store.members.max(self.settings.min_members)
    }

    /// Returns how much of each budget could be admitted at once, by the store's last reply; `None` for a budget that
    /// has no limit.
    pub(super) fn remaining(&self, now: Instant) -> PerBudget<Option<u64>> {
        let mut remaining = PerBudget::default();
        for budget in self.config().budgets() {
            let Some(of_budget) = remaining.entry(*budget) else {
                continue;
            };
            *of_budget = match self.store.scheduled_until {
                // The store has not replied yet, so its buckets are taken to be new.
                None => self.limits.initial(*budget),
                Some(scheduled_until) if scheduled_until > now => Some(0),
                Some(_) => Some(self.store.remaining.of(*budget).unwrap_or(0)),
            };
        }
        remaining
    }

    /// Returns how long a new call with `cost` will probably wait behind the waiters of this process and behind `ahead`:
    /// requests and tokens of calls that will wait before the new one. Estimates, also the unsettled ones, count as what
    /// calls turn out to use of them. Of other members only the reservations are counted, because their waiters are not
    /// known here.
    pub(super) fn wait(&self, cost: Cost, ahead: Demand, now: Instant) -> Duration {
        let scheduled_until = self.store.scheduled_until;
        let from = now
            .max(scheduled_until.unwrap_or(now))
            .max(self.pauses.until(now).unwrap_or(now));
        let mut queued = ahead;
        for cost in self.waiters.queued_calls() {
            queued += &cost;
        }
        let mut left = self.store.left.iter().copied();
        let waits = self.config().specs().iter().map(|(budget, spec)| {
            let left = if spec.kind.is_allowance() { left.next() } else { None };
            if spec.kind.refuses {
                // A call does not wait for such a rate.
                return Duration::ZERO;
            }
            let (mut before, mut refund) = (queued.of(*budget), 0);
            if self.has_estimates {
                let (share, estimated) = (
                    self.used_shares.of(*budget),
                    self.reports.estimated().of(*budget).into(),
                );
                (before, refund) = (share.of(before), estimated - share.of(estimated));
            }
            let needed = before.saturating_add(cost.of(*budget).into()).saturating_sub(refund);
            if spec.kind.calendar.is_some() {
                return self.store.time_until(spec, left, needed, from);
            }
            let needed = needed.saturating_mul(spec.unit);
            let available = scheduled_until.map_or(spec.initial as u128, |scheduled_until| {
                let elapsed = now.saturating_duration_since(scheduled_until).as_micros();
                let remaining = u128::from(self.store.remaining.of(*budget).unwrap_or(0)).saturating_mul(spec.unit);
                remaining
                    .saturating_add(elapsed.saturating_mul(spec.fill.into()))
                    .min(spec.capacity as u128)
            });
            let micros = needed.saturating_sub(available) / u128::from(spec.fill);
            Duration::from_micros(u64::try_from(micros).unwrap_or(u64::MAX))
        });
        (from - now).saturating_add(waits.max().unwrap_or_default())
    }

    // --- the driver

    /// Returns the wakers of all waiters of this process: not only of those in the queue, but also of those that are in
    /// a request to the store, have a reservation or are rejected.
    pub(super) fn wakers(&self) -> Vec<Waker> {
        self.waiters.wakers()
    }

    /// Takes the wakers that are no longer needed, so that the caller drops them after it has released the lock.
    pub(super) fn take_discarded_wakers(&mut self) -> Vec<Waker> {
        self.waiters.take_discarded()
    }

    /// Called when the limiter was dropped: the next request to the store reports that this member leaves.
    pub(super) fn leave(&mut self) {
        self.is_leaving = true;
    }

    /// Whether the limiter was dropped.
    pub(super) const fn is_leaving(&self) -> bool {
        self.is_leaving
    }

    /// Whether the driver can end: the limiter was dropped, and either the driver has reported that to the store, or
    /// the store has never replied.
    pub(super) const fn has_ended(&self) -> bool {
        self.is_leaving && (self.has_left || self.store.incarnation == 0)
    }

    /// Called when the driver has ended, and with it the request in flight, whose waiters are put back into the queue.
    /// A panic counts as a failure of the store, so that the next driver does not cause it again at once.
    pub(super) fn on_driver_exit(&mut self, is_panic: bool, now: Instant) {
        if is_panic {
            self.record_failure(StoreError::new(StoreProblem::Client), now);
        }
        for seq in std::mem::take(&mut self.in_flight) {
            self.waiters.on_not_reserved(seq);
        }
    }

    /// Returns when the driver has to look for work again, if it is not notified before.
    pub(super) fn next_wakeup(&self, is_in_flight: bool, now: Instant) -> Option<Instant> {
        let patience = self.settings.patience.filter(|_| self.is_closed());
        let rejection = patience.and_then(|patience| Some(self.waiters.oldest()? + patience));
        let fallback = self.fallback.as_ref().filter(|_| self.is_serving_locally());
        let fallback = fallback.filter(|_| !self.waiters.is_queue_empty());
        let fallback = fallback.map(|fallback| fallback.retry_at.unwrap_or(now));
        let request = (!is_in_flight && !self.has_left).then(|| self.next_request_at(now));
        let expiry = self.waiters.next_expiry();
        [expiry, rejection, fallback, request].into_iter().flatten().min()
    }

    /// Whether the waiters in the queue can only wait for the store to come back: it is lost, and the setting is
    /// [`OnStoreLoss::Closed`].
    fn is_closed(&self) -> bool {
        self.breaker.is_open() && self.settings.on_loss == OnStoreLoss::Closed
    }

    /// Whether the waiters in the queue are given reservations without the store, because it is lost.
    fn is_serving_locally(&self) -> bool {
        self.breaker.is_open()
            && self.settings.on_loss != OnStoreLoss::Closed
            && (!self.is_other_version || self.settings.on_loss == OnStoreLoss::Open)
    }

    /// Does what can be done without the store: takes back reservations that were not used in time, rejects waiters
    /// that have waited too long for a lost store, and gives the waiters in the queue reservations from the local
    /// fallback.
    pub(super) fn serve_locally(&mut self, now: Instant, wakers: &mut Vec<Waker>) {
        self.expire_reservations(now);
        self.reject_out_of_patience(now, wakers);
        let is_retry_due = self.breaker.retry_at().is_none_or(|at| at <= now);
        if self.is_other_version && !is_retry_due && self.settings.on_loss != OnStoreLoss::Open {
            let problem = self.last_problem;
            let error = |since| StoreUnavailable::new(problem, now.saturating_duration_since(since));
            self.waiters
                .reject(|entry| Some(AcquireError::StoreUnavailable(error(entry.since))), wakers);
        }
        if self.is_serving_locally() {
            self.reserve_from_fallback(now, wakers);
        }
    }

    fn expire_reservations(&mut self, now: Instant) {
        let mut expired = Vec::new();
        self.waiters
            .expire(now, |cost, reservation| expired.push((cost, reservation)));
        for (cost, reservation) in expired {
            self.counts.expired_reservations += 1;
            self.settle(reservation, cost, Cost::default());
        }
    }

    fn reject_out_of_patience(&mut self, now: Instant, wakers: &mut Vec<Waker>) {
        let Some(patience) = self.settings.patience.filter(|_| self.is_closed()) else {
            return;
        };
        let problem = self.last_problem;
        let reason = |since: Instant| {
            let waited = now.saturating_duration_since(since);
            (waited >= patience).then(|| StoreUnavailable::new(problem, waited))
        };
        self.waiters
            .reject(|entry| reason(entry.since).map(AcquireError::StoreUnavailable), wakers);
    }

    fn reserve_from_fallback(&mut self, now: Instant, wakers: &mut Vec<Waker>) {
        let members = self.members();
        let paused_until = self.paused_until(now);
        let is_unlimited = self.settings.on_loss == OnStoreLoss::Open;
        let Some(fallback) = &mut self.fallback else { return };
        if fallback.retry_at.is_some_and(|retry_at| retry_at > now) {
            return;
        }
        if paused_until.is_some() && is_unlimited {
            fallback.retry_at = paused_until;
            return;
        }
        let queued: Vec<_> = self.waiters.queued().take(MAX_COSTS).collect();
        if queued.is_empty() {
            return;
        }
        let times = if is_unlimited {
            vec![Ok(now); queued.len()]
        } else {
            let costs: Vec<_> = queued.iter().map(|(_, cost)| *cost).collect();
            let share = LocalShare {
                limits: self.limits.config().share(members, &self.store.left),
                clock: self.store.clock(now),
            };
            fallback.reserve(share, &costs, paused_until, now)
        };
        for ((seq, cost), at) in queued.into_iter().zip(times) {
            let at = match at {
                Ok(at) => at,
                Err(exhausted) => {
                    self.waiters.reject_one(seq, exhausted.into(), wakers);
                    continue;
                }
            };
            let amounts = self.limits.config().amounts(&cost);
            self.reports.on_fallback_reserved(amounts, now);
            self.counts.admitted_without_store += 1;
            let reservation = Reservation {
                at,
                at_store: 0,
                is_from_store: false,
                generation: fallback.generation(),
            };
            // `on_reserved` always finds the waiter: it was in the queue just now, so it has not been dropped.
            let _ = self.waiters.on_reserved(seq, reservation, wakers);
        }
    }
}
