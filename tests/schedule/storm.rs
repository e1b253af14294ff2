//! Many calls, many threads, and everything at once.

use super::*;
use crate::support::{settle, within_a_minute};
use futures_util::FutureExt;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::runtime::Builder;
use tower::retry::{Policy, RetryLayer};

/// Submits so many calls, half of which get a place, and cancels all but `kept` of those. Returns the executor, its schedule
/// and what reached the client, and the handles that were kept.
async fn cancel_all(calls: u64, kept: usize) -> (TestExecutor, Schedule, Log, Vec<CallHandle<u64, ()>>) {
    let places = calls / 2;
    let schedule = Schedule::new()
        .level(Level::by("tenant").limits(|_| Some(per_second(1))))
        .class("interactive", ms(0))
        .class("batch", ms(60_000));
    let (client, log) = client(ms(0));
    let executor = Executor::builder()
        .queue_capacity(places as usize)
        .limits(per_second(10))
        .schedule(schedule.clone())
        .build(client)
        .unwrap();
    executor.start().unwrap();
    let mut submits = Vec::new();
    let mut handles = Vec::new();
    for number in 0..calls {
        // Nothing else is to do, but a task that never yields runs out of its budget.
        if number % 64 == 0 {
            tokio::task::yield_now().await;
        }
        let class = if number % 3 == 0 { "interactive" } else { "batch" };
        let call = call(number).flow(number % 1_000).class(class);
        if number < places {
            handles.push(executor.submit(call).await.unwrap());
        } else {
            let executor = executor.clone();
            let mut submit = Box::pin(async move { executor.submit(call).await });
            // As many find a place as calls have begun.
            match (&mut submit).now_or_never() {
                Some(handle) => handles.push(handle.unwrap()),
                None => submits.push(submit),
            }
        }
    }
    settle().await;
    let begun = log.numbers().len();
    assert_eq!(schedule.waiting() + begun, calls as usize);
    fastrand::Rng::with_seed(1).shuffle(&mut handles);
    let mut submits = submits.into_iter();
    for handle in handles.drain(kept..) {
        handle.cancel();
        drop(submits.next());
    }
    drop(submits);
    settle().await;
    assert_eq!(log.numbers().len(), begun);
    (executor, schedule, log, handles)
}

#[tokio::test(start_paused = true)]
async fn a_hundred_thousand_cancelled_calls_leave_nothing() {
    const CALLS: u64 = 100_000;
    let (executor, schedule, _, _) = cancel_all(CALLS, 0).await;
    assert_nothing_is_left(&executor, &schedule);
    sleep(ms(2_000)).await;
    all_end_well(submit_all(&executor, [call(CALLS).flow(0)]).await).await;
    assert!(schedule.flows(2_000).is_empty(), "{:?}", schedule.flows(3));
}

#[tokio::test(start_paused = true)]
#[should_panic(expected = "places")]
async fn one_call_that_is_not_cancelled_is_found() {
    let (executor, schedule, _, _kept) = cancel_all(1_000, 1).await;
    assert_nothing_is_left(&executor, &schedule);
}

/// Tries each third response again once.
#[derive(Clone)]
struct Sometimes {
    is_retried: bool,
}

impl<E> Policy<Request, Response, E> for Sometimes {
    type Future = tokio::time::Sleep;

    fn retry(&mut self, request: &mut Request, _: &mut Result<Response, E>) -> Option<Self::Future> {
        if self.is_retried || *request.body() % 3 != 0 {
            return None;
        }
        self.is_retried = true;
        Some(sleep(Duration::from_micros(100)))
    }

    fn clone_request(&mut self, request: &Request) -> Option<Request> {
        Some(request.clone())
    }
}

