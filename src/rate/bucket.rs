//! [`Bucket`]: the arithmetic of the bucket of one rate. It counts in integers and has no clock, lock or timer: its
//! owner passes the time that has elapsed.
//!
//! # Units
//!
//! Time is counted in ticks: nanoseconds in a [`RateLimiter`](super::RateLimiter), microseconds in a limiter that
//! processes share in Redis. A rate of `amount` per `period` is counted in units so small that every quantity is an
//! integer: with `g = gcd(amount, period in ticks)`, one request or token is `period / g` units, and each tick adds
//! `amount / g` units. At 500 requests a minute, for example, one request is 120,000,000 units, and each nanosecond
//! adds 1 unit. So the fill is never rounded: after a year at any rate the balance is exact.
//!
//! # Estimates
//!
//! A charge may be an estimate, which is corrected when the true cost is known: see [`settlement`].

mod resting;
mod settlement;

#[cfg(feature = "redis")]
mod shared;

use super::{
    calendar::{Calendar, OpenWindow},
    used_share::UsedShare,
};
use settlement::Unsettled;

/// The settings of one bucket: its rate, capacity and initial fill, in units (integer fractions of a request or token).
/// See the [module docs](self).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BucketSpec {
    /// The number of units that one tick adds. A tick is a nanosecond, or a microsecond in a limiter that processes
    /// share.
    pub(super) fill: u64,
    /// The number of units in one request or token.
    pub(super) unit: u128,
    /// The number of units in a full bucket.
    pub(super) capacity: i128,
    /// The number of units in a new bucket.
    pub(super) initial: i128,
    /// The largest debt, in units. What would go deeper is cut off: see [`Rate::max_debt`](super::Rate::max_debt).
    pub(super) max_debt: i128,
    /// The number of ticks in a second.
    pub(super) second: u64,
    pub(super) kind: BucketKind,
}

/// How a bucket differs from one that fills continuously, makes calls wait, and credits a call that was woken late.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct BucketKind {
    /// Present if the bucket is filled at once when a window of the calendar begins, and does not gain otherwise.
    pub(super) calendar: Option<Calendar>,
    /// Whether a call whose cost the bucket does not hold is refused, and does not wait.
    pub(super) refuses: bool,
    /// Whether a call is never admitted as of an earlier time: see [`Rate::strict`](super::Rate::strict).
    pub(super) is_strict: bool,
}

/// A bucket of requests or tokens. Its balance is negative while the bucket is in debt.
#[derive(Clone, Debug)]
pub(super) struct Bucket {
    /// The number of units that one tick adds.
    fill: u64,
    /// The capacity in whole requests or tokens, rounded down.
    burst: u64,
    /// The number of units in one request or token.
    unit: u128,
    /// The number of units in a full bucket.
    capacity: i128,
    /// The largest debt, in units.
    max_debt: i128,
    balance: i128,
    /// The sum of all units that the bucket did not hold on to: what overflowed, was withheld from refunds, or was
    /// [lowered](Self::lower_to). Only differences of this sum have a meaning, so it may wrap around.
    lost: i128,
    refuses: bool,
    is_strict: bool,
    /// `None` until it is needed, so that most buckets take little memory.
    rest: Option<Box<Rest>>,
}

/// What only some buckets need.
#[derive(Clone, Debug, Default)]
struct Rest {
    /// The window of the calendar that the bucket is in. The bucket has no `fill` then.
    window: Option<OpenWindow>,
    unsettled: Unsettled,
}

/// The largest number of units in a capacity, in a debt, and in one request or token. An `i128` can represent the sum
/// of two of them.
pub(super) const MAX_UNITS: u128 = 1 << 126;

impl BucketKind {
    /// Whether the bucket is an allowance of which calls take until it is used up: it refuses calls or counts by the
    /// calendar.
    #[cfg(feature = "redis")]
    pub(super) const fn is_allowance(&self) -> bool {
        self.refuses || self.calendar.is_some()
    }
}

impl BucketSpec {
    /// Returns the capacity in whole requests or tokens, rounded down.
    pub(super) fn burst(&self) -> u64 {
        whole(self.capacity, self.unit)
    }
}

