//! A schedule in a Tower stack without an executor.

use super::*;
use crate::support::{pass, settle};
use tower::{BoxError, ServiceBuilder, service_fn};
use tower_outbound::{
    Concurrency, ConcurrencyLimitLayer, Cost, QueueLayer, RateLimitLayer, RateLimiter, schedule::Flow,
};

/// Returns the layer of a queue with this schedule.
pub(super) fn layer(places: usize, schedule: &Schedule) -> QueueLayer<Request> {
    let cost = |_: &Request| Cost::request();
    QueueLayer::new(places)
        .unwrap()
        .schedule(schedule.clone(), Flow::of, cost)
        .unwrap()
}

/// A request that is not of http: its flow, its number, and what it costs.
#[derive(Clone, Debug, PartialEq)]
struct Job(&'static str, u64, u64);

fn job_layer(schedule: &Schedule) -> QueueLayer<Job> {
    QueueLayer::new(100)
        .unwrap()
        .schedule(
            schedule.clone(),
            |job: &Job| Flow::from(job.0),
            |job: &Job| Cost::tokens(job.2),
        )
        .unwrap()
}

#[tokio::test(start_paused = true)]
async fn the_layers_below_the_queue_find_what_the_schedule_has_taken() {
    let permits = Concurrency::new(2).unwrap();
    let limiter = RateLimiter::new(Limits::new().tokens(Rate::per_second(10).burst(10))).unwrap();
    let level = Level::by("tenant").limits(|tenant| (tenant == "slow").then(|| per_second(1)));
    let schedule = Schedule::new()
        .level(level)
        .concurrency(permits.clone())
        .limiter(limiter.clone());
    let log = Log::new();
    let client = {
        let (log, permits) = (log.clone(), permits.clone());
        service_fn(move |job: Job| {
            let (log, permits) = (log.clone(), permits.clone());
            async move {
                log.add(job.1);
                assert!(permits.in_flight() <= 2);
                sleep(ms(10)).await;
                Ok::<_, io::Error>(job.1)
            }
        })
    };
    let mut queue = ServiceBuilder::new()
        .layer(job_layer(&schedule))
        .layer(ConcurrencyLimitLayer::with_limit(permits.clone()))
        .layer(RateLimitLayer::with_cost(limiter.clone(), |job: &Job| {
            Cost::tokens(job.2)
        }))
        .service(client);
    let jobs = [
        Job("slow", 0, 1),
        Job("slow", 1, 1),
        Job("free", 10, 5),
        Job("free", 11, 5),
        Job("free", 12, 5),
    ];
    let calls: Vec<_> = jobs.map(|job| queue.call(job)).into();
    let numbers = futures_util::future::try_join_all(calls).await.unwrap();
    assert_eq!(numbers, [0, 1, 10, 11, 12]);
    // 11 tokens in the first 100 ms: the ten of the burst, and one more.
    let log = log.millis();
    assert_eq!(log[..2], [(0, 0), (10, 0)]);
    assert!(
        log.contains(&(11, 100)) && log.contains(&(12, 600)) && log.contains(&(1, 1_000)),
        "{log:?}"
    );
    settle().await;
    assert_eq!(permits.in_flight(), 0);
    assert_none_waits(&schedule);
    // Each was charged once.
    assert_eq!(limiter.available().of("tokens"), Some(3));
}

#[tokio::test(start_paused = true)]
async fn without_a_limiter_the_limits_of_keys_and_the_permits_decide() {
    let permits = Concurrency::new(1).unwrap();
    let level = Level::by("tenant").limits(|_| Some(per_second(1)));
    let schedule = Schedule::new().level(level).concurrency(permits.clone());
    let (client, log) = client(ms(600));
    let mut queue = ServiceBuilder::new()
        .layer(layer(100, &schedule))
        .layer(ConcurrencyLimitLayer::with_limit(permits.clone()))
        .service(client);
    let of = |flow: &'static str, number| {
        let mut request = request(number);
        request.extensions_mut().insert(Flow::from(flow));
        request
    };
    let calls = [of("a", 0), of("a", 1), of("b", 2), of("b", 3)].map(|request| queue.call(request));
    futures_util::future::try_join_all(calls).await.unwrap();
    assert_eq!(log.millis(), [(0, 0), (2, 600), (1, 1_200), (3, 1_800)]);
    settle().await;
    assert_eq!(permits.in_flight(), 0);
    assert_none_waits(&schedule);
}

#[tokio::test(start_paused = true)]
async fn without_limits_of_its_own_a_schedule_orders_what_waits_until_the_service_is_ready() {
    let schedule = Schedule::new()
        .class("interactive", Duration::ZERO)
        .class("batch", ms(60_000));
    let (client, log) = client(ms(100));
    let mut queue = ServiceBuilder::new()
        .layer(layer(100, &schedule))
        // Ready for one call at a time, and holds back the calls behind it.
        .buffer(1)
        .service(client);
    let of = |class: &'static str, number| {
        let mut request = request(number);
        request.extensions_mut().insert(Flow::default().class(class));
        request
    };
    let calls: Vec<_> = (0..10).map(|number| queue.call(of("batch", number))).collect();
    let urgent = queue.call(of("interactive", 100));
    urgent.await.unwrap();
    futures_util::future::try_join_all(calls).await.unwrap();
    assert_eq!(log.numbers()[0], 100);
    pass(ms(1)).await;
    assert_none_waits(&schedule);
}

#[tokio::test(start_paused = true)]
async fn a_queue_that_is_dropped_finishes_its_calls_and_frees_its_schedule() {
    let limiter = RateLimiter::new(per_second(10)).unwrap();
    let schedule = tenants().limiter(limiter.clone());
    for round in 0..3 {
        let (client, log) = client(ms(10));
        let mut queue = ServiceBuilder::new()
            .layer(layer(100, &schedule))
            .layer(RateLimitLayer::new(limiter.clone()))
            .service(client);
        let calls: Vec<_> = (0..5).map(|number| queue.call(request(number))).collect();
        drop(queue);
        let results: Vec<Result<_, BoxError>> = futures_util::future::join_all(calls).await;
        assert!(results.iter().all(Result::is_ok), "{round}");
        assert_eq!(log.numbers(), [0, 1, 2, 3, 4]);
        settle().await;
        assert_none_waits(&schedule);
    }
}
