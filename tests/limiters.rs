//! What both limiters guarantee: one list of cases is run with the local `RateLimiter`, and with the
//! one whose limits several processes share in Redis.

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
    rate::{Budget, PauseSource},
};

/// A function that creates a limiter with the given limits for one case.
type Make<'a> = &'a (dyn Fn(Limits) -> RateLimiter + Sync);
type Case = for<'a> fn(Make<'a>) -> LocalBoxFuture<'a, ()>;

const CASES: &[(&str, Case)] = &[
    ("a burst is admitted at once, the rest is paced", |make| {
        paced(make).boxed_local()
    }),
    ("requests and tokens are taken together or not at all", |make| {
        all_or_nothing(make).boxed_local()
    }),
    ("first come, first served", |make| in_order(make).boxed_local()),
    ("a heavy call is not starved by light ones", |make| {
        heavy(make).boxed_local()
    }),
    ("a cost above a burst is rejected at once", |make| {
        rejected(make).boxed_local()
    }),
    ("a dropped waiter takes nothing", |make| dropped(make).boxed_local()),
    ("an estimate is settled up and down", |make| settled(make).boxed_local()),
    ("a debt is bounded and can be forgiven", |make| {
        forgiven(make).boxed_local()
    }),
    ("a pause holds every call until it ends or is ended", |make| {
        paused(make).boxed_local()
    }),
    ("new limits apply to waiters too", |make| changed(make).boxed_local()),
    ("a reported remainder lowers a bucket and never raises it", |make| {
        lowered(make).boxed_local()
    }),
    ("a reported limit is adopted", |make| adopted(make).boxed_local()),
    ("several rates hold at the same time", |make| {
        several(make).boxed_local()
    }),
    ("without limits every call is admitted", |make| {
        unlimited(make).boxed_local()
    }),
    ("a limiter paces a layer", |make| layer(make).boxed_local()),
    ("a limiter paces an executor, and deadlines include its wait", |make| {
        executor(make).boxed_local()
    }),
];

