//! Tests of every way to end an executor, for calls in every state: how the call ends, what its caller receives, and
//! what the stop reports.

mod support;

use http::{Request, Response};
use std::{
    future::{Future, pending},
    pin::Pin,
    sync::{
        Arc, Barrier, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker},
    thread,
    time::Duration,
};
use support::{HANG, block_on, client, ms, pass, paused_runtime, request, settle, threaded_runtime, within_a_minute};
use tokio::{
    runtime::Builder,
    task::JoinHandle,
    time::{self, Instant, timeout},
};
use tower::{BoxError, Service, ServiceExt, layer::layer_fn, service_fn};
use tower_outbound::{
    Call, CallHandle, EventHandle, Executor, ExecutorBuilder, Limits, Rate, RequestStatus, Schedule, Shutdown,
    error::Error,
    executor::{Closure, ResponseFuture, StopReport, TrySubmitError},
};

type TestExecutor = Executor<&'static str, &'static str>;

fn unlimited() -> ExecutorBuilder {
    Executor::builder().limits(Limits::new())
}

// --- Every state and every end ---

/// The state of the call under test when the executor is ended.
#[derive(Clone, Copy, Debug, PartialEq)]
enum At {
    /// The call waits for a place in the queue.
    NoPlace,
    /// The call has a place in the queue and has not begun.
    Queue,
    /// The call has begun, unless a schedule lets it begin later, and waits for a permit of the concurrency limit.
    Permit,
    /// The call waits for the rate limit, with its permit unless a schedule lets it begin later.
    Rate,
    /// The client is handling the call.
    Client,
    /// The call has completed, and the caller has not fetched the response.
    Done,
    /// The client is handling the call, whose handle was dropped.
    Detached,
}

/// In which order the calls begin.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Order {
    FirstComeFirstServed,
    Scheduled,
}

/// How the executor is ended.
#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    Graceful,
    /// A stop with a deadline that leaves the calls enough time.
    DeadlineFarAway,
    /// A stop with a deadline that passes before the calls have ended.
    DeadlinePasses,
    Immediate,
    /// A stop that finishes what is on the wire, with a limit that leaves it enough time.
    SentFarAway,
    /// The same with a limit that passes before the calls have ended.
    SentPasses,
    /// A graceful stop, and an immediate one while the first still waits.
    GracefulThenImmediate,
    /// A graceful stop whose future is dropped while it waits.
    GracefulDropped,
    /// A stop with a deadline, whose future is dropped before the deadline, so that no call is cancelled.
    DeadlineDropped,
    LastCloneDropped,
    RuntimeEnds,
}

/// What the caller of the call under test receives.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Received {
    Response,
    Closed,
    Cancelled,
    /// The call has no caller: its handle was dropped.
    Nothing,
}

const EVERY_STATE: [At; 7] = [
    At::NoPlace,
    At::Queue,
    At::Permit,
    At::Rate,
    At::Client,
    At::Done,
    At::Detached,
];

const EVERY_END: [End; 11] = [
    End::Graceful,
    End::DeadlineFarAway,
    End::DeadlinePasses,
    End::Immediate,
    End::SentFarAway,
    End::SentPasses,
    End::GracefulThenImmediate,
    End::GracefulDropped,
    End::DeadlineDropped,
    End::LastCloneDropped,
    End::RuntimeEnds,
];

/// How long the client takes for a call.
const TAKES: Duration = Duration::from_secs(10);

impl At {
    /// The time from the submission of the first call to the end of the executor, after which the call under test is in
    /// this state.
    fn reached(self) -> Duration {
        match self {
            Self::Done => TAKES + ms(100),
            _ => ms(100),
        }
    }

    /// How many other calls have to be submitted first to bring the call under test into this state.
    fn others(self) -> u64 {
        match self {
            Self::NoPlace => 2,
            Self::Queue | Self::Permit | Self::Rate => 1,
            Self::Client | Self::Done | Self::Detached => 0,
        }
    }

    /// The time from the submission of the first call to the end of the last one, if no call is cancelled.
    fn last_end(self) -> Duration {
        match self {
            Self::NoPlace | Self::Queue | Self::Permit => 2 * TAKES,
            Self::Rate => Duration::from_secs(60) + TAKES,
            Self::Client | Self::Done | Self::Detached => TAKES,
        }
    }

    /// How many calls are on the wire when the executor is ended.
    fn on_wire(self) -> u64 {
        u64::from(self != Self::Done)
    }

    fn status(self, order: Order) -> RequestStatus {
        match self {
            Self::NoPlace => RequestStatus::Pending,
            Self::Queue => RequestStatus::Queued,
            // A schedule chooses a call when what it needs is there. Until then it has not begun.
            Self::Permit | Self::Rate if order == Order::Scheduled => RequestStatus::Queued,
            Self::Permit | Self::Rate => RequestStatus::Processing,
            Self::Client | Self::Detached => RequestStatus::Calling,
            Self::Done => RequestStatus::Completed,
        }
    }
}

impl End {
    /// Whether this way to end the executor lets the accepted calls finish.
    fn is_graceful(self) -> bool {
        matches!(
            self,
            Self::Graceful | Self::DeadlineFarAway | Self::GracefulDropped | Self::DeadlineDropped
        )
    }

