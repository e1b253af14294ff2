//! [`Rate`] and [`Limits`], which define a rate limit.

use super::{
    amount::{Amount, gcd},
    bucket::{Bucket, BucketKind, BucketSpec, MAX_UNITS},
    budget::Budget,
    calendar::Calendar,
    cost::{Cost, MAX_NAMED},
};
use crate::error::InvalidConfig;
use std::time::Duration;

/// An amount per period of what a budget counts, such as requests or tokens, with a burst and an initial fill.
///
/// The bucket of a rate fills continuously: `per_minute(60)` adds one every second, not sixty once a minute. The bucket
/// holds at most its [*burst*](Self::burst), so at most the burst is admitted at one instant after an idle time.
///
/// A new bucket is full, so the first minute of `per_minute(60)` admits up to 120: the burst, and what the rate adds in
/// that minute. After that, no minute admits more than 120, and any longer time admits the rate on average. A provider
/// that fills a bucket in the same way, as OpenAI does, allows that. For one that counts fixed or sliding
/// windows, set a small burst, or an [initial fill](Self::initial) of 0 if only the start matters.
///
/// If a provider enforces a rate in slices (60 per minute as 1 per second), set a small burst.
///
/// The values of a rate are checked when a [`RateLimiter`](crate::RateLimiter) is built from it.
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
    pub(super) max_debt: Option<Amount>,
    /// The share of the amount that is not used, in millionths. [`INVALID`] if what was set is no share.
    pub(super) headroom: u32,
    pub(super) kind: BucketKind,
    /// How long after midnight UTC the windows of the calendar begin.
    pub(super) window_start: u32,
}

/// The limits of a rate limiter: any number of rates for each [`Budget`], all of which hold at the same time.
///
/// ```
/// use tower_outbound::{Limits, Rate};
///
/// let limits = Limits::new()
///     .requests(Rate::per_second(5))
///     .requests(Rate::per_day(10_000))
///     .input_tokens(Rate::per_minute(30_000))
///     .output_tokens(Rate::per_minute(8_000))
///     .budget("images", Rate::per_minute(50));
/// ```
///
/// A budget without a rate is not limited: a call may take any amount of it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Limits {
    rates: Vec<(Budget, Rate)>,
}

/// Stands for a setting of a rate that is not valid. A rate keeps its settings as small numbers, as a limiter keeps its
/// rates.
const INVALID: u32 = u32::MAX;
const MILLION: f64 = 1_000_000.0;

// === impl Rate ===

impl Rate {
    /// Creates a rate of `amount` per `period`. Both must be above zero, and the period must not exceed 292 years.
    #[must_use]
    pub fn new(amount: impl Into<Amount>, period: Duration) -> Self {
        Self {
            amount: amount.into(),
            period,
            burst: None,
            initial: None,
            max_debt: None,
            headroom: 0,
            kind: BucketKind::default(),
            window_start: 0,
        }
    }

    /// Creates a rate of `amount` per second.
    #[must_use]
    pub fn per_second(amount: impl Into<Amount>) -> Self {
        Self::new(amount, Duration::from_secs(1))
    }

    /// Creates a rate of `amount` per minute.
    #[must_use]
    pub fn per_minute(amount: impl Into<Amount>) -> Self {
        Self::new(amount, Duration::from_secs(60))
    }

    /// Creates a rate of `amount` per hour.
    #[must_use]
    pub fn per_hour(amount: impl Into<Amount>) -> Self {
        Self::new(amount, Duration::from_secs(60 * 60))
    }

    /// Creates a rate of `amount` per day of 24 hours.
    #[must_use]
    pub fn per_day(amount: impl Into<Amount>) -> Self {
        Self::new(amount, Duration::from_secs(24 * 60 * 60))
    }

    /// Creates a rate of `amount` per calendar day, which begins at midnight UTC: the whole amount is there when the day
    /// begins, and nothing is added before the next one. For providers that count in this way, and for caps of the
    /// user's own: see [`refuse`](Self::refuse). See [`starting_at`](Self::starting_at) for days that begin at another
    /// time.
    ///
    /// The wall clock is read when the limiter is built or its limits are set, and is carried on by Tokio's clock: a
    /// wall clock that is stepped later is not followed. Processes that share limits go by the clock of their server. What a call turns out to use more or less than it was charged
    /// is counted in the window in which that is known. A debt ends with its window.
    #[must_use]
    pub fn utc_day(amount: impl Into<Amount>) -> Self {
        Self::by_calendar(amount.into(), Calendar::DAY)
    }