/// Submits calls, and cancels, drops, detaches and awaits them, until `is_over`.
async fn use_executor(executor: TestExecutor, seed: u64, is_over: Arc<AtomicBool>) {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut handles = Vec::new();
    while !is_over.load(Ordering::Relaxed) {
        let number = random.u64(..1_000);
        let mut call = call(number)
            .flow([random.u64(..3), random.u64(..4)])
            .class(["interactive", "batch"][random.usize(..2)]);
        if random.u8(..8) == 0 {
            call = call.timeout(ms(random.u64(1..20)));
        }
        let submitted = if random.bool() {
            executor.try_submit(call).ok()
        } else {
            let submit = executor.submit(call);
            tokio::time::timeout(ms(random.u64(1..10)), submit)
                .await
                .ok()
                .and_then(Result::ok)
        };
        handles.extend(submitted);
        if handles.len() > 20 {
            let handle = handles.swap_remove(random.usize(..handles.len()));
            match random.u8(..4) {
                0 => handle.cancel(),
                1 => drop(handle),
                _ => drop(tokio::time::timeout(ms(50), handle).await),
            }
        }
        if random.u8(..16) == 0 {
            tokio::task::yield_now().await;
        }
    }
}

/// Pauses and resumes keys, changes weights, limits and permits, and stops and starts the executor.
async fn disturb(executor: TestExecutor, schedule: Schedule, seed: u64, is_over: Arc<AtomicBool>) {
    let mut random = fastrand::Rng::with_seed(seed);
    while !is_over.load(Ordering::Relaxed) {
        let key = random.u64(..3);
        match random.u8(..8) {
            0 => schedule.pause([key], Instant::now() + ms(random.u64(1..30))).unwrap(),
            1 => schedule.resume([key]).unwrap(),
            2 => schedule.set_weight([key, random.u64(..4)], random.u32(1..5)).unwrap(),
            3 => {
                let limits = Limits::new().requests(Rate::per_second(random.u64(500..5_000)));
                schedule.set_limits([key], &limits).unwrap();
            }
            4 => executor.monitor().concurrency().set(random.usize(1..8)).unwrap(),
            5 => executor.monitor().limiter().pause_for(ms(random.u64(1..5))),
            6 => executor.monitor().limiter().resume(),
            _ => {
                let how = [
                    Shutdown::Immediate,
                    Shutdown::Within(ms(5)),
                    Shutdown::SentWithin(ms(5)),
                    Shutdown::Within(ms(50)),
                ];
                executor.stop(how[random.usize(..how.len())]).await;
                executor.start().unwrap();
            }
        }
        assert!(schedule.flows(100).len() <= 12);
        sleep(ms(random.u64(1..8))).await;
    }
}

#[test]
fn a_storm_on_several_threads_leaves_nothing() {
    within_a_minute(|| {
        let schedule = Schedule::new()
            .level(Level::by("model").limits(|_| Some(Limits::new().requests(Rate::per_second(2_000)))))
            .level(Level::by("tenant"))
            .class("interactive", ms(0))
            .class("batch", ms(100));
        let (client, log) = client(Duration::from_micros(300));
        let executor = Executor::builder()
            .queue_capacity(30)
            .workers(2)
            .concurrency_limit(4)
            .limits(Limits::new().requests(Rate::per_second(5_000).burst(50)))
            .schedule(schedule.clone())
            .layer(RetryLayer::new(Sometimes { is_retried: false }))
            .build(client)
            .unwrap();
        let runtime = Builder::new_multi_thread()
            .worker_threads(4)
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            executor.start().unwrap();
            let is_over = Arc::new(AtomicBool::new(false));
            let mut tasks = Vec::new();
            for seed in 0..6 {
                tasks.push(tokio::spawn(use_executor(executor.clone(), seed, is_over.clone())));
            }
            tasks.push(tokio::spawn(disturb(
                executor.clone(),
                schedule.clone(),
                99,
                is_over.clone(),
            )));
            sleep(ms(3_000)).await;
            is_over.store(true, Ordering::Relaxed);
            for task in tasks {
                task.await.unwrap();
            }
            executor.stop(Shutdown::Graceful).await;
        });
        assert!(log.numbers().len() > 100);
        assert_nothing_is_left(&executor, &schedule);
        let totals = executor.monitor().totals();
        assert_eq!(
            totals.opened,
            totals.completed + totals.failed + totals.cancelled,
            "{totals:?}"
        );
    });
}
