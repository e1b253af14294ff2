//! What calls may do to each other: compute, block, or always have more to do. A test that needs threads waits for an
//! event on another thread and not for a time, so that it hangs if the event cannot come.

mod support;

use http::{Request, Response};
use std::{
    convert::Infallible,
    future::{Future, poll_fn},
    pin::pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc,
    },
};
use support::{HANG, ms};
use tokio::{
    runtime::Handle,
    sync::{oneshot, watch},
    task::{block_in_place, consume_budget, yield_now},
    time::timeout,
};
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_outbound::{Call, Executor, Limits, Queue, QueueLayer, executor::Closure};

type Closures = Executor<Closure<String>, String>;

fn executor(concurrency: usize) -> Closures {
    let executor = Executor::builder()
        .limits(Limits::new())
        .concurrency_limit(concurrency)
        .queue_capacity(100_000)
        .build_for_closures()
        .unwrap();
    executor.start().unwrap();
    executor
}

/// A call whose future is made by `run`.
fn call<Fut>(run: impl Fn() -> Fut + Send + Sync + 'static) -> Call<Closure<String>>
where
    Fut: Future<Output = ()> + Send + 'static,
{
    Call::new(move || {
        let run = run();
        async move {
            run.await;
            Ok::<_, Infallible>((200, String::new()))
        }
    })
}

// --- on one thread ---

/// Returns how often the futures of `calls` calls are polled that are all told something at the same time, and that
/// then read more than a task's cooperative budget allows in one poll.
async fn polls_of_calls_that_are_answered_at_once(calls: usize) -> usize {
    let polls = Arc::new(AtomicUsize::new(0));
    let (go, gone) = watch::channel(false);
    let client = service_fn({
        let polls = polls.clone();
        move |()| {
            let (polls, mut gone) = (polls.clone(), gone.clone());
            async move {
                let mut reads = pin!(async {
                    gone.wait_for(|gone| *gone).await.unwrap();
                    for _ in 0..200 {
                        consume_budget().await;
                    }
                });
                poll_fn(|cx| {
                    polls.fetch_add(1, Ordering::Relaxed);
                    reads.as_mut().poll(cx)
                })
                .await;
                Ok::<_, Infallible>(())
            }
        }
    });
    let mut queue = QueueLayer::new(calls).unwrap().layer(client);
    let responses: Vec<_> = (0..calls).map(|_| queue.try_call(()).unwrap()).collect();
    while queue.in_flight() < calls {
        yield_now().await;
    }
    go.send(true).unwrap();
    for response in responses {
        response.await.unwrap();
    }
    polls.load(Ordering::Relaxed)
}

#[tokio::test]
async fn calls_that_are_answered_at_once_are_polled_as_often_each_however_many_they_are() {
    assert_eq!(polls_of_calls_that_are_answered_at_once(10).await, 10 * 3);
    assert_eq!(polls_of_calls_that_are_answered_at_once(5_000).await, 5_000 * 3);
}

#[tokio::test]
async fn a_call_that_always_has_more_to_do_does_not_delay_its_neighbour() {
    let executor = executor(2);
    let ended = Arc::new(Mutex::new(Vec::new()));
    let heavy = call({
        let ended = ended.clone();
        move || {
            let ended = ended.clone();
            async move {
                for _ in 0..100_000 {
                    consume_budget().await;
                }
                ended.lock().unwrap().push("heavy");
            }
        }
    });
    let light = call({
        let ended = ended.clone();
        move || {
            let ended = ended.clone();
            async move {
                for _ in 0..10 {
                    yield_now().await;
                }
                ended.lock().unwrap().push("light");
            }
        }
    });
    let (heavy, light) = (
        executor.submit(heavy).await.unwrap(),
        executor.submit(light).await.unwrap(),
    );
    let (heavy, light) = tokio::join!(heavy, light);
    heavy.unwrap();
    light.unwrap();
    assert_eq!(*ended.lock().unwrap(), ["light", "heavy"]);
}

#[tokio::test]
async fn a_loop_of_submits_that_need_not_wait_yields_to_other_tasks() {
    let executor = executor(100_000);
    let has_run = Arc::new(AtomicBool::new(false));
    tokio::spawn({
        let has_run = has_run.clone();
        async move { has_run.store(true, Ordering::Relaxed) }
    });
    let mut submits = 0;
    while !has_run.load(Ordering::Relaxed) {
        drop(executor.submit(call(|| async {})).await.unwrap());
        submits += 1;
        assert!(submits < 1_000, "no other task runs");
    }
}

// --- on several threads ---

/// A queue whose calls are closures that return a future.
fn queue(workers: usize) -> Queue<Job, ()> {
    let client = service_fn(async |job: Job| {
        job().await;
        Ok::<_, Infallible>(())
    });
    QueueLayer::new(100).unwrap().workers(workers).unwrap().layer(client)
}

type Job = Box<dyn FnOnce() -> std::pin::Pin<Box<dyn Future<Output = ()> + Send>> + Send>;

fn job<Fut: Future<Output = ()> + Send + 'static>(run: impl FnOnce() -> Fut + Send + 'static) -> Job {
    Box::new(move || Box::pin(run()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_call_that_blocks_in_its_first_poll_delays_no_other_call() {
    for workers in [1, 3] {
        let mut queue = queue(workers);
        let (release, released) = mpsc::channel::<()>();
        let (began, begins) = oneshot::channel();
        let blocking = queue.try_call(job(move || async move {
            began.send(()).unwrap();
            released.recv().unwrap();
        }));
        begins.await.unwrap();
        for _ in 0..10 {
            let quick = queue.try_call(job(|| async {})).unwrap();
            timeout(HANG, quick)
                .await
                .expect("the quick call is not held up")
                .unwrap();
        }
        release.send(()).unwrap();
        blocking.unwrap().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_call_that_blocks_later_delays_no_call_that_runs_or_is_queued() {
    let mut queue = queue(1);
    let (release, released) = mpsc::channel::<()>();
    let (began, begins) = oneshot::channel();
    let blocking = queue.try_call(job(move || async move {
        yield_now().await;
        began.send(()).unwrap();
        released.recv().unwrap();
    }));
    let running = queue.try_call(job(|| async {
        for _ in 0..100 {
            tokio::time::sleep(ms(1)).await;
        }
    }));
    begins.await.unwrap();
    timeout(HANG, running.unwrap())
        .await
        .expect("the running call goes on")
        .unwrap();
    let queued = queue.try_call(job(|| async {})).unwrap();
    timeout(HANG, queued).await.expect("the queued call begins").unwrap();
    release.send(()).unwrap();
    blocking.unwrap().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_caller_that_blocks_after_it_has_queued_a_call_delays_no_other_caller() {
    let queue = queue(1);
    let (release, released) = mpsc::channel::<()>();
    let (queued, is_queued) = oneshot::channel();
    let blocking = tokio::spawn({
        let mut queue = queue.clone();
        async move {
            // The worker that is woken for this call is stuck on this thread, which blocks.
            let call = queue.try_call(job(|| async {})).unwrap();
            queued.send(()).unwrap();
            released.recv().unwrap();
            call.await.unwrap();
        }
    });
    is_queued.await.unwrap();
    let other = tokio::spawn(queue.clone().oneshot(job(|| async {})));
    timeout(HANG, other)
        .await
        .expect("the other call runs")
        .unwrap()
        .unwrap();
    release.send(()).unwrap();
    blocking.await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_call_may_block_its_thread_on_another_call_of_its_executor() {
    let executor = executor(2);
    let inner = executor.clone();
    let outer = call(move || {
        let inner = inner.clone();
        async move {
            block_in_place(|| {
                Handle::current().block_on(async {
                    let call = inner.submit(call(|| async {})).await.unwrap();
                    timeout(HANG, call).await.expect("the inner call runs").unwrap();
                });
            });
        }
    });
    executor.submit(outer).await.unwrap().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn calls_reach_the_service_in_order_on_any_runtime() {
    let arrived = Arc::new(Mutex::new(Vec::new()));
    let client = service_fn({
        let arrived = arrived.clone();
        move |number: usize| {
            let arrived = arrived.clone();
            async move {
                arrived.lock().unwrap().push(number);
                tokio::time::sleep(ms(1)).await;
                Ok::<_, Infallible>(Response::new(()))
            }
        }
    });
    let client = service_fn(move |request: Request<usize>| {
        let mut client = client.clone();
        async move { client.call(*request.body()).await }
    });
    let executor = Executor::builder()
        .limits(Limits::new())
        .concurrency_limit(50)
        .build(client)
        .unwrap();
    executor.start().unwrap();
    let mut calls = Vec::new();
    for number in 0..500 {
        calls.push(executor.submit(Request::new(number)).await.unwrap());
    }
    for call in calls {
        call.await.unwrap();
    }
    let arrived = arrived.lock().unwrap();
    assert!(arrived.is_sorted(), "{arrived:?}");
    assert_eq!(arrived.len(), 500);
}
