//! Tests of the limits, the queue and the executor on several threads. Tokio's clock cannot be paused there, so each
//! test does a bounded amount of work, and asserts nothing about time.

mod support;

use http::{Request, Response};
use std::{
    future::{Future, pending, poll_fn},
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc,
    },
    task::Poll,
    thread,
    time::Duration,
};
use support::{HANG, threaded_runtime, within_a_minute};
use tokio::{
    runtime::{Builder, Runtime},
    time::timeout,
};
use tower::{BoxError, Layer, Service, ServiceExt, service_fn};
use tower_outbound::{Call, ConcurrencyLimitLayer, Cost, Executor, Limits, Rate, RateLimiter, Shutdown};

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_limiter_admits_every_waiter_while_others_give_up() {
    let limiter = RateLimiter::new(Limits::new().requests(Rate::per_second(20_000).burst(1))).unwrap();
    let admitted = Arc::new(AtomicUsize::new(0));
    let tasks: Vec<_> = (0..64_u64)
        .map(|task| {
            let (limiter, admitted) = (limiter.clone(), admitted.clone());
            tokio::spawn(async move {
                for round in 0..150_u64 {
                    if (task + round) % 5 == 0 {
                        let _ = timeout(Duration::from_micros(round * 50), limiter.acquire(Cost::request())).await;
                    } else {
                        limiter.acquire(Cost::request()).await.unwrap();
                        admitted.fetch_add(1, Ordering::Relaxed);
                    }
                }
            })
        })
        .collect();
    for task in tasks {
        timeout(HANG, task).await.expect("no hang").unwrap();
    }
    assert_eq!(admitted.load(Ordering::Relaxed), 64 * 120);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn no_more_calls_than_the_limit_are_in_flight_while_calls_are_made_and_dropped() {
    let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (count, highest) = (now.clone(), most.clone());
    let client = service_fn(move |yields: usize| {
        let (count, highest) = (count.clone(), highest.clone());
        async move {
            struct InFlight(Arc<AtomicUsize>);
            impl Drop for InFlight {
                fn drop(&mut self) {
                    self.0.fetch_sub(1, Ordering::SeqCst);
                }
            }
            highest.fetch_max(count.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            let _in_flight = InFlight(count);
            for _ in 0..yields {
                tokio::task::yield_now().await;
            }
            Ok::<_, BoxError>(())
        }
    });
    let layer = ConcurrencyLimitLayer::new(7).unwrap();
    let limit = layer.limit().clone();
    let service = tower::ServiceBuilder::new().layer(layer).service(client);
    let tasks: Vec<_> = (0..64_usize)
        .map(|task| {
            let service = service.clone();
            tokio::spawn(async move {
                for round in 0..200 {
                    let call = service.clone().oneshot((task + round) % 4);
                    if (task + round) % 6 == 0 {
                        let _ = timeout(Duration::from_micros(20), call).await;
                    } else {
                        call.await.unwrap();
                    }
                }
            })
        })
        .collect();
    for task in tasks {
        timeout(HANG, task).await.expect("no hang").unwrap();
    }
    assert_eq!(most.load(Ordering::SeqCst), 7);
    assert_eq!((now.load(Ordering::SeqCst), limit.in_flight()), (0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_executor_accounts_for_calls_that_complete_fail_panic_and_are_cancelled() {
    for workers in [1, 3] {
        let client = service_fn(async |req: Request<usize>| {
            for _ in 0..req.body() % 5 {
                tokio::task::yield_now().await;
            }
            assert_ne!(req.body() % 97, 13, "this request panics");
            if req.body() % 89 == 7 {
                Err(BoxError::from("no"))
            } else {
                Ok(Response::new(*req.body()))
            }
        });
        let executor = Executor::builder()
            .limits(Limits::new())
            .queue_capacity(20)
            .concurrency_limit(8)
            .workers(workers);
        let executor = executor.build(client).unwrap();
        executor.start().unwrap();
        let tasks: Vec<_> = (0..32_usize)
            .map(|task| {
                let executor = executor.clone();
                tokio::spawn(async move {
                    for round in 0..200 {
                        let number = task * 200 + round;
                        let call = executor.submit(Call::from(Request::new(number))).await.unwrap();
                        match number % 7 {
                            0 => call.cancel(),
                            1 => drop(call),
                            2 => drop(executor.clone().oneshot(Request::new(number))),
                            _ => {
                                if let Ok(response) = call.await {
                                    assert_eq!(*response.body(), number);
                                }
                            }
                        }
                    }
                })
            })
            .collect();
        for task in tasks {
            timeout(HANG, task).await.expect("no hang").unwrap();
        }
        timeout(HANG, executor.stop(Shutdown::Graceful)).await.expect("no hang");
        let (monitor, totals) = (executor.monitor(), executor.monitor().totals());
        assert_eq!(totals.opened, 32 * 200);
        assert_eq!(totals.open(), 0, "{totals:?}");
        assert_eq!((monitor.in_flight(), monitor.queue_depth()), (0, 0));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn every_submit_that_races_with_a_stop_returns() {
    let client = service_fn(async |_: Request<()>| Ok::<_, BoxError>(Response::new(())));
    let executor = Executor::builder()
        .limits(Limits::new())
        .queue_capacity(4)
        .build(client)
        .unwrap();
    for round in 0..500 {
        executor.start().unwrap();
        let tasks: Vec<_> = (0..4)
            .map(|_| {
                let executor = executor.clone();
                tokio::spawn(async move {
                    let mut returned = 0;
                    for _ in 0..4 {
                        if let Ok(call) = executor.submit(Request::new(())).await {
                            let _ = call.await;
                        }
                        returned += 1;
                    }
                    returned
                })
            })
            .collect();
        let how = if round % 2 == 0 {
            Shutdown::Graceful
        } else {
            Shutdown::Immediate
        };
        timeout(HANG, executor.stop(how)).await.expect("no hang");
        for task in tasks {
            assert_eq!(timeout(HANG, task).await.expect("no hang").unwrap(), 4);
        }
        assert_eq!(executor.monitor().totals().open(), 0);
    }
}

/// Polls `future` once on `runtime`, which is not driven afterwards. The future must be pending.
fn poll_once_on<F: Future>(runtime: &Runtime, future: Pin<&mut F>) {
    let mut future = future;
    runtime.block_on(poll_fn(|cx| {
        assert!(future.as_mut().poll(cx).is_pending());
        Poll::Ready(())
    }));
}

/// A limiter of 100 requests a second whose first request has been taken.
fn limiter_in_use() -> RateLimiter {
    let limiter = RateLimiter::new(Limits::new().requests(Rate::per_second(100).burst(1))).unwrap();
    limiter.try_acquire(Cost::request()).unwrap();
    limiter
}

/// The thread that computes does so until the other waiter was admitted. If the wake-up of the other waiter depended on
/// a task in the queue of that thread, neither would ever continue.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_waiter_whose_thread_computes_does_not_block_the_next_one() {
    let limiter = limiter_in_use();
    // A flag and not a channel: a channel would wake the other waiter's task into the queue of the thread that computes.
    let polled = Arc::new(AtomicBool::new(false));
    let (is_admitted, admitted) = mpsc::channel();
    let computes = tokio::spawn({
        let (limiter, polled) = (limiter.clone(), polled.clone());
        async move {
            let mut acquire = pin!(limiter.acquire(Cost::request()));
            poll_fn(|cx| {
                assert!(acquire.as_mut().poll(cx).is_pending());
                Poll::Ready(())
            })
            .await;
            polled.store(true, Ordering::Release);
            admitted.recv_timeout(HANG).expect("no hang");
            acquire.await.unwrap();
        }
    });
    let waits = tokio::spawn(async move {
        while !polled.load(Ordering::Acquire) {
            tokio::task::yield_now().await;
        }
        limiter.acquire(Cost::request()).await.unwrap();
        is_admitted.send(()).unwrap();
    });
    waits.await.unwrap();
    computes.await.unwrap();
}

#[test]
fn a_wait_needs_no_task_of_its_own() {
    let (runtime, limiter) = (threaded_runtime(), limiter_in_use());
    let mut acquire = pin!(limiter.acquire(Cost::request()));
    poll_once_on(&runtime, acquire.as_mut());
    assert_eq!(runtime.metrics().num_alive_tasks(), 0);
    runtime.block_on(acquire).unwrap();
}

#[test]
fn a_waiter_depends_on_no_runtime_that_is_not_driven() {
    within_a_minute(|| {
        let (idle, limiter) = (idle_runtime(), limiter_in_use());
        let mut first = pin!(limiter.acquire(Cost::request()));
        poll_once_on(&idle, first.as_mut());
        threaded_runtime().block_on(limiter.acquire(Cost::request())).unwrap();
        idle.block_on(first).unwrap();
    });
}

/// The permit is released outside every runtime, and the waiter that is notified is on a runtime that is not driven.
#[test]
fn a_waiter_for_a_permit_depends_on_no_runtime_that_is_not_driven() {
    within_a_minute(|| {
        let (idle, driven) = (idle_runtime(), threaded_runtime());
        let service = service_fn(|()| pending::<Result<(), BoxError>>());
        let service = ConcurrencyLimitLayer::new(1).unwrap().layer(service);
        let (mut running, mut first, mut second) = (service.clone(), service.clone(), service);
        let mut call = Box::pin(running.call(()));
        poll_once_on(&driven, call.as_mut());
        let mut first = pin!(first.ready());
        poll_once_on(&idle, first.as_mut());
        let second = driven.spawn(async move { second.ready().await.map(drop) });
        while driven.metrics().num_alive_tasks() == 0 {
            thread::yield_now();
        }
        drop(call);
        driven.block_on(second).unwrap().unwrap();
        idle.block_on(first).unwrap();
    });
}

#[test]
fn a_runtime_that_is_shut_down_takes_no_wake_up_with_it() {
    within_a_minute(|| {
        let (ends, stays, limiter) = (threaded_runtime(), threaded_runtime(), limiter_in_use());
        let mut first = pin!(limiter.acquire(Cost::request()));
        let mut second = pin!(limiter.acquire(Cost::request()));
        poll_once_on(&ends, first.as_mut());
        poll_once_on(&stays, second.as_mut());
        drop(ends);
        stays.block_on(second).unwrap();
        stays.block_on(first).unwrap();
        stays.block_on(limiter.acquire(Cost::request())).unwrap();
    });
}

/// Returns a runtime that runs only while it is given something to block on.
fn idle_runtime() -> Runtime {
    Builder::new_current_thread().enable_time().build().expect("a runtime")
}
