//! [`ServerClock`]: maps times of the server's clock to times of this process, and knows how long replies take to arrive.

use crate::rate::redis::wire::instant_after;
use tokio::time::{Duration, Instant};

/// How long what replies have told of the server's clock is used before newer replies replace it: two clocks drift apart
/// by about a millisecond in this time.
const WINDOW: Duration = Duration::from_secs(10);
/// How much earlier than a reply usually arrives a reservation may be. A call that is admitted when the reply arrives
/// needs no timer, which would wait for up to a millisecond longer.
const SLACK: Duration = Duration::from_millis(2);
/// How many replies the lead is taken from.
const REPLIES: usize = 8;

/// The server's clock, as the replies have shown it.
///
/// The server reads its clock after a request was sent, and before its reply arrives. So each reply says between which two
/// local times the server's clock has shown its time. What all replies of the last 10 to 20 s allow is about as short as
/// the quickest request and the quickest reply together, and the estimate is the middle of it (after Marzullo's
/// algorithm, on which NTP builds). A single request that was quick tells as much as a round trip that was.
#[derive(Debug, Default)]
pub(super) struct ServerClock {
    /// What the replies since the begin of this window and of the one before it allow.
    since_previous: Option<Reading>,
    /// What the replies since the begin of this window allow.
    since_current: Option<Reading>,
    window_ends: Option<Instant>,
    /// How long the last replies took to arrive, by the estimate at that time; the oldest is replaced next.
    delays: [Duration; REPLIES],
    replies: usize,
}

/// The server's clock has shown `server` between two local times.
#[derive(Clone, Copy, Debug)]
struct Reading {
    /// In microseconds since 1970.
    server: i64,
    earliest: Instant,
    latest: Instant,
}

impl ServerClock {
    /// Learns from a reply: the server's clock showed `server`, in microseconds since 1970.
    pub(super) fn on_reply(&mut self, server: i64, sent_at: Instant, now: Instant) {
        if self.window_ends.is_none_or(|ends| now >= ends) {
            self.window_ends = Some(now + WINDOW);
            self.since_previous = self.since_current.take();
        }
        let reading = Reading {
            server,
            earliest: sent_at,
            latest: now,
        };
        for known in [&mut self.since_previous, &mut self.since_current] {
            *known = Some(known.map_or(reading, |known| known.narrowed_by(reading)));
        }
        self.delays[self.replies % REPLIES] = now.saturating_duration_since(self.local_of(server, now));
        self.replies += 1;
    }

    /// Returns when the server's clock shows `server`. Before the first reply, returns `now`.
    pub(super) fn local_of(&self, server: i64, now: Instant) -> Instant {
        let known = self.since_previous.map(|known| known.at(server));
        known.map_or(now, |known| known.earliest + (known.latest - known.earliest) / 2)
    }

    /// Returns how long a reply takes to arrive: the second longest of the last times, so that a single slow reply does
    /// not count, and a sixteenth more, since what comes from far varies by more. A part of the time in which a
    /// reservation may be used late is subtracted. 0 before the first reply.
    pub(super) fn lead(&self) -> Duration {
        let mut delays = self.delays;
        let seen = &mut delays[..self.replies.min(REPLIES)];
        seen.sort_unstable();
        let usual = match seen {
            [] => Duration::ZERO,
            [only] => *only,
            [.., second, _] => *second,
        };
        (usual + usual / 16).saturating_sub(SLACK)
    }
}

impl Reading {
    /// Returns when the server's clock shows `server`.
    fn at(self, server: i64) -> Self {
        let local = |known| instant_after(server - self.server, known);
        Self {
            server,
            earliest: local(self.earliest),
            latest: local(self.latest),
        }
    }

    /// Returns what both readings allow. If they exclude each other, because one of the clocks was set or drifts, returns
    /// the time that is nearest to this reading and that the `newer` one allows.
    fn narrowed_by(self, newer: Self) -> Self {
        let known = self.at(newer.server);
        Self {
            server: newer.server,
            earliest: known.earliest.clamp(newer.earliest, newer.latest),
            latest: known.latest.clamp(newer.earliest, newer.latest),
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
    fn quick_requests_and_replies_tell_the_time_and_a_slow_one_changes_nothing() {
        let mut clock = ServerClock::default();
        let start = Instant::now();
        // The server's clock shows one second more than the milliseconds since the start.
        let server = |millis: i64| 1_000_000 + millis * 1_000;
        assert_eq!((clock.local_of(0, start), clock.lead()), (start, Duration::ZERO));
        // The request takes 10 ms and the reply 90 ms, so the middle of the round trip is wrong by 40 ms.
        clock.on_reply(server(10), start, start + ms(100));
        assert_eq!(clock.local_of(server(10), start), start + ms(50));
        // This request takes 50 ms, and the reply 4 ms: with the request before, the error is (10 - 4) / 2 = 3 ms.
        clock.on_reply(server(150), start + ms(100), start + ms(154));
        assert_eq!(clock.local_of(server(150), start), start + ms(147));
        clock.on_reply(server(205), start + ms(202), start + ms(208));
        assert_eq!(clock.local_of(server(500), start), start + ms(500));
        clock.on_reply(server(310), start + ms(300), start + ms(700));
        assert_eq!(clock.local_of(server(500), start), start + ms(500));
        assert_eq!(clock.lead(), Duration::from_micros(51_125));
        clock.on_reply(server(1_095), start + ms(1_000), start + ms(1_100));
        assert_eq!(clock.lead(), Duration::from_micros(51_125));
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