impl Bucket {
    /// Creates a bucket that begins at the time `began`, in ticks since 1970, which only windows of the calendar depend
    /// on.
    pub(super) fn new_at(spec: BucketSpec, began: u64) -> Self {
        let window = spec.kind.calendar;
        let window = window.map(|calendar| OpenWindow::new(calendar, began, spec.second));
        let rest = window.map(|window| Rest {
            window: Some(window),
            unsettled: Unsettled::default(),
        });
        Self {
            rest: rest.map(Box::new),
            ..Self::new(spec)
        }
    }

    pub(super) fn new(spec: BucketSpec) -> Self {
        Self {
            fill: spec.fill,
            burst: spec.burst(),
            unit: spec.unit,
            capacity: spec.capacity,
            max_debt: spec.max_debt,
            balance: spec.initial,
            lost: 0,
            refuses: spec.kind.refuses,
            is_strict: spec.kind.is_strict,
            rest: None,
        }
    }

    /// Returns the capacity in whole requests or tokens, rounded down.
    pub(super) const fn burst(&self) -> u64 {
        self.burst
    }

    /// Returns the balance in whole requests or tokens, rounded down; 0 if the bucket is in debt.
    pub(super) fn available(&self) -> u64 {
        self.available_after(0)
    }

    /// Returns the balance that the bucket has `elapsed` ticks later, in whole requests or tokens, rounded down; 0 if the
    /// bucket is in debt then.
    pub(super) fn available_after(&self, elapsed: u64) -> u64 {
        whole(self.balance_after(elapsed).max(0), self.unit)
    }

    /// Returns the balance that the bucket has `elapsed` ticks later if nothing is taken before.
    fn balance_after(&self, elapsed: u64) -> i128 {
        match self.window() {
            Some(window) if window.left() <= elapsed => self.capacity,
            Some(_) => self.balance,
            None => self.balance.saturating_add(self.gain(elapsed)).min(self.capacity),
        }
    }

    /// Returns whether the bucket holds `amount`. An amount of 0 can always be taken, also from a bucket in debt.
    #[inline]
    pub(super) fn has(&self, amount: u64) -> bool {
        // `amount` is compared with the burst first, because a larger amount could overflow when it is converted to
        // units.
        amount == 0 || (amount <= self.burst && self.units_of(amount) <= self.balance)
    }

    /// Whether a call whose cost the bucket does not hold is refused.
    #[inline]
    pub(super) const fn refuses(&self) -> bool {
        self.refuses
    }

    fn window(&self) -> Option<&OpenWindow> {
        self.rest.as_ref()?.window.as_ref()
    }

    /// Returns the number of ticks until the window ends that the bucket is in. `None` if it fills continuously.
    pub(super) fn until_window_ends(&self) -> Option<u64> {
        self.window().map(|window| window.left())
    }

    /// Returns the balance that the bucket has `elapsed` ticks later, in whole requests or tokens, rounded down; negative
    /// for a debt.
    pub(super) fn whole_balance_after(&self, elapsed: u64) -> i64 {
        let whole = self.balance_after(elapsed).div_euclid(self.unit as i128);
        i64::try_from(whole).unwrap_or(if whole < 0 { i64::MIN } else { i64::MAX })
    }

    /// Sets the balance to what a bucket holds that held `amount` requests or tokens (negative for a debt) `age` ticks
    /// ago. Does nothing if a window of the calendar has begun since.
    pub(super) fn restore(&mut self, amount: i64, age: u64) {
        if self.window().is_some_and(|window| !window.has_lasted(age)) {
            return;
        }
        let units = self.saturating_units(amount.unsigned_abs());
        let units = if amount < 0 { -units } else { units };
        let balance = units.clamp(-self.max_debt, self.capacity);
        self.lost = self.lost.wrapping_add(self.balance.saturating_sub(balance));
        self.balance = balance;
        if self.fill > 0 {
            self.advance(age);
        }
        self.update_withheld();
    }

