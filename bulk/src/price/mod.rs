//! What requests cost: prices per million tokens, and amounts of money, both exact.
//!
//! The currency is that of the prices: nothing is converted, and no currency is shown.

mod spending;
mod usage;

pub(crate) use spending::{Expected, Spending};

use crate::input::Request;
use serde_json::value::RawValue;
use std::{
    fmt,
    iter::Sum,
    ops::{Add, AddAssign},
    str::FromStr,
};
use tower_outbound::Cost;
use usage::Usage;

/// The number of decimals of an amount: a price has up to six, and a millionth of that is the price of one token.
const DECIMALS: u32 = 12;

/// The number of decimals of a price per million tokens.
const PRICE_DECIMALS: usize = 6;

/// An amount of money, in units of 10^-12 of the currency. Sums are exact.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Money(u128);

/// A price per million tokens, in units of 10^-6 of the currency: 0.15 is 150,000. So it is also the price of one token,
/// in the units of [`Money`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct PerMillion(u64);

/// The prices of tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Price {
    pub(crate) input: PerMillion,
    /// The price of input tokens that the provider reads from its cache.
    pub(crate) cached_input: PerMillion,
    pub(crate) output: PerMillion,
}

// === impl Price ===

impl Price {
    /// Returns what an answer has cost, by the usage that its body reports. `None` if it reports no usage.
    pub(crate) fn of_answer(&self, body: &[u8]) -> Option<Money> {
        let usage = Usage::of_body(body)?;
        Some(self.of_usage(&usage))
    }

    /// Returns what a request will cost at most, by its estimate of tokens: its `max_tokens` (or the field of the same
    /// meaning) at the price of output, the rest at the price of input.
    pub(crate) fn estimate(&self, request: &Request) -> Money {
        let output = usage::max_output(&request.body).min(request.tokens);
        self.input.times(request.tokens - output) + self.output.times(output)
    }

    /// Returns what the request costs of each budget: its tokens apart, as its prompt and the longest answer that it
    /// allows.
    pub(crate) fn tokens_apart(request: &Request) -> Cost {
        let output = usage::max_output(&request.body).min(request.tokens);
        Cost::input_output_tokens(request.tokens - output, output)
    }

    /// Returns whether the request sets a bound of its output, so that its [estimate](Self::estimate) is one of all of
    /// its cost.
    pub(crate) fn bounds_output(request: &Request) -> bool {
        usage::max_output(&request.body) > 0
    }

    fn of_usage(&self, usage: &Usage) -> Money {
        // A write to the cache costs more than plain input: by 25 % for the cache of five minutes, and twice as much for
        // that of an hour (Anthropic, the only provider that reports writes).
        let quarters = 5 * u128::from(usage.written) + 8 * u128::from(usage.written_for_an_hour);
        let quarter_prices = quarters.saturating_mul(u128::from(self.input.0));
        self.input.times(usage.input)
            + Money(quarter_prices.div_ceil(4))
            + self.cached_input.times(usage.cached)
            + self.output.times(usage.output)
    }
}

// === impl PerMillion ===

impl PerMillion {
    fn times(self, tokens: u64) -> Money {
        Money(u128::from(self.0) * u128::from(tokens))
    }
}

impl FromStr for PerMillion {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let millionths =
            parse_decimal(text, PRICE_DECIMALS).ok_or("must be a number such as 0.15, with up to six decimals")?;
        u64::try_from(millionths).map(Self).map_err(|_| "is too large")
    }
}

// === impl Money ===

impl Money {
    /// Returns the part of this amount that is above `bound`, or zero.
    pub(crate) const fn above(self, bound: Self) -> Self {
        Self(self.0.saturating_sub(bound.0))
    }

    /// Returns the mean, rounded up, of an amount that is the sum of this many; zero if there is none.
    pub(crate) fn shared_by(self, count: u64) -> Self {
        Self(self.0.div_ceil(u128::from(count.max(1))))
    }

    pub(crate) const fn is_zero(self) -> bool {
        self.0 == 0
    }

    /// Returns the exact amount as a JSON number.
    pub(crate) fn to_json(self) -> Option<Box<RawValue>> {
        let unit = 10_u128.pow(DECIMALS);
        let text = format!("{}.{:0width$}", self.0 / unit, self.0 % unit, width = DECIMALS as usize);
        RawValue::from_string(text.trim_end_matches('0').trim_end_matches('.').to_owned()).ok()
    }
}

impl FromStr for Money {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse_decimal(text, DECIMALS as usize)
            .map(Self)
            .ok_or("must be an amount such as 12.50")
    }
}

