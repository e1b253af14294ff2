//! Progress as lines, for a run whose standard error is no terminal: often at first, then less and less often.

use super::{
    state::Snapshot,
    text::{grouped, span},
};
use std::{fmt::Write as _, time::Duration};

/// When the next line is due.
#[derive(Debug, Default)]
pub(crate) struct Schedule {
    /// The time of the last line, since the start.
    last: Duration,
}

impl Schedule {
    /// Returns whether a line is due, and counts it as shown.
    pub(crate) fn is_due(&mut self, elapsed: Duration) -> bool {
        let is_due = elapsed >= next_after(self.last);
        if is_due {
            self.last = elapsed;
        }
        is_due
    }
}

/// Returns the time of the first line after the time `last`: 1, 2, 5, 10, 20, 30 and 60 seconds after the start, then
/// every minute, after an hour every five minutes, and after six hours every quarter of an hour. Ten hours are 141 lines.
fn next_after(last: Duration) -> Duration {
    let last = last.as_secs();
    let first = [1, 2, 5, 10, 20, 30, 60].into_iter().find(|seconds| *seconds > last);
    let every = match last {
        0..3_600 => 60,
        3_600..21_600 => 300,
        _ => 900,
    };
    Duration::from_secs(first.unwrap_or_else(|| (last / every + 1) * every))
}

/// Returns the state in one line.
pub(crate) fn line(snapshot: &Snapshot) -> String {
    let Snapshot { ended, .. } = snapshot;
    let elapsed = snapshot.elapsed.as_secs_f64();
    let mut line = grouped(ended.requests());
    // Writing to a string cannot fail.
    let _ = match snapshot.total {
        Some(total) => write!(line, " of {} requests", grouped(total)),
        None => write!(line, " requests"),
    };
    if ended.failed > 0 {
        let _ = write!(line, " ({} failed)", grouped(ended.failed));
    }
    let rate = if elapsed > 0.0 {
        ended.requests() as f64 / elapsed
    } else {
        0.0
    };
    let _ = write!(
        line,
        " in {}, {rate:.1}/s, {} in flight",
        span(snapshot.elapsed),
        snapshot.in_flight
    );
    let waiting = snapshot.queued;
    if waiting > 0 {
        let _ = write!(line, ", {} waiting for {}", grouped(waiting), snapshot.waits_for.name());
    }
    if snapshot.waiting_to_retry > 0 {
        let _ = write!(line, ", {} to retry", grouped(snapshot.waiting_to_retry));
    }
    if snapshot.status_429 > 0 {
        let _ = write!(line, ", {} x 429", grouped(snapshot.status_429));
    }
    let _ = write!(line, ", {} tokens", grouped(ended.tokens));
    if let Some(cost) = ended.cost {
        let _ = write!(line, ", cost {cost}");
    }
    if let Some(left) = snapshot.time_left {
        let _ = write!(line, ", {} left", span(left.time));
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown_within(hours: u64) -> Vec<u64> {
        let mut schedule = Schedule::default();
        let ticks = 0..=hours * 36_000;
        ticks
            .filter(|tick| schedule.is_due(Duration::from_millis(100 * tick)))
            .map(|tick| tick / 10)
            .collect()
    }

    #[test]
    fn lines_come_less_and_less_often() {
        let shown = shown_within(10);
        assert_eq!(shown[..9], [1, 2, 5, 10, 20, 30, 60, 120, 180]);
        assert_eq!(shown[65..68], [3_600, 3_900, 4_200]);
        assert_eq!(shown.len(), 142);
    }

    #[test]
    fn a_late_line_does_not_move_the_next_ones() {
        let mut schedule = Schedule::default();
        assert!(schedule.is_due(Duration::from_secs(100)));
        assert!(!schedule.is_due(Duration::from_secs(119)));
        assert!(schedule.is_due(Duration::from_secs(120)));
    }

    #[test]
    fn a_line_has_all_that_changes() {
        assert_eq!(
            line(&crate::view::sample()),
            "1,234 of 5,000 requests (3 failed) in 1 min 12 s, 17.1/s, 7 in flight, 100 waiting for tokens per minute, \
             2 to retry, 12 x 429, 345,678 tokens, cost 1.2346, 3 min 40 s left"
        );
    }
}
