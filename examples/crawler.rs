//! Fetches pages of 50 hosts: 5 per second and 2 at once of each host, and 100 at once in all.
//!
//! What to watch: one executor serves all hosts. A host is known from its first page on, delays no other host, and is
//! forgotten when its limits are full again after its last page. The server notes what each host sees, and at the end the
//! program checks that no host was above its limits, and that all hosts were fetched at the same time.
//!
//! `cargo run --example crawler`

mod support;

use anyhow::ensure;
use http::Request;
use std::time::Duration;
use tokio::{task::JoinSet, time::Instant};
use tower_outbound::{
    Executor, Limits, Rate, Schedule,
    schedule::{Flow, Level},
};

const HOSTS: u32 = 50;
const PAGES: u32 = 15;
/// How long it takes to find a new host.
const NEW_HOST: Duration = Duration::from_millis(20);
/// A host allows a burst of this many pages, and one more per interval.
const BURST: u32 = 5;
const INTERVAL: Duration = Duration::from_millis(200);
/// By how much the time of a fetch may be noted too late, because the thread was delayed.
const TOLERANCE: Duration = Duration::from_millis(300);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let (url, hosts) = support::hosts().await?;
    let limits = |_: &str| Some(Limits::new().requests(Rate::new(1, INTERVAL).burst(BURST)));
    let schedule = Schedule::new().level(Level::by("host").limits(limits).concurrency(|_| Some(2)));
    // All hosts are the same server here: the path names the host. A real crawler asks for `uri().host()`.
    let host = |request: &Request<String>| Flow::from(request.uri().path());
    let executor = Executor::builder()
        // There is no rate of all hosts together.
        .limits(Limits::new())
        .concurrency_limit(100)
        .schedule_by(schedule.clone(), host)
        .build(support::http_client())?;
    executor.start()?;

    let start = Instant::now();
    let mut pages = JoinSet::new();
    for number in 0..HOSTS {
        tokio::time::sleep(NEW_HOST).await;
        for page in 0..PAGES {
            let request = Request::get(format!("{url}/host-{number}?page={page}")).body(String::new())?;
            pages.spawn(executor.submit(request).await?);
        }
    }
    while let Some(page) = pages.join_next().await {
        ensure!(page??.status().is_success(), "a page was not fetched");
    }

    let total = start.elapsed();
    for (name, host) in &*hosts.lock().unwrap() {
        for (first, from) in host.fetched.iter().enumerate() {
            for (count, to) in (1..).zip(&host.fetched[first..]) {
                let least = INTERVAL * u32::saturating_sub(count, BURST);
                ensure!(*to - *from + TOLERANCE >= least, "{name} was above its rate");
            }
        }
        ensure!(host.most_at_once <= 2, "{name}: {} pages at once", host.most_at_once);
    }
    let least = NEW_HOST * HOSTS + INTERVAL * (PAGES - BURST);
    println!("{PAGES} pages of each of {HOSTS} hosts in {total:.2?}; the limits alone take {least:.2?}");
    ensure!(total < least * 2, "hosts have delayed each other");
    ensure!(schedule.flows(1).is_empty(), "no host has pages left");
    Ok(())
}
