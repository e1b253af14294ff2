//! How the local provider counts: a token bucket, exact to the nanosecond. It shares no code with the limiter it
//! checks.

use crate::limits::Pace;
use std::time::Duration;

/// Counted in parts so small that each nanosecond adds a whole number of them: `per_minute`.
const PARTS: u128 = 60 * 1_000_000_000;

pub(crate) struct Bucket {
    per_minute: u128,
    capacity: u128,
    level: u128,
    /// The time that it has seen.
    at: Duration,
}

impl Bucket {
    /// Full, at time zero. It holds the burst, one more, and what flows in within `slack`.
    pub(crate) fn new(pace: Pace, slack: Duration) -> Self {
        let per_minute = u128::from(pace.per_minute);
        let capacity = (u128::from(pace.burst) + 1) * PARTS + per_minute * slack.as_nanos();
        Self {
            per_minute,
            capacity,
            level: capacity,
            at: Duration::ZERO,
        }
    }

    /// How long until so much is there, as seen at this time; `None`: it never is.
    pub(crate) fn wait(&mut self, amount: u64, now: Duration) -> Option<Duration> {
        self.level = self
            .capacity
            .min(self.level + self.per_minute * now.saturating_sub(self.at).as_nanos());
        self.at = self.at.max(now);
        let amount = u128::from(amount) * PARTS;
        let missing = amount.saturating_sub(self.level).div_ceil(self.per_minute);
        (amount <= self.capacity).then(|| Duration::from_nanos(u64::try_from(missing).unwrap_or(u64::MAX)))
    }

    /// What is there, in whole ones, as last seen. (The one more than the burst is not told.)
    pub(crate) fn left(&self) -> u64 {
        u64::try_from(self.level.saturating_sub(PARTS) / PARTS).unwrap_or(u64::MAX)
    }

    /// How long until it is full.
    pub(crate) fn until_full(&self) -> Duration {
        let missing = (self.capacity - self.level).div_ceil(self.per_minute);
        Duration::from_nanos(u64::try_from(missing).unwrap_or(u64::MAX))
    }

    /// Takes so much, which has to be there.
    pub(crate) fn take(&mut self, amount: u64) {
        self.level -= u128::from(amount) * PARTS;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn bucket(per_minute: u64, burst: u64, slack: Duration) -> Bucket {
        Bucket::new(
            Pace {
                per_minute,
                burst,
                initial: burst,
            },
            slack,
        )
    }

    #[test]
    fn it_fills_continuously_up_to_its_capacity() {
        // One every 10 ms; it holds ten, and one more.
        let mut bucket = bucket(6_000, 10, Duration::ZERO);
        assert_eq!(bucket.wait(11, Duration::ZERO), Some(Duration::ZERO));
        bucket.take(11);
        for (amount, at, wait) in [
            (1, 0, 10),
            (1, 4, 6),
            (2, 4, 16),
            (1, 10, 0),
            (11, 10, 100),
            (11, 5_000, 0),
        ] {
            assert_eq!(bucket.wait(amount, at * MS), Some(wait * MS), "{amount} at {at}");
        }
        bucket.take(11);
        assert_eq!(bucket.wait(1, 5_000 * MS), Some(10 * MS));
    }

    #[test]
    fn what_it_cannot_hold_it_never_has() {
        assert_eq!(
            bucket(60, 10, Duration::ZERO).wait(12, Duration::from_secs(3_600)),
            None
        );
    }

    #[test]
    fn slack_is_what_flows_in_meanwhile() {
        // A hundred a second: one in 10 ms.
        let mut bucket = bucket(6_000, 10, 10 * MS);
        assert_eq!(bucket.wait(12, Duration::ZERO), Some(Duration::ZERO));
        assert_eq!(bucket.wait(13, Duration::ZERO), None);
    }

    #[test]
    fn nothing_drifts() {
        // 7 a minute, asked for as early as can be: after a day exactly so many.
        let mut bucket = bucket(7, 1, Duration::ZERO);
        let (mut now, mut taken) = (Duration::ZERO, 0);
        loop {
            now += bucket.wait(1, now).unwrap();
            if now > Duration::from_secs(24 * 60 * 60) {
                break;
            }
            assert_eq!(bucket.wait(1, now), Some(Duration::ZERO));
            bucket.take(1);
            taken += 1;
        }
        assert_eq!(taken, 2 + 7 * 60 * 24);
    }
}
