//! [`RoundTrips`]: how long round trips to the store take, and how long to wait for a reply because of that.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// The longest time to wait for a reply, however far the server is.
const MAX_TIMEOUT: Duration = Duration::from_secs(10);

/// The round trips of one limiter, shared by its driver and its connection.
#[derive(Debug, Default)]
pub(super) struct RoundTrips {
    times: Mutex<Times>,
}

/// The estimate of RFC 6298, by which TCP computes its retransmission timeout.
#[derive(Clone, Copy, Debug, Default)]
struct Times {
    last: Duration,
    /// The smoothed round trip time; 0 before the first sample.
    smoothed: Duration,
    variation: Duration,
}

impl RoundTrips {
    /// Records a completed round trip of a request.
    pub(super) fn record(&self, time: Duration) {
        let mut times = self.lock();
        times.last = time;
        times.add(time);
    }

    /// Records a round trip of the connection itself, such as the one that loads the script.
    pub(super) fn record_connected(&self, time: Duration) {
        self.lock().add(time);
    }

    /// Returns how long the last completed round trip of a request took; 0 before the first.
    pub(super) fn last(&self) -> Duration {
        self.lock().last
    }

    /// Returns how long to wait for a reply: at least `least`, and at least twice the usual round trip time.
    pub(super) fn timeout(&self, least: Duration) -> Duration {
        let Times {
            smoothed, variation, ..
        } = *self.lock();
        least.max((smoothed + smoothed.max(4 * variation)).min(MAX_TIMEOUT))
    }

    fn lock(&self) -> MutexGuard<'_, Times> {
        self.times.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Times {
    fn add(&mut self, time: Duration) {
        if self.smoothed.is_zero() {
            (self.smoothed, self.variation) = (time, time / 2);
        } else {
            self.variation = (3 * self.variation + self.smoothed.abs_diff(time)) / 4;
            self.smoothed = (7 * self.smoothed + time) / 8;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    #[test]
    fn the_timeout_is_the_configured_one_while_the_server_is_near() {
        let trips = RoundTrips::default();
        assert_eq!(trips.timeout(ms(500)), ms(500));
        for _ in 0..100 {
            trips.record(ms(2));
        }
        assert_eq!((trips.timeout(ms(500)), trips.last()), (ms(500), ms(2)));
    }

    #[test]
    fn the_timeout_is_at_least_twice_the_round_trip_time_and_at_most_ten_seconds() {
        let trips = RoundTrips::default();
        trips.record_connected(ms(400));
        assert_eq!((trips.timeout(ms(500)), trips.last()), (ms(1_200), ms(0)));
        for _ in 0..100 {
            trips.record(ms(400));
        }
        let steady = trips.timeout(ms(500));
        assert!((ms(799)..=ms(801)).contains(&steady), "{steady:?}");
        trips.record(ms(600_000));
        assert_eq!(trips.timeout(ms(500)), ms(10_000));
        // One odd round trip is forgotten within a hundred usual ones.
        for _ in 0..100 {
            trips.record(ms(1));
        }
        assert_eq!(trips.timeout(ms(500)), ms(500));
    }
}
