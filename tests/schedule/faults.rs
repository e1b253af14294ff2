//! User code that misbehaves, limits that refuse, and layers that do not make the call that was chosen.

use super::*;
use crate::support::{pass, settle};
use std::{
    sync::atomic::{AtomicBool, Ordering},
    task::{Context, Poll},
};
use tower_outbound::{
    Cost,
    error::{InvalidConfig, TooManyKeys},
};

#[tokio::test(start_paused = true)]
async fn a_client_that_panics_fails_its_call_and_gives_everything_back() {
    let schedule = tenants();
    let client = tower::service_fn(async |request: Request| {
        assert!(*request.body() != 0, "a panic of the client");
        Ok::<_, io::Error>(http::Response::new(()))
    });
    let executor = Executor::builder()
        .concurrency_limit(1)
        .limits(per_second(10))
        .schedule(schedule.clone())
        .build(client)
        .unwrap();
    executor.start().unwrap();
    let mut handles = submit_all(&executor, (0..3).map(call)).await;
    assert!(handles.remove(0).await.unwrap_err().is_panicked());
    all_end_well(handles).await;
    settle().await;
    assert_nothing_is_left(&executor, &schedule);
}

/// A service whose `poll_ready` panics once.
#[derive(Clone)]
struct PanicsOnce<S> {
    inner: S,
    has_panicked: Arc<AtomicBool>,
}

impl<S: Service<Request>> Service<Request> for PanicsOnce<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        assert!(
            self.has_panicked.swap(true, Ordering::Relaxed),
            "a panic of `poll_ready`"
        );
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request) -> S::Future {
        self.inner.call(request)
    }
}

#[tokio::test(start_paused = true)]
async fn a_service_whose_poll_ready_panics_fails_one_call_which_is_charged_nothing() {
    let schedule = tenants();
    let (client, log) = client(ms(0));
    let executor = Executor::builder()
        .concurrency_limit(1)
        .limits(Limits::new().requests(Rate::per_hour(100)))
        .schedule(schedule.clone())
        .layer(tower::layer::layer_fn(|inner| PanicsOnce {
            inner,
            has_panicked: Arc::default(),
        }))
        .build(client)
        .unwrap();
    executor.start().unwrap();
    let mut handles = submit_all(&executor, (0..3).map(call)).await;
    assert!(handles.remove(0).await.unwrap_err().is_panicked());
    all_end_well(handles).await;
    assert_eq!(log.numbers(), [1, 2]);
    assert_eq!(executor.monitor().available().of("requests"), Some(98));
    settle().await;
    assert_nothing_is_left(&executor, &schedule);
}

#[tokio::test(start_paused = true)]
async fn functions_of_levels_costs_and_prices_that_panic_fail_their_own_call_only() {
    let level = Level::by("tenant")
        .limits(|tenant| (tenant == "limits").then(|| panic!("a panic of the limits")))
        .weight(|tenant| {
            if tenant == "weight" {
                panic!("a panic of the weight")
            } else {
                1
            }
        });
    let schedule = Schedule::new().level(level).price(|cost| {
        assert!(cost.tokens != 13, "a panic of the price");
        cost.requests.max(1)
    });
    let (client, log) = client(ms(10));
    let executor = Executor::builder()
        .concurrency_limit(1)
        .limits(Limits::new().tokens(Rate::per_hour(1_000)))
        .schedule(schedule.clone())
        .settle(|charged: Cost, _: Result<&Response, &tower::BoxError>| Some(Cost::tokens(charged.tokens + 1)))
        .build(client)
        .unwrap();
    executor.start().unwrap();
    for call in [
        flow_call("limits", 0),
        flow_call("weight", 1),
        flow_call("a", 2).tokens(13),
    ] {
        assert!(spawn_call(&executor, call).await.unwrap_err().is_panic());
    }
    // The price of what this call has used panics: it counts as charged.
    all_end_well(submit_all(&executor, [flow_call("a", 3).tokens(12)]).await).await;
    all_end_well(submit_all(&executor, (4..7).map(|number| flow_call("b", number).tokens(1))).await).await;
    assert_eq!(log.numbers(), [3, 4, 5, 6]);
    settle().await;
    assert_nothing_is_left(&executor, &schedule);
}

#[tokio::test(start_paused = true)]
async fn a_price_that_looks_at_its_schedule_blocks_nothing() {
    let slot: Arc<std::sync::OnceLock<Schedule>> = Arc::default();
    let seen = slot.clone();
    let schedule = tenants().price(move |_| {
        let schedule = seen.get();
        1 + schedule.map_or(0, |schedule| schedule.flows(10).len() as u64)
    });
    assert!(slot.set(schedule.clone()).is_ok());
    let (executor, log) = executor(schedule.clone(), per_second(10), 1, ms(10));
    all_end_well(submit_all(&executor, (0..3).map(call)).await).await;
    assert_eq!(log.numbers(), [0, 1, 2]);
    executor.stop(Shutdown::Graceful).await;
    assert_nothing_is_left(&executor, &schedule);
}

