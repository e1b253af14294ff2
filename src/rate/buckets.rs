//! [`Buckets`]: all buckets of one rate limiter. A call is charged to all of them or to none. Pauses and catching up
//! after late wakeups are implemented here.

mod correcting;
mod pausing;
mod prediction;
mod resting;
mod saving;

use super::{
    available::Available,
    bucket::Bucket,
    budget::Budget,
    bursts::Bursts,
    calendar,
    charge_request::ChargeRequest,
    cost::{Cost, PerBudget},
    demand::Demand,
    limits::Limits,
    pause::Pauses,
    used_share::UsedShares,
};
#[cfg(feature = "http")]
use super::{followed::Followed, level_history::LevelHistory};
use crate::{
    clock::{LazyNow, nanos_between},
    error::{CostExceedsBurst, Exhausted, InvalidConfig, Rejected},
    wait_queue::{Availability, Resource},
};
use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::time::Instant;

/// How far back, in nanoseconds, the limiter admits a waiter that was woken late. The waiter is admitted *as of* the
/// time at which its cost became available, but no longer ago than this.
///
/// The 5 ms compensate for timers, whose resolution is a millisecond. A longer time would let a runtime that was
/// blocked send everything it missed as one burst.
const MAX_CATCH_UP_NANOS: u64 = 5_000_000;

/// How far behind the buckets the clock has to be, in nanoseconds, to count as set back. The clock of one runtime is
/// never set back. But a test's paused clock can run ahead of the clock that a limiter in a static is used with next.
const MIN_STEP_BACK_NANOS: u64 = 1_000_000_000;

/// All buckets of a rate limiter: what the waiters in its wait queue wait for. All times are nanoseconds since the
/// limiter's `epoch`.
pub(super) struct Buckets {
    bursts: Arc<Bursts>,
    limits: Limits,
    /// One bucket for each rate of `limits`, in the same order.
    pub(super) buckets: Box<[(Budget, Bucket)]>,
    /// Whether one of the rates refuses calls.
    has_caps: bool,
    /// Whether one of the rates counts by the calendar.
    has_windows: bool,
    /// The number of estimates that were charged.
    estimates: u64,
    epoch: Instant,
    /// The wall clock at `epoch`, in nanoseconds since 1970.
    wall_epoch: u64,
    /// The time up to which the buckets are filled. It is behind the present while calls wait, because a waiter may be
    /// admitted as of a time in the past.
    pub(super) filled_to: u64,
    pauses: Pauses<u64>,
    last_admission: Admitted,
    /// The waiters in the queue. `None` until a call has waited, so that an idle limiter takes little memory.
    queued: Option<Box<Queued>>,
    /// Whether costs are charged as estimates, as far as is known.
    has_estimates: bool,
    /// How much of their estimates calls use. `None` before the first settlement.
    used_shares: Option<Box<UsedShares>>,
    /// The levels of each bucket in the past, in the order of `buckets`. Empty until a call is [marked as
    /// sent](Self::mark_sent).
    #[cfg(feature = "http")]
    histories: Box<[LevelHistory]>,
    /// Present if the buckets follow those of a provider.
    #[cfg(feature = "http")]
    pub(super) followed: Option<Box<Followed>>,
    /// The time as of which `try_take` admits a call. The last call of `availability` has computed it.
    admission_time: u64,
}

/// The waiters in the queue of a limiter.
#[derive(Debug)]
struct Queued {
    waiters: usize,
    /// The sum of the costs of all waiters.
    demand: Demand,
    /// The part of `demand` that consists of estimates.
    estimates: Demand,
    /// The budget that the last of them that was admitted has waited for.
    waited_for: Budget,
    /// When the limiter was last paused. It matters only to calls that have waited before.
    paused_at: u64,
}

impl Default for Queued {
    fn default() -> Self {
        Self {
            waiters: 0,
            demand: Demand::default(),
            estimates: Demand::default(),
            waited_for: Budget::Requests,
            paused_at: 0,
        }
    }
}

/// The last admission of a call that had to wait.
#[derive(Clone, Copy, Default)]
struct Admitted {
    /// When the call was admitted, in nanoseconds since the limiter's epoch.
    at: u64,
    /// How much earlier the call's cost was available than the call was admitted: at most 5 ms, in nanoseconds.
    lateness: u32,
    /// The position of the bucket that made the call wait.
    binding: u32,
}

// === impl Buckets ===

impl Buckets {
    /// `wall_clock` is the current time, which rates by the calendar depend on.
    pub(super) fn new(limits: Limits, wall_clock: SystemTime) -> Result<Self, InvalidConfig> {
        Self::beginning_at(Instant::now(), limits, wall_clock)
    }

