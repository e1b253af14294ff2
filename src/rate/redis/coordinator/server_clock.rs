//! [`ServerClock`]: maps times of the server's clock to times of this process, and knows how long replies take to arrive.

use crate::rate::redis::wire::instant_after;
use tokio::time::{Duration, Instant};

/// How long the best of several measurements is used before newer ones replace it: two clocks drift apart by about a
/// millisecond in this time.
const WINDOW: Duration = Duration::from_secs(10);
/// How much earlier than a reply usually arrives a reservation may be. A call that is admitted when the reply arrives
/// needs no timer, which would wait for up to a millisecond longer.
const SLACK: Duration = Duration::from_millis(2);
/// How many replies the lead is taken from.
const REPLIES: usize = 8;

/// The server's clock, as the round trips to the server have shown it.
///
/// The server reads its clock between the time when a request was sent and the time when the reply arrived. The middle of
/// the two is wrong by at most half of the round trip, so the estimate comes from the shortest round trip of the last 10
/// to 20 s (Cristian's algorithm; NTP filters in the same way).
#[derive(Debug, Default)]
pub(super) struct ServerClock {
    /// The best measurement of the current window.
    best: Option<Measurement>,
    /// The best measurement of the window before.
    previous: Option<Measurement>,
    window_ends: Option<Instant>,
    /// How long the last replies took to arrive, by the estimate at that time; the oldest is replaced next.
    delays: [Duration; REPLIES],
    replies: usize,
}

/// One reading of both clocks.
#[derive(Clone, Copy, Debug)]
struct Measurement {
    /// In microseconds since 1970.
    server: i64,
    local: Instant,
    round_trip: Duration,
}

impl ServerClock {
    /// Learns from a reply: the server's clock showed `server`, in microseconds since 1970.
    pub(super) fn on_reply(&mut self, server: i64, sent_at: Instant, now: Instant) {
        if self.window_ends.is_none_or(|ends| now >= ends) {
            self.window_ends = Some(now + WINDOW);
            self.previous = self.best.take();
        }
        let round_trip = now.saturating_duration_since(sent_at);
        let measured = Measurement {
            server,
            local: sent_at + round_trip / 2,
            round_trip,
        };
        for known in [&mut self.best, &mut self.previous].into_iter().flatten() {
            // An estimate by which the server has read its clock before the request was sent, or after the reply
            // arrived, is wrong by at least the difference: one of the clocks was set or drifts.
            let estimated = known.local_of(server);
            let possible = estimated.clamp(sent_at, now);
            known.local = known.local + (possible - estimated) - (estimated - possible);
        }
        if self.best.is_none_or(|best| round_trip <= best.round_trip) {
            self.best = Some(measured);
        }
        self.delays[self.replies % REPLIES] = now.saturating_duration_since(self.local_of(server, now));
        self.replies += 1;
    }

    /// Returns when the server's clock shows `server`. Before the first reply, returns `now`.
    pub(super) fn local_of(&self, server: i64, now: Instant) -> Instant {
        let known = [self.best, self.previous].into_iter().flatten();
        let best = known.min_by_key(|known| known.round_trip);
        best.map_or(now, |best| best.local_of(server))
    }

    /// Returns how long a reply takes to arrive: the second longest of the last times, so that a single slow reply does
    /// not count, less a part of the time in which a reservation may be used late. 0 before the first reply.
    pub(super) fn lead(&self) -> Duration {
        let mut delays = self.delays;
        let seen = &mut delays[..self.replies.min(REPLIES)];
        seen.sort_unstable();
        let usual = match seen {
            [] => Duration::ZERO,
            [only] => *only,
            [.., second, _] => *second,
        };
        usual.saturating_sub(SLACK)
    }
}

impl Measurement {
    fn local_of(&self, server: i64) -> Instant {
        instant_after(server - self.server, self.local)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    #[test]
    fn the_shortest_round_trip_tells_the_time_and_a_slow_reply_changes_nothing() {
        let mut clock = ServerClock::default();
        let start = Instant::now();
        // The server's clock shows one second more than the milliseconds since the start.
        let server = |millis: i64| 1_000_000 + millis * 1_000;
        assert_eq!((clock.local_of(0, start), clock.lead()), (start, Duration::ZERO));
        // The request takes 10 ms and the reply 90 ms, so the middle of the round trip is wrong by 40 ms.
        clock.on_reply(server(10), start, start + ms(100));
        assert_eq!(clock.local_of(server(10), start), start + ms(50));
        clock.on_reply(server(205), start + ms(200), start + ms(210));
        assert_eq!(clock.local_of(server(500), start), start + ms(500));
        clock.on_reply(server(310), start + ms(300), start + ms(700));
        assert_eq!(clock.local_of(server(500), start), start + ms(500));
        assert_eq!(clock.lead(), ms(48));
        clock.on_reply(server(1_095), start + ms(1_000), start + ms(1_100));
        assert_eq!(clock.lead(), ms(48));
    }

    #[test]
    fn a_clock_that_is_set_is_followed_with_the_next_reply() {
        let mut clock = ServerClock::default();
        let start = Instant::now();
        clock.on_reply(1_000, start, start + ms(2));
        clock.on_reply(9_000_000, start + ms(10), start + ms(30));
        let local = clock.local_of(9_000_000, start);
        assert!(start + ms(10) <= local && local <= start + ms(30));
        // After two windows, older measurements are gone.
        for second in 1..30 {
            let sent = start + ms(second * 1_000);
            clock.on_reply(9_000_000 + second as i64 * 1_000_000, sent, sent + ms(2));
        }
        assert_eq!(clock.local_of(9_000_000 + 29_000_000, start), start + ms(29_001));
    }
}
