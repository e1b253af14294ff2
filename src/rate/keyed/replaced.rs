//! [`Replaced`]: the keys of a shard whose cells were charged under limits that have been replaced since.
//!
//! To convert all keys at once when limits are replaced would stop every call for as long as that takes, which is a
//! second for 4 million keys. So the table of keys is put aside with the limits that it was charged under, and each key
//! is converted when a call meets it, and a few others with it. The result does not depend on when that happens: a cell
//! tells what its bucket held at the time of the replacement, so it is converted as of that time.

use super::{
    cell::{self, Cell},
    context::{Context, Lookup},
    rows::Rows,
    tier::Tiers,
};
use std::{borrow::Borrow, hash::Hash, sync::Arc};

/// The tables that were put aside, oldest first. A key is in one of them, or in the shard's present table. Only keys at
/// rest are here: those with buckets are always in the present table.
pub(super) struct Replaced<K> {
    generations: Vec<Generation<K>>,
}

/// The keys that have not been met since these limits were replaced.
struct Generation<K> {
    rows: Rows<K>,
    tiers: Arc<Tiers>,
    /// When the limits were replaced, in nanoseconds since the epoch.
    at: u64,
    /// For each tier, the rate of `tiers` whose bucket each rate of the next generation takes over.
    matches: Vec<Vec<Option<usize>>>,
    /// The place in the table that is looked at next.
    next: usize,
}

/// A place in one of the tables.
#[derive(Clone, Copy)]
pub(super) struct Place {
    generation: usize,
    bucket: usize,
}

/// A key that was taken out, with its cells under the present limits.
pub(super) struct Renewed<K> {
    pub(super) hash: u64,
    pub(super) key: K,
    /// Empty if all buckets were full when limits were replaced, so that they are full under the new ones, too.
    pub(super) cells: Vec<Cell>,
}

impl<K: Hash + Eq> Replaced<K> {
    pub(super) const fn new() -> Self {
        Self {
            generations: Vec::new(),
        }
    }

    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.generations.is_empty()
    }

    /// Returns how many times limits were replaced since the oldest of the keys was charged.
    pub(super) fn generations(&self) -> usize {
        self.generations.len()
    }

    /// Puts a table aside: at the time `at`, the limits of its keys were replaced by `new`.
    pub(super) fn push(&mut self, rows: Rows<K>, tiers: Arc<Tiers>, new: &Tiers, at: u64) {
        if rows.len() == 0 && self.is_empty() {
            return;
        }
        let matches = (0..new.len()).map(|tier| new.of(tier).limits().match_rates(tiers.of(tier).limits()));
        self.generations.push(Generation {
            matches: matches.collect(),
            rows,
            tiers,
            at,
            next: 0,
        });
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

    /// Takes the key at a place out, with its cells under the present limits, which are `latest`. `None` if the place is
    /// free.
    pub(super) fn take(&mut self, context: &Context<K>, place: Place, latest: &Tiers) -> Option<Renewed<K>> {
        let rows = &mut self.generations[place.generation].rows;
        // User code comes first: if it panics, the key is still there.
        let key = rows.key(place.bucket)?;
        let (hash, tier) = (context.hash(key), context.tier_of(key));
        let (key, cells) = rows.take(place.bucket)?;
        let cells = self.renew(place.generation, tier, cells, latest);
        Some(Renewed { hash, key, cells })
    }

    /// Converts the cells of a generation step by step, as of the time of each replacement.
    fn renew(&self, generation: usize, tier: usize, mut cells: Vec<Cell>, latest: &Tiers) -> Vec<Cell> {
        for (at, old) in self.generations.iter().enumerate().skip(generation) {
            if cell::full_at(&cells) <= old.at {
                return Vec::new();
            }
            let new = self.generations.get(at + 1).map_or(latest, |next| &next.tiers);
            let mut renewed = vec![Cell::default(); new.width()];
            let matches = &old.matches[tier.min(old.matches.len() - 1)];
            new.of(tier)
                .convert(&mut renewed, (old.tiers.of(tier), &cells), matches, old.at);
            cells = renewed;
        }
        cells
    }
}
