//! [`LevelHistory`]: the lowest level of a bucket since each of several earlier times.
//!
//! A provider reports what remained of a limit when the request arrived, and the report is here only when the response
//! is: a minute later, if the call takes so long. To be compared with what the bucket holds now, the report has to be
//! carried forward by what the bucket has gained and been charged since. The level of a bucket does that: see
//! [`Bucket::level`](super::bucket::Bucket::level).
//!
//! When between the two times the request has arrived is not known, nor which other calls the provider had counted by
//! then. So the report is compared with the *lowest* level in between. This may take a call for counted that was not,
//! and the next report corrects it. The other way round, a call could be charged twice, which nothing corrects.

/// The lowest level of one bucket since each of several earlier times. Old times are kept further apart than recent
/// ones, so the history is short, however many calls there are.
#[derive(Debug, Default)]
pub(super) struct LevelHistory {
    /// The time to which the history reaches back, in nanoseconds. `None` while it is empty.
    since: Option<u64>,
    /// Times in nanoseconds, each with the lowest level from the time before it in this list until its own time. Both
    /// rise from one entry to the next: an entry that a later, lower level follows is of no use.
    entries: Vec<(u64, i128)>,
}

/// The number of entries after which the older ones are merged.
const MAX_ENTRIES: usize = 128;
/// Entries are merged as long as the times that they cover are no longer than their age divided by this number.
const AGE_PER_GAP: u64 = 2;
/// Entries that are older than an hour, in nanoseconds, are dropped.
const MAX_AGE: u64 = 60 * 60 * 1_000_000_000;

impl LevelHistory {
    /// Records that the bucket has this `level` at the time `now`.
    pub(super) fn record(&mut self, now: u64, level: i128) {
        // Levels wrap around, so two of them are compared by their difference.
        self.since.get_or_insert(now);
        while self
            .entries
            .last()
            .is_some_and(|(_, last)| last.wrapping_sub(level) >= 0)
        {
            self.entries.pop();
        }
        if self.entries.len() >= MAX_ENTRIES {
            self.merge_old(now);
        }
        self.entries.push((now, level));
    }

    /// Returns the lowest level since `time`. `None` if the history does not reach back to that time.
    pub(super) fn lowest_since(&self, time: u64) -> Option<i128> {
        self.since.filter(|since| *since <= time)?;
        let at = self.entries.partition_point(|(at, _)| *at < time);
        self.entries.get(at).map(|(_, level)| *level)
    }

    /// Returns the time to which the history reaches back. `None` while it is empty.
    pub(super) const fn since(&self) -> Option<u64> {
        self.since
    }

    /// Replaces each level by what `convert` returns for it, which must keep their order.
    pub(super) fn convert(&mut self, convert: impl Fn(i128) -> i128) {
        self.entries.iter_mut().for_each(|(_, level)| *level = convert(*level));
    }

    fn merge_old(&mut self, now: u64) {
        let mut merged: Vec<(u64, i128)> = Vec::with_capacity(MAX_ENTRIES);
        for (at, level) in self.entries.drain(..) {
            let age = now.saturating_sub(at);
            if age > MAX_AGE {
                self.since = Some(at.saturating_add(1));
                continue;
            }
            let before = merged.len().checked_sub(2).map(|before| merged[before].0);
            let covered_since = before.or(self.since).unwrap_or(at);
            match merged.last_mut() {
                // The first of the merged entries has the lowest level, and the last one has the time.
                Some(last) if at.saturating_sub(covered_since) <= age / AGE_PER_GAP => last.0 = at,
                _ => merged.push((at, level)),
            }
        }
        self.entries = merged;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns a history of these levels, one for each time from 0 on.
    fn history(levels: &[i128]) -> LevelHistory {
        let mut history = LevelHistory::default();
        (0..).zip(levels).for_each(|(at, level)| history.record(at, *level));
        history
    }

    #[test]
    fn the_lowest_level_since_a_time_is_known() {
        let history = history(&[5, 3, 9, 4, 7, 7]);
        let lowest: Vec<_> = (0..7).map(|time| history.lowest_since(time)).collect();
        assert_eq!(lowest, [Some(3), Some(3), Some(4), Some(4), Some(7), Some(7), None]);
    }

    #[test]
    fn a_history_does_not_reach_back_before_its_first_record() {
        let mut history = LevelHistory::default();
        history.record(10, 1);
        assert_eq!((history.lowest_since(9), history.lowest_since(10)), (None, Some(1)));
    }

    #[test]
    fn levels_are_compared_across_the_end_of_their_range() {
        let history = history(&[i128::MAX, i128::MIN, i128::MIN + 1]);
        assert_eq!(history.lowest_since(0), Some(i128::MAX));
        assert_eq!(history.lowest_since(1), Some(i128::MIN));
    }

    #[test]
    fn a_long_history_stays_short_and_never_too_high() {
        const MS: u64 = 1_000_000;
        let mut rng = fastrand::Rng::with_seed(1);
        let (mut history, mut all) = (LevelHistory::default(), Vec::new());
        let (mut now, mut level) = (0, 0_i128);
        for _ in 0..if cfg!(miri) { 300 } else { 4_000 } {
            now += rng.u64(1..1_000 * MS);
            level += rng.i128(-3..9);
            history.record(now, level);
            all.push((now, level));
            assert!(history.entries.len() <= MAX_ENTRIES);
        }
        for (at, (time, _)) in all.iter().enumerate() {
            let exact = all[at..].iter().map(|(_, level)| *level).min();
            let lowest = history.lowest_since(*time);
            assert!(lowest.is_none() || lowest <= exact, "{time}");
            // What is reported as the lowest was the lowest since some time that is not much earlier.
            let age = now - time;
            let earlier = time.saturating_sub(age / AGE_PER_GAP);
            let bound = all
                .iter()
                .filter(|(at, _)| *at >= earlier)
                .map(|(_, level)| *level)
                .min();
            assert!(lowest.is_none() || lowest >= bound, "{time}: {lowest:?} {bound:?}");
            assert!(lowest.is_some() || age > MAX_AGE / 2, "{time}");
        }
    }
}
