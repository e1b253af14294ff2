//! Tests of the connection to the Redis store of shared limits, on real servers: how it is made, what it survives, who
//! shares it, and what is said of it when it cannot be made.

mod causes;
mod far;
mod returning;
mod sentinels;
mod sharing;
#[path = "../support/mod.rs"]
mod support;
#[cfg(feature = "redis-tls")]
mod tls;

use std::time::Duration;
use support::{ms, redis::Server};
use tokio::time::{Instant, timeout};
use tower_outbound::{
    Cost, Limits, Rate, RateLimiter,
    error::StoreProblem,
    rate::redis::{Builder, OnStoreLoss},
};

/// Returns a builder of a limiter that admits no call without the store.
fn closed() -> Builder {
    let limits = Limits::new().requests(Rate::per_second(1_000).burst(500));
    Builder::new(limits).on_store_loss(OnStoreLoss::Closed)
}

/// Waits until the store admits a call, and panics if that takes longer than `within`.
async fn admitted(limiter: &RateLimiter, within: Duration) -> Duration {
    let begun = Instant::now();
    match timeout(within, limiter.acquire(Cost::request())).await {
        Ok(result) => result.unwrap(),
        Err(_) => panic!("no call within {within:?}: {:?}", limiter.store_status()),
    }
    begun.elapsed()
}

/// Makes calls that are not admitted, until the store has failed in the given way.
async fn fails_by(limiter: &RateLimiter, problem: StoreProblem) {
    let begun = Instant::now();
    loop {
        let admitted = timeout(ms(100), limiter.acquire(Cost::request())).await;
        let status = limiter.store_status().unwrap();
        if admitted.is_err() && !status.is_up && status.problem == Some(problem) {
            return;
        }
        assert!(begun.elapsed() < ms(5_000), "not {problem:?}: {status:?}");
    }
}

/// Returns how many clients the server has, without the one that asks.
fn clients(server: &Server) -> usize {
    server.command(&["CLIENT", "LIST"]).matches("id=").count() - 1
}
