//! Hostile input: the largest and the smallest numbers, texts that are hard to redact, and user code that misbehaves.
//! Such input must not hang the crate, harm another call, or cause a panic where the test does not expect one.

mod support;

use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
use std::{
    cell::Cell,
    collections::BTreeMap,
    error::Error as StdError,
    fmt,
    future::{Future, pending},
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
    thread,
    time::{Duration, SystemTime},
};
use support::{HANG, client, ms, request, settle, within_a_minute};
use tokio::time::{self, Instant, timeout};
use tokio_test::task;
use tower::{BoxError, Layer, Service, ServiceExt, service_fn};
use tower_outbound::{
    ApiTokens, Call, Concurrency, Cost, EventLayer, Executor, ExecutorBuilder, Limits, NetworkRequestEvent, QueueLayer,
    Rate, RateLimiter, RequestStatus, Shutdown,
    error::CostExceedsBurst,
    event::{self, Http, Metadata, Value},
    executor::{BudgetRate, Config},
    rate::{Amount, Budget},
};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
const YEAR: Duration = Duration::from_secs(365 * 24 * 60 * 60);
const MEGA: usize = 1_000_000;
/// The budgets that are built in, and one that the user has named.
const BUDGETS: [&str; 5] = ["requests", "tokens", "input_tokens", "output_tokens", "images"];

fn unlimited() -> ExecutorBuilder {
    Executor::builder().limits(Limits::new())
}

/// Makes a call with this request to a client that returns this outcome, and returns the event that was recorded.
async fn recorded(request: Request<()>, outcome: Result<Response<()>, BoxError>) -> NetworkRequestEvent {
    let outcome = Mutex::new(Some(outcome));
    let service = service_fn(move |_: Request<()>| std::future::ready(outcome.lock().unwrap().take().unwrap()));
    let call = EventLayer::calling().layer(service).call(request);
    let event = call.event();
    let _ = call.await;
    event.snapshot()
}

// --- numbers ---

/// Returns the cost of this amount of every budget.
fn of_each(amount: u64) -> Cost {
    BUDGETS
        .iter()
        .fold(Cost::none(), |cost, budget| cost.with(*budget, amount))
}

/// Returns limits with this rate for every budget, beginning with the one at `first`.
fn for_each(rate: Rate, first: usize) -> Limits {
    let budgets = BUDGETS.iter().cycle().skip(first % BUDGETS.len()).take(BUDGETS.len());
    budgets.fold(Limits::new(), |limits, budget| limits.budget(*budget, rate))
}

/// Returns amounts for a rate: the smallest and the largest that can be counted, and others that are out of range.
fn amounts() -> Vec<Amount> {
    let whole = [0, 1, 3, 1_000_003, 1 << 63, u64::MAX - 1, u64::MAX].map(Amount::from);
    let negative = [-1, i64::MIN].map(Amount::from);
    let fractions = [
        f64::NAN,
        f64::INFINITY,
        f64::NEG_INFINITY,
        f64::MIN_POSITIVE,
        f64::MAX,
        f64::EPSILON,
        -0.0,
        -1.0,
        0.000_000_4,
        0.000_001,
        0.5,
        1.5,
        18_446_744_073_709.0,
        18_446_744_073_710.5,
    ]
    .map(Amount::from);
    whole.into_iter().chain(negative).chain(fractions).collect()
}

fn periods() -> [Duration; 8] {
    [
        Duration::ZERO,
        Duration::from_nanos(1),
        Duration::from_nanos(999_999_937),
        Duration::from_secs(60),
        100 * YEAR,
        Duration::from_nanos(i64::MAX as u64),
        Duration::from_nanos(i64::MAX as u64 + 1),
        Duration::MAX,
    ]
}

#[tokio::test(start_paused = true)]
async fn extreme_rates_are_counted_or_refused_and_their_field_is_named() {
    let (mut counted, mut refused) = (0, 0);
    let mut limiters: Vec<(Limits, u64, RateLimiter)> = Vec::new();
    let some = |amounts: Vec<Amount>| -> Vec<Option<Amount>> { amounts.into_iter().map(Some).chain([None]).collect() };
    for amount in amounts() {
        for period in periods() {
            for burst in some(amounts()) {
                for initial in [
                    None,
                    Some(Amount::from(0)),
                    Some(Amount::from(u64::MAX)),
                    Some(Amount::from(0.5)),
                ] {
                    let number = counted + refused;
                    let rate = Rate::new(amount, period);
                    let rate = burst.map_or(rate, |burst| rate.burst(burst));
                    let rate = initial.map_or(rate, |initial| rate.initial(initial));
                    let rate = if number % 3 == 0 { rate.refuse() } else { rate };
                    let limits = for_each(rate, number);
                    let limiter = match RateLimiter::new(limits.clone()) {
                        Ok(limiter) => limiter,
                        Err(error) => {
                            let field = error.field().strip_prefix(BUDGETS[number % BUDGETS.len()]);
                            assert!(
                                [".amount", ".period", ".burst", ".initial"].map(Some).contains(&field),
                                "{rate:?}: {error}"
                            );
                            refused += 1;
                            continue;
                        }
                    };
                    counted += 1;
                    let burst = burst_of(&limiter, BUDGETS[0]);
                    let start = limiter.available().requests.unwrap();
                    assert!((1..=u64::MAX).contains(&burst) && start <= burst, "{rate:?}");
                    // A budget without a rate is not limited. All that is available of every budget can be taken at
                    // once, and then none is left.
                    limiter.try_acquire(Cost::none().with("seconds", u64::MAX)).unwrap();
                    limiter.try_acquire(of_each(start)).unwrap();
                    let is_empty = || BUDGETS.iter().all(|budget| limiter.available().of(*budget) == Some(0));
                    assert!(is_empty(), "{rate:?}: {:?}", limiter.available());
                    for budget in BUDGETS {
                        assert_eq!(burst_of(&limiter, budget), burst, "{budget}: {rate:?}");
                        let later = limiter
                            .try_acquire(Cost::none().with(budget, 1))
                            .unwrap_err()
                            .retry_after();
                        assert!(later.is_some_and(|later| !later.is_zero()), "{budget}: {rate:?}");
                    }
                    // Estimates of 0 are settled with the largest and the smallest true costs. This leaves debts in every
                    // budget, and never brings anything back.
                    for used in [u64::MAX, 0, 1] {
                        let nothing = limiter.acquire_estimate(Cost::none()).await.unwrap();
                        nothing.settle(of_each(used).with("seconds", u64::MAX));
                        assert!(is_empty(), "{rate:?}: {:?}", limiter.available());
                    }
                    if limiters.len() < 64 || counted % 97 == 0 {
                        limiters.push((limits, burst, limiter));
                    }
                }
            }
        }
    }
    assert!(counted > 500 && refused > 5_000, "{counted} {refused}");
    // Each limiter, which is in debt, gets the limits of all the limiters one after the other, while time passes.
    limiters.truncate(100);
    for (_, _, limiter) in &limiters {
        for (limits, burst, _) in &limiters {
            limiter.set_limits(limits.clone()).unwrap();
            time::advance(Duration::from_nanos(1)).await;
            for budget in BUDGETS {
                assert_eq!(burst_of(limiter, budget), *burst);
                assert!(limiter.available().of(budget).unwrap() <= *burst);
            }
            let _ = limiter.try_acquire(of_each(1));
        }
    }
    time::advance(100 * YEAR).await;
    for (_, _, limiter) in &limiters {
        let _ = (limiter.available(), limiter.try_acquire(of_each(1)));
    }
}

/// Returns the burst of a budget, as the error of a call that costs more of it tells.
fn burst_of(limiter: &RateLimiter, budget: &'static str) -> u64 {
    match limiter.check(Cost::none().with(budget, u64::MAX)) {
        Err(never) => {
            assert_eq!(never.budget(), budget);
            never.burst()
        }
        Ok(()) => u64::MAX,
    }
}

