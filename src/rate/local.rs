//! [`RateLimiter`]: the shared limiter that makes callers wait, first come first served.

use super::{
    buckets::{Available, Buckets, Bursts, ChargeRequest},
    estimate::{Charge, Estimate},
    limits::{Budget, Cost, Limits},
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

/// When to come back if it is only a matter of order.
const SOON: Duration = Duration::from_millis(1);

/// A limiter of requests and tokens, shared by its clones.
///
/// A caller gets all it asks for at one instant, or waits and takes nothing. Callers are admitted in the order in which
/// they came: nobody is overtaken, however much it asks for. (Only a waiter whose turn has come and whose future is not
/// polled for 5 ms is passed over, until it is polled again.)
///
/// In any time window of length T at most `burst + rate x T` is admitted, plus what [catching up](Self#catching-up)
/// allows.
///
/// # Catching up
///
/// Timers are coarse (a millisecond in Tokio) and tasks are late. A waiter is admitted as of the instant its tokens
/// were there, so that lateness costs no throughput, even at 20,000 a second with a burst of one. At most 5 ms are made
/// up for.
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
/// limiter.acquire(Cost::tokens(500)).await?;          // one request and 500 tokens, at once
/// limiter.acquire(Cost::tokens(500)).await?;          // 100 ms later
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
    /// Not yet: come back in this time. Others may be waiting until then; they are counted.
    NotYet(Duration),
    /// Never.
    CostExceedsBurst(CostExceedsBurst),
}

/// What a [`RateLimiter`] has charged as an estimate.
struct LocalCharge {
    limiter: RateLimiter,
    /// The number of the limits that charged it.
    limits: u64,
}

/// A stand in the limiter's queue, for those who poll.
#[derive(Debug)]
pub(super) struct LocalAdmission {
    waiter: Waiter<Buckets>,
    /// If what it asks for is an estimate: the number of the limits that charge it.
    limits: Option<Arc<AtomicU64>>,
}

// === impl RateLimiter ===

impl RateLimiter {
    /// A limiter with these limits; with none it admits everybody.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`] names the field: an amount or period of zero, a number that is negative or none, a burst below
    /// one, an initial fill above the burst.
    pub fn new(limits: Limits) -> Result<Self, InvalidConfig> {
        Ok(Self {
            queue: WaitQueue::new(Buckets::new(limits)?),
        })
    }

    /// Waits until `cost` can be taken, and takes it.
    ///
    /// # Errors
    ///
    /// [`CostExceedsBurst`], at once, if a bucket can never hold that much. Also for those who wait, when the limits
    /// are [changed](Self::set_limits) so that they could wait forever.
    ///
    /// # Panics
    ///
    /// Outside a Tokio runtime with its timer enabled, if it has to wait.
    ///
    /// # Cancel safety
    ///
    /// Dropped while it waits, it loses its place in queue and has taken nothing.
    pub async fn acquire(&self, cost: Cost) -> Result<(), CostExceedsBurst> {
        let mut waiter = self.queue.waiter();
        let request = ChargeRequest { cost, estimate: None };
        poll_fn(|cx| waiter.poll_acquire(&request, cx)).await
    }

    /// Like [`acquire`](Self::acquire), for a cost that is only estimated.
    ///
    /// # Errors
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
    /// // … the response says that 300 were used:
    /// estimate.settle(Cost::tokens(300));
    /// assert_eq!(limiter.available().tokens, Some(700));
    /// # Ok(())
    /// # }
    /// ```
    pub async fn acquire_estimate(&self, cost: Cost) -> Result<Estimate, CostExceedsBurst> {
        let mut admission = self.admission(true);
        poll_fn(|cx| admission.poll(cost, Instant::now(), cx)).await?;
        Ok(admission.estimate(cost).expect("it is one"))
    }

    /// Takes `cost` if that is possible at once, without overtaking those who wait.
    ///
    /// # Errors
    ///
    /// [`TryAcquireError::NotYet`] says when to come back, [`TryAcquireError::CostExceedsBurst`] that it is of no use.
    /// Nothing was taken.
    pub fn try_acquire(&self, cost: Cost) -> Result<(), TryAcquireError> {
        let request = ChargeRequest { cost, estimate: None };
        match self.queue.try_acquire(&request, LazyNow::at(Instant::now())) {
            Ok(true) => Ok(()),
            Ok(false) => {
                let wait = self.queue.inspect(|buckets, clock| buckets.wait(cost, clock));
                // Those before may be about to go this very moment.
                Err(TryAcquireError::NotYet(if wait.is_zero() { SOON } else { wait }))
            }
            Err(never) => Err(TryAcquireError::CostExceedsBurst(never)),
        }
    }

    /// How long a newcomer would wait behind those in queue, and behind others who are on their way there.
    pub(crate) fn wait(&self, cost: Cost, ahead: (u128, u128)) -> Duration {
        self.queue
            .inspect(|buckets, clock| buckets.wait_behind(ahead, cost, clock))
    }

    /// What could go now if nobody waited.
    #[must_use]
    pub fn available(&self) -> Available {
        self.queue.inspect(|buckets, clock| buckets.available(clock))
    }

    /// Whether `cost` could try_take at all.
    ///
    /// # Errors
    ///
    /// [`CostExceedsBurst`] if it could not.
    pub fn check(&self, cost: Cost) -> Result<(), CostExceedsBurst> {
        self.bursts().check(cost)
    }

