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

/// How long a changed limit has to last until it is told.
const LASTING: Duration = Duration::from_secs(3);

/// A limit as it was told last.
#[derive(Debug)]
struct ToldLimit {
    cause: Cause,
    told: u64,
    /// Since when the limit differs from what was told, since the start of the run.
    differs_since: Option<Duration>,
}

/// What was told last.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    /// Whether there is a pause that is not short.
    is_paused: bool,
    limits: Vec<ToldLimit>,
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
        lines.extend(self.limits(snapshot));
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

    /// Limits that have changed, and have stayed so for a while: a limit that adapts may be lowered for a second only.
    fn limits(&mut self, snapshot: &Snapshot) -> Option<String> {
        let mut changed = Vec::new();
        for level in &snapshot.budgets {
            let now = level.pace.per_minute;
            let Some(limit) = self.limits.iter_mut().find(|limit| limit.cause == level.cause) else {
                self.limits.push(ToldLimit {
                    cause: level.cause,
                    told: now,
                    differs_since: None,
                });
                continue;
            };
            if now == limit.told || (now.abs_diff(limit.told) as f64) < TOLD_CHANGE * limit.told as f64 {
                limit.differs_since = None;
                continue;
            }
            let since = *limit.differs_since.get_or_insert(snapshot.elapsed);
            if snapshot.elapsed.saturating_sub(since) >= LASTING {
                let (before, name) = (grouped(limit.told), limit.cause.name());
                changed.push(format!("{} instead of {before} {name}", grouped(now)));
                limit.told = now;
                limit.differs_since = None;
            }
        }
        let changed = changed.join(", ");
        (!changed.is_empty()).then(|| format!("the limits have changed, as the provider answers: {changed}"))
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
    fn a_limit_is_told_when_it_has_changed_by_a_tenth_for_a_while() {
        let mut changes = quiet();
        let mut snapshot = sample();
        let mut after = |per_minute, millis| {
            snapshot.budgets[1].pace.per_minute = per_minute;
            snapshot.elapsed += Duration::from_millis(millis);
            changes.find(&snapshot)
        };
        assert!(after(230_000, 9_000).is_empty());
        // Lowered for two seconds.
        assert!(after(200_000, 0).is_empty());
        assert!(after(200_000, 2_000).is_empty());
        assert!(after(240_000, 2_000).is_empty());
        // Lowered for good.
        assert!(after(60_000, 0).is_empty());
        assert!(after(60_000, 2_999).is_empty());
        let line = "the limits have changed, as the provider answers: 60,000 instead of 240,000 tokens per minute";
        assert_eq!(after(60_000, 1), [line]);
        assert!(after(60_000, 9_000).is_empty());
    }
}
