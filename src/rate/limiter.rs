//! [`RateLimiter`]: the shared limiter that makes callers wait, first come first served.

use super::{
    bucket::Bucket,
    rate::{Budget, Cost, Limits},
};
use crate::{
    error::{CostExceedsBurst, InvalidConfig},
    line::{Clock, Gate, Line, Opens, Ticket, nanos_between},
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

/// How far the limiter looks back for a waiter that was woken late: it is admitted *as of* the moment its tokens were
/// there, but not further back than this.
///
/// It makes up for timers, which are a millisecond coarse, without letting a runtime that stood still come back as a
/// burst.
const CATCH_UP_NANOS: u64 = 5_000_000;

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
    line: Line<Buckets>,
}

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

/// Why [`try_acquire`](RateLimiter::try_acquire) took nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TryAcquireError {
    /// Not yet: come back in this time. Others may be waiting until then; they are counted.
    NotYet(Duration),
    /// Never.
    CostExceedsBurst(CostExceedsBurst),
}

/// A cost that was charged on trust, to be [settled](Self::settle) when the true one is known.
///
/// Dropped without that, the estimate stands.
#[must_use = "dropped, the estimate stands: use `acquire` if that is what you want"]
pub struct Estimate {
    limiter: RateLimiter,
    cost: Cost,
}

/// A stand in the limiter's line, for those who poll.
#[derive(Clone, Debug)]
pub(super) struct Admission {
    ticket: Ticket<Buckets>,
}

/// The most a call may cost, to be told without the limiter's lock.
#[derive(Debug, Default)]
pub(crate) struct Bursts {
    requests: AtomicU64,
    tokens: AtomicU64,
}

/// All buckets of a limiter, and what happens between them: all or nothing, pauses, catching up.
struct Buckets {
    bursts: Arc<Bursts>,
    buckets: Vec<(Budget, Bucket)>,
    epoch: Instant,
    /// Nanoseconds since `epoch` that the buckets have seen.
    at: u64,
    paused_until: u64,
    /// When a waiter was last admitted, and how late that was.
    late: (u64, u64),
    /// What those in line will take.
    ahead: (u128, u128),
    /// The moment as of which the last one was found to be admitted.
    admitted: u64,
}

#[derive(Clone, Copy)]
struct Ask {
    cost: Cost,
    estimate: bool,
}

// === impl RateLimiter ===