    /// How long the test lets the calls run between the start of the stop and their cancellation.
    fn patience(self) -> Duration {
        match self {
            Self::DeadlinePasses | Self::GracefulThenImmediate | Self::SentPasses => ms(1_000),
            _ => ms(0),
        }
    }
}

/// Returns what the executor guarantees for a call in this state: its final status, and what its caller receives.
fn guaranteed(at: At, end: End) -> (RequestStatus, Received) {
    let is_on_wire = matches!(at, At::Client | At::Detached);
    match (at, end.is_graceful() || (end == End::SentFarAway && is_on_wire)) {
        (At::NoPlace, _) => (RequestStatus::Cancelled, Received::Closed),
        (At::Done, _) => (RequestStatus::Completed, Received::Response),
        (At::Detached, true) => (RequestStatus::Completed, Received::Nothing),
        (At::Detached, false) => (RequestStatus::Cancelled, Received::Nothing),
        (_, true) => (RequestStatus::Completed, Received::Response),
        (_, false) => (RequestStatus::Cancelled, Received::Cancelled),
    }
}

/// A middleware that is always ready, so that a call leaves the queue and waits for the inner service, and with that for a
/// permit, in its future.
#[derive(Clone)]
struct AlwaysReady<S>(S);

impl<S, R> Service<R> for AlwaysReady<S>
where
    S: Service<R> + Clone + Send + 'static,
    S::Future: Send,
    R: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, req: R) -> Self::Future {
        Box::pin(self.0.clone().oneshot(req))
    }
}

