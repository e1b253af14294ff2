//! [`Room`]: how many keys a limiter holds, in all its shards, and how many it may hold.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// The number of keys that a limiter holds, and the largest one.
#[derive(Debug)]
pub(super) struct Room {
    held: AtomicUsize,
    max: AtomicUsize,
    /// No key can be forgotten before this time, in nanoseconds since the epoch.
    full_from: AtomicU64,
}

// === impl Room ===

impl Room {
    pub(super) const fn unlimited() -> Self {
        Self {
            held: AtomicUsize::new(0),
            max: AtomicUsize::new(usize::MAX),
            full_from: AtomicU64::new(u64::MAX),
        }
    }

    /// Makes room for one more key. Returns whether there was any.
    pub(super) fn try_take(&self) -> bool {
        let max = self.max();
        let more = |held| (held < max).then_some(held + 1);
        self.held
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, more)
            .is_ok()
    }

    /// Gives back the room of `keys` keys, which are not held any more.
    pub(super) fn give_back(&self, keys: usize) {
        self.held.fetch_sub(keys, Ordering::Relaxed);
    }

    /// Whether there is room for one more key.
    pub(super) fn is_left(&self) -> bool {
        self.held() < self.max()
    }

    /// Returns the time before which no key can be forgotten. `u64::MAX` if it is not known of any key when it can be.
    pub(super) fn full_from(&self) -> u64 {
        self.full_from.load(Ordering::Acquire)
    }

    /// Records that a key can be forgotten at `time`.
    pub(super) fn lower_full_from(&self, time: u64) {
        if time < self.full_from() {
            self.full_from.fetch_min(time, Ordering::AcqRel);
        }
    }

    /// Forgets when a key can be forgotten, before all keys are asked.
    pub(super) fn reset_full_from(&self) {
        self.full_from.store(u64::MAX, Ordering::Release);
    }

    pub(super) fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    pub(super) fn max(&self) -> usize {
        self.max.load(Ordering::Relaxed)
    }

    pub(super) fn set_max(&self, max: usize) {
        self.max.store(max, Ordering::Relaxed);
    }
}
