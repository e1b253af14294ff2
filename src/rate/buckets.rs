//! All buckets of a limiter, and what happens between them: all or nothing, pauses, catching up.

use super::{
    bucket::Bucket,
    limits::{Budget, Cost, Limits},
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

/// How far the limiter looks back for a waiter that was woken late: it is admitted *as of* the moment its tokens were
/// there, but not further back than this.
///
/// It makes up for timers, which are a millisecond coarse, without letting a runtime that stood still come back as a
/// burst.
const CATCH_UP_NANOS: u64 = 5_000_000;

/// What is left, at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Available {
    /// Requests that could go at once: the least of all request rates. `None`: not limited.
    pub requests: Option<u64>,
    /// Tokens that could go at once: the least of all token rates. `None`: not limited.
    pub tokens: Option<u64>,
    /// When a pause ends, if there is one.
    pub paused_until: Option<Instant>,
}

/// The most a call may cost, to be told without the limiter's lock.
#[derive(Debug, Default)]
pub(crate) struct Bursts {
    requests: AtomicU64,
    tokens: AtomicU64,
}

/// All buckets of a limiter, and what happens between them: all or nothing, pauses, catching up.
pub(super) struct Buckets {
    bursts: Arc<Bursts>,
    limits: Limits,
    /// One for each rate of the limits, in their order.
    buckets: Vec<(Budget, Bucket)>,
    /// How often they were replaced.
    replaced: u64,
    epoch: Instant,
    /// Nanoseconds since `epoch` that the buckets have seen.
    at: u64,
    paused_until: u64,
    /// When a waiter was last admitted, and how late that was.
    late: (u64, u64),
    /// What those in queue will take.
    ahead: (u128, u128),
    /// The moment as of which the last one was found to be admitted.
    admitted: u64,
}

#[derive(Clone)]
pub(super) struct ChargeRequest {
    pub(super) cost: Cost,
    /// If it is an estimate: to be told the number of the limits that charge it.
    pub(super) estimate: Option<Arc<AtomicU64>>,
}

// === impl Bursts ===

impl Bursts {
    fn of(buckets: &[(Budget, Bucket)]) -> Self {
        let bursts = Self::default();
        bursts.set(&buckets.iter().map(|(budget, bucket)| (*budget, bucket.burst())));
        bursts
    }

    pub(super) fn set(&self, all: &(impl Iterator<Item = (Budget, u64)> + Clone)) {
        let least = |budget| {
            let bursts = all.clone().filter(|(of, _)| *of == budget).map(|(_, burst)| burst);
            bursts.min().unwrap_or(u64::MAX)
        };
        self.requests.store(least(Budget::Requests), Ordering::Release);
        self.tokens.store(least(Budget::Tokens), Ordering::Release);
    }

