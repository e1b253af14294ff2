//! [`QuotaConfig`]: the limits that all members of a quota share, in units per microsecond, and as a text that every
//! member can read.

use super::{amounts::Amounts, waiters::MAX_LATENESS};
use crate::{
    error::InvalidConfig,
    rate::{
        amount::{Amount, gcd},
        bucket::{Bucket, BucketSpec},
        budget::Budget,
        calendar::Calendar,
        cost::Cost,
        limits::{Limits, Rate},
    },
};
use std::{fmt::Write, time::Duration};

const MICROS_PER_SECOND: u64 = 1_000_000;

/// How long after its time a reservation may be used, in microseconds, which a strict rate makes up for.
pub(super) const LATENESS: u128 = MAX_LATENESS.as_micros();

/// The largest number of units in a bucket (a unit is a fraction of a request or token). The script counts in doubles,
/// which are exact up to 2^53: a full bucket and its deepest debt together stay below that.
const MAX_UNITS: i128 = 1 << 51;

/// The largest number of rates in a quota, which is more than any provider has. The script puts six numbers of each
/// rate on Lua's stack at once, and the size of that stack is limited.
const MAX_RATES: usize = 100;

/// Limits that were checked, and converted to units that the script can count exactly.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct QuotaConfig {
    limits: Limits,
    specs: Vec<(Budget, BucketSpec)>,
    /// The budgets of the rates, each once: the order in which requests have their numbers.
    budgets: Vec<Budget>,
    names: String,
    text: String,
}

impl QuotaConfig {
    pub(super) fn new(limits: Limits) -> Result<Self, InvalidConfig> {
        let specs = limits.bucket_specs()?;
        if specs.len() > MAX_RATES {
            return Err(InvalidConfig::new(
                "limits",
                format!("must be at most {MAX_RATES} rates, are {}", specs.len()),
            ));
        }
        let specs = specs
            .into_iter()
            .map(|(budget, spec)| Ok((budget, by_microsecond(budget, spec)?)))
            .collect::<Result<Vec<_>, InvalidConfig>>()?;
        let mut budgets = Vec::new();
        for (budget, _) in &specs {
            if !budgets.contains(budget) {
                budgets.push(*budget);
            }
        }
        let names: Vec<_> = budgets.iter().map(|budget| budget.name()).collect();
        Ok(Self {
            names: names.join(" "),
            budgets,
            text: write(&limits),
            limits,
            specs,
        })
    }

    /// Reads limits from a text that another member has written. Returns `None` if the text or its limits are not
    /// valid.
    pub(super) fn read(text: &str) -> Option<Self> {
        Self::new(read(text)?).ok()
    }

    pub(super) const fn limits(&self) -> &Limits {
        &self.limits
    }

    pub(super) fn specs(&self) -> &[(Budget, BucketSpec)] {
        &self.specs
    }

    /// Returns the budgets that these limits count, in the order in which a request has their numbers.
    pub(super) fn budgets(&self) -> &[Budget] {
        &self.budgets
    }

    /// Returns the names of the [`budgets`](Self::budgets), separated by spaces.
    pub(super) fn names(&self) -> &str {
        &self.names
    }

    /// Returns what a call with `cost` takes of the budgets that these limits count.
    pub(super) fn amounts(&self, cost: &Cost) -> Amounts {
        Amounts::of_cost(cost, &self.budgets)
    }

    pub(super) fn text(&self) -> &str {
        &self.text
    }

    /// Returns a new bucket for each rate, which begins at the time `began`, in microseconds since 1970.
    pub(super) fn buckets(&self, began: i64) -> Vec<(Budget, Bucket)> {
        buckets(&self.specs, began)
    }

    /// Returns the settings of buckets that replace lost ones. Those by the calendar begin with what is `left` of their
    /// windows: a number for each rate that refuses calls or counts by the calendar, in order. Without these numbers, all
    /// begin as new ones.
    pub(super) fn specs_with(&self, left: &[u64]) -> Vec<(Budget, BucketSpec)> {
        let mut left = left.iter();
        let spec = |(budget, spec): &(Budget, BucketSpec)| {
            let left = if spec.kind.is_allowance() { left.next() } else { None };
            let left = left.filter(|_| spec.kind.calendar.is_some());
            let initial = left.map_or(spec.initial, |left| units_left(spec, *left));
            (*budget, BucketSpec { initial, ..*spec })
        };
        self.specs.iter().map(spec).collect()
    }

