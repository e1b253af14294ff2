//! How much in what time: [`Rate`], [`Limits`], [`Cost`].

use super::bucket::{Bucket, Size};
use crate::error::InvalidConfig;
use std::time::Duration;

/// An amount per period, with a burst and an initial fill.
///
/// A bucket of this rate fills continuously: `per_minute(60)` gives one every second, not sixty once a minute. It holds
/// at most its *burst*, so at most that many can go at one instant after a time of rest.
///
/// Providers that count in slices (60 per minute enforced as 1 per second) want a small burst.
///
/// Values are checked when a [`RateLimiter`](crate::RateLimiter) is built from them.
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

/// A number of requests or tokens, as it is written: an integer, or a fraction, which is kept to a millionth.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Amount(Number);

#[derive(Clone, Copy, Debug, PartialEq)]
enum Number {
    Whole(u64),
    Negative(i64),
    Fraction(f64),
}

/// Any number of request rates and token rates, all of which hold at once.
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

/// What a provider counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Budget {
    /// Requests.
    Requests,
    /// The API's tokens.
    Tokens,
}

/// What one call takes: so many requests (nearly always one) and so many of the API's tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Requests.
    pub requests: u64,
    /// The API's tokens.
    pub tokens: u64,
}

// === impl Rate ===

impl Rate {
    /// `amount` in every `period`.
    #[must_use]
    pub fn new(amount: impl Into<Amount>, period: Duration) -> Self {
        Self {
            amount: amount.into(),
            period,
            burst: None,
            initial: None,
        }
    }

    /// `amount` a second.
    #[must_use]
    pub fn per_second(amount: impl Into<Amount>) -> Self {
        Self::new(amount, Duration::from_secs(1))
    }

    /// `amount` a minute.
    #[must_use]
    pub fn per_minute(amount: impl Into<Amount>) -> Self {
        Self::new(amount, Duration::from_secs(60))
    }

    /// `amount` an hour.
    #[must_use]
    pub fn per_hour(amount: impl Into<Amount>) -> Self {
        Self::new(amount, Duration::from_secs(60 * 60))
    }

    /// `amount` a day of 24 hours.
    #[must_use]
    pub fn per_day(amount: impl Into<Amount>) -> Self {
        Self::new(amount, Duration::from_secs(24 * 60 * 60))
    }

    /// The most that can go at one instant. Default: the amount, and never less than one.
    #[must_use]
    pub fn burst(mut self, burst: impl Into<Amount>) -> Self {
        self.burst = Some(burst.into());
        self
    }

    /// What can go at once in the beginning. Default: the burst. Zero starts empty.
    #[must_use]
    pub fn initial(mut self, initial: impl Into<Amount>) -> Self {
        self.initial = Some(initial.into());
        self
    }

    /// The amount, to a millionth.
    #[must_use]
    pub fn amount(&self) -> f64 {
        self.amount.value()
    }

    /// The period.
    #[must_use]
    pub const fn period(&self) -> Duration {
        self.period
    }

    /// The same, with another amount, which the burst must not exceed.
    fn with_amount(self, amount: Amount) -> Self {
        // Less than one is no burst.
        let most = if amount.value() < 1.0 {
            Amount::from(1_u64)
        } else {
            amount
        };
        let at_most = |burst: Amount| if burst.value() > most.value() { most } else { burst };
        Self {
            amount,
            burst: self.burst.map(at_most),
            initial: self.initial.map(at_most),
            ..self
        }
    }

