//! [`PinnedKey`], the guard of a key that has buckets; and what holds one: a call that waits, and an open estimate.

use super::shards::{Entered, Shards};
use crate::{
    error::AcquireError,
    rate::{
        cost::Cost,
        estimate::{Estimate, Settle},
        local::{LocalAdmission, LocalCharge, LocalLimiter},
    },
};
use std::{
    borrow::Borrow,
    hash::Hash,
    sync::Arc,
    task::{Context, Poll, ready},
};

/// A guard: the key has a limiter of its own until the guard is dropped.
pub(super) struct PinnedKey<K: Hash + Eq + Clone> {
    shards: Arc<Shards<K>>,
    shard: usize,
    pin: usize,
    limiter: LocalLimiter,
}

/// One call that waits for what its key holds. Not a `Future`: the caller counts its polls.
pub(super) struct KeyedAdmission<'a, K: Hash + Eq + Clone, Q: ?Sized> {
    shards: &'a Arc<Shards<K>>,
    key: &'a Q,
    cost: Cost,
    is_estimate: bool,
    /// `None` before the first poll, and for a call that need not wait. The admission leaves the key's queue before the
    /// key is unpinned, as fields are dropped in their order.
    waiting: Option<(LocalAdmission, PinnedKey<K>)>,
}

/// The charge of an estimate. The key stays pinned until it is settled.
struct KeyedCharge<K: Hash + Eq + Clone> {
    charge: LocalCharge,
    _key: PinnedKey<K>,
}

// === impl PinnedKey ===

impl<K: Hash + Eq + Clone> PinnedKey<K> {
    pub(super) const fn new(shards: Arc<Shards<K>>, shard: usize, pin: usize, limiter: LocalLimiter) -> Self {
        Self {
            shards,
            shard,
            pin,
            limiter,
        }
    }

    pub(super) const fn limiter(&self) -> &LocalLimiter {
        &self.limiter
    }
}

impl<K: Hash + Eq + Clone + Send + Sync + 'static> PinnedKey<K> {
    /// Returns the estimate of a cost that the key's limiter has charged.
    pub(super) fn estimate(self, cost: Cost, charge: LocalCharge) -> Estimate {
        Estimate::new(cost, KeyedCharge { charge, _key: self })
    }
}

impl<K: Hash + Eq + Clone> Drop for PinnedKey<K> {
    fn drop(&mut self) {
        self.shards.unpin(self.shard, self.pin);
    }
}

// === impl KeyedAdmission ===

impl<'a, K, Q> KeyedAdmission<'a, K, Q>
where
    K: Hash + Eq + Clone + Send + Sync + 'static + Borrow<Q>,
    Q: ?Sized + Hash + Eq + ToOwned<Owned = K>,
{
    pub(super) const fn new(shards: &'a Arc<Shards<K>>, key: &'a Q, cost: Cost, is_estimate: bool) -> Self {
        Self {
            shards,
            key,
            cost,
            is_estimate,
            waiting: None,
        }
    }

    /// Ready when the cost has been charged. Has the estimate then if the cost is one.
    #[inline]
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Estimate>, AcquireError>> {
        if self.waiting.is_none() {
            let lookup = self.shards.lookup(self.key);
            match self.shards.enter(lookup, &self.cost, self.is_estimate)? {
                Entered::Taken => return Poll::Ready(Ok(None)),
                Entered::Pinned(key) => {
                    let admission = key.limiter().admission(self.cost, self.is_estimate);
                    self.waiting = Some((admission, key));
                }
            }
        }
        self.poll_waiting(cx)
    }

    #[inline(never)]
    fn poll_waiting(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Estimate>, AcquireError>> {
        let Some((admission, _)) = &mut self.waiting else {
            return Poll::Pending;
        };
        let admitted = ready!(admission.poll_acquire(cx));
        let done = self.waiting.take();
        admitted?;
        Poll::Ready(Ok(done.and_then(|(mut admission, key)| {
            let (cost, charge) = admission.charge()?;
            Some(key.estimate(cost, charge))
        })))
    }
}

// === impl KeyedCharge ===

impl<K: Hash + Eq + Clone + Send + Sync> Settle for KeyedCharge<K> {
    fn settle(&self, charged: Cost, used: Cost) {
        self.charge.settle_and_warn(charged, used);
    }
}
