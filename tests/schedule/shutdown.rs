//! Every way to stop an executor with a schedule, with calls in every state: each call gets its result, each event ends,
//! nothing is left, and the schedule can be used again.

use super::*;
use crate::support::{pass, paused_runtime, settle, within_a_minute};
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::sync::Notify;
use tower::retry::RetryLayer;
use tower_outbound::EventHandle;

#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    Graceful,
    WithinEnough,
    WithinTooLittle,
    Immediate,
    SentWithinEnough,
    SentWithinTooLittle,
    GracefulThenImmediate,
    LastCloneDropped,
    RuntimeEnds,
}

const EVERY_END: [End; 9] = [
    End::Graceful,
    End::WithinEnough,
    End::WithinTooLittle,
    End::Immediate,
    End::SentWithinEnough,
    End::SentWithinTooLittle,
    End::GracefulThenImmediate,
    End::LastCloneDropped,
    End::RuntimeEnds,
];

/// How long the client takes for a call of the flow `long`.
const LONG: Duration = Duration::from_secs(10);
/// When the calls of the flow `paused` can begin.
const PAUSE: Duration = Duration::from_secs(100);

/// The calls of a test, each by the task that waits for its result.
type Calls = Vec<(&'static str, tokio::task::JoinHandle<Result<Response, Error>>)>;

fn schedule() -> Schedule {
    let limits_of = |tenant: &str| (tenant == "retried").then(|| Limits::new().requests(Rate::per_minute(1)));
    Schedule::new().level(Level::by("tenant").limits(limits_of))
}

fn build(schedule: &Schedule) -> TestExecutor {
    let (failing, _) = failing_client(Duration::ZERO, |number| usize::from(number == 0));
    let client = tower::service_fn(move |request: Request| {
        let mut failing = failing.clone();
        async move {
            if *request.body() == 1 {
                sleep(LONG).await;
            }
            failing.call(request).await
        }
    });
    Executor::builder()
        .queue_capacity(3)
        .concurrency_limit(1)
        .limits(per_second(1_000))
        .schedule(schedule.clone())
        .layer(RetryLayer::new(Unavailable))
        .build(client)
        .unwrap()
}

/// Tries a call with the status 503 again at once.
#[derive(Clone)]
struct Unavailable;

impl<E> tower::retry::Policy<Request, Response, E> for Unavailable {
    type Future = std::future::Ready<()>;

    fn retry(&mut self, _: &mut Request, result: &mut Result<Response, E>) -> Option<Self::Future> {
        let is_unavailable = matches!(result, Ok(response) if response.status() == 503);
        is_unavailable.then(|| std::future::ready(()))
    }

    fn clone_request(&mut self, request: &Request) -> Option<Request> {
        Some(request.clone())
    }
}

/// Submits one call for each state, and returns when each is in its state.
async fn submit(executor: &TestExecutor, schedule: &Schedule) -> (Calls, Vec<EventHandle>) {
    schedule.pause("paused", Instant::now() + PAUSE).unwrap();
    let mut calls = Calls::new();
    let mut events = Vec::new();
    let placed = [
        // Waits for the limits of its key, to be tried again.
        ("retry", flow_call("retried", 0)),
        ("client", flow_call("long", 1)),
        // These have the three places.
        ("permit", flow_call("long", 2)),
        ("paused", flow_call("paused", 3)),
        ("behind", flow_call("paused", 4)),
    ];
    for (name, call) in placed {
        let handle = executor.submit(call).await.unwrap();
        events.push(handle.event().clone());
        calls.push((name, tokio::spawn(handle.into_future_result())));
        pass(ms(2)).await;
    }
    for number in 5..8 {
        calls.push(("no place", spawn_call(executor, flow_call("paused", number))));
    }
    settle().await;
    assert_eq!(executor.monitor().queue_depth(), 3);
    assert_eq!(executor.monitor().in_flight(), 1);
    assert_eq!(schedule.waiting(), 7);
    (calls, events)
}

trait IntoResult {
    fn into_future_result(self) -> impl std::future::Future<Output = Result<Response, Error>> + Send + 'static;
}

impl IntoResult for CallHandle<u64, ()> {
    async fn into_future_result(self) -> Result<Response, Error> {
        self.await
    }
}

/// Returns which results the calls of each state may have.
fn expected(end: End, name: &str) -> &'static [&'static str] {
    match (end, name) {
        (End::LastCloneDropped | End::RuntimeEnds, _) => &["cancelled", "closed"],
        (_, "no place") => &["closed"],
        (End::Graceful | End::WithinEnough, _) => &["response"],
        (End::SentWithinEnough, "client") => &["response"],
        _ => &["cancelled"],
    }
}

async fn check(end: End, calls: Calls) {
    for (name, call) in calls {
        let result = match call.await.unwrap() {
            Ok(_) => "response",
            Err(error) if error.is_closed() => "closed",
            Err(error) if error.is_cancelled() => "cancelled",
            Err(error) => panic!("{end:?} {name} {error}"),
        };
        assert!(expected(end, name).contains(&result), "{end:?} {name} {result}");
    }
}

async fn end_executor(executor: TestExecutor, end: End) {
    match end {
        End::Graceful => drop(executor.stop(Shutdown::Graceful).await),
        End::WithinEnough => drop(executor.stop(Shutdown::Within(ms(1_000_000))).await),
        End::WithinTooLittle => drop(executor.stop(Shutdown::Within(ms(1_000))).await),
        End::Immediate => drop(executor.stop(Shutdown::Immediate).await),
        End::SentWithinEnough => drop(executor.stop(Shutdown::SentWithin(ms(1_000_000))).await),
        End::SentWithinTooLittle => drop(executor.stop(Shutdown::SentWithin(ms(1_000))).await),
        End::GracefulThenImmediate => {
            let graceful = executor.stop(Shutdown::Graceful);
            assert!(tokio::time::timeout(ms(1_000), graceful).await.is_err());
            executor.stop(Shutdown::Immediate).await;
        }
        End::LastCloneDropped | End::RuntimeEnds => drop(executor),
    }
}

