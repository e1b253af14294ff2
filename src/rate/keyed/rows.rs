//! [`Rows`]: the keys of a shard, each with its [`Cell`]s.

use super::cell::Cell;
use hashbrown::HashTable;

/// A table of keys with their cells. All keys have the same number of cells, which are stored beside the key: a key of 8
/// bytes with two cells takes 32 bytes, and the table a byte more and its free places.
pub(super) enum Rows<K> {
    One(HashTable<(K, [Cell; 1])>),
    Two(HashTable<(K, [Cell; 2])>),
    Four(HashTable<(K, [Cell; 4])>),
    Many(HashTable<(K, Box<[Cell]>)>),
}

/// Evaluates an expression with the table, whatever its type is.
macro_rules! each {
    ($rows:expr, $table:ident => $do:expr) => {
        match $rows {
            Rows::One($table) => $do,
            Rows::Two($table) => $do,
            Rows::Four($table) => $do,
            Rows::Many($table) => $do,
        }
    };
}

impl<K> Rows<K> {
    /// Creates a table whose keys have `width` cells or more, with room for `keys` keys.
    pub(super) fn new(width: usize, keys: usize) -> Self {
        match width {
            0..=1 => Self::One(HashTable::with_capacity(keys)),
            2 => Self::Two(HashTable::with_capacity(keys)),
            3..=4 => Self::Four(HashTable::with_capacity(keys)),
            _ => Self::Many(HashTable::with_capacity(keys)),
        }
    }

    pub(super) fn len(&self) -> usize {
        each!(self, table => table.len())
    }

    /// Returns how many keys the table has room for without growing.
    pub(super) fn capacity(&self) -> usize {
        each!(self, table => table.capacity())
    }

    /// Returns the key with this hash for which `is` is true, and its cells.
    #[inline]
    pub(super) fn get_mut(&mut self, hash: u64, is: impl Fn(&K, &[Cell]) -> bool) -> Option<(&K, &mut [Cell])> {
        each!(self, table => {
            let (key, cells) = table.find_mut(hash, |(key, cells)| is(key, &cells[..]))?;
            Some((key, &mut cells[..]))
        })
    }

    /// Adds a key that is not there. Cells that `cells` does not have are full.
    pub(super) fn insert(&mut self, hash: u64, key: K, cells: &[Cell], hasher: impl Fn(&K) -> u64) {
        match self {
            Self::One(table) => drop(table.insert_unique(hash, (key, array(cells)), |(key, _)| hasher(key))),
            Self::Two(table) => drop(table.insert_unique(hash, (key, array(cells)), |(key, _)| hasher(key))),
            Self::Four(table) => drop(table.insert_unique(hash, (key, array(cells)), |(key, _)| hasher(key))),
            Self::Many(table) => drop(table.insert_unique(hash, (key, cells.into()), |(key, _)| hasher(key))),
        }
    }

    /// Removes the key with this hash for which `is` is true, and returns it.
    pub(super) fn remove(&mut self, hash: u64, is: impl Fn(&K, &[Cell]) -> bool) -> Option<K> {
        each!(self, table => {
            let entry = table.find_entry(hash, |(key, cells)| is(key, &cells[..])).ok()?;
            Some(entry.remove().0.0)
        })
    }

    pub(super) fn for_each(&self, mut visit: impl FnMut(&K, &[Cell])) {
        each!(self, table => table.iter().for_each(|(key, cells)| visit(key, &cells[..])));
    }

    /// Keeps those keys for which `keep` is true.
    pub(super) fn retain(&mut self, mut keep: impl FnMut(&K, &mut [Cell]) -> bool) {
        each!(self, table => table.retain(|(key, cells)| keep(key, &mut cells[..])));
    }

    /// Gives back the room for keys that are not there any more, except for twice as many as there are.
    pub(super) fn shrink(&mut self, hasher: impl Fn(&K) -> u64) {
        each!(self, table => {
            let room = 2 * table.len();
            table.shrink_to(room, |(key, _)| hasher(key));
        });
    }

    /// Returns the number of places, free ones included.
    pub(super) fn buckets(&self) -> usize {
        each!(self, table => table.num_buckets())
    }

    /// Returns the place of the key with this hash for which `is` is true.
    pub(super) fn find(&self, hash: u64, is: impl Fn(&K) -> bool) -> Option<usize> {
        each!(self, table => table.find_bucket_index(hash, |(key, _)| is(key)))
    }

    /// Returns the key at a place. `None` if the place is free.
    pub(super) fn key(&self, bucket: usize) -> Option<&K> {
        each!(self, table => table.get_bucket(bucket).map(|(key, _)| key))
    }

    /// Removes the key at a place, and returns it with its cells. `None` if the place is free.
    pub(super) fn take(&mut self, bucket: usize) -> Option<(K, Vec<Cell>)> {
        each!(self, table => {
            let ((key, cells), _) = table.get_bucket_entry(bucket).ok()?.remove();
            Some((key, cells.into()))
        })
    }
}

/// Returns the first `N` of `cells`. Those that are missing are full.
fn array<const N: usize>(cells: &[Cell]) -> [Cell; N] {
    std::array::from_fn(|at| cells.get(at).copied().unwrap_or_default())
}
