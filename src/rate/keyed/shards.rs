//! [`Shards`]: all keys of a limiter, in parts that are locked one at a time.

use super::{
    cell::Cell,
    context::{Context, Lookup, TierOf},
    pinned::PinnedKey,
    shard::{NoRoom, Shard, Taken},
    tier::{Tier, Tiers},
};
use crate::{
    error::{AcquireError, InvalidConfig, TooManyKeys},
    rate::{cost::Cost, limits::Limits, local::LocalLimiter, local::RETRY_SOON},
    sync::{Mutex, MutexGuard},
    wait_queue::WakeAll,
};
use std::{
    borrow::Borrow,
    hash::Hash,
    sync::{Arc, PoisonError},
    time::Duration,
};
use tokio::time::Instant;

/// The number of shards. Few enough that those of a limiter with few keys stay in the processor's cache.
const SHARDS: usize = 256;

pub(super) struct Shards<K> {
    pub(super) context: Context<K>,
    shards: Box<[Mutex<Shard<K>>]>,
    /// The limits that were set last. Locked after a shard, if both are.
    latest: Mutex<Arc<Tiers>>,
    /// Held while all shards are searched for keys to forget. Locked before a shard, if both are.
    search: Mutex<()>,
}

/// What became of a call that may wait.
pub(super) enum Entered<K: Hash + Eq + Clone> {
    /// The key held the cost, which was charged unless it is an estimate.
    Taken,
    /// The call has to ask the limiter of its key, which it has pinned.
    Pinned(PinnedKey<K>),
}

// === impl Shards ===

impl<K: Hash + Eq + Clone> Shards<K> {
    pub(super) fn new(tiers: Tiers, tier_of: Option<TierOf<K>>) -> Self {
        let tiers = Arc::new(tiers);
        Self {
            context: Context::new(tier_of),
            shards: (0..SHARDS).map(|_| Mutex::new(Shard::new(tiers.clone()))).collect(),
            latest: Mutex::new(tiers),
            search: Mutex::new(()),
        }
    }

