//! [`Plan`]: when a rate limiter would admit calls, computed without a clock.

use super::{bucket::Bucket, budget::Budget, calendar, cost::Cost, limits::Limits};
use crate::error::{AcquireError, CostExceedsBurst, Exhausted, InvalidConfig};
use std::{
    collections::VecDeque,
    time::{Duration, SystemTime},
};

/// When a limiter with given [`Limits`] would admit calls that all wait from the start, in order.
///
/// A plan tells how long a job will take under its limits, and which limit will hold it up, before anything is sent. It
/// charges the same buckets as a [`RateLimiter`](super::RateLimiter), but has no clock: each call of
/// [`admit`](Self::admit) moves the plan to the instant at which that call is admitted. A million calls take well under
/// a second.
///
/// A plan is exact, to the nanosecond. A real limiter admits a call at that instant or up to a millisecond later, as
/// Tokio's timer ticks once in a millisecond. The lateness does not add up, with two exceptions: a [strict](super::Rate::strict)
/// rate is late by as much at each wait, and of two rates that hold up calls in turns, the one whose bucket became full
/// meanwhile is not credited for the lateness of the other. What a plan does not know: pauses, corrected estimates,
/// changed limits and the calls of others.
///
/// ```
/// use std::time::Duration;
/// use tower_outbound::{Cost, Limits, Rate, rate::{Binding, Budget}};
///
/// let limits = Limits::new()
///     .requests(Rate::per_minute(600).burst(10))
///     .tokens(Rate::per_minute(60_000).burst(5_000));
/// let mut plan = limits.plan()?;
/// let mut last = Duration::ZERO;
/// for _ in 0..100 {
///     last = plan.admit(Cost::tokens(500))?;
/// }
/// // The bucket of tokens holds the first ten calls. Each further one waits half a second for its tokens.
/// assert_eq!(last, Duration::from_secs(45));
/// let minute = Duration::from_secs(60);
/// assert_eq!(plan.binding(), Some(Binding::Rate { budget: Budget::Tokens, period: minute }));
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Plan {
    /// A bucket for each rate, with the rate's period.
    buckets: Vec<(Budget, Duration, Bucket)>,
    /// When the last call was admitted, in nanoseconds since the start. The buckets are filled up to then.
    now: u64,
    concurrency: Option<InFlight>,
    binding: Option<Binding>,
}

/// Which limit a call of a [`Plan`] waited for last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Binding {
    /// The rate with this budget and period.
    Rate {
        /// What the rate counts.
        budget: Budget,
        /// The period of the rate.
        period: Duration,
    },
    /// The limit of calls in flight that [`Plan::concurrency`] has set.
    Concurrency,
}

/// The calls in flight, each of which takes equally long.
#[derive(Clone, Debug)]
struct InFlight {
    limit: usize,
    /// How long each call takes, in nanoseconds.
    duration: u64,
    /// When the calls in flight end, in nanoseconds since the start, the earliest first.
    ends: VecDeque<u64>,
}

// === impl Limits ===

impl Limits {
    /// Returns a plan that starts with new buckets, which hold the rates' [initial fill](super::Rate::initial), and
    /// with no limit of calls in flight.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`] for limits that [`RateLimiter::new`](super::RateLimiter::new) rejects.
    pub fn plan(&self) -> Result<Plan, InvalidConfig> {
        let buckets = self.rates().zip(self.buckets(calendar::nanos(SystemTime::now()))?);
        Ok(Plan {
            buckets: buckets
                .map(|((_, rate), (budget, bucket))| (budget, rate.period(), bucket))
                .collect(),
            now: 0,
            concurrency: None,
            binding: None,
        })
    }
}

// === impl Plan ===

impl Plan {
    /// Lets at most `limit` calls be in flight at once, each for `duration` from its admission. Default: no limit. A
    /// limit of 0 counts as 1. A call asks the rates when it has a permit, as under an executor.
    #[must_use]
    pub fn concurrency(mut self, limit: usize, duration: Duration) -> Self {
        self.concurrency = Some(InFlight {
            limit: limit.max(1),
            duration: u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX),
            ends: VecDeque::new(),
        });
        self
    }

    /// Admits the next call, and returns when it is admitted, as the time since the start of the plan. The time is
    /// never before that of the previous call, and at most 584 years.
    ///
    /// # Errors
    ///
    /// [`AcquireError::CostExceedsBurst`] if a bucket can never hold as much as the cost, and
    /// [`AcquireError::Exhausted`] if a rate that [refuses](super::Rate::refuse) calls does not hold it when the other
    /// rates do. The plan is unchanged then, and further calls can be admitted.
    pub fn admit(&mut self, cost: Cost) -> Result<Duration, AcquireError> {
        for (budget, _, bucket) in &self.buckets {
            let cost = cost.of(*budget);
            if cost > bucket.burst() {
                return Err(CostExceedsBurst::new(budget.name(), cost, bucket.burst()).into());
            }
        }
        let mut admission = self.now;
        self.binding = None;
        if let Some(free) = self.concurrency.as_mut().and_then(|calls| calls.free_from(self.now)) {
            admission = free;
            self.binding = Some(Binding::Concurrency);
        }
        for (budget, period, bucket) in self.buckets.iter().filter(|(_, _, bucket)| !bucket.refuses()) {
            let available = self.now.saturating_add(bucket.time_until(cost.of(*budget)));
            if available > admission {
                admission = available;
                self.binding = Some(Binding::Rate {
                    budget: *budget,
                    period: *period,
                });
            }
        }
        let elapsed = admission - self.now;
        if let Some(exhausted) = self.exhausted(&cost, elapsed) {
            return Err(exhausted.into());
        }
        for (budget, _, bucket) in &mut self.buckets {
            bucket.advance(elapsed);
            // A bucket does not hold the cost only if that would take more than 584 years. Then nothing is taken.
            bucket.try_take(cost.of(*budget), false);
        }
        self.now = admission;
        if let Some(calls) = &mut self.concurrency {
            calls.ends.push_back(admission.saturating_add(calls.duration));
        }
        Ok(Duration::from_nanos(admission))
    }

    /// Returns why a rate that refuses calls does not admit one of this cost `elapsed` nanoseconds from now.
    fn exhausted(&self, cost: &Cost, elapsed: u64) -> Option<Exhausted> {
        let caps = self.buckets.iter().filter(|(_, _, bucket)| bucket.refuses());
        caps.filter_map(|(budget, _, bucket)| {
            let amount = cost.of(*budget);
            let wait = Duration::from_nanos(bucket.time_until(amount).saturating_sub(elapsed));
            let resets = SystemTime::now() + Duration::from_nanos(elapsed) + wait;
            (!wait.is_zero()).then(|| Exhausted::new(budget.name(), amount, bucket.available(), wait, resets))
        })
        .next()
    }

    /// Returns which limit the last admitted call waited for last, behind the call before it. `None` if it was admitted
    /// at the same instant as the call before it, or as the first one at the start.
    #[must_use]
    pub const fn binding(&self) -> Option<Binding> {
        self.binding
    }
}

// === impl InFlight ===

impl InFlight {
    /// Removes the calls that have ended by `now`. If the limit is reached, removes the one that ends first, and returns
    /// when that is.
    fn free_from(&mut self, now: u64) -> Option<u64> {
        while self.ends.front().is_some_and(|end| *end <= now) {
            self.ends.pop_front();
        }
        if self.ends.len() < self.limit {
            return None;
        }
        self.ends.pop_front()
    }
}
