//! A worker process: an executor whose limits are shared with all other workers through Redis.

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
use tower_outbound::{Call, Executor, Limits, Rate, Shutdown, client::Reqwest, rate::redis::Builder};

/// The number of tasks that each make one call after the other. The number is large, so that calls are always waiting
/// for the limits.
const CALLERS: usize = 500;
const REPORTS_EVERY: Duration = Duration::from_millis(250);

pub(crate) async fn run(args: &Args, number: u32) -> anyhow::Result<()> {
    let redis = args.redis.as_deref().context("a worker needs --redis")?;
    let url = args.provider.clone().context("a worker needs --provider")?;
    let limits = Limits::new().requests(Rate::per_second(args.requests_per_second).burst(args.burst));
    let limiter = Builder::new(limits)
        .members(args.workers.into())
        .connect(redis, "fleet")?;

    let client = reqwest::Client::builder().no_proxy().build()?;
    let executor = Executor::builder()
        .limiter(limiter.clone())
        .concurrency_limit(CALLERS)
        .build(Reqwest::new(client))?;
    executor.start()?;

    let (sent, rejected) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let until = Instant::now() + Duration::from_secs(args.seconds);
    let report = || {
        let store = limiter.store_status().expect("the limits are shared");
        let report = Report {
            sent: sent.load(Ordering::Relaxed),
            rejected: rejected.load(Ordering::Relaxed),
            is_up: store.is_up,
            members: store.members,
            admitted_without_store: store.admitted_without_store,
        };
        println!("{}", serde_json::to_string(&report).expect("numbers are JSON"));
    };

    for _ in 0..CALLERS {
        let (executor, url) = (executor.clone(), url.clone());
        let (sent, rejected) = (sent.clone(), rejected.clone());
        tokio::spawn(async move {
            loop {
                let request = Request::post(&url).body(format!("from worker {number}"))?;
                let Ok(call) = executor.submit(Call::from(request)).await else {
                    return anyhow::Ok(());
                };
                match call.await {
                    Ok(response) if response.status().is_success() => sent.fetch_add(1, Ordering::Relaxed),
                    Ok(_) => rejected.fetch_add(1, Ordering::Relaxed),
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