#[tokio::test(start_paused = true)]
async fn days_and_months_at_any_time_of_the_calendar_end_or_are_refused_and_their_field_is_named() {
    let mut counted = 0;
    let epoch = SystemTime::UNIX_EPOCH;
    for now in [epoch - YEAR, epoch, epoch + 56 * YEAR, epoch + 500 * YEAR] {
        for (number, amount) in amounts().into_iter().enumerate() {
            for starting_at in [Duration::ZERO, Duration::from_nanos(1), DAY - ms(1), DAY, Duration::MAX] {
                for rate in [Rate::utc_day(amount), Rate::utc_month(amount)] {
                    let rate = if number % 2 == 0 { rate.refuse() } else { rate };
                    let limiter = match RateLimiter::at(for_each(rate.starting_at(starting_at), number), now) {
                        Ok(limiter) => limiter,
                        Err(error) => {
                            let field = error.field().strip_prefix(BUDGETS[number % BUDGETS.len()]);
                            let known = [".amount", ".starting_at", ".burst"].map(Some).contains(&field);
                            assert!(known, "{rate:?}: {error}");
                            continue;
                        }
                    };
                    counted += 1;
                    let whole = limiter.available().requests.unwrap();
                    limiter.try_acquire(of_each(whole)).unwrap();
                    for budget in BUDGETS {
                        assert_eq!(limiter.available().of(budget), Some(0), "{now:?}, {rate:?}");
                        let refused = limiter.try_acquire(Cost::none().with(budget, 1)).unwrap_err();
                        let later = refused.retry_after().unwrap();
                        assert!(
                            (Duration::from_nanos(1)..=31 * DAY).contains(&later),
                            "{now:?}, {rate:?}: {later:?}"
                        );
                    }
                }
            }
        }
    }
    assert!(counted > 100, "{counted}");
}