    /// Does what [`new`](Self::new) does for buckets that are full at `epoch`, when the wall clock shows `wall_clock`.
    pub(super) fn beginning_at(epoch: Instant, limits: Limits, wall_clock: SystemTime) -> Result<Self, InvalidConfig> {
        let wall_epoch = calendar::nanos(wall_clock);
        let buckets = limits.buckets(wall_epoch)?;
        Ok(Self {
            has_caps: buckets.iter().any(|(_, bucket)| bucket.refuses()),
            has_windows: buckets.iter().any(|(_, bucket)| bucket.until_window_ends().is_some()),
            wall_epoch,
            bursts: Arc::new(Bursts::of(&buckets)),
            limits,
            buckets: buckets.into(),
            estimates: 0,
            epoch,
            filled_to: 0,
            pauses: Pauses::default(),
            last_admission: Admitted::default(),
            queued: None,
            has_estimates: false,
            used_shares: None,
            #[cfg(feature = "http")]
            histories: Box::default(),
            #[cfg(feature = "http")]
            followed: None,
            admission_time: 0,
        })
    }

    pub(super) const fn limits(&self) -> &Limits {
        &self.limits
    }

    pub(super) const fn bursts(&self) -> &Arc<Bursts> {
        &self.bursts
    }

    /// Returns the current time.
    #[inline]
    pub(super) fn time(&mut self, now: &mut LazyNow) -> u64 {
        let time = now.nanos_since(self.epoch);
        if time < self.filled_to || time == 0 {
            return self.time_after_step_back(now);
        }
        time
    }

    /// Returns the current time, which seems to be before the time up to which the buckets are filled. If the clock was
    /// set back, all stored times are set back with it, so that no time has passed: the buckets hold what they held,
    /// and a pause is as long as it was. Otherwise no call would be admitted until the clock has caught up.
    #[cold]
    fn time_after_step_back(&mut self, now: &mut LazyNow) -> u64 {
        // The caller may have read the clock long before it got the lock, so the clock is read again.
        let mut current = LazyNow::default();
        let filled_at = self.epoch.checked_add(Duration::from_nanos(self.filled_to));
        let back = filled_at.map_or(0, |filled_at| nanos_between(current.get(), filled_at));
        if back < MIN_STEP_BACK_NANOS {
            return now.nanos_since(self.epoch);
        }
        self.pauses = self.pauses.map(|until| until.saturating_sub(self.filled_to));
        self.wall_epoch = self.wall_epoch.saturating_add(self.filled_to);
        self.filled_to = 0;
        self.last_admission = Admitted::default();
        #[cfg(feature = "http")]
        {
            self.histories = Box::default();
            if let Some(followed) = &mut self.followed {
                followed.on_step_back();
            }
        }
        self.epoch = current.get();
        *now = current;
        0
    }

    /// Fills the buckets up to `time`, unless they are filled further already.
    fn fill_to(&mut self, time: u64) {
        if time > self.filled_to {
            let elapsed = time - self.filled_to;
            self.buckets.iter_mut().for_each(|(_, bucket)| bucket.advance(elapsed));
            self.filled_to = time;
        }
    }

    /// Moves `filled_to`, the time up to which the buckets are filled, forward while no call waits, and returns the
    /// step in nanoseconds. The caller must then advance every bucket by this step.
    ///
    /// `filled_to` moves to the present, except within 5 ms after a waiter was admitted late, as of an earlier time. In
    /// these 5 ms, filling up to the present would overflow a bucket with a small burst, and what the rate yields in
    /// the time of the lateness would be lost. So `filled_to` stays behind the present by the lateness, and a caller
    /// that makes its next call at once is admitted as of a time that is earlier by the lateness. Without this, a few
    /// callers that make one call after another would not reach the rate.
    #[inline]
    fn advance_idle(&mut self, now: &mut LazyNow) -> u64 {
        let now = self.time(now);
        let Admitted { at, lateness, .. } = self.last_admission;
        let behind = if lateness > 0 && now.saturating_sub(at) <= MAX_CATCH_UP_NANOS {
            u64::from(lateness).min(MAX_CATCH_UP_NANOS)
        } else {
            0
        };
        let filled_to = now.saturating_sub(behind).max(self.filled_to);
        let elapsed = filled_to - self.filled_to;
        self.filled_to = filled_to;
        elapsed
    }

    /// Returns whether every bucket holds `cost`.
    fn has(&self, cost: &Cost) -> bool {
        self.buckets.iter().all(|(budget, bucket)| bucket.has(cost.of(*budget)))
    }