    /// Returns one of `members` equal shares of the limits: the buckets fill `members` times slower, and begin empty. The
    /// bursts are the same, except for rates that refuse calls or count by the calendar: each share has a part of their
    /// burst, and begins with a part of what is `left`, a number for each of these rates, in order. Where that is not
    /// known, it begins empty.
    pub(super) fn share(&self, members: u64, left: &[u64]) -> Self {
        let mut left = left.iter().copied();
        let share = |(budget, spec): &(Budget, BucketSpec)| {
            let members = i128::from(members.max(1));
            let is_allowance = spec.kind.is_allowance();
            let scale = if is_allowance { 1 } else { members };
            let left = if is_allowance { left.next() } else { None }.unwrap_or(0);
            let spec = BucketSpec {
                unit: spec.unit * members as u128,
                capacity: spec.capacity * scale,
                initial: units_left(spec, left),
                max_debt: spec.max_debt * scale,
                ..*spec
            };
            (*budget, spec)
        };
        Self {
            limits: self.limits.clone(),
            specs: self.specs.iter().map(share).collect(),
            budgets: self.budgets.clone(),
            names: self.names.clone(),
            text: self.text.clone(),
        }
    }
}

/// Returns a bucket for each of these settings, which begins at the time `began`, in microseconds since 1970.
pub(super) fn buckets(specs: &[(Budget, BucketSpec)], began: i64) -> Vec<(Budget, Bucket)> {
    let (began, specs) = (u64::try_from(began).unwrap_or(0), specs.iter());
    specs
        .map(|(budget, spec)| (*budget, Bucket::new_at(*spec, began)))
        .collect()
}

/// Returns the number of units in a bucket that holds `left`.
fn units_left(spec: &BucketSpec, left: u64) -> i128 {
    i128::from(left).saturating_mul(spec.unit as i128).min(spec.capacity)
}

/// Converts a bucket from units per nanosecond to units per microsecond. A fraction of a unit in the burst is cut off.
fn by_microsecond(budget: Budget, spec: BucketSpec) -> Result<BucketSpec, InvalidConfig> {
    let fill = u128::from(spec.fill) * 1_000;
    // A bucket of the calendar does not gain with each tick, so its units stay as they are.
    let divisor = if fill == 0 { 1 } else { gcd(fill, spec.unit) };
    let (fill, unit) = (fill / divisor, spec.unit / divisor);
    let capacity = spec.capacity / divisor as i128;
    let lost_late = if spec.kind.is_strict { fill * LATENESS } else { 0 };
    if fill.max(lost_late).max(unit) > MAX_UNITS as u128 || capacity > MAX_UNITS {
        return Err(InvalidConfig::new(
            format!("{}.burst", budget.name()),
            "is too large, together with this amount and period, to be counted exactly by a Redis script",
        ));
    }
    Ok(BucketSpec {
        fill: fill as u64,
        unit,
        capacity,
        initial: spec.initial / divisor as i128,
        max_debt: (spec.max_debt / divisor as i128).min(MAX_UNITS),
        second: MICROS_PER_SECOND,
        kind: spec.kind,
    })
}

/// Writes the limits as a text, with one word for each rate: the name of the budget, amount,
/// period in nanoseconds, burst, initial fill and largest debt, separated by colons. The last three are empty if they are
/// not set. What differs from a rate that fills continuously and makes calls wait follows: `day` or `month` and the second
/// of the day at which it begins, `refuse`, `strict`.
fn write(limits: &Limits) -> String {
    let mut text = String::new();
    for (budget, rate) in limits.rates() {
        let separator = if text.is_empty() { "" } else { " " };
        let burst = rate.burst.map(|amount| amount.to_string()).unwrap_or_default();
        let initial = rate.initial.map(|amount| amount.to_string()).unwrap_or_default();
        let max_debt = rate.max_debt.map(|amount| amount.to_string()).unwrap_or_default();
        let _ = write!(
            text,
            "{separator}{}:{}:{}:{burst}:{initial}:{max_debt}",
            budget.name(),
            rate.paced_amount(),
            rate.period.as_nanos()
        );
        if let Some(calendar) = rate.kind.calendar {
            let window = if calendar.is_month() { MONTH } else { DAY };
            let _ = write!(text, ":{window}{}", rate.window_start);
        }
        for (word, is_set) in [(REFUSE, rate.kind.refuses), (STRICT, rate.kind.is_strict)] {
            if is_set {
                let _ = write!(text, ":{word}");
            }
        }
    }
    text
}

const DAY: &str = "day";
const MONTH: &str = "month";
const REFUSE: &str = "refuse";
const STRICT: &str = "strict";

