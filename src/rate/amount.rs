//! [`Amount`]: a number of requests or tokens, for the settings of a rate limit.

use std::fmt;

/// A number of requests or tokens in the settings of a rate limit: an integer, or a fraction, which is rounded to a
/// millionth.
///
/// Integers and floating-point numbers convert into an `Amount`. Whether the number is valid is checked when a limiter
/// is built from it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Amount(Number);

#[derive(Clone, Copy, Debug, PartialEq)]
enum Number {
    Whole(u64),
    Negative(i64),
    /// Any floating-point number, also one without a fraction and an invalid one, such as NaN.
    Float(f64),
}

/// The denominator of a fractional amount, which is rounded to millionths.
const SCALE: u64 = 1_000_000;

/// The largest valid floating-point amount: `u64::MAX` millionths.
const MAX_FLOAT: f64 = u64::MAX as f64 / SCALE as f64;

/// Returns the greatest common divisor of `a` and `b`.
pub(super) fn gcd(mut a: u128, mut b: u128) -> u128 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

// === impl Amount ===

impl Amount {
    pub(super) fn value(&self) -> f64 {
        match self.0 {
            Number::Whole(amount) => amount as f64,
            Number::Negative(amount) => amount as f64,
            Number::Float(amount) => amount,
        }
    }

    /// Returns the amount as a numerator and a denominator, or an error text if the amount is invalid.
    pub(super) fn fraction(&self) -> Result<(u64, u64), String> {
        match self.0 {
            Number::Whole(amount) => Ok((amount, 1)),
            Number::Negative(amount) => Err(format!("must not be negative, is {amount}")),
            Number::Float(amount) if !amount.is_finite() => Err(format!("must be a finite number, is {amount}")),
            Number::Float(amount) if amount < 0.0 => Err(format!("must not be negative, is {amount}")),
            Number::Float(amount) if amount > MAX_FLOAT => Err(format!(
                "must be at most {MAX_FLOAT} as a floating-point number, is {amount}"
            )),
            Number::Float(amount) if amount.fract() == 0.0 => Ok((amount as u64, 1)),
            Number::Float(amount) => match (amount * SCALE as f64).round() as u64 {
                0 => Err(format!("must be at least a millionth, is {amount}")),
                millionths => Ok((millionths, SCALE)),
            },
        }
    }
}

/// Writes the number as it was given, such as `60`, `-1` or `0.5`.
impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Number::Whole(amount) => amount.fmt(f),
            Number::Negative(amount) => amount.fmt(f),
            // A float is written in its debug format, such as `5.0`, which is parsed back into the same float. Its
            // display format, `5`, would be parsed into an integer.
            Number::Float(amount) => write!(f, "{amount:?}"),
        }
    }
}

impl Amount {
    /// Returns this amount multiplied by `factor` and rounded down: to an integer if the product is 100 or more, to a
    /// millionth if it is less.
    pub(super) fn scaled(&self, factor: f64) -> Self {
        let amount = self.value() * factor;
        if amount >= 100.0 {
            // The product is rounded to an integer because a fraction would make the bucket divide each request or
            // token into more units. A large burst might then have too many units to be counted exactly.
            Self::from(amount as u64)
        } else {
            let millionths = (amount * SCALE as f64).floor().max(1.0);
            Self::from(millionths / SCALE as f64)
        }
    }
}

#[cfg(feature = "redis")]
impl Amount {
    /// Parses the text that [`Display`](fmt::Display) writes for an `Amount`.
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

/// Accepts integer literals, whose default type is `i32`. A negative number is rejected when the limiter is built.
impl From<i32> for Amount {
    fn from(amount: i32) -> Self {
        i64::from(amount).into()
    }
}

/// A negative number is rejected when the limiter is built.
impl From<i64> for Amount {
    fn from(amount: i64) -> Self {
        Self(u64::try_from(amount).map_or(Number::Negative(amount), Number::Whole))
    }
}

/// A number that is negative or not finite is rejected when the limiter is built.
impl From<f64> for Amount {
    fn from(amount: f64) -> Self {
        Self(Number::Float(amount))
    }
}
