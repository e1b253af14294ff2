//! The monotonic clock, snapshot in UTC.

use std::{
    cell::Cell,
    time::{Duration, SystemTime},
};
use tokio::time::Instant;

/// An instant in UTC. Each thread reads the system's clock once a second at most: often enough to follow it when it is
/// set, or when the machine has slept.
pub(super) fn utc(now: Instant) -> SystemTime {
    const KEEP: Duration = Duration::from_secs(1);
    thread_local! {
        static ANCHOR: Cell<Option<(Instant, SystemTime)>> = const { Cell::new(None) };
    }
    match ANCHOR.get() {
        Some((at, utc)) => now
            .checked_duration_since(at)
            .filter(|since| *since < KEEP)
            .map(|since| utc + since),
        None => None,
    }
    .unwrap_or_else(|| {
        let utc = SystemTime::now();
        ANCHOR.set(Some((now, utc)));
        utc
    })
}
