//! [`Cell`]: what the bucket of a key holds while no call waits for it and no estimate of it is open: one moment, in 12
//! bytes.
//!
//! A bucket that is not charged only fills, so the moment at which it will be full tells what it holds at any time.
//! Buckets fill by whole units in each nanosecond, and in the nanosecond in which they become full, mostly some of the
//! units do not fit. So beside the moment, a cell has how many units are `over`, which makes it exact: turned into a
//! cell and back, a bucket holds what it held, to the unit.

use crate::rate::bucket::BucketSpec;

/// A bucket at rest. The default is a full one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Cell {
    /// When the bucket is full, in nanoseconds since the epoch of its limiter: the lower and the upper half. Two halves
    /// need no alignment to 8 bytes, so that a cell takes 12 bytes and not 16.
    full_at: [u32; 2],
    /// How many units do not fit into the bucket in that nanosecond: fewer than a nanosecond brings.
    over: u32,
}

/// What all cells of one rate have in common.
#[derive(Clone, Copy, Debug)]
pub(super) struct CellSpec {
    fill: u64,
    unit: u128,
    capacity: u128,
    burst: u64,
    refuses: bool,
}

/// In place of the moment: the key has buckets, and the cell is its [pin](Cell::pinned).
const PINNED: u64 = u64::MAX;

// === impl CellSpec ===

impl CellSpec {
    /// Whether the buckets of a rate can be at rest in cells. Those that count by the calendar cannot, nor those that
    /// gain 2^32 units and more in a nanosecond.
    pub(super) fn fits(spec: &BucketSpec) -> bool {
        spec.fill > 0 && u32::try_from(spec.fill).is_ok()
    }

    pub(super) fn new(spec: &BucketSpec) -> Self {
        Self {
            fill: spec.fill,
            unit: spec.unit,
            capacity: spec.capacity.unsigned_abs(),
            burst: spec.burst(),
            refuses: spec.kind.refuses,
        }
    }

    pub(super) const fn burst(&self) -> u64 {
        self.burst
    }

    /// Whether a call whose cost the bucket does not hold is refused.
    pub(super) const fn refuses(&self) -> bool {
        self.refuses
    }
}

// === impl Cell ===

impl Cell {
    /// Returns the cell of a key that has buckets: those of the pin with this number.
    pub(super) const fn pinned(pin: u32) -> Self {
        Self {
            full_at: [u32::MAX; 2],
            over: pin,
        }
    }

    /// Returns the number of the pin if the key has buckets.
    #[inline]
    pub(super) const fn pin(self) -> Option<u32> {
        if self.full_at() == PINNED {
            Some(self.over)
        } else {
            None
        }
    }

    /// Returns when the bucket is full, in nanoseconds since the epoch.
    #[inline]
    pub(super) const fn full_at(self) -> u64 {
        (self.full_at[1] as u64) << 32 | self.full_at[0] as u64
    }

    /// Returns how many units the bucket lacks at the time `now`: more than its capacity if it is in debt.
    #[inline]
    pub(super) fn missing(self, spec: &CellSpec, now: u64) -> u128 {
        let left = self.full_at().saturating_sub(now);
        (u128::from(left) * u128::from(spec.fill)).saturating_sub(u128::from(self.over))
    }

    /// Returns the cell of a bucket that lacks so many units at the time `now`. A bucket that is full only after the end
    /// of time (584 years) is full then.
    #[inline]
    pub(super) fn with_missing(missing: u128, spec: &CellSpec, now: u64) -> Self {
        let ticks = div_ceil(missing, spec.fill);
        let full_at = u64::try_from(ticks).ok().and_then(|ticks| now.checked_add(ticks));
        let Some(full_at) = full_at.filter(|full_at| *full_at < PINNED) else {
            return Self {
                full_at: [u32::MAX - 1, u32::MAX],
                over: 0,
            };
        };
        Self {
            full_at: [full_at as u32, (full_at >> 32) as u32],
            over: (ticks * u128::from(spec.fill) - missing) as u32,
        }
    }

    /// Returns how long it takes from `now` until the bucket holds `amount`, in nanoseconds; 0 if it does. The amount may
    /// exceed the burst.
    pub(super) fn time_until(self, amount: u64, spec: &CellSpec, now: u64) -> u64 {
        if amount == 0 {
            return 0;
        }
        // As of a bucket, whose needs are bounded by `i128::MAX`.
        let needed = u128::from(amount).checked_mul(spec.unit);
        let needed = needed.unwrap_or(u128::MAX).min(i128::MAX as u128);
        let lacking = (self.missing(spec, now) + needed).saturating_sub(spec.capacity);
        u64::try_from(div_ceil(lacking, spec.fill)).unwrap_or(u64::MAX)
    }

