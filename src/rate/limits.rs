//! What is limited and what a call takes: [`Rate`], [`Limits`], [`Budget`], [`Cost`].

use super::{
    amount::{Amount, gcd},
    bucket::{Bucket, BucketSpec},
};
use crate::error::InvalidConfig;
use std::{
    ops::{AddAssign, SubAssign},
    time::Duration,
};

/// An amount per period, with a burst and an initial fill.
///
/// The bucket of a rate fills continuously: `per_minute(60)` adds one every second, not sixty once a minute. It holds
/// at most its [*burst*](Self::burst), so at most that many are admitted at one instant after an idle time.
///
/// For a provider that enforces a rate in slices (60 per minute as 1 per second), set a small burst.
///
/// The values are checked when a [`RateLimiter`](crate::RateLimiter) is built from them.
///
/// ```
/// use tower_outbound::Rate;
///
/// let requests = Rate::per_minute(500).burst(10);
/// let tokens = Rate::per_minute(30_000);
/// let slow = Rate::per_second(0.5);
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rate {
    pub(super) amount: Amount,
    pub(super) period: Duration,
    pub(super) burst: Option<Amount>,
    pub(super) initial: Option<Amount>,
}

/// Any number of request rates and token rates, all of which hold at the same time.
///
/// ```
/// use tower_outbound::{Limits, Rate};
///
/// let limits = Limits::new()
///     .requests(Rate::per_second(5))
///     .requests(Rate::per_day(10_000))
///     .tokens(Rate::per_minute(30_000));
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Limits {
    rates: Vec<(Budget, Rate)>,
}

/// What a rate limits: what a provider counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Budget {
    /// Requests.
    Requests,
    /// The API's tokens.
    Tokens,
}

/// What one call takes of each budget. Most calls take one request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Requests.
    pub requests: u64,
    /// The API's tokens.
    pub tokens: u64,
}

/// The sum of the costs of calls that have not been admitted yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Demand {
    pub(crate) requests: u128,
    pub(crate) tokens: u128,
}

// === impl Rate ===

impl Rate {
    /// Creates a rate of `amount` in every `period`. Both must be above zero, and the period at most 292 years.
    #[must_use]
    pub fn new(amount: impl Into<Amount>, period: Duration) -> Self {
        Self {
            amount: amount.into(),
            period,
            burst: None,
            initial: None,
        }
    }

    /// Creates a rate of `amount` a second.
    #[must_use]
    pub fn per_second(amount: impl Into<Amount>) -> Self {
        Self::new(amount, Duration::from_secs(1))
    }

    /// Creates a rate of `amount` a minute.
    #[must_use]
    pub fn per_minute(amount: impl Into<Amount>) -> Self {
        Self::new(amount, Duration::from_secs(60))
    }

    /// Creates a rate of `amount` an hour.
    #[must_use]
    pub fn per_hour(amount: impl Into<Amount>) -> Self {
        Self::new(amount, Duration::from_secs(60 * 60))
    }

    /// Creates a rate of `amount` a day of 24 hours.
    #[must_use]
    pub fn per_day(amount: impl Into<Amount>) -> Self {
        Self::new(amount, Duration::from_secs(24 * 60 * 60))
    }

    /// Sets the capacity of the bucket: the most that is admitted at one instant, in requests or tokens. It must be at
    /// least 1. Default: the amount, or 1 if the amount is less.
    #[must_use]
    pub fn burst(mut self, burst: impl Into<Amount>) -> Self {
        self.burst = Some(burst.into());
        self
    }

    /// Sets what the bucket holds when the limiter is built, from 0 (empty) to the burst. Default: the burst.
    #[must_use]
    pub fn initial(mut self, initial: impl Into<Amount>) -> Self {
        self.initial = Some(initial.into());
        self
    }

    /// Returns the amount per period. An amount above 2^53 is rounded.
    #[must_use]
    pub fn amount(&self) -> f64 {
        self.amount.value()
    }

