//! A schedule whose executor shares its limits with other processes, on a real Redis server.

use super::*;
use crate::support::redis::Server;
use tower_outbound::{Cost, rate::redis};

/// A small tenant beside a large one, whose calls cost more, with limits of its own.
#[tokio::test]
#[ignore = "needs redis-server"]
async fn a_small_tenant_does_not_wait_behind_a_large_one_and_each_call_is_charged_what_it_costs() {
    let server = Server::start();
    let limits = Limits::new().tokens(Rate::per_second(1_000).burst(100));
    let limiter = redis::connect(&server.url(), "quota", limits).unwrap();
    let level = Level::by("tenant").limits(|tenant| (tenant == "small").then(|| per_second(20)));
    let schedule = Schedule::new().level(level);
    let (client, log) = client(ms(5));
    let executor = Executor::builder()
        .concurrency_limit(4)
        .limiter(limiter.clone())
        .schedule(schedule.clone())
        .build(client)
        .unwrap();
    executor.start().unwrap();
    let cost = |flow, number, tokens| flow_call(flow, number).cost(Cost::tokens(tokens));
    let large = submit_all(&executor, (0..60).map(|number| cost("large", number, 50))).await;
    sleep(ms(300)).await;
    let start = Instant::now();
    all_end_well(submit_all(&executor, (100..110).map(|number| cost("small", number, 7))).await).await;
    // At its own 20 a second.
    let took = start.elapsed();
    assert!(ms(440) <= took && took < ms(1_200), "{took:?}");
    all_end_well(large).await;
    // 3,070 tokens at 1,000 a second, after a burst of 100. Whatever was reserved for another call is given back.
    let took = log.start.elapsed();
    assert!(ms(2_950) <= took && took < ms(4_000), "{took:?}");
    let mut admitted = 0;
    for (number, at) in log.arrivals() {
        admitted += if number < 100 { 50 } else { 7 };
        let most = 100 + (at + ms(15)).as_millis() as u64;
        assert!(admitted <= most, "{admitted} of {most} at {at:?}");
    }
    executor.stop(Shutdown::Graceful).await;
    assert_nothing_is_left(&executor, &schedule);
    // What was not used is back in time.
    sleep(ms(300)).await;
    let full = limiter.acquire(Cost::tokens(95));
    tokio::time::timeout(ms(200), full).await.unwrap().unwrap();
}
