//! A fleet of processes that share one provider account and its quota through Redis.
//!
//! The program starts a provider that answers requests above the quota with 429, a `redis-server`, and four workers. A
//! worker is this program again, in a separate process. It sends as fast as its limiter allows. In the middle of the
//! run Redis is killed (`kill -9`), and two seconds later it is started again, empty.
//!
//! What to watch: the sum of all workers stays at the limit, their shares are even, and there is no 429.
//!
//! Run it with `cargo run --release -p tower-outbound-fleet`; `-- --help` shows how to change the numbers. The program
//! needs `redis-server`.

mod args;
mod provider;
mod server;
mod table;
mod worker;

use anyhow::{Context, ensure};
use args::Args;
use clap::Parser;
use provider::Provider;
use server::RedisServer;
use std::{process::Stdio, time::Duration};
use table::{Report, Table};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::Command,
    sync::mpsc,
    time::{Instant, sleep, sleep_until},
};

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    match &args.worker {
        Some(number) => worker::run(&args, *number).await,
        None => run(&args).await,
    }
}

async fn run(args: &Args) -> anyhow::Result<()> {
    let mut redis = RedisServer::start().await?;
    let provider = Provider::start(args.requests_per_second, args.burst).await?;
    println!(
        "{} workers share a quota of {} requests per second with a burst of {}. Redis: {}, provider: {}",
        args.workers,
        args.requests_per_second,
        args.burst,
        redis.url(),
        provider.url()
    );

    let (reports, mut received) = mpsc::unbounded_channel();
    let mut workers = Vec::new();
    for number in 0..args.workers {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["--worker", &number.to_string()])
            .args(["--redis", &redis.url(), "--provider", &provider.url()])
            .args(["--seconds", &args.seconds.to_string()])
            .args(["--requests-per-second", &args.requests_per_second.to_string()])
            .args(["--burst", &args.burst.to_string()])
            .args(["--workers", &args.workers.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("cannot start a worker")?;
        let mut lines = BufReader::new(
            child
                .stdout
                .take()
                .context("the standard output of a worker is not piped")?,
        )
        .lines();
        let reports = reports.clone();
        tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                if let Ok(report) = serde_json::from_str::<Report>(&line) {
                    let _ = reports.send((number, report));
                }
            }
        });
        workers.push(child);
    }
    drop(reports);

    let mut table = Table::new(args);
    let begun = Instant::now();
    let kill_at = begun + Duration::from_secs(args.seconds) / 2;
    let fault = async {
        if args.no_kill {
            return Ok(None);
        }
        sleep_until(kill_at).await;
        redis.kill().await?;
        sleep(Duration::from_secs(2)).await;
        redis.restart().await?;
        anyhow::Ok(Some(kill_at - begun))
    };
    tokio::pin!(fault);
    let mut killed = None;
    let mut is_fault_over = false;
    loop {
        tokio::select! {
            received = received.recv() => match received {
                Some((number, report)) => table.update(number, report),
                None => break,
            },
            done = &mut fault, if !is_fault_over => {
                killed = done?;
                is_fault_over = true;
            }
        }
        table.draw(
            &provider,
            begun.elapsed(),
            !args.no_kill && !is_fault_over && Instant::now() >= kill_at,
        );
    }
    let mut failed = 0;
    for mut worker in workers {
        failed += usize::from(!worker.wait().await?.success());
    }
    let summary = table.finish(&provider, killed);
    println!("{summary}");
    ensure!(failed == 0, "{failed} workers failed");
    ensure!(
        provider.rejected() == 0,
        "{} requests were answered with 429",
        provider.rejected()
    );
    Ok(())
}
