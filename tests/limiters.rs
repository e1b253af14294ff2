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

/// Cases of budgets that only the limiter in this process can count.
const NAMED_CASES: &[(&str, Case)] = &[
    ("all budgets are taken together or not at all", |make| {
        all_budgets_or_none(make).boxed_local()
    }),
    ("an estimate is settled budget by budget", |make| {
        settled_by_budget(make).boxed_local()
    }),
    ("a named budget can be asked, lowered and adopted", |make| {
        asked_by_name(make).boxed_local()
    }),
    ("`ready` waits for every budget and takes none", |make| {
        ready(make).boxed_local()
    }),
    ("a wait counts the calls before it in every budget", |make| {
        waits(make).boxed_local()
    }),
    ("rates of new budgets apply to waiters too, in any order", |make| {
        added(make).boxed_local()
    }),
    ("a fifth named budget is an error of the limits", |make| {
        too_many(make).boxed_local()
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
    // With shared limits, a call that is not polled within 6 ms after its turn has come waits for another one. That happens to
    // a process that the machine stops for so long, so one of three rounds has to be in order.
    let mut rounds = Vec::new();
    for _ in 0..3 {
        let admitted = order_of_admissions(make).await;
        if admitted.is_sorted() {
            return;
        }
        rounds.push(admitted);
    }
    panic!("{rounds:?}");
}

async fn order_of_admissions(make: Make<'_>) -> Vec<usize> {
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
    admitted
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

/// Limits with a burst of 10 requests, 100 input tokens, 50 output tokens and 4 images, which add as much each second.
fn four_budgets() -> Limits {
    Limits::new()
        .requests(Rate::per_second(10))
        .input_tokens(Rate::per_second(100))
        .output_tokens(Rate::per_second(50))
        .budget("images", Rate::per_second(4))
}

/// Returns what the limiter holds of the budgets of [`four_budgets`].
fn left(limiter: &RateLimiter) -> [Option<u64>; 4] {
    ["requests", "input_tokens", "output_tokens", "images"].map(|budget| limiter.available().of(budget))
}

async fn all_budgets_or_none(make: Make<'_>) {
    let limiter = make(four_budgets());
    let cost = Cost::input_output_tokens(60, 10).with("images", 1);
    limiter.acquire(cost).await.unwrap();
    assert_eq!(left(&limiter), [Some(9), Some(40), Some(40), Some(3)]);
    // Only the input tokens are missing, and nothing is taken of the other budgets.
    let error = limiter.try_acquire(cost).unwrap_err();
    assert_eq!(error.retry_after(), Some(ms(200)));
    assert!(limiter.try_acquire_estimate(cost.with("images", 4)).is_err());
    assert_eq!(left(&limiter), [Some(9), Some(40), Some(40), Some(3)]);
    let start = Instant::now();
    limiter.acquire(cost).await.unwrap();
    assert_took(start, ms(200));
    // A budget without a rate is not limited, and a cost of nothing is always admitted.
    limiter.acquire(Cost::none().with("seconds", u64::MAX)).await.unwrap();
    limiter.acquire(Cost::none()).await.unwrap();
    assert_took(start, ms(200));
    let error = limiter.acquire(cost.with("images", 5)).await.unwrap_err();
    assert!(matches!(error, AcquireError::CostExceedsBurst(error) if error.budget() == "images"));
    assert_eq!(limiter.check(cost.with("images", 5)).unwrap_err().budget(), "images");
}

async fn settled_by_budget(make: Make<'_>) {
    let limiter = make(four_budgets());
    let estimate = limiter
        .try_acquire_estimate(Cost::input_output_tokens(80, 50).with("images", 4))
        .unwrap();
    assert_eq!(left(&limiter), [Some(9), Some(20), Some(0), Some(0)]);
    // More input than estimated leaves a debt, less output and fewer images are refunded.
    limiter.settle(estimate, Cost::input_output_tokens(150, 20).with("images", 1));
    assert_eq!(left(&limiter), [Some(9), Some(0), Some(30), Some(3)]);
    let waits = [("input_tokens", 51), ("output_tokens", 0), ("images", 0)];
    for (budget, wait) in waits {
        assert_eq!(
            limiter.wait_for(Cost::none().with(budget, 1)),
            ms(wait * 10),
            "{budget}"
        );
    }
}

async fn asked_by_name(make: Make<'_>) {
    let limiter = make(four_budgets());
    assert_eq!(
        (limiter.available().of("images"), limiter.available().of("image")),
        (Some(4), None)
    );
    limiter.lower("images", None, 1);
    limiter.lower("image", None, 0);
    assert_eq!(left(&limiter), [Some(10), Some(100), Some(50), Some(1)]);
    assert!(limiter.adopt("images", None, 8).unwrap());
    assert!(!limiter.adopt("images", None, 8).unwrap());
    assert_eq!(limiter.wait_for(Cost::none().with("images", 2)), ms(125));
}

async fn ready(make: Make<'_>) {
    let limiter = make(four_budgets());
    limiter.acquire(Cost::none().with("images", 4)).await.unwrap();
    let start = Instant::now();
    let cost = Cost::input_output_tokens(10, 10).with("images", 1);
    limiter.ready(cost).await.unwrap();
    assert_took(start, ms(250));
    assert_eq!(left(&limiter), [Some(10), Some(100), Some(50), Some(1)]);
    limiter.try_acquire(cost).unwrap();
    let error = limiter.ready(Cost::none().with("images", 5)).await.unwrap_err();
    assert!(matches!(error, AcquireError::CostExceedsBurst(_)));
}

async fn waits(make: Make<'_>) {
    // The calls name more budgets than the limits may have. Each counts, whichever the first ones are.
    let limiter = make(Limits::new().requests(Rate::per_second(10).burst(1)));
    limiter.acquire(Cost::request()).await.unwrap();
    let names: Vec<String> = (0..6_u64).map(|number| format!("waits-{number}")).collect();
    let waiting: Vec<_> = (0..6_usize)
        .map(|number| {
            let (limiter, cost) = (limiter.clone(), Cost::request().with(&*names[number], 10));
            tokio::spawn(async move {
                match number {
                    0..3 => limiter.acquire(cost).await,
                    _ => limiter.acquire_estimate(cost).await.map(drop),
                }
            })
        })
        .collect();
    sleep(ms(10)).await;
    for name in &names {
        let limits = Limits::new().requests(Rate::per_second(10).burst(1));
        limiter
            .set_limits(limits.budget(&**name, Rate::per_second(10).initial(0)))
            .unwrap();
        let error = limiter.try_acquire(Cost::none().with(&**name, 1)).unwrap_err();
        assert!(error.retry_after() >= Some(ms(1_090)), "{name}: {error}");
        assert!(limiter.wait_for(Cost::request()) >= ms(590), "{name}");
    }
    limiter.set_limits(Limits::new()).unwrap();
    for call in join_all(waiting).await {
        call.unwrap().unwrap();
    }
}

async fn added(make: Make<'_>) {
    let limiter = make(four_budgets());
    limiter
        .acquire(Cost::input_output_tokens(90, 50).with("images", 3))
        .await
        .unwrap();
    let start = Instant::now();
    let waiting = tokio::spawn({
        let limiter = limiter.clone();
        async move {
            limiter
                .acquire(Cost::input_output_tokens(30, 1).with("seconds", 7))
                .await
        }
    });
    sleep(ms(10)).await;
    // The same rates in another order keep what they hold. The waiter needs the new budget, too.
    let reordered = Limits::new()
        .budget("seconds", Rate::per_second(10).initial(2))
        .budget("images", Rate::per_second(4))
        .output_tokens(Rate::per_second(50))
        .input_tokens(Rate::per_second(100))
        .requests(Rate::per_second(10));
    limiter.set_limits(reordered).unwrap();
    assert_eq!(left(&limiter), [Some(9), Some(11), Some(0), Some(1)]);
    assert_eq!(limiter.available().of("seconds"), Some(2));
    waiting.await.unwrap().unwrap();
    assert_took(start, ms(510));
    // A budget whose rate is gone is not limited any more.
    limiter
        .set_limits(Limits::new().requests(Rate::per_second(10)))
        .unwrap();
    limiter.acquire(Cost::request().with("images", 1_000)).await.unwrap();
    assert_took(start, ms(510));
}

async fn too_many(make: Make<'_>) {
    let names = ["a", "b", "c", "d", "e"];
    let limits = |names: &[&str]| {
        let rates = names.iter().map(|name| (*name, Rate::per_second(1)));
        rates.fold(Limits::new(), |limits, (name, rate)| limits.budget(name, rate))
    };
    let limiter = make(limits(&names[..4]));
    assert_eq!(limiter.set_limits(limits(&names)).unwrap_err().field(), "limits");
    assert_eq!(limiter.limits(), limits(&names[..4]));
    assert!(RateLimiter::new(limits(&names)).is_err());
    // Names that differ in case or length are other names.
    let error = limiter.set_limits(limits(&["A"])).unwrap_err();
    assert_eq!(error.field(), "budget");
    limiter.set_limits(limits(&["a", "aa"])).unwrap();
    limiter.acquire(Cost::none().with("a", 1)).await.unwrap();
    assert_eq!(["a", "aa"].map(|name| limiter.available().of(name)), [Some(0), Some(1)]);
}

#[tokio::test(start_paused = true)]
async fn the_local_limiter_passes_every_case() {
    for (name, case) in CASES.iter().chain(NAMED_CASES) {
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
    for (name, _) in NAMED_CASES {
        println!("skipped, because a shared limiter does not count these budgets yet: {name}");
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
