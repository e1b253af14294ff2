//! What `Executor` promises, one test for each promise.

mod support;

use http::{Request, Response, StatusCode};
use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use support::{Client, HANG, client, ms, pass, request, settle};
use tokio::time::{Instant, sleep, timeout};
use tokio_test::{assert_pending, task};
use tower::{BoxError, Service, ServiceExt, service_fn};
use tower_outbound::{
    ApiTokens, Call, Cost, Executor, ExecutorBuilder, Limits, NetworkRequestEvent, Rate, RequestStatus, Shutdown,
    error::CostExceedsBurst,
    event::{Http, Value},
    executor::{Closure, Config, IntoHttpResponse, TrySubmitError},
};

type Plain = Executor<&'static str, &'static str>;

fn unlimited() -> ExecutorBuilder {
    Executor::builder().limits(Limits::new())
}

fn started(builder: ExecutorBuilder, client: Client) -> Plain {
    let executor = builder.build(client).unwrap();
    executor.start().unwrap();
    executor
}

// --- defaults and checks ---

#[tokio::test(start_paused = true)]
async fn the_defaults_are_a_queue_of_1000_ten_at_once_and_ten_a_second_with_a_burst_of_ten() {
    let (client, arrivals) = client(ms(100));
    let executor = started(Executor::builder(), client);
    let monitor = executor.monitor();
    assert_eq!(monitor.concurrency().get(), 10);
    assert_eq!(
        (
            monitor.limiter().available().requests,
            monitor.limiter().available().tokens
        ),
        (Some(10), None)
    );
    for _ in 0..1_000 {
        drop(executor.try_submit(request("call")).unwrap());
    }
    assert!(executor.try_submit(request("one too many")).unwrap_err().is_full());
    pass(ms(900)).await;
    assert_eq!(arrivals.times().len(), 10 + 9);
}

#[tokio::test(start_paused = true)]
async fn tokens_given_without_a_period_are_per_minute() {
    let config = Config {
        tokens_rate: Some(600.0),
        ..Config::default()
    };
    let executor = config.into_builder().unwrap().build_for_closures::<()>().unwrap();
    let limiter = executor.monitor().limiter().clone();
    assert_eq!(limiter.available().tokens, Some(600));
    limiter.try_acquire(Cost::tokens(600)).unwrap();
    assert_eq!(
        limiter.try_acquire(Cost::tokens(1)).unwrap_err().retry_after(),
        Some(ms(100))
    );
}

#[tokio::test]
async fn settings_out_of_range_are_refused_when_built_and_their_field_is_named() {
    let field = |builder: ExecutorBuilder| builder.build_for_closures::<()>().unwrap_err().field().to_owned();
    assert_eq!(field(Executor::builder().queue_capacity(0)), "queue_capacity");
    assert_eq!(field(Executor::builder().concurrency_limit(0)), "concurrency_limit");
    assert_eq!(field(Executor::builder().workers(0)), "workers");
    assert_eq!(
        field(Executor::builder().requests(Rate::per_second(0))),
        "requests.amount"
    );
    assert_eq!(
        field(Executor::builder().requests(Rate::per_second(-1))),
        "requests.amount"
    );
    assert_eq!(
        field(Executor::builder().requests(Rate::per_second(f64::NAN))),
        "requests.amount"
    );
    assert_eq!(
        field(Executor::builder().requests(Rate::new(1, Duration::ZERO))),
        "requests.period"
    );
    assert_eq!(field(Executor::builder().tokens(Rate::per_minute(0))), "tokens.amount");
    assert_eq!(
        field(Executor::builder().tokens(Rate::new(1, Duration::ZERO))),
        "tokens.period"
    );
    assert_eq!(
        field(Executor::builder().tokens(Rate::per_minute(5).burst(0))),
        "tokens.burst"
    );
}

// --- start and stop ---

#[tokio::test(start_paused = true)]
async fn starting_twice_is_an_error() {
    let executor = started(Executor::builder(), client(ms(0)).0);
    let error = executor.start().unwrap_err();
    assert!(error.is_already_running());
    assert_eq!(
        error.to_string(),
        "the executor is already running: call `stop` and await it first"
    );
}

#[test]
fn starting_outside_a_runtime_is_an_error() {
    let executor = Executor::builder().build_for_closures::<()>().unwrap();
    assert!(
        executor
            .start()
            .unwrap_err()
            .to_string()
            .contains("inside a Tokio runtime")
    );
}

#[tokio::test(start_paused = true)]
async fn submitting_before_start_or_after_stop_is_an_error_and_a_stopped_executor_can_start_again() {
    let executor = Executor::builder().build(client(ms(0)).0).unwrap();
    assert!(executor.submit(request("early")).await.unwrap_err().is_not_running());
    assert!(
        executor
            .clone()
            .oneshot(request("early"))
            .await
            .unwrap_err()
            .is_not_running()
    );
    executor.start().unwrap();
    executor.submit(request("call")).await.unwrap().await.unwrap();
    assert_eq!(executor.stop(Shutdown::Graceful).await.completed, 0);
    assert!(!executor.is_running());
    assert!(executor.submit(request("late")).await.unwrap_err().is_not_running());
    assert!(executor.try_submit(request("late")).is_err());

    executor.start().unwrap();
    executor.submit(request("again")).await.unwrap().await.unwrap();
    // The limits are kept over the restart: of the default burst of 10 requests, the two calls have taken 2.
    assert_eq!(executor.monitor().limiter().available().requests, Some(8));
    assert_eq!(executor.monitor().totals().completed, 2);
}