/// Returns a started executor with this layer, whose tenants have 10 requests an hour each, and the executor 100.
fn with_layer(layer: Around) -> (TestExecutor, Schedule, Log) {
    let level = Level::by("tenant").limits(|_| Some(Limits::new().requests(Rate::per_hour(10))));
    let schedule = Schedule::new().level(level);
    let (client, log) = client(ms(10));
    let executor = Executor::builder()
        .concurrency_limit(2)
        .limits(Limits::new().requests(Rate::per_hour(100)))
        .schedule(schedule.clone())
        .layer(layer)
        .build(client)
        .unwrap();
    executor.start().unwrap();
    (executor, schedule, log)
}

#[tokio::test(start_paused = true)]
async fn a_call_that_its_layer_does_not_make_is_charged_nothing() {
    let (executor, schedule, log) = with_layer(Around {
        before: ms(10),
        times: 0,
    });
    // More than its tenant may make in an hour.
    all_end_well(submit_all(&executor, (0..50).map(|number| flow_call("a", number))).await).await;
    assert!(log.numbers().is_empty());
    // None of them has held up another: what a call was given is given back when its layer has not taken it at once.
    assert_eq!(log.start.elapsed(), ms(10));
    assert_eq!(executor.monitor().available().of("requests"), Some(100));
    settle().await;
    assert_nothing_is_left(&executor, &schedule);
}

#[tokio::test(start_paused = true)]
async fn a_call_that_is_cancelled_before_it_reaches_its_limits_is_charged_nothing() {
    let (executor, schedule, log) = with_layer(Around {
        before: ms(1_000),
        times: 1,
    });
    for number in 0..50 {
        let handle = executor.submit(flow_call("a", number)).await.unwrap();
        pass(ms(500)).await;
        assert_eq!(executor.monitor().available().of("requests"), Some(100));
        handle.cancel();
        assert!(handle.await.unwrap_err().is_cancelled());
    }
    assert!(log.numbers().is_empty());
    assert_eq!(executor.monitor().available().of("requests"), Some(100));
    settle().await;
    assert_nothing_is_left(&executor, &schedule);
}

#[tokio::test(start_paused = true)]
async fn a_call_whose_layer_sleeps_holds_nothing_and_waits_for_its_turn_when_it_gets_to_its_limits() {
    let (executor, schedule, log) = with_layer(Around {
        before: ms(100),
        times: 1,
    });
    let handles = submit_all(&executor, (0..6).map(|number| flow_call("a", number))).await;
    pass(ms(50)).await;
    assert_eq!(executor.monitor().in_flight(), 0);
    assert_eq!(executor.monitor().available().of("requests"), Some(100));
    all_end_well(handles).await;
    let at: Vec<_> = log.millis().into_iter().map(|(_, at)| at).collect();
    assert_eq!(at, [100, 100, 110, 110, 120, 120]);
    assert_eq!(executor.monitor().available().of("requests"), Some(94));
    settle().await;
    assert_nothing_is_left(&executor, &schedule);
}

#[tokio::test(start_paused = true)]
async fn a_running_call_that_is_cancelled_stays_charged() {
    let (executor, schedule, _) = with_layer(Around {
        before: ms(0),
        times: 1,
    });
    let handle = executor.submit(flow_call("a", 0)).await.unwrap();
    pass(ms(5)).await;
    handle.cancel();
    assert!(handle.await.unwrap_err().is_cancelled());
    settle().await;
    assert_eq!(executor.monitor().available().of("requests"), Some(99));
    assert_nothing_is_left(&executor, &schedule);
    // Nine are left to its tenant, the next one has to wait.
    all_end_well(submit_all(&executor, (1..10).map(|number| flow_call("a", number))).await).await;
    let waiting = submit_all(&executor, [flow_call("a", 10)]).await;
    pass(ms(1_000)).await;
    assert_eq!(schedule.waiting(), 1);
    drop(waiting);
    executor.stop(Shutdown::Immediate).await;
}

