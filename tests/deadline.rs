//! Calls that have to be over by a deadline.

use http::{Request, Response};
use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::time::{Instant, sleep};
use tower::{Layer, ServiceExt, service_fn};
use tower_outbound::{
    ApiTokens, Call, Deadline, DeadlineLayer, Executor, ExecutorBuilder, Limits, Rate, RateLimiter, RequestStatus,
    error::DeadlineExceeded, rate::ByExtension,
};

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// Takes as long as the request says, and counts its calls.
fn executor(builder: ExecutorBuilder, made: &Arc<AtomicUsize>) -> Executor<Duration, ()> {
    let made = made.clone();
    let client = service_fn(move |request: Request<Duration>| {
        made.fetch_add(1, Ordering::Relaxed);
        async move {
            sleep(*request.body()).await;
            Ok::<_, Infallible>(Response::new(()))
        }
    });
    let executor = builder.build(client).unwrap();
    executor.start().unwrap();
    executor
}

fn call(takes: Duration) -> Call<Duration> {
    Call::from(Request::new(takes))
}

#[tokio::test(start_paused = true)]
async fn a_call_is_ended_at_its_deadline_wherever_it_is_and_has_taken_nothing() {
    let made = Arc::default();
    // One on the wire, one in front of it, one in the queue, one waiting for a place.
    let builder = Executor::builder()
        .limits(Limits::new().requests(Rate::per_day(100)))
        .concurrency_limit(1)
        .queue_capacity(2);
    let executor = executor(builder, &made);
    let begun = Instant::now();
    let wire = executor.submit(call(ms(10_000))).await.unwrap();
    sleep(ms(1)).await;
    let next = executor.submit(call(ms(1)).timeout(ms(99))).await.unwrap();
    sleep(ms(1)).await;
    let queued = executor.submit(call(ms(1)).timeout(ms(198))).await.unwrap();
    let events = [next.event().clone(), queued.event().clone()];
    let placeless = tokio::spawn({
        let executor = executor.clone();
        async move { executor.submit(call(ms(1)).timeout(ms(48))).await.map(drop) }
    });
    let refused = placeless.await.unwrap().unwrap_err();
    assert_eq!((refused.is_deadline_exceeded(), begun.elapsed()), (true, ms(50)));

    assert!(next.await.unwrap_err().is_deadline_exceeded());
    assert_eq!(begun.elapsed(), ms(100));
    assert!(queued.await.unwrap_err().is_deadline_exceeded());
    assert_eq!(begun.elapsed(), ms(200));
    for event in events {
        let event = event.finished().await;
        assert_eq!(event.status, RequestStatus::Failed);
        assert_eq!(event.error_type.as_deref(), Some("DeadlineExceeded"));
        assert_eq!(event.error_message.as_deref(), Some("the call's deadline has passed"));
    }
    wire.await.unwrap();
    assert_eq!(made.load(Ordering::Relaxed), 1);
    assert_eq!(executor.monitor().limiter().available().requests, Some(99));
    assert_eq!(executor.monitor().queue_depth(), 0);
    let totals = executor.monitor().totals();
    assert_eq!((totals.completed, totals.failed, totals.cancelled), (1, 3, 0));
}

#[tokio::test(start_paused = true)]
async fn a_call_on_the_wire_is_ended_whether_or_not_somebody_waits() {
    let made = Arc::default();
    let executor = executor(Executor::builder().timeout(ms(70)), &made);
    let begun = Instant::now();
    let waited = executor.submit(call(ms(1_000))).await.unwrap();
    let dropped = executor.submit(call(ms(1_000))).await.unwrap();
    let in_time = executor.submit(call(ms(69))).await.unwrap();
    let longer = executor.submit(call(ms(100)).timeout(ms(101))).await.unwrap();
    let event = dropped.event().clone();
    drop(dropped);
    assert!(waited.await.unwrap_err().is_deadline_exceeded());
    let event = event.finished().await;
    assert_eq!(
        (event.status, event.time_total()),
        (RequestStatus::Failed, Some(ms(70)))
    );
    assert_eq!(begun.elapsed(), ms(70));
    in_time.await.unwrap();
    longer.await.unwrap();
    assert_eq!(begun.elapsed(), ms(100));
}