    /// Prepares the buckets for a charge as of `filled_to`, when it is `now`: those that did not make the call wait lose
    /// what has overflowed since. `binding` is the position of the one that did.
    #[cold]
    fn overflow(&mut self, now: u64, binding: Option<u32>) {
        let late = now.saturating_sub(self.filled_to);
        for (at, (_, bucket)) in (0..).zip(&mut self.buckets) {
            bucket.overflow(late, binding == Some(at), MAX_CATCH_UP_NANOS);
        }
    }

    /// Returns the position of the bucket that holds `cost` last.
    fn binding(&self, cost: &Cost) -> Option<u32> {
        let mut binding = None;
        let mut longest = 0;
        for (at, (budget, bucket)) in (0..).zip(&self.buckets) {
            let wait = bucket.time_until(cost.of(*budget));
            if wait > longest && !bucket.refuses() {
                (binding, longest) = (Some(at), wait);
            }
        }
        binding
    }

    /// Returns the budget that a call of this cost waits for: the one that has it last.
    pub(super) fn waits_for(&self, cost: &Cost) -> Budget {
        let lacking = self.binding(cost).and_then(|at| self.buckets.get(at as usize));
        lacking.map_or_else(|| self.limits.slowest(cost), |(budget, _)| *budget)
    }

    /// Returns the budget that the last admitted call that had to wait has waited for.
    pub(super) fn waited_for(&self) -> Budget {
        self.queued
            .as_ref()
            .map_or(Budget::Requests, |queued| queued.waited_for)
    }

    /// Returns why a rate that refuses calls does not admit one of this cost.
    #[cold]
    fn exhausted(&mut self, cost: &Cost, now: &mut LazyNow) -> Option<Exhausted> {
        let time = self.time(now);
        let behind = time.saturating_sub(self.filled_to);
        self.buckets.iter().find_map(|(budget, bucket)| {
            let amount = cost.of(*budget);
            let wait = bucket.time_until(amount).saturating_sub(behind);
            (bucket.refuses() && wait > 0).then(|| {
                let resets = self.wall_epoch.saturating_add(time).saturating_add(wait);
                Exhausted::new(
                    budget.name(),
                    amount,
                    bucket.available_after(behind),
                    Duration::from_nanos(wait),
                    SystemTime::UNIX_EPOCH + Duration::from_nanos(resets),
                )
            })
        })
    }

    /// Takes the cost of `request` from every bucket. Every bucket must hold it.
    #[inline]
    fn charge(&mut self, request: &ChargeRequest) {
        for (budget, bucket) in &mut self.buckets {
            bucket.take(request.cost.of(*budget), request.is_estimate());
        }
        self.number(request);
    }

    /// Gives the charged request its number, if its cost is an estimate.
    #[inline]
    fn number(&mut self, request: &ChargeRequest) {
        if request.is_estimate() {
            request.set_number(self.estimates);
            self.estimates += 1;
        }
    }

    /// Returns the time as of which a call of this cost is admitted if no call is before it: the time at which every
    /// bucket holds the cost and no pause is in force, or 5 ms ago if that is later.
    fn time_of_admission(&self, cost: &Cost, now: u64) -> u64 {
        let mut earliest = self
            .filled_to
            .max(now.saturating_sub(MAX_CATCH_UP_NANOS))
            .max(self.pauses.until());
        if self.has_windows {
            // A call is not admitted as of a time in a window that has ended.
            for (_, bucket) in &self.buckets {
                let began = bucket
                    .until_window_ends()
                    .map(|left| self.filled_to.saturating_add(left));
                earliest = earliest.max(began.filter(|began| *began <= now).unwrap_or(0));
            }
        }
        match self.time_until(cost) {
            0 => earliest,
            wait => earliest.max(self.filled_to.saturating_add(wait)),
        }
    }

    /// Returns the waiters in the queue, or `None` if there are none.
    #[inline]
    fn queued(&self) -> Option<&Queued> {
        self.queued.as_deref().filter(|queued| queued.waiters > 0)
    }

    /// Returns the number of nanoseconds from `filled_to` until every bucket holds `cost`.
    #[inline]
    fn time_until(&self, cost: &Cost) -> u64 {
        let mut longest = 0;
        for (budget, bucket) in &self.buckets {
            // A rate that refuses calls does not let them wait.
            if !bucket.refuses() {
                longest = bucket.time_until(cost.of(*budget)).max(longest);
            }
        }
        longest
    }

    /// Declares that costs are charged as estimates, before the first of them is.
    pub(super) const fn expect_estimates(&mut self) {
        self.has_estimates = true;
    }

