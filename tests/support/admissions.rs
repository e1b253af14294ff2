//! Logs the calls that shared limiters admit, and replays them through an exact bucket.

#![allow(dead_code, unreachable_pub)]

use std::{
    fmt::Debug,
    sync::{Arc, Mutex},
};
use tracing::field::{Field, Visit};

/// A call that a member of a quota admitted.
#[derive(Clone, Copy, Debug, Default)]
pub struct Admitted {
    /// The time that was reserved for the call, in microseconds of the Redis server's clock.
    pub at_store: i64,
    /// The time when the call was admitted, in nanoseconds of the machine's monotonic clock.
    pub at: i64,
    pub requests: i64,
    pub tokens: i64,
}

/// Returns the time of the machine's monotonic clock, in nanoseconds.
pub fn now() -> i64 {
    let clock = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    clock.tv_sec * 1_000_000_000 + clock.tv_nsec
}

/// A tracing subscriber that records the limiter's trace events of admitted calls, and no other event.
#[derive(Clone, Default)]
pub struct Log(Arc<Mutex<Vec<Admitted>>>);

impl Log {
    /// Takes the calls out of the log, in the order in which they were admitted.
    pub fn take(&self) -> Vec<Admitted> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl tracing::Subscriber for Log {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        metadata.target().starts_with("tower_outbound::rate::redis") && *metadata.level() == tracing::Level::TRACE
    }

    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}

    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}

    fn event(&self, event: &tracing::Event<'_>) {
        let mut admitted = Admitted {
            at: now(),
            ..Admitted::default()
        };
        event.record(&mut admitted);
        self.0.lock().unwrap().push(admitted);
    }

    fn enter(&self, _: &tracing::span::Id) {}

    fn exit(&self, _: &tracing::span::Id) {}
}

impl Visit for Admitted {
    fn record_i64(&mut self, field: &Field, value: i64) {
        match field.name() {
            "at_store" => self.at_store = value,
            "requests" => self.requests = value,
            "tokens" => self.tokens = value,
            _ => {}
        }
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.record_i64(field, value as i64);
    }

    fn record_debug(&mut self, _: &Field, _: &dyn Debug) {}
}

/// Returns by how many requests or tokens the admitted calls exceed a bucket that counts exactly; 0 if they stay within
/// it. `times_and_costs` has the time of each call in ticks, and its cost. One second has `ticks` ticks.
pub fn excess(times_and_costs: impl Iterator<Item = (i64, i64)>, (rate, burst): (i64, i64), ticks: i128) -> f64 {
    let (mut level, mut last, mut worst) = (0_i128, None, 0_i128);
    for (at, cost) in times_and_costs {
        let elapsed = i128::from(at - last.unwrap_or(at));
        last = Some(at);
        level = (level - elapsed * i128::from(rate)).max(0) + i128::from(cost) * ticks;
        worst = worst.max(level - i128::from(burst) * ticks);
    }
    worst as f64 / ticks as f64
}
