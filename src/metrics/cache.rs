//! [`Cache`]: a bounded table that is read without a lock, and from which nothing is removed.

use hashbrown::DefaultHashBuilder;
use std::{
    hash::{BuildHasher, Hash},
    sync::{
        OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
};

/// A bounded table that is read without a lock, and from which nothing is removed. Each list of it has the entries whose
/// hashes have the same lowest bits.
pub(super) struct Cache<K, V> {
    lists: Box<[List<K, V>]>,
    hasher: DefaultHashBuilder,
    len: AtomicUsize,
    capacity: usize,
}

struct List<K, V>(OnceLock<Box<Entry<K, V>>>);

struct Entry<K, V> {
    key: K,
    value: V,
    next: List<K, V>,
}

impl<K: PartialEq, V> Cache<K, V> {
    /// Creates a table for at most `capacity` entries.
    pub(super) fn new(capacity: usize) -> Self {
        let lists = (capacity / 4).next_power_of_two();
        Self {
            lists: (0..lists).map(|_| List(OnceLock::new())).collect(),
            hasher: DefaultHashBuilder::default(),
            len: AtomicUsize::new(0),
            capacity,
        }
    }

    pub(super) fn hash(&self, key: impl Hash) -> u64 {
        self.hasher.hash_one(key)
    }

    /// Returns the value of the key with this hash for which `is_key` returns true.
    #[inline]
    pub(super) fn get(&self, hash: u64, is_key: impl Fn(&K) -> bool) -> Option<&V> {
        let mut rest = self.list(hash);
        while let Some(entry) = rest.0.get() {
            if is_key(&entry.key) {
                return Some(&entry.value);
            }
            rest = &entry.next;
        }
        None
    }

    /// Returns the value of the key, which is inserted if it is missing. `None` if the table is full.
    #[cold]
    pub(super) fn get_or_insert(&self, hash: u64, key: K, value: impl FnOnce() -> V) -> Option<&V> {
        if let Some(value) = self.get(hash, |other| *other == key) {
            return Some(value);
        }
        let reserve = |len| (len < self.capacity).then_some(len + 1);
        self.len
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, reserve)
            .ok()?;
        let mut new = Box::new(Entry {
            value: value(),
            key,
            next: List(OnceLock::new()),
        });
        let mut end = self.list(hash);
        loop {
            let Err(back) = end.0.set(new) else {
                return end.0.get().map(|entry| &entry.value);
            };
            // Another thread has inserted an entry here: perhaps this one.
            new = back;
            let other = end.0.get()?;
            if other.key == new.key {
                self.len.fetch_sub(1, Ordering::Relaxed);
                return Some(&other.value);
            }
            end = &other.next;
        }
    }

    fn list(&self, hash: u64) -> &List<K, V> {
        // The number of lists is a power of two.
        #[allow(clippy::cast_possible_truncation)]
        let at = hash as usize & (self.lists.len() - 1);
        &self.lists[at]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn each_key_is_inserted_once_by_two_threads() {
        let cache = Cache::new(64);
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for key in 0..64_u32 {
                        let value = cache.get_or_insert(cache.hash(key), key, || key * 2);
                        assert_eq!(value, Some(&(key * 2)));
                    }
                });
            }
        });
        assert_eq!(cache.len.load(Ordering::Relaxed), 64);
        for key in 0..64 {
            assert_eq!(cache.get(cache.hash(key), |other| *other == key), Some(&(key * 2)));
        }
    }

    #[test]
    fn a_full_table_finds_what_it_has_and_takes_nothing_more() {
        let cache = Cache::new(2);
        for key in ["one", "two"] {
            assert!(cache.get_or_insert(cache.hash(key), key, || ()).is_some());
        }
        assert_eq!(cache.get_or_insert(cache.hash("three"), "three", || ()), None);
        assert_eq!(cache.get_or_insert(cache.hash("two"), "two", || ()), Some(&()));
    }
}
