//! [`RoundTrips`]: how long round trips to the store take, and how long to wait for a reply because of that.

use std::sync::{Mutex, MutexGuard, PoisonError};
use tokio::time::{Duration, Instant};

/// The longest time to wait for a reply, however far the server is.
const MAX_TIMEOUT: Duration = Duration::from_secs(10);

/// The round trips of one limiter, shared by its driver and its store. A request may take several of them: to subscribe,
/// and to run the script once or twice.
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
    /// When a request last got on: the connection was made, or a reply has arrived that is not the last one.
    progressed_at: Option<Instant>,
}

impl RoundTrips {
    /// Records that the request that was begun at `began_at` has its last reply at `now`. Returns when what this reply
    /// answers was sent: later than `began_at` if the connection had to be made first.
    pub(super) fn on_reply(&self, began_at: Instant, now: Instant) -> Instant {
        let mut times = self.lock();
        times.last = now - began_at;
        let sent_at = times.last_step(began_at);
        times.add(now.saturating_duration_since(sent_at));
        sent_at
    }

    /// Records that a request has a reply at `now`, and goes on.
    pub(super) fn on_progress(&self, now: Instant) {
        self.lock().progressed_at = Some(now);
    }

    /// Records that a request has a new connection, on which the first round trip has taken the time `round_trip`. What
    /// was learned of earlier connections is forgotten.
    pub(super) fn on_connected(&self, round_trip: Duration, now: Instant) {
        let mut times = self.lock();
        (times.smoothed, times.progressed_at) = (Duration::ZERO, Some(now));
        times.add(round_trip);
    }

    /// Returns how long the last completed request took; 0 before the first.
    pub(super) fn last(&self) -> Duration {
        self.lock().last
    }

    /// Returns until when to wait for the reply to a request that was begun at `began_at`: at least for the time `least`
    /// since it last got on, and at least for twice the usual round trip time.
    pub(super) fn deadline(&self, began_at: Instant, least: Duration) -> Instant {
        let times = *self.lock();
        let usual = times.smoothed + times.smoothed.max(4 * times.variation);
        times.last_step(began_at) + least.max(usual.min(MAX_TIMEOUT))
    }

    fn lock(&self) -> MutexGuard<'_, Times> {
        self.times.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Times {
    /// Returns when the request that was begun at `began_at` has last got on.
    fn last_step(&self, began_at: Instant) -> Instant {
        self.progressed_at.map_or(began_at, |at| at.max(began_at))
    }

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

    /// Returns how long a request that begins at `now` is waited for.
    fn timeout(trips: &RoundTrips, now: Instant) -> Duration {
        trips.deadline(now, ms(500)) - now
    }

    #[test]
    fn the_timeout_is_the_configured_one_while_the_server_is_near() {
        let (trips, now) = (RoundTrips::default(), Instant::now());
        assert_eq!(timeout(&trips, now), ms(500));
        for _ in 0..100 {
            trips.on_reply(now, now + ms(2));
        }
        assert_eq!((timeout(&trips, now), trips.last()), (ms(500), ms(2)));
    }

    #[test]
    fn the_timeout_is_at_least_twice_the_round_trip_time_and_at_most_ten_seconds() {
        let (trips, now) = (RoundTrips::default(), Instant::now());
        trips.on_connected(ms(400), now);
        assert_eq!((timeout(&trips, now), trips.last()), (ms(1_200), ms(0)));
        for _ in 0..100 {
            trips.on_reply(now, now + ms(400));
        }
        let steady = timeout(&trips, now);
        assert!((ms(799)..=ms(801)).contains(&steady), "{steady:?}");
        trips.on_reply(now, now + ms(600_000));
        assert_eq!(timeout(&trips, now), ms(10_000));
        // One odd round trip is forgotten within a hundred usual ones, and at once by a new connection.
        for _ in 0..100 {
            trips.on_reply(now, now + ms(1));
        }
        assert_eq!(timeout(&trips, now), ms(500));
        trips.on_connected(ms(1_000), now);
        assert_eq!(timeout(&trips, now), ms(3_000));
    }

    #[test]
    fn the_timeout_counts_from_the_last_reply_to_the_request() {
        let (trips, now) = (RoundTrips::default(), Instant::now());
        trips.on_connected(ms(10), now);
        trips.on_progress(now + ms(300));
        assert_eq!(trips.deadline(now, ms(500)), now + ms(800));
        trips.on_reply(now, now + ms(310));
        assert_eq!(trips.last(), ms(310));
        // The next request does not get more time because of this one.
        let later = now + ms(1_000);
        assert_eq!(timeout(&trips, later), ms(500));
    }
}
