//! A worker: an executor whose limits are shared with all others. This is all that it takes.

use crate::{args::Args, table::Report};
use anyhow::Context;
use http::Request;
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::time::{Instant, sleep_until};
use tower_outbound::{Call, Executor, Limits, Rate, Shutdown, client::Reqwest, rate::redis::SharedRateLimiter};

/// More than can be on their way at once.
const CALLS: usize = 500;
const REPORTS_EVERY: Duration = Duration::from_millis(250);

pub(crate) async fn run(args: &Args, number: u32) -> anyhow::Result<()> {
    let redis = args.redis.as_deref().context("a worker is told where Redis is")?;
    let url = args
        .provider
        .clone()
        .context("a worker is told where the provider is")?;
    let limits = Limits::new().requests(Rate::per_second(args.requests_per_second).burst(args.burst));
    let limiter = SharedRateLimiter::builder(limits)
        .members(args.workers.into())
        .connect(redis, "fleet")?;

    let client = reqwest::Client::builder().no_proxy().build()?;
    let executor = Executor::builder()
        .limiter(limiter.clone())
        .concurrency_limit(CALLS)
        .build(Reqwest::new(client))?;
    executor.start()?;

    let (sent, refused) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let until = Instant::now() + Duration::from_secs(args.seconds);
    let report = || {
        let store = limiter.store();
        let report = Report {
            sent: sent.load(Ordering::Relaxed),
            refused: refused.load(Ordering::Relaxed),
            is_up: store.is_up,
            members: store.members,
            degraded: store.degraded,
        };
        println!("{}", serde_json::to_string(&report).expect("numbers are JSON"));
    };

    for _ in 0..CALLS {
        let (executor, url) = (executor.clone(), url.clone());
        let (sent, refused) = (sent.clone(), refused.clone());
        tokio::spawn(async move {
            loop {
                let request = Request::post(&url).body(format!("from worker {number}"))?;
                let Ok(call) = executor.submit(Call::from(request)).await else {
                    return anyhow::Ok(());
                };
                match call.await {
                    Ok(response) if response.status().is_success() => sent.fetch_add(1, Ordering::Relaxed),
                    Ok(_) => refused.fetch_add(1, Ordering::Relaxed),
                    Err(_) => 0,
                };
            }
        });
    }
    let mut next = Instant::now();
    while next < until {
        next += REPORTS_EVERY;
        sleep_until(next).await;
        report();
    }
    executor.stop(Shutdown::Immediate).await;
    report();
    Ok(())
}
