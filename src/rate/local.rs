//! [`RateLimiter`]: the limiter whose buckets are in this process. Its callers wait in order of arrival.

use super::{
    buckets::{Available, Buckets, Bursts, ChargeRequest},
    estimate::{Estimate, Settle},
    limits::{Budget, Cost, Demand, Limits},
};
use crate::{
    clock::LazyNow,
    error::{CostExceedsBurst, InvalidConfig},
    wait_queue::{WaitQueue, Waiter},
};
use std::{
    fmt,
    future::poll_fn,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};
use tokio::time::Instant;

/// What `try_acquire` returns as the time to retry after when the cost is available and only earlier waiters, which are
/// about to be admitted, are in the way.
const RETRY_SOON: Duration = Duration::from_millis(1);

/// A limiter of requests and tokens, for the tasks of one process. Its clones share the limits.
///
/// A call gets its whole cost at one instant, or waits and takes nothing. Calls are admitted in the order in which they
/// began to wait, whatever they cost: no call overtakes another. There is one exception: a waiter whose turn has come
/// and that is not polled within 5 ms is skipped. It keeps its place, and is admitted before all later calls when it is
/// polled again.
///
/// In any time window of length T, at most `burst + rate x T` is admitted, plus what [catching up](Self#catching-up)
/// allows.
///
/// # Catching up
///
/// A timer is coarse (a millisecond in Tokio), and a woken task may run late. So a waiter is admitted as of the instant
/// at which its cost became available, not as of the instant at which it runs: lateness costs no throughput, even at
/// 20,000 a second with a burst of 1. At most 5 ms are caught up, so a window may admit up to `rate x 5 ms` more.
///
/// # Examples
///
/// ```
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use tower_outbound::{Cost, Limits, Rate, RateLimiter};
///
/// let limiter = RateLimiter::new(
///     Limits::new().requests(Rate::per_second(10).burst(1)).tokens(Rate::per_minute(6_000)),
/// )?;
///
/// limiter.acquire(Cost::tokens(500)).await?;          // takes one request and 500 tokens at once
/// limiter.acquire(Cost::tokens(500)).await?;          // takes them 100 ms later
///
/// let later = limiter.try_acquire(Cost::tokens(500)).unwrap_err();
/// assert_eq!(later.retry_after(), Some(std::time::Duration::from_millis(100)));
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct RateLimiter {
    queue: WaitQueue<Buckets>,
}

/// Why [`try_acquire`](RateLimiter::try_acquire) took nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TryAcquireError {
    /// The cost is not available yet. It will be after this time, which includes the costs of the calls that wait
    /// already. The time is never zero.
    NotYet(Duration),
    /// The cost exceeds a burst: it will never be available.
    CostExceedsBurst(CostExceedsBurst),
}

/// An estimate that a [`RateLimiter`] has charged.
struct LocalCharge {
    limiter: RateLimiter,
    /// The version of the limits that charged it.
    limits_version: u64,
}

/// The wait of one call for its admission, as a state to poll.
#[derive(Debug)]
pub(super) struct LocalAdmission {
    waiter: Waiter<Buckets>,
    /// Present if the cost is an estimate: the version of the limits that charge it.
    limits_version: Option<Arc<AtomicU64>>,
}

// === impl RateLimiter ===

impl RateLimiter {
    /// Creates a limiter. Limits without any rate admit every call.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`] names the invalid field: an amount or a period of 0, a number that is negative or not finite,
    /// a period above 292 years, a burst below 1, an initial fill above the burst, or numbers too large to be counted
    /// exactly.
    pub fn new(limits: Limits) -> Result<Self, InvalidConfig> {
        Ok(Self {
            queue: WaitQueue::new(Buckets::new(limits)?),
        })
    }

    /// Waits until `cost` is available in every bucket, and takes it from all of them at one instant.
    ///
    /// # Errors
    ///
    /// [`CostExceedsBurst`], at once, if a bucket can never hold that much. A call that waits already gets this error
    /// when [`set_limits`](Self::set_limits) lowers a burst below its cost.
    ///
    /// # Panics
    ///
    /// When it has to wait outside a Tokio runtime with its timer enabled.
    ///
    /// # Cancel safety
    ///
    /// A future that is dropped while it waits loses its place in the queue and has taken nothing. It has no place in
    /// the queue before its first poll.
    pub async fn acquire(&self, cost: Cost) -> Result<(), CostExceedsBurst> {
        let mut waiter = self.queue.waiter();
        let request = ChargeRequest {
            cost,
            limits_version: None,
        };
        poll_fn(|cx| waiter.poll_acquire(&request, cx)).await
    }

