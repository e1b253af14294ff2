//! An executor whose metrics Prometheus can scrape, while it makes 300 calls to a local model.
//!
//! What to watch: the page of text at the end. A burst of calls waits for its turn and for the rate of requests
//! (`outbound_wait_seconds`), some are rejected with a 429 and retried (`outbound_throttled_total`), one is refused,
//! because no money is left for it, and one is cancelled. Each is counted exactly once.
//!
//! Run it with `cargo run -p tower-outbound-metrics`; it takes about six seconds. `-- --serve` repeats the calls and
//! serves the page at <http://127.0.0.1:9464/metrics> until Ctrl-C, for a Prometheus with the dashboard
//! `docs/grafana.json`. `-- --plot docs/metrics.svg` draws a picture of the scraped pages.

#[cfg(test)]
mod dashboard;
mod load;
mod page;
mod plot;
mod provider;

use anyhow::ensure;
use axum::{Router, routing::get};
use clap::Parser;
use load::{CALLS, Load, Scrape};
use page::{parse, sum};
use plot::Scraped;
use std::{path::PathBuf, time::Duration};
use tokio::{
    net::TcpListener,
    signal,
    time::{Instant, interval},
};

/// An executor whose metrics Prometheus can scrape.
#[derive(Debug, Parser)]
struct Args {
    /// Repeat the calls and serve the page until Ctrl-C
    #[arg(long)]
    serve: bool,
    /// Draw a picture of the scraped pages
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
}

const SCRAPE_EVERY: Duration = Duration::from_millis(100);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let load = Load::start().await?;
    let scrape = load.scrape();
    if args.serve {
        return serve(&load, scrape).await;
    }
    let scraped = run(&load, &scrape).await?;
    let page = scrape.page();
    println!("{page}");
    if let Some(file) = &args.plot {
        plot::draw(file, &scraped)?;
        println!("{}", file.display());
    }
    check(&page)
}

/// Makes all calls, and reads the page every 100 ms meanwhile.
async fn run(load: &Load, scrape: &Scrape) -> anyhow::Result<Vec<Scraped>> {
    let start = Instant::now();
    let mut scraped = Vec::new();
    let mut ticks = interval(SCRAPE_EVERY);
    let calls = load.run();
    tokio::pin!(calls);
    loop {
        tokio::select! {
            done = &mut calls => {
                done?;
                return Ok(scraped);
            }
            _ = ticks.tick() => scraped.push(Scraped {
                at: start.elapsed(),
                samples: parse(&scrape.page()),
            }),
        }
    }
}

/// Repeats the calls, and serves the page until Ctrl-C.
async fn serve(load: &Load, scrape: Scrape) -> anyhow::Result<()> {
    let listener = TcpListener::bind("127.0.0.1:9464").await?;
    println!("http://{}/metrics", listener.local_addr()?);
    let router = Router::new().route("/metrics", get(async move || scrape.page()));
    let server = axum::serve(listener, router).with_graceful_shutdown(async {
        // An error means that the signal cannot be waited for: then the server ends at once.
        let _ = signal::ctrl_c().await;
    });
    let repeat = async {
        loop {
            load.run().await?;
        }
    };
    tokio::select! {
        served = server => Ok(served?),
        failed = repeat => failed,
    }
}

/// Checks that each call is counted exactly once.
fn check(page: &str) -> anyhow::Result<()> {
    let samples = parse(page);
    let calls = |status| sum(&samples, "outbound_calls_total", Some(("outbound_status", status)));
    ensure!(calls("COMPLETED") == f64::from(CALLS + 1), "calls are missing");
    ensure!(calls("FAILED") == 1.0 && calls("CANCELLED") == 1.0, "calls are missing");
    ensure!(
        sum(&samples, "outbound_refused_total", None) == 1.0,
        "a refused call is missing"
    );
    let throttled = sum(&samples, "outbound_throttled_total", None);
    ensure!(throttled > 0.0, "no call was throttled");
    ensure!(
        sum(&samples, "outbound_retries_total", None) >= throttled,
        "retries are missing"
    );
    let usage = sum(
        &samples,
        "gen_ai_client_token_usage_count",
        Some(("gen_ai_token_type", "output")),
    );
    ensure!(usage == f64::from(CALLS + 1), "the usage of calls is missing");
    Ok(())
}
