//! [`Tier`]: the limits that a group of keys has, each key for itself; and what [`Cell`]s of these limits admit.

use super::cell::{Cell, CellSpec};
use crate::{
    error::{CostExceedsBurst, Exhausted, InvalidConfig, Rejected},
    rate::{
        available::Available,
        bucket::{Bucket, BucketSpec},
        budget::Budget,
        cost::{Cost, PerBudget},
        limits::Limits,
    },
};
use std::time::{Duration, SystemTime};

/// The limits of the keys of one tier. The cells of a key are in the order of the rates.
#[derive(Debug)]
pub(super) struct Tier {
    limits: Limits,
    rates: Box<[(Budget, CellSpec)]>,
    specs: Box<[BucketSpec]>,
    /// Whether the buckets of all rates can be at rest in cells. Otherwise the keys have buckets until these are full.
    has_cells: bool,
}

/// All tiers of a limiter. They are replaced as a whole.
#[derive(Debug)]
pub(super) struct Tiers {
    tiers: Vec<Tier>,
    /// How many times tiers were replaced before.
    version: u64,
}

/// The largest number of cells that are charged in one pass.
const MAX_UNDONE: usize = 4;

// === impl Tier ===

impl Tier {
    pub(super) fn new(limits: Limits) -> Result<Self, InvalidConfig> {
        if let Some(budget) = limits.with_initial() {
            return Err(InvalidConfig::new(
                format!("{}.initial", budget.name()),
                "must not be set for limits by key: a key that is forgotten and comes back begins with a full bucket",
            ));
        }
        let specs = limits.bucket_specs()?;
        Ok(Self {
            rates: specs
                .iter()
                .map(|(budget, spec)| (*budget, CellSpec::new(spec)))
                .collect(),
            has_cells: specs.iter().all(|(_, spec)| CellSpec::fits(spec)),
            specs: specs.into_iter().map(|(_, spec)| spec).collect(),
            limits,
        })
    }

    pub(super) const fn limits(&self) -> &Limits {
        &self.limits
    }

    pub(super) const fn has_cells(&self) -> bool {
        self.has_cells
    }

    /// Returns an error if `cost` exceeds the burst of a rate.
    pub(super) fn check(&self, cost: &Cost) -> Result<(), CostExceedsBurst> {
        let mut rates = self.rates.iter();
        match rates.find(|(budget, spec)| cost.amount(*budget) > spec.burst()) {
            Some((budget, spec)) => Err(CostExceedsBurst::new(budget.name(), cost.amount(*budget), spec.burst())),
            None => Ok(()),
        }
    }

    /// Whether all cells hold `cost` at the time `now`.
    #[inline]
    pub(super) fn holds(&self, cells: &[Cell], cost: &Cost, now: u64) -> bool {
        let mut rates = self.rates.iter().zip(cells);
        rates.all(|((budget, spec), cell)| cell.has(cost.amount(*budget), spec, now))
    }

    /// Takes `cost` from all cells if they all hold it, and returns whether it was taken.
    #[inline]
    pub(super) fn try_take(&self, cells: &mut [Cell], cost: &Cost, now: u64) -> bool {
        let mut before = [Cell::default(); MAX_UNDONE];
        if self.rates.len() > before.len() {
            return self.try_take_many(cells, cost, now);
        }
        // One pass over the cells is faster than two. If a cell does not hold the cost, those before it are put back.
        for (at, (budget, spec)) in self.rates.iter().enumerate() {
            before[at] = cells[at];
            if !cells[at].try_take(cost.amount(*budget), spec, now) {
                cells[..at].copy_from_slice(&before[..at]);
                return false;
            }
        }
        true
    }

    /// Does what [`try_take`](Self::try_take) does, for any number of rates.
    #[cold]
    fn try_take_many(&self, cells: &mut [Cell], cost: &Cost, now: u64) -> bool {
        let holds = self.holds(cells, cost, now);
        if holds {
            for ((budget, spec), cell) in self.rates.iter().zip(cells) {
                cell.try_take(cost.amount(*budget), spec, now);
            }
        }
        holds
    }

    /// Returns why a call whose cost the cells do not hold must not wait. `wall_clock` is the time at `now`, in nanoseconds
    /// since 1970.
    pub(super) fn rejection(&self, cells: &[Cell], cost: &Cost, now: u64, wall_clock: u64) -> Option<Rejected> {
        if let Err(exceeded) = self.check(cost) {
            return Some(Rejected::CostExceedsBurst(exceeded));
        }
        let mut caps = self.rates.iter().zip(cells).filter(|((_, spec), _)| spec.refuses());
        caps.find_map(|((budget, spec), cell)| {
            let amount = cost.amount(*budget);
            let wait = cell.time_until(amount, spec, now);
            (wait > 0).then(|| {
                let resets_at = SystemTime::UNIX_EPOCH + Duration::from_nanos(wall_clock.saturating_add(wait));
                let (left, wait) = (cell.available(spec, now), Duration::from_nanos(wait));
                Rejected::Exhausted(Exhausted::new(budget.name(), amount, left, wait, resets_at))
            })
        })
    }

