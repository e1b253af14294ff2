//! When calls with a deadline are ended, and when they are refused at once.

mod support;

use http::{Request, Response};
use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use support::ms;
use tokio::time::{Instant, sleep};
use tower::{Layer, ServiceExt, service_fn};
use tower_outbound::{
    ApiTokens, ApiTokensUsed, Call, Deadline, DeadlineLayer, Executor, ExecutorBuilder, Limits, Rate, RateLimiter,
    RequestStatus,
    error::DeadlineExceeded,
    rate::{ByExtension, ByUsage},
};

/// Starts an executor whose client responds after the duration in the body of the request. The client counts the calls
/// that reach it in `made`.
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
async fn a_call_is_ended_at_its_deadline_at_every_stage_and_has_taken_nothing_of_the_limits() {
    let made = Arc::default();
    // Of the four calls, one is at the client, one waits for a concurrency permit, one is queued behind it, and one
    // waits for a place in the queue.
    let builder = Executor::builder()
        .limits(Limits::new().requests(Rate::per_day(100)))
        .concurrency_limit(1)
        .queue_capacity(2);
    let executor = executor(builder, &made);
    let begun = Instant::now();
    let at_client = executor.submit(call(ms(10_000))).await.unwrap();
    sleep(ms(1)).await;
    let next = executor.submit(call(ms(1)).timeout(ms(99))).await.unwrap();
    sleep(ms(1)).await;
    let queued = executor.submit(call(ms(1)).timeout(ms(198))).await.unwrap();
    let events = [next.event().clone(), queued.event().clone()];
    let without_place = tokio::spawn({
        let executor = executor.clone();
        async move { executor.submit(call(ms(1)).timeout(ms(48))).await.map(drop) }
    });
    let refused = without_place.await.unwrap().unwrap_err();
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
    at_client.await.unwrap();
    assert_eq!(made.load(Ordering::Relaxed), 1);
    assert_eq!(executor.monitor().limiter().available().requests, Some(99));
    assert_eq!(executor.monitor().queue_depth(), 0);
    let totals = executor.monitor().totals();
    assert_eq!((totals.completed, totals.failed, totals.cancelled), (1, 3, 0));
}

