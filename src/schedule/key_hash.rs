//! [`KeyMap`]: a map by keys whose hash was made before.
//!
//! A call's keys are looked for in a map of each level, and in that of the queue's places. A seeded hash of a
//! text takes longer than the rest of a lookup. So a [`FlowKey`](super::FlowKey) is hashed when it is made, and the maps only
//! put the hashes of the keys together.

use std::{
    collections::HashMap,
    hash::{BuildHasher, BuildHasherDefault, Hash, Hasher, RandomState},
    sync::LazyLock,
};

/// A map by keys that hash to a number which is spread over all bits already.
pub(crate) type KeyMap<K, V> = HashMap<K, V, BuildHasherDefault<CombineHashes>>;

/// Puts hashes together to one.
#[derive(Default)]
pub(crate) struct CombineHashes(u64);

/// Seeded for each process, so that a tenant cannot choose keys whose hashes are equal.
static SEED: LazyLock<RandomState> = LazyLock::new(RandomState::new);

/// Returns the hash of a key, the same for equal keys in this process.
pub(super) fn hash_of(key: &impl Hash) -> u64 {
    SEED.hash_one(key)
}

impl Hasher for CombineHashes {
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64(u64::from(*byte)));
    }

    fn write_u64(&mut self, hash: u64) {
        // Odd, so that no bit is lost; the order of the keys counts.
        self.0 = (self.0.rotate_left(5) ^ hash).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    }

    fn write_usize(&mut self, number: usize) {
        self.write_u64(number as u64);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}
