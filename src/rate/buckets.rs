//! [`Buckets`]: all buckets of one limiter. It charges all of them or none, and implements pauses and catching up.

use super::{
    bucket::Bucket,
    limits::{Budget, Cost, Demand, Limits},
};
use crate::{
    clock::{LazyNow, nanos_between},
    error::{CostExceedsBurst, InvalidConfig},
    wait_queue::{Availability, Resource},
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::time::Instant;

/// How far back the limiter admits a waiter that was woken late, in nanoseconds. The waiter is admitted *as of* the
/// time at which its cost became available, but at most this long ago.
///
/// 5 ms compensate for timers, whose resolution is a millisecond, but do not let a runtime that was blocked for longer
/// send everything it missed as one burst.
const MAX_CATCH_UP_NANOS: u64 = 5_000_000;

/// What a limiter has left at one instant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Available {
    /// The requests that can be admitted at once: the minimum over all request rates. `None` if requests are not
    /// limited.
    pub requests: Option<u64>,
    /// The tokens that can be admitted at once: the minimum over all token rates. `None` if tokens are not limited.
    pub tokens: Option<u64>,
    /// The end of the current pause. `None` without a pause.
    pub paused_until: Option<Instant>,
}

/// The largest cost that one call may have, per budget. It is read without the limiter's lock.
#[derive(Debug, Default)]
pub(crate) struct Bursts {
    requests: AtomicU64,
    tokens: AtomicU64,
}

/// All buckets of a limiter, as the resource of its wait queue. Times are nanoseconds since `epoch`.
pub(super) struct Buckets {
    bursts: Arc<Bursts>,
    limits: Limits,
    /// One bucket for each rate of `limits`, in the same order.
    buckets: Vec<(Budget, Bucket)>,
    /// How often the limits have been replaced.
    limits_version: u64,
    epoch: Instant,
    /// The time up to which the buckets are filled. While calls wait, it is behind the present.
    filled_to: u64,
    paused_until: u64,
    last_admission: Admitted,
    /// The sum of the costs of all waiters in the queue.
    queued: Demand,
    /// The time as of which `try_take` will admit, as computed by the last call of `availability`.
    admission_time: u64,
}

/// The last admission of a call that had to wait.
#[derive(Clone, Copy, Default)]
struct Admitted {
    /// When it was admitted.
    at: u64,
    /// How much earlier its cost was available.
    lateness: u64,
}

/// What one call wants to be charged.
#[derive(Clone)]
pub(super) struct ChargeRequest {
    pub(super) cost: Cost,
    /// Present if the cost is an estimate: receives the version of the limits that charge it.
    pub(super) limits_version: Option<Arc<AtomicU64>>,
}

// === impl Bursts ===

impl Bursts {
    fn of(buckets: &[(Budget, Bucket)]) -> Self {
        let bursts = Self::default();
        bursts.set(&buckets.iter().map(|(budget, bucket)| (*budget, bucket.burst())));
        bursts
    }

    /// Replaces the bursts by the smallest one of each budget in `all`.
    pub(super) fn set(&self, all: &(impl Iterator<Item = (Budget, u64)> + Clone)) {
        let min = |budget| {
            let bursts = all.clone().filter(|(of, _)| *of == budget).map(|(_, burst)| burst);
            bursts.min().unwrap_or(u64::MAX)
        };
        self.requests.store(min(Budget::Requests), Ordering::Release);
        self.tokens.store(min(Budget::Tokens), Ordering::Release);
    }

    /// Checks that `cost` does not exceed a burst.
    pub(crate) fn check(&self, cost: Cost) -> Result<(), CostExceedsBurst> {
        for (budget, burst) in [(Budget::Requests, &self.requests), (Budget::Tokens, &self.tokens)] {
            let burst = burst.load(Ordering::Acquire);
            if cost.of(budget) > burst {
                return Err(CostExceedsBurst::new(budget.name(), cost.of(budget), burst));
            }
        }
        Ok(())
    }
}

// === impl Buckets ===

impl Buckets {
    pub(super) fn new(limits: Limits) -> Result<Self, InvalidConfig> {
        let buckets = limits.buckets()?;
        Ok(Self {
            bursts: Arc::new(Bursts::of(&buckets)),
            limits,
            buckets,
            limits_version: 0,
            epoch: Instant::now(),
            filled_to: 0,
            paused_until: 0,
            last_admission: Admitted::default(),
            queued: Demand::default(),
            admission_time: 0,
        })
    }

    pub(super) const fn limits(&self) -> &Limits {
        &self.limits
    }

    pub(super) const fn bursts(&self) -> &Arc<Bursts> {
        &self.bursts
    }

