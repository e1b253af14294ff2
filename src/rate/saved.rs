//! [`SavedLimits`]: what the buckets of a limiter hold, to be kept by the user over a restart.

use super::{
    budget::Budget,
    limits::{Limits, Rate},
};
use crate::error::InvalidConfig;

/// What the buckets of a rate limiter held when it was [saved](super::RateLimiter::save), and when that was by the wall
/// clock.
///
/// With feature `serde`, it is written as a map with a `version`. What else is in the map may change with the version.
///
/// ```
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use tower_outbound::{Cost, Limits, Rate, RateLimiter};
///
/// // At most 5 dollars a month, counted in millionths: 3 dollars for a million tokens of input, 15 for output.
/// let price = |input: u64, output: u64| Cost::request().with("micro_usd", 3 * input + 15 * output);
/// let limits = || Limits::new().budget("micro_usd", Rate::utc_month(5_000_000).refuse());
///
/// let limiter = RateLimiter::new(limits())?;
/// let reserved = limiter.acquire_estimate(price(10_000, 100_000)).await?;
/// reserved.settle(price(10_000, 20_000));
/// let saved = limiter.save()?;
///
/// // In the next run of the program:
/// let limiter = RateLimiter::new(limits())?;
/// limiter.restore(&saved)?;
/// assert_eq!(limiter.available().of("micro_usd"), Some(4_670_000));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct SavedLimits {
    version: u32,
    /// The wall clock, in milliseconds since 1970-01-01 in UTC.
    saved_at_ms: u64,
    rates: Vec<SavedRate>,
}

/// What the bucket of one rate held.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(super) struct SavedRate {
    budget: String,
    period_ns: u64,
    /// Whether the rate counts by the calendar.
    by_calendar: bool,
    /// In requests, tokens, or what else the budget counts, rounded down. Negative for a debt.
    held: i64,
}

/// The version of what is saved. A limiter restores no other version.
const VERSION: u32 = 1;

impl SavedLimits {
    pub(super) const fn new(saved_at_ms: u64, rates: Vec<SavedRate>) -> Self {
        Self {
            version: VERSION,
            saved_at_ms,
            rates,
        }
    }

    pub(super) const fn saved_at_ms(&self) -> u64 {
        self.saved_at_ms
    }

    /// Returns for each rate of `limits` what its bucket held, or `None` if it was not saved. Several rates of one
    /// budget and period are told apart by their order.
    pub(super) fn held_of(&self, limits: &Limits) -> Result<Vec<Option<i64>>, InvalidConfig> {
        if self.version != VERSION {
            let problem = format!("must be {VERSION}, is {}", self.version);
            return Err(InvalidConfig::new("saved.version", problem));
        }
        let mut left: Vec<_> = self.rates.iter().collect();
        let held: Vec<_> = limits
            .rates()
            .map(|(budget, rate)| {
                let wanted = SavedRate::new(budget, &rate, 0);
                let at = left.iter().position(|saved| saved.is_of_rate(&wanted))?;
                Some(left.remove(at).held)
            })
            .collect();
        if !held.is_empty() && held.iter().all(Option::is_none) {
            return Err(InvalidConfig::new(
                "saved.rates",
                "must have a rate of the limiter, by its budget and period, have none",
            ));
        }
        Ok(held)
    }
}

impl SavedRate {
    pub(super) fn new(budget: Budget, rate: &Rate, held: i64) -> Self {
        Self {
            budget: budget.name().to_owned(),
            period_ns: u64::try_from(rate.period().as_nanos()).unwrap_or(u64::MAX),
            by_calendar: rate.kind.calendar.is_some(),
            held,
        }
    }

    fn is_of_rate(&self, other: &Self) -> bool {
        (&self.budget, self.period_ns, self.by_calendar) == (&other.budget, other.period_ns, other.by_calendar)
    }
}