    /// Returns how long it takes from `now` until the cells hold `cost`. A rate that refuses calls does not let them
    /// wait.
    pub(super) fn wait(&self, cells: &[Cell], cost: &Cost, now: u64) -> Duration {
        let rates = self.rates.iter().zip(cells);
        let waits = rates
            .filter(|((_, spec), _)| !spec.refuses())
            .map(|((budget, spec), cell)| cell.time_until(cost.amount(*budget), spec, now));
        Duration::from_nanos(waits.fold(0, u64::max))
    }

    /// Returns what the cells hold at the time `now`.
    pub(super) fn available(&self, cells: &[Cell], now: u64) -> Available {
        let mut available = PerBudget::<Option<u64>>::default();
        for ((budget, spec), cell) in self.rates.iter().zip(cells) {
            if let Some(least) = available.entry(*budget) {
                *least = Some(least.unwrap_or(u64::MAX).min(cell.available(spec, now)));
            }
        }
        Available::new(available, None)
    }

    /// Returns how many units the bucket of each rate lacks at the time `now`.
    pub(super) fn missing(&self, cells: &[Cell], now: u64) -> Vec<u128> {
        let rates = self.rates.iter().zip(cells);
        rates.map(|((_, spec), cell)| cell.missing(spec, now)).collect()
    }

    /// Makes cells of buckets that lack so many units at the time `now`.
    pub(super) fn fill_cells(&self, cells: &mut [Cell], missing: impl Iterator<Item = u128>, now: u64) {
        for (((_, spec), cell), missing) in self.rates.iter().zip(cells).zip(missing) {
            *cell = Cell::with_missing(missing, spec, now);
        }
    }

    /// Makes cells of these limits of the cells that a key had under the limits `old`, as
    /// [`set_limits`](crate::RateLimiter::set_limits) does with buckets. `matches` are the old rates whose buckets the
    /// rates take over.
    pub(super) fn convert(&self, cells: &mut [Cell], old: (&Self, &[Cell]), matches: &[Option<usize>], now: u64) {
        let (old, old_cells) = old;
        for (((new_spec, (_, of_cell)), cell), old_rate) in self.specs.iter().zip(&self.rates).zip(cells).zip(matches) {
            let Some(at) = *old_rate else { continue };
            let mut before = Bucket::new(old.specs[at]);
            before.set_missing(old_cells[at].missing(&old.rates[at].1, now));
            let mut after = Bucket::new(*new_spec);
            after.carry_over(&before);
            *cell = Cell::with_missing(after.missing(), of_cell, now);
        }
    }
}

// === impl Tiers ===

impl Tiers {
    pub(super) fn new(limits: impl IntoIterator<Item = Limits>) -> Result<Self, InvalidConfig> {
        let tiers: Vec<_> = limits.into_iter().map(Tier::new).collect::<Result<_, _>>()?;
        if tiers.is_empty() {
            return Err(InvalidConfig::new("tiers", "must have limits of at least one tier"));
        }
        Ok(Self { tiers, version: 0 })
    }

    /// Returns these tiers with other limits for the one at `index`.
    pub(super) fn with(&self, index: usize, limits: Limits) -> Result<Self, InvalidConfig> {
        if index >= self.len() {
            let problem = format!("must be below {}, the number of tiers, is {index}", self.len());
            return Err(InvalidConfig::new("tier", problem));
        }
        let mut all: Vec<_> = self.tiers.iter().map(|tier| tier.limits.clone()).collect();
        all[index] = limits;
        Ok(Self {
            version: self.version + 1,
            ..Self::new(all)?
        })
    }

    pub(super) fn len(&self) -> usize {
        self.tiers.len()
    }

    pub(super) const fn version(&self) -> u64 {
        self.version
    }

    /// Returns the tier with this index. An index that is too large is that of the last tier.
    #[inline]
    pub(super) fn of(&self, index: usize) -> &Tier {
        &self.tiers[index.min(self.tiers.len() - 1)]
    }

    /// Whether the buckets of all tiers can be at rest in cells.
    pub(super) fn have_cells(&self) -> bool {
        self.tiers.iter().all(Tier::has_cells)
    }

    /// Returns how many cells a key needs room for, of whatever tier it is.
    pub(super) fn width(&self) -> usize {
        self.tiers.iter().map(|tier| tier.rates.len()).max().unwrap_or(0).max(1)
    }
}
