//! A schedule whose executor shares its limits with other processes, on a real Redis server.

use super::*;
use crate::support::{
    proxy::{Network, Proxy},
    redis::Server,
};
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

/// Calls of two tenants, whose shares are 3 : 1, at a distance of 20 ms from the server that has the limits.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs redis-server"]
async fn a_distant_server_costs_no_throughput_and_the_shares_stay_fair() {
    const RATE: u64 = 500;
    let measured = ms(4_000);
    let server = Server::start();
    let proxy = Proxy::start(server.port()).await;
    proxy.set(Network::Delays(ms(20)));
    // In one of three rounds: another program may stop this one for a while.
    let mut is_right = false;
    for round in 0..3 {
        let limits = Limits::new().requests(Rate::per_second(RATE).burst(10));
        let limiter = redis::connect(&proxy.url(), &format!("distance-{round}"), limits).unwrap();
        limiter.check_store().await.unwrap();
        let schedule =
            Schedule::new().level(Level::by("tenant").weight(|tenant| if tenant == "large" { 3 } else { 1 }));
        let (client, log) = client(ms(5));
        let executor = Executor::builder()
            .queue_capacity(10_000)
            .concurrency_limit(200)
            .limiter(limiter.clone())
            .schedule(schedule.clone())
            .build(client)
            .unwrap();
        executor.start().unwrap();
        let calls = (0..3_000).flat_map(|number| [flow_call("large", number), flow_call("small", 100_000 + number)]);
        let handles = submit_all(&executor, calls).await;
        sleep(ms(500)).await;
        let from = log.start.elapsed();
        sleep(measured).await;
        let arrivals = log.arrivals();
        executor.stop(Shutdown::Immediate).await;
        drop(handles);
        assert_nothing_is_left(&executor, &schedule);
        let most = |at: Duration| 10.0 + RATE as f64 * (at + ms(15)).as_secs_f64();
        let mut sent = 0.0;
        for (_, at) in &arrivals {
            sent += 1.0;
            assert!(sent <= most(*at), "{sent} at {at:?}");
        }
        let in_time = arrivals
            .into_iter()
            .filter(|(_, at)| (from..from + measured).contains(at));
        let (large, small): (Vec<_>, Vec<_>) = in_time.partition(|(number, _)| *number < 100_000);
        let used = (large.len() + small.len()) as f64 / (RATE as f64 * measured.as_secs_f64());
        let share = large.len() as f64 / small.len() as f64;
        let status = limiter.store_status().unwrap();
        println!("{:.1} % of the rate, shares {share:.3} : 1, {status:?}", used * 100.0);
        is_right |= used >= 0.95 && (2.9..3.1).contains(&share);
        if is_right {
            break;
        }
    }
    assert!(is_right);
}

/// Tenants whose calls cost differently, and an urgent call that comes while the charges of others are on their way.
#[tokio::test]
#[ignore = "needs redis-server"]
async fn with_a_distant_server_each_call_is_charged_what_it_costs_and_what_is_not_used_is_given_back() {
    let server = Server::start();
    let proxy = Proxy::start(server.port()).await;
    proxy.set(Network::Delays(ms(20)));
    let limits = Limits::new().tokens(Rate::per_second(2_000).burst(200));
    let limiter = redis::connect(&proxy.url(), "costs", limits).unwrap();
    limiter.check_store().await.unwrap();
    let schedule = tenants();
    let (client, log) = client(ms(5));
    let executor = Executor::builder()
        .concurrency_limit(50)
        .limiter(limiter.clone())
        .schedule(schedule.clone())
        .build(client)
        .unwrap();
    executor.start().unwrap();
    let mut random = fastrand::Rng::with_seed(3);
    let mut tokens = Vec::new();
    let mut handles = Vec::new();
    for number in 0..200 {
        tokens.push(random.u64(5..50));
        let call = flow_call(["a", "b", "c"][random.usize(0..3)], number).cost(Cost::tokens(tokens[number as usize]));
        handles.push(executor.submit(call).await.unwrap());
        if random.u8(0..10) == 0 {
            sleep(ms(30)).await;
        }
        if random.u8(0..10) == 0 {
            handles.swap_remove(random.usize(0..handles.len())).cancel();
        }
    }
    all_end_well(handles).await;
    let took = log.start.elapsed();
    let mut admitted = 0;
    for (number, at) in log.arrivals() {
        admitted += tokens[number as usize];
        let most = 200 + 2 * (at + ms(15)).as_millis() as u64;
        assert!(admitted <= most, "{admitted} of {most} at {at:?}");
    }
    let least = ms(admitted.saturating_sub(200) / 2);
    println!("{admitted} tokens in {took:?}, {least:?} by the rate");
    // One at a time, they would take 50 ms each.
    assert!(took <= least * 2, "{took:?} of {least:?}");
    executor.stop(Shutdown::Graceful).await;
    assert_nothing_is_left(&executor, &schedule);
    // What was not used is back in time.
    sleep(ms(400)).await;
    let full = limiter.acquire(Cost::tokens(190));
    tokio::time::timeout(ms(300), full).await.unwrap().unwrap();
}
