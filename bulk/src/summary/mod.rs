//! The summary that is printed at the end of a run.

pub(crate) mod counts;

use crate::{
    attempts::AttemptCounts,
    limits::{Bounds, Pace},
    recording::Recording,
    view::text::{grouped, span},
};
use counts::{Counts, Problems};
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
    pub(crate) attempts: AttemptCounts,
    pub(crate) recording: Recording,
    pub(crate) bounds: Bounds,
    pub(crate) elapsed: Duration,
    /// The number of requests that were not sent because the run was stopped. They are left for `--resume`.
    pub(crate) not_sent: u64,
}

/// A limit that was used to less than this, in percent, has not held up the run.
const MIN_BINDING: f64 = 50.0;

/// A row of the table of limits in the summary.
struct LimitRow {
    name: &'static str,
    limit: String,
    burst: String,
    achieved: f64,
    /// How far the limit was used, in percent; `None` if there was no limit.
    percent: Option<f64>,
    /// The part of `percent` that was charged for attempts in vain.
    in_vain: f64,
    /// What was used, if more was used than the assumed initial fill and the rate explain: the provider's bucket held more.
    full_bucket: Option<FullBucket>,
}

/// A run that used at once what a following limiter has found in the provider's bucket.
struct FullBucket {
    amount: u64,
    /// For how long the rate would need to add as much, in seconds.
    seconds: f64,
}

impl Summary {
    /// The number of submitted requests without a result line.
    pub(crate) const fn lost(&self) -> u64 {
        let expected = (self.survey.requests - self.survey.skipped).saturating_sub(self.not_sent);
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
            in_vain: 0.0,
            full_bucket: None,
        };
        let sending = counts.sending();
        let [requests_added, tokens_added] = self.recording.added();
        [
            LimitRow::of_rate(
                "requests/min",
                bounds.requests,
                counts.successes,
                self.attempts.requests_in_vain,
                sending,
                requests_added,
            ),
            LimitRow::of_rate(
                "tokens/min",
                bounds.tokens,
                counts.tokens,
                self.attempts.tokens_in_vain,
                sending,
                tokens_added,
            ),
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
            ("failed", counts.failed, "no answer, or one that is no success"),
            (
                "429s",
                counts.status_429,
                "attempts that the provider rejected for its limits",
            ),
            (
                "other",
                counts.other_failures,
                "other failed attempts: 503, no connection, no answer in a 200, …",
            ),
            (
                "cancelled",
                counts.cancelled,
                "cut off on the wire when the run was stopped",
            ),
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
        if let Some(cost) = counts.cost {
            write!(f, "  cost: {cost}")?;
            if counts.without_cost > 0 {
                let unknown = counts.without_cost;
                write!(f, ", without {unknown} requests whose answers report no usage")?;
            }
            writeln!(f)?;
        }
        self.write_problems(f)
    }

    /// The most frequent failures, each with the beginning of the first body.
    fn write_problems(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut problems: Vec<_> = self.counts.problems.iter().collect();
        problems.sort_by_key(|(_, problems)| std::cmp::Reverse(problems.count));
        for (problem, Problems { count, first_body }) in problems.into_iter().take(5) {
            writeln!(f, "  {count} x {problem}")?;
            if let Some(body) = first_body {
                writeln!(f, "      the first: {body}")?;
            }
        }
        Ok(())
    }