    /// Checks everything and works it out in whole units: see [`bucket`](super::bucket).
    fn size(&self, budget: Budget) -> Result<Size, InvalidConfig> {
        let name = budget.name();
        let field = |part| format!("{name}.{part}");
        let (amount, scale) = self
            .amount
            .parts()
            .map_err(|problem| InvalidConfig::new(field("amount"), problem))?;
        if amount == 0 {
            return Err(InvalidConfig::new(field("amount"), "must be above zero, is 0"));
        }
        if self.period.is_zero() {
            return Err(InvalidConfig::new(field("period"), "must be above zero, is 0"));
        }
        // 292 years. Beyond that an instant could not be told any more.
        let period = u128::from(
            u64::try_from(self.period.as_nanos())
                .ok()
                .filter(|nanos| *nanos <= i64::MAX as u64)
                .ok_or_else(|| InvalidConfig::new(field("period"), format!("is too long: {:?}", self.period)))?,
        ) * u128::from(scale);

        let divisor = gcd(u128::from(amount), period);
        let fill = amount / u64::try_from(divisor).unwrap_or(u64::MAX);
        let unit = period / divisor;
        let too_large = |part| InvalidConfig::new(field(part), "is too large for this rate to be counted exactly");

        let units = |part: &'static str, amount: &Amount| -> Result<i128, InvalidConfig> {
            let (value, scale) = amount
                .parts()
                .map_err(|problem| InvalidConfig::new(field(part), problem))?;
            u128::from(value)
                .checked_mul(unit)
                .map(|product| product / u128::from(scale))
                .filter(|units| *units <= MOST_UNITS)
                .map(|units| units as i128)
                .ok_or_else(|| too_large(part))
        };
        if unit > MOST_UNITS {
            return Err(too_large("period"));
        }
        let capacity = match &self.burst {
            Some(burst) => units("burst", burst)?,
            None => units("amount", &self.amount)?.max(unit as i128),
        };
        if capacity < unit as i128 {
            return Err(InvalidConfig::new(
                field("burst"),
                "must be at least 1, or no call could ever pass",
            ));
        }
        let initial = match &self.initial {
            Some(initial) => units("initial", initial)?,
            None => capacity,
        };
        if initial > capacity {
            return Err(InvalidConfig::new(field("initial"), "must not be above the burst"));
        }
        Ok(Size {
            fill,
            unit,
            capacity,
            initial,
            most_debt: MOST_UNITS as i128,
        })
    }
}

/// Leaves room for debts of the same size in an `i128`.
const MOST_UNITS: u128 = 1 << 126;

fn gcd(mut a: u128, mut b: u128) -> u128 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

// === impl Amount ===

/// Fractions are kept to a millionth.
const SCALE: u64 = 1_000_000;

impl Amount {
    fn value(&self) -> f64 {
        match self.0 {
            Number::Whole(amount) => amount as f64,
            Number::Negative(amount) => amount as f64,
            Number::Fraction(amount) => amount,
        }
    }

    /// As numerator and denominator.
    fn parts(&self) -> Result<(u64, u64), String> {
        match self.0 {
            Number::Whole(amount) => Ok((amount, 1)),
            Number::Negative(amount) => Err(format!("must be above zero, is {amount}")),
            Number::Fraction(amount) if !amount.is_finite() => Err(format!("must be a number, is {amount}")),
            Number::Fraction(amount) if amount < 0.0 => Err(format!("must be above zero, is {amount}")),
            Number::Fraction(amount) if amount > u64::MAX as f64 / SCALE as f64 => {
                Err(format!("is too large: {amount}"))
            }
            Number::Fraction(amount) if amount.fract() == 0.0 => Ok((amount as u64, 1)),
            Number::Fraction(amount) => match (amount * SCALE as f64).round() as u64 {
                0 => Err(format!("must be at least a millionth, is {amount}")),
                millionths => Ok((millionths, SCALE)),
            },
        }
    }
}

/// As it was written.
impl std::fmt::Display for Amount {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Number::Whole(amount) => amount.fmt(f),
            Number::Negative(amount) => amount.fmt(f),
            // Read again, it is the same to the last bit.
            Number::Fraction(amount) => write!(f, "{amount:?}"),
        }
    }
}

#[cfg(feature = "redis")]
impl Amount {
    /// The inverse of what it is displayed as.
    pub(super) fn read(text: &str) -> Option<Self> {
        let whole = || text.parse::<u64>().map(Self::from).ok();
        let negative = || text.parse::<i64>().map(Self::from).ok();
        whole()
            .or_else(negative)
            .or_else(|| text.parse::<f64>().map(Self::from).ok())
    }
}

