//! Tokio's clock, and readings that are cache: to read it costs more than most of what is done with the reading.
//!
//! One decision reads it once, as a [`LazyNow`]. And what a call goes through at one go (it is taken from the queue, gets
//! its permit, is admitted, goes to the wire) happens at one cached, so one reading serves for all of it: [`cache`]
//! opens such a cached, and [`now`] reads the clock once in it.
//!
//! Only our own code runs in a cached, and the functions that tell what a request is and costs. Before a layer of ours
//! calls or polls something that may be another's, it steps out with [`bypass_cache`]; what follows is another cached.

use std::cell::Cell;
use tokio::time::Instant;

#[derive(Clone, Copy, PartialEq)]
enum Cache {
    /// Every reading is for one alone.
    Off,
    /// The next reading is for all that follow.
    Empty,
    Filled(Instant),
}

thread_local! {
    static CACHE: Cell<Cache> = const { Cell::new(Cache::Off) };
}

/// Now; within a [`cache`] cached, what the first one read.
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

/// Time stands still where interleavings are tried out, or they would not be the same again.
#[cfg(tower_outbound_loom)]
fn read() -> Instant {
    static NOW: std::sync::LazyLock<Instant> = std::sync::LazyLock::new(Instant::now);
    *NOW
}

/// Until it is dropped, all happens at one cached; in an outer one that is cache already, at that.
#[must_use = "the cached ends when this is dropped"]
pub(crate) struct CachedNow {
    opened: bool,
}

#[inline]
pub(crate) fn cache() -> CachedNow {
    let opened = CACHE.get() == Cache::Off;
    if opened {
        CACHE.set(Cache::Empty);
    }
    CachedNow { opened }
}

impl Drop for CachedNow {
    #[inline]
    fn drop(&mut self) {
        if self.opened {
            CACHE.set(Cache::Off);
        }
    }
}

/// Until it is dropped, others' code runs. It sees no cached, and what follows is a new one.
#[must_use = "this is for what is done before it is dropped"]
pub(crate) struct Bypassed {
    was_on: bool,
}

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

/// A reading taken once at most, and only by those who need it. It is handed down through all that one decision does.
#[derive(Debug, Default)]
pub(crate) struct LazyNow {
    now: Option<Instant>,
    /// Since the epoch of whoever asks.
    nanos: Option<u64>,
}

impl LazyNow {
    /// A reading taken before, so that nobody else waits for a lock meanwhile.
    pub(crate) const fn at(now: Instant) -> Self {
        Self {
            now: Some(now),
            nanos: None,
        }
    }

    pub(crate) fn now(&mut self) -> Instant {
        *self.now.get_or_insert_with(read)
    }

    /// Now, in nanoseconds since an instant that is always the same one.
    pub(crate) fn nanos_since(&mut self, epoch: Instant) -> u64 {
        let now = self.now();
        *self.nanos.get_or_insert_with(|| nanos_between(epoch, now))
    }
}

/// At most what a `u64` holds, which is 584 years.
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
    async fn a_shared_moment_has_one_reading_until_others_have_run() {
        let cached = cache();
        let first = later().await;
        {
            let _inner = cache();
            assert_eq!(later().await, first);
        }
        let client = {
            let _bypass = bypass_cache();
            let client = later().await;
            assert!(first < client && client < later().await);
            client
        };
        let second = later().await;
        assert!(client < second);
        assert_eq!(later().await, second);
        drop(cached);
        assert!(second < later().await);
    }

    #[tokio::test(start_paused = true)]
    async fn outside_nothing_is_shared() {
        let _bypass = bypass_cache();
        assert!(later().await < later().await);
    }
}