/// Checks that the time `expected` has passed since `since`. The actual time may be up to 2 ms shorter, because of the
/// resolution of timers, and less than 250 ms longer, because the machine may be busy.
fn assert_took(since: Instant, expected: Duration) {
    let took = since.elapsed();
    let early = ms(2);
    assert!(took + early >= expected, "took {took:?} instead of {expected:?}");
    assert!(took < expected + ms(250), "took {took:?} instead of {expected:?}");
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

async fn all_or_nothing(make: Make<'_>) {
    let limits = Limits::new()
        .requests(Rate::per_second(10).burst(2))
        .tokens(Rate::per_second(100).burst(100));
    let limiter = make(limits);
    limiter.acquire(Cost::tokens(100)).await.unwrap();
    let start = Instant::now();
    limiter.acquire(Cost::tokens(40)).await.unwrap();
    assert_took(start, ms(400));
    // The call of 40 tokens was admitted after 400 ms. By then the bucket of requests had refilled to its burst of two.
    // The call took one request, so one is left for the next call.
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
    let mut admitted = Vec::new();
    while let Some(number) = calls.join_next().await {
        admitted.push(number.unwrap());
    }
    assert!(admitted.is_sorted(), "{admitted:?}");
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

async fn rejected(make: Make<'_>) {
    let limiter = make(
        Limits::new()
            .requests(Rate::per_second(1))
            .tokens(Rate::per_second(100)),
    );
    let error = limiter.acquire(Cost::tokens(101)).await.unwrap_err();
    assert!(matches!(error, AcquireError::CostExceedsBurst(error) if error.burst() == 100));
    assert!(limiter.check(Cost::tokens(101)).is_err() && limiter.check(Cost::tokens(100)).is_ok());
    let start = Instant::now();
    limiter.acquire(Cost::tokens(100)).await.unwrap();
    assert_took(start, ms(0));
}

async fn dropped(make: Make<'_>) {
    let limiter = make(Limits::new().tokens(Rate::per_second(100).burst(100)));
    limiter.acquire(Cost::tokens(100)).await.unwrap();
    let start = Instant::now();
    let dropped = limiter.clone();
    let dropped = tokio::spawn(async move { dropped.acquire(Cost::tokens(90)).await });
    sleep(ms(50)).await;
    let behind = limiter.clone();
    let behind = tokio::spawn(async move { behind.acquire(Cost::tokens(10)).await });
    sleep(ms(50)).await;
    dropped.abort();
    behind.await.unwrap().unwrap();
    // With a shared limiter, the call behind the dropped one keeps the later time that was reserved for it. The tokens
    // of the dropped call are available to the next call.
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
    // The call used 50 tokens more than its estimate. The rate pays off this debt before the next call is admitted.
    limiter.settle(estimate, Cost::tokens(750));
    sleep(ms(50)).await;
    let start = Instant::now();
    limiter.acquire(Cost::tokens(10)).await.unwrap();
    assert!((ms(350)..ms(850)).contains(&start.elapsed()), "{:?}", start.elapsed());
}

async fn forgiven(make: Make<'_>) {
    let limiter = make(Limits::new().tokens(Rate::per_second(100).burst(50).max_debt(30)));
    let estimate = limiter.acquire_estimate(Cost::tokens(50)).await.unwrap();
    let start = Instant::now();
    estimate.settle(Cost::tokens(2_147_483_647));
    sleep(ms(50)).await;
    limiter.acquire(Cost::tokens(20)).await.unwrap();
    assert_took(start, ms(500));
    let estimate = limiter.acquire_estimate(Cost::tokens(1)).await.unwrap();
    let start = Instant::now();
    estimate.settle(Cost::tokens(2_147_483_647));
    limiter.forgive_debts();
    sleep(ms(50)).await;
    limiter.acquire(Cost::tokens(20)).await.unwrap();
    assert_took(start, ms(200));
}

async fn paused(make: Make<'_>) {
    let limiter = make(Limits::new().requests(Rate::per_second(100).burst(10)));
    limiter.acquire(Cost::request()).await.unwrap();
    let start = Instant::now();
    limiter.pause_for(ms(100));
    limiter.pause_for(ms(600));
    assert!(limiter.available().paused_until.is_some());
    limiter.acquire(Cost::request()).await.unwrap();
    assert_took(start, ms(600));
    // A shorter pause replaces a longer one, and `resume` ends any.
    for is_resumed in [false, true] {
        let start = Instant::now();
        limiter.pause_for(ms(60_000));
        let waiting = tokio::spawn({
            let limiter = limiter.clone();
            async move { limiter.acquire(Cost::request()).await }
        });
        sleep(ms(400)).await;
        assert_eq!(limiter.paused().unwrap().source(), PauseSource::User);
        if is_resumed {
            limiter.resume();
            assert_eq!(limiter.paused(), None);
        } else {
            limiter.pause_for(ms(100));
        }
        waiting.await.unwrap().unwrap();
        assert_took(start, if is_resumed { ms(400) } else { ms(500) });
    }
}

async fn changed(make: Make<'_>) {
    let limiter = make(Limits::new().requests(Rate::per_second(1).burst(1)));
    limiter.acquire(Cost::request()).await.unwrap();
    let start = Instant::now();
    let waiting = limiter.clone();
    let waiting = tokio::spawn(async move {
        for _ in 0..10 {
            waiting.acquire(Cost::request()).await.unwrap();
        }
    });
    sleep(ms(100)).await;
    let faster = Limits::new().requests(Rate::per_second(100).burst(1));
    limiter.set_limits(faster.clone()).unwrap();
    assert_eq!(limiter.limits(), faster);
    // With a shared limiter, calls keep the times that were reserved before the change: one per second, up to two
    // seconds ahead.
    timeout(ms(3_500), waiting).await.unwrap().unwrap();
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
    // Of the 16 calls, 10 are admitted at once, 2 more at intervals of 10 ms, and then one every 100 ms.
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
    let error = match executor.submit(call).await {
        Ok(call) => call.await.unwrap_err(),
        Err(error) => error,
    };
    assert!(error.is_deadline_exceeded(), "{error}");
    executor.stop(Shutdown::Immediate).await;
}

#[tokio::test(start_paused = true)]
async fn the_local_limiter_passes_every_case() {
    for (name, case) in CASES {
        println!("{name}");
        case(&|limits| RateLimiter::new(limits).unwrap()).await;
    }
}

#[cfg(feature = "redis")]
#[tokio::test]
#[ignore = "needs redis-server"]
async fn the_shared_limiter_passes_every_case() {
    use std::sync::atomic::{AtomicU32, Ordering};
    use tower_outbound::rate::redis;

    let server = support::redis::Server::start();
    let quotas = AtomicU32::new(0);
    for (name, case) in CASES {
        println!("{name}");
        case(&|limits| {
            let quota = format!("case-{}", quotas.fetch_add(1, Ordering::Relaxed));
            redis::connect(&server.url(), &quota, limits).unwrap()
        })
        .await;
    }
}

/// rustls panics if no provider of cryptography is chosen. A user who only turns on the feature must not need to choose.
#[cfg(feature = "redis-tls")]
#[tokio::test]
async fn a_rediss_url_works_without_choosing_a_provider_of_cryptography() {
    use tower_outbound::rate::redis::{Builder, OnStoreLoss};

    // The server closes each connection, so that the TLS handshake fails. The handshake needs the provider.
    let server = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("rediss://{}/", server.local_addr().unwrap());
    let server = tokio::spawn(async move { while server.accept().await.is_ok() {} });
    let limiter = Builder::new(Limits::new().requests(Rate::per_second(10)))
        .on_store_loss(OnStoreLoss::Closed)
        .patience(ms(300))
        .connect(&url, "tls")
        .unwrap();
    let error = limiter.acquire(Cost::request()).await.unwrap_err().to_string();
    assert!(error.contains("unavailable") && !error.contains("panicked"), "{error}");
    server.abort();
}