    /// Adds what the rate yields in `elapsed` ticks, up to the capacity.
    #[inline]
    pub(super) fn advance(&mut self, elapsed: u64) {
        if self.fill == 0 {
            return self.advance_window(elapsed);
        }
        let gained = u128::from(elapsed) * u128::from(self.fill);
        // How much the bucket can still gain: at most 2^127, which only a `u128` can represent. The balance never exceeds
        // the capacity.
        let room = self.capacity.wrapping_sub(self.balance) as u128;
        if gained < room {
            self.balance += gained as i128;
        } else {
            self.balance = self.capacity;
            self.lost = self.lost.wrapping_add((gained - room) as i128);
        }
        self.update_withheld();
    }

    /// Fills the bucket if a window begins within `elapsed` ticks.
    #[cold]
    fn advance_window(&mut self, elapsed: u64) {
        let window = self.rest.as_mut().and_then(|rest| rest.window.as_mut());
        let is_new = window.is_some_and(|window| window.advance(elapsed));
        if is_new {
            // What a provider held in the window before says nothing about this one, so the level rises beyond all that
            // it could be compared with.
            self.lost = self.lost.wrapping_add(self.capacity);
            self.balance = self.capacity;
            self.update_withheld();
        }
    }

    /// Loses what would overflow within `ticks` before the next charge. For a call that is admitted as of a time that is
    /// `ticks` ago, because of another bucket: this one has overflowed meanwhile, at the provider, too. The balance may
    /// become lower than the cost that is charged next, until the bucket is filled up to the present.
    ///
    /// A bucket with a burst so small that it cannot hold what the rate adds in `catch_up` ticks, the longest time that
    /// is caught up, loses nothing: otherwise two such buckets could not reach their rates together. Neither does one that
    /// made the call wait (`is_binding`). Those of [strict](super::Rate::strict) rates always do.
    pub(super) fn overflow(&mut self, ticks: u64, is_binding: bool, catch_up: u64) {
        if !self.is_strict && (is_binding || self.capacity < self.gain(catch_up)) {
            return;
        }
        let filled = self.balance.saturating_add(self.gain(ticks));
        let spilled = filled.saturating_sub(self.capacity).max(0);
        self.balance -= spilled;
        self.lost = self.lost.wrapping_add(spilled);
        // What would have overflowed by now without the unsettled estimates is withheld from their refunds.
        self.withhold_overflow(filled.min(self.capacity));
    }

    /// Returns the number of ticks until `amount` can be taken if nothing else is taken before; 0 for an amount of 0,
    /// also if the bucket is in debt. The amount may exceed the burst.
    #[inline]
    pub(super) fn time_until(&self, amount: u64) -> u64 {
        if amount == 0 {
            return 0;
        }
        self.time_until_units(self.saturating_units(amount), self.balance)
    }

    /// Does what [`time_until`](Self::time_until) does for the sum of several amounts.
    pub(super) fn time_until_sum(&self, amount: u128) -> u64 {
        self.time_until_sum_with(amount, 0)
    }

    /// Does what [`time_until_sum`](Self::time_until_sum) does, for a bucket that gets a refund of `refund` units at
    /// once.
    fn time_until_sum_with(&self, amount: u128, refund: i128) -> u64 {
        if amount == 0 {
            return 0;
        }
        let needed = amount
            .checked_mul(self.unit)
            .map_or(i128::MAX, |units| units.min(i128::MAX as u128) as i128);
        self.time_until_units(needed, self.balance.saturating_add(refund))
    }

    /// Returns the number of ticks until a bucket with this balance holds `needed` units.
    #[inline]
    fn time_until_units(&self, needed: i128, balance: i128) -> u64 {
        if needed <= balance {
            return 0;
        }
        if self.fill == 0 {
            // A debt ends with its window.
            return self.window_with(needed.saturating_sub(balance.max(0)) as u128);
        }
        let missing = needed.saturating_sub(balance) as u128;
        // Division is much faster with 64 bits, which most numbers have. At most rates a tick adds one unit, so that it is
        // not needed at all.
        match u64::try_from(missing) {
            Ok(missing) if self.fill == 1 => missing,
            Ok(missing) => missing.div_ceil(self.fill),
            Err(_) => u64::try_from(missing.div_ceil(u128::from(self.fill))).unwrap_or(u64::MAX),
        }
    }