    /// Like [`acquire`](Self::acquire), for a cost that is an estimate. [`Estimate::settle`] corrects it later.
    ///
    /// # Errors
    ///
    /// As [`acquire`](Self::acquire).
    ///
    /// # Panics
    ///
    /// As [`acquire`](Self::acquire).
    ///
    /// # Cancel safety
    ///
    /// As [`acquire`](Self::acquire).
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use tower_outbound::{Cost, Limits, Rate, RateLimiter};
    ///
    /// let limiter = RateLimiter::new(Limits::new().tokens(Rate::per_minute(1_000)))?;
    /// let estimate = limiter.acquire_estimate(Cost::tokens(800)).await?;
    /// // The response reports that 300 were used.
    /// estimate.settle(Cost::tokens(300));
    /// assert_eq!(limiter.available().tokens, Some(700));
    /// # Ok(())
    /// # }
    /// ```
    pub async fn acquire_estimate(&self, cost: Cost) -> Result<Estimate, CostExceedsBurst> {
        let mut admission = self.admission(true);
        poll_fn(|cx| admission.poll(cost, Instant::now(), cx)).await?;
        Ok(admission.estimate(cost).expect("the admission is of an estimate"))
    }

    /// Takes `cost` if it is available now and no other call waits.
    ///
    /// # Errors
    ///
    /// [`TryAcquireError::NotYet`] with the time to retry after, or [`TryAcquireError::CostExceedsBurst`] if a retry
    /// cannot succeed. Nothing is taken then.
    pub fn try_acquire(&self, cost: Cost) -> Result<(), TryAcquireError> {
        let request = ChargeRequest {
            cost,
            limits_version: None,
        };
        match self.queue.try_acquire(&request, LazyNow::at(Instant::now())) {
            Ok(true) => Ok(()),
            Ok(false) => {
                let wait = self.wait(cost, Demand::default());
                Err(TryAcquireError::NotYet(if wait.is_zero() { RETRY_SOON } else { wait }))
            }
            Err(error) => Err(TryAcquireError::CostExceedsBurst(error)),
        }
    }

    /// Returns how long a new call of this cost would wait, behind the waiters in the queue and behind `ahead`, the
    /// calls that will join the queue before it.
    pub(super) fn wait(&self, cost: Cost, ahead: Demand) -> Duration {
        self.queue.inspect(|buckets, now| buckets.wait(cost, ahead, now))
    }

    /// Returns what the buckets hold now: what could be admitted at once if no call waited.
    #[must_use]
    pub fn available(&self) -> Available {
        self.queue.inspect(|buckets, now| buckets.available(now))
    }

    /// Checks that `cost` does not exceed a burst. Takes nothing.
    ///
    /// # Errors
    ///
    /// [`CostExceedsBurst`] if a bucket can never hold that much.
    pub fn check(&self, cost: Cost) -> Result<(), CostExceedsBurst> {
        self.bursts().check(cost)
    }

    /// Returns the bursts, which follow every change of the limits.
    pub(super) fn bursts(&self) -> Arc<Bursts> {
        self.queue.inspect(|buckets, _| buckets.bursts().clone())
    }

    /// Replaces the limits. They apply at once, also to the calls that wait already.
    ///
    /// A bucket keeps what it holds, up to the new burst, and its debt: the first new rate of requests takes over the
    /// bucket of the first old rate of requests, and so on. An additional rate starts with its initial fill.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`], as [`new`](Self::new). Nothing is changed then.
    pub fn set_limits(&self, limits: Limits) -> Result<(), InvalidConfig> {
        // Checked before the update, which wakes every waiter.
        limits.check()?;
        self.queue
            .update_and_wake_all(|buckets, now| buckets.set_limits(limits, now))
    }

    /// Returns the current limits.
    #[must_use]
    pub fn limits(&self) -> Limits {
        self.queue.inspect(|buckets, _| buckets.limits().clone())
    }