    /// The most a call may cost, now and after every update of the limits.
    pub(crate) fn bursts(&self) -> Arc<Bursts> {
        self.queue.inspect(|buckets, _| buckets.bursts().clone())
    }

    /// Replaces the limits, at once also for those who wait.
    ///
    /// What is in a bucket stays there, up to the new burst: the first rate of requests takes over from the first, and
    /// so on. A rate that is new starts with its initial fill.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`], as [`new`](Self::new); nothing is changed then.
    pub fn set_limits(&self, limits: Limits) -> Result<(), InvalidConfig> {
        // Checked first, so that nobody is bothered in vain.
        limits.check()?;
        self.queue
            .update_and_wake_all(|buckets, clock| buckets.replace(limits, clock))
    }

    /// The limits, as they are now.
    #[must_use]
    pub fn limits(&self) -> Limits {
        self.queue.inspect(|buckets, _| buckets.limits().clone())
    }

    /// Somebody who knows, a provider for one, says what is left of a rate: what is in its bucket is lowered to that, at
    /// once also for those who wait, and never raised.
    ///
    /// Which rate is told by its budget and its period. Where the period is not known, it is the only rate of that budget;
    /// where there is no such rate, nothing is done.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use tower_outbound::{Limits, Rate, RateLimiter, rate::Budget};
    /// let limiter = RateLimiter::new(Limits::new().tokens(Rate::per_minute(30_000)).tokens(Rate::per_day(1_000_000)))?;
    /// limiter.lower(Budget::Tokens, Some(Duration::from_secs(60)), 12_000);
    /// limiter.lower(Budget::Tokens, Some(Duration::from_secs(60)), 29_000);
    /// assert_eq!(limiter.available().tokens, Some(12_000));
    /// # Ok::<_, tower_outbound::error::InvalidConfig>(())
    /// ```
    pub fn lower(&self, budget: Budget, period: Option<Duration>, left: u64) {
        self.queue
            .update(|buckets, clock| buckets.lower(budget, period, left, clock));
    }

    /// Somebody who knows says what a rate is: its amount becomes that, and its burst is no more than that. Returns
    /// whether anything has changed.
    ///
    /// Which rate is told as for [`lower`](Self::lower).
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`], as [`new`](Self::new), for an amount of zero; nothing is changed then.
    pub fn adopt(&self, budget: Budget, period: Option<Duration>, amount: u64) -> Result<bool, InvalidConfig> {
        let changed = |limits: &Limits| limits.with_amount(limits.position(budget, period)?, amount);
        // Mostly it is known.
        let Some(limits) = self.queue.inspect(|buckets, _| changed(buckets.limits())) else {
            return Ok(false);
        };
        limits.check()?;
        self.queue
            .update_and_wake_all(|buckets, clock| match changed(buckets.limits()) {
                Some(limits) => buckets.replace(limits, clock).map(|()| true),
                None => Ok(false),
            })
    }

    /// Admits nobody for this long. Only ever extends a pause.
    pub fn pause_for(&self, pause: Duration) {
        self.queue.update(|buckets, clock| {
            let until = clock.now().checked_add(pause);
            buckets.pause(until);
        });
    }

    /// Admits nobody until then. Only ever extends a pause.
    pub fn pause_until(&self, until: Instant) {
        self.queue.update(|buckets, _| buckets.pause(Some(until)));
    }

    pub(super) fn admission(&self, is_estimate: bool) -> LocalAdmission {
        LocalAdmission {
            waiter: self.queue.waiter(),
            limits: is_estimate.then(Arc::default),
        }
    }

    /// Corrects a charge: credits what was not used, or debits what was used on top, at once also for those who wait.
    ///
    /// After a debit a balance may be negative: it is paid off before anybody else gets tokens. A credit never lets
    /// more than `burst + rate x T` of true usage through: what would have been spilled from a full bucket in the
    /// meantime is not given back. (The same as [`Estimate::settle`].)
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
    /// When to come back; `None` if it is of no use.
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
            Self::NotYet(wait) => write!(f, "the limit is reached for another {wait:?}"),
            Self::CostExceedsBurst(never) => never.fmt(f),
        }
    }
}

impl std::error::Error for TryAcquireError {}

// === impl LocalCharge ===

impl Charge for LocalCharge {
    fn settle(&self, charged: Cost, used: Cost) {
        self.limiter
            .queue
            .update(|buckets, now| buckets.settle(charged, self.limits, used, now));
    }
}

// === impl LocalAdmission ===

impl LocalAdmission {
    pub(super) fn poll(
        &mut self,
        cost: Cost,
        now: Instant,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), CostExceedsBurst>> {
        let request = ChargeRequest {
            cost,
            estimate: self.limits.clone(),
        };
        self.waiter.poll_acquire_at(&request, cx, now)
    }

    /// What was charged, to be settled, if it was an estimate.
    pub(super) fn estimate(&mut self, cost: Cost) -> Option<Estimate> {
        let limits = self.limits.take()?.load(Ordering::Acquire);
        let limiter = RateLimiter {
            queue: self.waiter.queue(),
        };
        Some(Estimate::new(cost, LocalCharge { limiter, limits }))
    }
}
