//! Places in the queue: who gets the next one, and calls that have none.

use super::*;
use crate::support::{pass, settle};
use std::{
    future::Future,
    pin::pin,
    task::{Context, Poll, Waker},
};
use tower::ServiceExt;
use tower_outbound::{Concurrency, RequestStatus, error::Closed};

/// Returns a started executor with this many places, whose flow `paused` begins no call.
fn with_places(schedule: &Schedule, places: usize, takes: Duration) -> (TestExecutor, Log) {
    let (client, log) = client(takes);
    let executor = Executor::builder()
        .queue_capacity(places)
        .concurrency_limit(1)
        .limits(Limits::new())
        .schedule(schedule.clone())
        .build(client)
        .unwrap();
    executor.start().unwrap();
    schedule.pause("paused", Instant::now() + ms(100_000)).unwrap();
    (executor, log)
}

#[tokio::test(start_paused = true)]
async fn the_next_place_goes_to_the_flow_that_has_none() {
    let schedule = tenants();
    let (executor, _) = with_places(&schedule, 10, ms(1_000));
    for number in 0..200 {
        drop(spawn_call(&executor, flow_call("flood", number)));
    }
    pass(ms(500)).await;
    assert_eq!(executor.monitor().queue_depth(), 10);
    assert_eq!(schedule.waiting(), 199);
    // The call of this flow cannot begin, so it is a place that it gets.
    let handle = executor.submit(flow_call("paused", 1_000)).await.unwrap();
    assert_eq!(handle.event().status(), RequestStatus::Queued);
    assert_eq!(executor.monitor().queue_depth(), 10);
    executor.stop(Shutdown::Immediate).await;
    assert!(handle.await.unwrap_err().is_cancelled());
    settle().await;
    assert_nothing_is_left(&executor, &schedule);
}

#[tokio::test(start_paused = true)]
async fn a_call_that_waits_for_its_place_begins_when_it_is_its_turn() {
    let schedule = tenants();
    let (executor, log) = with_places(&schedule, 2, ms(1_000));
    let blocked = submit_all(&executor, (0..2).map(|number| flow_call("paused", number))).await;
    let start = Instant::now();
    let handles = submit_all(&executor, (10..13).map(|number| flow_call("free", number))).await;
    // Each was accepted when it began.
    assert_eq!(start.elapsed(), ms(2_000));
    all_end_well(handles).await;
    assert_eq!(log.millis(), [(10, 0), (11, 1_000), (12, 2_000)]);
    all_end_well(blocked).await;
    settle().await;
    assert_nothing_is_left(&executor, &schedule);
}

#[tokio::test(start_paused = true)]
async fn try_submit_hands_the_request_back_when_no_place_is_free() {
    let schedule = tenants();
    let (executor, _) = with_places(&schedule, 2, ms(1_000));
    let mut handles = Vec::new();
    for number in 0..2 {
        handles.push(executor.try_submit(flow_call("paused", number)).unwrap());
    }
    let error = executor.try_submit(flow_call("free", 2)).unwrap_err();
    assert!(error.is_full());
    assert_eq!(*error.into_request().unwrap().body(), 2);
    let waiting = spawn_call(&executor, flow_call("paused", 3));
    settle().await;
    handles.pop().unwrap().cancel();
    settle().await;
    // The free place was for the call that waited.
    assert!(executor.try_submit(flow_call("free", 4)).unwrap_err().is_full());
    assert_eq!(executor.monitor().totals().opened, 3);
    executor.stop(Shutdown::Immediate).await;
    assert!(waiting.await.unwrap().unwrap_err().is_cancelled());
    settle().await;
    assert_nothing_is_left(&executor, &schedule);
}