    /// Creates a rate of `amount` per calendar month, in UTC: see [`utc_day`](Self::utc_day). Its [period](Self::period)
    /// is 30 days.
    #[must_use]
    pub fn utc_month(amount: impl Into<Amount>) -> Self {
        Self::by_calendar(amount.into(), Calendar::MONTH)
    }

    fn by_calendar(amount: Amount, calendar: Calendar) -> Self {
        let mut rate = Self::new(amount, calendar.period());
        rate.kind.calendar = Some(calendar);
        rate
    }

    /// Lets the days or months of a rate by the calendar begin `time` after midnight UTC, which must be less than a day.
    /// Default: at midnight. A day of US Pacific time, by which Gemini counts requests, begins 8 hours after midnight
    /// UTC in winter, and 7 in summer.
    #[must_use]
    pub const fn starting_at(mut self, time: Duration) -> Self {
        self.window_start = if time.as_secs() < INVALID as u64 {
            time.as_secs() as u32
        } else {
            INVALID
        };
        self
    }

    /// Refuses a call whose cost the rate's bucket does not hold, with
    /// [`AcquireError::Exhausted`](crate::error::AcquireError::Exhausted), instead of letting it wait. Nothing is taken
    /// from any other bucket then. Default: calls wait.
    ///
    /// For hard caps, such as money per day. What is charged should be what a call is expected to cost; when a call turns
    /// out to cost more, the cap is exceeded by that, so at most by what the calls in flight use above their estimates.
    /// A call that waits for another rate is refused when its turn has come and the cap does not hold its cost any more.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use tower_outbound::{Cost, Limits, Rate, RateLimiter, error::AcquireError};
    ///
    /// // At most 5 dollars a day, counted in millionths.
    /// let limits = Limits::new()
    ///     .requests(Rate::per_minute(500))
    ///     .budget("micro_usd", Rate::utc_day(5_000_000).refuse());
    /// let limiter = RateLimiter::new(limits)?;
    ///
    /// let estimate = limiter.acquire_estimate(Cost::request().with("micro_usd", 4_000_000)).await?;
    /// let refused = limiter.acquire(Cost::request().with("micro_usd", 2_000_000)).await.unwrap_err();
    /// assert!(matches!(refused, AcquireError::Exhausted(cap) if cap.budget() == "micro_usd"));
    /// // The answer was shorter than expected.
    /// estimate.settle(Cost::request().with("micro_usd", 1_000_000));
    /// limiter.acquire(Cost::request().with("micro_usd", 2_000_000)).await?;
    /// assert_eq!(limiter.available().of("micro_usd"), Some(2_000_000));
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub const fn refuse(mut self) -> Self {
        self.kind.refuses = true;
        self
    }

    /// Whether calls above the rate are [refused](Self::refuse).
    #[cfg(feature = "http")]
    pub(crate) const fn refuses(&self) -> bool {
        self.kind.refuses
    }

    /// Admits no call as of an earlier time: the time by which a call was woken late is not [caught
    /// up](crate::rate#catching-up) for this rate. Default: it is caught up.
    ///
    /// For a server that checks each gap between calls, or that counts strictly in windows: with a burst of 1, two calls
    /// are then never closer to each other than the rate says, when they are admitted. The price is throughput: each wait
    /// may be up to a millisecond longer than needed, so a strict rate with a small burst stays below about one burst in
    /// a millisecond. In limits that processes share, each wait may be up to 5 ms longer than needed. The network may still
    /// change the gaps: see [`headroom`](Self::headroom).
    #[must_use]
    pub const fn strict(mut self) -> Self {
        self.kind.is_strict = true;
        self
    }

    /// Paces this share of the amount below the amount, from 0 to less than 1: with 0.05, a rate of 100 admits 95.
    /// Default: 0. A burst that was not [set](Self::burst) is lowered, too.
    ///
    /// For a server whose clock runs differently, or to which calls arrive closer to each other than they were sent. A
    /// rate in the middle of a period needs none of it.
    #[must_use]
    pub fn headroom(mut self, share: f64) -> Self {
        self.headroom = if (0.0..1.0).contains(&share) {
            (share * MILLION).round() as u32
        } else {
            INVALID
        };
        self
    }

    /// Sets the capacity of the rate's bucket: the most that is admitted at one instant, in requests or tokens. It must
    /// not be less than 1. Default: the amount per period, or 1 if the amount is less.
    #[must_use]
    pub fn burst(mut self, burst: impl Into<Amount>) -> Self {
        self.burst = Some(burst.into());
        self
    }

