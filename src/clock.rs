//! Tokio's clock, read as rarely as possible: reading it costs more than most of what is done with the result.
//!
//! There are two ways to share one reading:
//!
//! - [`LazyNow`] is handed down through one decision, which reads the clock at most once and only if it has to.
//! - [`cache`] lets [`now`] return one reading for all that happens to a call without waiting: it is taken from the
//!   queue, gets its permit, is admitted by the rate and is sent. These steps are in separate layers, so the reading is
//!   kept in a thread-local variable.
//!
//! User code must not run on a cached reading, which would be stale by the time the user code took. A layer that calls
//! or polls a service that may be the user's first calls [`bypass_cache`]; the layer reads the clock anew afterwards.
//! Only the functions that describe a request and compute its cost run inside a cache.

use std::cell::Cell;
use tokio::time::Instant;

/// The state of this thread's cache.
#[derive(Clone, Copy, PartialEq)]
enum Cache {
    /// Every call of [`now`] reads the clock.
    Off,
    /// The next call of [`now`] reads the clock and fills the cache.
    Empty,
    /// Every call of [`now`] returns this reading.
    Filled(Instant),
}

thread_local! {
    static CACHE: Cell<Cache> = const { Cell::new(Cache::Off) };
}

/// Returns the current time, or, while a [`cache`] is on, the first reading that was taken in it.
#[inline]
pub(crate) fn now() -> Instant {
    match CACHE.get() {
        Cache::Off => read(),
        Cache::Empty => {
            let now = read();
            CACHE.set(Cache::Filled(now));
            now
        }
        Cache::Filled(now) => now,
    }
}

#[cfg(not(tower_outbound_loom))]
#[inline]
fn read() -> Instant {
    Instant::now()
}

/// The same instant at every call: loom repeats a test with the same decisions, which must not depend on the time.
#[cfg(tower_outbound_loom)]
fn read() -> Instant {
    static NOW: std::sync::LazyLock<Instant> = std::sync::LazyLock::new(Instant::now);
    *NOW
}

/// Keeps the cache of [`now`] on until this is dropped.
#[must_use = "the cache is off again when this is dropped"]
pub(crate) struct CachedNow {
    was_off: bool,
}

/// Turns the cache of [`now`] on for this thread. Within another `CachedNow` this changes nothing: the outer one's
/// reading is used, and the cache stays on until the outer one is dropped.
#[inline]
pub(crate) fn cache() -> CachedNow {
    let was_off = CACHE.get() == Cache::Off;
    if was_off {
        CACHE.set(Cache::Empty);
    }
    CachedNow { was_off }
}

impl Drop for CachedNow {
    #[inline]
    fn drop(&mut self) {
        if self.was_off {
            CACHE.set(Cache::Off);
        }
    }
}

/// Keeps the cache of [`now`] off until this is dropped, while user code runs. If the cache was on before, it is on
/// again afterwards, and empty.
#[must_use = "the cache is on again when this is dropped"]
pub(crate) struct Bypassed {
    was_on: bool,
}

/// Turns the cache of [`now`] off for this thread. See [`Bypassed`].
#[inline]
pub(crate) fn bypass_cache() -> Bypassed {
    Bypassed {
        was_on: CACHE.replace(Cache::Off) != Cache::Off,
    }
}

impl Drop for Bypassed {
    #[inline]
    fn drop(&mut self) {
        if self.was_on {
            CACHE.set(Cache::Empty);
        }
    }
}

/// The current time, read at most once, when it is first needed. One decision hands it down to all its steps, so that
/// they agree on the time.
#[derive(Debug, Default)]
pub(crate) struct LazyNow {
    now: Option<Instant>,
    /// Since the epoch of the limiter that this is handed to.
    nanos: Option<u64>,
}

impl LazyNow {
    /// Returns a `LazyNow` that was read before, so that the clock is not read while a lock is held.
    pub(crate) const fn at(now: Instant) -> Self {
        Self {
            now: Some(now),
            nanos: None,
        }
    }

    pub(crate) fn get(&mut self) -> Instant {
        *self.now.get_or_insert_with(read)
    }

    /// Returns the nanoseconds from `epoch` to now. The epoch must be the same at every call.
    pub(crate) fn nanos_since(&mut self, epoch: Instant) -> u64 {
        let now = self.get();
        *self.nanos.get_or_insert_with(|| nanos_between(epoch, now))
    }
}

/// Returns the nanoseconds from `start` to `end`: zero if `end` is earlier, and at most `u64::MAX`, which is 584 years.
pub(crate) fn nanos_between(start: Instant, end: Instant) -> u64 {
    let between = end.saturating_duration_since(start);
    between
        .as_secs()
        .saturating_mul(1_000_000_000)
        .saturating_add(between.subsec_nanos().into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::time;

    async fn later() -> Instant {
        time::advance(Duration::from_nanos(1)).await;
        now()
    }

    #[tokio::test(start_paused = true)]
    async fn a_cache_has_one_reading_until_user_code_has_run() {
        let cached = cache();
        let first = later().await;
        {
            let _inner = cache();
            assert_eq!(later().await, first);
        }
        let in_user_code = {
            let _bypass = bypass_cache();
            let in_user_code = later().await;
            assert!(first < in_user_code && in_user_code < later().await);
            in_user_code
        };
        let second = later().await;
        assert!(in_user_code < second);
        assert_eq!(later().await, second);
        drop(cached);
        assert!(second < later().await);
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_cache_every_reading_is_a_new_one() {
        let _bypass = bypass_cache();
        assert!(later().await < later().await);
    }
}