    pub(super) fn available(&mut self, now: &mut LazyNow) -> Available {
        let elapsed = self.time(now).saturating_sub(self.filled_to);
        let mut available = PerBudget::<Option<u64>>::default();
        for (budget, bucket) in &self.buckets {
            if let Some(least) = available.entry(*budget) {
                *least = Some(least.unwrap_or(u64::MAX).min(bucket.available_after(elapsed)));
            }
        }
        Available::new(available, self.pause_since(now.get()).map(|pause| pause.until()))
    }

    /// Replaces the limits. Each new rate takes over the bucket of the old rate that [`match_rates`] finds for it.
    pub(super) fn set_limits(&mut self, limits: Limits, now: &mut LazyNow) -> Result<(), InvalidConfig> {
        let now = self.time(now);
        let mut new = limits.buckets(self.wall_epoch.saturating_add(now))?;
        self.fill_to(now);
        #[cfg(feature = "http")]
        self.before_limits_change(now);
        new.iter_mut()
            .for_each(|(_, new)| new.set_charged_before(self.estimates));
        for ((_, new), old) in new.iter_mut().zip(limits.match_rates(&self.limits)) {
            if let Some((_, old)) = old.and_then(|old| self.buckets.get(old)) {
                new.carry_over(old);
            }
        }
        self.bursts
            .set(&new.iter().map(|(budget, bucket)| (*budget, bucket.burst())));
        self.has_caps = new.iter().any(|(_, bucket)| bucket.refuses());
        self.has_windows = new.iter().any(|(_, bucket)| bucket.until_window_ends().is_some());
        self.buckets = new.into();
        self.limits = limits;
        self.last_admission = Admitted::default();
        // The levels were counted in the units of the old buckets.
        #[cfg(feature = "http")]
        {
            self.histories = Box::default();
            self.on_limits_changed();
        }
        Ok(())
    }

    /// Undoes what [`try_take_uncontended`](Resource::try_take_uncontended) has done until it has found a bucket that does
    /// not hold the cost, the one at `position`: the buckets before it get theirs back. Those behind it are filled, too.
    #[cold]
    fn put_back_before(&mut self, position: usize, request: &ChargeRequest, elapsed: u64) {
        let (before, behind) = self.buckets.split_at_mut(position);
        for (budget, bucket) in before {
            bucket.put_back(request.cost.of(*budget), request.is_estimate());
        }
        behind
            .iter_mut()
            .skip(1)
            .for_each(|(_, bucket)| bucket.advance(elapsed));
    }

    /// Takes the cost of `request` if it has become available since the time up to which the buckets are filled.
    #[cold]
    fn try_take_as_of_later(&mut self, request: &ChargeRequest, now: &mut LazyNow) -> Result<bool, Rejected> {
        if let Some(rejection) = self.rejection(request, now) {
            return Err(rejection);
        }
        let is_filled_to_now = self.filled_to >= self.time(now);
        Ok(!is_filled_to_now
            && self.availability(request, now) == Availability::Now
            && self.try_take(request, false, now))
    }

    /// Takes the cost of `request` while no call waits, shortly after a call was admitted as of an earlier time: see
    /// [`advance_idle`](Self::advance_idle). `elapsed` is the time by which the buckets have to be filled.
    #[cold]
    fn try_take_behind(&mut self, request: &ChargeRequest, elapsed: u64, now: &mut LazyNow) -> Result<bool, Rejected> {
        self.buckets.iter_mut().for_each(|(_, bucket)| bucket.advance(elapsed));
        let time = self.time(now);
        if self.pauses.until() > self.filled_to || !self.has(&request.cost) {
            return self.try_take_as_of_later(request, now);
        }
        if self.filled_to < time {
            self.overflow(time, Some(self.last_admission.binding));
        } else if time.saturating_sub(self.last_admission.at) > MAX_CATCH_UP_NANOS {
            // The lateness is not made up for any more, so the next call need not ask.
            self.last_admission = Admitted::default();
        }
        self.charge(request);
        Ok(true)
    }

    /// Fills the buckets before a balance is changed by something other than an admission. Does nothing while calls
    /// wait: the first waiter may still be admitted as of a time in the past, which filling up to the present would
    /// make impossible.
    pub(super) fn fill_if_idle(&mut self, now: &mut LazyNow) {
        if self.queued().is_none() {
            self.on_idle(now);
        }
    }
}

impl Resource for Buckets {
    type Request = ChargeRequest;
    type Rejection = Rejected;

