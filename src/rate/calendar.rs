//! [`Calendar`]: windows of the calendar, in which a provider counts anew: days and months.
//!
//! Times are ticks since 1970, in UTC: nanoseconds, or microseconds for limits that processes share. This module has no
//! clock.

use std::time::{Duration, SystemTime};

/// A division of time into windows by the calendar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Calendar {
    unit: Unit,
    /// How long after midnight UTC a window begins, in seconds: less than a day.
    start: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unit {
    Day,
    Month,
}

/// The window that a bucket is in.
#[derive(Clone, Debug)]
pub(super) struct OpenWindow {
    calendar: Calendar,
    /// The number of ticks in a second.
    second: u64,
    now: u64,
    ends: u64,
}

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

// === impl Calendar ===

impl Calendar {
    pub(super) const DAY: Self = Self {
        unit: Unit::Day,
        start: 0,
    };
    pub(super) const MONTH: Self = Self {
        unit: Unit::Month,
        start: 0,
    };

    /// Returns this calendar with windows that begin `start` seconds after midnight UTC. `None` if that is a day or more.
    pub(super) fn starting_at(self, start: u32) -> Option<Self> {
        (u64::from(start) < DAY.as_secs()).then_some(Self { start, ..self })
    }

    /// Returns how long a window is. Of a month: 30 days.
    pub(super) const fn period(self) -> Duration {
        match self.unit {
            Unit::Day => DAY,
            Unit::Month => Duration::from_secs(30 * 24 * 60 * 60),
        }
    }

    /// Returns how long after midnight UTC a window begins, in seconds.
    #[cfg(feature = "redis")]
    pub(super) const fn start(self) -> u32 {
        self.start
    }

    #[cfg(feature = "redis")]
    pub(super) const fn is_month(self) -> bool {
        matches!(self.unit, Unit::Month)
    }

    /// Returns when the window ends that `time` is in. `second` is the number of ticks in a second.
    fn end_of_window(self, time: u64, second: u64) -> u64 {
        let start = u64::from(self.start) * second;
        // The window that was open when 1970 began.
        let Some(since) = time.checked_sub(start) else {
            return start;
        };
        let length = DAY.as_secs() * second;
        let day = since / length;
        let next = match self.unit {
            Unit::Day => day + 1,
            Unit::Month => first_day_of_next_month(day),
        };
        next.saturating_mul(length).saturating_add(start)
    }
}

/// Returns the first day of the month after the one that `day` is in. Days are counted from the first one of 1970.
fn first_day_of_next_month(day: u64) -> u64 {
    let mut first = 0;
    for year in 1970_u64.. {
        let is_leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
        for month in 1..=12 {
            first += match month {
                2 if is_leap => 29,
                2 => 28,
                4 | 6 | 9 | 11 => 30,
                _ => 31,
            };
            if first > day {
                return first;
            }
        }
    }
    u64::MAX
}

// === impl OpenWindow ===

impl OpenWindow {
    /// `second` is the number of ticks in a second.
    pub(super) fn new(calendar: Calendar, now: u64, second: u64) -> Self {
        Self {
            calendar,
            second,
            now,
            ends: calendar.end_of_window(now, second),
        }
    }

    /// Moves the time on. Returns whether a new window has begun.
    pub(super) fn advance(&mut self, elapsed: u64) -> bool {
        self.now = self.now.saturating_add(elapsed);
        let is_new = self.now >= self.ends;
        if is_new {
            self.ends = self.calendar.end_of_window(self.now, self.second);
        }
        is_new
    }

    /// Moves the time back, because the clock was set back. The window ends when it would have ended: otherwise it would
    /// begin again, with another whole amount. But if the clock was wrong by more than a window, the window is the one of
    /// the new time.
    #[cfg(all(test, feature = "redis"))]
    pub(super) fn step_back(&mut self, back: u64) {
        self.now = self.now.saturating_sub(back);
        if self.left() > 2 * self.calendar.period().as_secs() * self.second {
            self.ends = self.calendar.end_of_window(self.now, self.second);
        }
    }

    /// Whether the window had begun already `age` ticks ago.
    pub(super) fn has_lasted(&self, age: u64) -> bool {
        let then = self.now.saturating_sub(age);
        self.calendar.end_of_window(then, self.second) == self.ends
    }

    /// Returns the number of ticks until the window ends.
    pub(super) const fn left(&self) -> u64 {
        self.ends.saturating_sub(self.now)
    }

    /// Returns the number of ticks until `windows` more windows have ended after this one.
    pub(super) fn left_after(&self, windows: u64) -> u64 {
        let more = self.calendar.period().as_secs() * self.second;
        self.left().saturating_add(more.saturating_mul(windows))
    }
}

/// Returns `time` in nanoseconds since 1970; 0 if it is before that.
pub(super) fn nanos(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    /// Returns the nanoseconds since 1970 of a time that is given as seconds.
    const fn at(seconds: u64) -> u64 {
        seconds * SECOND
    }

    // The seconds are those of `date -u -d DATE +%s`.
    const NOON_OF_FEBRUARY_29_2028: u64 = at(1_835_438_400);
    const MARCH_1_2028: u64 = at(1_835_481_600);
    const LAST_SECOND_OF_2026: u64 = at(1_798_761_599);

    #[test]
    fn a_day_ends_at_midnight_utc_or_as_long_after_it_as_was_set() {
        let day = OpenWindow::new(Calendar::DAY, NOON_OF_FEBRUARY_29_2028, SECOND);
        assert_eq!(day.ends, MARCH_1_2028);
        let pacific = Calendar::DAY.starting_at(8 * 60 * 60).unwrap();
        assert_eq!(
            OpenWindow::new(pacific, MARCH_1_2028, SECOND).ends,
            MARCH_1_2028 + at(8 * 60 * 60)
        );
        assert_eq!(
            OpenWindow::new(pacific, MARCH_1_2028 + at(8 * 60 * 60), SECOND).ends,
            MARCH_1_2028 + at(32 * 60 * 60)
        );
        assert_eq!(Calendar::DAY.starting_at(24 * 60 * 60), None);
    }

    #[test]
    fn a_month_ends_with_its_last_day() {
        assert_eq!(
            OpenWindow::new(Calendar::MONTH, NOON_OF_FEBRUARY_29_2028, SECOND).ends,
            MARCH_1_2028
        );
        let mut december = OpenWindow::new(Calendar::MONTH, LAST_SECOND_OF_2026, SECOND);
        assert_eq!(december.left(), at(1));
        assert!(!december.advance(at(1) - 1));
        assert!(december.advance(1));
        assert_eq!(december.left(), at(31 * 24 * 60 * 60));
    }
}