#[tokio::test(start_paused = true)]
async fn a_graceful_stop_loses_none_of_a_thousand() {
    let (client, arrivals) = client(ms(50));
    let executor = started(unlimited(), client);
    let mut events = Vec::new();
    for _ in 0..1_000 {
        events.push(executor.submit(request("call")).await.unwrap().event().clone());
    }
    let report = executor.stop(Shutdown::Graceful).await;
    assert_eq!((report.completed, report.failed, report.cancelled), (1_000, 0, 0));
    assert_eq!(report.elapsed, ms(1_000 / 10 * 50));
    assert_eq!(arrivals.times().len(), 1_000);
    assert!(events.iter().all(|event| event.status() == RequestStatus::Completed));
}

#[tokio::test(start_paused = true)]
async fn a_full_queue_loses_none_of_three_thousand_concurrent_submits() {
    let (client, arrivals) = client(ms(1));
    let executor = started(unlimited().queue_capacity(10), client);
    let calls: Vec<_> = (0..3_000)
        .map(|_| {
            let executor = executor.clone();
            tokio::spawn(async move { executor.submit(request("call")).await.unwrap().await.unwrap() })
        })
        .collect();
    for call in calls {
        call.await.unwrap();
    }
    assert_eq!(arrivals.times().len(), 3_000);
    assert_eq!(executor.monitor().totals().completed, 3_000);
}

#[tokio::test(start_paused = true)]
async fn an_immediate_stop_leaves_every_event_cancelled_with_its_time() {
    let (client, arrivals) = client(ms(10_000));
    let executor = started(unlimited().concurrency_limit(5), client);
    let mut calls = Vec::new();
    for _ in 0..100 {
        calls.push(executor.submit(request("call")).await.unwrap());
    }
    pass(ms(300)).await;
    let report = executor.stop(Shutdown::Immediate).await;
    assert_eq!((report.completed, report.failed, report.cancelled), (0, 0, 100));
    assert_eq!(report.elapsed, ms(0));
    assert_eq!(arrivals.times().len(), 5);
    for call in calls {
        let event = call.event().snapshot();
        assert_eq!(event.status, RequestStatus::Cancelled);
        assert_eq!(event.time_total(), Some(ms(300)));
        assert!(call.await.unwrap_err().is_cancelled());
    }
    assert_eq!(
        (executor.monitor().in_flight(), executor.monitor().queue_depth()),
        (0, 0)
    );
}

#[tokio::test(start_paused = true)]
async fn a_stop_bounded_by_a_deadline_finishes_what_it_can_and_cancels_the_rest() {
    let (client, _) = client(ms(100));
    let executor = started(unlimited().concurrency_limit(1), client);
    for _ in 0..10 {
        drop(executor.submit(request("call")).await.unwrap());
    }
    let report = executor.stop(Shutdown::Within(ms(350))).await;
    assert_eq!((report.completed, report.failed, report.cancelled), (3, 0, 7));
    assert_eq!(report.elapsed, ms(350));
    executor.start().unwrap();
    drop(executor.submit(request("call")).await.unwrap());
    let report = executor.stop(Shutdown::Within(ms(350))).await;
    assert_eq!((report.completed, report.elapsed), (1, ms(100)));
}

#[tokio::test(start_paused = true)]
async fn a_second_harder_stop_takes_effect_at_once_and_both_return() {
    let (client, _) = client(ms(10_000));
    let executor = started(unlimited(), client);
    let call = executor.submit(request("call")).await.unwrap();
    let gentle = tokio::spawn({
        let executor = executor.clone();
        async move { executor.stop(Shutdown::Graceful).await }
    });
    settle().await;
    assert!(executor.start().unwrap_err().is_already_running());
    assert!(executor.submit(request("late")).await.unwrap_err().is_not_running());
    let start = Instant::now();
    assert_eq!(executor.stop(Shutdown::Immediate).await.cancelled, 1);
    assert_eq!(gentle.await.unwrap().cancelled, 1);
    assert_eq!(start.elapsed(), ms(0));
    assert!(call.await.unwrap_err().is_cancelled());
    assert_eq!(
        executor.stop(Shutdown::Graceful).await,
        tower_outbound::executor::StopReport::default()
    );
}

