//! [`Migration`]: the keys of a shard that are not yet in its present table.
//!
//! To move all keys of a large table at once stops the other calls of its shard for milliseconds when the table grows,
//! and for a second in all when the limits of 4 million keys are replaced, since their cells are converted then. So the
//! table is put aside as it is, each key moves when a call meets it, and some others move with each call.
//!
//! When a key moves makes no difference: a cell tells what its bucket held when the limits were replaced, so it is
//! converted as of that time.

use super::{
    cell::{self, Cell},
    context::{Context, Lookup},
    rows::Rows,
    tier::Tiers,
};
use std::{borrow::Borrow, hash::Hash, sync::Arc};

/// The tables that were put aside, oldest first. A key is in one of them, or in the shard's present table. Only keys at
/// rest are here: those with buckets are always in the present table.
pub(super) struct Migration<K> {
    generations: Vec<Generation<K>>,
}

/// A table that was put aside.
struct Generation<K> {
    rows: Rows<K>,
    /// `None` if the table was only full.
    replaced: Option<ReplacedLimits>,
    /// The place in the table that is looked at next.
    next: usize,
}

/// Limits that cells were charged under, and that were replaced.
pub(super) struct ReplacedLimits {
    tiers: Arc<Tiers>,
    by: Arc<Tiers>,
    /// When they were replaced, in nanoseconds since the epoch.
    at: u64,
    /// For each tier, the rate of `tiers` whose bucket each rate of `by` takes over.
    matches: Vec<Vec<Option<usize>>>,
}

/// A place in one of the tables.
#[derive(Clone, Copy)]
pub(super) struct Place {
    generation: usize,
    bucket: usize,
}

/// A key that was taken out, with its cells under the present limits.
pub(super) struct Migrant<K> {
    pub(super) hash: u64,
    pub(super) key: K,
    /// Empty if all were full when limits were replaced, so that they are full under the new ones, too.
    pub(super) cells: Vec<Cell>,
}

impl<K: Hash + Eq> Migration<K> {
    pub(super) const fn new() -> Self {
        Self {
            generations: Vec::new(),
        }
    }

    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.generations.is_empty()
    }

    /// Returns how many tables there are.
    pub(super) fn generations(&self) -> usize {
        self.generations.len()
    }

    /// Puts a table aside.
    pub(super) fn push(&mut self, rows: Rows<K>, replaced: Option<ReplacedLimits>) {
        if rows.len() > 0 || !self.is_empty() {
            self.generations.push(Generation {
                rows,
                replaced,
                next: 0,
            });
        }
    }

    /// Returns the place of a key.
    pub(super) fn find<Q>(&self, lookup: Lookup<'_, Q>) -> Option<Place>
    where
        K: Borrow<Q>,
        Q: ?Sized + Eq,
    {
        self.generations.iter().enumerate().find_map(|(generation, of)| {
            let bucket = of.rows.find(lookup.hash, |key| key.borrow() == lookup.key)?;
            Some(Place { generation, bucket })
        })
    }

    /// Returns the next place of the oldest table, which may be free. `None` when no key is left.
    pub(super) fn next(&mut self) -> Option<Place> {
        while self.generations.first().is_some_and(|oldest| oldest.rows.len() == 0) {
            self.generations.remove(0);
        }
        let oldest = self.generations.first_mut()?;
        let bucket = oldest.next;
        oldest.next = (bucket + 1) % oldest.rows.buckets();
        Some(Place { generation: 0, bucket })
    }

    /// Takes the key at a place out, with its cells under the present limits. `None` if the place is free.
    pub(super) fn take(&mut self, context: &Context<K>, place: Place) -> Option<Migrant<K>> {
        let rows = &mut self.generations[place.generation].rows;
        // User code comes first: if it panics, the key is still there.
        let key = rows.key(place.bucket)?;
        let (hash, tier) = (context.hash(key), context.tier_of(key));
        let (key, mut cells) = rows.take(place.bucket)?;
        for generation in &self.generations[place.generation..] {
            if let Some(replaced) = &generation.replaced {
                cells = replaced.convert(&cells, tier);
            }
        }
        Some(Migrant { hash, key, cells })
    }
}

// === impl ReplacedLimits ===

impl ReplacedLimits {
    pub(super) fn new(tiers: Arc<Tiers>, by: Arc<Tiers>, at: u64) -> Self {
        let matches = (0..by.len()).map(|tier| by.of(tier).limits().match_rates(tiers.of(tier).limits()));
        Self {
            matches: matches.collect(),
            tiers,
            by,
            at,
        }
    }

    /// Converts the cells of a key of this tier, as of the time of the replacement. Returns none if they were full.
    fn convert(&self, cells: &[Cell], tier: usize) -> Vec<Cell> {
        if cell::full_at(cells) <= self.at {
            return Vec::new();
        }
        let mut converted = vec![Cell::default(); self.by.width()];
        let matches = &self.matches[tier.min(self.matches.len() - 1)];
        let old = (self.tiers.of(tier), cells);
        self.by.of(tier).convert(&mut converted, old, matches, self.at);
        converted
    }
}