/// Shows two decimals, and up to six where the amount is small: `1234.50`, `0.0042`. Rounds up, so that a cost is never
/// shown as less than it is.
impl fmt::Display for Money {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = 10_u128.pow(DECIMALS);
        let decimals = match self.0 {
            amount if amount >= 100 * unit => 2,
            amount if amount >= unit => 4,
            _ => 6,
        };
        let rounded = self.0.div_ceil(10_u128.pow(DECIMALS - decimals));
        let whole = 10_u128.pow(decimals);
        let mut text = format!(
            "{}.{:0width$}",
            rounded / whole,
            rounded % whole,
            width = decimals as usize
        );
        let shortest = text.len() - decimals as usize + 2;
        text.truncate(text.trim_end_matches('0').len().max(shortest));
        f.pad(&text)
    }
}

impl Add for Money {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }
}

impl AddAssign for Money {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl Sum for Money {
    fn sum<I: Iterator<Item = Self>>(amounts: I) -> Self {
        amounts.fold(Self::default(), Self::add)
    }
}

/// Parses a number without sign and exponent, and returns it in units of 10^-`decimals`. `None` if it is none, or has
/// more decimals.
fn parse_decimal(text: &str, decimals: usize) -> Option<u128> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let is_number = |part: &str| part.bytes().all(|digit| digit.is_ascii_digit());
    let has_digits = !whole.is_empty() || !fraction.is_empty();
    if !has_digits || !is_number(whole) || !is_number(fraction) || fraction.len() > decimals {
        return None;
    }
    // Twenty digits before the point leave room for sums.
    if whole.len() > 20 {
        return None;
    }
    format!("{whole}{fraction:0<decimals$}").parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn money(text: &str) -> Money {
        text.parse().unwrap()
    }

    #[test]
    fn a_price_is_a_decimal_number_with_up_to_six_decimals() {
        for (text, millionths) in [("0.15", 150_000), ("2", 2_000_000), (".000001", 1), ("10.", 10_000_000)] {
            assert_eq!(text.parse(), Ok(PerMillion(millionths)), "{text}");
        }
        for bad in ["", ".", "-1", "1e3", "0.0000001", "1,5", "$2", "99999999999999999999"] {
            assert!(bad.parse::<PerMillion>().is_err(), "{bad}");
        }
    }

    #[test]
    fn the_cost_of_tokens_is_exact() {
        let price = Price {
            input: "0.15".parse().unwrap(),
            cached_input: "0.075".parse().unwrap(),
            output: "0.6".parse().unwrap(),
        };
        let usage = Usage {
            input: 1,
            cached: 1,
            output: 1,
            ..Usage::default()
        };
        assert_eq!(price.of_usage(&usage), money("0.000000825"));
        // A million of each, added one by one, is the sum of the prices.
        let sum: Money = (0..1_000_000).map(|_| price.of_usage(&usage)).sum();
        assert_eq!(sum, money("0.825"));
    }

    #[test]
    fn a_write_to_the_cache_costs_a_quarter_more_and_twice_as_much_for_an_hour() {
        let price = Price {
            input: "4".parse().unwrap(),
            cached_input: "0.4".parse().unwrap(),
            output: "8".parse().unwrap(),
        };
        let usage = Usage {
            written: 1_000_000,
            written_for_an_hour: 1_000_000,
            ..Usage::default()
        };
        assert_eq!(price.of_usage(&usage), money("13"));
    }

    #[test]
    fn a_cost_beyond_all_measure_is_the_largest_one() {
        let most = PerMillion(u64::MAX);
        let price = Price {
            input: most,
            cached_input: most,
            output: most,
        };
        let usage = Usage {
            input: u64::MAX,
            cached: u64::MAX,
            written: u64::MAX,
            written_for_an_hour: u64::MAX,
            output: u64::MAX,
        };
        assert_eq!(price.of_usage(&usage), Money(u128::MAX));
    }

    #[test]
    fn an_amount_is_shown_rounded_up_and_written_exactly() {
        for (text, shown) in [
            ("0", "0.00"),
            ("1234.5", "1234.50"),
            ("1.23456", "1.2346"),
            ("0.000000825", "0.000001"),
            ("0.5", "0.50"),
            ("12", "12.00"),
        ] {
            assert_eq!(money(text).to_string(), shown);
        }
        assert_eq!(money("0.000000825").to_json().unwrap().get(), "0.000000825");
        assert_eq!(money("12").to_json().unwrap().get(), "12");
        assert_eq!(money("120.50").to_json().unwrap().get(), "120.5");
    }
}
