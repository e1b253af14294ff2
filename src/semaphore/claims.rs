//! [`Claims`]: how many permits are held by calls that were made and not polled yet, and since when.
//!
//! A call takes its permit when it is made, so that a caller who makes one call after another is held back by the
//! limit. But a call that is not polled would keep its permit forever. So such a permit is only *claimed* until the call
//! is polled for the first time, which *confirms* the claim. Claims that are not confirmed in time can be *revoked*,
//! which makes them void and their permits free.
//!
//! The claims have two ages. New claims are young. While an acquirer waits for a permit, the young claims are made old,
//! and 5 ms later those that are still there are revoked; the claims that were made in the meantime are not. A claim
//! remembers the epoch in which it was made, and each change of the ages begins a new epoch. That tells a claim that was
//! revoked from one that was not, although only their numbers are kept.

use crate::sync::atomic::{AtomicU64, Ordering};

/// The number of claims by age, in one atomic.
pub(super) struct Claims(AtomicU64);

/// What [`Claims`] holds, unpacked.
#[derive(Clone, Copy)]
struct Counts {
    /// How many times the ages have changed: 31 bits. The number wraps around after 124 days of changes every 5 ms.
    epoch: u32,
    /// Whether no claim is accepted, because calls have not confirmed theirs in time.
    is_closed: bool,
    /// The claims that were made before the current epoch.
    old: u16,
    /// The claims that were made in the current epoch.
    young: u16,
}

const EPOCH_MASK: u32 = u32::MAX >> 1;
/// One young claim in packed [`Counts`].
const YOUNG: u64 = 1;
/// One old claim in packed [`Counts`].
const OLD: u64 = 1 << 16;

// === impl Claims ===

impl Claims {
    pub(super) fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Returns whether a claim would be accepted now.
    #[inline]
    pub(super) fn is_open(&self) -> bool {
        let counts = self.counts();
        !counts.is_closed && counts.young < u16::MAX
    }

    /// Adds a claim, and returns its epoch. Returns `None` if claims are not accepted.
    #[inline]
    pub(super) fn add(&self) -> Option<u32> {
        let added = self
            .update_packed(|packed, counts| (!counts.is_closed && counts.young < u16::MAX).then_some(packed + YOUNG));
        added.map(|counts| counts.epoch)
    }

    /// Ends the claim that was made in `epoch`. Returns whether it was still valid. If not, it has been revoked.
    #[inline]
    pub(super) fn end(&self, epoch: u32) -> bool {
        let ended = self.update_packed(|packed, counts| {
            if epoch == counts.epoch {
                (counts.young > 0).then(|| packed - YOUNG)
            } else if epoch == counts.epoch.wrapping_sub(1) & EPOCH_MASK {
                (counts.old > 0).then(|| packed - OLD)
            } else {
                None
            }
        });
        ended.is_some()
    }

    /// Returns whether there are old claims.
    pub(super) fn has_old(&self) -> bool {
        self.counts().old > 0
    }

    /// Makes the young claims old, if there are any. There must be no old ones.
    pub(super) fn age(&self) -> bool {
        let aged = self.update(|counts| {
            (counts.young > 0 && counts.old == 0).then_some(Counts {
                epoch: counts.epoch.wrapping_add(1) & EPOCH_MASK,
                old: counts.young,
                young: 0,
                ..counts
            })
        });
        aged.is_some()
    }

    /// Revokes the old claims, and returns how many there were. If there were any, no claims are accepted until
    /// [`reopen`](Self::reopen) is called: otherwise, calls that are never polled could delay the others by 5 ms each.
    pub(super) fn revoke_old(&self) -> usize {
        let before = self.update(|counts| {
            (counts.old > 0).then_some(Counts {
                old: 0,
                is_closed: true,
                ..counts
            })
        });
        before.map_or(0, |counts| counts.old.into())
    }

    /// Accepts claims again.
    #[inline]
    pub(super) fn reopen(&self) {
        if self.counts().is_closed {
            self.update(|counts| {
                Some(Counts {
                    is_closed: false,
                    ..counts
                })
            });
        }
    }

    #[inline]
    fn counts(&self) -> Counts {
        Counts::unpack(self.0.load(Ordering::SeqCst))
    }

    /// Replaces the counts by what `change` returns, and returns the counts from before. Changes nothing and returns
    /// `None` if `change` does.
    #[inline]
    fn update(&self, change: impl Fn(Counts) -> Option<Counts>) -> Option<Counts> {
        self.update_packed(|_, counts| change(counts).map(Counts::pack))
    }

    /// Does what [`update`](Self::update) does, for a `change` that gets the counts also packed, and returns them packed.
    /// To add to one count is faster than to pack them all, and is done several times for each call.
    #[inline]
    fn update_packed(&self, change: impl Fn(u64, Counts) -> Option<u64>) -> Option<Counts> {
        let change = |packed| change(packed, Counts::unpack(packed));
        let before = self.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, change);
        before.ok().map(Counts::unpack)
    }
}

// === impl Counts ===

impl Counts {
    #[inline]
    const fn unpack(packed: u64) -> Self {
        Self {
            epoch: (packed >> 32) as u32 & EPOCH_MASK,
            is_closed: packed >> 63 != 0,
            old: (packed >> 16) as u16,
            young: packed as u16,
        }
    }

    #[inline]
    const fn pack(self) -> u64 {
        (self.is_closed as u64) << 63 | (self.epoch as u64) << 32 | (self.old as u64) << 16 | self.young as u64
    }
}