    /// Returns the period.
    #[must_use]
    pub const fn period(&self) -> Duration {
        self.period
    }

    /// Returns this rate with another amount. A larger burst or initial fill is lowered to the amount, or to 1 if the
    /// amount is less.
    fn with_amount(self, amount: Amount) -> Self {
        // A burst below 1 is invalid.
        let max = if amount.value() < 1.0 {
            Amount::from(1_u64)
        } else {
            amount
        };
        let at_most = |burst: Amount| if burst.value() > max.value() { max } else { burst };
        Self {
            amount,
            burst: self.burst.map(at_most),
            initial: self.initial.map(at_most),
            ..self
        }
    }

    /// Checks all values and converts them to units, with ticks of a nanosecond: see [`bucket`](super::bucket).
    fn bucket_spec(&self, budget: Budget) -> Result<BucketSpec, InvalidConfig> {
        let name = budget.name();
        let field = |part| format!("{name}.{part}");
        let (amount, scale) = self
            .amount
            .fraction()
            .map_err(|problem| InvalidConfig::new(field("amount"), problem))?;
        if amount == 0 {
            return Err(InvalidConfig::new(field("amount"), "must be above zero, is 0"));
        }
        if self.period.is_zero() {
            return Err(InvalidConfig::new(field("period"), "must be above zero, is 0"));
        }
        // 292 years: an `Instant` may not be able to represent longer waits.
        let period = u128::from(
            u64::try_from(self.period.as_nanos())
                .ok()
                .filter(|nanos| *nanos <= i64::MAX as u64)
                .ok_or_else(|| {
                    InvalidConfig::new(
                        field("period"),
                        format!("must be at most 292 years, is {:?}", self.period),
                    )
                })?,
        ) * u128::from(scale);

        let divisor = gcd(u128::from(amount), period);
        let fill = amount / u64::try_from(divisor).unwrap_or(u64::MAX);
        let unit = period / divisor;
        let too_large = |part| InvalidConfig::new(field(part), "is too large for this rate to be counted exactly");

        let units = |part: &'static str, amount: &Amount| -> Result<i128, InvalidConfig> {
            let (value, scale) = amount
                .fraction()
                .map_err(|problem| InvalidConfig::new(field(part), problem))?;
            u128::from(value)
                .checked_mul(unit)
                .map(|product| product / u128::from(scale))
                .filter(|units| *units <= MAX_UNITS)
                .map(|units| units as i128)
                .ok_or_else(|| too_large(part))
        };
        if unit > MAX_UNITS {
            return Err(too_large("period"));
        }
        let capacity = match &self.burst {
            Some(burst) => units("burst", burst)?,
            None => units("amount", &self.amount)?.max(unit as i128),
        };
        if capacity < unit as i128 {
            return Err(InvalidConfig::new(
                field("burst"),
                "must be at least 1, or no call could ever be admitted",
            ));
        }
        let initial = match &self.initial {
            Some(initial) => units("initial", initial)?,
            None => capacity,
        };
        if initial > capacity {
            return Err(InvalidConfig::new(field("initial"), "must not be above the burst"));
        }
        Ok(BucketSpec {
            fill,
            unit,
            capacity,
            initial,
            max_debt: MAX_UNITS as i128,
        })
    }
}

/// The largest capacity in units. An `i128` holds it together with a debt of the same size.
const MAX_UNITS: u128 = 1 << 126;

// === impl Limits ===

impl Limits {
    /// Creates limits without any rate, which admit every call.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a rate of requests.
    #[must_use]
    pub fn requests(mut self, rate: Rate) -> Self {
        self.rates.push((Budget::Requests, rate));
        self
    }

    /// Adds a rate of API tokens.
    #[must_use]
    pub fn tokens(mut self, rate: Rate) -> Self {
        self.rates.push((Budget::Tokens, rate));
        self
    }