    /// Returns the number of ticks until a window begins in which so many more units are there, if each window before it
    /// is used up.
    #[cold]
    fn window_with(&self, missing: u128) -> u64 {
        let windows = (missing - 1) / self.capacity.max(1) as u128;
        let windows = u64::try_from(windows).unwrap_or(u64::MAX);
        self.window().map_or(u64::MAX, |window| window.left_after(windows))
    }

    /// Returns the number of ticks until `amount` can probably be taken: the unsettled estimates are expected to be
    /// refunded, except for the share that calls turn out to use.
    pub(super) fn expected_time_until(&self, amount: u128, share: UsedShare) -> u64 {
        let estimated = self.estimated();
        let used = share.of(estimated.unsigned_abs()) as i128;
        self.time_until_sum_with(amount, (estimated - used - self.withheld()).max(0))
    }

    /// Takes `amount` if the bucket [holds](Self::has) it, and returns whether it was taken.
    #[inline]
    pub(super) fn try_take(&mut self, amount: u64, is_estimate: bool) -> bool {
        let is_available = self.has(amount);
        if is_available {
            self.take(amount, is_estimate);
        }
        is_available
    }

    /// Takes `amount`, which the bucket must hold: see [`has`](Self::has). If `is_estimate` is set, the amount is an
    /// estimate, and [`settle`](Self::settle) must follow.
    #[inline]
    pub(super) fn take(&mut self, amount: u64, is_estimate: bool) {
        let units = self.units_of(amount);
        self.balance -= units;
        if is_estimate {
            let unsettled = self.unsettled_mut();
            unsettled.estimated = unsettled.estimated.saturating_add(units);
            unsettled.charged += 1;
        }
    }

    /// Undoes [`take`](Self::take), after which nothing else must have changed the bucket.
    pub(super) fn put_back(&mut self, amount: u64, is_estimate: bool) {
        let units = self.units_of(amount);
        self.balance += units;
        if is_estimate {
            let unsettled = self.unsettled_mut();
            unsettled.estimated -= units;
            unsettled.charged -= 1;
        }
    }

    /// Returns what the balance would be if nothing had been [`lost`](Self::lost). Between two times, this level rises
    /// by what the rate yields, also beyond the capacity, and falls by what is charged. It may wrap around.
    #[cfg(feature = "http")]
    pub(super) const fn level(&self) -> i128 {
        self.balance.wrapping_add(self.lost)
    }

    /// Lowers the balance to `amount` requests or tokens, and never raises it.
    pub(super) fn lower(&mut self, amount: u64) {
        self.lower_by(self.balance.saturating_sub(self.saturating_units(amount)));
    }

    /// Lowers the balance so that it is what it would be now if the bucket had held `amount` requests or tokens at an
    /// earlier time, at which its [`level`](Self::level) was `level`. Never raises the balance.
    #[cfg(feature = "http")]
    pub(super) fn lower_since(&mut self, amount: u64, level: i128) {
        let held = level.wrapping_sub(self.lost);
        self.lower_by(held.saturating_sub(self.saturating_units(amount)));
    }

    /// Lowers the balance so that it is at most what the bucket would hold now if it had held `amount` requests or
    /// tokens `elapsed` ticks ago and nothing had been charged since. Never raises the balance.
    #[cfg(feature = "http")]
    pub(super) fn lower_before(&mut self, amount: u64, elapsed: u64) {
        let gained = (u128::from(elapsed) * u128::from(self.fill)).min(MAX_UNITS) as i128;
        let held = self.saturating_units(amount).saturating_add(gained);
        self.lower_by(self.balance.saturating_sub(held));
    }

    /// Takes `units` from a positive balance, at most all of it.
    fn lower_by(&mut self, units: i128) {
        let units = units.min(self.balance).max(0);
        self.balance -= units;
        self.lost = self.lost.wrapping_add(units);
        self.update_withheld();
    }