#[tokio::test(start_paused = true)]
async fn a_token_a_nanosecond_and_one_in_a_hundred_years_are_exact() {
    let fast = Rate::new(u64::MAX, Duration::from_nanos(1)).burst(1);
    let slow = Rate::new(1, 100 * YEAR);
    for budget in BUDGETS {
        let one = Cost::none().with(budget, 1);
        // The other budgets are not what the calls wait for.
        let with = |rate: Rate| {
            let others = for_each(Rate::per_second(1).refuse(), 0);
            let others = others.rates().filter(|(of, _)| of.name() != budget);
            let others = others.fold(Limits::new(), |limits, (of, rate)| limits.budget(of, rate));
            RateLimiter::new(others.budget(budget, rate)).unwrap()
        };
        let limiter = with(fast);
        for _ in 0..3 {
            limiter.try_acquire(one).unwrap();
            assert_eq!(limiter.available().of(budget), Some(0));
            time::advance(Duration::from_nanos(1)).await;
            assert_eq!(limiter.available().of(budget), Some(1));
        }
        let limiter = with(slow);
        limiter.try_acquire(one).unwrap();
        let later = limiter.try_acquire(one).unwrap_err().retry_after();
        assert_eq!(later, Some(100 * YEAR), "{budget}");
        time::advance(100 * YEAR - Duration::from_nanos(1)).await;
        let later = limiter.try_acquire(one).unwrap_err().retry_after();
        assert_eq!(later, Some(Duration::from_nanos(1)), "{budget}");
        time::advance(Duration::from_nanos(1)).await;
        limiter.try_acquire(one).unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn an_estimate_settled_at_the_extremes_leaves_a_debt_that_is_paid_off() {
    for (first, used) in [0, 1, 1_000, u64::MAX - 1, u64::MAX].into_iter().enumerate() {
        // By default, the debt would be bounded.
        let rate = Rate::per_second(1_000).max_debt(u64::MAX);
        for budget in BUDGETS {
            let limiter = RateLimiter::new(for_each(rate, first)).unwrap();
            let estimate = limiter.acquire_estimate(of_each(1_000)).await.unwrap();
            // What the call has used of one budget settles no other.
            estimate.settle(Cost::none().with(budget, used));
            let left = 1_000_u64.saturating_sub(used);
            for of in BUDGETS {
                assert_eq!(
                    limiter.available().of(of),
                    Some(if of == budget { left } else { 1_000 })
                );
            }
            let later = limiter
                .try_acquire(of_each(1_000))
                .err()
                .and_then(|error| error.retry_after());
            // The rate of 1,000 per second pays off what was used, at 1 ms each. A wait that does not fit into 64 bits of
            // nanoseconds is reported as the longest one that does.
            let debt = Duration::from_millis(used);
            let expected = (used > 0).then(|| debt.min(Duration::from_nanos(u64::MAX)));
            assert_eq!(later, expected, "{budget}: {used}");
            if used == 1_000 {
                time::advance(ms(1_000)).await;
                limiter.try_acquire(of_each(1_000)).unwrap();
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn the_longest_possible_pause_is_a_long_pause() {
    let far = Instant::now() + 100 * YEAR;
    for until in [Some(far), None] {
        let limiter = RateLimiter::new(Limits::new().requests(Rate::per_second(10))).unwrap();
        match until {
            Some(until) => limiter.pause_until(until),
            None => limiter.pause_for(Duration::MAX),
        }
        assert!(limiter.available().paused_until.is_some_and(|until| until >= far));
        let later = limiter.try_acquire(Cost::request()).unwrap_err().retry_after();
        assert!(later.is_some_and(|later| later >= 99 * YEAR), "{later:?}");
        timeout(YEAR, limiter.acquire(Cost::request())).await.unwrap_err();
        // An executor can be stopped while a call waits for the end of the pause.
        let executor = Executor::builder().limiter(limiter).build(client(ms(0)).0).unwrap();
        executor.start().unwrap();
        let call = executor.submit(request("call")).await.unwrap();
        let report = executor.stop(Shutdown::Within(YEAR)).await;
        assert_eq!((report.cancelled, report.elapsed), (1, YEAR));
        assert!(call.await.unwrap_err().is_cancelled());
    }
}

#[tokio::test(start_paused = true)]
async fn a_million_limits_hold_at_once() {
    let limits = (0..MEGA).fold(Limits::new(), |limits, number| {
        let burst = if number == MEGA / 2 { 2 } else { 3 };
        limits.requests(Rate::per_second(1).burst(burst))
    });
    let limiter = RateLimiter::new(limits).unwrap();
    assert_eq!(limiter.available().requests, Some(2));
    limiter.try_acquire(Cost::request()).unwrap();
    limiter.try_acquire(Cost::request()).unwrap();
    let later = limiter.try_acquire(Cost::request()).unwrap_err().retry_after();
    assert_eq!(later, Some(ms(1_000)));
    limiter.acquire(Cost::request()).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_call_that_costs_nothing_is_admitted_and_one_above_the_burst_is_refused() {
    let limits = for_each(Rate::per_second(1), 0).budget("cents", Rate::utc_day(1).refuse());
    let (client, arrivals) = client(ms(0));
    let executor = Executor::builder()
        .limits(limits)
        .cost(|req: &Request<&'static str>| {
            let tokens = req.extensions().get::<ApiTokens>().map_or(0, |tokens| tokens.0);
            let budget = req.extensions().get::<Budget>();
            budget.map_or(Cost::none(), |budget| Cost::none().with(*budget, tokens))
        })
        .build(client)
        .unwrap();
    executor.start().unwrap();
    for _ in 0..100 {
        executor.submit(request("nothing")).await.unwrap().await.unwrap();
    }
    assert_eq!(arrivals.times()[99], ms(0));
    let heavy = |budget: Budget, cost| {
        let mut request = request("heavy");
        request.extensions_mut().insert(budget);
        Call::from(request).tokens(cost)
    };
    for budget in BUDGETS.iter().chain(&["cents"]) {
        for cost in [2, u64::MAX] {
            let heavy = || heavy(Budget::from(*budget), cost);
            let error = executor.submit(heavy()).await.unwrap_err();
            let error = error.find::<CostExceedsBurst>().unwrap();
            assert_eq!((error.budget(), error.cost(), error.burst()), (*budget, cost, 1));
            assert!(!executor.try_submit(heavy()).unwrap_err().is_full());
        }
    }
    // Without limits, a call of `u64::MAX` tokens is admitted.
    executor.monitor().limiter().set_limits(Limits::new()).unwrap();
    let call = executor.submit(heavy(Budget::Tokens, u64::MAX)).await.unwrap();
    assert_eq!(call.event().snapshot().api_tokens, u64::MAX);
    call.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn extreme_numbers_of_places_permits_and_workers_work_or_are_refused_and_named() {
    let field = |builder: ExecutorBuilder| {
        let built = builder.build_for_closures::<()>();
        built.err().map(|error| error.field().to_owned())
    };
    assert_eq!(field(unlimited().queue_capacity(usize::MAX)), None);
    assert_eq!(field(unlimited().concurrency_limit(usize::MAX)), None);
    assert_eq!(field(unlimited().workers(usize::MAX)).as_deref(), Some("workers"));
    assert_eq!(QueueLayer::<()>::new(0).unwrap_err().field(), "queue_capacity");
    assert_eq!(
        QueueLayer::<()>::new(1)
            .unwrap()
            .workers(usize::MAX)
            .unwrap_err()
            .field(),
        "workers"
    );

    let builder = unlimited().queue_capacity(usize::MAX).concurrency_limit(usize::MAX);
    let executor = builder.build(client(ms(10)).0).unwrap();
    executor.start().unwrap();
    let limit = executor.monitor().concurrency().clone();
    for _ in 0..10_000 {
        drop(executor.try_submit(request("call")).unwrap());
    }
    // Each call is started by a task of its own, one after the other.
    for _ in 0..10 {
        settle().await;
    }
    assert_eq!(limit.in_flight(), 10_000);
    // The concurrency limit is lowered to 1 and raised again while calls run and wait.
    limit.set(1).unwrap();
    assert_eq!(limit.set(0).unwrap_err().field(), "concurrency_limit");
    assert_eq!(limit.get(), 1);
    let waits = executor.submit(request("waits")).await.unwrap();
    settle().await;
    assert_eq!(executor.monitor().queue_depth(), 1);
    limit.set(usize::MAX).unwrap();
    settle().await;
    assert_eq!((limit.in_flight(), executor.monitor().queue_depth()), (10_001, 0));
    waits.await.unwrap();
    assert_eq!(executor.stop(Shutdown::Graceful).await.cancelled, 0);
    assert_eq!(limit.in_flight(), 0);
    assert_eq!(Concurrency::new(0).unwrap_err().field(), "concurrency_limit");
}

#[test]
fn extreme_configs_build_an_executor_or_are_refused_and_their_field_is_named() {
    let floats = [
        f64::NAN,
        f64::INFINITY,
        f64::NEG_INFINITY,
        f64::MIN_POSITIVE,
        f64::MAX,
        f64::MIN,
        -0.0,
        0.0,
        1e-9,
        1e-6,
        1.0,
        1e9,
        1e15,
        1e300,
    ];
    let sizes = [0, 1, usize::MAX];
    let with = |change: &dyn Fn(&mut Config)| {
        let mut config = Config::default();
        change(&mut config);
        config
    };
    let named = |config: Config, fields: &[&str]| {
        let built = config
            .clone()
            .into_builder()
            .and_then(|builder| builder.build_for_closures::<()>());
        match built {
            Ok(_) => true,
            Err(error) => {
                assert!(fields.contains(&error.field()), "{config:?}: {error}");
                false
            }
        }
    };
    let mut built = 0;
    for size in sizes {
        built += usize::from(named(with(&|c| c.queue_capacity = size), &["queue_capacity"]));
        built += usize::from(named(with(&|c| c.concurrency_limit = size), &["concurrency_limit"]));
        built += usize::from(named(with(&|c| c.workers = size), &["workers"]));
    }
    assert_eq!(built, 5);
    for rate in floats {
        for period in floats {
            for burst in floats.map(Some).into_iter().chain([None]) {
                let change = |config: &mut Config| {
                    (config.requests_rate, config.requests_period_secs, config.requests_burst) = (rate, period, burst);
                };
                named(
                    with(&change),
                    &["requests_rate", "requests_period_secs", "requests_burst"],
                );
                let change = |config: &mut Config| {
                    (config.tokens_rate, config.tokens_period_secs, config.tokens_burst) = (Some(rate), period, burst);
                };
                named(with(&change), &["tokens_rate", "tokens_period_secs", "tokens_burst"]);
                for name in ["input_tokens", "output_tokens", "images"] {
                    let change = |config: &mut Config| {
                        let ordinary = BudgetRate {
                            rate: 1.0,
                            period_secs: 60.0,
                            burst: None,
                        };
                        let extreme = BudgetRate {
                            rate,
                            period_secs: period,
                            burst,
                        };
                        let rates = |of| {
                            if of == name {
                                vec![ordinary.clone(), extreme.clone()]
                            } else {
                                vec![ordinary.clone()]
                            }
                        };
                        let names = ["cents", "images", "input_tokens", "output_tokens"];
                        config.budgets = names.map(|of| (of.to_owned(), rates(of))).into();
                    };
                    let fields = ["rate", "period_secs", "burst"].map(|field| format!("budgets.{name}.{field}"));
                    named(with(&change), &fields.each_ref().map(String::as_str));
                }
            }
        }
    }
}

#[cfg(feature = "serde")]
#[test]
fn a_config_of_garbage_is_an_error_and_never_a_panic() {
    for value in [
        r#""1000000000000000y""#,
        r#""-1s""#,
        r#""NaN""#,
        "null",
        "-1",
        "1e400",
        "[]",
        "{}",
        "true",
        "18446744073709551616",
        "99999999999999999999999999999999999999999999",
    ] {
        for setting in [
            format!(r#""queue_capacity": {value}"#),
            format!(r#""workers": {value}"#),
            format!(r#""requests_rate": {value}"#),
            format!(r#""tokens_period_secs": {value}"#),
            format!(r#""budgets": {{ "images": [], "cents": [1, {value}] }}"#),
            format!(r#""budgets": {{ "images": [{{ "rate": {value} }}] }}"#),
            format!(r#""budgets": {{ "output_tokens": [{{ "rate": 1 }}, {{ "rate": 1, "period_secs": {value} }}] }}"#),
            format!(r#""budgets": {{ "input-tokens": [{{ "rate": 1 }}], "images": [{value}] }}"#),
        ] {
            let json = format!("{{ {setting} }}");
            let built = serde_json::from_str::<Config>(&json)
                .map_err(|error| error.to_string())
                .and_then(|config| config.into_builder().map_err(|error| error.to_string()))
                .and_then(|builder| builder.build_for_closures::<()>().map_err(|error| error.to_string()));
            let error = built.map(drop).unwrap_err();
            assert!(!error.is_empty(), "{json}");
        }
    }
    let unknown = serde_json::from_str::<Config>(r#"{ "requests_rat": 1 }"#).unwrap_err();
    assert!(unknown.to_string().contains("requests_rat"));
}

#[cfg(feature = "serde")]
#[tokio::test]
async fn an_event_with_a_time_that_cannot_be_written_is_an_error_and_never_a_panic() {
    let event = recorded(Request::new(()), Ok(Response::new(()))).await;
    let json = serde_json::to_value(&event).unwrap();
    for time in [
        std::time::SystemTime::UNIX_EPOCH - YEAR,
        std::time::SystemTime::UNIX_EPOCH + 100_000 * YEAR,
    ] {
        let mut odd = event.clone();
        odd.created_at = time;
        assert!(serde_json::to_string(&odd).is_err());
        let mut odd = event.clone();
        odd.completed_at = Some(time);
        assert!(serde_json::to_string(&odd).is_err());
    }
    for text in [
        "1000000000000000y",
        "",
        "NaN",
        "-1",
        "2026-13-40T25:61:61Z",
        "99999-01-01T00:00:00Z",
    ] {
        let mut odd = json.clone();
        odd["created_at"] = text.into();
        assert!(serde_json::from_value::<NetworkRequestEvent>(odd).is_err(), "{text}");
    }
}

// --- texts ---

#[test]
fn urls_inside_urls_are_redacted_however_deep_they_are() {
    within_a_minute(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            for depth in [1, 2, 3, 5, 10, 40, 1_000, 10_000] {
                let url = format!("http://h/{}?token=s3cret", "?x=http://h/".repeat(depth));
                // A nested URL with a secret is recorded in the `location` header of a redirect, in the text of an
                // error, and as the URL of a request.
                let response = Response::builder().header("location", &url).body(()).unwrap();
                let event = recorded(Request::new(()), Ok(response)).await;
                assert!(!format!("{event:?}").contains("s3cret"), "depth {depth}");
                let event = recorded(Request::new(()), Err(format!("redirected to {url}").into())).await;
                assert!(!format!("{event:?}").contains("s3cret"), "depth {depth}");
                if let Ok(request) = Request::get(&url).body(()) {
                    let event = recorded(request, Ok(Response::new(()))).await;
                    assert!(!format!("{event:?}").contains("s3cret"), "depth {depth}");
                }
                // A nested URL without secrets is recorded unchanged up to a depth of 3.
                let harmless = format!("http://h/{}?page=2", "?x=http://h/".repeat(depth));
                let event = recorded(Request::new(()), Err(harmless.clone().into())).await;
                if depth <= 3 {
                    assert_eq!(event.error_message, Some(harmless));
                }
            }
            // Secrets are also redacted in nested fragments, in many URLs side by side, and in percent-encoded URLs.
            let encoded = (0..6).fold("?token=s3cret".to_owned(), |inner, _| {
                let inner = inner
                    .replace('%', "%25")
                    .replace('/', "%2F")
                    .replace('?', "%3F")
                    .replace('=', "%3D");
                format!("?x=http%3A%2F%2Fh%2F{inner}&y=1")
            });
            for text in [
                format!("http://h/#{}token=s3cret", "a=http://h/#".repeat(1_000)),
                format!("http://h/{}", "?x=http://h/?token=s3cret&".repeat(1_000)),
                format!("http://h/{encoded}"),
            ] {
                let event = recorded(Request::new(()), Err(text.into())).await;
                let text = format!("{event:?}");
                assert!(
                    !text.contains("token=s3cret") && !text.contains("token%3Ds3cret"),
                    "{text}"
                );
            }
        });
    });
}

#[test]
fn long_texts_of_any_kind_are_recorded_without_a_hang() {
    within_a_minute(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            for piece in [
                "a",
                " ",
                "\"",
                "\\\"",
                "/",
                "//",
                "?",
                "=",
                "&",
                "#",
                "%",
                "%2",
                "%25",
                "%zz",
                "@",
                ":",
                "a@",
                "?a=",
                "&a=",
                "bearer ",
                "basic ",
                "\":\"",
                "\"token\":\"",
                "\"token\" : ",
                "{\"",
                "([{'",
                ")]}'",
                "é",
                "\u{0}",
                "http://",
                "//?x=",
                "http://u:p@h/?a=b#c ",
            ] {
                // If redaction took quadratic time, a text of 100,000 bytes would not be recorded within the minute.
                let text = piece.repeat(100_000 / piece.len());
                let event = recorded(Request::new(()), Err(text.clone().into())).await;
                assert!(event.error_message.is_some(), "{piece:?}");
                if let Ok(value) = HeaderValue::from_str(&text) {
                    let mut response = Response::new(());
                    response.headers_mut().insert("location", value);
                    let event = recorded(Request::new(()), Ok(response)).await;
                    assert_eq!(event.response_headers.len(), 1, "{piece:?}");
                }
            }
            // Names of metadata may be as long as these texts. One name ends in `token`, so its value is redacted.
            let secret = BTreeMap::from([
                ("-".repeat(MEGA / 10) + "token", Value::from("s3cret")),
                ("aB".repeat(MEGA / 10), Value::from("kept")),
            ]);
            let request = Request::builder().extension(Metadata(secret)).body(()).unwrap();
            let event = recorded(request, Ok(Response::new(()))).await;
            let text = format!("{:?}", event.metadata.values());
            assert!(text.contains("kept") && !text.contains("s3cret"));
        });
    });
}

#[test]
fn a_large_header_is_shared_with_its_record_and_not_copied() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let value = HeaderValue::from_str(&"a b/c?d=e".repeat(MEGA / 9)).unwrap();
    let mut kept = Vec::new();
    let counted = allocation_counter::measure(|| {
        for _ in 0..2 {
            let request = Request::builder().header("x-large", value.clone()).body(()).unwrap();
            let call = EventLayer::calling()
                .layer(service_fn(async |_: Request<()>| Ok::<_, BoxError>(Response::new(()))))
                .call(request);
            kept.push(call.event());
            runtime.block_on(call).unwrap();
        }
    });
    assert_eq!(kept[0].snapshot().headers["x-large"], value);
    assert!(
        counted.bytes_current < 100_000,
        "{} bytes are still allocated",
        counted.bytes_current
    );
    // Redaction may use some memory while it runs, but less than eight times the size of the header.
    assert!(counted.bytes_max < 8 * MEGA as u64, "{} bytes", counted.bytes_max);
}

#[tokio::test]
async fn as_many_headers_as_there_can_be_are_recorded() {
    let mut headers = HeaderMap::new();
    for _ in 0..50_000 {
        headers.append("x-0", HeaderValue::from_static("http://u:s3cret@h/"));
    }
    for number in 0.. {
        let name = HeaderName::from_bytes(format!("x-{number}").as_bytes()).unwrap();
        if headers.try_append(name, HeaderValue::from_static("a/b")).is_err() {
            break;
        }
    }
    assert!(headers.len() > 10_000);
    let mut request = Request::new(());
    *request.headers_mut() = headers.clone();
    let mut response = Response::new(());
    *response.headers_mut() = headers.clone();
    let event = recorded(request, Ok(response)).await;
    assert_eq!(
        (event.headers.len(), event.response_headers.len()),
        (headers.len(), headers.len())
    );
    assert!(!format!("{event:?}").contains("s3cret"));
}

#[tokio::test]
async fn a_secret_is_redacted_however_its_name_is_written() {
    for name in [
        "AUTHORIZATION",
        "Proxy-Authorization",
        "x-API-key",
        "X_Api_Key",
        "aPi-KeY",
        "Ocp-Apim-Subscription-KEY",
        "COOKIE",
        "Set-Cookie",
        "X-AMZ-Security-Token",
        "X-Goog-API-Key",
        "x-functions-key",
        "AccessToken",
        "client_SECRET",
        "x-Hub-Signature-256",
        "x--auth",
        "-token-",
        "PASSWORD",
    ] {
        let request = Request::get(format!("http://h/?a=1&{name}=s3cret&b=2"))
            .header(name, "s3cret")
            .extension(Metadata([(name.to_owned(), "s3cret".into())].into()))
            .body(())
            .unwrap();
        let response = Response::builder().header(name, "s3cret").body(()).unwrap();
        let event = recorded(request, Ok(response)).await;
        assert!(!format!("{event:?}").contains("s3cret"), "{name}: {event:?}");
        assert!(event.endpoint_url.unwrap().ends_with("&b=2"), "{name}");
        // The secret is also redacted if each letter of its name is percent-encoded.
        let encoded: String = name.bytes().map(|byte| format!("%{byte:02x}")).collect();
        let request = Request::get(format!("/?{encoded}=s3cret")).body(()).unwrap();
        let event = recorded(request, Err(format!("at /?{encoded}=s3cret and").into())).await;
        assert!(!format!("{event:?}").contains("s3cret"), "{name}: {event:?}");
    }
}

#[tokio::test]
async fn values_that_are_not_text_and_unusual_urls_are_recorded_unchanged() {
    let mut headers = HeaderMap::new();
    headers.append("x-bytes", HeaderValue::from_bytes(b"\xff\xfe\x80 plain").unwrap());
    headers.append(
        "x-bytes",
        HeaderValue::from_bytes(b"\xc3\x28 http://u:s3cret@h/").unwrap(),
    );
    headers.append("cookie", HeaderValue::from_bytes(b"\xffs3cret").unwrap());
    headers.append("x-empty", HeaderValue::from_static(""));
    let mut request = Request::new(());
    *request.headers_mut() = headers;
    let event = recorded(request, Ok(Response::new(()))).await;
    let bytes: Vec<_> = event
        .headers
        .get_all("x-bytes")
        .iter()
        .map(HeaderValue::as_bytes)
        .collect();
    assert_eq!(bytes, [&b"\xff\xfe\x80 plain"[..], b"[redacted]"]);
    assert!(!format!("{event:?}").contains("s3cret"));
    #[cfg(feature = "serde")]
    assert!(!serde_json::to_string(&event).unwrap().contains("s3cret"));

    for (url, recorded_url) in [
        ("*", Some("*")),
        ("h:443", Some("h:443")),
        ("u:s3cret@h:443", Some("h:443")),
        ("/", None),
        ("/?", Some("/?")),
        ("/?%", Some("/?%")),
        ("/?%=%&%2=%zz&%ff%fe=x", Some("/?%=%&%2=%zz&%ff%fe=x")),
        ("/?%74oken=s3cret", Some("/?%74oken=[redacted]")),
        ("/?token=%", Some("/?token=[redacted]")),
        ("/?&&==&", Some("/?&&==&")),
        (
            "http://[::1]:8080/?sig=s3cret",
            Some("http://[::1]:8080/?sig=[redacted]"),
        ),
        ("http://u%40:s3cret@[::1]/", Some("http://[::1]/")),
    ] {
        let request = Request::get(url).body(()).unwrap();
        let event = recorded(request, Ok(Response::new(()))).await;
        assert_eq!(event.endpoint_url.as_deref(), recorded_url, "{url}");
    }
    // If the crate `http` refuses the URL of a call, `submit` fails with an `http::Error`.
    let executor = unlimited().build(client(ms(0)).0).unwrap();
    executor.start().unwrap();
    for url in [
        "".to_owned(),
        "http://".into(),
        "http://h:99999999/".into(),
        "not a url".into(),
        "http://h/\u{0}".into(),
        "http://h/é".into(),
        "a".repeat(MEGA),
    ] {
        let call = Call::from(support::request("call")).url(url.as_str());
        if let Err(error) = executor.submit(call).await {
            assert!(error.find::<http::Error>().is_some(), "{url:.20}: {error}");
        }
    }
}

#[tokio::test]
async fn unusual_statuses_are_codes_or_errors() {
    let executor = unlimited().build_for_closures::<()>().unwrap();
    executor.start().unwrap();
    for status in [0_u16, 1, 99, 100, 199, 200, 418, 599, 600, 999, 1_000, u16::MAX] {
        let call = executor
            .submit(Call::new(move || async move { Ok::<_, BoxError>((status, ())) }))
            .await
            .unwrap();
        let event = call.event().finished().await;
        if (100..1_000).contains(&status) {
            assert_eq!(
                (event.status, event.response_status_code),
                (RequestStatus::Completed, Some(status))
            );
        } else {
            assert_eq!(
                (event.status, event.response_status_code),
                (RequestStatus::Failed, None)
            );
        }
    }
}

// --- large amounts ---

#[test]
fn a_subscriber_that_never_reads_costs_no_memory_and_learns_how_much_it_missed() {
    const CALLS: u64 = 20_000;
    const UPDATES: u64 = 5;
    const BEHIND: u64 = 4_096;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let client = service_fn(async |_: Request<()>| Ok::<_, BoxError>(Response::new(())));
    let executor = unlimited().build(client).unwrap();
    let mut never_reads = executor.monitor().subscribe();
    let calls = |number: u64| {
        runtime.block_on(async {
            for _ in 0..number {
                let call = Call::from(Request::new(())).metadata("text", "x".repeat(1_000));
                executor.submit(call).await.unwrap().await.unwrap();
            }
        });
    };
    runtime.block_on(async { executor.start().unwrap() });
    // The first calls fill the buffer of the subscription. Many more calls must then leave no more memory allocated.
    calls(BEHIND);
    let counted = allocation_counter::measure(|| calls(CALLS));
    assert!(counted.bytes_current < 10_000, "{} bytes more", counted.bytes_current);
    assert_eq!(executor.monitor().totals().completed, BEHIND + CALLS);
    runtime.block_on(async {
        let lagged = never_reads.recv().await.unwrap().unwrap_err();
        assert_eq!(lagged.missed(), (BEHIND + CALLS) * UPDATES - BEHIND);
        for _ in 0..BEHIND {
            never_reads.recv().await.unwrap().unwrap();
        }
        assert!(
            timeout(ms(1), never_reads.recv()).await.is_err(),
            "there are no further updates"
        );
    });
}

#[tokio::test(start_paused = true)]
async fn an_event_keeps_a_thousand_keys_and_counts_the_others() {
    let many: BTreeMap<_, _> = (0..5_000).map(|key| (format!("{key:05}"), Value::from(key))).collect();
    let request = Request::builder().extension(Metadata(many)).body(()).unwrap();
    let event = EventLayer::calling()
        .layer(service_fn(async |_: Request<()>| Ok::<_, BoxError>(Response::new(()))))
        .call(request)
        .event();
    let metadata = event.snapshot().metadata;
    assert_eq!(metadata.len(), 1_001);
    assert_eq!(
        (&metadata["00999"], &metadata["[more]"]),
        (&Value::from(999), &Value::from(4_000))
    );

    // Metadata keys beyond the first thousand are only counted. The values of the kept keys can still be changed.
    let counted = allocation_counter::measure(|| {
        for key in 0..100_000 {
            event.set_metadata(format!("later {key}"), key);
        }
    });
    assert!(
        counted.bytes_current < 10_000,
        "{} bytes are still allocated",
        counted.bytes_current
    );
    event.set_metadata("00007", "changed");
    let metadata = event.snapshot().metadata;
    assert_eq!(metadata.len(), 1_001);
    assert_eq!(
        (&metadata["00007"], &metadata["[more]"]),
        (&Value::from("changed"), &Value::from(104_000))
    );
}

// --- user code ---

/// How an error misbehaves when its `Display`, `Debug` or `source` is called.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Misdeed {
    DisplayPanics,
    DisplayFails,
    DebugPanics,
    DebugIsEndless,
    SourcePanics,
    /// The error is its own source.
    Circle,
}

const MISDEEDS: [Misdeed; 6] = [
    Misdeed::DisplayPanics,
    Misdeed::DisplayFails,
    Misdeed::DebugPanics,
    Misdeed::DebugIsEndless,
    Misdeed::SourcePanics,
    Misdeed::Circle,
];

struct Bad(Misdeed);

impl fmt::Display for Bad {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Misdeed::DisplayPanics => panic!("no text"),
            Misdeed::DisplayFails => Err(fmt::Error),
            _ => f.write_str("bad"),
        }
    }
}

impl fmt::Debug for Bad {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Misdeed::DebugPanics => panic!("no debug text"),
            Misdeed::DebugIsEndless => loop {
                f.write_str("Bad(0, 1, 2, 3)")?;
            },
            _ => f.write_str("Bad"),
        }
    }
}

impl StdError for Bad {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        match self.0 {
            Misdeed::SourcePanics => panic!("no source"),
            Misdeed::Circle => Some(self),
            _ => None,
        }
    }
}

/// Where a client fails or panics: in `poll_ready`, in `call`, or in the future that `call` returns.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Where {
    Ready,
    Call,
    Future,
}

/// A client that fails or panics once, at the point and in the way that are stored in `next`, and responds to all other
/// calls.
#[derive(Clone)]
struct Client {
    next: Arc<Mutex<Option<(Where, Misdeed)>>>,
}

impl Client {
    fn misdeed(&self, place: Where) -> Option<Misdeed> {
        let mut next = self.next.lock().unwrap();
        match *next {
            Some((at, misdeed)) if at == place => {
                *next = None;
                Some(misdeed)
            }
            _ => None,
        }
    }
}

impl<B: Send + 'static> Service<Request<B>> for Client {
    type Response = Response<()>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Response<()>, BoxError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(
            self.misdeed(Where::Ready)
                .map_or(Ok(()), |misdeed| Err(Bad(misdeed).into())),
        )
    }

    fn call(&mut self, _: Request<B>) -> Self::Future {
        if self.misdeed(Where::Call).is_some() {
            panic!("in the call");
        }
        let client = self.clone();
        Box::pin(async move {
            if let Some(misdeed) = client.misdeed(Where::Future) {
                return Err(Bad(misdeed).into());
            }
            tokio::task::yield_now().await;
            Ok(Response::new(()))
        })
    }
}