    /// What the run waited for, and for how long.
    fn write_waits(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut waits: Vec<_> = self.recording.waits().collect();
        waits.sort_by_key(|(_, time)| std::cmp::Reverse(*time));
        let texts: Vec<_> = waits
            .iter()
            .map(|(cause, time)| format!("{} {}", cause.name(), span(*time)))
            .collect();
        if texts.is_empty() {
            return Ok(());
        }
        writeln!(f, "\nwaited for: {}", texts.join(", "))
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
    /// `amount` was used by successful attempts, and `in_vain` was charged for the others. `added` is what the limit has
    /// added by the recording of the run.
    fn of_rate(
        name: &'static str,
        pace: Option<Pace>,
        amount: u64,
        in_vain: u64,
        sending: Duration,
        added: f64,
    ) -> Self {
        let charged = amount.saturating_add(in_vain);
        let minutes = sending.as_secs_f64() / 60.0;
        let Some(pace) = pace else {
            let achieved = if minutes > 0.0 { charged as f64 / minutes } else { 0.0 };
            return Self {
                name,
                limit: "off".into(),
                burst: String::new(),
                achieved,
                percent: None,
                in_vain: 0.0,
                full_bucket: None,
            };
        };
        // A limit that was lowered during the run has allowed more before. The recording ends with its last sample.
        let flowed = added.max(pace.per_minute as f64 * minutes);
        let mut used = used(pace.initial, flowed, charged);
        let full_bucket = (pace.follows && used > 1.0).then(|| FullBucket {
            amount: charged,
            seconds: 60.0 * charged as f64 / pace.per_minute as f64,
        });
        if full_bucket.is_some() {
            // What the bucket held at the start is not known, but all of it was used.
            used = 1.0;
        }
        Self {
            full_bucket,
            name,
            limit: pace.per_minute.to_string(),
            burst: pace.burst.to_string(),
            // The achieved rate is the sustained one: the burst at the start does not count.
            achieved: if minutes > 0.0 { used * flowed / minutes } else { 0.0 },
            percent: Some(100.0 * used),
            in_vain: 100.0 * used * in_vain as f64 / charged.max(1) as f64,
        }
    }
}

/// The fraction of the allowed amount that was admitted; 1 is all of it.
///
/// The allowed amount is what the provider's bucket holds at the start, and what flows into it until the last
/// admission. The cost of the last admission counts, because the call was admitted as soon as the bucket held that
/// cost.
fn used(initial: u64, flowed: f64, amount: u64) -> f64 {
    amount as f64 / (initial as f64 + flowed)
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write_counts(f)?;
        if self.counts.requests == 0 {
            return write!(f, "\nnothing was sent");
        }
        self.write_times(f)?;
        self.write_waits(f)?;

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
            ..
        } in &limits
        {
            let percent = percent.map_or(String::new(), |percent| format!("{percent:.2} %"));
            writeln!(f, "{name:<13} {limit:>9} {burst:>9} {achieved:>9.1} {percent:>9}")?;
        }
        let further: Vec<_> = self.bounds.further.rates().map(|rate| rate.to_string()).collect();
        if !further.is_empty() {
            writeln!(f, "further limits: {}", further.join(", "))?;
        }

        let percents = limits.iter().filter_map(|limit| Some((limit, limit.percent?)));
        let Some((binding, percent)) = percents.max_by(|(_, one), (_, other)| one.total_cmp(other)) else {
            return Ok(());
        };
        if percent < MIN_BINDING {
            let name = binding.name;
            write!(
                f,
                "\nno limit held the run up: {name}, the closest, was used to {percent:.2} %"
            )?;
        } else if let Some(FullBucket { amount, seconds }) = binding.full_bucket {
            let (unit, amount) = (binding.name.trim_end_matches("/min"), grouped(amount));
            write!(
                f,
                "\nbinding limit: {}, of which the provider had some left: {amount} {unit}, {seconds:.0} s of the rate, in {:.1} s",
                binding.name,
                self.counts.sending().as_secs_f64()
            )?;
        } else {
            write!(f, "\nbinding limit: {}, used to {percent:.2} %", binding.name)?;
        }
        if binding.in_vain > 0.0 {
            let AttemptCounts {
                requests_in_vain,
                tokens_in_vain,
                ..
            } = self.attempts;
            write!(
                f,
                ", of which {:.2} % was charged for attempts in vain ({} requests, {} tokens)",
                binding.in_vain,
                grouped(requests_in_vain),
                grouped(tokens_in_vain)
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_attempts_in_vain_were_charged_is_a_part_of_what_was_used() {
        let pace = Pace {
            per_minute: 600,
            burst: 10,
            initial: 10,
            follows: false,
        };
        let row = LimitRow::of_rate("requests/min", Some(pace), 99, 11, Duration::from_secs(10), 0.0);
        assert_eq!((row.percent, row.achieved), (Some(100.0), 600.0));
        assert_eq!(row.in_vain, 10.0);
        // The limit was twice as high during a part of the run.
        let row = LimitRow::of_rate("requests/min", Some(pace), 160, 0, Duration::from_secs(10), 150.0);
        assert_eq!((row.percent, row.achieved), (Some(100.0), 900.0));
    }

    #[test]
    fn what_a_full_bucket_of_the_provider_gave_is_told_as_time_of_the_rate() {
        let pace = |follows| Pace {
            per_minute: 600,
            burst: 600,
            initial: 10,
            follows,
        };
        let row = LimitRow::of_rate("requests/min", Some(pace(true)), 600, 0, Duration::from_secs(5), 0.0);
        let full = row.full_bucket.unwrap();
        assert_eq!((row.percent, full.amount, full.seconds), (Some(100.0), 600, 60.0));
        // Without following, more than the limit allows is shown as it is.
        let row = LimitRow::of_rate("requests/min", Some(pace(false)), 600, 0, Duration::from_secs(5), 0.0);
        assert!(row.full_bucket.is_none() && row.percent > Some(900.0));
    }

    #[test]
    fn a_limit_is_used_completely_when_the_bucket_ends_empty() {
        // The limit allows ten at once, and then one every 100 ms.
        assert_eq!(used(10, 0.0, 10), 1.0);
        assert_eq!(used(10, 100.0, 110), 1.0);
        assert_eq!(used(10, 100.0, 55), 0.5);
        // If the bucket is empty at the start, the first request is admitted after 100 ms.
        assert_eq!(used(0, 100.0, 100), 1.0);
    }
}
