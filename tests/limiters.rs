//! What every limiter promises, wherever its buckets live: one list of cases, run on the limiter of this process and on
//! the one that many processes share.

mod support;

use futures_util::future::{FutureExt, LocalBoxFuture, join_all};
use http::Request;
use std::time::Duration;
use support::{client, ms, request};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tower::{Layer, ServiceExt};
use tower_outbound::{
    Call, Cost, Executor, Limits, Rate, RateLimitLayer, RateLimiter, Shutdown,
    error::AcquireError,
    rate::{Budget, Limiter},
};

/// Makes a limiter of its own for a case.
type Make<'a> = &'a (dyn Fn(Limits) -> Limiter + Sync);
type Case = for<'a> fn(Make<'a>) -> LocalBoxFuture<'a, ()>;

const CASES: &[(&str, Case)] = &[
    ("a burst goes at once, the rest is paced", |make| {
        paced(make).boxed_local()
    }),
    ("requests and tokens are taken both or neither", |make| {
        both_or_neither(make).boxed_local()
    }),
    ("first come, first served", |make| in_order(make).boxed_local()),
    ("a heavy call is not starved by light ones", |make| {
        heavy(make).boxed_local()
    }),
    ("a cost above a burst is refused at once", |make| {
        refused(make).boxed_local()
    }),
    ("who leaves takes nothing", |make| leaves(make).boxed_local()),
    ("an estimate is settled both ways", |make| settled(make).boxed_local()),
    ("a pause holds all and is only ever extended", |make| {
        paused(make).boxed_local()
    }),
    ("limits are changed also for those who wait", |make| {
        changed(make).boxed_local()
    }),
    ("what is said to be left lowers and never raises", |make| {
        lowered(make).boxed_local()
    }),
    ("a limit that is told is adopted", |make| adopted(make).boxed_local()),
    ("several rates hold at once", |make| several(make).boxed_local()),
    ("no limit admits everybody", |make| unlimited(make).boxed_local()),
    ("it paces a layer", |make| layer(make).boxed_local()),
    ("it paces an executor, and its deadlines", |make| {
        executor(make).boxed_local()
    }),
];

/// Never early; and late by no more than a busy machine makes it.
fn assert_took(since: Instant, expected: Duration) {
    let took = since.elapsed();
    let early = ms(2);
    assert!(took + early >= expected, "took {took:?}, and not {expected:?}");
    assert!(took < expected + ms(250), "took {took:?}, and not {expected:?}");
}

async fn paced(make: Make<'_>) {
    let limiter = make(Limits::new().requests(Rate::per_second(20).burst(5)));
    let start = Instant::now();
    for _ in 0..5 {
        limiter.acquire(Cost::request()).await.unwrap();
    }
    assert_took(start, ms(0));
    for _ in 0..10 {
        limiter.acquire(Cost::request()).await.unwrap();
    }
    assert_took(start, ms(500));
}

async fn both_or_neither(make: Make<'_>) {
    let limits = Limits::new()
        .requests(Rate::per_second(10).burst(2))
        .tokens(Rate::per_second(100).burst(100));
    let limiter = make(limits);
    limiter.acquire(Cost::tokens(100)).await.unwrap();
    let start = Instant::now();
    limiter.acquire(Cost::tokens(40)).await.unwrap();
    assert_took(start, ms(400));
    // Both requests were there again by then; one is left.
    limiter.acquire(Cost::request()).await.unwrap();
    assert_took(start, ms(400));
}

async fn in_order(make: Make<'_>) {
    let limiter = make(Limits::new().requests(Rate::per_second(50).burst(1)));
    let mut calls = JoinSet::new();
    for number in 0..20 {
        let limiter = limiter.clone();
        calls.spawn(async move {
            limiter.acquire(Cost::request()).await.unwrap();
            number
        });
        tokio::task::yield_now().await;
    }
    let mut went = Vec::new();
    while let Some(number) = calls.join_next().await {
        went.push(number.unwrap());
    }
    assert!(went.is_sorted(), "{went:?}");
}