#[tokio::test(start_paused = true)]
async fn an_error_that_misbehaves_fails_its_call_and_no_other() {
    for misdeed in MISDEEDS {
        for at in [Where::Ready, Where::Call, Where::Future] {
            let case = format!("{misdeed:?} {at:?}");
            let next = Arc::new(Mutex::new(None));
            let executor = unlimited().build(Client { next: next.clone() }).unwrap();
            executor.start().unwrap();
            // Three calls are made: the first is running when the second one misbehaves, and the third is behind it in
            // the queue.
            let before = executor.submit(Request::new(())).await.unwrap();
            settle().await;
            *next.lock().unwrap() = Some((at, misdeed));
            let bad = executor.submit(Request::new(())).await.unwrap();
            let event = bad.event().clone();
            let behind = executor.submit(Request::new(())).await.unwrap();
            let error = timeout(HANG, bad).await.expect(&case).unwrap_err();
            assert!(!error.is_cancelled() && !error.is_closed(), "{case}");
            timeout(HANG, before).await.expect(&case).expect(&case);
            timeout(HANG, behind).await.expect(&case).expect(&case);
            assert_eq!(event.status(), RequestStatus::Failed, "{case}");
            // The methods of `Error` that examine the misbehaving error return as well, and do not panic.
            assert!(
                !error.is_not_running() && error.find::<fmt::Error>().is_none(),
                "{case}"
            );
            let report = executor.stop(Shutdown::Graceful).await;
            assert_eq!(report.cancelled, 0, "{case}");
            let totals = executor.monitor().totals();
            assert_eq!((totals.completed, totals.failed), (2, 1), "{case}");
        }
    }
}

