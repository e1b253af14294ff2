//! What a refused call tells its caller about when to try again.

mod support;

use http::Request;
use std::time::Duration;
use support::{Client, client, ms, request, settle};
use tokio::time::{Instant, sleep};
use tower::Layer;
use tower_outbound::{
    BoxError, Call, Cost, Error, Executor, ExecutorBuilder, Limits, QueueLayer, Rate, RateLimiter, error::AcquireError,
};

const SECOND: Duration = Duration::from_secs(1);

fn executor(builder: ExecutorBuilder, client: Client) -> Executor<&'static str, &'static str> {
    let executor = builder.build(client).unwrap();
    executor.start().unwrap();
    executor
}

/// Submits calls until the queue refuses one, and returns after which time that call may be tried again.
async fn fill(executor: &Executor<&'static str, &'static str>, tokens: u64) -> Duration {
    for _ in 0..1_000 {
        match executor.try_submit(Call::from(request("a")).tokens(tokens)) {
            Ok(call) => drop(call),
            Err(error) => return error.retry_after().expect("a full queue says when"),
        }
        settle().await;
    }
    panic!("the queue is never full");
}

#[tokio::test(start_paused = true)]
async fn a_full_queue_says_when_the_rate_frees_a_place() {
    let (client, _) = client(ms(1));
    let builder = Executor::builder().queue_capacity(4).requests(Rate::per_second(0.5));
    let executor = executor(builder, client);
    fill(&executor, 0).await;
    // The one request of the burst has gone, and has left its permit to a queued call. The next one goes two seconds
    // after it, whatever waits behind it.
    sleep(ms(10)).await;
    let wait = fill(&executor, 0).await;
    assert_eq!(wait, 2 * SECOND - ms(10));
    sleep(wait - ms(10)).await;
    let too_early = executor.try_submit(request("a")).unwrap_err();
    assert!(
        too_early.is_full() && too_early.retry_after() == Some(ms(10)),
        "{too_early:?}"
    );
    sleep(ms(15)).await;
    drop(executor.try_submit(request("a")).unwrap());
}

#[tokio::test(start_paused = true)]
async fn the_wait_for_a_place_counts_each_budget_and_a_pause() {
    for paused in [Duration::ZERO, 60 * SECOND] {
        let (client, _) = client(ms(1));
        let limits = Limits::new()
            .requests(Rate::per_second(1_000))
            .input_tokens(Rate::per_second(100))
            .tokens(Rate::per_minute(60_000_000));
        let builder = Executor::builder()
            .queue_capacity(20)
            .concurrency_limit(3)
            .limits(limits);
        let executor = builder
            .cost(|_: &Request<&'static str>| Cost::input_output_tokens(100, 50))
            .build(client)
            .unwrap();
        executor.start().unwrap();
        let begun = Instant::now();
        if !paused.is_zero() {
            executor.monitor().limiter().pause_for(paused);
        }
        let wait = fill(&executor, 0).await;
        assert_eq!(begun.elapsed() + wait, if paused.is_zero() { SECOND } else { paused });
        sleep(wait + ms(5)).await;
        assert!(executor.try_submit(request("a")).is_ok());
    }
}

#[tokio::test(start_paused = true)]
async fn the_wait_for_a_place_is_never_zero() {
    let (client, _) = client(60 * SECOND);
    let builder = Executor::builder()
        .queue_capacity(1)
        .concurrency_limit(1)
        .requests(Rate::per_second(1_000));
    assert_eq!(fill(&executor(builder, client), 0).await, ms(100));
}

#[tokio::test(start_paused = true)]
async fn a_closed_queue_and_one_without_limits_do_not_know_when() {
    let (client, _) = client(SECOND);
    let mut queue = QueueLayer::new(1).unwrap().layer(client);
    let _places: Vec<_> = (0..10).map_while(|_| queue.try_call(request("a")).ok()).collect();
    let full = queue.try_call(request("a")).unwrap_err();
    assert_eq!((full.is_full(), full.retry_after()), (true, None));
    queue.close();
    let closed = queue.try_call(request("a")).unwrap_err();
    assert_eq!((closed.is_closed(), closed.retry_after()), (true, None));
}

#[tokio::test(start_paused = true)]
async fn a_call_refused_for_its_deadline_is_accepted_after_the_time_it_was_told() {
    let (client, _) = client(Duration::ZERO);
    let executor = executor(Executor::builder().requests(Rate::per_second(1)), client);
    let submit = || executor.submit(Call::from(request("a")).timeout(2 * SECOND));
    for _ in 0..3 {
        drop(executor.submit(request("a")).await.unwrap());
    }
    settle().await;
    let error = submit().await.unwrap_err();
    // It would wait for three seconds, and has two.
    let wait = error.retry_after().unwrap();
    assert_eq!((error.is_deadline_exceeded(), wait), (true, SECOND + ms(1)));
    sleep(wait - ms(2)).await;
    assert_eq!(submit().await.unwrap_err().retry_after(), Some(ms(2)));
    sleep(ms(2)).await;
    submit().await.unwrap().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_call_that_ended_at_its_deadline_does_not_know_when_a_retry_would_do() {
    let (client, _) = client(60 * SECOND);
    let executor = executor(Executor::builder().timeout(SECOND), client);
    let error = executor.submit(request("a")).await.unwrap().await.unwrap_err();
    assert_eq!((error.is_deadline_exceeded(), error.retry_after()), (true, None));
}

#[tokio::test(start_paused = true)]
async fn an_error_that_wraps_that_of_a_limiter_says_when() {
    let limiter = RateLimiter::new(Limits::new().requests(Rate::per_minute(1))).unwrap();
    let refusing = {
        let limiter = limiter.clone();
        tower::service_fn(move |_: Request<&'static str>| {
            let taken = limiter.try_acquire(Cost::request());
            async move { Ok::<_, BoxError>(http::Response::new(taken.map(|()| "done")?)) }
        })
    };
    let executor = Executor::builder().build(refusing).unwrap();
    executor.start().unwrap();
    executor.submit(request("a")).await.unwrap().await.unwrap();
    let error = executor.submit(request("a")).await.unwrap().await.unwrap_err();
    assert_eq!(error.retry_after(), Some(60 * SECOND));
    assert!(error.find::<AcquireError>().is_some());
    let no_retry_helps: Error = limiter.check(Cost::request().with("requests", 5)).unwrap_err().into();
    assert_eq!(no_retry_helps.retry_after(), None);
}