    /// Takes over the balance or debt and the unsettled estimates of `old`, the bucket of the rate that this bucket's
    /// rate replaces. A balance above the new capacity is cut off.
    pub(super) fn carry_over(&mut self, old: &Self) {
        let convert = |units: i128| -> i128 {
            let (from, to) = (old.unit, self.unit);
            let whole = units.div_euclid(from as i128).saturating_mul(to as i128);
            let part = mul_div(units.rem_euclid(from as i128) as u128, to, from);
            whole.saturating_add(part as i128)
        };
        let balance = convert(old.balance);
        self.balance = balance.clamp(-self.max_debt, self.capacity);
        // Like the balance, the withheld part is converted from the units of the old bucket to those of this one. If it
        // were converted by itself, it could be rounded down, and a refund could be one unit too large. So the old
        // balance minus the old withheld part is converted, and what this result is below the converted balance is the
        // new withheld part.
        let without = convert(old.balance.saturating_sub(old.withheld()));
        if let Some(rest) = &old.rest {
            let estimated = convert(rest.unsettled.estimated);
            *self.unsettled_mut() = Unsettled {
                estimated,
                withheld: balance.saturating_sub(without).min(estimated),
                ..rest.unsettled.clone()
            };
        }
        self.withhold((-self.max_debt).saturating_sub(balance).max(0));
        self.update_withheld();
    }

    /// Returns what the rate yields in `elapsed` ticks, in units.
    pub(super) fn gain(&self, elapsed: u64) -> i128 {
        (u128::from(elapsed) * u128::from(self.fill)).min(MAX_UNITS) as i128
    }

    /// Converts an amount of requests or tokens to units. An amount up to the burst cannot overflow.
    #[inline]
    fn units_of(&self, amount: u64) -> i128 {
        (u128::from(amount) * self.unit) as i128
    }

    /// Converts any amount of requests or tokens to units, at most to `i128::MAX`.
    fn saturating_units(&self, amount: u64) -> i128 {
        if amount <= self.burst {
            return self.units_of(amount);
        }
        u128::from(amount)
            .checked_mul(self.unit)
            .map_or(i128::MAX, |units| units.min(i128::MAX as u128) as i128)
    }
}

#[cfg(any(feature = "http", all(test, feature = "redis")))]
impl Bucket {
    pub(super) const fn capacity(&self) -> i128 {
        self.capacity
    }

    pub(super) const fn balance(&self) -> i128 {
        self.balance
    }
}

/// Methods for a bucket that follows a provider's: see [`followed`](super::followed).
#[cfg(feature = "http")]
impl Bucket {
    /// Whether the bucket is filled when a window of the calendar begins, and does not gain otherwise.
    pub(super) fn is_by_calendar(&self) -> bool {
        self.window().is_some()
    }

    pub(super) const fn unit(&self) -> u128 {
        self.unit
    }

    /// Converts an amount of requests or tokens to units, at most to the largest number of units.
    pub(super) fn units(&self, amount: u64) -> i128 {
        self.saturating_units(amount).min(MAX_UNITS as i128)
    }

    /// Moves the balance by `units`, up to the capacity and down to the largest debt. The [`level`](Self::level) stays:
    /// nothing is charged or gained.
    pub(super) fn shift(&mut self, units: i128) {
        let balance = self
            .balance
            .saturating_add(units)
            .clamp((-self.max_debt).min(self.balance), self.capacity);
        self.lost = self.lost.wrapping_sub(balance - self.balance);
        self.balance = balance;
        self.update_withheld();
    }
}

/// Returns `a * b / c`, rounded down, for an `a` below `c`. The product may be too large for a `u128`.
fn mul_div(mut a: u128, mut b: u128, c: u128) -> u128 {
    if let Some(product) = a.checked_mul(b) {
        return product / c;
    }
    // The multiplication adds `a`, doubled once for each bit of `b`, and counts how often the sum and the doubled `a`
    // reach `c`. All of these numbers are below 2^127, so a doubled one does not overflow.
    let (mut quotient, mut rest, mut quotient_of_a) = (0_u128, 0_u128, 0_u128);
    while b > 0 {
        if b & 1 == 1 {
            quotient += quotient_of_a;
            rest += a;
            if rest >= c {
                (rest, quotient) = (rest - c, quotient + 1);
            }
        }
        (a, quotient_of_a) = (a << 1, quotient_of_a << 1);
        if a >= c {
            (a, quotient_of_a) = (a - c, quotient_of_a + 1);
        }
        b >>= 1;
    }
    quotient
}

/// Returns the number of whole requests or tokens in `units`, which must not be negative.
fn whole(units: i128, unit: u128) -> u64 {
    u64::try_from(units as u128 / unit).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