    /// Sets what the rate's bucket holds when the limiter is built, from 0 (empty) to the burst. Default: the burst.
    #[must_use]
    pub fn initial(mut self, initial: impl Into<Amount>) -> Self {
        self.initial = Some(initial.into());
        self
    }

    /// Sets the largest debt of the rate's bucket, in requests or tokens. Default: what the rate adds in ten minutes or
    /// in one period, or the burst, whichever is the most.
    ///
    /// A call that turns out to have used more than it was charged may leave the bucket in debt, and no call is
    /// admitted until the debt is filled. The bound keeps an absurd number, such as a usage of 2,147,483,647 tokens,
    /// from stopping all calls for weeks. What goes deeper is forgotten, with a warning in the log, and is then not
    /// counted as used. So the bound should not be less than what the calls in flight may really use above their
    /// estimates. A debt can be ended before it is filled: see
    /// [`RateLimiter::forgive_debts`](crate::RateLimiter::forgive_debts).
    #[must_use]
    pub fn max_debt(mut self, debt: impl Into<Amount>) -> Self {
        self.max_debt = Some(debt.into());
        self
    }

    /// Returns the amount per period of the rate. An integer above 2^53 is rounded to the nearest `f64`.
    #[must_use]
    pub fn amount(&self) -> f64 {
        self.amount.value()
    }

    /// Returns the burst of the rate: the one that was [set](Self::burst), or its default.
    #[must_use]
    pub fn burst_amount(&self) -> f64 {
        self.burst.map_or_else(|| self.amount().max(1.0), |burst| burst.value())
    }

    /// Returns what the bucket of the rate holds at first: the amount that was [set](Self::initial), or its default.
    #[must_use]
    pub fn initial_amount(&self) -> f64 {
        self.initial
            .map_or_else(|| self.burst_amount(), |initial| initial.value())
    }

    /// Returns the period of the rate.
    #[must_use]
    pub const fn period(&self) -> Duration {
        self.period
    }

    /// Whether this rate counts in the same periods or windows as `other`.
    fn has_period_of(&self, other: &Self) -> bool {
        self.period == other.period && self.kind.calendar == other.kind.calendar
    }

