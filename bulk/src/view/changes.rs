//! [`Changes`]: finds what has happened between two snapshots that a reader of lines should be told at once.

use super::{
    state::{Cause, PauseView, Snapshot},
    text::{grouped, span, time_of_day},
};
use std::{mem, time::Duration};

/// 429s that are further apart than this belong to different episodes.
const EPISODE: Duration = Duration::from_secs(60);

/// The end of a pause that is shorter than this is not told, as its beginning is not.
const SHORT_PAUSE: Duration = Duration::from_secs(2);

/// The smallest change of a limit that is told: a tenth. A limit that adapts to the provider's 429s changes every second
/// by less.
const TOLD_CHANGE: f64 = 0.1;

/// What was told last.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    /// Whether there is a pause that is not short.
    is_paused: bool,
    limits: Vec<(Cause, u64)>,
    status_429: u64,
    /// When the last 429 was seen, since the start.
    last_429: Option<Duration>,
}

impl Changes {
    /// Returns a line for each change since the last call.
    pub(crate) fn find(&mut self, snapshot: &Snapshot) -> Vec<String> {
        let mut lines = Vec::new();
        lines.extend(self.pause(snapshot));
        lines.extend(self.throttling(snapshot));
        self.limits(snapshot, &mut lines);
        lines
    }

    /// The end of a pause. Its beginning is told by the code that reads the response which asks for it.
    fn pause(&mut self, snapshot: &Snapshot) -> Option<String> {
        let Some(pause) = &snapshot.pause else {
            return mem::take(&mut self.is_paused).then(|| "the pause is over".to_owned());
        };
        let left = pause.until.duration_since(snapshot.now).unwrap_or_default();
        self.is_paused |= left >= SHORT_PAUSE;
        None
    }

    fn throttling(&mut self, snapshot: &Snapshot) -> Option<String> {
        let new = snapshot.status_429.saturating_sub(self.status_429);
        if new == 0 {
            return None;
        }
        self.status_429 = snapshot.status_429;
        let last = self.last_429.replace(snapshot.elapsed);
        // The first 429 is told with its body, as the first failure of its kind.
        let is_episode = last.is_some_and(|last| snapshot.elapsed.saturating_sub(last) > EPISODE);
        let count = grouped(snapshot.status_429);
        is_episode.then(|| format!("the provider rejects requests for its limits: {count} x 429 so far"))
    }

    fn limits(&mut self, snapshot: &Snapshot, lines: &mut Vec<String>) {
        for level in &snapshot.budgets {
            let now = level.pace.per_minute;
            let Some((_, told)) = self.limits.iter_mut().find(|(cause, _)| *cause == level.cause) else {
                self.limits.push((level.cause, now));
                continue;
            };
            if now.abs_diff(*told) as f64 >= TOLD_CHANGE * *told as f64 && now != *told {
                let (before, name) = (grouped(*told), level.cause.name());
                lines.push(format!(
                    "the limit of {name} is now {} instead of {before}, as the provider answers",
                    grouped(now)
                ));
                *told = now;
            }
        }
    }
}

/// Returns `paused until 14:03:20 UTC (75 s) by …`.
pub(crate) fn pause_line(pause: &PauseView, snapshot: &Snapshot) -> String {
    let left = pause.until.duration_since(snapshot.now).unwrap_or_default();
    let until = time_of_day(pause.until, snapshot.now);
    format!("paused until {until} ({}) by {}", span(left), pause.by)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::sample;

    fn paused(seconds: u64) -> Snapshot {
        let mut snapshot = sample();
        snapshot.pause = Some(PauseView {
            until: snapshot.now + Duration::from_secs(seconds),
            by: "the provider: 429 Too Many Requests, Retry-After 75".to_owned(),
        });
        snapshot
    }

    fn quiet() -> Changes {
        let mut changes = Changes::default();
        changes.find(&sample());
        changes
    }

    #[test]
    fn the_end_of_a_pause_is_told_once() {
        let mut changes = quiet();
        assert!(changes.find(&paused(75)).is_empty());
        assert!(changes.find(&paused(1)).is_empty());
        assert_eq!(changes.find(&sample()), ["the pause is over"]);
        assert!(changes.find(&paused(1)).is_empty());
        assert!(changes.find(&sample()).is_empty());
    }

    #[test]
    fn many_429s_at_a_time_are_one_episode() {
        let mut changes = quiet();
        let mut snapshot = sample();
        snapshot.elapsed += Duration::from_secs(1);
        snapshot.status_429 += 86;
        assert!(changes.find(&snapshot).is_empty());
        snapshot.elapsed += Duration::from_secs(61);
        snapshot.status_429 += 1;
        assert_eq!(
            changes.find(&snapshot),
            ["the provider rejects requests for its limits: 99 x 429 so far"]
        );
    }

    #[test]
    fn a_limit_is_told_when_it_has_changed_by_a_tenth() {
        let mut changes = quiet();
        let mut snapshot = sample();
        snapshot.budgets[1].pace.per_minute = 230_000;
        assert!(changes.find(&snapshot).is_empty());
        snapshot.budgets[1].pace.per_minute = 60_000;
        assert_eq!(
            changes.find(&snapshot),
            ["the limit of tokens per minute is now 60,000 instead of 240,000, as the provider answers"]
        );
        assert!(changes.find(&snapshot).is_empty());
    }
}