async fn heavy(make: Make<'_>) {
    let limiter = make(Limits::new().tokens(Rate::per_second(1_000).burst(500)));
    limiter.acquire(Cost::tokens(500)).await.unwrap();
    let start = Instant::now();
    let (heavy, light) = (limiter.clone(), limiter.clone());
    let heavy = tokio::spawn(async move { heavy.acquire(Cost::tokens(500)).await });
    sleep(ms(20)).await;
    let light = tokio::spawn(async move {
        for _ in 0..20 {
            light.acquire(Cost::tokens(10)).await.unwrap();
        }
    });
    heavy.await.unwrap().unwrap();
    assert_took(start, ms(500));
    light.await.unwrap();
    assert_took(start, ms(700));
}

async fn refused(make: Make<'_>) {
    let limiter = make(
        Limits::new()
            .requests(Rate::per_second(1))
            .tokens(Rate::per_second(100)),
    );
    let error = limiter.acquire(Cost::tokens(101)).await.unwrap_err();
    assert!(matches!(error, AcquireError::CostExceedsBurst(never) if never.burst() == 100));
    assert!(limiter.check(Cost::tokens(101)).is_err() && limiter.check(Cost::tokens(100)).is_ok());
    let start = Instant::now();
    limiter.acquire(Cost::tokens(100)).await.unwrap();
    assert_took(start, ms(0));
}

async fn leaves(make: Make<'_>) {
    let limiter = make(Limits::new().tokens(Rate::per_second(100).burst(100)));
    limiter.acquire(Cost::tokens(100)).await.unwrap();
    let start = Instant::now();
    let leaves = limiter.clone();
    let leaves = tokio::spawn(async move { leaves.acquire(Cost::tokens(90)).await });
    sleep(ms(50)).await;
    let stays = limiter.clone();
    let stays = tokio::spawn(async move { stays.acquire(Cost::tokens(10)).await });
    sleep(ms(50)).await;
    leaves.abort();
    stays.await.unwrap().unwrap();
    // A reservation that was made behind another one stays where it is; what that one had is there for the next.
    limiter.acquire(Cost::tokens(80)).await.unwrap();
    assert!(start.elapsed() < ms(1_300), "{:?}", start.elapsed());
}

async fn settled(make: Make<'_>) {
    let limiter = make(Limits::new().tokens(Rate::per_second(100).burst(1_000)));
    let estimate = limiter.acquire_estimate(Cost::tokens(1_000)).await.unwrap();
    limiter.settle(estimate, Cost::tokens(300));
    sleep(ms(50)).await;
    let start = Instant::now();
    let estimate = limiter.acquire_estimate(Cost::tokens(700)).await.unwrap();
    assert_took(start, ms(0));
    // A debt is paid first.
    limiter.settle(estimate, Cost::tokens(750));
    sleep(ms(50)).await;
    let start = Instant::now();
    limiter.acquire(Cost::tokens(10)).await.unwrap();
    assert!((ms(350)..ms(850)).contains(&start.elapsed()), "{:?}", start.elapsed());
}

async fn paused(make: Make<'_>) {
    let limiter = make(Limits::new().requests(Rate::per_second(100).burst(10)));
    limiter.acquire(Cost::request()).await.unwrap();
    let start = Instant::now();
    limiter.pause_for(ms(600));
    limiter.pause_for(ms(100));
    assert!(limiter.available().paused_until.is_some());
    limiter.acquire(Cost::request()).await.unwrap();
    assert_took(start, ms(600));
}

async fn changed(make: Make<'_>) {
    let limiter = make(Limits::new().requests(Rate::per_second(1).burst(1)));
    limiter.acquire(Cost::request()).await.unwrap();
    let start = Instant::now();
    let waits = limiter.clone();
    let waits = tokio::spawn(async move {
        for _ in 0..10 {
            waits.acquire(Cost::request()).await.unwrap();
        }
    });
    sleep(ms(100)).await;
    let faster = Limits::new().requests(Rate::per_second(100).burst(1));
    limiter.set_limits(faster.clone()).unwrap();
    assert_eq!(limiter.limits(), faster);
    // What was reserved before is where it was: one a second, two seconds ahead.
    timeout(ms(3_500), waits).await.unwrap().unwrap();
    assert!(start.elapsed() < ms(3_500));
    let error = limiter
        .set_limits(Limits::new().requests(Rate::per_second(0)))
        .unwrap_err();
    assert_eq!(error.field(), "requests.amount");
}

