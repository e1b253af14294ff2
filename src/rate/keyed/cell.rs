//! [`Cell`]: what the bucket of a key holds while nobody waits for it and no estimate is out: one moment, in 12 bytes.
//!
//! A bucket that nobody charges only fills, so the moment when it will be full tells what it holds at any time. Buckets
//! fill by whole units in each nanosecond, and in the nanosecond in which they become full, mostly some of the units do
//! not fit. So beside the moment, a cell has how many units are `over`, which makes it exact: turned into a cell and
//! back, a bucket holds what it held, to the unit.

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
}

impl CellSpec {
    /// Returns `None` for a rate whose buckets cannot be at rest in a cell: those that count by the calendar, or begin
    /// with less than their burst, and those that bring 2^32 units and more in a nanosecond.
    pub(super) fn new(spec: &BucketSpec) -> Option<Self> {
        let is_plain = spec.kind.calendar.is_none() && spec.initial == spec.capacity;
        (is_plain && spec.fill > 0 && u32::try_from(spec.fill).is_ok()).then(|| Self {
            fill: spec.fill,
            unit: spec.unit,
            capacity: spec.capacity.unsigned_abs(),
            burst: spec.burst(),
        })
    }

    pub(super) const fn burst(&self) -> u64 {
        self.burst
    }
}

impl Cell {
    fn full_at(self) -> u64 {
        u64::from(self.full_at[1]) << 32 | u64::from(self.full_at[0])
    }

    pub(super) fn is_full(self, now: u64) -> bool {
        self.full_at() <= now
    }

    /// Returns how many units the bucket lacks at the time `now`: more than its capacity if it is in debt.
    pub(super) fn missing(self, spec: &CellSpec, now: u64) -> u128 {
        let left = self.full_at().saturating_sub(now);
        (u128::from(left) * u128::from(spec.fill)).saturating_sub(u128::from(self.over))
    }

    /// Returns the cell of a bucket that lacks so many units at the time `now`. A bucket that is full only after the end
    /// of time (584 years) is full then.
    pub(super) fn with_missing(missing: u128, spec: &CellSpec, now: u64) -> Self {
        let ticks = div_ceil(missing, spec.fill);
        let Some(full_at) = u64::try_from(ticks).ok().and_then(|ticks| now.checked_add(ticks)) else {
            return Self {
                full_at: [u32::MAX; 2],
                over: 0,
            };
        };
        let over = ticks * u128::from(spec.fill) - missing;
        Self {
            full_at: [full_at as u32, (full_at >> 32) as u32],
            over: over as u32,
        }
    }

    /// Returns how long it takes from `now` until the bucket holds `amount`, which does not exceed the burst; 0 if it
    /// does.
    pub(super) fn time_until(self, amount: u64, spec: &CellSpec, now: u64) -> u64 {
        let needed = u128::from(amount) * spec.unit;
        let missing = self.missing(spec, now);
        let lacking = (missing + needed).saturating_sub(spec.capacity);
        if amount == 0 {
            return 0;
        }
        u64::try_from(div_ceil(lacking, spec.fill)).unwrap_or(u64::MAX)
    }

    /// Takes `amount`, which the bucket must hold.
    pub(super) fn take(&mut self, amount: u64, spec: &CellSpec, now: u64) {
        let missing = self.missing(spec, now) + u128::from(amount) * spec.unit;
        *self = Self::with_missing(missing, spec, now);
    }
}

/// Returns `a / b`, rounded up. Division is much faster with 64 bits, which most numbers have.
fn div_ceil(a: u128, b: u64) -> u128 {
    match u64::try_from(a) {
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
            let Some(of_cell) = CellSpec::new(&spec) else { continue };
            let (mut bucket, mut cell, mut now) = (Bucket::new(spec), Cell::default(), 0);
            for _ in 0..40 {
                let elapsed = rng.u64(0..=2 * period.as_nanos() as u64 / amount.max(1) + 2);
                now += elapsed;
                bucket.advance(elapsed);
                let cost = rng.u64(0..=burst);
                assert_eq!(bucket.time_until(cost), cell.time_until(cost, &of_cell, now));
                if bucket.try_take(cost, false) {
                    cell.take(cost, &of_cell, now);
                }
                assert_eq!(spec.capacity - bucket.balance(), cell.missing(&of_cell, now) as i128);
            }
        }
    }
}
