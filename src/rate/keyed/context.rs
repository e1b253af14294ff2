//! [`Context`]: what all shards of a limiter have in common.

use super::room::Room;
use crate::{clock::nanos_between, rate::calendar};
use hashbrown::DefaultHashBuilder;
use std::{
    hash::{BuildHasher, Hash, Hasher, RandomState},
    time::SystemTime,
};
use tokio::time::Instant;

pub(super) struct Context<K> {
    hasher: SeededHasher,
    /// `None` if there is one tier.
    tier_of: Option<TierOf<K>>,
    pub(super) room: Room,
    epoch: Instant,
    /// The wall clock at `epoch`, in nanoseconds since 1970.
    wall_epoch: u64,
}

/// Hashes keys with a seed from the operating system, so that keys that collide cannot be prepared. The default hasher of
/// `hashbrown` takes a third of the time of the one of `std`, and has no such seed by itself.
struct SeededHasher {
    hasher: DefaultHashBuilder,
    seed: u64,
}

/// Returns the index of a key's tier. User code.
pub(super) type TierOf<K> = Box<dyn Fn(&K) -> usize + Send + Sync>;

/// A key that is looked for, and its hash.
pub(super) struct Lookup<'a, Q: ?Sized> {
    pub(super) key: &'a Q,
    pub(super) hash: u64,
}

// === impl Context ===

impl<K> Context<K> {
    pub(super) fn new(tier_of: Option<TierOf<K>>) -> Self {
        Self {
            hasher: SeededHasher::new(),
            tier_of,
            room: Room::unlimited(),
            epoch: Instant::now(),
            wall_epoch: calendar::nanos(SystemTime::now()),
        }
    }

    #[inline]
    pub(super) fn hash<Q: ?Sized + Hash>(&self, key: &Q) -> u64 {
        self.hasher.hash_one(key)
    }

    #[inline]
    pub(super) fn tier_of(&self, key: &K) -> usize {
        self.tier_of.as_ref().map_or(0, |tier_of| tier_of(key))
    }

    #[inline]
    pub(super) fn nanos(&self, now: Instant) -> u64 {
        nanos_between(self.epoch, now)
    }

    /// Returns the wall clock at a time after the epoch, in nanoseconds since 1970.
    pub(super) const fn wall_clock(&self, time: u64) -> u64 {
        self.wall_epoch.saturating_add(time)
    }
}

// === impl SeededHasher ===

impl SeededHasher {
    fn new() -> Self {
        Self {
            hasher: DefaultHashBuilder::default(),
            seed: RandomState::new().hash_one(0),
        }
    }

    #[inline]
    fn hash_one<Q: ?Sized + Hash>(&self, key: &Q) -> u64 {
        let mut hasher = self.hasher.build_hasher();
        hasher.write_u64(self.seed);
        key.hash(&mut hasher);
        hasher.finish()
    }
}

// === impl Lookup ===

impl<Q: ?Sized> Clone for Lookup<'_, Q> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<Q: ?Sized> Copy for Lookup<'_, Q> {}
