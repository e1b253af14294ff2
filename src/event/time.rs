//! [`Anchor`]: converts instants of the monotonic clock to times in UTC.

use std::{
    cell::Cell,
    time::{Duration, SystemTime},
};
use tokio::time::Instant;

/// One point in time, read from both the monotonic clock and the system's clock (UTC), from which other instants are
/// converted to UTC.
///
/// Differences between the times that one anchor converts are exact, even if the system's clock is set meanwhile.
#[derive(Clone, Copy)]
pub(super) struct Anchor {
    instant: Instant,
    utc: SystemTime,
}

/// How long a thread uses one reading of the system's clock: short enough to follow that clock when it is set, or when
/// the machine has slept.
const MAX_AGE: Duration = Duration::from_secs(1);

thread_local! {
    /// The last anchor of this thread, and the instant from which it is no longer used.
    static LAST: Cell<Option<(Anchor, Instant)>> = const { Cell::new(None) };
}

impl Anchor {
    /// Returns an anchor that is at most [`MAX_AGE`] before `now`. Each thread reads the system's clock at most once in
    /// that time, and its events share the anchor. Comparing the instants costs less than computing an anchor at `now`.
    #[inline]
    pub(super) fn at(now: Instant) -> Self {
        match LAST.get() {
            Some((last, expires)) if last.instant <= now && now < expires => last,
            _ => Self::read(now),
        }
    }

    #[cold]
    fn read(now: Instant) -> Self {
        let anchor = Self {
            instant: now,
            utc: SystemTime::now(),
        };
        LAST.set(Some((anchor, now + MAX_AGE)));
        anchor
    }

    /// Converts `instant` to UTC. An instant before the anchor is converted to the anchor's own time.
    pub(super) fn utc(&self, instant: Instant) -> SystemTime {
        self.utc + instant.saturating_duration_since(self.instant)
    }
}
