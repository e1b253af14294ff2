//! The summary that is printed at the end of a run.

pub(crate) mod counts;

use crate::limits::{Bounds, Pace};
use counts::Counts;
use std::{fmt, time::Duration};

/// What `survey` found in the input.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Survey {
    pub(crate) requests: u64,
    pub(crate) malformed: u64,
    /// The number of requests that an earlier run completed.
    pub(crate) skipped: u64,
    /// The tokens of all requests that were not skipped.
    pub(crate) tokens: u64,
    /// The tokens of the largest request.
    pub(crate) largest: u64,
}

pub(crate) struct Summary {
    pub(crate) survey: Survey,
    pub(crate) counts: Counts,
    pub(crate) bounds: Bounds,
    pub(crate) elapsed: Duration,
    /// The number of requests that were not submitted because of Ctrl-C.
    pub(crate) not_sent: u64,
}

/// A row of the table of limits in the summary.
struct LimitRow {
    name: &'static str,
    limit: String,
    burst: String,
    achieved: f64,
    /// How far the limit was used, in percent; `None` if there was no limit.
    percent: Option<f64>,
}

impl Summary {
    /// The number of submitted requests without a result line.
    pub(crate) const fn lost(&self) -> u64 {
        let expected = self.survey.requests - self.survey.skipped - self.not_sent;
        expected.saturating_sub(self.counts.written())
    }

    fn limits(&self) -> [LimitRow; 3] {
        let Self { bounds, counts, .. } = self;
        let concurrency = LimitRow {
            name: "concurrency",
            limit: bounds.concurrency.to_string(),
            burst: String::new(),
            achieved: counts.in_flight(),
            percent: Some(100.0 * counts.in_flight() / bounds.concurrency as f64),
        };
        let sending = counts.sending();
        [
            LimitRow::of_rate("requests/min", bounds.requests, counts.requests, sending),
            LimitRow::of_rate("tokens/min", bounds.tokens, counts.tokens, sending),
            concurrency,
        ]
    }

    fn write_counts(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { survey, counts, .. } = self;
        let elapsed = self.elapsed.as_secs_f64();
        writeln!(
            f,
            "{} of {} requests done in {elapsed:.1} s",
            counts.completed, survey.requests
        )?;
        for (name, count, meaning) in [
            ("failed", counts.failed, "no response, or one without a 2xx status"),
            (
                "429s",
                counts.status_429,
                "attempts that the provider rejected for its limits",
            ),
            (
                "other",
                counts.other_failures,
                "other failed attempts: 503, no connection, …",
            ),
            ("cancelled", counts.cancelled, "ended by Ctrl-C"),
            ("skipped", survey.skipped, "completed by an earlier run"),
            ("not sent", self.not_sent, "left for --resume"),
            (
                "malformed",
                survey.malformed,
                "lines of the input that are not requests",
            ),
            ("lost", self.lost(), "requests without a result line"),
        ] {
            writeln!(f, "  {name:<10} {count:>8}  {meaning}")?;
        }
        if counts.used > 0 {
            let off = 100.0 * (counts.estimated as f64 - counts.used as f64) / counts.used as f64;
            let (estimated, used) = (counts.estimated, counts.used);
            writeln!(
                f,
                "  tokens: {estimated} estimated, {used} used; the difference of {off:+.1} % was settled"
            )?;
        }
        let mut problems: Vec<_> = counts.problems.iter().collect();
        problems.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
        for (problem, count) in problems.into_iter().take(5) {
            writeln!(f, "  {count} x {problem}")?;
        }
        Ok(())
    }

    fn write_times(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Counts {
            in_queue,
            waiting,
            calling,
            ..
        } = &self.counts;
        writeln!(f, "\n{:<13} {:>9} {:>9} {:>9}", "time in ms", "p50", "p95", "p99")?;
        for (name, times) in [("in queue", in_queue), ("waiting", waiting), ("calling", calling)] {
            let [p50, p95, p99] = [0.5, 0.95, 0.99].map(|q| times.value_at_quantile(q) as f64 / 1_000.0);
            writeln!(f, "{name:<13} {p50:>9.1} {p95:>9.1} {p99:>9.1}")?;
        }
        Ok(())
    }
}

impl LimitRow {
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
            // The achieved rate is the sustained one: the burst at the start does not count.
            achieved: used * pace.per_minute as f64,
            percent: Some(100.0 * used),
        }
    }
}

/// The fraction of the allowed amount that was admitted; 1 is all of it.
///
/// The allowed amount is what the provider's bucket holds at the start, and what flows into it until the last
/// admission. The cost of the last admission counts, because the call was admitted as soon as the bucket held that
/// cost.
fn used(pace: Pace, amount: u64, sending: Duration) -> f64 {
    amount as f64 / (pace.initial as f64 + pace.per_minute as f64 * sending.as_secs_f64() / 60.0)
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write_counts(f)?;
        if self.counts.requests == 0 {
            return write!(f, "\nnothing was sent");
        }
        self.write_times(f)?;

        writeln!(
            f,
            "\n{:<13} {:>9} {:>9} {:>9} {:>9}",
            "", "limit", "burst", "achieved", "used"
        )?;
        let limits = self.limits();
        for LimitRow {
            name,
            limit,
            burst,
            achieved,
            percent,
        } in &limits
        {
            let percent = percent.map_or(String::new(), |percent| format!("{percent:.2} %"));
            writeln!(f, "{name:<13} {limit:>9} {burst:>9} {achieved:>9.1} {percent:>9}")?;
        }

        let percents = limits.iter().filter_map(|limit| Some((limit.name, limit.percent?)));
        let binding = percents.max_by(|(_, one), (_, other)| one.total_cmp(other));
        let (name, percent) = binding.unwrap_or_default();
        write!(f, "\nbinding limit: {name}, used to {percent:.2} %")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_used_completely_when_the_bucket_ends_empty() {
        let pace = Pace {
            per_minute: 600,
            burst: 10,
            initial: 10,
        };
        // The limit allows ten at once, and then one every 100 ms.
        assert_eq!(used(pace, 10, Duration::ZERO), 1.0);
        assert_eq!(used(pace, 110, Duration::from_secs(10)), 1.0);
        assert_eq!(used(pace, 55, Duration::from_secs(10)), 0.5);
        // If the bucket is empty at the start, the first request is admitted after 100 ms.
        assert_eq!(used(Pace { initial: 0, ..pace }, 100, Duration::from_secs(10)), 1.0);
    }
}