async fn lowered(make: Make<'_>) {
    let limiter = make(Limits::new().tokens(Rate::per_second(100).burst(1_000)));
    limiter.acquire(Cost::tokens(0)).await.unwrap();
    limiter.lower(Budget::Tokens, None, 20);
    limiter.lower(Budget::Tokens, None, 900);
    sleep(ms(50)).await;
    let start = Instant::now();
    limiter.acquire(Cost::tokens(65)).await.unwrap();
    assert_took(start, ms(400));
}

async fn adopted(make: Make<'_>) {
    let limiter = make(Limits::new().requests(Rate::per_minute(60).burst(1)));
    limiter.acquire(Cost::request()).await.unwrap();
    assert!(
        limiter
            .adopt(Budget::Requests, Some(Duration::from_secs(60)), 6_000)
            .unwrap()
    );
    assert!(
        !limiter
            .adopt(Budget::Requests, Some(Duration::from_secs(60)), 6_000)
            .unwrap()
    );
    assert!(!limiter.adopt(Budget::Tokens, None, 6_000).unwrap());
    let start = Instant::now();
    for _ in 0..20 {
        limiter.acquire(Cost::request()).await.unwrap();
    }
    assert!(start.elapsed() < ms(450), "{:?}", start.elapsed());
}

async fn several(make: Make<'_>) {
    let limits = Limits::new()
        .requests(Rate::per_second(100).burst(10))
        .requests(Rate::per_minute(600).burst(12));
    let limiter = make(limits);
    let start = Instant::now();
    for _ in 0..16 {
        limiter.acquire(Cost::request()).await.unwrap();
    }
    // Ten at once, two in 20 ms, and then one in 100 ms.
    assert!(start.elapsed() >= ms(300), "{:?}", start.elapsed());
    assert!(start.elapsed() < ms(700), "{:?}", start.elapsed());
}

async fn unlimited(make: Make<'_>) {
    let limiter = make(Limits::new());
    let start = Instant::now();
    join_all((0..500).map(|_| limiter.acquire(Cost::tokens(1_000_000)))).await;
    assert_took(start, ms(0));
    assert_eq!((limiter.available().requests, limiter.available().tokens), (None, None));
}

async fn layer(make: Make<'_>) {
    let (client, arrivals) = client(ms(0));
    let limiter = make(Limits::new().requests(Rate::per_second(20).burst(2)));
    let service = RateLimitLayer::new(limiter).layer(client);
    let start = Instant::now();
    let calls = join_all((0..6).map(|_| service.clone().oneshot(request("call")))).await;
    assert!(calls.iter().all(Result::is_ok));
    assert_took(start, ms(200));
    assert_eq!(arrivals.times().len(), 6);
}

async fn executor(make: Make<'_>) {
    let (client, _) = client(ms(0));
    let executor = Executor::builder()
        .limiter(make(Limits::new().requests(Rate::per_second(10).burst(1))))
        .build(client)
        .unwrap();
    executor.start().unwrap();
    let start = Instant::now();
    for _ in 0..4 {
        let call = Request::get("http://localhost/").body("call").unwrap();
        executor.submit(Call::from(call)).await.unwrap().await.unwrap();
    }
    assert_took(start, ms(300));
    executor.monitor().limiter().pause_for(Duration::from_secs(60));
    let call = Call::from(Request::get("http://localhost/").body("late").unwrap()).timeout(ms(200));
    let ended = match executor.submit(call).await {
        Ok(call) => call.await.unwrap_err(),
        Err(error) => error,
    };
    assert!(ended.is_deadline_exceeded(), "{ended}");
    executor.stop(Shutdown::Immediate).await;
}

#[tokio::test(start_paused = true)]
async fn the_limiter_of_this_process() {
    for (name, case) in CASES {
        println!("{name}");
        case(&|limits| RateLimiter::new(limits).unwrap().into()).await;
    }
}

#[cfg(feature = "redis")]
#[tokio::test]
#[ignore = "needs redis-server"]
async fn the_limiter_that_many_processes_share() {
    use std::sync::atomic::{AtomicU32, Ordering};
    use tower_outbound::rate::redis::SharedRateLimiter;

    let server = support::redis::Server::start();
    let quotas = AtomicU32::new(0);
    for (name, case) in CASES {
        println!("{name}");
        case(&|limits| {
            let quota = format!("case-{}", quotas.fetch_add(1, Ordering::Relaxed));
            SharedRateLimiter::connect(&server.url(), &quota, limits)
                .unwrap()
                .into()
        })
        .await;
    }
}
