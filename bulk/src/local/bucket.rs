//! The token bucket with which the local provider enforces its limits, exact to the nanosecond. The bucket shares no
//! code with the limiter of the library, so that an error in one of the two shows as a 429.

use std::time::Duration;

pub(crate) struct Bucket {
    /// The amount that is added in each period: the number of parts that each nanosecond adds.
    amount: u128,
    /// The number of parts in which one request, token or other unit is counted: the nanoseconds of the period. So each
    /// nanosecond adds a whole number of parts.
    parts: u128,
    capacity: u128,
    level: u128,
    /// The time at which `level` was last updated.
    updated_at: Duration,
}

impl Bucket {
    /// Makes a bucket of this amount per period that is full at time zero. Its capacity is the burst plus one, plus the
    /// amount that flows in within `slack`.
    pub(crate) fn new(amount: u64, period: Duration, burst: u64, slack: Duration) -> Self {
        let (amount, parts) = (u128::from(amount), period.as_nanos());
        let capacity = (u128::from(burst) + 1) * parts + amount * slack.as_nanos();
        Self {
            amount,
            parts,
            capacity,
            level: capacity,
            updated_at: Duration::ZERO,
        }
    }

    /// Updates the level to the time `now`. Returns how long it takes until `amount` is available: zero if `amount` is
    /// available now, `None` if it is more than the capacity.
    pub(crate) fn wait(&mut self, amount: u64, now: Duration) -> Option<Duration> {
        self.level = self
            .capacity
            .min(self.level + self.amount * now.saturating_sub(self.updated_at).as_nanos());
        self.updated_at = self.updated_at.max(now);
        let amount = u128::from(amount) * self.parts;
        let missing = amount.saturating_sub(self.level).div_ceil(self.amount);
        (amount <= self.capacity).then(|| Duration::from_nanos(u64::try_from(missing).unwrap_or(u64::MAX)))
    }

    /// Raises the capacity, and leaves the level as it is.
    pub(crate) const fn grow(&mut self, amount: u64) {
        self.capacity += amount as u128 * self.parts;
    }

    /// The whole units left at the last update. The capacity is one more than the burst, and that one is
    /// not included.
    pub(crate) fn left(&self) -> u64 {
        u64::try_from(self.level.saturating_sub(self.parts) / self.parts).unwrap_or(u64::MAX)
    }

    /// The time from the last update until the bucket is full.
    pub(crate) fn until_full(&self) -> Duration {
        let missing = (self.capacity - self.level).div_ceil(self.amount);
        Duration::from_nanos(u64::try_from(missing).unwrap_or(u64::MAX))
    }

    /// Takes an amount from the bucket. The amount must be available.
    pub(crate) fn take(&mut self, amount: u64) {
        self.level -= u128::from(amount) * self.parts;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn bucket(per_minute: u64, burst: u64, slack: Duration) -> Bucket {
        Bucket::new(per_minute, Duration::from_secs(60), burst, slack)
    }

    #[test]
    fn a_bucket_fills_continuously_up_to_its_capacity() {
        // The bucket fills at one every 10 ms. Its capacity is the burst of ten plus one.
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
    fn an_amount_above_the_capacity_is_never_available() {
        assert_eq!(
            bucket(60, 10, Duration::ZERO).wait(12, Duration::from_secs(3_600)),
            None
        );
    }

    #[test]
    fn a_bucket_that_grows_keeps_its_level() {
        let mut bucket = bucket(6_000, 10, Duration::ZERO);
        bucket.take(11);
        bucket.grow(10);
        assert_eq!(bucket.wait(21, Duration::ZERO), Some(210 * MS));
    }

    #[test]
    fn slack_adds_what_flows_in_during_that_time() {
        // The bucket fills at a hundred per second, so it gains one in a slack of 10 ms.
        let mut bucket = bucket(6_000, 10, 10 * MS);
        assert_eq!(bucket.wait(12, Duration::ZERO), Some(Duration::ZERO));
        assert_eq!(bucket.wait(13, Duration::ZERO), None);
    }

    #[test]
    fn the_rate_does_not_drift() {
        // A bucket that fills at 7 per minute, from which each request is taken as early as possible, has admitted an
        // exact number after a day.
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
