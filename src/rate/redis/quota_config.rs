//! [`QuotaConfig`]: the limits as the fleet agrees on them, worked out in units of a microsecond, and as a text that every
//! member can read back.

use crate::{
    error::InvalidConfig,
    rate::{
        bucket::Size,
        limits::{Amount, Budget, Limits, Rate},
    },
};
use std::{fmt::Write, time::Duration};

/// The largest number of units there is. The script counts in doubles, which are exact up to 2^53: a bucket and its
/// deepest debt together are below that.
pub(super) const MOST_UNITS: i128 = 1 << 51;

/// Limits, checked and worked out.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct QuotaConfig {
    limits: Limits,
    sizes: Vec<(Budget, Size)>,
    text: String,
}

/// More than a provider has, and no more than a script can hold at once.
const MOST_RATES: usize = 100;

impl QuotaConfig {
    pub(super) fn new(limits: Limits) -> Result<Self, InvalidConfig> {
        let sizes = limits.sizes()?;
        if sizes.len() > MOST_RATES {
            return Err(InvalidConfig::new(
                "limits",
                format!("must be {MOST_RATES} rates at most, are {}", sizes.len()),
            ));
        }
        let sizes = sizes
            .into_iter()
            .map(|(budget, size)| Ok((budget, by_microsecond(budget, size)?)))
            .collect::<Result<_, InvalidConfig>>()?;
        Ok(Self {
            text: written(&limits),
            limits,
            sizes,
        })
    }

    /// As another member has written it. `None` if it makes no sense to us.
    pub(super) fn read(text: &str) -> Option<Self> {
        Self::new(read(text)?).ok()
    }

    pub(super) const fn limits(&self) -> &Limits {
        &self.limits
    }

    pub(super) fn sizes(&self) -> &[(Budget, Size)] {
        &self.sizes
    }

    pub(super) fn text(&self) -> &str {
        &self.text
    }

    /// One of so many equal shares of it: the same, but that it fills as much slower.
    pub(super) fn share(&self, members: u64) -> Self {
        let shared = |(budget, size): &(Budget, Size)| {
            let members = i128::from(members.max(1));
            let size = Size {
                unit: size.unit * members as u128,
                capacity: size.capacity * members,
                initial: 0,
                most_debt: size.most_debt * members,
                ..*size
            };
            (*budget, size)
        };
        Self {
            limits: self.limits.clone(),
            sizes: self.sizes.iter().map(shared).collect(),
            text: self.text.clone(),
        }
    }
}

/// The same rate, counted by the microsecond. A fraction of a burst that cannot be told any more is left out.
fn by_microsecond(budget: Budget, size: Size) -> Result<Size, InvalidConfig> {
    let fill = u128::from(size.fill) * 1_000;
    let divisor = gcd(fill, size.unit);
    let (fill, unit) = (fill / divisor, size.unit / divisor);
    let capacity = size.capacity / divisor as i128;
    if fill > MOST_UNITS as u128 || unit > MOST_UNITS as u128 || capacity > MOST_UNITS {
        return Err(InvalidConfig::new(
            format!("{}.burst", budget.name()),
            "is too large, together with this amount and period, to be counted exactly by a Redis script",
        ));
    }
    Ok(Size {
        fill: fill as u64,
        unit,
        capacity,
        initial: size.initial / divisor as i128,
        most_debt: MOST_UNITS,
    })
}

fn gcd(mut a: u128, mut b: u128) -> u128 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

/// One rate a word: budget, amount, period in nanoseconds, burst, initial fill.
fn written(limits: &Limits) -> String {
    let mut text = String::new();
    for (budget, rate) in limits.rates() {
        let separator = if text.is_empty() { "" } else { " " };
        let burst = rate.burst.map(|amount| amount.to_string()).unwrap_or_default();
        let initial = rate.initial.map(|amount| amount.to_string()).unwrap_or_default();
        let _ = write!(
            text,
            "{separator}{}:{}:{}:{burst}:{initial}",
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
        let (burst, initial) = (parts.next()?, parts.next()?);
        if !burst.is_empty() {
            rate = rate.burst(Amount::read(burst)?);
        }
        if !initial.is_empty() {
            rate = rate.initial(Amount::read(initial)?);
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
            .requests(Rate::per_second(0.3))
            .tokens(Rate::new(30_001, Duration::from_nanos(1_500_000_007)).burst(2.5))
            .tokens(Rate::per_day(10_000_000))
    }

    #[test]
    fn limits_are_read_back_as_they_were_written() {
        let config = QuotaConfig::new(limits()).unwrap();
        assert_eq!(
            config.text(),
            "requests:500:60000000000:10:0 requests:0.3:1000000000:: tokens:30001:1500000007:2.5: \
             tokens:10000000:86400000000000::"
        );
        assert_eq!(QuotaConfig::read(config.text()), Some(config));
        assert_eq!(QuotaConfig::read(""), Some(QuotaConfig::new(Limits::new()).unwrap()));
        for senseless in [
            "requests",
            "requests:1:0::",
            "calls:1:1::",
            "requests:-1:1000::",
            "requests:1:x::",
        ] {
            assert_eq!(QuotaConfig::read(senseless), None, "{senseless}");
        }
    }

    #[test]
    fn five_hundred_a_minute_is_one_unit_a_microsecond() {
        let config = QuotaConfig::new(Limits::new().requests(Rate::per_minute(500).burst(10))).unwrap();
        let (_, size) = config.sizes()[0];
        assert_eq!((size.fill, size.unit, size.capacity), (1, 120_000, 1_200_000));
        let (_, share) = config.share(4).sizes()[0];
        assert_eq!((share.fill, share.unit, share.capacity), (1, 480_000, 4_800_000));
    }

    #[test]
    fn what_doubles_cannot_count_is_refused_by_name() {
        let error = QuotaConfig::new(Limits::new().tokens(Rate::per_day(1_000_000_007))).unwrap_err();
        assert_eq!(error.field(), "tokens.burst");
        let many = (0..101).fold(Limits::new(), |limits, _| limits.requests(Rate::per_second(1)));
        let error = QuotaConfig::new(many).unwrap_err();
        assert_eq!(error.to_string(), "invalid limits: must be 100 rates at most, are 101");
    }
}