#[tokio::test(start_paused = true)]
async fn calls_that_can_never_be_admitted_fail_with_the_reason_and_others_go_on() {
    let level = Level::by("tenant").limits(|tenant| match tenant {
        "small" => Some(Limits::new().tokens(Rate::per_second(10).burst(10))),
        "capped" => Some(Limits::new().requests(Rate::per_hour(2).refuse())),
        "invalid" => Some(Limits::new().requests(Rate::per_second(0))),
        "initial" => Some(Limits::new().requests(Rate::per_second(10).initial(0))),
        _ => None,
    });
    let schedule = Schedule::new().level(level);
    let limits = Limits::new().tokens(Rate::per_second(1_000).burst(100));
    let (executor, log) = executor(schedule.clone(), limits, 1, ms(0));
    let result = async |call| spawn_call(&executor, call).await.unwrap();
    assert!(
        result(flow_call("a", 0).tokens(101))
            .await
            .unwrap_err()
            .is_cost_exceeds_burst()
    );
    assert!(
        result(flow_call("small", 0).tokens(11))
            .await
            .unwrap_err()
            .is_cost_exceeds_burst()
    );
    for number in 1..3 {
        result(flow_call("capped", number)).await.unwrap();
    }
    assert!(result(flow_call("capped", 0)).await.unwrap_err().is_exhausted());
    for flow in ["invalid", "initial"] {
        let error = result(flow_call(flow, 0)).await.unwrap_err();
        assert!(error.find::<InvalidConfig>().is_some(), "{error}");
    }
    result(flow_call("small", 3).tokens(10)).await.unwrap();
    result(flow_call("a", 4).tokens(100)).await.unwrap();
    assert_eq!(log.numbers(), [1, 2, 3, 4]);
    settle().await;
    assert_nothing_is_left(&executor, &schedule);
}

#[tokio::test(start_paused = true)]
async fn calls_beyond_the_cap_of_the_executor_fail_also_those_that_wait() {
    let schedule = tenants();
    let limits = Limits::new().requests(Rate::per_hour(3).refuse());
    let (executor, log) = executor(schedule.clone(), limits, 1, ms(10));
    let calls = (0..6).map(|number| flow_call(if number % 2 == 0 { "a" } else { "b" }, number));
    let mut exhausted = 0;
    for handle in submit_all(&executor, calls).await {
        exhausted += u32::from(handle.await.is_err_and(|error| error.is_exhausted()));
    }
    assert_eq!(exhausted, 3);
    assert_eq!(log.numbers(), [0, 1, 2]);
    settle().await;
    assert_nothing_is_left(&executor, &schedule);
}

#[tokio::test(start_paused = true)]
async fn a_call_with_a_key_too_many_fails_with_the_number_and_gives_its_place_back() {
    let schedule = tenants().max_keys(2);
    let (executor, log) = executor(schedule.clone(), Limits::new(), 1, ms(100));
    let mut handles = submit_all(&executor, [flow_call("a", 0), flow_call("b", 1)]).await;
    for _ in 0..5 {
        let error = executor.submit(flow_call("c", 2)).await;
        let error = match error {
            Ok(handle) => handle.await.unwrap_err(),
            Err(error) => error,
        };
        assert_eq!(error.find::<TooManyKeys>().unwrap().max(), 2);
    }
    assert_eq!(executor.monitor().queue_depth(), 2);
    handles.extend(submit_all(&executor, [flow_call("b", 3)]).await);
    all_end_well(handles).await;
    all_end_well(submit_all(&executor, [flow_call("c", 4)]).await).await;
    assert_eq!(log.numbers(), [0, 1, 3, 4]);
    settle().await;
    assert_nothing_is_left(&executor, &schedule);
}

#[test]
fn in_a_runtime_without_timers_each_call_that_has_to_wait_for_its_rate_fails() {
    crate::support::within_a_minute(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let schedule = tenants();
        let client = tower::service_fn(async |_: Request| Ok::<_, io::Error>(http::Response::new(())));
        let executor = Executor::builder()
            .limits(Limits::new().requests(Rate::per_hour(60).burst(1)))
            .schedule(schedule.clone())
            .build(client)
            .unwrap();
        runtime.block_on(async {
            executor.start().unwrap();
            let mut handles = submit_all(&executor, (0..3).map(call)).await;
            handles.remove(0).await.unwrap();
            for handle in handles {
                assert!(handle.await.unwrap_err().is_panicked());
            }
            executor.stop(Shutdown::Graceful).await;
        });
        assert_nothing_is_left(&executor, &schedule);
    });
}

#[tokio::test(start_paused = true)]
async fn a_call_that_waits_for_itself_is_found() {
    let schedule = tenants();
    let executor = unlimited()
        .concurrency_limit(1)
        .schedule(schedule.clone())
        .build_for_closures::<String>()
        .unwrap();
    executor.start().unwrap();
    let nested = executor.clone();
    let outer = Call::new(move || {
        let executor = nested.clone();
        async move {
            let inner = Call::new(|| async { Ok::<_, Error>((200, String::new())) }).flow("b");
            executor.submit(inner).await?.await?;
            Ok::<_, Error>((200, String::new()))
        }
    });
    let error = executor.submit(outer.flow("a")).await.unwrap().await.unwrap_err();
    assert!(error.is_deadlock(), "{error}");
    settle().await;
    assert_eq!((executor.monitor().in_flight(), schedule.waiting()), (0, 0));
}
