//! Tests of the promises of `KeyedRateLimiter`, on Tokio's paused clock except for those of several threads.

#[path = "../support/mod.rs"]
mod support;

mod cap;
mod equality;
mod errors;
mod limits;
mod memory;
mod threads;
mod waiting;

use std::time::Duration;
use tower_outbound::{Cost, KeyedRateLimiter, Limits, Rate};

const ONE: Cost = Cost::request();

fn requests(rate: Rate) -> KeyedRateLimiter<u64> {
    KeyedRateLimiter::new(Limits::new().requests(rate)).unwrap()
}

const fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}