#[tokio::test(start_paused = true)]
async fn a_call_that_cannot_make_it_behind_the_others_is_refused_at_once_with_the_wait() {
    let made = Arc::default();
    let builder = Executor::builder()
        .limits(Limits::new().tokens(Rate::per_second(100).burst(500)))
        .concurrency_limit(1)
        .queue_capacity(100)
        .timeout(Duration::from_secs(10));
    let executor = executor(builder, &made);
    // 500 at once, and 100 a second: the first two go at once, the others one every two and a half seconds.
    let mut calls = Vec::new();
    for _ in 0..5 {
        calls.push(executor.submit(call(ms(1)).tokens(250)).await.unwrap());
    }
    let error = executor.submit(call(ms(1)).tokens(260)).await.unwrap_err();
    let told = error.find::<DeadlineExceeded>().unwrap();
    assert_eq!((told.wait(), told.left()), (ms(10_100), ms(10_000)));
    assert_eq!(
        error.to_string(),
        "the call would have to wait 10.1s and has only 10s until its deadline"
    );
    assert!(!executor.try_submit(call(ms(1)).tokens(260)).unwrap_err().is_full());
    // What it would have taken nobody has, and whoever gives up gives its part of the wait back.
    calls.push(executor.submit(call(ms(1)).tokens(240)).await.unwrap());
    executor.submit(call(ms(1)).tokens(10)).await.unwrap_err();
    calls.pop().unwrap().cancel();
    calls.push(executor.submit(call(ms(1)).tokens(249)).await.unwrap());
    sleep(Duration::from_secs(20)).await;
    assert_eq!(made.load(Ordering::Relaxed), 6);
    assert_eq!(executor.monitor().totals().failed, 0);
    // And all is as it was.
    executor.submit(call(ms(1)).tokens(500)).await.unwrap().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_request_that_is_handed_back_is_as_it_came_and_nobody_waits_for_it() {
    let made = Arc::default();
    let builder = Executor::builder()
        .limits(Limits::new().tokens(Rate::per_second(100)))
        .concurrency_limit(1)
        .queue_capacity(1)
        .timeout(Duration::from_secs(10));
    let executor = executor(builder, &made);
    let _wire = executor.submit(call(ms(1_000))).await.unwrap();
    sleep(ms(1)).await;
    let queued = executor.submit(call(ms(1))).await.unwrap();
    let mut kept = Vec::new();
    for _ in 0..100 {
        let refused = executor.try_submit(call(ms(1)).tokens(100)).unwrap_err();
        kept.push(refused.into_request().unwrap());
    }
    assert!(
        kept.iter()
            .all(|request| request.extensions().get::<Deadline>().is_none())
    );
    queued.cancel();
    // They would have been a hundred seconds ahead of it.
    executor.try_submit(call(ms(1)).tokens(100)).unwrap().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_deadline_that_has_passed_is_refused_at_once() {
    let made = Arc::default();
    let executor = executor(Executor::builder(), &made);
    for past in [Deadline::after(Duration::ZERO), Deadline::at(Instant::now())] {
        let error = executor.submit(call(ms(1)).deadline(past)).await.unwrap_err();
        assert!(error.is_deadline_exceeded());
        assert!(
            executor
                .clone()
                .oneshot(call(ms(1)).deadline(past).into_request().unwrap())
                .await
                .is_err()
        );
    }
    let far = call(ms(1)).timeout(Duration::MAX);
    executor.submit(far).await.unwrap().await.unwrap();
    assert_eq!(
        (made.load(Ordering::Relaxed), executor.monitor().totals().opened),
        (1, 1)
    );
}

#[tokio::test(start_paused = true)]
async fn the_layer_alone_ends_and_refuses_calls_too() {
    let limiter = RateLimiter::new(Limits::new().tokens(Rate::per_second(10))).unwrap();
    let client = service_fn(async |request: Request<Duration>| {
        sleep(*request.body()).await;
        Ok::<_, Infallible>(Response::new(()))
    });
    let service = DeadlineLayer::new()
        .timeout(ms(100))
        .limiter(limiter.clone(), ByExtension)
        .layer(client);
    let begun = Instant::now();
    service.clone().oneshot(Request::new(ms(99))).await.unwrap();
    let error = service.clone().oneshot(Request::new(ms(500))).await.unwrap_err();
    assert!(error.is::<DeadlineExceeded>());
    assert_eq!(begun.elapsed(), ms(199));
    limiter.try_acquire(tower_outbound::Cost::tokens(10)).unwrap();
    let mut request = Request::new(ms(1));
    request.extensions_mut().insert(ApiTokens(2));
    let error = service.clone().oneshot(request).await.unwrap_err();
    assert_eq!(error.downcast_ref::<DeadlineExceeded>().unwrap().wait(), ms(200));
    assert_eq!(begun.elapsed(), ms(199));
}
