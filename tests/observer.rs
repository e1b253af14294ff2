//! Tests of observers, which are called at every step of every call, and of the waits of a call by cause.

mod support;

use http::{Request, Response};
use std::{
    convert::Infallible,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use support::{client, ms, request, settle, steps::Steps};
use tokio::time::sleep;
use tower::{BoxError, Layer, Service, ServiceBuilder, ServiceExt, service_fn};
use tower_outbound::{
    Call, ConcurrencyLimitLayer, Cost, EventHandle, EventLayer, Executor, Limits, Rate, RateLimitLayer, RateLimiter,
    RequestStatus, Shutdown,
    event::{AttemptEnd, CallEnd, Events, LimitReport, Observer, Refusal, WaitCause},
    provider::{FeedbackLayer, Provider},
    rate::Budget,
};

/// Counts each step.
#[derive(Default)]
struct Counts {
    opened: AtomicU64,
    queued: AtomicU64,
    started: AtomicU64,
    charged: AtomicU64,
    attempts: AtomicU64,
    attempts_ended: AtomicU64,
    completed: AtomicU64,
    cancelled: AtomicU64,
    failed: AtomicU64,
}

fn one_more(count: &AtomicU64) {
    count.fetch_add(1, Ordering::Relaxed);
}

impl Observer for Counts {
    fn call_opened(&self, _: &EventHandle) {
        one_more(&self.opened);
    }

    fn call_queued(&self, _: &EventHandle) {
        one_more(&self.queued);
    }

    fn call_started(&self, _: &EventHandle) {
        one_more(&self.started);
    }

    fn call_charged(&self, _: &EventHandle, _: &Cost) {
        one_more(&self.charged);
    }

    fn attempt_started(&self, _: &EventHandle, _: u32) {
        one_more(&self.attempts);
    }

    fn attempt_ended(&self, _: &EventHandle, _: &AttemptEnd) {
        one_more(&self.attempts_ended);
    }

    fn call_ended(&self, _: &EventHandle, end: &CallEnd) {
        one_more(match end.status {
            RequestStatus::Completed => &self.completed,
            RequestStatus::Cancelled => &self.cancelled,
            _ => &self.failed,
        });
    }
}

#[tokio::test(start_paused = true)]
async fn an_observer_is_told_every_step_of_a_call_in_order() {
    let steps = Arc::new(Steps::default());
    let executor = Executor::builder()
        .requests(Rate::per_second(1).burst(1))
        .observe(steps.clone())
        .build(client(ms(100)).0)
        .unwrap();
    executor.start().unwrap();
    executor.submit(request("one")).await.unwrap().await.unwrap();
    executor.submit(request("two")).await.unwrap().await.unwrap();
    assert_eq!(
        steps.take(),
        [
            "opened http://localhost/",
            "queued",
            "started",
            "charged 1 requests, 0 tokens",
            "attempt 1",
            "attempt 1 ended after 100ms: 200",
            "COMPLETED after 100ms, waited []",
            "opened http://localhost/",
            "queued",
            "started",
            "charged 1 requests, 0 tokens",
            "attempt 1",
            "attempt 1 ended after 100ms: 200",
            "COMPLETED after 1s, waited [budget:requests 900ms]",
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn each_wait_of_a_call_has_its_cause() {
    // The second call leaves the queue when the first has ended, and finds the limiter paused.
    let executor = Executor::builder()
        .concurrency_limit(1)
        .limits(
            Limits::new()
                .requests(Rate::per_second(1_000).burst(1_000))
                .tokens(Rate::per_second(10).burst(10)),
        )
        .build(client(ms(2_000)).0)
        .unwrap();
    executor.start().unwrap();
    let call = || Call::from(request("call")).tokens(10);
    let first = executor.submit(call()).await.unwrap();
    settle().await;
    let second = executor.submit(call()).await.unwrap();
    settle().await;
    let event = second.event().clone();
    executor.monitor().limiter().pause_for(ms(2_500));
    first.await.unwrap();
    second.await.unwrap();
    let event = event.snapshot();
    let waits: Vec<_> = event
        .waits
        .iter()
        .map(|wait| (wait.cause.to_string(), wait.duration))
        .collect();
    assert_eq!(waits, [("turn".to_owned(), ms(2_000)), ("pause".to_owned(), ms(500))]);
    assert_eq!(event.time_waited_for(WaitCause::Pause), ms(500));
    assert_eq!(
        (event.time_in_queue(), event.time_waiting()),
        (Some(ms(2_000)), Some(ms(500)))
    );
}

#[tokio::test(start_paused = true)]
async fn a_wait_is_for_the_budget_that_is_available_last() {
    let limits = Limits::new()
        .requests(Rate::per_second(2).burst(1))
        .tokens(Rate::per_second(10).burst(20));
    let executor = Executor::builder().limits(limits).build(client(ms(0)).0).unwrap();
    executor.start().unwrap();
    let call = |tokens| Call::from(request("call")).tokens(tokens);
    let mut waits = Vec::new();
    // The buckets hold 1 request and 20 tokens.
    for tokens in [10, 10, 15] {
        let handle = executor.submit(call(tokens)).await.unwrap();
        let event = handle.event().clone();
        handle.await.unwrap();
        waits.extend(event.snapshot().waits);
    }
    let waits: Vec<_> = waits.iter().map(|wait| (wait.cause, wait.duration)).collect();
    let budget = WaitCause::Budget;
    assert_eq!(
        waits,
        [(budget(Budget::Requests), ms(500)), (budget(Budget::Tokens), ms(1_000))]
    );
}

#[tokio::test(start_paused = true)]
async fn a_wait_for_a_budget_and_for_a_pause_are_told_apart() {
    let executor = Executor::builder()
        .requests(Rate::per_second(1).burst(1))
        .build(client(ms(0)).0)
        .unwrap();
    executor.start().unwrap();
    executor.submit(request("one")).await.unwrap().await.unwrap();
    let second = executor.submit(request("two")).await.unwrap();
    sleep(ms(600)).await;
    executor.monitor().limiter().pause_for(ms(1_000));
    let event = second.event().clone();
    second.await.unwrap();
    let event = event.snapshot();
    assert_eq!(event.time_waited_for(WaitCause::Pause), ms(1_000));
    assert_eq!(event.time_waited_for(WaitCause::Budget(Budget::Requests)), ms(600));
}

#[tokio::test(start_paused = true)]
async fn a_call_that_is_cancelled_while_it_waits_has_waited() {
    let steps = Arc::new(Steps::default());
    let executor = Executor::builder()
        .requests(Rate::per_minute(1).burst(1))
        .observe(steps.clone())
        .build(client(ms(0)).0)
        .unwrap();
    executor.start().unwrap();
    executor.submit(request("one")).await.unwrap().await.unwrap();
    steps.take();
    let waiting = executor.submit(request("two")).await.unwrap();
    sleep(ms(700)).await;
    drop(waiting);
    executor.stop(Shutdown::Immediate).await;
    let ends = steps.take();
    assert_eq!(
        ends.last().unwrap(),
        "CANCELLED after 700ms, waited [budget:requests 700ms]"
    );
}

#[tokio::test(start_paused = true)]
async fn a_call_that_ends_at_its_deadline_has_waited() {
    let executor = Executor::builder()
        .concurrency_limit(1)
        .build(client(ms(10_000)).0)
        .unwrap();
    executor.start().unwrap();
    let _first = executor.submit(request("one")).await.unwrap();
    let second = executor
        .submit(Call::from(request("two")).timeout(ms(800)))
        .await
        .unwrap();
    let event = second.event().clone();
    second.await.unwrap_err();
    let event = event.finished().await;
    assert_eq!(event.status, RequestStatus::Failed);
    assert_eq!(event.time_waited_for(WaitCause::Turn), ms(800));
}

#[tokio::test(start_paused = true)]
async fn waits_for_a_place_and_for_a_turn_are_told_apart() {
    // Tower's limit lets no call begin before the last has ended. So a call waits in the queue, which holds one, and the next
    // for its place.
    let executor = Executor::builder()
        .queue_capacity(1)
        .layer(tower::limit::ConcurrencyLimitLayer::new(1))
        .build(client(ms(1_000)).0)
        .unwrap();
    executor.start().unwrap();
    let mut calls = Vec::new();
    for _ in 0..3 {
        let executor = executor.clone();
        calls.push(tokio::spawn(async move {
            let call = executor.submit(request("call")).await.unwrap();
            let event = call.event().clone();
            call.await.unwrap();
            event
        }));
        settle().await;
    }
    let mut waits = Vec::new();
    for call in calls {
        let event = call.await.unwrap().finished().await;
        assert_eq!(event.time_in_queue(), Some(event.time_waited_for(WaitCause::Turn)));
        waits.push((
            event.time_waited_for(WaitCause::Place),
            event.time_waited_for(WaitCause::Turn),
        ));
    }
    assert_eq!(waits, [(ms(0), ms(0)), (ms(0), ms(1_000)), (ms(1_000), ms(1_000))]);
}

#[tokio::test(start_paused = true)]
async fn a_stack_without_an_executor_records_its_waits() {
    let events = Events::new();
    let steps = Arc::new(Steps::default());
    events.observe(steps.clone());
    let limiter = RateLimiter::new(Limits::new().requests(Rate::per_second(1).burst(1))).unwrap();
    let service = ServiceBuilder::new()
        .layer(EventLayer::processing().report_to(&events))
        .layer(ConcurrencyLimitLayer::new(1).unwrap())
        .layer(RateLimitLayer::new(limiter))
        .layer(EventLayer::calling())
        .service(client(ms(300)).0);
    // Both services are ready, so the second call waits for its permit itself.
    let mut services = [service.clone(), service];
    for service in &mut services {
        service.ready().await.unwrap();
    }
    let [one, two] = services.map(|mut service| service.call(request("call")));
    let (one, two) = tokio::join!(one, two);
    one.unwrap();
    two.unwrap();
    let ends: Vec<_> = steps
        .take()
        .into_iter()
        .filter(|step| step.starts_with("COMPLETED"))
        .collect();
    assert_eq!(
        ends,
        [
            "COMPLETED after 300ms, waited []",
            "COMPLETED after 1.3s, waited [permit 300ms, budget:requests 700ms]"
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn a_call_waits_for_a_client_that_is_not_ready() {
    let events = Events::new();
    let steps = Arc::new(Steps::default());
    events.observe(steps.clone());
    let limiter = RateLimiter::new(Limits::new().requests(Rate::per_second(100))).unwrap();
    let busy = tower::limit::ConcurrencyLimit::new(client(ms(400)).0, 1);
    let service = ServiceBuilder::new()
        .layer(EventLayer::processing().report_to(&events))
        .layer(RateLimitLayer::new(limiter))
        .service(busy);
    let call = |name| service.clone().oneshot(request(name));
    let (one, two) = tokio::join!(call("one"), call("two"));
    one.unwrap();
    two.unwrap();
    let last = steps.take().pop().unwrap();
    assert_eq!(last, "COMPLETED after 800ms, waited [service 400ms]");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_ten_thousand_quick_calls_each_is_counted_exactly_once() {
    const CALLS: u64 = 10_000;
    let counts = Arc::new(Counts::default());
    let quick = service_fn(async |_: Request<&'static str>| Ok::<_, Infallible>(Response::new("")));
    let executor = Executor::builder()
        .limits(Limits::new())
        .observe(counts.clone())
        .build(quick)
        .unwrap();
    executor.start().unwrap();
    // A subscriber that never reads misses most of them.
    let _slow = executor.monitor().subscribe();
    let calls = (0..CALLS).map(|_| {
        let executor = executor.clone();
        async move { executor.submit(request("call")).await.unwrap().await.unwrap() }
    });
    futures_util::future::join_all(calls).await;
    executor.stop(Shutdown::Graceful).await;
    let counts = [
        &counts.opened,
        &counts.queued,
        &counts.started,
        &counts.charged,
        &counts.attempts,
        &counts.attempts_ended,
        &counts.completed,
    ]
    .map(|count| count.load(Ordering::Relaxed));
    assert_eq!(counts, [CALLS; 7]);
}

#[tokio::test(start_paused = true)]
async fn an_attempt_that_ends_with_its_call_is_told_once() {
    let counts = Arc::new(Counts::default());
    let steps = Arc::new(Steps::default());
    let executor = Executor::builder()
        .observe(counts.clone())
        .observe(steps.clone())
        .build(client(ms(5_000)).0)
        .unwrap();
    executor.start().unwrap();
    let _call = executor.submit(request("call")).await.unwrap();
    sleep(ms(100)).await;
    executor.stop(Shutdown::Immediate).await;
    assert_eq!(counts.attempts.load(Ordering::Relaxed), 1);
    assert_eq!(counts.attempts_ended.load(Ordering::Relaxed), 1);
    assert_eq!(counts.cancelled.load(Ordering::Relaxed), 1);
    let steps = steps.take();
    assert_eq!(
        steps[steps.len() - 2..],
        [
            "attempt 1 ended after 100ms: Some(\"Cancelled\")",
            "CANCELLED after 100ms, waited []"
        ]
    );
}

#[tokio::test]
async fn an_observer_that_panics_disturbs_neither_the_call_nor_other_observers() {
    struct Panics;
    impl Observer for Panics {
        fn call_opened(&self, _: &EventHandle) {
            panic!("the observer fails");
        }
        fn call_ended(&self, _: &EventHandle, _: &CallEnd) {
            panic!("the observer fails");
        }
    }
    let counts = Arc::new(Counts::default());
    let executor = Executor::builder()
        .observe(Panics)
        .observe(counts.clone())
        .build(client(ms(0)).0)
        .unwrap();
    executor.start().unwrap();
    executor.submit(request("call")).await.unwrap().await.unwrap();
    executor.stop(Shutdown::Graceful).await;
    assert_eq!(counts.opened.load(Ordering::Relaxed), 1);
    assert_eq!(counts.completed.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn an_observer_may_use_the_event_and_the_executor() {
    struct Notes(Arc<Mutex<Option<Executor<&'static str, &'static str>>>>);
    impl Observer for Notes {
        fn attempt_started(&self, call: &EventHandle, number: u32) {
            call.log(format!("attempt {number} by {}", call.request_id()));
            if let Some(executor) = &*self.0.lock().unwrap() {
                assert_eq!(executor.monitor().calling(), 1);
            }
        }
    }
    let slot = Arc::new(Mutex::new(None));
    let executor = Executor::builder()
        .observe(Notes(slot.clone()))
        .build(client(ms(0)).0)
        .unwrap();
    *slot.lock().unwrap() = Some(executor.clone());
    executor.start().unwrap();
    let call = executor.submit(request("call")).await.unwrap();
    let event = call.event().clone();
    call.await.unwrap();
    assert!(event.snapshot().logs[0].message.starts_with("attempt 1 by "));
    slot.lock().unwrap().take();
}

#[tokio::test(start_paused = true)]
async fn what_a_call_has_used_is_told_when_it_is_settled() -> Result<(), BoxError> {
    let events = Events::new();
    let steps = Arc::new(Steps::default());
    events.observe(steps.clone());
    let limiter = RateLimiter::new(Limits::new().tokens(Rate::per_minute(1_000)))?;
    let mut service = ServiceBuilder::new()
        .layer(EventLayer::processing().report_to(&events))
        .layer(
            RateLimitLayer::with_cost(limiter, |_: &Request<&'static str>| Cost::tokens(100))
                .settle(|_: Cost, _: Result<&Response<&'static str>, &BoxError>| Some(Cost::tokens(40))),
        )
        .service(client(ms(0)).0);
    service.ready().await?.call(request("call")).await?;
    let steps = steps.take();
    assert!(
        steps.contains(&"charged 1 requests, 100 tokens".to_owned()),
        "{steps:?}"
    );
    assert!(steps.contains(&"settled 40 of 100 tokens".to_owned()), "{steps:?}");
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn a_call_that_is_refused_without_an_event_is_told_with_its_reason() {
    #[derive(Default)]
    struct Refusals(Mutex<Vec<&'static str>>);
    impl Observer for Refusals {
        fn call_refused(&self, refusal: Refusal) {
            self.0.lock().unwrap().push(refusal.name());
        }
    }
    let refusals = Arc::new(Refusals::default());
    let counts = Arc::new(Counts::default());
    let executor = Executor::builder()
        .queue_capacity(1)
        .concurrency_limit(1)
        .limits(Limits::new().tokens(Rate::per_minute(60).burst(10)))
        .observe(refusals.clone())
        .observe(counts.clone())
        .build(client(ms(1_000)).0)
        .unwrap();
    let call = || Call::from(request("call")).tokens(10);
    executor.try_submit(call()).unwrap_err();
    executor.start().unwrap();
    let _first = executor.submit(call()).await.unwrap();
    settle().await;
    executor.submit(call().timeout(ms(100))).await.unwrap_err();
    executor.submit(call().tokens(11)).await.unwrap_err();
    let _second = executor.submit(call()).await.unwrap();
    executor.try_submit(call()).unwrap_err();
    executor.submit(call().url("no url")).await.unwrap_err();
    assert_eq!(
        *refusals.0.lock().unwrap(),
        ["closed", "deadline", "cost_exceeds_burst", "full", "other"]
    );
    assert_eq!(counts.opened.load(Ordering::Relaxed), 2);
}

#[tokio::test(start_paused = true)]
async fn a_call_that_misses_its_deadline_is_told_apart_from_other_failures() {
    #[derive(Default)]
    struct Deadlines(Mutex<Vec<(bool, u32)>>);
    impl Observer for Deadlines {
        fn call_ended(&self, _: &EventHandle, end: &CallEnd) {
            self.0.lock().unwrap().push((end.is_deadline_exceeded, end.attempts));
        }
    }
    let deadlines = Arc::new(Deadlines::default());
    let executor = Executor::builder()
        .concurrency_limit(1)
        .observe(deadlines.clone())
        .build(client(ms(1_000)).0)
        .unwrap();
    executor.start().unwrap();
    let call = |timeout| Call::from(request("call")).timeout(ms(timeout));
    let sent = executor.submit(call(600)).await.unwrap();
    let waiting = executor.submit(call(500)).await.unwrap();
    let (sent, waiting) = tokio::join!(sent, waiting);
    sent.unwrap_err();
    waiting.unwrap_err();
    executor.submit(call(2_000)).await.unwrap().await.unwrap();
    assert_eq!(*deadlines.0.lock().unwrap(), [(true, 0), (true, 1), (false, 1)]);
}

#[tokio::test(start_paused = true)]
async fn the_limits_that_a_provider_reports_and_its_pauses_are_told_with_the_call() {
    #[derive(Default)]
    struct Learned(Mutex<Vec<String>>);
    impl Observer for Learned {
        fn limit_reported(&self, _: &EventHandle, report: &LimitReport) {
            let LimitReport {
                budget,
                limit,
                remaining,
                reset,
                ..
            } = report;
            self.0
                .lock()
                .unwrap()
                .push(format!("{budget}: {remaining:?} of {limit:?}, full in {reset:?}"));
        }
        fn limiter_paused(&self, _: &EventHandle, pause: Duration) {
            self.0.lock().unwrap().push(format!("paused for {pause:?}"));
        }
    }
    let learned = Arc::new(Learned::default());
    let limiter = RateLimiter::new(Limits::new().requests(Rate::per_minute(600))).unwrap();
    let throttled = service_fn(async |_: Request<&'static str>| {
        sleep(ms(10)).await;
        Response::builder()
            .status(429)
            .header("retry-after", "2")
            .header("x-ratelimit-limit-requests", "500")
            .header("x-ratelimit-remaining-requests", "490")
            .header("x-ratelimit-reset-requests", "1s")
            .body("")
    });
    let executor = Executor::builder()
        .limiter(limiter.clone())
        .observe(learned.clone())
        .build(FeedbackLayer::new(limiter, Provider::OpenAi).layer(throttled))
        .unwrap();
    executor.start().unwrap();
    let one = executor.submit(request("one")).await.unwrap();
    let two = executor.submit(request("two")).await.unwrap();
    let (one, two) = tokio::join!(one, two);
    one.unwrap();
    two.unwrap();
    let report = "requests: Some(490) of Some(500), full in Some(1s)";
    assert_eq!(*learned.0.lock().unwrap(), ["paused for 2s", report, report]);
}