fn read(text: &str) -> Option<Limits> {
    let mut limits = Limits::new();
    for word in text.split_whitespace() {
        let mut parts = word.split(':');
        let budget = parts.next()?;
        let amount = Amount::read(parts.next()?)?;
        let mut rate = Rate::new(amount, Duration::from_nanos(parts.next()?.parse().ok()?));
        let (burst, initial, max_debt) = (parts.next()?, parts.next()?, parts.next()?);
        if !burst.is_empty() {
            rate = rate.burst(Amount::read(burst)?);
        }
        if !initial.is_empty() {
            rate = rate.initial(Amount::read(initial)?);
        }
        if !max_debt.is_empty() {
            rate = rate.max_debt(Amount::read(max_debt)?);
        }
        for part in parts {
            match part {
                REFUSE => rate = rate.refuse(),
                STRICT => rate = rate.strict(),
                _ => {
                    let (calendar, start) = match part.strip_prefix(DAY) {
                        Some(start) => (Calendar::DAY, start),
                        None => (Calendar::MONTH, part.strip_prefix(MONTH)?),
                    };
                    rate.kind.calendar = Some(calendar);
                    rate.window_start = start.parse().ok()?;
                }
            }
        }
        limits = limits.budget(budget.parse::<Budget>().ok()?, rate);
    }
    Some(limits)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> Limits {
        Limits::new()
            .requests(Rate::per_minute(500).burst(10).initial(0))
            .requests(Rate::per_second(0.3).max_debt(7))
            .tokens(Rate::new(30_001, Duration::from_nanos(1_500_000_007)).burst(2.5))
            .tokens(Rate::per_day(10_000_000))
            .output_tokens(Rate::per_minute(8_000))
            .budget("images", Rate::per_minute(50))
    }

    #[test]
    fn rates_that_refuse_are_strict_or_count_by_the_calendar_are_read_back_as_they_were_written() {
        let limits = Limits::new()
            .requests(Rate::per_minute(500).burst(10).refuse().strict())
            .requests(Rate::utc_day(10_000).starting_at(Duration::from_secs(8 * 60 * 60)))
            .budget("cents", Rate::utc_month(2.5).initial(1).refuse());
        let config = QuotaConfig::new(limits.clone()).unwrap();
        assert_eq!(
            config.text(),
            "requests:500:60000000000:10:::refuse:strict requests:10000:86400000000000::::day28800 \
             cents:2.5:2592000000000000::1::month0:refuse"
        );
        assert_eq!(QuotaConfig::read(config.text()), Some(config));
        for invalid in [
            "requests:1:1:::0:week0",
            "requests:1:1:::0:day",
            "requests:1:1::::day86400",
        ] {
            assert_eq!(QuotaConfig::read(invalid), None, "{invalid}");
        }
    }

    #[test]
    fn a_share_of_a_day_is_a_part_of_what_is_left_of_it_and_of_the_next_one() {
        let limits = Limits::new()
            .requests(Rate::utc_day(100))
            .tokens(Rate::per_hour(7_200).refuse());
        let share = QuotaConfig::new(limits).unwrap().share(4, &[50, 100]);
        let buckets = share.buckets(0);
        let amounts = |buckets: &[(Budget, Bucket)]| -> Vec<_> {
            let buckets = buckets.iter();
            buckets
                .map(|(_, bucket)| (bucket.available(), bucket.burst()))
                .collect()
        };
        assert_eq!(amounts(&buckets), [(12, 25), (25, 1_800)]);
        let mut next_day = buckets;
        next_day
            .iter_mut()
            .for_each(|(_, bucket)| bucket.advance(86_400 * MICROS_PER_SECOND));
        assert_eq!(amounts(&next_day), [(25, 25), (1_800, 1_800)]);
    }

    #[test]
    fn limits_are_read_back_as_they_were_written() {
        let config = QuotaConfig::new(limits()).unwrap();
        assert_eq!(
            config.text(),
            "requests:500:60000000000:10:0: requests:0.3:1000000000:::7 tokens:30001:1500000007:2.5:: \
             tokens:10000000:86400000000000::: output_tokens:8000:60000000000::: images:50:60000000000:::"
        );
        assert_eq!(config.names(), "requests tokens output_tokens images");
        assert_eq!(QuotaConfig::read(config.text()), Some(config));
        assert_eq!(QuotaConfig::read(""), Some(QuotaConfig::new(Limits::new()).unwrap()));
        for invalid in [
            "requests",
            "requests:1:1000::",
            "requests:1:0:::",
            "Calls:1:1:::",
            "requests:-1:1000:::",
            "requests:1:x:::",
        ] {
            assert_eq!(QuotaConfig::read(invalid), None, "{invalid}");
        }
    }

    #[test]
    fn five_hundred_a_minute_is_one_unit_a_microsecond() {
        let config = QuotaConfig::new(Limits::new().requests(Rate::per_minute(500).burst(10))).unwrap();
        let (_, spec) = config.specs()[0];
        assert_eq!((spec.fill, spec.unit, spec.capacity), (1, 120_000, 1_200_000));
        let (_, share) = config.share(4, &[]).specs()[0];
        assert_eq!((share.fill, share.unit, share.capacity), (1, 480_000, 4_800_000));
    }

    #[test]
    fn limits_that_doubles_cannot_count_are_rejected_by_name() {
        let error = QuotaConfig::new(Limits::new().tokens(Rate::per_day(1_000_000_007))).unwrap_err();
        assert_eq!(error.field(), "tokens.burst");
        let many = (0..101).fold(Limits::new(), |limits, _| limits.requests(Rate::per_second(1)));
        let error = QuotaConfig::new(many).unwrap_err();
        assert_eq!(error.to_string(), "invalid limits: must be at most 100 rates, are 101");
    }
}