#[tokio::test(start_paused = true)]
async fn a_call_at_the_client_is_ended_whether_or_not_its_future_is_polled() {
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
async fn a_call_that_would_wait_beyond_its_deadline_is_refused_at_once_with_the_computed_wait() {
    let made = Arc::default();
    let builder = Executor::builder()
        .limits(Limits::new().tokens(Rate::per_second(100).burst(500)))
        .concurrency_limit(1)
        .queue_capacity(100)
        .timeout(Duration::from_secs(10));
    let executor = executor(builder, &made);
    // The limiter admits 500 tokens at once, and 100 tokens per second after that. So two of the five calls of 250
    // tokens are admitted at once, and the others one every 2.5 seconds.
    let mut calls = Vec::new();
    for _ in 0..5 {
        calls.push(executor.submit(call(ms(1)).tokens(250)).await.unwrap());
    }
    let error = executor.submit(call(ms(1)).tokens(260)).await.unwrap_err();
    let exceeded = error.find::<DeadlineExceeded>().unwrap();
    assert_eq!((exceeded.wait(), exceeded.left()), (ms(10_100), ms(10_000)));
    assert_eq!(
        error.to_string(),
        "the call would have to wait 10.1s and has only 10s until its deadline"
    );
    assert!(!executor.try_submit(call(ms(1)).tokens(260)).unwrap_err().is_full());
    // The tokens of a refused call are not counted in the computed wait of later calls. Those of a queued call are,
    // until it is cancelled.
    calls.push(executor.submit(call(ms(1)).tokens(240)).await.unwrap());
    executor.submit(call(ms(1)).tokens(10)).await.unwrap_err();
    calls.pop().unwrap().cancel();
    calls.push(executor.submit(call(ms(1)).tokens(249)).await.unwrap());
    sleep(Duration::from_secs(20)).await;
    assert_eq!(made.load(Ordering::Relaxed), 6);
    assert_eq!(executor.monitor().totals().failed, 0);
    // The bucket has refilled: the refused calls have taken no tokens from it.
    executor.submit(call(ms(1)).tokens(500)).await.unwrap().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_returned_request_is_unchanged_and_not_counted_in_the_wait_of_later_calls() {
    let made = Arc::default();
    let builder = Executor::builder()
        .limits(Limits::new().tokens(Rate::per_second(100)))
        .concurrency_limit(1)
        .queue_capacity(1)
        .timeout(Duration::from_secs(10));
    let executor = executor(builder, &made);
    let _at_client = executor.submit(call(ms(1_000))).await.unwrap();
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
    // If the 100 refused calls were counted in the computed wait, this call would have to wait for about 100 seconds
    // and would be refused, because its timeout is 10 seconds.
    executor.try_submit(call(ms(1)).tokens(100)).unwrap().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_call_whose_deadline_has_passed_is_refused_at_once() {
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
async fn the_layer_ends_and_refuses_calls_without_an_executor() {
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

// --- handles that are not polled ---

/// Starts an executor that runs one call at a time.
fn one_at_a_time(capacity: usize) -> Executor<Duration, ()> {
    let builder = Executor::builder()
        .limits(Limits::new())
        .concurrency_limit(1)
        .queue_capacity(capacity);
    executor(builder, &Arc::default())
}

#[tokio::test(start_paused = true)]
async fn a_queued_call_ends_at_its_deadline_if_its_handle_is_dropped_or_kept_and_not_polled() {
    let executor = one_at_a_time(10);
    let begun = Instant::now();
    let _running = executor.submit(call(ms(60_000))).await.unwrap();
    let kept = executor.submit(call(ms(1)).timeout(ms(3_000))).await.unwrap();
    let dropped = executor.submit(call(ms(1)).timeout(ms(2_000))).await.unwrap();
    let event = dropped.event().clone();
    drop(dropped);
    for (event, at) in [(event, 2_000), (kept.event().clone(), 3_000)] {
        let event = event.finished().await;
        assert_eq!((event.status, begun.elapsed()), (RequestStatus::Failed, ms(at)));
        assert_eq!(event.error_type.as_deref(), Some("DeadlineExceeded"));
    }
    assert_eq!(executor.monitor().queue_depth(), 0);
    assert!(kept.await.unwrap_err().is_deadline_exceeded());
}

#[tokio::test(start_paused = true)]
async fn a_running_call_ends_at_its_deadline_if_its_handle_is_not_polled_and_its_record_is_final() {
    let executor = one_at_a_time(10);
    let begun = Instant::now();
    let handle = executor.submit(call(ms(60_000)).timeout(ms(500))).await.unwrap();
    let event = handle.event().finished().await;
    assert_eq!((event.status, begun.elapsed()), (RequestStatus::Failed, ms(500)));
    assert!(event.attempts[0].ended_at.is_some());
    let monitor = executor.monitor();
    assert_eq!(
        (monitor.in_flight(), monitor.calling(), monitor.totals().failed),
        (0, 0, 1)
    );
    assert!(handle.await.unwrap_err().is_deadline_exceeded());
}

#[tokio::test(start_paused = true)]
async fn queued_calls_hold_no_places_after_their_deadlines() {
    let executor = one_at_a_time(2);
    let _running = executor.submit(call(ms(60_000))).await.unwrap();
    sleep(ms(1)).await;
    for _ in 0..2 {
        drop(executor.submit(call(ms(1)).timeout(ms(2_000))).await.unwrap());
    }
    let begun = Instant::now();
    drop(executor.submit(call(ms(1))).await.unwrap());
    assert_eq!(begun.elapsed(), ms(2_000));
}

#[tokio::test(start_paused = true)]
async fn an_earlier_deadline_is_kept_behind_a_later_one() {
    let executor = one_at_a_time(10);
    let begun = Instant::now();
    let _running = executor.submit(call(ms(60_000))).await.unwrap();
    let mut events = Vec::new();
    for timeout in [9_000, 3_000, 6_000, 1_000] {
        let handle = executor.submit(call(ms(1)).timeout(ms(timeout))).await.unwrap();
        events.push((timeout, handle.event().clone()));
    }
    events.sort_unstable_by_key(|(timeout, _)| *timeout);
    for (timeout, event) in events {
        event.finished().await;
        assert_eq!(begun.elapsed(), ms(timeout));
    }
}

#[tokio::test(start_paused = true)]
async fn the_deadline_of_a_single_call_counts_the_calls_ahead_of_it() {
    let builder = Executor::builder()
        .requests(Rate::per_second(1).burst(1))
        .concurrency_limit(1);
    let executor = executor(builder, &Arc::default());
    for _ in 0..5 {
        drop(executor.submit(call(ms(1))).await.unwrap());
    }
    let error = executor.submit(call(ms(1)).timeout(ms(4_500))).await.unwrap_err();
    assert_eq!(error.find::<DeadlineExceeded>().unwrap().wait(), ms(5_000));
    drop(executor.submit(call(ms(1)).timeout(ms(5_500))).await.unwrap());
}

// === Estimates ===

/// A client whose calls take 10 ms and turn out to have used the number of tokens in the body of the request.
fn uses_tokens(builder: ExecutorBuilder) -> Executor<u64, ()> {
    let client = service_fn(async |request: Request<u64>| {
        sleep(ms(10)).await;
        let used = ApiTokensUsed::new(*request.body());
        Ok::<_, Infallible>(Response::builder().extension(used).body(()).unwrap())
    });
    let executor = builder
        .settle(ByUsage::default())
        .timeout(ms(5_000))
        .build(client)
        .unwrap();
    executor.start().unwrap();
    executor
}

/// Submits `calls` calls, each estimated at `estimate` tokens and using `used`. Returns how many of them are refused at
/// once.
async fn refused(executor: &Executor<u64, ()>, calls: usize, estimate: u64, used: u64) -> usize {
    let mut refused = 0;
    let mut accepted = Vec::new();
    for _ in 0..calls {
        match executor.submit(Call::from(Request::new(used)).tokens(estimate)).await {
            Ok(call) => accepted.push(call),
            Err(error) if error.is_deadline_exceeded() => refused += 1,
            Err(error) => panic!("{error}"),
        }
    }
    for call in accepted {
        let _ = call.await;
    }
    refused
}

#[tokio::test(start_paused = true)]
async fn calls_are_refused_by_what_calls_turn_out_to_use_and_not_by_their_estimates() {
    let limits = || Limits::new().tokens(Rate::per_minute(60_000));
    // 100 calls of 600 tokens fit, whatever they are estimated at; none was settled before.
    let executor = uses_tokens(Executor::builder().limits(limits()));
    assert_eq!(refused(&executor, 100, 6_000, 600).await, 0);
    // Calls that use what they are estimated at are refused as those without a settlement are: one call has used 600 of
    // the 60,000, and 5 s add 5,000, so 107 more fit.
    let executor = uses_tokens(Executor::builder().limits(limits()));
    assert_eq!(refused(&executor, 1, 600, 600).await, 0);
    assert_eq!(refused(&executor, 200, 600, 600).await, 200 - 107);
    // What the call itself is charged has to be there at once, whatever it turns out to use.
    let executor = uses_tokens(Executor::builder().limits(limits()));
    assert_eq!(refused(&executor, 10, 6_000, 6_000).await, 0);
    assert_eq!(refused(&executor, 1, 5_100, 10).await, 1);
}

#[tokio::test(start_paused = true)]
async fn requests_count_in_full_before_the_first_settlement() {
    let executor = uses_tokens(Executor::builder().limits(Limits::new().requests(Rate::per_second(2).burst(1))));
    // One at once, and one each half second: the eleventh would be admitted at the deadline itself.
    assert_eq!(refused(&executor, 15, 100, 100).await, 5);
}