impl RateLimiter {
    /// A limiter with these limits; with none it admits everybody.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`] names the field: an amount or period of zero, a number that is negative or none, a burst below
    /// one, an initial fill above the burst.
    #[allow(clippy::needless_pass_by_value)]
    pub fn new(limits: Limits) -> Result<Self, InvalidConfig> {
        let buckets = limits.buckets()?;
        let buckets = Buckets {
            bursts: Arc::new(Bursts::of(&buckets)),
            buckets,
            epoch: Instant::now(),
            at: 0,
            paused_until: 0,
            late: (0, 0),
            ahead: (0, 0),
            admitted: 0,
        };
        Ok(Self {
            line: Line::new(buckets),
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
    /// Dropped while it waits, it loses its place in line and has taken nothing.
    pub async fn acquire(&self, cost: Cost) -> Result<(), CostExceedsBurst> {
        let mut admission = self.admission();
        poll_fn(|cx| admission.poll(cost, Instant::now(), cx)).await
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
        let mut ticket = self.line.ticket();
        poll_fn(|cx| ticket.poll_pass(&Ask { cost, estimate: true }, cx)).await?;
        Ok(Estimate {
            limiter: self.clone(),
            cost,
        })
    }

    /// Takes `cost` if that is possible at once, without overtaking those who wait.
    ///
    /// # Errors
    ///
    /// [`TryAcquireError::NotYet`] says when to come back, [`TryAcquireError::CostExceedsBurst`] that it is of no use.
    /// Nothing was taken.
    pub fn try_acquire(&self, cost: Cost) -> Result<(), TryAcquireError> {
        let ask = Ask { cost, estimate: false };
        match self.line.try_pass(&ask, Clock::read_at(Instant::now())) {
            Ok(true) => Ok(()),
            Ok(false) => {
                let wait = self.line.peek(|buckets, clock| buckets.wait(cost, clock));
                // Those before may be about to go this very moment.
                Err(TryAcquireError::NotYet(if wait.is_zero() { SOON } else { wait }))
            }
            Err(never) => Err(TryAcquireError::CostExceedsBurst(never)),
        }
    }

    /// What could go now if nobody waited.
    #[must_use]
    pub fn available(&self) -> Available {
        self.line.peek(|buckets, clock| buckets.available(clock))
    }

    /// Whether `cost` could pass at all.
    ///
    /// # Errors
    ///
    /// [`CostExceedsBurst`] if it could not.
    pub fn check(&self, cost: Cost) -> Result<(), CostExceedsBurst> {
        self.bursts().check(cost)
    }

    /// The most a call may cost, now and after every change of the limits.
    pub(crate) fn bursts(&self) -> Arc<Bursts> {
        self.line.peek(|buckets, _| buckets.bursts.clone())
    }

    /// Replaces the limits, at once also for those who wait.
    ///
    /// What is in a bucket stays there, up to the new burst: the first rate of requests takes over from the first, and
    /// so on. A rate that is new starts with its initial fill.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`], as [`new`](Self::new); nothing is changed then.
    #[allow(clippy::needless_pass_by_value)]
    pub fn set_limits(&self, limits: Limits) -> Result<(), InvalidConfig> {
        let new = limits.buckets()?;
        self.line.change_for_all(|buckets, clock| buckets.replace(new, clock));
        Ok(())
    }

    /// Admits nobody for this long. Only ever extends a pause.
    pub fn pause_for(&self, pause: Duration) {
        self.line.change(|buckets, clock| {
            let until = clock.now().checked_add(pause);
            buckets.pause(until);
        });
    }

    /// Admits nobody until then. Only ever extends a pause.
    pub fn pause_until(&self, until: Instant) {
        self.line.change(|buckets, _| buckets.pause(Some(until)));
    }

    pub(super) fn admission(&self) -> Admission {
        Admission {
            ticket: self.line.ticket(),
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

// === impl Estimate ===

impl Estimate {
    /// What was charged.
    #[must_use]
    pub const fn cost(&self) -> Cost {
        self.cost
    }

    /// Corrects the charge to what was really used: see [`RateLimiter::settle`].
    pub fn settle(mut self, used: Cost) {
        self.correct(used);
        self.cost = Cost::default();
    }

    fn correct(&self, used: Cost) {
        self.limiter
            .line
            .change(|buckets, clock| buckets.settle(self.cost, used, clock));
    }
}

impl Drop for Estimate {
    fn drop(&mut self) {
        if self.cost != Cost::default() {
            self.correct(self.cost);
        }
    }
}

impl fmt::Debug for Estimate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Estimate")
            .field("cost", &self.cost)
            .finish_non_exhaustive()
    }
}

// === impl Admission ===

impl Admission {
    pub(super) fn poll(
        &mut self,
        cost: Cost,
        now: Instant,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), CostExceedsBurst>> {
        self.ticket.poll_pass_at(&Ask { cost, estimate: false }, cx, now)
    }
}

// === impl Bursts ===

impl Bursts {
    fn of(buckets: &[(Budget, Bucket)]) -> Self {
        let bursts = Self::default();
        bursts.set(buckets);
        bursts
    }

    fn set(&self, buckets: &[(Budget, Bucket)]) {
        let least = |budget| {
            let bursts = buckets
                .iter()
                .filter(|(of, _)| *of == budget)
                .map(|(_, bucket)| bucket.burst());
            bursts.min().unwrap_or(u64::MAX)
        };
        self.requests.store(least(Budget::Requests), Ordering::Release);
        self.tokens.store(least(Budget::Tokens), Ordering::Release);
    }

    /// Whether `cost` could pass at all.
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
    fn elapsed_idle(&mut self, clock: &mut Clock) -> u64 {
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

    fn take(&mut self, ask: &Ask) {
        for (budget, bucket) in &mut self.buckets {
            bucket.take(ask.cost.of(*budget), ask.estimate);
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
    fn wait(&mut self, cost: Cost, clock: &mut Clock) -> Duration {
        let now = clock.nanos_since(self.epoch);
        let filled = self.buckets.iter().map(|(budget, bucket)| {
            let ahead = match budget {
                Budget::Requests => self.ahead.0,
                Budget::Tokens => self.ahead.1,
            };
            bucket.wait(ahead + u128::from(cost.of(*budget)))
        });
        let at = self.at.saturating_add(filled.fold(0, u64::max)).max(self.paused_until);
        // Whoever is before us has yet to go, even if its tokens are there.
        Duration::from_nanos(at.saturating_sub(now))
    }

    fn available(&mut self, clock: &mut Clock) -> Available {
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

    fn replace(&mut self, mut new: Vec<(Budget, Bucket)>, clock: &mut Clock) {
        let now = clock.nanos_since(self.epoch);
        self.advance_to(now);
        for budget in [Budget::Requests, Budget::Tokens] {
            let old = self.buckets.iter().filter(|(of, _)| *of == budget);
            let new = new.iter_mut().filter(|(of, _)| *of == budget);
            for ((_, new), (_, old)) in new.zip(old) {
                new.resize(old);
            }
        }
        self.bursts.set(&new);
        self.buckets = new;
    }

    fn pause(&mut self, until: Option<Instant>) {
        let until = until.map_or(u64::MAX, |until| nanos_between(self.epoch, until));
        self.paused_until = self.paused_until.max(until);
    }

    fn settle(&mut self, estimate: Cost, used: Cost, clock: &mut Clock) {
        // Those who wait are not advanced: they may be owed a moment that has passed.
        if self.ahead == (0, 0) {
            self.idle(clock);
        }
        for (budget, bucket) in &mut self.buckets {
            bucket.settle(estimate.of(*budget), used.of(*budget));
        }
    }
}

impl Gate for Buckets {
    type Ask = Ask;
    type Refusal = CostExceedsBurst;

    fn refuses(&self, ask: &Ask) -> Option<CostExceedsBurst> {
        self.buckets.iter().find_map(|(budget, bucket)| {
            let cost = ask.cost.of(*budget);
            (cost > bucket.burst()).then(|| CostExceedsBurst::new(budget.name(), cost, bucket.burst()))
        })
    }

    fn opens(&mut self, ask: &Ask, clock: &mut Clock) -> Opens {
        let now = clock.nanos_since(self.epoch);
        let at = self.admits(ask.cost, now);
        self.admitted = at;
        if at <= now {
            return Opens::Now;
        }
        // A moment that cannot be told is a very long time away.
        let far = || clock_far(self.epoch);
        Opens::At(self.epoch.checked_add(Duration::from_nanos(at)).unwrap_or_else(far))
    }

    fn pass(&mut self, ask: &Ask, waited: bool, clock: &mut Clock) -> bool {
        // `opens` has just found out.
        let at = self.admitted;
        self.advance_to(at);
        self.take(ask);
        if waited {
            let now = clock.nanos_since(self.epoch);
            self.late = (now, now.saturating_sub(at));
        }
        true
    }

    fn idle(&mut self, clock: &mut Clock) {
        let elapsed = self.elapsed_idle(clock);
        self.buckets.iter_mut().for_each(|(_, bucket)| bucket.advance(elapsed));
    }

    fn pass_at_once(&mut self, ask: &Ask, clock: &mut Clock) -> Result<bool, CostExceedsBurst> {
        let elapsed = self.elapsed_idle(clock);
        let mut have = self.paused_until <= self.at;
        for (budget, bucket) in &mut self.buckets {
            bucket.advance(elapsed);
            have &= bucket.has(ask.cost.of(*budget));
        }
        if have {
            self.take(ask);
            return Ok(true);
        }
        match self.refuses(ask) {
            Some(refusal) => Err(refusal),
            None => Ok(self.opens(ask, clock) == Opens::Now && self.pass(ask, false, clock)),
        }
    }

    fn joined(&mut self, ask: &Ask) {
        self.ahead.0 += u128::from(ask.cost.requests);
        self.ahead.1 += u128::from(ask.cost.tokens);
    }

    fn left(&mut self, ask: &Ask) {
        self.ahead.0 -= u128::from(ask.cost.requests);
        self.ahead.1 -= u128::from(ask.cost.tokens);
    }
}

fn clock_far(epoch: Instant) -> Instant {
    epoch
        .checked_add(Duration::from_secs(60 * 60 * 24 * 365))
        .unwrap_or(epoch)
}
