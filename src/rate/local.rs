//! [`LocalLimiter`]: the rate limiter whose buckets are in this process. Its callers wait in order of arrival. Its users
//! see it as a [`RateLimiter`](crate::RateLimiter), where its methods are documented.

#[cfg(feature = "http")]
use super::followed::{FollowedLevel, Report};
use super::{
    available::Available,
    buckets::Buckets,
    budget::Budget,
    bursts::Bursts,
    charge_request::ChargeRequest,
    cost::Cost,
    demand::Demand,
    estimate::warn_of_cut_off,
    limits::Limits,
    pause::{Pause, PauseChange, PauseSource},
    saved::SavedLimits,
};
use crate::{
    clock::LazyNow,
    error::{AcquireError, InvalidConfig, Rejected},
    wait_queue::{WaitQueue, Waiter, WakeAll},
};
use std::{
    fmt,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, SystemTime},
};
use tokio::time::Instant;

/// The time to retry after that `try_acquire` returns if the buckets hold the cost of the call, but earlier calls still
/// wait that are about to be admitted.
pub(super) const RETRY_SOON: Duration = Duration::from_millis(1);

/// A rate limiter for the tasks of one process. Clones share the buckets and the limits.
#[derive(Clone)]
pub(super) struct LocalLimiter {
    queue: WaitQueue<Buckets>,
}

/// An estimate that a [`LocalLimiter`] has charged.
pub(super) struct LocalCharge {
    limiter: LocalLimiter,
    /// The number of estimates that the limiter had charged before.
    number: u64,
}

/// One call that waits for its admission by a [`LocalLimiter`]. Not a `Future`, because its methods also take the time.
#[derive(Debug)]
pub(crate) struct LocalAdmission {
    waiter: Waiter<Buckets>,
    request: ChargeRequest,
}

// === impl LocalLimiter ===

impl LocalLimiter {
    pub(super) fn new(limits: Limits, wall_clock: SystemTime) -> Result<Self, InvalidConfig> {
        Ok(Self {
            queue: WaitQueue::new(Buckets::new(limits, wall_clock)?),
        })
    }

    /// Creates a limiter whose buckets lack so many units each at the time `now`: see [`Buckets::with_missing`].
    pub(super) fn with_missing(
        limits: Limits,
        missing: &[u128],
        now: Instant,
        wall_clock: SystemTime,
    ) -> Result<Self, InvalidConfig> {
        Ok(Self {
            queue: WaitQueue::new(Buckets::with_missing(limits, missing, now, wall_clock)?),
        })
    }

    /// Reads the buckets of a limiter that no call waits for, as of the time `now`.
    pub(super) fn inspect_at<T>(&self, now: Instant, read: impl FnOnce(&mut Buckets, &mut LazyNow) -> T) -> T {
        self.queue.inspect(|buckets, _| read(buckets, &mut LazyNow::at(now)))
    }

    #[inline]
    pub(super) fn try_acquire(&self, cost: Cost) -> Result<(), AcquireError> {
        self.try_take(&ChargeRequest::new(cost, false))
    }

    pub(super) fn try_acquire_estimate(&self, cost: Cost) -> Result<LocalCharge, AcquireError> {
        let mut request = ChargeRequest::new(cost, true);
        self.try_take(&request)?;
        let number = request.take_number();
        Ok(LocalCharge {
            limiter: self.clone(),
            number: number.expect("the request is of an estimate"),
        })
    }

    /// Charges an estimate if that is possible at once, and `also` takes what is wanted together with it.
    pub(super) fn try_charge(&self, cost: Cost, now: Instant, also: impl FnOnce() -> bool) -> Option<LocalCharge> {
        let mut request = ChargeRequest::new(cost, true);
        let charged = self.queue.try_acquire_with(&request, LazyNow::at(now), also);
        let number = charged.ok()?.then(|| request.take_number())??;
        Some(LocalCharge {
            limiter: self.clone(),
            number,
        })
    }

    #[inline]
    fn try_take(&self, request: &ChargeRequest) -> Result<(), AcquireError> {
        let now = LazyNow::at(Instant::now());
        let refused = self
            .queue
            .try_acquire(request, now, |buckets, now| buckets.wait(&request.cost, now));
        match refused {
            Ok(None) => Ok(()),
            Ok(Some(wait)) => Err(AcquireError::NotYet(if wait.is_zero() { RETRY_SOON } else { wait })),
            Err(error) => Err(error.into()),
        }
    }

    /// Returns how long a new call of this cost will probably wait, behind the waiters in the limiter's queue and behind
    /// `ahead`, the summed costs of the calls that will join the queue before it. Estimates count as what calls turn out
    /// to use of them.
    pub(super) fn wait(&self, cost: &Cost, ahead: &Demand) -> Duration {
        self.queue
            .inspect(|buckets, now| buckets.expected_wait(cost, ahead, now))
    }

    /// Declares that costs will be charged as estimates, so that [`wait`](Self::wait) knows it before the first one.
    pub(super) fn expect_estimates(&self) {
        self.queue.inspect(|buckets, _| buckets.expect_estimates());
    }