    /// Fills the buckets up to `time`.
    fn fill_to(&mut self, time: u64) {
        if time > self.filled_to {
            let elapsed = time - self.filled_to;
            self.buckets.iter_mut().for_each(|(_, bucket)| bucket.advance(elapsed));
            self.filled_to = time;
        }
    }

    /// Moves `filled_to` forward while no call waits, and returns by how many nanoseconds. The caller must advance
    /// every bucket by that.
    ///
    /// It moves to the present, except for 5 ms after a waiter was admitted late. The buckets are then filled up to the
    /// time as of which the waiter was admitted. Filling them up to the present would overflow a small burst and lose
    /// what the lateness is worth. So `filled_to` stays behind by the lateness, and a caller that returns at once is
    /// admitted as of the time that it missed. Without this, a few callers in a loop would not reach the rate.
    fn advance_idle(&mut self, now: &mut LazyNow) -> u64 {
        let now = now.nanos_since(self.epoch);
        let Admitted { at, lateness } = self.last_admission;
        let behind = if lateness > 0 && now.saturating_sub(at) <= MAX_CATCH_UP_NANOS {
            lateness.min(MAX_CATCH_UP_NANOS)
        } else {
            0
        };
        let filled_to = now.saturating_sub(behind).max(self.filled_to);
        let elapsed = filled_to - self.filled_to;
        self.filled_to = filled_to;
        elapsed
    }

    /// Whether every bucket has `cost`.
    fn has(&self, cost: Cost) -> bool {
        self.buckets.iter().all(|(budget, bucket)| bucket.has(cost.of(*budget)))
    }

    /// Charges every bucket, which must have the cost.
    fn charge(&mut self, request: &ChargeRequest) {
        for (budget, bucket) in &mut self.buckets {
            bucket.take(request.cost.of(*budget), request.limits_version.is_some());
        }
        if let Some(version) = &request.limits_version {
            version.store(self.limits_version, Ordering::Release);
        }
    }

    /// Returns the time as of which `cost` is admitted if no call is before it: when every bucket has it and no pause
    /// holds, but at most 5 ms ago.
    fn time_of_admission(&self, cost: Cost, now: u64) -> u64 {
        let earliest = self
            .filled_to
            .max(now.saturating_sub(MAX_CATCH_UP_NANOS))
            .max(self.paused_until);
        if self.has(cost) {
            return earliest;
        }
        let waits = self
            .buckets
            .iter()
            .map(|(budget, bucket)| bucket.time_until(cost.of(*budget).into()));
        earliest.max(self.filled_to.saturating_add(waits.fold(0, u64::max)))
    }

    /// Returns how long a new call of this cost would wait, behind the waiters in the queue and behind `ahead`, the
    /// calls that will join the queue before it.
    pub(super) fn wait(&mut self, cost: Cost, ahead: Demand, now: &mut LazyNow) -> Duration {
        let now = now.nanos_since(self.epoch);
        let waits = self.buckets.iter().map(|(budget, bucket)| {
            let before = self.queued.of(*budget) + ahead.of(*budget);
            bucket.time_until(before + u128::from(cost.of(*budget)))
        });
        // The waiters in the queue have not been charged, even if their costs are available by now. So the wait begins
        // at `filled_to`.
        let admission = self
            .filled_to
            .saturating_add(waits.fold(0, u64::max))
            .max(self.paused_until);
        Duration::from_nanos(admission.saturating_sub(now))
    }

    pub(super) fn available(&mut self, now: &mut LazyNow) -> Available {
        let elapsed = now.nanos_since(self.epoch).saturating_sub(self.filled_to);
        let min = |budget| {
            let available = self.buckets.iter().filter(|(of, _)| *of == budget).map(|(_, bucket)| {
                let mut bucket = bucket.clone();
                bucket.advance(elapsed);
                bucket.available()
            });
            available.min()
        };
        let paused_until = self.epoch.checked_add(Duration::from_nanos(self.paused_until));
        Available {
            requests: min(Budget::Requests),
            tokens: min(Budget::Tokens),
            paused_until: paused_until.filter(|until| *until > now.get()),
        }
    }

    /// Replaces the limits. The first new rate of a budget takes over the bucket of its first old rate, and so on.
    pub(super) fn set_limits(&mut self, limits: Limits, now: &mut LazyNow) -> Result<(), InvalidConfig> {
        let mut new = limits.buckets()?;
        let now = now.nanos_since(self.epoch);
        self.fill_to(now);
        self.limits_version += 1;
        new.iter_mut()
            .for_each(|(_, new)| new.set_limits_version(self.limits_version));
        for budget in [Budget::Requests, Budget::Tokens] {
            let old = self.buckets.iter().filter(|(of, _)| *of == budget);
            let new = new.iter_mut().filter(|(of, _)| *of == budget);
            for ((_, new), (_, old)) in new.zip(old) {
                new.carry_over(old);
            }
        }
        self.bursts
            .set(&new.iter().map(|(budget, bucket)| (*budget, bucket.burst())));
        self.buckets = new;
        self.limits = limits;
        Ok(())
    }