#[tokio::test(start_paused = true)]
async fn stopping_refuses_calls_that_wait_for_a_place() {
    let (client, _) = client(ms(100));
    let executor = started(unlimited().queue_capacity(1).concurrency_limit(1), client);
    let mut updates = executor.monitor().subscribe();
    drop(executor.submit(request("running")).await.unwrap());
    settle().await;
    drop(executor.submit(request("queued")).await.unwrap());
    let waiting = tokio::spawn({
        let executor = executor.clone();
        async move { executor.submit(request("waits")).await.map(drop) }
    });
    settle().await;
    let report = executor.stop(Shutdown::Graceful).await;
    assert!(waiting.await.unwrap().unwrap_err().is_closed());
    assert_eq!((report.completed, report.cancelled), (2, 1));
    let mut last = Vec::new();
    while let Ok(Some(Ok(update))) = timeout(ms(1), updates.recv()).await {
        if update.status.is_terminal() {
            last.push(update.status);
        }
    }
    assert_eq!(
        last,
        [
            RequestStatus::Cancelled,
            RequestStatus::Completed,
            RequestStatus::Completed
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn dropping_the_last_executor_aborts() {
    let (client, _) = client(ms(10_000));
    let executor = started(unlimited().concurrency_limit(1), client);
    let calls = [
        executor.submit(request("a")).await.unwrap(),
        executor.submit(request("b")).await.unwrap(),
    ];
    let clone = executor.clone();
    drop(executor);
    settle().await;
    assert!(clone.is_running());
    drop(clone);
    for call in calls {
        let event = call.event().clone();
        assert!(call.await.unwrap_err().is_cancelled());
        assert_eq!(event.finished().await.status, RequestStatus::Cancelled);
    }
}

#[tokio::test(start_paused = true)]
async fn run_starts_works_and_stops_gracefully() {
    let (client, arrivals) = client(ms(100));
    let executor = unlimited().build(client).unwrap();
    let event = executor
        .run(async |executor| {
            assert!(executor.is_running());
            executor.submit(request("call")).await.unwrap().event().clone()
        })
        .await
        .unwrap();
    assert!(!executor.is_running());
    assert_eq!((event.status(), arrivals.times().len()), (RequestStatus::Completed, 1));
}

#[tokio::test(start_paused = true)]
async fn run_that_is_dropped_while_it_drains_cancels_what_is_left() {
    let (client, _) = client(ms(100_000));
    let executor = unlimited().build(client).unwrap();
    let run = executor.run(async |executor| drop(executor.submit(request("call")).await.unwrap()));
    timeout(ms(1_000), run).await.unwrap_err();
    settle().await;
    assert_eq!(executor.monitor().totals().cancelled, 1);
}

#[tokio::test(start_paused = true)]
async fn a_value_dropped_by_an_abort_may_use_the_executor() {
    struct UsesWhenDropped(Plain);
    impl Drop for UsesWhenDropped {
        fn drop(&mut self) {
            assert!(!self.0.is_running());
        }
    }
    let (client, _) = client(ms(1_000));
    let other = started(unlimited().concurrency_limit(1), client);
    let watched = other.clone();
    let executor = unlimited().concurrency_limit(1).build_for_closures::<()>().unwrap();
    let run = executor.run(async |executor| {
        for _ in 0..3 {
            let value = UsesWhenDropped(watched.clone());
            let call = Call::new(move || {
                let _value = &value;
                std::future::pending::<Result<(u16, ()), BoxError>>()
            });
            drop(executor.submit(call).await.unwrap());
        }
        watched.stop(Shutdown::Immediate).await;
        std::future::pending::<()>().await;
    });
    timeout(ms(100), run).await.unwrap_err();
    settle().await;
    assert_eq!(executor.monitor().totals().cancelled, 3);
}

#[tokio::test]
async fn settings_that_contradict_each_other_are_refused_or_added_up() {
    let limits = Limits::new().requests(Rate::per_minute(500));
    let executor = Executor::builder()
        .limits(limits)
        .tokens(Rate::per_minute(1_000))
        .build_for_closures::<()>()
        .unwrap();
    let available = executor.monitor().limiter().available();
    assert_eq!((available.requests, available.tokens), (Some(500), Some(1_000)));
    let shared = Executor::builder()
        .limiter(executor.monitor().limiter().clone())
        .tokens(Rate::per_minute(1));
    assert_eq!(shared.build_for_closures::<()>().unwrap_err().field(), "limiter");
    let shared = Executor::builder()
        .limiter(executor.monitor().limiter().clone())
        .requests(Rate::per_minute(1));
    assert_eq!(shared.build_for_closures::<()>().unwrap_err().field(), "limiter");
    let two_rates = unlimited().requests(Rate::per_day(3)).requests(Rate::per_second(5));
    let executor = two_rates.build_for_closures::<()>().unwrap();
    assert_eq!(executor.monitor().limiter().available().requests, Some(3));
    let config = Config {
        tokens_burst: Some(5.0),
        ..Config::default()
    };
    assert_eq!(config.into_builder().unwrap_err().field(), "tokens_rate");
}

#[tokio::test(start_paused = true)]
async fn run_that_is_dropped_or_panics_cancels_what_was_submitted() {
    let (client, _) = client(ms(100_000));
    let executor = unlimited().build(client).unwrap();
    let run = executor.run(async |executor| {
        drop(executor.submit(request("call")).await.unwrap());
        sleep(ms(5_000)).await;
    });
    timeout(ms(100), run).await.unwrap_err();
    settle().await;
    assert_eq!(executor.monitor().totals().cancelled, 1);

    let again = executor.clone();
    let run = tokio::spawn(async move {
        again
            .run(async |executor| {
                drop(executor.submit(request("call")).await.unwrap());
                panic!("at the disco");
            })
            .await
    });
    assert!(run.await.unwrap_err().is_panic());
    settle().await;
    assert_eq!(executor.monitor().totals().cancelled, 2);
}

// --- calls ---

#[tokio::test(start_paused = true)]
async fn a_handle_has_its_event_at_once_and_the_response_when_awaited() {
    let (client, _) = client(ms(100));
    let executor = started(unlimited(), client);
    let call = Call::from(request("call"))
        .tokens(7)
        .metadata("task_id", 3)
        .request_id("mine")
        .payload("text");
    let call = executor.submit(call).await.unwrap();
    let event = call.event().snapshot();
    assert_eq!(event.status, RequestStatus::Queued);
    assert_eq!(call.request_id().to_string(), "mine");
    assert_eq!((event.api_tokens, &event.metadata["task_id"]), (7, &Value::from(3)));
    assert_eq!(event.payload, Some(Value::from("text")));
    let event = call.event().clone();
    assert_eq!(*call.await.unwrap().body(), "done");
    assert_eq!(event.status(), RequestStatus::Completed);
}

#[tokio::test(start_paused = true)]
async fn a_call_that_waits_for_a_place_is_pending_and_then_queued() {
    let (client, _) = client(ms(100));
    let executor = started(unlimited().queue_capacity(1).concurrency_limit(1), client);
    drop(executor.submit(request("running")).await.unwrap());
    settle().await;
    drop(executor.submit(request("queued")).await.unwrap());
    let mut updates = executor.monitor().subscribe();
    let mut submit = task::spawn(executor.submit(Call::from(request("waits"))));
    assert_pending!(submit.poll());
    let waits = updates.recv().await.unwrap().unwrap().event;
    assert_eq!(waits.status(), RequestStatus::Pending);
    sleep(ms(100)).await;
    let call = submit.await.unwrap();
    assert_eq!(call.event().snapshot().time_pending(), Some(ms(100)));
}

#[tokio::test(start_paused = true)]
async fn a_submit_that_is_dropped_while_it_waits_makes_no_call() {
    let (client, arrivals) = client(ms(100));
    let executor = started(unlimited().queue_capacity(1).concurrency_limit(1), client);
    drop(executor.submit(request("running")).await.unwrap());
    settle().await;
    drop(executor.submit(request("queued")).await.unwrap());
    timeout(ms(10), executor.submit(request("given up"))).await.unwrap_err();
    assert_eq!(executor.monitor().totals().cancelled, 1);
    executor.stop(Shutdown::Graceful).await;
    assert_eq!(arrivals.names(), ["running", "queued"]);
}

#[tokio::test(start_paused = true)]
async fn dropping_the_handle_lets_the_call_run_and_cancel_ends_it() {
    let (client, _) = client(ms(100));
    let executor = started(unlimited().concurrency_limit(2), client);
    let event = executor.submit(request("dropped")).await.unwrap().event().clone();
    let running = executor.submit(request("running")).await.unwrap();
    let queued = executor.submit(request("queued")).await.unwrap();
    pass(ms(50)).await;
    assert_eq!(executor.monitor().queue_depth(), 1);
    queued.cancel();
    assert_eq!(
        (queued.event().status(), executor.monitor().queue_depth()),
        (RequestStatus::Cancelled, 0)
    );
    running.cancel();
    settle().await;
    assert_eq!(
        (running.event().status(), executor.monitor().in_flight()),
        (RequestStatus::Cancelled, 1)
    );
    assert!(running.await.unwrap_err().is_cancelled());
    assert!(queued.await.unwrap_err().is_cancelled());
    assert_eq!(event.finished().await.status, RequestStatus::Completed);
}

#[tokio::test(start_paused = true)]
async fn try_submit_refuses_when_full_and_returns_the_request_and_leaves_no_event() {
    let (client, _) = client(ms(100));
    let executor = started(unlimited().queue_capacity(1), client);
    drop(executor.try_submit(request("a")).unwrap());
    let error = executor.try_submit(request("b")).unwrap_err();
    assert!(error.is_full());
    assert_eq!(error.to_string(), "the queue is full");
    assert!(std::error::Error::source(&error).is_none());
    assert_eq!(error.into_request().unwrap().into_body(), "b");
    assert_eq!(executor.monitor().totals().opened, 1);
}

#[tokio::test(start_paused = true)]
async fn as_a_tower_service_it_refuses_before_start_and_a_call_that_was_accepted_has_its_event() {
    let mut executor = unlimited().build(client(ms(100)).0).unwrap();
    let refused = executor.call(request("early"));
    assert!(refused.event().is_none());
    assert!(refused.await.unwrap_err().is_not_running());
    assert!(executor.ready().await.unwrap_err().is_not_running());
    assert_eq!(executor.monitor().totals().opened, 0);

    executor.start().unwrap();
    let call = executor.ready().await.unwrap().call(request("call"));
    let event = call.event().unwrap().clone();
    assert_eq!(call.await.unwrap().into_body(), "done");
    assert_eq!(event.status(), RequestStatus::Completed);
}

#[tokio::test(start_paused = true)]
async fn debug_shows_the_state_of_an_executor() {
    let executor = unlimited().build(client(ms(100)).0).unwrap();
    assert!(format!("{executor:?}").contains(r#"state: "stopped""#));
    executor.start().unwrap();
    assert!(format!("{executor:?}").contains(r#"state: "running""#));
    drop(executor.submit(request("call")).await.unwrap());
    let stop = tokio::spawn({
        let executor = executor.clone();
        async move { executor.stop(Shutdown::Graceful).await }
    });
    settle().await;
    assert!(format!("{executor:?}").contains(r#"state: "stopping""#));
    stop.await.unwrap();
    assert!(format!("{executor:?}").contains(r#"state: "stopped""#));
}

#[tokio::test(start_paused = true)]
async fn a_function_can_set_what_a_call_costs_and_the_cost_is_checked_before_the_queue() {
    let (client, arrivals) = client(ms(0));
    let executor = unlimited()
        .tokens(Rate::per_second(10))
        .cost(|request: &Request<&'static str>| Cost::tokens(request.body().len() as u64))
        .build(client)
        .unwrap();
    executor.start().unwrap();
    let calls = [
        executor.submit(request("eight888")).await,
        executor.submit(request("seven77")).await,
    ];
    let refused = executor.submit(request("eleven11111")).await.unwrap_err();
    assert_eq!(refused.find::<CostExceedsBurst>().unwrap().cost(), 11);
    for call in calls {
        call.unwrap().await.unwrap();
    }
    // The first call takes 8 of the 10 tokens. The second call needs 7 tokens: 2 are left, and the rate adds the
    // missing 5 in half a second.
    assert_eq!(arrivals.times(), [ms(0), ms(500)]);
}

#[tokio::test(start_paused = true)]
async fn an_executor_behind_an_executor_passes_its_errors_on_unchanged() {
    let (client, _) = client(ms(100));
    let inner = started(unlimited(), client);
    let outer = unlimited().build(inner.clone()).unwrap();
    outer.start().unwrap();

    let call = outer.submit(request("call")).await.unwrap();
    settle().await;
    inner.stop(Shutdown::Immediate).await;
    let error = call.await.unwrap_err();
    assert!(error.is_cancelled());
    assert_eq!(error.to_string(), "the call was cancelled");
    assert!(std::error::Error::source(&error).is_none(), "not wrapped a second time");

    let call = outer.submit(request("late")).await.unwrap();
    let error = call.await.unwrap_err();
    assert!(error.is_not_running() && !error.is_cancelled());
    assert!(outer.is_running());
}

#[tokio::test(start_paused = true)]
async fn an_error_is_found_anywhere_in_its_chain_and_is_returned_unchanged() {
    #[derive(Debug)]
    struct Outer(std::num::ParseIntError);
    impl std::fmt::Display for Outer {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("see http://u:s3cret@h/")
        }
    }
    impl std::error::Error for Outer {
        fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
            Some(&self.0)
        }
    }
    let client = service_fn(async |_: Request<()>| Err::<Response<()>, _>(Outer("x".parse::<u8>().unwrap_err())));
    let executor = unlimited().build(client).unwrap();
    executor.start().unwrap();
    let call = executor.submit(Request::new(())).await.unwrap();
    let error = call.await.unwrap_err();
    assert!(error.find::<std::num::ParseIntError>().is_some());
    assert!(error.find::<std::fmt::Error>().is_none());
    assert_eq!(error.to_string(), "see http://h/");

    let error = TrySubmitError::<()>::from(error);
    assert_eq!(error.to_string(), "see http://h/");
    let cause = std::error::Error::source(&error).unwrap();
    assert_eq!(cause.to_string(), "x".parse::<u8>().unwrap_err().to_string());
    assert!(!error.is_full() && !format!("{error:?}").contains("s3cret"));
    let TrySubmitError::Other(error) = error else {
        unreachable!("converted from an error");
    };
    assert_eq!(
        error.into_inner().downcast::<Outer>().unwrap().to_string(),
        "see http://u:s3cret@h/"
    );
}

#[tokio::test(start_paused = true)]
async fn as_a_tower_service_a_dropped_call_is_cancelled() {
    let (client, _) = client(ms(100));
    let mut executor = started(unlimited(), client);
    assert_eq!(
        *executor
            .ready()
            .await
            .unwrap()
            .call(request("call"))
            .await
            .unwrap()
            .body(),
        "done"
    );
    let call = executor.ready().await.unwrap().call(request("dropped"));
    settle().await;
    drop(call);
    settle().await;
    assert_eq!(executor.monitor().totals().cancelled, 1);
    // An executor handle that was ready before a restart can be called after it.
    executor.ready().await.unwrap();
    executor.stop(Shutdown::Graceful).await;
    executor.start().unwrap();
    executor.ready().await.unwrap().call(request("again")).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_cost_above_the_burst_is_refused_at_once_even_behind_a_long_queue() {
    let (client, _) = client(ms(1_000));
    let executor = started(
        Executor::builder().concurrency_limit(1).tokens(Rate::per_minute(600)),
        client,
    );
    for _ in 0..100 {
        drop(executor.submit(Call::from(request("call")).tokens(6)).await.unwrap());
    }
    let start = Instant::now();
    let error = executor
        .submit(Call::from(request("heavy")).tokens(601))
        .await
        .unwrap_err();
    assert!(error.is_cost_exceeds_burst());
    assert_eq!(error.find::<CostExceedsBurst>().unwrap().burst(), 600);
    let heavy = Request::get("/").extension(ApiTokens(601)).body("heavy").unwrap();
    assert!(
        executor
            .clone()
            .oneshot(heavy)
            .await
            .unwrap_err()
            .is_cost_exceeds_burst()
    );
    assert_eq!(start.elapsed(), ms(0));
}

#[tokio::test(start_paused = true)]
async fn a_malformed_url_method_or_header_is_refused_when_submitted() {
    let executor = started(unlimited(), client(ms(0)).0);
    for call in [
        Call::from(request("url")).url("http://exa mple/"),
        Call::from(request("method")).method("GE T"),
        Call::from(request("header")).header("na me", "value"),
        Call::from(request("header")).header("name", "va\nlue"),
    ] {
        assert!(executor.submit(call).await.unwrap_err().find::<http::Error>().is_some());
    }
    assert_eq!(executor.monitor().totals().opened, 0);
}

#[tokio::test(start_paused = true)]
async fn calls_begin_in_order_and_at_the_rate() {
    let (client, arrivals) = client(ms(0));
    let executor = started(Executor::builder().requests(Rate::per_second(10).burst(1)), client);
    let names = ["a", "b", "c", "d", "e"];
    for name in names {
        drop(executor.submit(request(name)).await.unwrap());
    }
    executor.stop(Shutdown::Graceful).await;
    assert_eq!(arrivals.names(), names);
    assert_eq!(arrivals.times(), [0, 100, 200, 300, 400].map(ms));
}

#[tokio::test(start_paused = true)]
async fn the_rate_holds_with_1_5_and_50_workers() {
    for workers in [1, 5, 50] {
        let (client, arrivals) = client(ms(0));
        let builder = Executor::builder().concurrency_limit(100).workers(workers);
        let executor = started(builder, client);
        for _ in 0..200 {
            drop(executor.submit(request("call")).await.unwrap());
        }
        executor.stop(Shutdown::Graceful).await;
        assert_eq!(arrivals.times().len(), 200);
        assert_eq!(arrivals.times()[199], ms(19_000), "{workers} workers");
        // In any second, at most 20 calls are admitted: the burst of 10, and the 10 that the rate adds per second.
        assert!(arrivals.most_within(ms(1_000)) <= 20);
        assert!(arrivals.most_within(ms(100)) <= 11);
    }
}

#[tokio::test(start_paused = true)]
async fn workers_never_cap_concurrency() {
    let (client, arrivals) = client(ms(1_000));
    let executor = started(unlimited().workers(1).concurrency_limit(50), client);
    for _ in 0..60 {
        drop(executor.submit(request("call")).await.unwrap());
    }
    pass(ms(10)).await;
    assert_eq!((arrivals.times().len(), executor.monitor().in_flight()), (50, 50));
}

#[tokio::test(start_paused = true)]
async fn tokens_hold_back_calls_that_the_rate_of_requests_would_admit() {
    let (client, arrivals) = client(ms(0));
    let builder = Executor::builder()
        .requests(Rate::per_second(100))
        .tokens(Rate::per_minute(600).burst(100));
    let executor = started(builder, client);
    for _ in 0..4 {
        drop(executor.submit(Call::from(request("call")).tokens(50)).await.unwrap());
    }
    executor.stop(Shutdown::Graceful).await;
    assert_eq!(arrivals.times(), [ms(0), ms(0), ms(5_000), ms(10_000)]);
}

#[tokio::test(start_paused = true)]
async fn a_panicking_call_and_one_that_is_aborted_leave_the_workers_alive() {
    let executor = unlimited().workers(1).build_for_closures::<()>().unwrap();
    executor.start().unwrap();
    let panics = Call::new(|| async {
        if true {
            panic!("at the disco");
        }
        Ok::<_, BoxError>((200, ()))
    });
    let call = executor.submit(panics).await.unwrap();
    let event = call.event().clone();
    assert!(call.await.unwrap_err().is_panicked());
    assert_eq!(event.snapshot().error_type.as_deref(), Some("Panicked"));

    // The call fails with the `JoinError` of a task that it has aborted. The executor must not take this error for the
    // cancellation of a worker.
    let aborts = Call::new(|| async {
        let task = tokio::spawn(std::future::pending::<()>());
        task.abort();
        task.await?;
        Ok::<_, tokio::task::JoinError>((200, ()))
    });
    let call = executor.submit(aborts).await.unwrap();
    let event = call.event().clone();
    call.await.unwrap_err();
    assert!(event.snapshot().error_type.unwrap().ends_with("JoinError"));

    let cancelled = executor
        .submit(Call::new(std::future::pending::<Result<(u16, ()), BoxError>>))
        .await
        .unwrap();
    settle().await;
    cancelled.cancel();
    cancelled.await.unwrap_err();

    let fine = executor
        .submit(Call::new(|| async { Ok::<_, BoxError>((200, ())) }))
        .await
        .unwrap();
    assert_eq!(fine.await.unwrap().status(), 200);
    let totals = executor.monitor().totals();
    assert_eq!((totals.completed, totals.failed, totals.cancelled), (1, 2, 1));
}

// --- closures ---

#[tokio::test(start_paused = true)]
async fn a_closure_is_a_call_and_all_that_is_set_for_it_is_recorded() {
    let describe = Http::default().response_body(|body: &String| body.as_str().into());
    let executor = unlimited().describe(describe).build_for_closures::<String>().unwrap();
    executor.start().unwrap();
    let called = Arc::new(AtomicUsize::new(0));
    let count = called.clone();
    let call = Call::new(move || {
        count.fetch_add(1, Ordering::SeqCst);
        async { Ok::<_, BoxError>((201, [("x-a", "b")], "the body".to_owned())) }
    })
    .url("https://api.example.com/data?api_key=s3")
    .method("POST")
    .header("authorization", "Bearer s3")
    .header("accept", "*/*")
    .payload(Value::from([
        ("prompt", Value::from("hi")),
        ("api_key", Value::from("s3")),
    ]))
    .tokens(5)
    .metadata("task_id", 1);
    let call = executor.submit(call).await.unwrap();
    let event = call.event().clone();
    let response = call.await.unwrap();
    assert_eq!(
        (
            response.status().as_u16(),
            &response.headers()["x-a"],
            response.body().as_str()
        ),
        (201, &"b".parse().unwrap(), "the body")
    );
    assert_eq!(called.load(Ordering::SeqCst), 1);

    let event: NetworkRequestEvent = event.snapshot();
    assert_eq!(event.status, RequestStatus::Completed);
    assert_eq!(
        event.endpoint_url.as_deref(),
        Some("https://api.example.com/data?api_key=[redacted]")
    );
    assert_eq!(event.method.as_deref(), Some("POST"));
    assert_eq!(
        (&event.headers["authorization"], &event.headers["accept"]),
        (&"[redacted]".parse().unwrap(), &"*/*".parse().unwrap())
    );
    assert_eq!(
        event.payload.unwrap().to_string(),
        r#"{"api_key":"[redacted]","prompt":"hi"}"#
    );
    assert_eq!((event.api_tokens, &event.metadata["task_id"]), (5, &Value::from(1)));
    assert_eq!(
        (event.response_status_code, &event.response_headers["x-a"]),
        (Some(201), &"b".parse().unwrap())
    );
    assert_eq!(event.response_body, Some(Value::from("the body")));
}

#[tokio::test(start_paused = true)]
async fn a_closure_with_nothing_set_for_it_has_only_its_outcome_recorded() {
    let executor = unlimited().build_for_closures::<String>().unwrap();
    executor.start().unwrap();
    let call = executor
        .submit(Call::new(|| async { Ok::<_, BoxError>((200, "secret".to_owned())) }))
        .await
        .unwrap();
    let event = call.event().finished().await;
    assert_eq!(
        (event.endpoint_url, event.method, event.payload, event.response_body),
        (None, None, None, None)
    );
    assert_eq!(event.response_status_code, Some(200));
}

#[tokio::test(start_paused = true)]
async fn the_response_of_a_closure_may_have_any_of_several_shapes() {
    async fn response<T: IntoHttpResponse<u8> + Send + 'static>(
        shape: impl Fn() -> T + Send + Sync + 'static,
    ) -> Response<u8> {
        let executor = unlimited().build_for_closures::<u8>().unwrap();
        executor.start().unwrap();
        let call = Call::new(move || std::future::ready(Ok::<_, BoxError>(shape())));
        executor.submit(call).await.unwrap().await.unwrap()
    }
    let whole = || Response::builder().status(202).header("x-a", "b").body(7).unwrap();
    for response in [
        response(whole).await,
        response(|| (202, [("x-a", "b")], 7)).await,
        response(|| (202, vec![("x-a", "b".to_owned())], 7)).await,
        response(|| (202, HashMap::from([("x-a".to_owned(), "b")]), 7)).await,
        response(|| (202, BTreeMap::from([("x-a", "b")]), 7)).await,
        response(move || (StatusCode::ACCEPTED, whole().headers().clone(), 7)).await,
    ] {
        assert_eq!((response.status(), response.headers().len()), (StatusCode::ACCEPTED, 1));
        assert_eq!(
            (&response.headers()["x-a"], response.body()),
            (&"b".parse().unwrap(), &7)
        );
    }
    assert_eq!(response(|| (404, 7)).await.status(), StatusCode::NOT_FOUND);
}

#[tokio::test(start_paused = true)]
async fn a_closure_that_is_retried_is_called_once_for_each_attempt() {
    #[derive(Clone)]
    struct OnError;
    impl<B: Clone, R> tower::retry::Policy<Request<B>, Response<R>, BoxError> for OnError {
        type Future = std::future::Ready<()>;
        fn retry(&mut self, _: &mut Request<B>, result: &mut Result<Response<R>, BoxError>) -> Option<Self::Future> {
            result.is_err().then(|| std::future::ready(()))
        }
        fn clone_request(&mut self, req: &Request<B>) -> Option<Request<B>> {
            Some(req.clone())
        }
    }
    let executor = unlimited()
        .layer(tower::retry::RetryLayer::new(OnError))
        .build_for_closures::<usize>()
        .unwrap();
    executor.start().unwrap();
    let called = Arc::new(AtomicUsize::new(0));
    let call = Call::new(move || {
        let number = called.fetch_add(1, Ordering::SeqCst);
        async move { if number < 2 { Err("not yet") } else { Ok((200, number)) } }
    });
    let call = executor.submit(call).await.unwrap();
    let event = call.event().clone();
    assert_eq!(*call.await.unwrap().body(), 2);
    let errors: Vec<_> = event
        .snapshot()
        .attempts
        .into_iter()
        .map(|attempt| attempt.error_message)
        .collect();
    assert_eq!(errors, [Some("not yet".to_owned()), Some("not yet".to_owned()), None]);
}

#[tokio::test(start_paused = true)]
async fn the_error_of_a_closure_may_be_of_any_type() {
    let executor = unlimited().build_for_closures::<()>().unwrap();
    executor.start().unwrap();

    let call =
        Call::new(|| async { Err::<(u16, ()), _>(std::io::Error::new(std::io::ErrorKind::TimedOut, std::fmt::Error)) });
    let call = executor.submit(call).await.unwrap();
    let event = call.event().clone();
    let error = call.await.unwrap_err();
    assert!(
        error.find::<std::io::Error>().is_some(),
        "the caller gets the client's error"
    );
    let event = event.snapshot();
    assert_eq!(event.status, RequestStatus::Failed);
    assert_eq!(event.error_type.as_deref(), Some("std::io::error::Error"));
    assert_eq!(
        event.error_message.as_deref(),
        Some(std::fmt::Error.to_string().as_str())
    );
    assert_eq!(event.attempts.len(), 1);

    let call = executor
        .submit(Call::new(|| async { Err::<(u16, ()), _>("just a text") }))
        .await
        .unwrap();
    let event = call.event().finished().await;
    assert_eq!(event.error_message.as_deref(), Some("just a text"));
    assert_eq!(event.error_type.as_deref(), Some("&str"));

    let call = executor
        .submit(Call::new(|| async { Ok::<_, BoxError>((1_000, ())) }))
        .await
        .unwrap();
    assert!(call.event().finished().await.error_message.unwrap().contains("status"));
}

// --- watching ---

#[tokio::test(start_paused = true)]
async fn queue_depth_calls_in_flight_and_totals_can_be_read_and_limits_changed() {
    let (client, _) = client(ms(1_000));
    let executor = started(Executor::builder().concurrency_limit(2), client);
    let monitor = executor.monitor();
    for _ in 0..5 {
        drop(executor.submit(request("call")).await.unwrap());
    }
    settle().await;
    assert_eq!(
        (monitor.queue_depth(), monitor.in_flight(), monitor.calling()),
        (3, 2, 2)
    );
    assert_eq!(monitor.limiter().available().requests, Some(8));
    assert_eq!((monitor.totals().opened, monitor.totals().open()), (5, 5));
    monitor.concurrency().set(4).unwrap();
    settle().await;
    assert_eq!((monitor.queue_depth(), monitor.in_flight()), (1, 4));
    executor.stop(Shutdown::Graceful).await;
    assert_eq!((monitor.in_flight(), monitor.calling()), (0, 0));
    assert_eq!((monitor.totals().completed, monitor.totals().open()), (5, 0));
    drop(executor);
    assert_eq!(monitor.totals().ended(), 5);
}

#[tokio::test(start_paused = true)]
async fn one_limiter_and_one_concurrency_limit_can_be_shared_by_two_executors() {
    let (client, arrivals) = client(ms(0));
    let first = started(
        Executor::builder().requests(Rate::per_second(10).burst(1)),
        client.clone(),
    );
    let monitor = first.monitor();
    let shared = Executor::builder()
        .limiter(monitor.limiter().clone())
        .concurrency(monitor.concurrency().clone());
    let second = started(shared, client);
    for executor in [&first, &second, &first, &second] {
        drop(executor.submit(request("call")).await.unwrap());
    }
    first.stop(Shutdown::Graceful).await;
    second.stop(Shutdown::Graceful).await;
    assert_eq!(arrivals.times(), [0, 100, 200, 300].map(ms));
}

#[tokio::test(start_paused = true)]
async fn a_layer_around_the_limits_sees_a_call_once_and_one_around_the_client_every_attempt() {
    #[derive(Clone)]
    struct Again;
    impl tower::retry::Policy<Request<&'static str>, Response<&'static str>, BoxError> for Again {
        type Future = std::future::Ready<()>;
        fn retry(
            &mut self,
            req: &mut Request<&'static str>,
            _: &mut Result<Response<&'static str>, BoxError>,
        ) -> Option<Self::Future> {
            let again = req.body() == &"again";
            *req.body_mut() = "last";
            again.then(|| std::future::ready(()))
        }
        fn clone_request(&mut self, req: &Request<&'static str>) -> Option<Request<&'static str>> {
            Some(req.clone())
        }
    }
    let (client, arrivals) = client(ms(0));
    let executor = Executor::builder()
        .requests(Rate::per_second(10).burst(1))
        .layer(tower::retry::RetryLayer::new(Again))
        .layer(tower::timeout::TimeoutLayer::new(ms(250)))
        .build(client)
        .unwrap();
    executor.start().unwrap();
    let call = executor.submit(request("again")).await.unwrap();
    let event = call.event().clone();
    call.await.unwrap();
    // Each of the two attempts was charged to the rate limiter, so the second one began 100 ms after the first.
    assert_eq!(arrivals.times(), [ms(0), ms(100)]);
    assert_eq!(event.snapshot().attempts.len(), 2);
    assert_eq!(executor.monitor().totals().opened, 1);
    // The timeout layer is around the limits, so its 250 ms include the wait for the rate limiter, which is paused for
    // 1 s.
    executor.monitor().limiter().pause_for(ms(1_000));
    let call = executor.submit(request("call")).await.unwrap();
    assert!(
        call.await
            .unwrap_err()
            .find::<tower::timeout::error::Elapsed>()
            .is_some()
    );
}

#[tokio::test(start_paused = true)]
async fn a_client_that_is_not_sync_and_requests_that_are_not_can_be_used() {
    let cell = std::cell::Cell::new(1);
    let client = service_fn(move |req: Request<std::cell::Cell<u8>>| {
        let sum = req.body().get() + cell.get();
        async move { Ok::<_, BoxError>(Response::new(sum)) }
    });
    let executor = unlimited().build(client).unwrap();
    executor.start().unwrap();
    let call = executor.submit(Request::new(std::cell::Cell::new(2))).await.unwrap();
    assert_eq!(*call.await.unwrap().body(), 3);
}

// --- calls that make calls ---

/// A call that submits and awaits a call of the executor, which responds with the time `takes` later.
fn nested(executor: &Executor<Closure<String>, String>, takes: Duration) -> Call<Closure<String>> {
    let executor = executor.clone();
    Call::new(move || {
        let executor = executor.clone();
        async move {
            sleep(ms(1)).await;
            let inner = Call::new(move || async move {
                sleep(takes).await;
                Ok::<_, BoxError>((200, String::from("inner")))
            });
            executor.submit(inner).await?.await?;
            Ok::<_, BoxError>((200, String::from("outer")))
        }
    })
}

#[tokio::test(start_paused = true)]
async fn a_call_that_awaits_a_call_without_a_permit_gets_an_error_if_no_call_could_go_on() {
    for concurrency in [1, 3] {
        let executor = unlimited()
            .concurrency_limit(concurrency)
            .build_for_closures::<String>()
            .unwrap();
        executor.start().unwrap();
        let mut calls = Vec::new();
        for _ in 0..concurrency {
            calls.push(executor.submit(nested(&executor, ms(10))).await.unwrap());
        }
        let mut deadlocks = 0;
        for call in calls {
            match timeout(HANG, call).await.expect("no call hangs") {
                Ok(response) => assert_eq!(response.body(), "outer"),
                Err(error) => {
                    assert!(error.is_deadlock(), "{error}");
                    deadlocks += 1;
                }
            }
        }
        // The last of the calls completes the circle. When it has failed, the others go on.
        assert_eq!(deadlocks, 1);
    }
}

#[tokio::test(start_paused = true)]
async fn calls_that_await_calls_go_on_if_a_permit_is_left_or_will_be_free() {
    let executor = unlimited().concurrency_limit(2).build_for_closures::<String>().unwrap();
    executor.start().unwrap();
    let other = || async {
        sleep(ms(50)).await;
        Ok::<_, BoxError>((200, String::new()))
    };
    let other = executor.submit(Call::new(other)).await.unwrap();
    let outer = executor.submit(nested(&executor, ms(10))).await.unwrap();
    let begun = Instant::now();
    assert_eq!(outer.await.unwrap().body(), "outer");
    assert_eq!(begun.elapsed(), ms(60));
    other.await.unwrap();
}