    fn rejection(&mut self, request: &ChargeRequest, now: &mut LazyNow) -> Option<Rejected> {
        let exceeded = self.buckets.iter().find_map(|(budget, bucket)| {
            let cost = request.cost.of(*budget);
            (cost > bucket.burst()).then(|| CostExceedsBurst::new(budget.name(), cost, bucket.burst()))
        });
        match exceeded {
            None if self.has_caps => self.exhausted(&request.cost, now).map(Rejected::Exhausted),
            exceeded => exceeded.map(Rejected::CostExceedsBurst),
        }
    }

    fn availability(&mut self, request: &ChargeRequest, now: &mut LazyNow) -> Availability {
        let now = self.time(now);
        self.admission_time = self.time_of_admission(&request.cost, now);
        if self.admission_time <= now {
            return Availability::Now;
        }
        let admission = self.epoch.checked_add(Duration::from_nanos(self.admission_time));
        Availability::At(admission.unwrap_or_else(|| far_future(self.epoch)))
    }

    fn try_take(&mut self, request: &ChargeRequest, waited: bool, now: &mut LazyNow) -> bool {
        // `admission_time` belongs to this request: the queue has just called `availability` with the request, and
        // `availability` has set `admission_time`.
        let now = self.time(now);
        if waited {
            let budget = self.waits_for(&request.cost);
            self.queued.get_or_insert_default().waited_for = budget;
        }
        if self.admission_time < now {
            let binding = self.binding(&request.cost);
            self.fill_to(self.admission_time);
            self.overflow(now, binding);
            if waited {
                let lateness = u32::try_from(now - self.admission_time).unwrap_or(u32::MAX);
                self.last_admission = binding.map_or(Admitted::default(), |binding| Admitted {
                    at: now,
                    lateness,
                    binding,
                });
            }
        } else {
            self.fill_to(self.admission_time);
            if waited {
                self.last_admission = Admitted::default();
            }
        }
        self.charge(request);
        true
    }

    fn on_idle(&mut self, now: &mut LazyNow) {
        let elapsed = self.advance_idle(now);
        self.buckets.iter_mut().for_each(|(_, bucket)| bucket.advance(elapsed));
    }

    #[inline]
    fn is_available_uncontended(&mut self, request: &ChargeRequest, now: &mut LazyNow) -> Result<bool, Rejected> {
        // What the buckets hold already is available, whatever they have gained since. Mostly that is enough.
        if self.pauses.until() <= self.filled_to && self.has(&request.cost) {
            return Ok(true);
        }
        if let Some(rejection) = self.rejection(request, now) {
            return Err(rejection);
        }
        self.on_idle(now);
        Ok(self.availability(request, now) == Availability::Now)
    }

    #[inline]
    fn try_take_uncontended(&mut self, request: &ChargeRequest, now: &mut LazyNow) -> Result<bool, Rejected> {
        // While no call waits, one pass over the buckets fills, checks and charges them, which is faster than two. If a
        // bucket does not hold the cost, those before it get theirs back, so that the call is charged to none.
        let elapsed = self.advance_idle(now);
        if self.last_admission.lateness > 0 {
            return self.try_take_behind(request, elapsed, now);
        }
        if self.pauses.until() > self.filled_to {
            self.buckets.iter_mut().for_each(|(_, bucket)| bucket.advance(elapsed));
            return self.try_take_as_of_later(request, now);
        }
        let is_estimate = request.is_estimate();
        for (position, (budget, bucket)) in self.buckets.iter_mut().enumerate() {
            bucket.advance(elapsed);
            if !bucket.try_take(request.cost.of(*budget), is_estimate) {
                // Nothing has to be undone with one bucket, which most limiters have.
                if self.buckets.len() > 1 {
                    self.put_back_before(position, request, elapsed);
                }
                return self.try_take_as_of_later(request, now);
            }
        }
        self.number(request);
        Ok(true)
    }

    fn on_enqueue(&mut self, request: &ChargeRequest) {
        let queued = self.queued.get_or_insert_default();
        queued.waiters += 1;
        if request.is_of_schedule {
            return;
        }
        queued.demand += &request.cost;
        if request.is_estimate() {
            queued.estimates += &request.cost;
            self.has_estimates = true;
        }
    }

    fn on_dequeue(&mut self, request: &ChargeRequest) {
        let Some(queued) = &mut self.queued else { return };
        queued.waiters -= 1;
        if request.is_of_schedule {
            return;
        }
        queued.demand -= &request.cost;
        if request.is_estimate() {
            queued.estimates -= &request.cost;
        }
    }
}

/// Returns a year after `epoch`, in place of an admission time that an `Instant` cannot represent.
fn far_future(epoch: Instant) -> Instant {
    epoch
        .checked_add(Duration::from_secs(60 * 60 * 24 * 365))
        .unwrap_or(epoch)
}