/// An error that can have a long chain of sources.
#[derive(Debug)]
struct Link {
    number: usize,
    source: Option<Box<Self>>,
}

impl Link {
    fn chain(length: usize) -> Self {
        (0..length).fold(
            Self {
                number: 0,
                source: None,
            },
            |source, number| Self {
                number: number + 1,
                source: Some(Box::new(source)),
            },
        )
    }
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "link {}", self.number)
    }
}

impl StdError for Link {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_ref().map(|source| &**source as _)
    }
}

/// Drops the chain of sources in a loop. A recursive drop of a long chain would overflow the stack of the test.
impl Drop for Link {
    fn drop(&mut self) {
        let mut next = self.source.take();
        while let Some(mut link) = next {
            next = link.source.take();
        }
    }
}

#[tokio::test(start_paused = true)]
async fn of_a_chain_of_a_hundred_thousand_sources_the_first_ones_are_recorded() {
    for length in [0, 1, 30, 100_000] {
        let executor = unlimited().build_for_closures::<()>().unwrap();
        executor.start().unwrap();
        let call = Call::new(move || async move { Err::<(u16, ()), _>(Link::chain(length)) });
        let call = executor.submit(call).await.unwrap();
        let event = call.event().clone();
        let error = call.await.unwrap_err();
        assert_eq!(error.to_string(), format!("link {length}"));
        assert!(error.find::<Link>().is_some() && error.find::<fmt::Error>().is_none());
        let mut sources = 0;
        let mut next = error.source();
        while let Some(source) = next {
            sources += 1;
            next = source.source();
        }
        let details = event.snapshot().error_details;
        let lines = details.as_deref().map_or(0, |details| details.lines().count());
        assert_eq!(sources, lines);
        if length <= 30 {
            assert_eq!(sources, length);
        } else {
            assert!((100..1_000).contains(&sources), "{sources}");
            assert_eq!(details.unwrap().lines().last(), Some("…"));
        }
        drop(error.into_inner());
    }
}

