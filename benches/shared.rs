//! Measures shared limits on a real `redis-server`, over one connection on one thread: the latency of an `acquire`
//! beside that of a bare `PING`, and the throughput.
//!
//! `cargo bench -p tower-outbound-benches --features redis --bench shared` takes about a minute, and less with `--
//! --quick`. It needs `redis-server`. With `STATS=1` in the environment, it prints the server's counts of commands at
//! the end.

use redis::aio::{ConnectionManager, ConnectionManagerConfig};
use std::time::Duration;
use tokio::{task::JoinSet, time::Instant};
use tower_outbound::{Cost, Limits, Rate, RateLimiter, rate};

mod common;
#[path = "../tests/support/redis.rs"]
mod server;

use common::median;

const ROUNDS: usize = 11;

fn main() {
    if std::env::args().any(|argument| argument == "--list") {
        return;
    }
    let quick = std::env::args().any(|argument| argument == "--quick");
    let rounds = if quick { 3 } else { ROUNDS };
    let server = server::Server::start();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(measure(&server, rounds, if quick { 200 } else { 1_000 }));
    if std::env::var("STATS").is_ok() {
        println!("{}", server.command(&["INFO", "commandstats"]));
    }
}

async fn measure(server: &server::Server, rounds: usize, millis: u64) {
    let span = Duration::from_millis(millis);
    let client = redis::Client::open(server.url()).unwrap();
    let mut pings = ConnectionManager::new_with_config(client, ConnectionManagerConfig::new())
        .await
        .unwrap();
    // The limits are so high that no call ever waits for them, so that only the round trip to the server is measured.
    let limits = Limits::new()
        .requests(Rate::per_second(100_000_000).burst(10_000_000))
        .tokens(Rate::per_second(1_000_000_000).burst(1_000_000_000));
    let limiter = rate::redis::connect(&server.url(), "bench", limits).unwrap();
    limiter.acquire(Cost::tokens(10)).await.unwrap();

    let (mut pings_p50, mut acquires_p50, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    let (mut with_64, mut with_1000) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        // Each round measures both `PING` and `acquire`, so that other load on the machine affects both.
        let ping = median(
            latencies(span, async || {
                let _: String = redis::cmd("PING").query_async(&mut pings).await.unwrap();
            })
            .await,
        );
        let acquire = median(latencies(span, async || limiter.acquire(Cost::tokens(10)).await.unwrap()).await);
        pings_p50.push(ping);
        acquires_p50.push(acquire);
        ratios.push(acquire / ping);
        with_64.push(throughput(&limiter, 64, span).await);
        with_1000.push(throughput(&limiter, 1_000, span).await);
    }
    println!("{:<44}{:>12}{:>12}", "", "median", "bar");
    println!("{:<44}{:>9.1} us", "PING, 1 in flight, p50", median(pings_p50) * 1e6);
    println!(
        "{:<44}{:>9.1} us",
        "acquire, 1 in flight, p50",
        median(acquires_p50) * 1e6
    );
    row("acquire / PING", median(ratios), 1.5, false);
    row("acquires/s, 64 in flight", median(with_64), 60_000.0, true);
    row("acquires/s, 1,000 waiting", median(with_1000), 300_000.0, true);
}

fn row(name: &str, figure: f64, bar: f64, more_is_better: bool) {
    let verdict = if (figure >= bar) == more_is_better {
        "ok"
    } else {
        "not reached"
    };
    let digits = if bar < 10.0 { 2 } else { 0 };
    println!("{name:<44}{figure:>12.digits$}{bar:>12.digits$}  {verdict}");
}

/// Makes calls one after the other for half of `span`, and returns their durations in seconds.
async fn latencies(span: Duration, mut call: impl AsyncFnMut()) -> Vec<f64> {
    let begun = Instant::now();
    let mut times = Vec::new();
    while begun.elapsed() < span / 2 {
        let at = Instant::now();
        call().await;
        times.push(at.elapsed().as_secs_f64());
    }
    times
}

/// Returns how many acquires per second are admitted when this number of callers each make one acquire after the other.
async fn throughput(limiter: &RateLimiter, callers: usize, span: Duration) -> f64 {
    let begun = Instant::now();
    let mut tasks = JoinSet::new();
    for _ in 0..callers {
        let limiter = limiter.clone();
        tasks.spawn(async move {
            let mut calls = 0_u64;
            while begun.elapsed() < span {
                limiter.acquire(Cost::tokens(10)).await.unwrap();
                calls += 1;
            }
            calls
        });
    }
    let calls: u64 = tasks.join_all().await.into_iter().sum();
    calls as f64 / begun.elapsed().as_secs_f64()
}
