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
    pub(super) instant: Instant,
    pub(super) utc: SystemTime,
}

/// How long a thread uses one reading of the system's clock: short enough to follow that clock when it is set, or when
/// the machine has slept.
const MAX_AGE: Duration = Duration::from_secs(1);

thread_local! {
    static LAST: Cell<Option<Anchor>> = const { Cell::new(None) };
}

impl Anchor {
    /// Returns an anchor at `now`. Each thread reads the system's clock at most once a second. In between, the time
    /// that has passed since the last reading is added to that reading.
    pub(super) fn at(now: Instant) -> Self {
        let age = |last: &Self| now.checked_duration_since(last.instant).filter(|age| *age < MAX_AGE);
        if let Some((last, age)) = LAST.get().and_then(|last| Some((last, age(&last)?))) {
            return Self {
                instant: now,
                utc: last.utc + age,
            };
        }
        let anchor = Self {
            instant: now,
            utc: SystemTime::now(),
        };
        LAST.set(Some(anchor));
        anchor
    }

    /// Converts `instant` to UTC. An instant before the anchor is converted to the anchor's own time.
    pub(super) fn utc(&self, instant: Instant) -> SystemTime {
        self.utc + instant.saturating_duration_since(self.instant)
    }
}