    /// Returns how much the bucket holds at the time `now`, in whole requests or tokens, rounded down; 0
    /// if it is in debt.
    pub(super) fn available(self, spec: &CellSpec, now: u64) -> u64 {
        let held = spec.capacity.saturating_sub(self.missing(spec, now));
        u64::try_from(held / spec.unit).unwrap_or(u64::MAX)
    }

    /// Whether the bucket holds `amount`. An amount of 0 can always be taken, also from a bucket in debt.
    #[inline]
    pub(super) fn has(self, amount: u64, spec: &CellSpec, now: u64) -> bool {
        // A larger amount than the burst might overflow when it is converted to units.
        amount == 0
            || (amount <= spec.burst && self.missing(spec, now) + u128::from(amount) * spec.unit <= spec.capacity)
    }

    /// Takes `amount` if the bucket [holds](Self::has) it, and returns whether it was taken.
    #[inline]
    pub(super) fn try_take(&mut self, amount: u64, spec: &CellSpec, now: u64) -> bool {
        if amount == 0 {
            return true;
        }
        if amount > spec.burst {
            return false;
        }
        let missing = self.missing(spec, now) + u128::from(amount) * spec.unit;
        let holds = missing <= spec.capacity;
        if holds {
            *self = Self::with_missing(missing, spec, now);
        }
        holds
    }
}

/// Returns when the last of the cells is full, in nanoseconds since the epoch.
pub(super) fn full_at(cells: &[Cell]) -> u64 {
    cells.iter().map(|cell| cell.full_at()).fold(0, u64::max)
}

/// Returns `a / b`, rounded up. Division is much faster with 64 bits, which most numbers have. At most rates, a
/// nanosecond adds one unit, so that it is not needed at all.
#[inline]
fn div_ceil(a: u128, b: u64) -> u128 {
    match u64::try_from(a) {
        Ok(_) if b == 1 => a,
        Ok(a) => u128::from(a.div_ceil(b)),
        Err(_) => a.div_ceil(u128::from(b)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rate::{bucket::Bucket, limits::Limits, limits::Rate};
    use fastrand::Rng;
    use std::time::Duration;

    fn spec(rate: Rate) -> BucketSpec {
        Limits::new().requests(rate).bucket_specs().unwrap()[0].1
    }

    #[test]
    fn a_cell_takes_twelve_bytes() {
        assert_eq!(size_of::<[Cell; 2]>(), 24);
    }

    #[test]
    fn a_cell_admits_what_the_bucket_admits_and_tells_the_same_waits() {
        let mut rng = Rng::with_seed(1);
        for _ in 0..2_000 {
            let amount = rng.u64(1..=1_000_000);
            let period = Duration::from_nanos(rng.u64(1..=100_000_000_000));
            let burst = rng.u64(1..=1_000);
            let rate = Rate::new(amount, period).burst(burst);
            let spec = spec(rate);
            if !CellSpec::fits(&spec) {
                continue;
            }
            let of_cell = CellSpec::new(&spec);
            let (mut bucket, mut cell, mut now) = (Bucket::new(spec), Cell::default(), 0);
            for _ in 0..40 {
                let elapsed = rng.u64(0..=2 * period.as_nanos() as u64 / amount.max(1) + 2);
                now += elapsed;
                bucket.advance(elapsed);
                let cost = rng.u64(0..=burst);
                assert_eq!(bucket.time_until(cost), cell.time_until(cost, &of_cell, now));
                assert_eq!(bucket.has(cost), cell.has(cost, &of_cell, now));
                assert_eq!(bucket.try_take(cost, false), cell.try_take(cost, &of_cell, now));
                assert_eq!(bucket.missing(), cell.missing(&of_cell, now));
                assert_eq!(bucket.available(), cell.available(&of_cell, now));
            }
        }
    }

    #[test]
    fn a_bucket_that_is_full_after_the_end_of_time_is_no_pin() {
        let of_cell = CellSpec::new(&spec(Rate::per_second(1)));
        let cell = Cell::with_missing(u128::from(u64::MAX), &of_cell, 5);
        assert_eq!((cell.pin(), cell.full_at()), (None, u64::MAX - 1));
        assert_eq!(Cell::pinned(7).pin(), Some(7));
        assert_eq!(Cell::default().time_until(u64::MAX, &of_cell, 0), u64::MAX);
    }
}