async fn serves_again(schedule: &Schedule) {
    let (client, log) = client(ms(10));
    let executor = Executor::builder()
        .concurrency_limit(1)
        .limits(per_second(1))
        .schedule(schedule.clone())
        .build(client)
        .unwrap();
    executor.start().unwrap();
    let calls = [flow_call("a", 0), flow_call("b", 1)];
    all_end_well(submit_all(&executor, calls).await).await;
    assert_eq!(log.millis(), [(0, 0), (1, 1_000)]);
    executor.stop(Shutdown::Graceful).await;
    assert_nothing_is_left(&executor, schedule);
}

#[test]
fn every_stop_ends_each_call_and_leaves_nothing_and_the_schedule_serves_again() {
    for end in EVERY_END {
        let schedule = schedule();
        let runtime = paused_runtime();
        let (monitor, events) = runtime.block_on(async {
            let executor = build(&schedule);
            executor.start().unwrap();
            let monitor = executor.monitor();
            let (calls, events) = submit(&executor, &schedule).await;
            if end == End::RuntimeEnds {
                return (monitor, events);
            }
            if end == End::LastCloneDropped {
                // The tasks that wait for a place have clones.
                for (_, call) in calls.into_iter().filter(|(name, _)| *name == "no place") {
                    call.abort();
                }
                settle().await;
                end_executor(executor, end).await;
                pass(ms(1)).await;
            } else {
                end_executor(executor, end).await;
                check(end, calls).await;
            }
            (monitor, events)
        });
        drop(runtime);
        for event in &events {
            assert!(event.status().is_terminal(), "{end:?} {event:?}");
        }
        let totals = monitor.totals();
        assert_eq!(totals.opened, 8, "{end:?}");
        assert_eq!(totals.completed + totals.failed + totals.cancelled, 8, "{end:?}");
        assert_eq!((monitor.in_flight(), monitor.queue_depth()), (0, 0), "{end:?}");
        assert_none_waits(&schedule);
        paused_runtime().block_on(serves_again(&schedule));
    }
}

/// A request body that runs this when it is dropped.
struct Dropped {
    number: u64,
    then: Option<Box<dyn FnOnce() + Send>>,
}

impl Drop for Dropped {
    fn drop(&mut self) {
        self.then.take().into_iter().for_each(|then| then());
    }
}

#[test]
fn a_call_that_begins_without_a_place_while_the_queue_closes_is_finished() {
    within_a_minute(|| {
        let (go, begun) = (Arc::new(Notify::new()), Arc::new(AtomicBool::new(false)));
        let client = tower::service_fn({
            let (go, begun) = (go.clone(), begun.clone());
            move |request: http::Request<Dropped>| {
                let (go, begun) = (go.clone(), begun.clone());
                async move {
                    match request.body().number {
                        0 => go.notified().await,
                        3 => {
                            begun.store(true, Ordering::Release);
                            sleep(ms(100)).await;
                        }
                        _ => {}
                    }
                    Ok::<_, io::Error>(http::Response::new(()))
                }
            }
        });
        let schedule = tenants();
        let executor = unlimited()
            .queue_capacity(1)
            .concurrency_limit(1)
            .schedule(schedule.clone())
            .build(client)
            .unwrap();
        let submit = |flow: &'static str, number, then| {
            let request = http::Request::post("http://localhost/").body(Dropped { number, then });
            let (executor, call) = (executor.clone(), Call::from(request.unwrap()).flow(flow));
            tokio::spawn(async move { executor.submit(call).await?.await })
        };
        let waiting = async |calls| {
            while schedule.waiting() < calls {
                sleep(ms(1)).await;
            }
        };
        // A thread for the stop, and one for the calls meanwhile.
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(3)
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            executor.start().unwrap();
            schedule
                .pause("paused", Instant::now() + Duration::from_secs(3_600))
                .unwrap();
            let runs = submit("a", 0, None);
            while executor.monitor().calling() == 0 {
                sleep(ms(1)).await;
            }
            let has_the_place = submit("paused", 1, None);
            waiting(1).await;
            // When the stop ends this call, which has no place, the permit gets free, and the call behind it begins before
            // the stop gets to it.
            let is_ended = submit(
                "a",
                2,
                Some(Box::new({
                    let begun = begun.clone();
                    move || {
                        // From a thread of its own: a task that is woken on this one would wait until it is free.
                        std::thread::spawn(move || go.notify_one()).join().unwrap();
                        for _ in 0..10_000 {
                            if begun.load(Ordering::Acquire) {
                                return;
                            }
                            // Real time: this thread is blocked on purpose, and the other one has no paused clock.
                            std::thread::sleep(ms(1));
                        }
                    }
                })),
            );
            waiting(2).await;
            let begins = submit("a", 3, None);
            waiting(3).await;
            let stopped = executor.clone();
            let stop = tokio::spawn(async move { stopped.stop(Shutdown::Graceful).await });
            assert!(is_ended.await.unwrap().unwrap_err().is_closed());
            begins.await.unwrap().unwrap();
            assert!(begun.load(Ordering::Acquire));
            schedule.resume("paused").unwrap();
            stop.await.unwrap();
            runs.await.unwrap().unwrap();
            has_the_place.await.unwrap().unwrap();
        });
        assert_none_waits(&schedule);
    });
}
