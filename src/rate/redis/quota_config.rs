//! [`QuotaConfig`]: the limits that all members of a quota share, in units per microsecond, and as a text that every
//! member can read.

use crate::{
    error::InvalidConfig,
    rate::{
        amount::{Amount, gcd},
        bucket::BucketSpec,
        budget::Budget,
        limits::{Limits, Rate},
    },
};
use std::{fmt::Write, time::Duration};

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
    text: String,
}

impl QuotaConfig {
    pub(super) fn new(limits: Limits) -> Result<Self, InvalidConfig> {
        let specs = limits.bucket_specs()?;
        if let Some(budget) = limits.local_only() {
            return Err(InvalidConfig::new(
                "limits",
                format!(
                    "must have no headroom, and not refuse, be strict or count by the calendar if shared: {budget}"
                ),
            ));
        }
        if let Some((budget, _)) = specs
            .iter()
            .find(|(of, _)| !matches!(of, Budget::Requests | Budget::Tokens))
        {
            return Err(InvalidConfig::new(
                "limits",
                format!("must be of requests and tokens if shared, have {budget}"),
            ));
        }
        if specs.len() > MAX_RATES {
            return Err(InvalidConfig::new(
                "limits",
                format!("must be at most {MAX_RATES} rates, are {}", specs.len()),
            ));
        }
        let specs = specs
            .into_iter()
            .map(|(budget, spec)| Ok((budget, by_microsecond(budget, spec)?)))
            .collect::<Result<_, InvalidConfig>>()?;
        Ok(Self {
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

    pub(super) fn text(&self) -> &str {
        &self.text
    }

    /// Returns one of `members` equal shares of the limits: the bursts are the same, but the buckets fill `members`
    /// times slower and begin empty.
    pub(super) fn share(&self, members: u64) -> Self {
        let share = |(budget, spec): &(Budget, BucketSpec)| {
            let members = i128::from(members.max(1));
            let spec = BucketSpec {
                unit: spec.unit * members as u128,
                capacity: spec.capacity * members,
                initial: 0,
                max_debt: spec.max_debt * members,
                ..*spec
            };
            (*budget, spec)
        };
        Self {
            limits: self.limits.clone(),
            specs: self.specs.iter().map(share).collect(),
            text: self.text.clone(),
        }
    }
}

/// Converts a bucket from units per nanosecond to units per microsecond. A fraction of a unit in the burst is cut off.
fn by_microsecond(budget: Budget, spec: BucketSpec) -> Result<BucketSpec, InvalidConfig> {
    let fill = u128::from(spec.fill) * 1_000;
    let divisor = gcd(fill, spec.unit);
    let (fill, unit) = (fill / divisor, spec.unit / divisor);
    let capacity = spec.capacity / divisor as i128;
    if fill > MAX_UNITS as u128 || unit > MAX_UNITS as u128 || capacity > MAX_UNITS {
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
        kind: spec.kind,
    })
}

/// Writes the limits as a text, with one word for each rate: the kind of budget (`requests` or `tokens`), amount,
/// period in nanoseconds, burst, initial fill and largest debt, separated by colons. The last three are empty if they are
/// not set.
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
            rate.amount,
            rate.period.as_nanos()
        );
    }
    text
}

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
        limits = match budget {
            "requests" => limits.requests(rate),
            "tokens" => limits.tokens(rate),
            _ => return None,
        };
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
    }

    #[test]
    fn rates_that_only_one_process_can_count_are_an_error() {
        let rate = Rate::per_minute(500);
        for rate in [rate.refuse(), rate.strict(), rate.headroom(0.1), Rate::utc_day(500)] {
            let error = QuotaConfig::new(limits().requests(rate)).unwrap_err();
            assert_eq!(error.field(), "limits");
        }
    }

    #[test]
    fn limits_are_read_back_as_they_were_written() {
        let config = QuotaConfig::new(limits()).unwrap();
        assert_eq!(
            config.text(),
            "requests:500:60000000000:10:0: requests:0.3:1000000000:::7 tokens:30001:1500000007:2.5:: \
             tokens:10000000:86400000000000:::"
        );
        assert_eq!(QuotaConfig::read(config.text()), Some(config));
        assert_eq!(QuotaConfig::read(""), Some(QuotaConfig::new(Limits::new()).unwrap()));
        for invalid in [
            "requests",
            "requests:1:1000::",
            "requests:1:0:::",
            "calls:1:1:::",
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
        let (_, share) = config.share(4).specs()[0];
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