    /// Lowers what the bucket of one rate holds to `left`, for example to what the provider reports as remaining. Never
    /// raises it. This applies at once, also to the calls that wait already.
    ///
    /// The rate is the first one with this budget and period. Without a period, it is the only rate of the budget. Does
    /// nothing if there is no such rate, or if there are several rates and no period is given.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use tower_outbound::{Limits, Rate, RateLimiter, rate::Budget};
    /// let limits = Limits::new().tokens(Rate::per_minute(30_000)).tokens(Rate::per_day(1_000_000));
    /// let limiter = RateLimiter::new(limits)?;
    /// limiter.lower(Budget::Tokens, Some(Duration::from_secs(60)), 12_000);
    /// limiter.lower(Budget::Tokens, Some(Duration::from_secs(60)), 29_000);
    /// assert_eq!(limiter.available().tokens, Some(12_000));
    /// # Ok::<_, tower_outbound::error::InvalidConfig>(())
    /// ```
    pub fn lower(&self, budget: Budget, period: Option<Duration>, left: u64) {
        self.queue
            .update(|buckets, now| buckets.lower(budget, period, left, now));
    }

    /// Replaces the amount of one rate, for example with the limit that the provider reports. A larger burst is lowered
    /// to the amount. Returns whether the limits have changed.
    ///
    /// The rate is found as by [`lower`](Self::lower). Returns `false` if there is no such rate, or if it has this
    /// amount already.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`], as [`new`](Self::new), for an amount that is not valid, such as 0. Nothing is changed then.
    pub fn adopt(&self, budget: Budget, period: Option<Duration>, amount: u64) -> Result<bool, InvalidConfig> {
        let changed = |limits: &Limits| limits.with_amount(limits.index_of(budget, period)?, amount);
        // Providers report the same limit with every response: the usual case changes nothing and wakes no waiter.
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

    /// Admits no call for the duration `pause`. A pause can only be extended: a shorter one changes nothing. A pause
    /// whose end is too far away to be represented does not end.
    pub fn pause_for(&self, pause: Duration) {
        self.queue.update(|buckets, now| {
            let until = now.get().checked_add(pause);
            buckets.pause(until);
        });
    }

    /// Admits no call until `until`. A pause can only be extended: an earlier end changes nothing.
    pub fn pause_until(&self, until: Instant) {
        self.queue.update(|buckets, _| buckets.pause(Some(until)));
    }

    pub(super) fn admission(&self, is_estimate: bool) -> LocalAdmission {
        LocalAdmission {
            waiter: self.queue.waiter(),
            limits_version: is_estimate.then(Arc::default),
        }
    }

    /// Replaces an estimate by what was `used`: refunds what was not used, or debits what was used in addition. This
    /// applies at once, also to the calls that wait already. It is the same as [`Estimate::settle`].
    ///
    /// A debit may leave a bucket in debt, which must be filled before the bucket admits another call. A refund never
    /// lets more than `burst + rate x T` of true usage through in a window of length T: if the bucket would have been
    /// full in the meantime without the estimate, what would have overflowed is not refunded.
    pub fn settle(&self, estimate: Estimate, used: Cost) {
        estimate.settle(used);
    }
}

impl fmt::Debug for RateLimiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RateLimiter")
            .field("available", &self.available())
            .finish_non_exhaustive()
    }
}

// === impl TryAcquireError ===

impl TryAcquireError {
    /// Returns the time to retry after; `None` if a retry cannot succeed.
    #[must_use]
    pub const fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::NotYet(wait) => Some(*wait),
            Self::CostExceedsBurst(_) => None,
        }
    }
}

impl fmt::Display for TryAcquireError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotYet(wait) => write!(f, "the rate limit is reached: retry in {wait:?}"),
            Self::CostExceedsBurst(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for TryAcquireError {}

// === impl LocalCharge ===

impl Settle for LocalCharge {
    fn settle(&self, charged: Cost, used: Cost) {
        self.limiter
            .queue
            .update(|buckets, now| buckets.settle(charged, self.limits_version, used, now));
    }
}

// === impl LocalAdmission ===

impl LocalAdmission {
    /// Ready when `cost`, which must be the same in every poll, has been charged. `now` is the current time.
    pub(super) fn poll(
        &mut self,
        cost: Cost,
        now: Instant,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), CostExceedsBurst>> {
        let request = ChargeRequest {
            cost,
            limits_version: self.limits_version.clone(),
        };
        self.waiter.poll_acquire_at(&request, cx, now)
    }

    /// Returns the charge of an admitted estimate, to be settled. `None` if the cost is not an estimate.
    pub(super) fn estimate(&mut self, cost: Cost) -> Option<Estimate> {
        let limits_version = self.limits_version.take()?.load(Ordering::Acquire);
        let limiter = RateLimiter {
            queue: self.waiter.queue(),
        };
        Some(Estimate::new(
            cost,
            LocalCharge {
                limiter,
                limits_version,
            },
        ))
    }
}
