//! Tokio's clock, read as rarely as possible: a reading costs more than most of what is done with the result.
//!
//! [`LazyNow`] and [`cache`] are the two ways in which several steps share one reading of the clock:
//!
//! - [`LazyNow`] is handed down through one decision, such as the admission of a call. The decision reads the clock at
//!   most once, and only if it has to.
//! - [`cache`] lets [`now`] return one reading for all that happens to a call without waiting: the call is taken from
//!   the queue, gets its permit, is admitted by the rate limiter and is sent. These steps are in separate layers, so
//!   the reading is kept in a thread-local variable.
//!
//! A service that may be user code must not run while the cache is on: it may take long, and a reading from before it
//! would then be stale. So a layer turns the cache off with [`bypass_cache`] before it calls or polls such a service,
//! and the next call of [`now`] after that reads the clock anew. The functions that describe a call or compute its cost,
//! and the `poll_ready` of a client, are user code, too, but are expected to be quick, and run while the cache is on.

use std::cell::Cell;
use tokio::time::Instant;

/// The state of this thread's cache of the current time.
#[derive(Clone, Copy, PartialEq)]
enum Cache {
    /// The cache is off: every call of [`now`] reads the clock.
    Off,
    /// The cache is on and empty: the next call of [`now`] reads the clock and fills the cache.
    Empty,
    /// The cache is on: every call of [`now`] returns this reading.
    Filled(Instant),
}

thread_local! {
    static CACHE: Cell<Cache> = const { Cell::new(Cache::Off) };
}

/// Returns the current time. While a [`cache`] is on, returns the first reading that was taken since it was turned on
/// or last bypassed.
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

/// Reads the clock in tests under loom: returns the same instant at every call. loom runs a test many times and expects
/// the same decisions each time, so the decisions must not depend on the time.
#[cfg(tower_outbound_loom)]
fn read() -> Instant {
    static NOW: std::sync::LazyLock<Instant> = std::sync::LazyLock::new(Instant::now);
    *NOW
}

/// A guard: this thread's cache of [`now`] stays enabled until the guard is dropped.
#[must_use = "the cache is off again when this is dropped"]
pub(crate) struct CachedNow {
    was_off: bool,
}

/// Turns the cache of [`now`] on for this thread, until the returned guard is dropped. If the cache is on already,
/// nothing changes: the reading stays, and the cache stays on until the earlier guard is dropped.
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

/// A guard that keeps this thread's cache of [`now`] off while user code runs. If the cache was on before, dropping the
/// guard turns it on again, empty.
#[must_use = "the cache is on again when this is dropped"]
pub(crate) struct Bypassed {
    was_on: bool,
}

/// Turns the cache of [`now`] off for this thread, until the returned guard is dropped. See [`Bypassed`].
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

/// The current time, read at most once, when it is first needed. A decision, such as the admission of a call, hands one
/// `LazyNow` down to all its steps, so that they agree on the time.
#[derive(Debug, Default)]
pub(crate) struct LazyNow {
    now: Option<Instant>,
    /// The nanoseconds from the epoch of a rate limiter to `now`; `None` until they are first needed.
    nanos: Option<u64>,
}

impl LazyNow {
    /// Creates a `LazyNow` with a reading that the caller took before it locked a mutex, so that the clock is not read
    /// while the lock is held.
    pub(crate) const fn at(now: Instant) -> Self {
        Self {
            now: Some(now),
            nanos: None,
        }
    }

    #[inline]
    pub(crate) fn get(&mut self) -> Instant {
        *self.now.get_or_insert_with(read)
    }

    /// Returns the nanoseconds from `epoch` to now. Every call must pass the same epoch, because the result is kept.
    #[inline]
    pub(crate) fn nanos_since(&mut self, epoch: Instant) -> u64 {
        let now = self.get();
        *self.nanos.get_or_insert_with(|| nanos_between(epoch, now))
    }
}

/// Returns the nanoseconds from `start` to `end`: zero if `end` is earlier than `start`, and `u64::MAX` (584 years) if
/// there are more.
#[inline]
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
