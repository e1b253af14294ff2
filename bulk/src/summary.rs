//! What came out of the run.

use crate::{
    limits::{Bounds, Pace},
    tally::Tally,
};
use std::{fmt, time::Duration};

/// What the file of requests holds.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Survey {
    pub(crate) requests: u64,
    pub(crate) malformed: u64,
    /// Completed by an earlier run.
    pub(crate) skipped: u64,
    /// The tokens of those that were not.
    pub(crate) tokens: u64,
    /// The tokens of the largest.
    pub(crate) largest: u64,
}

pub(crate) struct Summary {
    pub(crate) survey: Survey,
    pub(crate) tally: Tally,
    pub(crate) bounds: Bounds,
    pub(crate) elapsed: Duration,
    /// Left for a later run by Ctrl-C.
    pub(crate) not_sent: u64,
}

/// How one of the limits was used: a row of the table.
struct Use {
    name: &'static str,
    limit: String,
    burst: String,
    achieved: f64,
    /// `None`: there was no limit.
    percent: Option<f64>,
}

impl Summary {
    /// Requests without a result line that should have one.
    pub(crate) const fn lost(&self) -> u64 {
        let expected = self.survey.requests - self.survey.skipped - self.not_sent;
        expected.saturating_sub(self.tally.written())
    }

    fn uses(&self) -> [Use; 3] {
        let Self { bounds, tally, .. } = self;
        let concurrency = Use {
            name: "concurrency",
            limit: bounds.concurrency.to_string(),
            burst: String::new(),
            achieved: tally.in_flight(),
            percent: Some(100.0 * tally.in_flight() / bounds.concurrency as f64),
        };
        let sending = tally.sending();
        [
            Use::of_rate("requests/min", bounds.requests, tally.requests, sending),
            Use::of_rate("tokens/min", bounds.tokens, tally.tokens, sending),
            concurrency,
        ]
    }

    fn counts(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { survey, tally, .. } = self;
        let elapsed = self.elapsed.as_secs_f64();
        writeln!(
            f,
            "{} of {} requests done in {elapsed:.1} s",
            tally.completed, survey.requests
        )?;
        for (name, count, meaning) in [
            ("failed", tally.failed, "no answer, or one that is no success"),
            ("429s", tally.too_many, "answers that said so, and were asked for again"),
            ("other", tally.again, "attempts in vain: 503, no connection, …"),
            ("cancelled", tally.cancelled, "cut off by Ctrl-C"),
            ("skipped", survey.skipped, "completed by an earlier run"),
            ("not sent", self.not_sent, "left for --resume"),
            ("malformed", survey.malformed, "lines of the input that are no requests"),
            ("lost", self.lost(), "requests without a result line"),
        ] {
            writeln!(f, "  {name:<10} {count:>8}  {meaning}")?;
        }
        if tally.used > 0 {
            let off = 100.0 * (tally.estimated as f64 - tally.used as f64) / tally.used as f64;
            let (estimated, used) = (tally.estimated, tally.used);
            writeln!(f, "  tokens: {estimated} estimated, {used} used, {off:+.1} % settled")?;
        }
        let mut problems: Vec<_> = tally.problems.iter().collect();
        problems.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
        for (problem, count) in problems.into_iter().take(5) {
            writeln!(f, "  {count} x {problem}")?;
        }
        Ok(())
    }

    fn times(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Tally {
            in_queue,
            waiting,
            calling,
            ..
        } = &self.tally;
        writeln!(f, "\n{:<13} {:>9} {:>9} {:>9}", "ms", "p50", "p95", "p99")?;
        for (name, times) in [("in queue", in_queue), ("waiting", waiting), ("calling", calling)] {
            let [p50, p95, p99] = [0.5, 0.95, 0.99].map(|q| times.value_at_quantile(q) as f64 / 1_000.0);
            writeln!(f, "{name:<13} {p50:>9.1} {p95:>9.1} {p99:>9.1}")?;
        }
        Ok(())
    }
}

impl Use {
    fn of_rate(name: &'static str, pace: Option<Pace>, amount: u64, sending: Duration) -> Self {
        let Some(pace) = pace else {
            let minutes = sending.as_secs_f64() / 60.0;
            let achieved = if minutes > 0.0 { amount as f64 / minutes } else { 0.0 };
            return Self {
                name,
                limit: "off".into(),
                burst: String::new(),
                achieved,
                percent: None,
            };
        };
        let used = used(pace, amount, sending);
        Self {
            name,
            limit: pace.per_minute.to_string(),
            burst: pace.burst.to_string(),
            // What was kept up: the burst at the start does not count as speed.
            achieved: used * pace.per_minute as f64,
            percent: Some(100.0 * used),
        }
    }
}

/// Which part of what a rate allowed was admitted: 1 is all.
///
/// Allowed is what the provider's bucket held at the start, and what has flowed into it until the last admission. The
/// last one's own cost counts, because it could only be admitted when it was there.
fn used(pace: Pace, amount: u64, sending: Duration) -> f64 {
    amount as f64 / (pace.initial as f64 + pace.per_minute as f64 * sending.as_secs_f64() / 60.0)
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.counts(f)?;
        if self.tally.requests == 0 {
            return write!(f, "\nnothing was sent");
        }
        self.times(f)?;

        writeln!(
            f,
            "\n{:<13} {:>9} {:>9} {:>9} {:>9}",
            "", "limit", "burst", "achieved", "used"
        )?;
        let uses = self.uses();
        for Use {
            name,
            limit,
            burst,
            achieved,
            percent,
        } in &uses
        {
            let percent = percent.map_or(String::new(), |percent| format!("{percent:.2} %"));
            writeln!(f, "{name:<13} {limit:>9} {burst:>9} {achieved:>9.1} {percent:>9}")?;
        }

        let percents = uses.iter().filter_map(|limit| Some((limit.name, limit.percent?)));
        let binding = percents.max_by(|(_, one), (_, other)| one.total_cmp(other));
        let (name, percent) = binding.unwrap_or_default();
        write!(f, "\nbinding limit: {name}, used to {percent:.2} %")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_used_to_the_full_when_the_bucket_ends_empty() {
        let pace = Pace {
            per_minute: 600,
            burst: 10,
            initial: 10,
        };
        // Ten at once, then one every 100 ms.
        assert_eq!(used(pace, 10, Duration::ZERO), 1.0);
        assert_eq!(used(pace, 110, Duration::from_secs(10)), 1.0);
        assert_eq!(used(pace, 55, Duration::from_secs(10)), 0.5);
        // The first after 100 ms.
        assert_eq!(used(Pace { initial: 0, ..pace }, 100, Duration::from_secs(10)), 1.0);
    }
}