    /// Returns this rate with another amount per period. A burst or initial fill above the new amount is lowered to it,
    /// but not below 1.
    fn with_amount(self, amount: Amount) -> Self {
        // A burst below 1 is invalid, because its bucket could never hold the cost of a call.
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

    /// Checks the values of the rate and converts them to the integer units of its bucket, which counts time in
    /// nanoseconds: see [`bucket`](super::bucket).
    fn bucket_spec(&self, budget: Budget) -> Result<BucketSpec, InvalidConfig> {
        let name = budget.name();
        let field = |part| format!("{name}.{part}");
        if self.headroom == INVALID {
            return Err(InvalidConfig::new(field("headroom"), "must be from 0 to less than 1"));
        }
        let paced = self.paced_amount();
        let (amount, scale) = paced
            .fraction()
            .map_err(|problem| InvalidConfig::new(field("amount"), problem))?;
        if amount == 0 {
            return Err(InvalidConfig::new(field("amount"), "must be above zero, is 0"));
        }
        if self.period.is_zero() {
            return Err(InvalidConfig::new(field("period"), "must be above zero, is 0"));
        }
        // The longest valid period is 292 years (`i64::MAX` nanoseconds): the waits of a rate with a longer period
        // might end later than an `Instant` can represent.
        let nanos = u64::try_from(self.period.as_nanos())
            .ok()
            .filter(|nanos| *nanos <= i64::MAX as u64)
            .ok_or_else(|| {
                InvalidConfig::new(
                    field("period"),
                    format!("must be at most 292 years, is {:?}", self.period),
                )
            })?;
        let kind = self.checked_kind(field)?;
        let (fill, unit) = if kind.calendar.is_some() {
            // A bucket that is filled when a window begins does not gain otherwise.
            (0, u128::from(scale))
        } else {
            let period = u128::from(nanos) * u128::from(scale);
            let divisor = gcd(u128::from(amount), period);
            (amount / u64::try_from(divisor).unwrap_or(u64::MAX), period / divisor)
        };
        let too_large = |part| {
            InvalidConfig::new(
                field(part),
                "is too large for this rate to be counted exactly: use a smaller number",
            )
        };

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
            None => units("amount", &paced)?.max(unit as i128),
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
        let max_debt = match &self.max_debt {
            Some(debt) => units("max_debt", debt)?,
            None => {
                let filled = u128::from(fill) * u128::from(nanos.max(DEFAULT_DEBT_NANOS));
                (filled.min(MAX_UNITS) as i128).max(capacity)
            }
        };
        Ok(BucketSpec {
            fill,
            unit,
            capacity,
            initial,
            max_debt,
            second: NANOS_PER_SECOND,
            kind,
        })
    }

    /// Returns the amount per period that is paced: the amount less its [headroom](Self::headroom).
    pub(super) fn paced_amount(&self) -> Amount {
        if self.headroom > 0 && self.amount.fraction().is_ok() {
            self.amount.scaled((MILLION - f64::from(self.headroom)) / MILLION)
        } else {
            self.amount
        }
    }

    /// Checks what differs from a bucket that fills continuously. `field` returns the name of a field in errors.
    fn checked_kind(&self, field: impl Fn(&'static str) -> String) -> Result<BucketKind, InvalidConfig> {
        let invalid = |part, problem| Err(InvalidConfig::new(field(part), problem));
        match self.kind.calendar {
            Some(_) if self.burst.is_some() => invalid(
                "burst",
                "must not be set for days and months of the calendar: it is their amount",
            ),
            Some(calendar) => match calendar.starting_at(self.window_start) {
                Some(calendar) => Ok(BucketKind {
                    calendar: Some(calendar),
                    ..self.kind
                }),
                None => invalid("starting_at", "must be less than a day"),
            },
            None if self.window_start > 0 => {
                invalid("starting_at", "must be set only for days and months of the calendar")
            }
            None => Ok(self.kind),
        }
    }
}

const NANOS_PER_SECOND: u64 = 1_000_000_000;

/// The default for the largest debt of a rate with a period that is not longer than this: what the rate adds in ten
/// minutes, in nanoseconds.
const DEFAULT_DEBT_NANOS: u64 = 10 * 60 * NANOS_PER_SECOND;

// === impl Limits ===

impl Limits {
    /// Creates limits without any rate, with which a limiter admits every call.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a rate of requests.
    #[must_use]
    pub fn requests(mut self, rate: Rate) -> Self {
        self.push(Budget::Requests, rate);
        self
    }

    /// Adds a rate of API tokens, those of the prompt and of the answer together.
    #[must_use]
    pub fn tokens(mut self, rate: Rate) -> Self {
        self.push(Budget::Tokens, rate);
        self
    }

    /// Adds a rate of the tokens of the prompt, for providers that limit them apart.
    #[must_use]
    pub fn input_tokens(mut self, rate: Rate) -> Self {
        self.push(Budget::InputTokens, rate);
        self
    }

    /// Adds a rate of the tokens of the answer, for providers that limit them apart.
    #[must_use]
    pub fn output_tokens(mut self, rate: Rate) -> Self {
        self.push(Budget::OutputTokens, rate);
        self
    }

    /// Adds a rate of `budget`, which may be any name, such as `images`. A call takes of it what its
    /// [cost](super::Cost::with) has under the same name. The limits may have rates of at most four budgets that are not
    /// built in.
    #[must_use]
    pub fn budget(mut self, budget: impl Into<Budget>, rate: Rate) -> Self {
        self.push(budget.into(), rate);
        self
    }

    /// Adds a rate. A limiter keeps its limits, so no memory is reserved for further rates while there are few.
    fn push(&mut self, budget: Budget, rate: Rate) {
        if self.rates.len() < 4 {
            self.rates.reserve_exact(1);
        }
        self.rates.push((budget, rate));
    }

    /// Returns the rates of these limits with their budgets, in the order in which they were added.
    pub fn rates(&self) -> impl Iterator<Item = (Budget, Rate)> + '_ {
        self.rates.iter().copied()
    }

    /// Returns the budget whose rates take the longest to bring what a call costs; requests, if none is limited.
    pub(super) fn slowest(&self, cost: &Cost) -> Budget {
        let time = |budget: Budget, rate: &Rate| cost.of(budget) as f64 * rate.period().as_secs_f64() / rate.amount();
        let times = self.rates.iter().map(|(budget, rate)| (*budget, time(*budget, rate)));
        let slowest = times.max_by(|(_, one), (_, other)| one.total_cmp(other));
        slowest.map_or(Budget::Requests, |(budget, _)| budget)
    }

    /// Returns the index of the first rate with this budget and period. Without a period, returns the index of the
    /// budget's only rate, or `None` if the budget has several rates.
    pub(super) fn index_of(&self, budget: Budget, period: Option<Duration>) -> Option<usize> {
        let mut of_budget = (0..self.rates.len()).filter(|index| self.rates[*index].0 == budget);
        match period {
            Some(period) => of_budget.find(|index| self.rates[*index].1.period == period),
            None => of_budget.next().filter(|_| of_budget.next().is_none()),
        }
    }

    /// Returns for each rate of these limits the index of the rate in `old` whose bucket it takes over: the one with the
    /// same budget and period. A rate without such a rate takes over the bucket of the first rate of its budget that is
    /// left over, if any. Without that, a rate whose period is changed would start with a full bucket, though the one
    /// before it is used up.
    pub(super) fn match_rates(&self, old: &Self) -> Vec<Option<usize>> {
        let mut is_taken = vec![false; old.rates.len()];
        let mut matches = vec![None; self.rates.len()];
        for same_period in [true, false] {
            for ((budget, rate), found) in self.rates.iter().zip(&mut matches) {
                if found.is_none() {
                    *found = (0..old.rates.len()).find(|index| {
                        let (of, old) = &old.rates[*index];
                        !is_taken[*index] && of == budget && (!same_period || old.has_period_of(rate))
                    });
                    if let Some(index) = *found {
                        is_taken[index] = true;
                    }
                }
            }
        }
        matches
    }

    /// Returns the budget of a rate with an [initial fill](Rate::initial) of its own.
    pub(super) fn with_initial(&self) -> Option<Budget> {
        let mut rates = self.rates.iter();
        rates
            .find(|(_, rate)| rate.initial.is_some())
            .map(|(budget, _)| *budget)
    }

    /// Returns these limits with another amount for the rate at `index`. `None` if there is no such rate, or if the
    /// rate has this amount already.
    pub(super) fn with_amount(&self, index: usize, amount: u64) -> Option<Self> {
        let (_, rate) = self.rates.get(index)?;
        if rate.amount == Amount::from(amount) {
            return None;
        }
        let mut limits = self.clone();
        limits.rates[index].1 = rate.with_amount(amount.into());
        Some(limits)
    }

    /// Returns these limits with the amount of each rate whose period is at most `longest` multiplied by `factor` and
    /// rounded down. A burst that was set stays: otherwise a call that needs it would fail, although the amount may rise
    /// again. A burst that was not set is the new amount. An initial fill above the new amount is lowered to it, but not
    /// below 1. A factor of 1 or more changes nothing. A rate that refuses is a cap of the user's own, which a provider's
    /// rejections say nothing about, so it stays.
    #[cfg(feature = "http")]
    pub(crate) fn scaled(&self, factor: f64, longest: Duration) -> Self {
        if factor >= 1.0 {
            return self.clone();
        }
        let scaled = |rate: &Rate| {
            if rate.period > longest || rate.refuses() {
                return *rate;
            }
            Rate {
                burst: rate.burst,
                ..rate.with_amount(rate.amount.scaled(factor))
            }
        };
        let rates = self.rates.iter().map(|(budget, rate)| (*budget, scaled(rate)));
        Self { rates: rates.collect() }
    }

    /// Checks the values of all rates.
    pub(crate) fn check(&self) -> Result<(), InvalidConfig> {
        self.bucket_specs().map(drop)
    }

    /// Creates a bucket for each rate of these limits, in the order in which the rates were added.
    /// `now` is the time in nanoseconds since 1970.
    pub(super) fn buckets(&self, now: u64) -> Result<Vec<(Budget, Bucket)>, InvalidConfig> {
        let specs = self.bucket_specs()?.into_iter();
        Ok(specs
            .map(|(budget, spec)| (budget, Bucket::new_at(spec, now)))
            .collect())
    }

    /// Checks each rate and converts it to the integer units of its bucket, which counts time in nanoseconds.
    pub(super) fn bucket_specs(&self) -> Result<Vec<(Budget, BucketSpec)>, InvalidConfig> {
        self.check_budgets()?;
        self.rates
            .iter()
            .map(|(budget, rate)| Ok((*budget, rate.bucket_spec(*budget)?)))
            .collect()
    }

    /// Checks the names of the budgets, and how many there are.
    fn check_budgets(&self) -> Result<(), InvalidConfig> {
        let mut named = Vec::new();
        for (budget, _) in &self.rates {
            budget.check()?;
            if matches!(budget, Budget::Named(_)) && !named.contains(budget) {
                named.push(*budget);
            }
        }
        if named.len() > MAX_NAMED {
            return Err(InvalidConfig::new(
                "limits",
                format!(
                    "must have at most {MAX_NAMED} budgets that are not built in, have {}",
                    named.len()
                ),
            ));
        }
        Ok(())
    }
}