    /// Lowers the balance of one rate to `left`; never raises it. Does nothing if there is no such rate.
    pub(super) fn lower(&mut self, budget: Budget, period: Option<Duration>, left: u64, now: &mut LazyNow) {
        self.fill_if_idle(now);
        let index = self.limits.index_of(budget, period);
        if let Some((_, bucket)) = index.and_then(|index| self.buckets.get_mut(index)) {
            bucket.lower(left);
        }
    }

    /// Extends the pause to `until`; never shortens it. `None` is an instant too far away to be represented.
    pub(super) fn pause(&mut self, until: Option<Instant>) {
        let until = until.map_or(u64::MAX, |until| nanos_between(self.epoch, until));
        self.paused_until = self.paused_until.max(until);
    }

    /// Replaces the cost `estimate`, which the limits of `limits_version` charged, by what was `used`.
    pub(super) fn settle(&mut self, estimate: Cost, limits_version: u64, used: Cost, now: &mut LazyNow) {
        self.fill_if_idle(now);
        for (budget, bucket) in &mut self.buckets {
            bucket.settle(estimate.of(*budget), used.of(*budget), limits_version);
        }
    }

    /// Fills the buckets before their balance is changed from outside. While calls wait, the buckets are not filled:
    /// the first waiter may still be admitted as of a time in the past.
    fn fill_if_idle(&mut self, now: &mut LazyNow) {
        if self.queued == Demand::default() {
            self.on_idle(now);
        }
    }
}

impl Resource for Buckets {
    type Request = ChargeRequest;
    type Rejection = CostExceedsBurst;

    fn rejection(&self, request: &ChargeRequest) -> Option<CostExceedsBurst> {
        self.buckets.iter().find_map(|(budget, bucket)| {
            let cost = request.cost.of(*budget);
            (cost > bucket.burst()).then(|| CostExceedsBurst::new(budget.name(), cost, bucket.burst()))
        })
    }

    fn availability(&mut self, request: &ChargeRequest, now: &mut LazyNow) -> Availability {
        let now = now.nanos_since(self.epoch);
        self.admission_time = self.time_of_admission(request.cost, now);
        if self.admission_time <= now {
            return Availability::Now;
        }
        let admission = self.epoch.checked_add(Duration::from_nanos(self.admission_time));
        Availability::At(admission.unwrap_or_else(|| far_future(self.epoch)))
    }

    fn try_take(&mut self, request: &ChargeRequest, waited: bool, now: &mut LazyNow) -> bool {
        // The queue has just called `availability` with this request, which set `admission_time`.
        self.fill_to(self.admission_time);
        self.charge(request);
        if waited {
            let now = now.nanos_since(self.epoch);
            self.last_admission = Admitted {
                at: now,
                lateness: now.saturating_sub(self.admission_time),
            };
        }
        true
    }

    fn on_idle(&mut self, now: &mut LazyNow) {
        let elapsed = self.advance_idle(now);
        self.buckets.iter_mut().for_each(|(_, bucket)| bucket.advance(elapsed));
    }

    fn try_take_uncontended(&mut self, request: &ChargeRequest, now: &mut LazyNow) -> Result<bool, CostExceedsBurst> {
        // The fast path fills and checks the buckets in one pass.
        let elapsed = self.advance_idle(now);
        let mut is_available = self.paused_until <= self.filled_to;
        for (budget, bucket) in &mut self.buckets {
            bucket.advance(elapsed);
            is_available &= bucket.has(request.cost.of(*budget));
        }
        if is_available {
            self.charge(request);
            return Ok(true);
        }
        match self.rejection(request) {
            Some(rejection) => Err(rejection),
            None => Ok(self.availability(request, now) == Availability::Now && self.try_take(request, false, now)),
        }
    }

    fn on_enqueue(&mut self, request: &ChargeRequest) {
        self.queued += request.cost;
    }

    fn on_dequeue(&mut self, request: &ChargeRequest) {
        self.queued -= request.cost;
    }
}

/// An instant for an admission that is too far away to be represented: a year after `epoch`.
fn far_future(epoch: Instant) -> Instant {
    epoch
        .checked_add(Duration::from_secs(60 * 60 * 24 * 365))
        .unwrap_or(epoch)
}