    pub(super) fn available(&self) -> Available {
        self.queue.inspect(|buckets, now| buckets.available(now))
    }

    /// Returns the largest cost, per budget, that one call may have. The shared value is updated whenever the limits
    /// change.
    pub(super) fn bursts(&self) -> Arc<Bursts> {
        self.queue.inspect(|buckets, _| buckets.bursts().clone())
    }

    pub(super) fn set_limits(&self, limits: Limits) -> Result<(), InvalidConfig> {
        // The limits are checked before the update, because the update wakes every waiter, also if it fails.
        limits.check()?;
        self.queue
            .update_and_wake_all(|buckets, now| buckets.set_limits(limits, now))
    }

    /// Does what [`set_limits`](Self::set_limits) does, for limits that were checked, except that it leaves it to the
    /// caller to wake the waiters.
    pub(super) fn set_limits_then_wake(&self, limits: Limits) -> WakeAll<Buckets> {
        let (set, wake) = self
            .queue
            .update_then_wake_all(|buckets, now| buckets.set_limits(limits, now));
        debug_assert_eq!(set, Ok(()), "the limits were checked");
        wake
    }

    pub(super) fn save(&self) -> SavedLimits {
        self.queue.inspect(Buckets::save)
    }

    pub(super) fn restore(&self, saved: &SavedLimits) -> Result<(), InvalidConfig> {
        self.queue
            .update_and_wake_all(|buckets, now| buckets.restore(saved, now))
    }

    pub(super) fn limits(&self) -> Limits {
        self.queue.inspect(|buckets, _| buckets.limits().clone())
    }

    pub(super) fn lower(&self, budget: Budget, period: Option<Duration>, remaining: u64) {
        self.queue
            .update(|buckets, now| buckets.lower(budget, period, remaining, now));
    }

    /// Records that a call is sent now, for a later [`lower_since`](Self::lower_since).
    #[cfg(feature = "http")]
    pub(super) fn mark_sent(&self) {
        self.queue.inspect(Buckets::mark_sent);
    }

    /// Lowers what the bucket of one rate holds, as [`lower`](Self::lower) does, to what is left now of `remaining`,
    /// which the provider held when it received a call that was sent at `sent`.
    #[cfg(feature = "http")]
    pub(super) fn lower_since(&self, budget: Budget, period: Option<Duration>, remaining: u64, sent: Instant) {
        self.queue
            .update(|buckets, now| buckets.lower_since(budget, period, remaining, sent, now));
    }

    /// Makes the buckets [follow](Buckets::follow) a provider's.
    #[cfg(feature = "http")]
    pub(super) fn follow(&self, most: &Limits, is_start: bool) {
        self.queue.update(|buckets, now| buckets.follow(most, is_start, now));
    }

    /// Records that a call is sent now, and returns the stamp of the record.
    #[cfg(feature = "http")]
    pub(super) fn stamp_sent(&self) -> u64 {
        self.queue.inspect(Buckets::stamp_sent)
    }

    /// Ends the [start](Buckets::end_start): the first response is there.
    #[cfg(feature = "http")]
    pub(super) fn end_start(&self) {
        self.queue.update(|buckets, now| buckets.end_start(now));
    }

    /// Moves the bucket of the rate at `index` to what the provider has reported.
    #[cfg(feature = "http")]
    pub(super) fn report(&self, index: usize, report: &Report) {
        self.queue.update(|buckets, now| buckets.report(index, report, now));
    }

    /// Returns what is known about the provider's buckets, in the order of the limits.
    #[cfg(feature = "http")]
    pub(super) fn followed_levels(&self) -> Vec<FollowedLevel> {
        self.queue.inspect(Buckets::followed_levels)
    }

    pub(super) fn adopt(&self, budget: Budget, period: Option<Duration>, amount: u64) -> Result<bool, InvalidConfig> {
        let changed = |limits: &Limits| limits.with_amount(limits.index_of(budget, period)?, amount);
        // Providers report the same limit with every response. So the limits are compared first, because an update
        // wakes every waiter.
        let Some(limits) = self.queue.inspect(|buckets, _| changed(buckets.limits())) else {
            return Ok(false);
        };
        limits.check()?;
        self.queue
            .update_and_wake_all(|buckets, now| match changed(buckets.limits()) {
                Some(limits) => buckets.set_limits(limits, now).map(|()| true),
                None => Ok(false),
            })
    }

    pub(super) fn pause_for(&self, pause: Duration) {
        self.change_pause(|buckets, now| {
            let until = now.get().checked_add(pause);
            [(PauseSource::User, buckets.pause(until, now))]
        });
    }

    pub(super) fn pause_until(&self, until: Instant) {
        self.change_pause(|buckets, now| [(PauseSource::User, buckets.pause(Some(until), now))]);
    }

