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
    /// The number of calls that were rejected.
    pub(crate) rejected: AtomicU64,
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
            rejected: AtomicU64::new(0),
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
    pub(crate) fn take(&self, (input, output): (u64, u64)) -> (bool, String) {
        let mut buckets = self.buckets.lock().unwrap();
        buckets.iter_mut().for_each(Bucket::fill);
        let costs = [1, input, output].map(|cost| cost as f64);
        let is_held = buckets.iter().zip(costs).all(|(bucket, cost)| bucket.level >= cost);
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
        if !is_held {
            self.rejected.fetch_add(1, Ordering::Relaxed);
        }
        (is_held, headers)
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
