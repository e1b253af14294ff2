//! Fetches pages of 50 hosts, each of them at its own rate: 5 pages per second, without a burst.
//!
//! What to watch: one executor and one queue serve all hosts. A host is known by its first page, waits for its own rate
//! without delaying any other host, and is forgotten after its last page. At the end, the program checks that no host
//! was above its rate, and that all hosts were fetched at the same time.
//!
//! `cargo run --example crawler`

mod support;

use anyhow::ensure;
use http::Request;
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::time::{Instant, sleep};
use tower::ServiceBuilder;
use tower_outbound::{Call, Executor, Limits, Rate, Schedule, schedule::Level};

const HOSTS: u32 = 50;
const PAGES: u32 = 12;
/// How long it takes to find a new host.
const NEW_HOST: Duration = Duration::from_millis(20);
/// Each host allows one page per interval.
const INTERVAL: Duration = Duration::from_millis(200);
/// By how much the time of a fetch may be noted too late, because the thread was delayed.
const TOLERANCE: Duration = Duration::from_millis(150);

/// The host of a URL: the first part of its path, since all hosts are the same local server.
fn host<B>(request: &Request<B>) -> String {
    request.uri().path().split('/').nth(1).unwrap_or_default().to_owned()
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let url = support::server(None).await?;
    let of_host = |_: &str| Some(Limits::new().requests(Rate::new(1, INTERVAL).burst(1)));
    let schedule = Schedule::new().level(Level::by("host").limits(of_host));

    // The time of each fetch is noted below all limits.
    let fetched: Arc<Mutex<HashMap<String, Vec<Instant>>>> = Arc::default();
    let notes = fetched.clone();
    let client = ServiceBuilder::new()
        .map_request(move |request: Request<String>| {
            let mut notes = notes.lock().unwrap_or_else(PoisonError::into_inner);
            notes.entry(host(&request)).or_default().push(Instant::now());
            request
        })
        .service(support::http_client());
    let executor = Executor::builder()
        .concurrency_limit(100)
        .schedule(schedule.clone())
        .build(client)?;

    let start = Instant::now();
    executor
        .run(async move |executor| {
            let mut crawls = tokio::task::JoinSet::new();
            for number in 0..HOSTS {
                let (executor, url) = (executor.clone(), url.clone());
                crawls.spawn(async move {
                    sleep(NEW_HOST * number).await;
                    let mut pages = Vec::new();
                    for page in 0..PAGES {
                        let request = Request::get(format!("{url}/host-{number}/{page}")).body(String::new())?;
                        let flow = host(&request);
                        pages.push(executor.submit(Call::from(request).flow(flow)).await?);
                    }
                    for page in pages {
                        ensure!(page.await?.status().is_success(), "a page was not fetched");
                    }
                    Ok(())
                });
            }
            while let Some(crawled) = crawls.join_next().await {
                crawled??;
            }
            anyhow::Ok(())
        })
        .await??;
    let total = start.elapsed();

    for (host, times) in fetched.lock().unwrap_or_else(PoisonError::into_inner).iter() {
        for (first, from) in times.iter().enumerate() {
            for (gaps, to) in (0..).zip(&times[first..]) {
                ensure!(*to + TOLERANCE >= *from + INTERVAL * gaps, "{host} was above its rate");
            }
        }
        ensure!(times.len() == PAGES as usize, "{host}: {} pages", times.len());
    }
    let bound = NEW_HOST * (HOSTS - 1) + INTERVAL * (PAGES - 1);
    println!("{HOSTS} hosts of {PAGES} pages in {total:.2?}; their rates alone take {bound:.2?}");
    ensure!(total < bound * 2, "hosts have delayed each other");
    let known = schedule.flows(usize::MAX);
    ensure!(known.is_empty(), "hosts without pages are still known: {known:?}");
    Ok(())
}