    /// Returns the rates with their budgets, in the order in which they were added.
    pub fn rates(&self) -> impl Iterator<Item = (Budget, Rate)> + '_ {
        self.rates.iter().copied()
    }

    /// Returns the index of the first rate of this budget and period. Without a period, it is the only rate of the
    /// budget, and `None` if there are several.
    pub(super) fn index_of(&self, budget: Budget, period: Option<Duration>) -> Option<usize> {
        let mut of_budget = (0..self.rates.len()).filter(|index| self.rates[*index].0 == budget);
        match period {
            Some(period) => of_budget.find(|index| self.rates[*index].1.period == period),
            None => of_budget.next().filter(|_| of_budget.next().is_none()),
        }
    }

    /// Returns these limits with another amount for the rate at `index`. `None` if there is no such rate, or if it has
    /// this amount already.
    pub(super) fn with_amount(&self, index: usize, amount: u64) -> Option<Self> {
        let (_, rate) = self.rates.get(index)?;
        if rate.amount == Amount::from(amount) {
            return None;
        }
        let mut limits = self.clone();
        limits.rates[index].1 = rate.with_amount(amount.into());
        Some(limits)
    }

    /// Returns these limits with each amount multiplied by `factor` and rounded down. Larger bursts are lowered to the
    /// new amounts. A factor of 1 or more changes nothing.
    #[cfg(feature = "http")]
    pub(crate) fn scaled(&self, factor: f64) -> Self {
        if factor >= 1.0 {
            return self.clone();
        }
        let scaled = |rate: &Rate| rate.with_amount(rate.amount.scaled(factor));
        let rates = self.rates.iter().map(|(budget, rate)| (*budget, scaled(rate)));
        Self { rates: rates.collect() }
    }

    /// Checks all values.
    pub(crate) fn check(&self) -> Result<(), InvalidConfig> {
        self.buckets().map(drop)
    }

    /// Creates a bucket for each rate, in the order of the rates.
    pub(super) fn buckets(&self) -> Result<Vec<(Budget, Bucket)>, InvalidConfig> {
        let specs = self.bucket_specs()?.into_iter();
        Ok(specs.map(|(budget, spec)| (budget, Bucket::new(spec))).collect())
    }

    /// Converts each rate to units, with ticks of a nanosecond.
    pub(super) fn bucket_specs(&self) -> Result<Vec<(Budget, BucketSpec)>, InvalidConfig> {
        self.rates
            .iter()
            .map(|(budget, rate)| Ok((*budget, rate.bucket_spec(*budget)?)))
            .collect()
    }
}

// === impl Budget ===

impl Budget {
    /// The name in errors and in the text form of shared limits.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Requests => "requests",
            Self::Tokens => "tokens",
        }
    }
}

// === impl Cost ===

impl Cost {
    /// Returns the cost of one request and no tokens.
    #[must_use]
    pub const fn request() -> Self {
        Self { requests: 1, tokens: 0 }
    }

    /// Returns the cost of one request and `tokens` API tokens.
    #[must_use]
    pub const fn tokens(tokens: u64) -> Self {
        Self { requests: 1, tokens }
    }

    pub(super) const fn of(&self, budget: Budget) -> u64 {
        match budget {
            Budget::Requests => self.requests,
            Budget::Tokens => self.tokens,
        }
    }
}

// === impl Demand ===

impl Demand {
    pub(super) const fn of(&self, budget: Budget) -> u128 {
        match budget {
            Budget::Requests => self.requests,
            Budget::Tokens => self.tokens,
        }
    }
}

impl AddAssign<Cost> for Demand {
    fn add_assign(&mut self, cost: Cost) {
        self.requests += u128::from(cost.requests);
        self.tokens += u128::from(cost.tokens);
    }
}

impl SubAssign<Cost> for Demand {
    fn sub_assign(&mut self, cost: Cost) {
        self.requests -= u128::from(cost.requests);
        self.tokens -= u128::from(cost.tokens);
    }
}