    /// Whether `cost` could try_take at all.
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
            replaced: 0,
            epoch: Instant::now(),
            at: 0,
            paused_until: 0,
            late: (0, 0),
            ahead: (0, 0),
            admitted: 0,
        })
    }

    pub(super) const fn limits(&self) -> &Limits {
        &self.limits
    }

    pub(super) const fn bursts(&self) -> &Arc<Bursts> {
        &self.bursts
    }

    fn advance_to(&mut self, at: u64) {
        if at > self.at {
            let elapsed = at - self.at;
            self.buckets.iter_mut().for_each(|(_, bucket)| bucket.advance(elapsed));
            self.at = at;
        }
    }

    /// Moves on to now, and returns the nanoseconds by which the buckets are to follow.
    ///
    /// Time in which nobody waited fills the buckets and is gone. Only a caller that comes right back after having been
    /// woken late may still use what that lateness kept from it, or a few callers in a loop would never reach the rate.
    fn elapsed_idle(&mut self, clock: &mut LazyNow) -> u64 {
        let now = clock.nanos_since(self.epoch);
        let (woken, late) = self.late;
        let owed = if late > 0 && now.saturating_sub(woken) <= CATCH_UP_NANOS {
            late.min(CATCH_UP_NANOS)
        } else {
            0
        };
        let until = now.saturating_sub(owed).max(self.at);
        let elapsed = until - self.at;
        self.at = until;
        elapsed
    }

    /// Whether `cost` is there, in all buckets.
    fn have(&self, cost: Cost) -> bool {
        self.buckets.iter().all(|(budget, bucket)| bucket.has(cost.of(*budget)))
    }

    fn take(&mut self, request: &ChargeRequest) {
        for (budget, bucket) in &mut self.buckets {
            bucket.take(request.cost.of(*budget), request.estimate.is_some());
        }
        if let Some(limits) = &request.estimate {
            limits.store(self.replaced, Ordering::Release);
        }
    }

    /// The moment as of which `cost` is admitted, given that nobody is before it.
    fn admits(&self, cost: Cost, now: u64) -> u64 {
        let earliest = self.at.max(now.saturating_sub(CATCH_UP_NANOS)).max(self.paused_until);
        if self.have(cost) {
            return earliest;
        }
        let waits = self
            .buckets
            .iter()
            .map(|(budget, bucket)| bucket.wait(cost.of(*budget).into()));
        earliest.max(self.at.saturating_add(waits.fold(0, u64::max)))
    }

    /// How long a newcomer would wait.
    pub(super) fn wait(&mut self, cost: Cost, clock: &mut LazyNow) -> Duration {
        self.wait_behind((0, 0), cost, clock)
    }

    /// How long it would wait behind others who will take so much, beside those in queue.
    pub(super) fn wait_behind(&mut self, others: (u128, u128), cost: Cost, clock: &mut LazyNow) -> Duration {
        let now = clock.nanos_since(self.epoch);
        let filled = self.buckets.iter().map(|(budget, bucket)| {
            let ahead = match budget {
                Budget::Requests => self.ahead.0 + others.0,
                Budget::Tokens => self.ahead.1 + others.1,
            };
            bucket.wait(ahead + u128::from(cost.of(*budget)))
        });
        let at = self.at.saturating_add(filled.fold(0, u64::max)).max(self.paused_until);
        // Whoever is before us has yet to go, even if its tokens are there.
        Duration::from_nanos(at.saturating_sub(now))
    }

    pub(super) fn available(&mut self, clock: &mut LazyNow) -> Available {
        let elapsed = clock.nanos_since(self.epoch).saturating_sub(self.at);
        let least = |budget| {
            let left = self.buckets.iter().filter(|(of, _)| *of == budget).map(|(_, bucket)| {
                let mut bucket = bucket.clone();
                bucket.advance(elapsed);
                bucket.available()
            });
            left.min()
        };
        let paused = self.epoch.checked_add(Duration::from_nanos(self.paused_until));
        Available {
            requests: least(Budget::Requests),
            tokens: least(Budget::Tokens),
            paused_until: paused.filter(|until| *until > clock.now()),
        }
    }

    pub(super) fn replace(&mut self, limits: Limits, clock: &mut LazyNow) -> Result<(), InvalidConfig> {
        let mut new = limits.buckets()?;
        let now = clock.nanos_since(self.epoch);
        self.advance_to(now);
        self.replaced += 1;
        new.iter_mut().for_each(|(_, new)| new.came_with(self.replaced));
        for budget in [Budget::Requests, Budget::Tokens] {
            let old = self.buckets.iter().filter(|(of, _)| *of == budget);
            let new = new.iter_mut().filter(|(of, _)| *of == budget);
            for ((_, new), (_, old)) in new.zip(old) {
                new.resize(old);
            }
        }
        self.bursts
            .set(&new.iter().map(|(budget, bucket)| (*budget, bucket.burst())));
        self.buckets = new;
        self.limits = limits;
        Ok(())
    }

    /// What is said of a rate, by somebody who knows: there is no more left of it.
    pub(super) fn lower(&mut self, budget: Budget, period: Option<Duration>, left: u64, clock: &mut LazyNow) {
        self.catch_up(clock);
        let said = self.limits.position(budget, period);
        if let Some((_, bucket)) = said.and_then(|at| self.buckets.get_mut(at)) {
            bucket.lower(left);
        }
    }

    pub(super) fn pause(&mut self, until: Option<Instant>) {
        let until = until.map_or(u64::MAX, |until| nanos_between(self.epoch, until));
        self.paused_until = self.paused_until.max(until);
    }

    /// Before a balance is changed from outside. While somebody waits, time is not moved on: a moment that has passed may
    /// still be owed to the first in queue.
    fn catch_up(&mut self, clock: &mut LazyNow) {
        if self.ahead == (0, 0) {
            self.on_idle(clock);
        }
    }

    /// An estimate that was charged by the limits of this number turns out to have been `used`.
    pub(super) fn settle(&mut self, estimate: Cost, limits: u64, used: Cost, clock: &mut LazyNow) {
        self.catch_up(clock);
        for (budget, bucket) in &mut self.buckets {
            bucket.settle(estimate.of(*budget), used.of(*budget), limits);
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

    fn availability(&mut self, request: &ChargeRequest, clock: &mut LazyNow) -> Availability {
        let now = clock.nanos_since(self.epoch);
        let at = self.admits(request.cost, now);
        self.admitted = at;
        if at <= now {
            return Availability::Now;
        }
        // A moment that cannot be told is a very long time away.
        let far = || clock_far(self.epoch);
        Availability::At(self.epoch.checked_add(Duration::from_nanos(at)).unwrap_or_else(far))
    }

    fn try_take(&mut self, request: &ChargeRequest, waited: bool, clock: &mut LazyNow) -> bool {
        // `availability` has just found out.
        let at = self.admitted;
        self.advance_to(at);
        self.take(request);
        if waited {
            let now = clock.nanos_since(self.epoch);
            self.late = (now, now.saturating_sub(at));
        }
        true
    }

    fn on_idle(&mut self, clock: &mut LazyNow) {
        let elapsed = self.elapsed_idle(clock);
        self.buckets.iter_mut().for_each(|(_, bucket)| bucket.advance(elapsed));
    }

    fn try_take_uncontended(&mut self, request: &ChargeRequest, clock: &mut LazyNow) -> Result<bool, CostExceedsBurst> {
        let elapsed = self.elapsed_idle(clock);
        let mut have = self.paused_until <= self.at;
        for (budget, bucket) in &mut self.buckets {
            bucket.advance(elapsed);
            have &= bucket.has(request.cost.of(*budget));
        }
        if have {
            self.take(request);
            return Ok(true);
        }
        match self.rejection(request) {
            Some(refusal) => Err(refusal),
            None => Ok(self.availability(request, clock) == Availability::Now && self.try_take(request, false, clock)),
        }
    }

    fn on_enqueue(&mut self, request: &ChargeRequest) {
        self.ahead.0 += u128::from(request.cost.requests);
        self.ahead.1 += u128::from(request.cost.tokens);
    }

    fn on_dequeue(&mut self, request: &ChargeRequest) {
        self.ahead.0 -= u128::from(request.cost.requests);
        self.ahead.1 -= u128::from(request.cost.tokens);
    }
}

fn clock_far(epoch: Instant) -> Instant {
    epoch
        .checked_add(Duration::from_secs(60 * 60 * 24 * 365))
        .unwrap_or(epoch)
}
