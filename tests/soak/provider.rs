//! The limits of the server of the soak test: a bucket each for requests, input tokens and output tokens. Each response
//! reports what they hold, and a call that they do not hold is rejected.

use fastrand::Rng;
use std::{
    fmt::Write,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
};
use tokio::time::Instant;

/// The names of the limits in the headers.
const NAMES: [&str; 3] = ["requests", "input-tokens", "output-tokens"];
/// What a call costs on average.
const MEAN: [u64; 3] = [1, 41, 31];

#[derive(Debug)]
pub(crate) struct Provider {
    buckets: Mutex<[Bucket; 3]>,
    /// What the server has done with the calls of executors without a schedule, and with those that have one.
    counts: [Counts; 2],
}

#[derive(Debug, Default)]
struct Counts {
    arrived: AtomicU64,
    /// The calls that each bucket has rejected.
    rejected: [AtomicU64; 3],
}

#[derive(Debug)]
struct Bucket {
    /// The reported limit, in a minute.
    limit: u64,
    /// What the bucket gains in a second. Less than the limit tells, if others use the bucket, too.
    gain: f64,
    level: f64,
    filled: Instant,
}

impl Provider {
    pub(crate) fn new() -> Self {
        let provider = Self {
            buckets: Mutex::new(NAMES.map(|_| Bucket {
                limit: 0,
                gain: 0.0,
                level: 0.0,
                filled: Instant::now(),
            })),
            counts: Default::default(),
        };
        provider.change(&mut Rng::with_seed(0));
        provider
    }

    /// Changes all limits. Each bucket then holds what it gains in a few seconds, so that it is soon used up.
    pub(crate) fn change(&self, rng: &mut Rng) {
        for (bucket, mean) in self.buckets.lock().unwrap().iter_mut().zip(MEAN) {
            let rate = rng.u64(300..3_000) * mean;
            bucket.limit = 60 * rate;
            bucket.gain = rate as f64 * if rng.bool() { 1.0 } else { 0.5 };
            bucket.level = rate as f64 * rng.u32(15..30) as f64 / 10.0;
        }
    }

    /// Takes what a call costs from all buckets or from none. Returns whether they held it, and the headers that report
    /// what they hold.
    pub(crate) fn take(&self, (input, output): (u64, u64), is_scheduled: bool) -> (bool, String) {
        let mut buckets = self.buckets.lock().unwrap();
        buckets.iter_mut().for_each(Bucket::fill);
        let costs = [1, input, output].map(|cost| cost as f64);
        let lacking = buckets.iter().zip(costs).position(|(bucket, cost)| bucket.level < cost);
        let is_held = lacking.is_none();
        let mut headers = String::new();
        for ((bucket, cost), name) in buckets.iter_mut().zip(costs).zip(NAMES) {
            if is_held {
                bucket.level -= cost;
            }
            let (limit, level) = (bucket.limit, bucket.level as u64);
            let _ = write!(
                headers,
                "anthropic-ratelimit-{name}-limit: {limit}\r\nanthropic-ratelimit-{name}-remaining: {level}\r\n"
            );
        }
        let counts = &self.counts[usize::from(is_scheduled)];
        counts.arrived.fetch_add(1, Ordering::Relaxed);
        if let Some(lacking) = lacking {
            counts.rejected[lacking].fetch_add(1, Ordering::Relaxed);
        }
        (is_held, headers)
    }

    /// Returns how many calls have arrived and how many were rejected, of executors without a schedule and of those with one.
    pub(crate) fn counts(&self) -> [[u64; 2]; 2] {
        self.counts
            .each_ref()
            .map(|counts| [counts.arrived.load(Ordering::Relaxed), counts.rejected()])
    }

    /// Returns the number of calls that were rejected.
    pub(crate) fn rejected(&self) -> u64 {
        self.counts.iter().map(Counts::rejected).sum()
    }

    /// Returns a line for each kind of executor: how many calls have arrived, and how many each bucket has rejected.
    pub(crate) fn report(&self) -> String {
        let kinds = ["without", "with"].iter().zip(&self.counts);
        let line = |(kind, counts): (&&str, &Counts)| {
            let (arrived, rejected) = (counts.arrived.load(Ordering::Relaxed), counts.rejected());
            let share = 100.0 * rejected as f64 / arrived.max(1) as f64;
            let by = counts
                .rejected
                .iter()
                .zip(NAMES)
                .map(|(count, name)| format!("{name} {}", count.load(Ordering::Relaxed)));
            let by = by.collect::<Vec<_>>().join(", ");
            format!("{kind} a schedule: {arrived} calls have arrived, {rejected} were rejected ({share:.2} %): {by}")
        };
        kinds.map(line).collect::<Vec<_>>().join("\n")
    }
}

impl Counts {
    fn rejected(&self) -> u64 {
        self.rejected.iter().map(|count| count.load(Ordering::Relaxed)).sum()
    }
}

impl Bucket {
    fn fill(&mut self) {
        let now = Instant::now();
        let gained = self.gain * (now - self.filled).as_secs_f64();
        self.level = (self.level + gained).min(self.limit as f64);
        self.filled = now;
    }
}
