//! What a plan promises: it admits calls when a limiter with the same limits does, exactly but for the lateness of wakeups.

use proptest::prelude::*;
use std::time::Duration;
use tokio::time::Instant;
use tower::{Service, ServiceBuilder, ServiceExt, service_fn};
use tower_outbound::{
    ConcurrencyLimitLayer, Cost, Limits, Rate, RateLimitLayer, RateLimiter,
    error::AcquireError,
    rate::{Binding, Budget},
};

/// Returns the instant at which Tokio's timer, which ticks once in a millisecond, fires for `time`.
fn tick(time: Duration) -> Duration {
    Duration::from_millis(time.as_nanos().div_ceil(1_000_000) as u64)
}

fn on_paused_clock<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    runtime.block_on(test)
}

/// Returns when a limiter admits each of these calls, which all wait from the start, or whether it refuses the call.
async fn admissions(limits: Limits, costs: &[Cost]) -> Vec<Option<Duration>> {
    let limiter = RateLimiter::new(limits).unwrap();
    let start = Instant::now();
    let calls: Vec<_> = costs
        .iter()
        .map(|cost| {
            let (limiter, cost) = (limiter.clone(), *cost);
            tokio::spawn(async move { limiter.acquire(cost).await.ok().map(|()| start.elapsed()) })
        })
        .collect();
    let mut times = Vec::new();
    for call in calls {
        times.push(call.await.unwrap());
    }
    times
}

prop_compose! {
    fn rate(max: u64)(
        amount in 1..=max,
        period in prop_oneof![Just(1_000_u64), Just(60_000), 1_u64..100_000],
        burst in proptest::option::of(1..=max),
        initial in proptest::option::of(0.0..=1.0),
    ) -> Rate {
        let mut rate = Rate::new(amount, Duration::from_millis(period));
        if let Some(burst) = burst {
            rate = rate.burst(burst);
        }
        if let Some(initial) = initial {
            let burst: u64 = burst.unwrap_or(amount);
            let initial: f64 = initial;
            rate = rate.initial((initial * burst as f64) as u64);
        }
        rate
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_plan_admits_each_call_when_a_limiter_does(
        requests in proptest::collection::vec(rate(50), 0..3),
        tokens in proptest::collection::vec(rate(5_000), 0..3),
        costs in proptest::collection::vec((0_u64..3, 0_u64..2_000), 1..60),
    ) {
        let mut limits = Limits::new();
        let rates = requests.len() + tokens.len();
        for rate in requests {
            limits = limits.requests(rate);
        }
        for rate in tokens {
            limits = limits.tokens(rate);
        }
        let costs: Vec<_> = costs.into_iter().map(|(requests, tokens)| Cost::tokens(tokens).with("requests", requests)).collect();
        let mut plan = limits.plan().unwrap();
        let planned: Vec<_> = costs.iter().map(|cost| plan.admit(*cost).ok().map(tick)).collect();
        let admitted = on_paused_clock(admissions(limits, &costs));
        if rates <= 1 {
            prop_assert_eq!(planned, admitted);
        } else {
            // A budget that was full while a call waited for another is not credited for that call's lateness, which is
            // below a tick. So a limiter may be behind the plan by one tick for each time at which a call was woken.
            let (mut last, mut wakeups) = (None, 0);
            for (planned, admitted) in planned.iter().zip(&admitted) {
                let within = match (planned, admitted) {
                    (Some(planned), Some(admitted)) => (*planned..=*planned + Duration::from_millis(wakeups)).contains(admitted),
                    (planned, admitted) => planned == admitted,
                };
                prop_assert!(within, "{planned:?} {admitted:?} after {wakeups} wakeups");
                if admitted.is_some() && *admitted != last {
                    (last, wakeups) = (*admitted, wakeups + 1);
                }
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_plan_with_a_limit_of_calls_in_flight_admits_when_the_layers_do() {
    for (concurrency, seconds) in [(1, 2), (4, 3), (10, 1), (50, 7)] {
        let limits = Limits::new().requests(Rate::per_second(2).burst(5));
        let duration = Duration::from_secs(seconds);
        let limiter = RateLimiter::new(limits.clone()).unwrap();
        let start = Instant::now();
        let service = ServiceBuilder::new()
            .layer(ConcurrencyLimitLayer::new(concurrency).unwrap())
            .layer(RateLimitLayer::new(limiter))
            .service(service_fn(move |_: http::Request<()>| async move {
                let sent = start.elapsed();
                tokio::time::sleep(duration).await;
                Ok::<_, tower::BoxError>(http::Response::new(sent))
            }))
            .boxed_clone();
        let calls: Vec<_> = (0..60)
            .map(|_| {
                let mut service = service.clone();
                tokio::spawn(async move {
                    let sent = service.ready().await.unwrap().call(http::Request::new(()));
                    sent.await.unwrap().into_body()
                })
            })
            .collect();
        let mut plan = limits.plan().unwrap().concurrency(concurrency, duration);
        for call in calls {
            assert_eq!(plan.admit(Cost::request()).unwrap(), call.await.unwrap());
        }
    }
}

#[test]
fn a_plan_tells_which_limit_a_call_waits_for_last() {
    let second = Duration::from_secs(1);
    let limits = Limits::new()
        .requests(Rate::per_second(1).burst(2))
        .tokens(Rate::per_second(100).burst(1_000));
    let of = |budget, period| Some(Binding::Rate { budget, period });
    let mut plan = limits.plan().unwrap().concurrency(4, 10 * second);
    let mut admit = |cost| (plan.admit(Cost::tokens(cost)).unwrap(), plan.binding());
    assert_eq!(admit(0), (Duration::ZERO, None));
    assert_eq!(admit(900), (Duration::ZERO, None));
    assert_eq!(admit(100), (second, of(Budget::Requests, second)));
    assert_eq!(admit(500), (5 * second, of(Budget::Tokens, second)));
    assert_eq!(admit(0), (10 * second, Some(Binding::Concurrency)));
}

#[test]
fn a_cost_above_a_burst_is_refused_and_leaves_the_plan_as_it_is() {
    let limits = Limits::new().tokens(Rate::per_second(100).burst(1_000).initial(0));
    let mut plan = limits.plan().unwrap();
    let AcquireError::CostExceedsBurst(error) = plan.admit(Cost::tokens(1_001)).unwrap_err() else {
        panic!("the cost exceeds the burst");
    };
    assert_eq!((error.cost(), error.burst()), (1_001, 1_000));
    assert_eq!(plan.admit(Cost::tokens(50)).unwrap(), Duration::from_millis(500));
    assert!(Limits::new().requests(Rate::per_second(0)).plan().is_err());
}

#[test]
fn a_plan_without_limits_admits_every_call_at_the_start() {
    let mut plan = Limits::new().plan().unwrap();
    for _ in 0..1_000 {
        assert_eq!(plan.admit(Cost::tokens(u64::MAX)).unwrap(), Duration::ZERO);
        assert_eq!(plan.binding(), None);
    }
}