    #[inline]
    pub(super) fn lookup<'a, Q: ?Sized + Hash>(&self, key: &'a Q) -> Lookup<'a, Q> {
        Lookup {
            key,
            hash: self.context.hash(key),
        }
    }

    #[inline]
    fn lock_of(&self, hash: u64) -> MutexGuard<'_, Shard<K>> {
        lock(&self.shards[shard_of(hash)])
    }

    /// Takes `cost` if the key holds it and no call of the key waits.
    #[inline]
    pub(super) fn try_acquire<Q>(&self, lookup: Lookup<'_, Q>, cost: &Cost) -> Result<(), AcquireError>
    where
        K: Borrow<Q>,
        Q: ?Sized + Eq + ToOwned<Owned = K>,
    {
        // Read before the lock is taken, so that it is held shortly.
        let now = Instant::now();
        self.with_room(|| {
            let mut shard = self.lock_of(lookup.hash);
            match shard.try_take(&self.context, lookup, cost, true, now)? {
                Taken::Yes => Ok(Ok(())),
                Taken::Refused(error) => Ok(Err(error)),
                Taken::NotYet(wait) => Ok(Err(not_yet(wait))),
                Taken::AskLimiter => {
                    let pin = shard.pin(&self.context, lookup)?;
                    let taken = shard.limiter(pin).try_acquire(*cost);
                    shard.unpin(&self.context, pin);
                    Ok(taken)
                }
            }
        })?
    }

    /// Pins a key that seems to hold `cost`, so that the cost can be charged as an estimate.
    pub(super) fn try_pin<Q>(self: &Arc<Self>, lookup: Lookup<'_, Q>, cost: &Cost) -> Result<PinnedKey<K>, AcquireError>
    where
        K: Borrow<Q>,
        Q: ?Sized + Eq + ToOwned<Owned = K>,
    {
        let now = Instant::now();
        self.with_room(|| {
            let mut shard = self.lock_of(lookup.hash);
            match shard.try_take(&self.context, lookup, cost, false, now)? {
                Taken::Refused(error) => Ok(Err(error)),
                Taken::NotYet(wait) => Ok(Err(not_yet(wait))),
                Taken::Yes | Taken::AskLimiter => Ok(Ok(self.pin_in(&mut shard, lookup)?)),
            }
        })?
    }

    /// Takes `cost` if the key is at rest and holds it, unless the cost is an estimate. Otherwise pins the key, so that
    /// the call can wait.
    #[inline]
    pub(super) fn enter<Q>(
        self: &Arc<Self>,
        lookup: Lookup<'_, Q>,
        cost: &Cost,
        is_estimate: bool,
    ) -> Result<Entered<K>, AcquireError>
    where
        K: Borrow<Q>,
        Q: ?Sized + Eq + ToOwned<Owned = K>,
    {
        let now = Instant::now();
        self.with_room(|| {
            let mut shard = self.lock_of(lookup.hash);
            match shard.try_take(&self.context, lookup, cost, !is_estimate, now)? {
                Taken::Yes if !is_estimate => Ok(Ok(Entered::Taken)),
                Taken::Refused(error) => Ok(Err(error)),
                _ => Ok(Ok(Entered::Pinned(self.pin_in(&mut shard, lookup)?))),
            }
        })?
    }

    /// Pins a key, which has a limiter then until the returned guard is dropped.
    pub(super) fn pin<Q>(self: &Arc<Self>, lookup: Lookup<'_, Q>) -> Result<PinnedKey<K>, TooManyKeys>
    where
        K: Borrow<Q>,
        Q: ?Sized + Eq + ToOwned<Owned = K>,
    {
        self.with_room(|| self.pin_in(&mut self.lock_of(lookup.hash), lookup))
    }

    /// Does what [`pin`](Self::pin) does if the key has a limiter already. Returns `None` otherwise.
    pub(super) fn pin_again<Q>(self: &Arc<Self>, lookup: Lookup<'_, Q>) -> Option<PinnedKey<K>>
    where
        K: Borrow<Q>,
        Q: ?Sized + Eq + ToOwned<Owned = K>,
    {
        let mut shard = self.lock_of(lookup.hash);
        let is_pinned = shard.is_pinned(lookup);
        is_pinned.then(|| self.pin_in(&mut shard, lookup).ok()).flatten()
    }

    fn pin_in<Q>(self: &Arc<Self>, shard: &mut Shard<K>, lookup: Lookup<'_, Q>) -> Result<PinnedKey<K>, NoRoom>
    where
        K: Borrow<Q>,
        Q: ?Sized + Eq + ToOwned<Owned = K>,
    {
        let pin = shard.pin(&self.context, lookup)?;
        let limiter = shard.limiter(pin).clone();
        Ok(PinnedKey::new(self.clone(), shard_of(lookup.hash), pin, limiter))
    }

    /// Ends one use of a pin. Called by the guard's `drop`.
    pub(super) fn unpin(&self, shard: usize, pin: usize) {
        lock(&self.shards[shard]).unpin(&self.context, pin);
    }

    /// Reads what is known of a key: see [`Shard::read`].
    pub(super) fn read<Q, T>(
        &self,
        lookup: Lookup<'_, Q>,
        of_cells: impl FnOnce(&Tier, &[Cell], u64) -> T,
        of_limiter: impl FnOnce(&LocalLimiter) -> T,
    ) -> T
    where
        K: Borrow<Q>,
        Q: ?Sized + Eq + ToOwned<Owned = K>,
    {
        self.lock_of(lookup.hash)
            .read(&self.context, lookup, of_cells, of_limiter)
    }

    /// Returns the limits that were set last.
    pub(super) fn tiers(&self) -> Arc<Tiers> {
        lock(&self.latest).clone()
    }

    /// Replaces the limits of one tier.
    pub(super) fn set_tier(&self, tier: usize, limits: Limits) -> Result<(), InvalidConfig> {
        {
            let mut latest = lock(&self.latest);
            *latest = Arc::new(latest.with(tier, limits)?);
        }
        for shard in &self.shards {
            let wakes = {
                let mut shard = lock(shard);
                // Read under the lock of the shard: another thread may have set later limits, and must not be overtaken.
                let latest = self.tiers();
                shard.set_tiers(&self.context, &latest)
            };
            wakes.into_iter().for_each(WakeAll::wake);
        }
        Ok(())
    }

    /// Forgets all keys that are full, and returns how many are held then.
    pub(super) fn count(&self) -> usize {
        for shard in &self.shards {
            lock(shard).forget_full_at(&self.context, Instant::now());
        }
        self.context.room.held()
    }

    /// Repeats `attempt` until there is room for its key. Each repetition follows a key that was forgotten, so a thread is
    /// held up only by others that make progress.
    #[inline]
    fn with_room<T>(&self, mut attempt: impl FnMut() -> Result<T, NoRoom>) -> Result<T, TooManyKeys> {
        loop {
            match attempt() {
                Ok(done) => return Ok(done),
                Err(NoRoom) => self.make_room()?,
            }
        }
    }

    /// Forgets full keys until there is room for one more. No shard may be locked.
    #[cold]
    fn make_room(&self) -> Result<(), TooManyKeys> {
        let room = &self.context.room;
        let _one_at_a_time = lock(&self.search);
        let now = Instant::now();
        let time = self.context.nanos(now);
        if room.is_left() {
            return Ok(());
        }
        if room.full_from() <= time {
            room.reset_full_from();
            let mut full_from = u64::MAX;
            for shard in &self.shards {
                let mut shard = lock(shard);
                if shard.full_from() <= time {
                    shard.forget_full_at(&self.context, now);
                }
                full_from = full_from.min(shard.full_from());
                drop(shard);
                if room.is_left() {
                    // The other shards may have keys to forget as well.
                    room.lower_full_from(time);
                    return Ok(());
                }
            }
            room.lower_full_from(full_from);
        }
        let full_from = Some(room.full_from()).filter(|time| *time < u64::MAX);
        let wait = full_from.map(|at| Duration::from_nanos(at.saturating_sub(time).max(1)));
        Err(TooManyKeys::new(room.max(), wait))
    }
}

/// Returns the shard of a key with this hash. The table in a shard uses the highest and the lowest bits.
///
/// The hasher is quick, and its bits depend on the key's bits nearly linearly: with some seeds, the bits of numbers that
/// follow each other are the same for most of them, which would then be in a few shards. So they are mixed once more.
#[inline]
const fn shard_of(hash: u64) -> usize {
    // 2^64, divided by the golden ratio.
    let mixed = (hash ^ (hash >> 32)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (mixed >> 40) as usize % SHARDS
}

fn not_yet(wait: Duration) -> AcquireError {
    AcquireError::NotYet(if wait.is_zero() { RETRY_SOON } else { wait })
}

/// Locks a mutex. Poisoning is ignored: the user code that runs under it (the hash, the equality and the tier of a key)
/// runs before anything is changed.
#[inline]
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_follow_each_other_are_spread_over_all_shards_whatever_the_seed() {
        for _ in 0..500 {
            let context = Context::<u64>::new(None);
            let mut keys = [0_u32; SHARDS];
            (0..2_560_u64).for_each(|key| keys[shard_of(context.hash(&key))] += 1);
            let most = keys.into_iter().max().unwrap();
            let used = keys.into_iter().filter(|keys| *keys > 0).count();
            // Ten for each shard. By chance, the most is 27 at most in nearly all cases, and one shard of 20,000 has none.
            assert!(
                most <= 40 && used >= SHARDS - 6,
                "{most} in a shard, {used} shards used"
            );
        }
    }
}