impl From<u64> for Amount {
    fn from(amount: u64) -> Self {
        Self(Number::Whole(amount))
    }
}

impl From<u32> for Amount {
    fn from(amount: u32) -> Self {
        Self(Number::Whole(amount.into()))
    }
}

impl From<usize> for Amount {
    fn from(amount: usize) -> Self {
        Self(Number::Whole(amount as u64))
    }
}

/// Integer literals are `i32`; a negative one is refused when the limiter is built.
impl From<i32> for Amount {
    fn from(amount: i32) -> Self {
        i64::from(amount).into()
    }
}

impl From<i64> for Amount {
    fn from(amount: i64) -> Self {
        Self(u64::try_from(amount).map_or(Number::Negative(amount), Number::Whole))
    }
}

impl From<f64> for Amount {
    fn from(amount: f64) -> Self {
        Self(Number::Fraction(amount))
    }
}

// === impl Limits ===

impl Limits {
    /// No limit at all, to begin with.
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

    /// Each rate, with what it counts.
    pub fn rates(&self) -> impl Iterator<Item = (Budget, Rate)> + '_ {
        self.rates.iter().copied()
    }

    /// Which of the rates is meant: that of this period; or the only one of its budget, if the period is not known.
    pub(super) fn position(&self, budget: Budget, period: Option<Duration>) -> Option<usize> {
        let mut own = (0..self.rates.len()).filter(|at| self.rates[*at].0 == budget);
        match period {
            Some(period) => own.find(|at| self.rates[*at].1.period == period),
            None => own.next().filter(|_| own.next().is_none()),
        }
    }

    /// The same, with another amount for one of the rates; `None` if it has that already.
    pub(super) fn with_amount(&self, at: usize, amount: u64) -> Option<Self> {
        let (_, rate) = self.rates.get(at)?;
        if rate.amount == Amount::from(amount) {
            return None;
        }
        let mut limits = self.clone();
        limits.rates[at].1 = rate.with_amount(amount.into());
        Some(limits)
    }

    /// The same, with this part of each amount, which its burst must not exceed.
    #[cfg(feature = "http")]
    pub(crate) fn scaled(&self, factor: f64) -> Self {
        if factor >= 1.0 {
            return self.clone();
        }
        let scaled = |rate: &Rate| {
            let amount = rate.amount() * factor;
            // Round numbers are counted in few units.
            if amount >= 100.0 {
                rate.with_amount(Amount::from(amount as u64))
            } else {
                let millionths = (amount * SCALE as f64).floor().max(1.0);
                rate.with_amount(Amount::from(millionths / SCALE as f64))
            }
        };
        let rates = self.rates.iter().map(|(budget, rate)| (*budget, scaled(rate)));
        Self { rates: rates.collect() }
    }

    /// Whether all numbers make sense.
    pub(crate) fn check(&self) -> Result<(), InvalidConfig> {
        self.buckets().map(drop)
    }

    pub(super) fn buckets(&self) -> Result<Vec<(Budget, Bucket)>, InvalidConfig> {
        let sizes = self.sizes()?.into_iter();
        Ok(sizes.map(|(budget, size)| (budget, Bucket::new(size))).collect())
    }

    pub(super) fn sizes(&self) -> Result<Vec<(Budget, Size)>, InvalidConfig> {
        self.rates
            .iter()
            .map(|(budget, rate)| Ok((*budget, rate.size(*budget)?)))
            .collect()
    }
}

// === impl Budget ===

impl Budget {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Requests => "requests",
            Self::Tokens => "tokens",
        }
    }
}

// === impl Cost ===

impl Cost {
    /// One request, no tokens.
    #[must_use]
    pub const fn request() -> Self {
        Self { requests: 1, tokens: 0 }
    }

    /// One request and so many tokens.
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
