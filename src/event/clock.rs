//! The monotonic clock, told in UTC.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, SystemTime},
};
use tokio::time::Instant;

/// An instant in UTC. The system's clock is read once a minute at most: often enough to follow it when it is set, or
/// when the machine has slept.
pub(super) fn utc(now: Instant) -> SystemTime {
    const KEEP: Duration = Duration::from_secs(60);
    static ANCHOR: Mutex<Option<(Instant, SystemTime)>> = Mutex::new(None);
    let mut anchor = ANCHOR.lock().unwrap_or_else(PoisonError::into_inner);
    match *anchor {
        Some((at, utc)) if now >= at && now - at < KEEP => utc + (now - at),
        _ => {
            let utc = SystemTime::now();
            *anchor = Some((now, utc));
            utc
        }
    }
}