/// A `Describe` implementation that panics once after `armed` was set: in `response` if `at_response` is set, otherwise
/// in `request`.
#[derive(Clone)]
struct Describes {
    armed: Arc<AtomicBool>,
    at_response: bool,
}

impl Describes {
    fn may_panic(&self, is_response: bool) {
        if self.at_response == is_response && self.armed.swap(false, Ordering::SeqCst) {
            panic!("no description");
        }
    }
}

impl<B, R> event::Describe<Request<B>, Response<R>> for Describes {
    fn request(&self, _: &Request<B>, _: &mut event::RequestDetails) {
        self.may_panic(false);
    }

    fn response(&self, _: &Response<R>, _: &mut event::ResponseDetails) {
        self.may_panic(true);
    }
}

/// Polls the future until it is done or panics, and returns whether it has panicked.
async fn panics<T>(future: impl Future<Output = T>) -> bool {
    let mut future = std::pin::pin!(future);
    std::future::poll_fn(|cx| {
        match std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| future.as_mut().poll(cx))) {
            Ok(Poll::Pending) => Poll::Pending,
            Ok(Poll::Ready(_)) => Poll::Ready(false),
            Err(_) => Poll::Ready(true),
        }
    })
    .await
}

#[tokio::test(start_paused = true)]
async fn functions_that_describe_classify_or_price_a_call_may_panic_and_fail_only_that_call() {
    for at_response in [false, true] {
        let armed = Arc::new(AtomicBool::new(false));
        let describe = Describes {
            armed: armed.clone(),
            at_response,
        };
        let builder = unlimited().queue_capacity(1).describe(describe);
        let executor = builder.build(client(ms(0)).0).unwrap();
        executor.start().unwrap();
        armed.store(true, Ordering::SeqCst);
        if at_response {
            let call = executor.submit(request("call")).await.unwrap();
            let event = call.event().clone();
            assert!(call.await.unwrap_err().is_panicked());
            assert_eq!(event.status(), RequestStatus::Failed);
        } else {
            assert!(panics(executor.submit(request("call"))).await);
            armed.store(true, Ordering::SeqCst);
            assert!(panics(async { drop(executor.try_submit(request("call"))) }).await);
        }
        // The call that panicked holds no place in the queue: the capacity is 1, and the next call is accepted.
        let fine = executor.try_submit(request("fine")).unwrap();
        fine.await.unwrap();
        let report = executor.stop(Shutdown::Graceful).await;
        assert_eq!((report.failed, report.cancelled), (0, 0));
        assert_eq!(executor.monitor().totals().open(), 0);
        assert_eq!((executor.monitor().in_flight(), executor.monitor().calling()), (0, 0));
    }

    let fails = Http::default().fail_on(|status| if status == 418 { panic!("no teapots") } else { false });
    let executor = unlimited().describe(fails).build_for_closures::<()>().unwrap();
    executor.start().unwrap();
    for (status, is_fine) in [(418, false), (200, true)] {
        let call = executor
            .submit(Call::new(move || async move { Ok::<_, BoxError>((status, ())) }))
            .await
            .unwrap();
        let event = call.event().clone();
        assert_eq!(call.await.is_ok(), is_fine);
        assert_eq!(event.status() == RequestStatus::Completed, is_fine);
    }
    assert_eq!((executor.monitor().in_flight(), executor.monitor().calling()), (0, 0));

    // The executor calls the cost function when a call is submitted, and again when the call is charged to the rate
    // limiter. The function panics in the first or in the second of these.
    for at in [0, 1] {
        let called = Arc::new(AtomicUsize::new(0));
        let executor = Executor::builder()
            .queue_capacity(1)
            .cost(move |_: &Request<&'static str>| {
                assert_ne!(called.fetch_add(1, Ordering::SeqCst), at, "no cost");
                Cost::request()
            })
            .build(client(ms(0)).0)
            .unwrap();
        executor.start().unwrap();
        if at == 0 {
            assert!(panics(executor.submit(request("call"))).await);
        } else {
            assert!(
                executor
                    .submit(request("call"))
                    .await
                    .unwrap()
                    .await
                    .unwrap_err()
                    .is_panicked()
            );
        }
        executor.try_submit(request("fine")).unwrap().await.unwrap();
        assert_eq!(executor.monitor().limiter().available().requests, Some(9));
        assert_eq!(executor.monitor().in_flight(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_panics_when_it_is_cloned_fails_the_start_or_the_call() {
    struct Unique(Arc<AtomicUsize>);
    impl Clone for Unique {
        fn clone(&self) -> Self {
            if self.0.fetch_sub(1, Ordering::SeqCst) == 1 {
                panic!("no copies");
            }
            Self(self.0.clone())
        }
    }
    impl Service<Request<()>> for Unique {
        type Response = Response<()>;
        type Error = BoxError;
        type Future = std::future::Ready<Result<Response<()>, BoxError>>;
        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
            Poll::Ready(Ok(()))
        }
        fn call(&mut self, _: Request<()>) -> Self::Future {
            std::future::ready(Ok(Response::new(())))
        }
    }
    // The executor clones the client when it starts, and again for the calls. The client panics at the first clone of a
    // start, and after a successful start at the clone with the number `copies`.
    let mut failed = 0;
    for copies in 1..10 {
        let left = Arc::new(AtomicUsize::new(usize::MAX));
        let executor = unlimited().concurrency_limit(1).build(Unique(left.clone())).unwrap();
        left.store(1, Ordering::SeqCst);
        assert!(panics(async { drop(executor.start()) }).await);
        assert!(!executor.is_running());
        left.store(usize::MAX, Ordering::SeqCst);
        executor.start().unwrap();
        left.store(copies, Ordering::SeqCst);
        let calls = [
            executor.submit(Request::new(())).await.unwrap(),
            executor.submit(Request::new(())).await.unwrap(),
            executor.submit(Request::new(())).await.unwrap(),
        ];
        for call in calls {
            if let Err(error) = timeout(HANG, call).await.expect("no hang") {
                assert!(error.is_panicked());
                failed += 1;
            }
        }
        let report = executor.stop(Shutdown::Graceful).await;
        assert_eq!(report.cancelled, 0);
        assert_eq!(executor.monitor().in_flight(), 0);
    }
    assert!(failed > 1, "{failed}");
}

/// A request body that panics when it is dropped, except while the thread is panicking already.
struct PanicsOnDrop(&'static str);

impl Drop for PanicsOnDrop {
    fn drop(&mut self) {
        if !thread::panicking() {
            panic!("dropped: {}", self.0);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn requests_that_panic_when_they_are_dropped_harm_no_other_call() {
    let client = service_fn(async |req: Request<PanicsOnDrop>| {
        time::sleep(ms(100)).await;
        drop(req);
        Ok::<_, BoxError>(Response::new(()))
    });
    for how in [Shutdown::Graceful, Shutdown::Immediate] {
        for workers in [1, 3] {
            let builder = unlimited().concurrency_limit(2).workers(workers);
            let executor = builder.build(client).unwrap();
            executor.start().unwrap();
            let mut calls = Vec::new();
            for _ in 0..6 {
                calls.push(executor.submit(Request::new(PanicsOnDrop("call"))).await.unwrap());
            }
            settle().await;
            // `cancel` drops the request of a call that is still queued, so `cancel` itself panics.
            assert!(panics(async { calls[5].cancel() }).await);
            let report = timeout(HANG, executor.stop(how)).await.expect("no hang");
            assert_eq!(report.completed + report.failed + report.cancelled, 5, "{report:?}");
            for call in calls {
                let event = call.event().clone();
                let error = timeout(HANG, call).await.expect("no hang").unwrap_err();
                assert!(error.is_cancelled() || error.is_panicked());
                assert!(event.status().is_terminal());
            }
            assert_eq!(executor.monitor().totals().open(), 0);
            assert_eq!(
                (executor.monitor().in_flight(), executor.monitor().queue_depth()),
                (0, 0)
            );
            executor.start().unwrap();
            executor.stop(Shutdown::Graceful).await;
        }
    }
}

#[test]
fn requests_that_panic_when_they_are_dropped_do_not_keep_an_executor_from_ending() {
    let client = service_fn(async |_: Request<PanicsOnDrop>| pending::<Result<Response<()>, BoxError>>().await);
    for runtime_first in [false, true] {
        let build = || {
            tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap()
        };
        let runtime = build();
        let executor = unlimited().concurrency_limit(1).build(client).unwrap();
        let calls: Vec<_> = runtime.block_on(async {
            executor.start().unwrap();
            let mut calls = Vec::new();
            for _ in 0..4 {
                calls.push(executor.submit(Request::new(PanicsOnDrop("call"))).await.unwrap());
                settle().await;
            }
            calls
        });
        let monitor = executor.monitor();
        if runtime_first {
            drop(runtime);
            drop(executor);
        } else {
            drop(executor);
            drop(runtime);
        }
        build().block_on(async {
            for call in calls {
                let error = timeout(HANG, call).await.expect("no hang").unwrap_err();
                assert!(error.is_cancelled());
            }
        });
        assert_eq!(monitor.totals().open(), 0);
    }
}

// --- wakers ---

/// A waker that panics when it is woken, except while the thread is panicking already.
struct PanicsOnWake;

impl Wake for PanicsOnWake {
    fn wake(self: Arc<Self>) {
        if !thread::panicking() {
            panic!("woken");
        }
    }
}

fn poll_with_panicking_waker<F: Future + Unpin>(future: &mut F) {
    let waker = Waker::from(Arc::new(PanicsOnWake));
    let polled = Pin::new(future).poll(&mut Context::from_waker(&waker));
    assert!(polled.is_pending());
}

#[tokio::test(start_paused = true)]
async fn a_waker_that_panics_harms_no_other_waiter() {
    for how in [None, Some(Shutdown::Graceful), Some(Shutdown::Immediate)] {
        let builder = unlimited().queue_capacity(3).concurrency_limit(1);
        let mut executor = builder.build(client(ms(100)).0).unwrap();
        executor.start().unwrap();
        let mut calls = Vec::new();
        for _ in 0..4 {
            calls.push(executor.submit(request("call")).await.unwrap());
            settle().await;
        }
        let event = calls[0].event().clone();
        let waiting = (0..4).map(|_| executor.call(request("waits for a place")));
        let watches = (0..4).map(|_| {
            let event = event.clone();
            async move { Ok(event.finished().await.status) }
        });
        // Three kinds of futures wait: calls in the executor, calls that wait for a place in its queue, and watchers of
        // an event. Every second future is polled with a waker that panics.
        type Waits = Pin<Box<dyn Future<Output = Result<RequestStatus, tower_outbound::Error>> + Send>>;
        let calls = calls
            .into_iter()
            .map(|call| -> Waits { Box::pin(async { call.await.map(|_| RequestStatus::Completed) }) });
        let waiting = waiting.map(|call| -> Waits { Box::pin(async { call.await.map(|_| RequestStatus::Completed) }) });
        let watches = watches.map(|watch| -> Waits { Box::pin(watch) });
        let mut all: Vec<Waits> = calls.chain(waiting).chain(watches).collect();
        all.iter_mut().step_by(2).for_each(poll_with_panicking_waker);
        let mut unnotified = Vec::new();
        let mut spawned = Vec::new();
        for (index, waits) in all.into_iter().enumerate() {
            if index % 2 == 0 {
                unnotified.push(waits);
            } else {
                spawned.push(tokio::spawn(waits));
            }
        }
        settle().await;
        if let Some(how) = how {
            let report = timeout(HANG, executor.stop(how)).await.expect("no hang");
            let completed = if how == Shutdown::Graceful { 4 } else { 0 };
            assert_eq!((report.completed, report.failed), (completed, 0), "{how:?}");
        }
        let mut results = Vec::new();
        for waits in spawned {
            results.push(timeout(HANG, waits).await.expect("no hang").unwrap());
        }
        // The futures whose waker panicked return their result when they are polled again.
        for waits in unnotified {
            results.push(timeout(HANG, waits).await.expect("no hang"));
        }
        let completed = results
            .iter()
            .filter(|result| matches!(result, Ok(RequestStatus::Completed)))
            .count();
        let expected = match how {
            None => 12,
            Some(Shutdown::Graceful) => 8,
            _ => 0,
        };
        assert_eq!(completed, expected, "{how:?}: {results:?}");
        assert_eq!(executor.monitor().totals().open(), 0);
        assert_eq!(
            (executor.monitor().in_flight(), executor.monitor().queue_depth()),
            (0, 0)
        );
        if how.is_none() {
            executor.submit(request("call")).await.unwrap().await.unwrap();
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_limiter_admits_the_other_waiters_beside_a_waker_that_panics() {
    let limiter = RateLimiter::new(Limits::new().requests(Rate::per_second(10).burst(1).initial(0))).unwrap();
    let mut waits: Vec<_> = (0..6).map(|_| Box::pin(limiter.acquire(Cost::request()))).collect();
    waits.iter_mut().step_by(2).for_each(poll_with_panicking_waker);
    let mut fine: Vec<_> = Vec::new();
    for index in 0..3 {
        let limiter = limiter.clone();
        fine.push(tokio::spawn(async move {
            limiter.acquire(Cost::request()).await.map(|()| index)
        }));
    }
    settle().await;
    // A change of the limits wakes all waiters of the limiter, including those whose waker panics.
    limiter
        .set_limits(Limits::new().requests(Rate::per_second(100).burst(1)))
        .unwrap();
    for fine in fine {
        timeout(HANG, fine).await.expect("no hang").unwrap().unwrap();
    }
    limiter.set_limits(Limits::new()).unwrap();
    for waits in waits {
        timeout(HANG, waits).await.expect("no hang").unwrap();
    }
    assert!(limiter.try_acquire(Cost::request()).is_ok());
}

/// A waker that runs a closure when it is woken.
struct RunsOnWake(Box<dyn Fn() + Send + Sync>);

impl Wake for RunsOnWake {
    fn wake(self: Arc<Self>) {
        thread_local!(static IS_RUNNING: Cell<bool> = const { Cell::new(false) });
        // The closure may wake other wakers of this type. A nested wake does nothing, because wakes that wake each
        // other would recurse without end.
        if !IS_RUNNING.replace(true) {
            (self.0)();
            IS_RUNNING.set(false);
        }
    }
}

#[test]
fn a_waker_may_use_everything_when_it_is_woken() {
    within_a_minute(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .start_paused(true)
            .build()
            .unwrap();
        runtime.block_on(async {
            let limits = Limits::new().requests(Rate::per_second(10).burst(1));
            let builder = Executor::builder()
                .limits(limits)
                .queue_capacity(2)
                .concurrency_limit(1);
            let mut executor = builder.build(client(ms(100)).0).unwrap();
            executor.start().unwrap();
            let limiter = executor.monitor().limiter().clone();
            let mut calls = Vec::new();
            for _ in 0..3 {
                calls.push(executor.submit(request("call")).await.unwrap());
                settle().await;
            }
            let event = calls[0].event().clone();
            let woken = Arc::new(AtomicUsize::new(0));
            // These futures are calls that wait for a place in the queue. Each wake of a waker drops one of them.
            let to_drop = Arc::new(Mutex::new(Vec::<Box<dyn std::any::Any + Send>>::new()));
            let (executor_clone, event_clone) = (executor.clone(), event.clone());
            let waker = || {
                let (executor, limiter, event) = (executor_clone.clone(), limiter.clone(), event_clone.clone());
                let (woken, to_drop) = (woken.clone(), to_drop.clone());
                Waker::from(Arc::new(RunsOnWake(Box::new(move || {
                    woken.fetch_add(1, Ordering::SeqCst);
                    let dropped = to_drop.lock().unwrap().pop();
                    drop(dropped);
                    event.log("woken");
                    event.set_metadata("woken", 1);
                    let _ = (event.snapshot(), format!("{executor:?} {limiter:?} {event:?}"));
                    let _ = limiter.try_acquire(Cost::request());
                    limiter.pause_for(Duration::ZERO);
                    limiter
                        .set_limits(Limits::new().requests(Rate::per_second(10).burst(1)))
                        .unwrap();
                    executor.monitor().concurrency().set(1).unwrap();
                    if let Ok(call) = executor.try_submit(request("from a waker")) {
                        call.cancel();
                    }
                    let mut clone = executor.clone();
                    let _ = clone.poll_ready(&mut Context::from_waker(Waker::noop()));
                    drop(clone.call(request("from a waker")));
                    let _ = executor.monitor().subscribe();
                }))))
            };
            let wakes = |future: Pin<&mut dyn Future<Output = ()>>| {
                let waker = waker();
                assert!(future.poll(&mut Context::from_waker(&waker)).is_pending());
            };
            let mut waiting: Vec<Pin<Box<dyn Future<Output = ()>>>> = Vec::new();
            for call in calls {
                waiting.push(Box::pin(async { drop(call.await) }));
            }
            for _ in 0..3 {
                let call = executor.call(request("waits for a place"));
                waiting.push(Box::pin(async { drop(call.await) }));
                let limiter = limiter.clone();
                waiting.push(Box::pin(
                    async move { limiter.acquire(Cost::request()).await.unwrap_or(()) },
                ));
                let event = event.clone();
                waiting.push(Box::pin(async move { drop(event.finished().await) }));
                let mut call_to_drop = task::spawn(executor.call(request("dropped by a waker")));
                assert!(call_to_drop.poll().is_pending());
                to_drop.lock().unwrap().push(Box::new(call_to_drop));
                let mut clone = executor.clone();
                waiting.push(Box::pin(async move { drop(clone.ready().await.map(drop)) }));
            }
            for waits in &mut waiting {
                wakes(waits.as_mut());
            }
            for _ in 0..20 {
                time::sleep(ms(50)).await;
            }
            limiter.set_limits(Limits::new()).unwrap();
            assert!(woken.load(Ordering::SeqCst) >= 5, "{woken:?}");
            timeout(HANG, executor.stop(Shutdown::Within(ms(1_000))))
                .await
                .expect("no hang");
            for mut waits in waiting {
                timeout(HANG, waits.as_mut()).await.expect("no hang");
            }
            assert_eq!(executor.monitor().totals().open(), 0);
            assert_eq!(
                (executor.monitor().in_flight(), executor.monitor().queue_depth()),
                (0, 0)
            );
        });
    });
}

#[tokio::test(start_paused = true)]
async fn a_waker_that_is_kept_and_woken_late_disturbs_no_later_call() {
    let kept = Arc::new(Mutex::new(Vec::<Waker>::new()));
    let keeps = kept.clone();
    let polls = Arc::new(AtomicUsize::new(0));
    let counts = polls.clone();
    let client = service_fn(move |_: Request<&'static str>| {
        let (keeps, counts) = (keeps.clone(), counts.clone());
        async move {
            let mut sleep = Box::pin(time::sleep(ms(10)));
            std::future::poll_fn(|cx| {
                keeps.lock().unwrap().push(cx.waker().clone());
                counts.fetch_add(1, Ordering::SeqCst);
                sleep.as_mut().poll(cx)
            })
            .await;
            Ok::<_, BoxError>(Response::new(()))
        }
    });
    let executor = unlimited().concurrency_limit(2).build(client).unwrap();
    executor.start().unwrap();
    for round in 0..50 {
        let first = executor.submit(request("a")).await.unwrap();
        let second = executor.submit(request("b")).await.unwrap();
        settle().await;
        if round % 2 == 0 {
            first.cancel();
        }
        // Wakes all wakers that the client has kept so far, including those of calls that have ended.
        let wakers = kept.lock().unwrap().clone();
        wakers.iter().for_each(Waker::wake_by_ref);
        assert_eq!(first.await.is_ok(), round % 2 == 1);
        second.await.unwrap();
        // Wakes the same wakers again while only one call runs, so that the slot of a call that has ended is empty in
        // the worker.
        let single = executor.submit(request("single")).await.unwrap();
        settle().await;
        wakers.iter().for_each(Waker::wake_by_ref);
        single.await.unwrap();
    }
    assert_eq!(executor.stop(Shutdown::Graceful).await.cancelled, 0);
    // The wakers are woken once more after the executor was stopped and dropped. No call is polled then.
    drop(executor);
    let wakers = std::mem::take(&mut *kept.lock().unwrap());
    let before = polls.load(Ordering::SeqCst);
    wakers.into_iter().for_each(Waker::wake);
    settle().await;
    assert_eq!(polls.load(Ordering::SeqCst), before);
}