    /// Admits no call for the duration `pause`, at the request of the provider. Only extends an earlier pause of the
    /// provider: its responses may arrive in another order than they were sent.
    #[cfg(feature = "http")]
    pub(super) fn pause_for_provider(&self, pause: Duration) -> bool {
        let [(_, change)] = self.change_pause(|buckets, now| {
            let until = now.get().checked_add(pause);
            [(PauseSource::Provider, buckets.extend_pause(until, now))]
        });
        change == PauseChange::Begun
    }

    pub(super) fn resume(&self) {
        self.change_pause(Buckets::resume);
    }

    pub(super) fn paused(&self) -> Option<Pause> {
        self.queue.inspect(|buckets, now| buckets.pause_since(now.get()))
    }

    fn change_pause<const N: usize>(
        &self,
        change: impl FnOnce(&mut Buckets, &mut LazyNow) -> [(PauseSource, PauseChange); N],
    ) -> [(PauseSource, PauseChange); N] {
        let (changes, remaining) = self.queue.update(|buckets, now| {
            let changes = change(buckets, now);
            (changes, buckets.wait(&Cost::none(), now))
        });
        for (source, change) in changes {
            change.log(source, remaining);
        }
        changes
    }

    pub(super) fn forgive_debts(&self) {
        self.queue.update(Buckets::forgive_debts);
    }

    pub(super) fn is_same(&self, other: &Self) -> bool {
        self.queue.is_same(&other.queue)
    }

    #[inline]
    pub(super) fn admission(&self, cost: Cost, is_estimate: bool) -> LocalAdmission {
        LocalAdmission {
            waiter: self.queue.waiter(),
            request: ChargeRequest::new(cost, is_estimate),
        }
    }

    /// Returns the admission of the call that a schedule chooses next.
    pub(super) fn schedule_admission(&self, cost: Cost) -> LocalAdmission {
        LocalAdmission {
            waiter: self.queue.waiter(),
            request: ChargeRequest::of_schedule(cost),
        }
    }
}

impl fmt::Debug for LocalLimiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalLimiter").finish_non_exhaustive()
    }
}

// === impl LocalCharge ===

impl LocalCharge {
    /// Replaces the cost `charged` by the cost that the call really `used`. Returns a budget whose debt was cut off at
    /// the largest one.
    pub(super) fn settle(&self, charged: &Cost, used: &Cost) -> Option<Budget> {
        let queue = &self.limiter.queue;
        queue.update(|buckets, now| buckets.settle(charged, self.number, used, now))
    }

    /// Does what [`settle`](Self::settle) does, and logs a debt that was cut off.
    pub(super) fn settle_and_warn(&self, charged: Cost, used: Cost) {
        if let Some(budget) = self.settle(&charged, &used) {
            warn_of_cut_off(budget, used);
        }
    }
}

// === impl LocalAdmission ===

impl LocalAdmission {
    /// Ready when it is the turn of the call and its cost is available. Takes nothing. `now` is the current time.
    #[inline]
    pub(super) fn poll_turn(&mut self, now: Instant, cx: &mut Context<'_>) -> Poll<Result<(), Rejected>> {
        self.waiter.poll_ready(&self.request, cx, Some(now))
    }

    /// Charges the cost if it is still the turn of the call and the cost is still available. Returns whether it was
    /// charged.
    #[inline]
    pub(super) fn try_charge(&mut self, now: Instant) -> Result<bool, Rejected> {
        self.waiter.try_acquire(&self.request, Some(now))
    }

    /// Ready when the cost has been charged.
    #[inline]
    pub(super) fn poll_acquire(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Rejected>> {
        self.waiter.poll_acquire(&self.request, cx, None)
    }

    /// Replaces the cost of the waiter, which keeps its place in the queue.
    pub(super) fn set_cost(&mut self, cost: Cost) {
        if self.request.cost != cost {
            self.request = self.request.with_cost(cost);
            self.waiter.replace_request(&self.request);
        }
    }

    pub(super) fn pause_since(&self, since: Instant) -> Option<Pause> {
        self.waiter.queue().inspect(|buckets, _| buckets.pause_since(since))
    }

    pub(super) const fn cost(&self) -> Cost {
        self.request.cost
    }

    /// Returns the budget that the call waits for: the one that has its cost last.
    pub(super) fn waits_for(&self) -> Budget {
        let queue = self.waiter.queue();
        queue.inspect(|buckets, _| buckets.waits_for(&self.request.cost))
    }

    /// Returns the budget that the call has waited for, which was admitted just now.
    pub(super) fn waited_for(&self) -> Budget {
        self.waiter.queue().inspect(|buckets, _| buckets.waited_for())
    }

    /// Returns the cost of an admitted call and its charge, to be settled when the true cost is available. `None` if the
    /// cost was not charged as an estimate.
    pub(super) fn charge(&mut self) -> Option<(Cost, LocalCharge)> {
        let number = self.request.take_number()?;
        let queue = self.waiter.queue();
        let charge = LocalCharge {
            limiter: LocalLimiter { queue },
            number,
        };
        Some((self.request.cost, charge))
    }
}