#[tokio::test(start_paused = true)]
async fn calls_of_a_queue_begin_and_end_though_their_futures_are_not_polled() {
    let schedule = tenants();
    let (client, log) = client(ms(100));
    let mut queue = tower::ServiceBuilder::new()
        .layer(tower_stack::layer(1, &schedule))
        .service(client);
    let futures: Vec<_> = (0..10).map(|number| queue.call(request(number))).collect();
    pass(ms(1_000)).await;
    assert_eq!(log.count(9), 1);
    assert_none_waits(&schedule);
    assert_eq!(queue.depth(), 0);
    for future in futures {
        assert!(future.is_accepted());
        future.await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_queue_with_a_schedule_is_always_ready_and_fails_when_it_is_closed() {
    let schedule = tenants();
    let permits = Concurrency::new(1).unwrap();
    let (client, _) = client(ms(100));
    let mut queue = tower::ServiceBuilder::new()
        .layer(tower_stack::layer(1, &schedule.clone().concurrency(permits.clone())))
        .layer(tower_outbound::ConcurrencyLimitLayer::with_limit(permits))
        .service(client);
    let mut futures = Vec::new();
    for number in 0..5 {
        let mut cx = Context::from_waker(Waker::noop());
        assert!(matches!(queue.poll_ready(&mut cx), Poll::Ready(Ok(()))));
        futures.push(queue.call(request(number)));
        settle().await;
    }
    let accepted: Vec<_> = futures.iter().map(|future| future.is_accepted()).collect();
    assert_eq!(accepted, [true, true, false, false, false]);
    queue.close();
    assert!(queue.ready().await.is_err());
    let results = futures_util::future::join_all(futures).await;
    let closed: Vec<_> = results
        .iter()
        .map(|result| result.as_ref().is_err_and(|error| error.is::<Closed>()))
        .collect();
    assert_eq!(closed, [false, false, true, true, true]);
    queue.ended().await;
    assert_none_waits(&schedule);
}

#[tokio::test(start_paused = true)]
async fn a_call_that_is_cancelled_without_a_place_counts_as_accepted_and_fails_as_cancelled() {
    let schedule = tenants();
    let (client, _) = client(ms(100));
    let permits = Concurrency::new(1).unwrap();
    let with_permits = schedule.clone().concurrency(permits.clone());
    let mut queue = tower::ServiceBuilder::new()
        .layer(tower_stack::layer(1, &with_permits))
        .layer(tower_outbound::ConcurrencyLimitLayer::with_limit(permits))
        .service(client);
    let first = queue.call(request(0));
    settle().await;
    let second = queue.call(request(1));
    let mut third = queue.call(request(2));
    assert!(!third.is_accepted());
    assert!(
        pin!(third.accepted())
            .poll(&mut Context::from_waker(Waker::noop()))
            .is_pending()
    );
    third.cancel();
    third.accepted().await.unwrap();
    assert!(third.await.unwrap_err().is::<tower_outbound::error::Cancelled>());
    first.await.unwrap();
    second.await.unwrap();
    assert_none_waits(&with_permits);
}

#[tokio::test(start_paused = true)]
async fn a_submit_that_is_dropped_before_its_call_has_a_place_leaves_nothing() {
    let schedule = tenants();
    let (executor, log) = with_places(&schedule, 1, ms(1_000));
    let placed = executor.submit(flow_call("paused", 0)).await.unwrap();
    for number in 1..10 {
        let mut submit = pin!(executor.submit(flow_call("paused", number)));
        assert!(
            submit
                .as_mut()
                .poll(&mut Context::from_waker(Waker::noop()))
                .is_pending()
        );
    }
    settle().await;
    assert_eq!(schedule.waiting(), 1);
    assert_eq!(executor.monitor().totals().cancelled, 9);
    placed.cancel();
    settle().await;
    assert_nothing_is_left(&executor, &schedule);
    assert!(log.numbers().is_empty());
}

#[tokio::test(start_paused = true)]
async fn stopping_closes_the_calls_that_wait_for_a_place_and_finishes_the_others() {
    let schedule = tenants();
    let (executor, log) = with_places(&schedule, 2, ms(1_000));
    let running = submit_all(&executor, [flow_call("a", 0)]).await;
    settle().await;
    let placed = submit_all(&executor, [flow_call("a", 1), flow_call("b", 2)]).await;
    let waiting: Vec<_> = (3..6)
        .map(|number| spawn_call(&executor, flow_call("a", number)))
        .collect();
    settle().await;
    let report = executor.stop(Shutdown::Graceful).await;
    assert_eq!((report.completed, report.cancelled), (3, 3));
    for call in waiting {
        assert!(call.await.unwrap().unwrap_err().is_closed());
    }
    all_end_well(running).await;
    all_end_well(placed).await;
    assert_eq!(log.count(3) + log.count(4) + log.count(5), 0);
    assert_nothing_is_left(&executor, &schedule);
}

#[tokio::test(start_paused = true)]
async fn deadlines_are_kept_for_calls_with_and_without_a_place() {
    let schedule = tenants();
    let (executor, _) = with_places(&schedule, 1, ms(1_000));
    let start = Instant::now();
    let placed = executor
        .submit(flow_call("paused", 0).timeout(ms(3_000)))
        .await
        .unwrap();
    let waiting = spawn_call(&executor, flow_call("paused", 1).timeout(ms(2_000)));
    let error = waiting.await.unwrap().unwrap_err();
    assert!(error.is_deadline_exceeded(), "{error}");
    assert_eq!(start.elapsed(), ms(2_000));
    let event = placed.event().clone();
    // The handle is not polled.
    pass(ms(1_000)).await;
    assert_eq!(event.status(), RequestStatus::Failed);
    assert!(placed.await.unwrap_err().is_deadline_exceeded());
    settle().await;
    assert_nothing_is_left(&executor, &schedule);
}