/// The call under test, whose end is checked.
enum Subject {
    Submitted(CallHandle<&'static str, &'static str>),
    Called(ResponseFuture<&'static str, &'static str>),
    /// A call through the `Service` interface whose response future is awaited by a spawned task.
    Awaited(JoinHandle<Result<Response<&'static str>, Error>>),
    Detached,
}

impl Subject {
    async fn receive(self) -> Received {
        let result = match self {
            Self::Submitted(call) => call.await,
            Self::Called(call) => call.await,
            Self::Awaited(task) => task.await.unwrap(),
            Self::Detached => return Received::Nothing,
        };
        match result {
            Ok(_) => Received::Response,
            Err(error) if error.is_closed() => Received::Closed,
            Err(error) if error.is_cancelled() => Received::Cancelled,
            Err(error) => panic!("{error}"),
        }
    }
}

/// Starts an executor with this order, and brings a call into the state `at`.
async fn bring(at: At, order: Order) -> (TestExecutor, Subject, EventHandle) {
    let (client, _) = client(TAKES);
    let builder = match at {
        At::NoPlace => unlimited().queue_capacity(1).concurrency_limit(1),
        At::Queue | At::Permit => unlimited().concurrency_limit(1),
        At::Rate => Executor::builder().requests(Rate::per_minute(1)),
        At::Client | At::Done | At::Detached => unlimited(),
    };
    let builder = match order {
        Order::FirstComeFirstServed => builder,
        Order::Scheduled => builder.schedule(Schedule::new()),
    };
    let mut executor = match at {
        At::Permit => builder.layer(layer_fn(AlwaysReady)).build(client).unwrap(),
        _ => builder.build(client).unwrap(),
    };
    executor.start().unwrap();
    for _ in 0..at.others() {
        drop(executor.submit(request("other")).await.unwrap());
        settle().await;
    }
    let (subject, event) = match at {
        At::NoPlace => {
            let call = executor.call(request("subject"));
            let event = call.event().unwrap().clone();
            (Subject::Called(call), event)
        }
        _ => {
            let call = executor.submit(request("subject")).await.unwrap();
            let event = call.event().clone();
            match at {
                At::Detached => (Subject::Detached, event),
                _ => (Subject::Submitted(call), event),
            }
        }
    };
    pass(at.reached()).await;
    assert_eq!(event.status(), at.status(order), "{at:?} {order:?}");
    // Returns a clone, which holds no queue handle, and drops the executor that made the calls, which may hold one:
    // dropping the returned executor has to end the queue.
    (executor.clone(), subject, event)
}

/// Ends the executor in the given way. Returns the report of the stop that waited longest; `None` if no stop returned a
/// report.
async fn ends(executor: TestExecutor, end: End) -> Option<StopReport> {
    let far = Duration::from_secs(100_000);
    match end {
        End::Graceful => Some(executor.stop(Shutdown::Graceful).await),
        End::DeadlineFarAway => Some(executor.stop(Shutdown::Within(far)).await),
        End::DeadlinePasses => Some(executor.stop(Shutdown::Within(end.patience())).await),
        End::Immediate => Some(executor.stop(Shutdown::Immediate).await),
        End::SentFarAway => Some(executor.stop(Shutdown::SentWithin(far)).await),
        End::SentPasses => Some(executor.stop(Shutdown::SentWithin(end.patience())).await),
        End::GracefulThenImmediate => {
            let graceful = executor.stop(Shutdown::Graceful);
            let immediate = async {
                time::sleep(end.patience()).await;
                executor.stop(Shutdown::Immediate).await
            };
            let (graceful, immediate) = tokio::join!(graceful, immediate);
            assert_eq!(immediate.elapsed, ms(0));
            // No call ends between the starts of the two stops, so both report the same numbers of calls.
            assert_eq!(
                (immediate.completed, immediate.failed),
                (graceful.completed, graceful.failed)
            );
            Some(graceful)
        }
        End::GracefulDropped => {
            timeout(ms(500), executor.stop(Shutdown::Graceful)).await.ok();
            settle().await;
            // The executor stays stopped although the future of the stop was dropped.
            assert!(!executor.is_running());
            time::sleep(far).await;
            None
        }
        End::DeadlineDropped => {
            timeout(ms(500), executor.stop(Shutdown::Within(ms(1_000)))).await.ok();
            time::sleep(far).await;
            None
        }
        End::LastCloneDropped => {
            drop(executor);
            settle().await;
            None
        }
        End::RuntimeEnds => unreachable!("the caller drops the runtime"),
    }
}

#[test]
fn a_call_in_each_state_ends_as_guaranteed_for_each_way_to_end() {
    let mut cases = 0;
    let orders = [Order::FirstComeFirstServed, Order::Scheduled];
    for (at, order) in EVERY_STATE.iter().flat_map(|at| orders.map(|order| (*at, order))) {
        for end in EVERY_END {
            let case = format!("{at:?}, {end:?}, {order:?}");
            let (runtime, afterwards) = (paused_runtime(), paused_runtime());
            let (executor, mut subject, event) = runtime.block_on(bring(at, order));
            let monitor = executor.monitor();
            let (status, expected) = guaranteed(at, end);
            let received = if end == End::RuntimeEnds {
                // Polls the call once, so that it waits for a place in the queue when the runtime of the executor ends.
                if let Subject::Called(call) = &mut subject {
                    let mut cx = Context::from_waker(Waker::noop());
                    assert!(Pin::new(call).poll(&mut cx).is_pending());
                }
                drop(runtime);
                let received = afterwards.block_on(async { timeout(HANG, subject.receive()).await });
                assert!(!executor.is_running(), "{case}");
                afterwards.block_on(async {
                    let late = executor.submit(request("late")).await;
                    assert!(late.unwrap_err().is_not_running(), "{case}");
                    let report = timeout(HANG, executor.stop(Shutdown::Graceful)).await.expect(&case);
                    assert_eq!((report.completed, report.failed, report.cancelled), (0, 0, 0), "{case}");
                });
                received
            } else {
                runtime.block_on(async {
                    // A call that waits for a place in the queue makes progress only while it is polled, so a task
                    // awaits it.
                    if let Subject::Called(call) = subject {
                        subject = Subject::Awaited(tokio::spawn(call));
                        settle().await;
                    }
                    let report = timeout(1_000_000 * HANG, ends(executor, end)).await.expect(&case);
                    if let Some(report) = report {
                        let (open, finished) = match at {
                            At::Done => (0, 0),
                            _ => (at.others() + 1, at.others() + u64::from(at != At::NoPlace)),
                        };
                        let completed = match end {
                            End::SentFarAway => at.on_wire(),
                            _ if end.is_graceful() => finished,
                            _ => 0,
                        };
                        let expected = (completed, 0, open - completed);
                        assert_eq!((report.completed, report.failed, report.cancelled), expected, "{case}");
                        let elapsed = match (at, end.is_graceful()) {
                            (At::Done, _) => ms(0),
                            _ if end == End::SentFarAway => TAKES - at.reached(),
                            (_, true) => at.last_end() - at.reached(),
                            (_, false) => end.patience(),
                        };
                        // If every call has ended, the graceful stop returns at once, before the immediate stop begins.
                        let waited = if (at, end) == (At::Done, End::GracefulThenImmediate) {
                            ms(0)
                        } else {
                            elapsed
                        };
                        assert_eq!(report.elapsed, waited, "{case}");
                    }
                    timeout(HANG, subject.receive()).await
                })
            };
            assert_eq!(received.expect(&case), expected, "{case}");
            assert_eq!(event.status(), status, "{case}");
            let totals = monitor.totals();
            assert_eq!((totals.opened, totals.open()), (at.others() + 1, 0), "{case}");
            let left = (monitor.queue_depth(), monitor.in_flight(), monitor.calling());
            assert_eq!(left, (0, 0, 0), "{case}");
            cases += 1;
        }
    }
    assert_eq!(cases, 154);
}

// --- Concurrent and repeated stops ---

#[tokio::test(start_paused = true)]
async fn concurrent_stops_all_return_and_report_the_same() {
    let executor = unlimited().concurrency_limit(1).build(client(ms(100)).0).unwrap();
    executor.start().unwrap();
    for _ in 0..5 {
        drop(executor.submit(request("call")).await.unwrap());
    }
    let stops: Vec<_> = (0..50)
        .map(|_| {
            let executor = executor.clone();
            tokio::spawn(async move { executor.stop(Shutdown::Graceful).await })
        })
        .collect();
    for stop in stops {
        let report = timeout(HANG, stop).await.expect("no hang").unwrap();
        assert_eq!((report.completed, report.elapsed), (5, ms(500)));
    }
    assert_eq!(executor.stop(Shutdown::Immediate).await, StopReport::default());
}

#[tokio::test(start_paused = true)]
async fn of_two_stops_with_a_deadline_the_earlier_deadline_applies() {
    for (first, second) in [(300, 100), (100, 300)] {
        let executor = unlimited().build(client(ms(10_000)).0).unwrap();
        executor.start().unwrap();
        drop(executor.submit(request("call")).await.unwrap());
        settle().await;
        let (first, second) = tokio::join!(
            executor.stop(Shutdown::Within(ms(first))),
            executor.stop(Shutdown::Within(ms(second)))
        );
        for report in [first, second] {
            assert_eq!((report.cancelled, report.elapsed), (1, ms(100)));
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_stop_within_zero_cancels_and_a_stop_within_the_maximum_waits() {
    for (limit, completed, elapsed) in [
        (Duration::ZERO, 0, ms(0)),
        (Duration::from_nanos(1), 0, ms(1)),
        (Duration::MAX, 1, ms(9_900)),
    ] {
        let executor = unlimited().build(client(TAKES).0).unwrap();
        executor.start().unwrap();
        drop(executor.submit(request("call")).await.unwrap());
        pass(ms(100)).await;
        let report = executor.stop(Shutdown::Within(limit)).await;
        assert_eq!((report.completed, report.cancelled), (completed, 1 - completed));
        assert_eq!(report.elapsed, elapsed);
        // With no open call, a stop with a deadline returns at once and reports zeros.
        executor.start().unwrap();
        let report = executor.stop(Shutdown::Within(limit)).await;
        assert_eq!(report, StopReport::default());
    }
}

#[tokio::test(start_paused = true)]
async fn a_stop_that_is_never_polled_stops_nothing() {
    let executor = unlimited().build(client(ms(0)).0).unwrap();
    executor.start().unwrap();
    drop(executor.stop(Shutdown::Immediate));
    assert!(executor.is_running());
    executor.submit(request("call")).await.unwrap().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_stop_whose_future_is_dropped_continues_and_another_one_waits_for_the_rest() {
    let executor = unlimited().concurrency_limit(1).build(client(ms(100)).0).unwrap();
    executor.start().unwrap();
    for _ in 0..5 {
        drop(executor.submit(request("call")).await.unwrap());
    }
    timeout(ms(250), executor.stop(Shutdown::Graceful)).await.unwrap_err();
    assert!(executor.start().unwrap_err().is_already_running());
    assert!(format!("{executor:?}").contains("stopping"));
    let report = executor.stop(Shutdown::Graceful).await;
    assert_eq!((report.completed, report.elapsed), (3, ms(250)));
    executor.start().unwrap();

    // Without a second stop, the executor can be started again as soon as the last call has ended.
    drop(executor.submit(request("call")).await.unwrap());
    timeout(ms(50), executor.stop(Shutdown::Graceful)).await.unwrap_err();
    assert!(executor.start().unwrap_err().is_already_running());
    pass(ms(60)).await;
    executor.start().unwrap();
    executor.submit(request("again")).await.unwrap().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_stop_that_is_polled_after_a_new_start_does_not_stop_it() {
    let executor = unlimited().build(client(ms(100)).0).unwrap();
    executor.start().unwrap();
    drop(executor.submit(request("call")).await.unwrap());
    let mut stop = tokio_test::task::spawn(executor.stop(Shutdown::Graceful));
    assert!(stop.poll().is_pending());
    pass(ms(200)).await;
    // The last call has ended, so the executor has stopped, although the future of the stop was not polled again.
    executor.start().unwrap();
    let call = executor.submit(request("again")).await.unwrap();
    assert!(stop.is_woken() && stop.poll().is_ready());
    assert!(executor.is_running());
    call.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn dropping_a_clone_affects_no_call() {
    let mut executor = unlimited().build(client(ms(100)).0).unwrap();
    executor.start().unwrap();
    let mut clone = executor.clone();
    // The clone is made ready, makes two calls, and is made ready again. Dropping it must cancel neither call.
    clone.ready().await.unwrap();
    let by_clone = clone.call(request("by the clone"));
    let submitted = clone.submit(request("by the clone")).await.unwrap();
    clone.ready().await.unwrap();
    drop(clone);
    by_clone.await.unwrap();
    submitted.await.unwrap();
    executor.ready().await.unwrap().call(request("call")).await.unwrap();
    assert_eq!(executor.stop(Shutdown::Immediate).await.cancelled, 0);
}

#[tokio::test(start_paused = true)]
async fn a_clone_that_was_ready_before_a_stop_returns_an_error_when_it_is_called() {
    let executor = unlimited().build(client(ms(0)).0).unwrap();
    executor.start().unwrap();
    let mut clone = executor.clone();
    clone.ready().await.unwrap();
    executor.stop(Shutdown::Graceful).await;
    let call = clone.call(request("late"));
    assert!(call.event().is_none());
    assert!(call.await.unwrap_err().is_not_running());
    assert!(clone.ready().await.unwrap_err().is_not_running());
    let refused = executor.try_submit(request("late")).unwrap_err();
    assert!(matches!(refused, TrySubmitError::Other(error) if error.is_not_running()));
    assert_eq!(executor.monitor().totals().opened, 0);
}

// --- Stops from inside a call ---

type SelfStopping = Executor<Closure<StopReport>, StopReport>;

/// Starts an executor for calls that are closures, which may hold a clone of the executor.
fn for_closures() -> SelfStopping {
    let executor = unlimited().build_for_closures().unwrap();
    executor.start().unwrap();
    executor
}

#[tokio::test(start_paused = true)]
async fn the_last_clone_can_be_dropped_by_a_call_of_the_executor() {
    let executor = for_closures();
    let monitor = executor.monitor();
    let last = Mutex::new(Some(executor.clone()));
    let call = Call::new(move || {
        let last: Option<SelfStopping> = last.lock().unwrap().take();
        async move {
            time::sleep(ms(10)).await;
            drop(last);
            pending::<Result<(u16, StopReport), BoxError>>().await
        }
    });
    let call = executor.submit(call).await.unwrap();
    drop(executor);
    let error = timeout(HANG, call).await.expect("no hang").unwrap_err();
    assert!(error.is_cancelled());
    assert_eq!(monitor.totals().cancelled, 1);
}

#[tokio::test(start_paused = true)]
async fn a_call_that_stops_its_executor_does_not_wait_for_itself() {
    for how in [
        Shutdown::Graceful,
        Shutdown::Within(ms(500)),
        Shutdown::SentWithin(ms(500)),
        Shutdown::Immediate,
    ] {
        let executor = unlimited()
            .concurrency_limit(2)
            .build_for_closures::<StopReport>()
            .unwrap();
        executor.start().unwrap();
        let stops = |executor: SelfStopping| {
            Call::new(move || {
                let executor = executor.clone();
                async move {
                    time::sleep(ms(100)).await;
                    let report = executor.stop(how).await;
                    time::sleep(ms(100)).await;
                    Ok::<_, BoxError>((200, report))
                }
            })
        };
        // Submits two calls that stop the executor while they run, and a third call that is queued behind them.
        let mut calls = Vec::new();
        for _ in 0..2 {
            calls.push(executor.submit(stops(executor.clone())).await.unwrap());
        }
        let fine = || async { Ok::<_, BoxError>((200, StopReport::default())) };
        calls.push(executor.submit(Call::new(fine)).await.unwrap());
        let began = Instant::now();
        let mut results = Vec::new();
        for call in calls {
            results.push(timeout(HANG, call).await.expect("no hang"));
        }
        if how == Shutdown::Graceful {
            for result in &results[..2] {
                let report = result.as_ref().unwrap().body();
                assert_eq!((report.completed, report.left, report.elapsed), (0, 3, ms(0)));
            }
            assert!(results[2].is_ok());
            assert_eq!(began.elapsed(), ms(200));
        } else {
            assert!(results.into_iter().all(|result| result.unwrap_err().is_cancelled()));
            assert_eq!(
                began.elapsed(),
                if how == Shutdown::Immediate { ms(100) } else { ms(600) }
            );
        }
        // A stop that does not come from a call of the executor waits until the last call has ended. Then the executor
        // can start again.
        assert_eq!(executor.stop(Shutdown::Graceful).await.left, 0);
        assert!(!executor.is_running());
        executor.start().unwrap();
        assert_eq!(executor.monitor().totals().open(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_that_stops_another_executor_waits_for_it() {
    let other = unlimited().build(client(ms(1_000)).0).unwrap();
    other.start().unwrap();
    drop(other.submit(request("call")).await.unwrap());
    let executor = for_closures();
    let call = Call::new(move || {
        let other = other.clone();
        async move { Ok::<_, BoxError>((200, other.stop(Shutdown::Graceful).await)) }
    });
    let response = executor.submit(call).await.unwrap().await.unwrap();
    assert_eq!((response.body().completed, response.body().left), (1, 0));
    assert_eq!(response.body().elapsed, ms(1_000));
}

// --- Runtimes ---

#[test]
fn an_executor_outlives_its_runtime_and_starts_again_in_another() {
    let executor = unlimited().build(client(TAKES).0).unwrap();
    for round in 1..=3 {
        let runtime = paused_runtime();
        let [call] = runtime.block_on(async {
            executor.start().unwrap();
            let call = executor.submit(request("call")).await.unwrap();
            settle().await;
            [call]
        });
        assert!(executor.is_running());
        drop(runtime);
        assert!(!executor.is_running());
        assert!(block_on(executor.submit(request("late"))).unwrap_err().is_not_running());
        assert!(block_on(call).unwrap_err().is_cancelled());
        assert_eq!(executor.monitor().totals().cancelled, round);
        assert!(
            executor
                .start()
                .unwrap_err()
                .to_string()
                .contains("inside a Tokio runtime")
        );
    }
    // The runtimes of the executor are gone with all their calls, so a stop has nothing to wait for, and needs no
    // runtime.
    assert_eq!(block_on(executor.stop(Shutdown::Graceful)).cancelled, 0);
    assert_eq!(executor.monitor().in_flight(), 0);
}

#[test]
fn a_runtime_outlives_its_executor() {
    let runtime = paused_runtime();
    let [call] = runtime.block_on(async {
        let executor = unlimited().build(client(TAKES).0).unwrap();
        executor.start().unwrap();
        [executor.submit(request("call")).await.unwrap()]
    });
    assert!(runtime.block_on(call).unwrap_err().is_cancelled());
    runtime.block_on(settle());
    // The worker tasks of the executor have ended, so the runtime has no tasks left.
    assert_eq!(runtime.metrics().num_alive_tasks(), 0);
}

#[test]
fn shutting_a_runtime_down_ends_stops_and_calls_that_wait_in_others() {
    within_a_minute(|| {
        let home = threaded_runtime();
        let client = service_fn(async |_: Request<&'static str>| pending::<Result<Response<()>, BoxError>>().await);
        let executor = unlimited()
            .queue_capacity(1)
            .concurrency_limit(1)
            .build(client)
            .unwrap();
        let calls = home.block_on(async {
            executor.start().unwrap();
            let first = executor.submit(request("at the client")).await.unwrap();
            while executor.monitor().calling() == 0 {
                tokio::task::yield_now().await;
            }
            [first, executor.submit(request("queued")).await.unwrap()]
        });
        let entered = Arc::new(Barrier::new(3));
        let waits = thread::spawn({
            let (executor, entered) = (executor.clone(), entered.clone());
            move || {
                let mut submit = Box::pin(executor.submit(request("without a place")));
                let mut cx = Context::from_waker(Waker::noop());
                assert!(submit.as_mut().poll(&mut cx).is_pending());
                entered.wait();
                block_on(submit).map(drop)
            }
        });
        let stops = thread::spawn({
            let (executor, entered) = (executor.clone(), entered.clone());
            move || {
                entered.wait();
                paused_runtime().block_on(executor.stop(Shutdown::Graceful))
            }
        });
        entered.wait();
        home.shutdown_background();
        assert!(waits.join().unwrap().unwrap_err().is_closed());
        // The stop cancels at most the three calls. It reports fewer if some had ended before the stop began.
        let report = stops.join().unwrap();
        assert!(report.completed == 0 && report.cancelled <= 3, "{report:?}");
        for call in calls {
            assert!(block_on(call).unwrap_err().is_cancelled());
        }
        assert_eq!(executor.monitor().totals().cancelled, 3);
    });
}

#[test]
fn a_stop_may_come_from_another_runtime_or_from_none() {
    within_a_minute(|| {
        let home = threaded_runtime();
        for how in [
            Shutdown::Graceful,
            Shutdown::Within(Duration::MAX),
            Shutdown::Within(ms(1)),
            Shutdown::Immediate,
        ] {
            for elsewhere in [true, false] {
                let (allowed, is_stuck) = (
                    Arc::new(tokio::sync::Semaphore::new(0)),
                    matches!(how, Shutdown::Within(limit) if limit == ms(1)),
                );
                let allow = allowed.clone();
                let client = service_fn(move |_: Request<&'static str>| {
                    let allowed = allowed.clone();
                    async move {
                        drop(allowed.acquire().await);
                        Ok::<_, BoxError>(Response::new(()))
                    }
                });
                let executor = unlimited().concurrency_limit(1).build(client).unwrap();
                let calls = home.block_on(async {
                    executor.start().unwrap();
                    [
                        executor.submit(request("call")).await.unwrap(),
                        executor.submit(request("call")).await.unwrap(),
                    ]
                });
                if !is_stuck {
                    allow.add_permits(1);
                }
                let is_within = matches!(how, Shutdown::Within(_));
                let report = match (elsewhere, is_within) {
                    // `Shutdown::Within` needs the timer of a Tokio runtime.
                    (true, _) | (false, true) => {
                        let other = Builder::new_current_thread().enable_all().build().unwrap();
                        other.block_on(executor.stop(how))
                    }
                    (false, false) => block_on(executor.stop(how)),
                };
                let has_response = calls.map(|call| block_on(call).is_ok());
                let totals = executor.monitor().totals();
                assert_eq!((totals.opened, totals.open()), (2, 0));
                assert!(report.completed + report.cancelled <= 2);
                match how {
                    Shutdown::Graceful => assert_eq!(has_response, [true, true]),
                    Shutdown::Within(_) if !is_stuck => assert_eq!(has_response, [true, true]),
                    Shutdown::Within(_) => assert_eq!((has_response, report.cancelled), ([false, false], 2)),
                    Shutdown::Immediate | Shutdown::SentWithin(_) => {}
                }
            }
        }
    });
}

#[test]
fn a_deadline_without_a_timer_panics_before_anything_is_stopped() {
    let runtime = paused_runtime();
    let executor = unlimited().build(client(ms(0)).0).unwrap();
    runtime.block_on(async { executor.start().unwrap() });
    let stop = || block_on(executor.stop(Shutdown::Within(ms(1))));
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(stop)).unwrap_err();
    assert!(executor.is_running());
    let result = runtime.block_on(async { executor.submit(request("call")).await.unwrap().await });
    assert!(result.is_ok());
}

// --- Races ---

#[test]
fn ten_thousand_stops_that_race_with_submits_each_account_for_every_call() {
    const ROUNDS: usize = 10_000;
    type Numbered = Executor<usize, usize>;

    /// Counts the calls that one thread makes in one round, by their result.
    #[derive(Clone, Copy, Debug, Default)]
    struct Counts {
        completed: u64,
        cancelled: u64,
        refused: u64,
        closed: u64,
        full: u64,
    }

    fn count_submit(call: Result<CallHandle<usize, usize>, Error>, number: usize, counts: &mut Counts) {
        let call = match call {
            Ok(call) => call,
            Err(error) if error.is_not_running() => return counts.refused += 1,
            Err(error) if error.is_closed() => return counts.closed += 1,
            Err(error) => panic!("{error:?}"),
        };
        let event = call.event().clone();
        match block_on(call) {
            Ok(response) => {
                assert_eq!((*response.body(), event.status()), (number, RequestStatus::Completed));
                counts.completed += 1;
            }
            Err(error) => {
                assert!(error.is_cancelled(), "{error:?}");
                block_on(event.finished());
                assert_eq!(event.status(), RequestStatus::Cancelled);
                counts.cancelled += 1;
            }
        }
    }

    fn count_try_submit(
        call: Result<CallHandle<usize, usize>, TrySubmitError<usize>>,
        number: usize,
        counts: &mut Counts,
    ) {
        match call {
            Ok(call) => count_submit(Ok(call), number, counts),
            Err(TrySubmitError::Refused(refused)) => {
                if refused.is_full() {
                    counts.full += 1;
                } else {
                    assert!(refused.is_closed());
                    counts.refused += 1;
                }
                assert_eq!(refused.into_request().into_body(), number, "the refused request");
            }
            Err(TrySubmitError::Other(error)) => count_submit(Err(error), number, counts),
            Err(other) => panic!("{other:?}"),
        }
    }

    within_a_minute(|| {
        let home = threaded_runtime();
        let client = service_fn(async |req: Request<usize>| {
            if req.body().is_multiple_of(3) {
                tokio::task::yield_now().await;
            }
            Ok::<_, BoxError>(Response::new(req.into_body()))
        });
        let executor: Numbered = unlimited().queue_capacity(2).build(client).unwrap();
        let (begin, end) = (Arc::new(Barrier::new(3)), Arc::new(Barrier::new(3)));
        let submitters: Vec<_> = (0..2)
            .map(|thread| {
                let (executor, begin, end) = (executor.clone(), begin.clone(), end.clone());
                thread::spawn(move || {
                    let mut all = Vec::with_capacity(ROUNDS);
                    for round in 0..ROUNDS {
                        let mut counts = Counts::default();
                        begin.wait();
                        for number in 0..3 {
                            let req = Request::new(number);
                            if (thread + number) % 2 == 0 {
                                count_submit(block_on(executor.submit(req)), number, &mut counts);
                            } else {
                                count_try_submit(executor.try_submit(req), number, &mut counts);
                            }
                        }
                        end.wait();
                        all.push(counts);
                        // Waits until the main thread has read the totals of this round.
                        if round + 1 < ROUNDS {
                            end.wait();
                        }
                    }
                    all
                })
            })
            .collect();
        let mut rounds = Vec::with_capacity(ROUNDS);
        for round in 0..ROUNDS {
            home.block_on(async { executor.start() }).unwrap();
            let before = executor.monitor().totals();
            begin.wait();
            for _ in 0..round % 64 * 20 {
                std::hint::spin_loop();
            }
            let how = match round % 3 {
                0 => Shutdown::Graceful,
                1 => Shutdown::Immediate,
                _ => Shutdown::Within(Duration::ZERO),
            };
            let report = home.block_on(executor.stop(how));
            end.wait();
            let after = executor.monitor().totals();
            assert_eq!(after.open(), 0, "round {round}");
            assert_eq!(
                (executor.monitor().in_flight(), executor.monitor().queue_depth()),
                (0, 0)
            );
            assert!(!executor.is_running());
            rounds.push((how, before, after, report));
            if round + 1 < ROUNDS {
                end.wait();
            }
        }
        let counts: Vec<_> = submitters.into_iter().map(|thread| thread.join().unwrap()).collect();
        let mut sum = Counts::default();
        for (round, (how, before, after, report)) in rounds.into_iter().enumerate() {
            let (a, b) = (counts[0][round], counts[1][round]);
            let case = format!("round {round}: {how:?} {a:?} {b:?} {report:?}");
            let (completed, cancelled) = (a.completed + b.completed, a.cancelled + b.cancelled);
            let (refused, closed) = (a.refused + b.refused, a.closed + b.closed);
            assert_eq!(completed + cancelled + refused + closed + a.full + b.full, 6, "{case}");
            assert_eq!(after.completed - before.completed, completed, "{case}");
            // A call that `try_submit` refuses has no event, unless the stop comes after the call got its place in the
            // queue and before it was accepted. Such a call is refused and has a cancelled event.
            let ended = after.cancelled - before.cancelled;
            assert!(
                (cancelled + closed..=cancelled + closed + refused).contains(&ended),
                "{case}"
            );
            assert_eq!(after.failed, before.failed, "{case}");
            assert!(
                report.completed <= completed && report.cancelled <= ended && report.failed == 0,
                "{case}"
            );
            if how == Shutdown::Graceful {
                assert_eq!(cancelled, 0, "{case}");
            }
            sum.completed += completed;
            sum.cancelled += cancelled;
            sum.refused += refused;
            sum.closed += closed;
        }
        // Both orders of the race occurred: in some rounds calls completed before the stop, in others the stop refused
        // them.
        assert!(sum.completed > 0 && sum.refused > 0, "{sum:?}");
    });
}

#[test]
fn starts_and_stops_that_race_leave_the_executor_either_running_or_stopped() {
    const STARTS: usize = 1_000;
    within_a_minute(|| {
        let home = threaded_runtime();
        let client = service_fn(async |_: Request<()>| Ok::<_, BoxError>(Response::new(())));
        let executor = unlimited().build(client).unwrap();
        let started = Arc::new(AtomicUsize::new(0));
        let are_starting = Arc::new(AtomicBool::new(true));
        let starting: Vec<_> = (0..2)
            .map(|_| {
                let (executor, started, home) = (executor.clone(), started.clone(), home.handle().clone());
                thread::spawn(move || {
                    // A fixed number of attempts can be over while one stop is still in progress.
                    while started.load(Ordering::Relaxed) < STARTS {
                        let _home = home.enter();
                        match executor.start() {
                            Ok(()) => {
                                started.fetch_add(1, Ordering::Relaxed);
                            }
                            Err(error) => assert!(error.is_already_running(), "{error:?}"),
                        }
                        if let Ok(call) = executor.try_submit(Request::new(())) {
                            // Checks that the call does not hang; it may complete or be cancelled.
                            let _ = block_on(call);
                        }
                    }
                })
            })
            .collect();
        // The stopping threads stop the executor again and again until the starting threads have ended. A fixed number
        // of stops could be over before the first start.
        let stopping: Vec<_> = (0..2)
            .map(|_| {
                let (executor, are_starting) = (executor.clone(), are_starting.clone());
                thread::spawn(move || {
                    let hows = [Shutdown::Graceful, Shutdown::Immediate].into_iter().cycle();
                    for how in hows.take_while(|_| are_starting.load(Ordering::Relaxed)) {
                        block_on(executor.stop(how));
                    }
                })
            })
            .collect();
        for thread in starting {
            thread.join().unwrap();
        }
        are_starting.store(false, Ordering::Relaxed);
        for thread in stopping {
            thread.join().unwrap();
        }
        block_on(executor.stop(Shutdown::Graceful));
        assert!(!executor.is_running());
        assert_eq!(executor.monitor().totals().open(), 0);
        assert!(started.load(Ordering::Relaxed) >= STARTS);
        // When four threads start the executor at once, exactly one of the starts succeeds.
        for _ in 0..200 {
            let starts: Vec<_> = (0..4)
                .map(|_| {
                    let (executor, home) = (executor.clone(), home.handle().clone());
                    thread::spawn(move || {
                        let _home = home.enter();
                        executor.start().is_ok()
                    })
                })
                .collect();
            let first = starts.into_iter().map(|start| start.join().unwrap());
            assert_eq!(first.filter(|is_first| *is_first).count(), 1);
            block_on(executor.stop(Shutdown::Graceful));
        }
    });
}

#[tokio::test(start_paused = true)]
async fn a_call_that_waits_for_a_place_during_a_stop_is_not_accepted_after_the_next_start() {
    let executor = unlimited()
        .queue_capacity(1)
        .concurrency_limit(1)
        .build(client(ms(100)).0)
        .unwrap();
    executor.start().unwrap();
    drop(executor.submit(request("running")).await.unwrap());
    settle().await;
    drop(executor.submit(request("queued")).await.unwrap());
    let mut waits = tokio_test::task::spawn(executor.submit(request("waits")));
    assert!(waits.poll().is_pending());
    executor.stop(Shutdown::Immediate).await;
    executor.start().unwrap();
    let began = Instant::now();
    assert!(waits.is_woken());
    assert!(waits.await.unwrap_err().is_closed());
    assert_eq!(began.elapsed(), ms(0));
    assert_eq!(executor.monitor().totals().cancelled, 3);
}

#[tokio::test(start_paused = true)]
async fn a_client_that_panics_when_it_is_dropped_blocks_no_stop() {
    #[derive(Clone)]
    struct PanicsOnDrop(Arc<AtomicBool>);
    impl Drop for PanicsOnDrop {
        fn drop(&mut self) {
            if self.0.load(Ordering::SeqCst) && !thread::panicking() {
                panic!("dropped");
            }
        }
    }
    for how in [Shutdown::Graceful, Shutdown::Immediate] {
        for workers in [1, 3] {
            let armed = Arc::new(AtomicBool::new(false));
            let panics = PanicsOnDrop(armed.clone());
            let client = service_fn(move |_: Request<&'static str>| {
                let _panics = &panics;
                async {
                    time::sleep(ms(100)).await;
                    Ok::<_, BoxError>(Response::new(()))
                }
            });
            let executor = unlimited().workers(workers).build(client).unwrap();
            executor.start().unwrap();
            let calls = [
                executor.submit(request("a")).await.unwrap(),
                executor.submit(request("b")).await.unwrap(),
            ];
            settle().await;
            armed.store(true, Ordering::SeqCst);
            let report = timeout(HANG, executor.stop(how)).await.expect("no hang");
            let completed = if how == Shutdown::Graceful { 2 } else { 0 };
            assert_eq!(
                (report.completed, report.cancelled),
                (completed, 2 - completed),
                "{report:?}"
            );
            for call in calls {
                assert_eq!(call.await.is_ok(), how == Shutdown::Graceful);
            }
            armed.store(false, Ordering::SeqCst);
            executor.start().unwrap();
        }
    }
}
