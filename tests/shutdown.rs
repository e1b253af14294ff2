//! Every way to end, for calls in every state: what becomes of the call, what its caller hears, and what is reported.

mod support;

use http::{Request, Response};
use std::{
    future::{Future, pending},
    pin::{Pin, pin},
    sync::{
        Arc, Barrier, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc,
    },
    task::{Context, Poll, Wake, Waker},
    thread,
    time::Duration,
};
use support::{client, ms, pass, request, settle};
use tokio::{
    runtime::{Builder, Runtime},
    task::JoinHandle,
    time::{self, Instant, timeout},
};
use tower::{BoxError, Service, ServiceExt, layer::layer_fn, service_fn};
use tower_outbound::{
    Call, CallHandle, EventHandle, Executor, ExecutorBuilder, Limits, Rate, RequestStatus, Shutdown,
    error::Error,
    executor::{Closure, ResponseFuture, StopReport, TrySubmitError},
};

type Plain = Executor<&'static str, &'static str>;

/// Far more than it takes; only there so that a hang is a failure.
const HANG: Duration = Duration::from_secs(60);

fn unlimited() -> ExecutorBuilder {
    Executor::builder().limits(Limits::new())
}

fn paused_runtime() -> Runtime {
    Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .unwrap()
}

/// Runs `work` on a thread of its own, and fails if it does not come to an end.
fn within_a_minute<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, told) = mpsc::channel();
    let worker = thread::spawn(move || {
        let result = work();
        let _ = done.send(());
        result
    });
    if told.recv_timeout(HANG) == Err(mpsc::RecvTimeoutError::Timeout) {
        panic!("a hang");
    }
    worker.join().unwrap()
}

/// Polls a future without any runtime.
fn block_on<F: Future>(future: F) -> F::Output {
    struct Unpark(thread::Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return output;
        }
        thread::park();
    }
}

// --- the matrix ---

/// Where the call is when the end comes.
#[derive(Clone, Copy, Debug, PartialEq)]
enum At {
    /// It waits for a place in the queue.
    Door,
    Queue,
    /// Past the queue, it waits for a permit.
    Permit,
    /// It has its permit, and waits for the rate.
    Rate,
    Wire,
    /// It is over, and nobody has fetched the response.
    Done,
    /// On the wire, and nobody waits for it.
    Detached,
}

/// What the end is.
#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    Graceful,
    DeadlineFarAway,
    DeadlinePasses,
    Immediate,
    /// Graceful, then immediate while the first one waits.
    Impatient,
    /// A graceful stop that nobody waits for any more.
    GivenUp,
    /// A stop within a time that nobody waits for any more: nothing is cancelled.
    DeadlineGivenUp,
    LastCloneDropped,
    RuntimeEnds,
}

/// What the caller hears.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Heard {
    Response,
    Closed,
    Cancelled,
    /// There is no caller.
    Nothing,
}

const EVERY_STATE: [At; 7] = [
    At::Door,
    At::Queue,
    At::Permit,
    At::Rate,
    At::Wire,
    At::Done,
    At::Detached,
];

const EVERY_END: [End; 9] = [
    End::Graceful,
    End::DeadlineFarAway,
    End::DeadlinePasses,
    End::Immediate,
    End::Impatient,
    End::GivenUp,
    End::DeadlineGivenUp,
    End::LastCloneDropped,
    End::RuntimeEnds,
];

/// A call on the wire takes so long.
const TAKES: Duration = Duration::from_secs(10);

impl At {
    /// When the end comes, after the first call was submitted.
    fn reached(self) -> Duration {
        match self {
            Self::Done => TAKES + ms(100),
            _ => ms(100),
        }
    }

    /// Other calls that had to be there to bring it into this state.
    fn others(self) -> u64 {
        match self {
            Self::Door => 2,
            Self::Queue | Self::Permit | Self::Rate => 1,
            Self::Wire | Self::Done | Self::Detached => 0,
        }
    }

    /// When everything is over, if it is let.
    fn over(self) -> Duration {
        match self {
            Self::Door | Self::Queue => 2 * TAKES,
            Self::Permit => ms(1) + 2 * TAKES,
            Self::Rate => Duration::from_secs(60) + TAKES,
            Self::Wire | Self::Done | Self::Detached => TAKES,
        }
    }

    fn status(self) -> RequestStatus {
        match self {
            Self::Door => RequestStatus::Pending,
            Self::Queue => RequestStatus::Queued,
            Self::Permit | Self::Rate => RequestStatus::Processing,
            Self::Wire | Self::Detached => RequestStatus::Calling,
            Self::Done => RequestStatus::Completed,
        }
    }
}

impl End {
    /// Whether it lets the accepted calls end by themselves.
    fn is_gentle(self) -> bool {
        matches!(
            self,
            Self::Graceful | Self::DeadlineFarAway | Self::GivenUp | Self::DeadlineGivenUp
        )
    }

    /// How long it lets them run if it is not gentle.
    fn patience(self) -> Duration {
        match self {
            Self::DeadlinePasses | Self::Impatient => ms(1_000),
            _ => ms(0),
        }
    }
}

/// The whole promise.
fn promised(at: At, end: End) -> (RequestStatus, Heard) {
    match (at, end.is_gentle()) {
        (At::Door, _) => (RequestStatus::Cancelled, Heard::Closed),
        (At::Done, _) => (RequestStatus::Completed, Heard::Response),
        (At::Detached, true) => (RequestStatus::Completed, Heard::Nothing),
        (At::Detached, false) => (RequestStatus::Cancelled, Heard::Nothing),
        (_, true) => (RequestStatus::Completed, Heard::Response),
        (_, false) => (RequestStatus::Cancelled, Heard::Cancelled),
    }
}

/// Lets a millisecond pass between being called and calling on, so that somebody else can take the permit.
#[derive(Clone)]
struct Late<S>(S);

impl<S: Service<R>, R> Service<R> for Late<S>
where
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, req: R) -> Self::Future {
        let future = self.0.call(req);
        Box::pin(async move {
            time::sleep(ms(1)).await;
            future.await
        })
    }
}

/// The call that is watched.
enum Subject {
    Submitted(CallHandle<&'static str, &'static str>),
    AtTheDoor(ResponseFuture<&'static str, &'static str>),
    /// The same, with a task of the runtime that waits for it.
    Awaited(JoinHandle<Result<Response<&'static str>, Error>>),
    Detached,
}

impl Subject {
    async fn hears(self) -> Heard {
        let result = match self {
            Self::Submitted(call) => call.await,
            Self::AtTheDoor(call) => call.await,
            Self::Awaited(task) => task.await.unwrap(),
            Self::Detached => return Heard::Nothing,
        };
        match result {
            Ok(_) => Heard::Response,
            Err(error) if error.is_closed() => Heard::Closed,
            Err(error) if error.is_cancelled() => Heard::Cancelled,
            Err(error) => panic!("{error}"),
        }
    }
}

/// An executor with a call in this state.
async fn bring(at: At) -> (Plain, Subject, EventHandle) {
    let (client, _) = client(TAKES);
    let builder = match at {
        At::Door => unlimited().queue_capacity(1).concurrency_limit(1),
        At::Queue | At::Permit => unlimited().concurrency_limit(1),
        At::Rate => Executor::builder().requests(Rate::per_minute(1)),
        At::Wire | At::Done | At::Detached => unlimited(),
    };
    let mut executor = match at {
        At::Permit => builder.layer(layer_fn(Late)).build(client).unwrap(),
        _ => builder.build(client).unwrap(),
    };
    executor.start().unwrap();
    for _ in 0..at.others() {
        drop(executor.submit(request("other")).await.unwrap());
        settle().await;
    }
    let (subject, event) = match at {
        At::Door => {
            let call = executor.call(request("subject"));
            let event = call.event().unwrap().clone();
            (Subject::AtTheDoor(call), event)
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
    assert_eq!(event.status(), at.status(), "{at:?}");
    // A handle of the queue that is kept ready must not keep anything alive.
    (executor.clone(), subject, event)
}

/// Ends it, and returns the report of who waited for the end last, if there is one.
async fn ends(executor: Plain, end: End) -> Option<StopReport> {
    let far = Duration::from_secs(100_000);
    match end {
        End::Graceful => Some(executor.stop(Shutdown::Graceful).await),
        End::DeadlineFarAway => Some(executor.stop(Shutdown::Within(far)).await),
        End::DeadlinePasses => Some(executor.stop(Shutdown::Within(end.patience())).await),
        End::Immediate => Some(executor.stop(Shutdown::Immediate).await),
        End::Impatient => {
            let gentle = executor.stop(Shutdown::Graceful);
            let harder = async {
                time::sleep(end.patience()).await;
                executor.stop(Shutdown::Immediate).await
            };
            let (gentle, harder) = tokio::join!(gentle, harder);
            assert_eq!(harder.elapsed, ms(0));
            // Both were there for what ended after the second began.
            assert_eq!((harder.completed, harder.failed), (gentle.completed, gentle.failed));
            Some(gentle)
        }
        End::GivenUp => {
            timeout(ms(500), executor.stop(Shutdown::Graceful)).await.ok();
            settle().await;
            // Nobody takes that back.
            assert!(!executor.is_running());
            time::sleep(far).await;
            None
        }
        End::DeadlineGivenUp => {
            timeout(ms(500), executor.stop(Shutdown::Within(ms(1_000)))).await.ok();
            time::sleep(far).await;
            None
        }
        End::LastCloneDropped => {
            drop(executor);
            settle().await;
            None
        }
        End::RuntimeEnds => unreachable!("it is not there to run this"),
    }
}

#[test]
fn each_way_to_end_does_to_a_call_in_each_state_what_is_promised() {
    let mut cases = 0;
    for at in EVERY_STATE {
        for end in EVERY_END {
            let case = format!("{at:?}, {end:?}");
            let (runtime, afterwards) = (paused_runtime(), paused_runtime());
            let (executor, mut subject, event) = runtime.block_on(bring(at));
            let monitor = executor.monitor();
            let (status, heard) = promised(at, end);
            let told = if end == End::RuntimeEnds {
                // Who waits does so from elsewhere.
                if let Subject::AtTheDoor(call) = &mut subject {
                    let mut cx = Context::from_waker(Waker::noop());
                    assert!(Pin::new(call).poll(&mut cx).is_pending());
                }
                drop(runtime);
                let told = afterwards.block_on(async { timeout(HANG, subject.hears()).await });
                assert!(!executor.is_running(), "{case}");
                afterwards.block_on(async {
                    let late = executor.submit(request("late")).await;
                    assert!(late.unwrap_err().is_not_running(), "{case}");
                    let report = timeout(HANG, executor.stop(Shutdown::Graceful)).await.expect(&case);
                    assert_eq!((report.completed, report.failed, report.cancelled), (0, 0, 0), "{case}");
                });
                told
            } else {
                runtime.block_on(async {
                    // Who waits at the door is somebody's task.
                    if let Subject::AtTheDoor(call) = subject {
                        subject = Subject::Awaited(tokio::spawn(call));
                        settle().await;
                    }
                    let report = timeout(1_000_000 * HANG, ends(executor, end)).await.expect(&case);
                    if let Some(report) = report {
                        let (there, done) = match at {
                            At::Done => (0, 0),
                            _ => (at.others() + 1, at.others() + u64::from(at != At::Door)),
                        };
                        let completed = if end.is_gentle() { done } else { 0 };
                        let expected = (completed, 0, there - completed);
                        assert_eq!((report.completed, report.failed, report.cancelled), expected, "{case}");
                        let elapsed = match (at, end.is_gentle()) {
                            (At::Done, _) => ms(0),
                            (_, true) => at.over() - at.reached(),
                            (_, false) => end.patience(),
                        };
                        // When all is over, even the impatient one need not wait.
                        let waited = if (at, end) == (At::Done, End::Impatient) {
                            ms(0)
                        } else {
                            elapsed
                        };
                        assert_eq!(report.elapsed, waited, "{case}");
                    }
                    timeout(HANG, subject.hears()).await
                })
            };
            assert_eq!(told.expect(&case), heard, "{case}");
            assert_eq!(event.status(), status, "{case}");
            let totals = monitor.totals();
            assert_eq!((totals.opened, totals.open()), (at.others() + 1, 0), "{case}");
            let left = (monitor.queue_depth(), monitor.in_flight(), monitor.calling());
            assert_eq!(left, (0, 0, 0), "{case}");
            cases += 1;
        }
    }
    assert_eq!(cases, 63);
}

// --- stops that meet ---

#[tokio::test(start_paused = true)]
async fn any_number_of_stops_at_once_all_return_and_report_the_same() {
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
async fn of_two_deadlines_the_earlier_one_counts() {
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
async fn a_deadline_of_nothing_cancels_and_one_of_forever_waits() {
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
        // And with nothing there.
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
async fn a_stop_given_up_half_way_goes_on_and_another_one_waits_for_the_rest() {
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

    // Nobody waits at all: then it can be started as soon as the last call is over.
    drop(executor.submit(request("call")).await.unwrap());
    timeout(ms(50), executor.stop(Shutdown::Graceful)).await.unwrap_err();
    assert!(executor.start().unwrap_err().is_already_running());
    pass(ms(60)).await;
    executor.start().unwrap();
    executor.submit(request("again")).await.unwrap().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_late_answer_to_a_stop_leaves_a_new_start_alone() {
    let executor = unlimited().build(client(ms(100)).0).unwrap();
    executor.start().unwrap();
    drop(executor.submit(request("call")).await.unwrap());
    let mut stop = tokio_test::task::spawn(executor.stop(Shutdown::Graceful));
    assert!(stop.poll().is_pending());
    pass(ms(200)).await;
    // It is over, and whoever waited for that has not looked yet.
    executor.start().unwrap();
    let call = executor.submit(request("again")).await.unwrap();
    assert!(stop.is_woken() && stop.poll().is_ready());
    assert!(executor.is_running());
    call.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_dropped_clone_takes_nothing_with_it() {
    let mut executor = unlimited().build(client(ms(100)).0).unwrap();
    executor.start().unwrap();
    let mut clone = executor.clone();
    // One that was made ready, one that has called, and one that waits.
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
async fn a_clone_made_ready_before_a_stop_is_told_when_it_calls() {
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

// --- from inside ---

type Known = Executor<Closure<StopReport>, StopReport>;

/// An executor for calls that know it.
fn for_closures() -> Known {
    let executor = unlimited().build_for_closures().unwrap();
    executor.start().unwrap();
    executor
}

#[tokio::test(start_paused = true)]
async fn the_last_clone_can_be_dropped_by_a_call_of_its_own() {
    let executor = for_closures();
    let monitor = executor.monitor();
    let last = Mutex::new(Some(executor.clone()));
    let call = Call::new(move || {
        let last: Option<Known> = last.lock().unwrap().take();
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
async fn a_call_that_stops_its_own_executor_does_not_wait_for_itself() {
    for how in [Shutdown::Graceful, Shutdown::Within(ms(500)), Shutdown::Immediate] {
        let executor = unlimited()
            .concurrency_limit(2)
            .build_for_closures::<StopReport>()
            .unwrap();
        executor.start().unwrap();
        let stops = |executor: Known| {
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
        // Two that run, each of which stops it, and one that is queued.
        let mut calls = Vec::new();
        for _ in 0..2 {
            calls.push(executor.submit(stops(executor.clone())).await.unwrap());
        }
        let fine = || async { Ok::<_, BoxError>((200, StopReport::default())) };
        calls.push(executor.submit(Call::new(fine)).await.unwrap());
        let began = Instant::now();
        let mut answers = Vec::new();
        for call in calls {
            answers.push(timeout(HANG, call).await.expect("no hang"));
        }
        if how == Shutdown::Graceful {
            for answer in &answers[..2] {
                let report = answer.as_ref().unwrap().body();
                assert_eq!((report.completed, report.left, report.elapsed), (0, 3, ms(0)));
            }
            assert!(answers[2].is_ok());
            assert_eq!(began.elapsed(), ms(200));
        } else {
            assert!(answers.into_iter().all(|answer| answer.unwrap_err().is_cancelled()));
            assert_eq!(
                began.elapsed(),
                if how == Shutdown::Immediate { ms(100) } else { ms(600) }
            );
        }
        // Who waits outside does so until it is over, and it can start again.
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

// --- runtimes ---

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
    // A stop, also without any runtime, has nothing left to do.
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
    // Its workers are gone.
    assert_eq!(runtime.metrics().num_alive_tasks(), 0);
}

#[test]
fn a_runtime_that_ends_while_others_stop_or_wait_for_a_place_tells_them() {
    within_a_minute(|| {
        let home = Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let client = service_fn(async |_: Request<&'static str>| pending::<Result<Response<()>, BoxError>>().await);
        let executor = unlimited()
            .queue_capacity(1)
            .concurrency_limit(1)
            .build(client)
            .unwrap();
        let calls = home.block_on(async {
            executor.start().unwrap();
            let first = executor.submit(request("on the wire")).await.unwrap();
            while executor.monitor().calling() == 0 {
                tokio::task::yield_now().await;
            }
            [first, executor.submit(request("queued")).await.unwrap()]
        });
        let entered = Arc::new(Barrier::new(3));
        let waits = thread::spawn({
            let (executor, entered) = (executor.clone(), entered.clone());
            move || {
                let mut submit = Box::pin(executor.submit(request("at the door")));
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
        // As many as were left when it began.
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
        let home = Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        for how in [
            Shutdown::Graceful,
            Shutdown::Within(Duration::MAX),
            Shutdown::Within(ms(1)),
            Shutdown::Immediate,
        ] {
            for elsewhere in [true, false] {
                let (go, wait) = (
                    Arc::new(tokio::sync::Semaphore::new(0)),
                    matches!(how, Shutdown::Within(limit) if limit == ms(1)),
                );
                let opens = go.clone();
                let client = service_fn(move |_: Request<&'static str>| {
                    let go = go.clone();
                    async move {
                        drop(go.acquire().await);
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
                if !wait {
                    opens.add_permits(1);
                }
                let is_within = matches!(how, Shutdown::Within(_));
                let report = match (elsewhere, is_within) {
                    // That one needs a timer.
                    (true, _) | (false, true) => {
                        let other = Builder::new_current_thread().enable_all().build().unwrap();
                        other.block_on(executor.stop(how))
                    }
                    (false, false) => block_on(executor.stop(how)),
                };
                let answered = calls.map(|call| block_on(call).is_ok());
                let totals = executor.monitor().totals();
                assert_eq!((totals.opened, totals.open()), (2, 0));
                assert!(report.completed + report.cancelled <= 2);
                match how {
                    Shutdown::Graceful => assert_eq!(answered, [true, true]),
                    Shutdown::Within(_) if !wait => assert_eq!(answered, [true, true]),
                    Shutdown::Within(_) => assert_eq!((answered, report.cancelled), ([false, false], 2)),
                    Shutdown::Immediate => {}
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
    let answer = runtime.block_on(async { executor.submit(request("call")).await.unwrap().await });
    assert!(answer.is_ok());
}

// --- races ---

#[test]
fn of_ten_thousand_stops_that_race_with_submits_each_accounts_for_every_call() {
    const ROUNDS: usize = 10_000;
    type Numbered = Executor<usize, usize>;

    /// What was told about the calls of one thread in one round.
    #[derive(Clone, Copy, Debug, Default)]
    struct Told {
        answered: u64,
        cancelled: u64,
        refused: u64,
        closed: u64,
        full: u64,
    }

    fn told_of(call: Result<CallHandle<usize, usize>, Error>, number: usize, told: &mut Told) {
        let call = match call {
            Ok(call) => call,
            Err(error) if error.is_not_running() => return told.refused += 1,
            Err(error) if error.is_closed() => return told.closed += 1,
            Err(error) => panic!("{error:?}"),
        };
        let event = call.event().clone();
        match block_on(call) {
            Ok(response) => {
                assert_eq!((*response.body(), event.status()), (number, RequestStatus::Completed));
                told.answered += 1;
            }
            Err(error) => {
                assert!(error.is_cancelled(), "{error:?}");
                block_on(event.finished());
                assert_eq!(event.status(), RequestStatus::Cancelled);
                told.cancelled += 1;
            }
        }
    }

    fn tried(call: Result<CallHandle<usize, usize>, TrySubmitError<usize>>, number: usize, told: &mut Told) {
        match call {
            Ok(call) => told_of(Ok(call), number, told),
            Err(TrySubmitError::Refused(refused)) => {
                if refused.is_full() {
                    told.full += 1;
                } else {
                    assert!(refused.is_closed());
                    told.refused += 1;
                }
                assert_eq!(refused.into_request().into_body(), number, "the request comes back");
            }
            Err(TrySubmitError::Other(error)) => told_of(Err(error), number, told),
            Err(other) => panic!("{other:?}"),
        }
    }

    within_a_minute(|| {
        let home = Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
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
                        let mut told = Told::default();
                        begin.wait();
                        for number in 0..3 {
                            let req = Request::new(number);
                            if (thread + number) % 2 == 0 {
                                told_of(block_on(executor.submit(req)), number, &mut told);
                            } else {
                                tried(executor.try_submit(req), number, &mut told);
                            }
                        }
                        end.wait();
                        all.push(told);
                        // The numbers are looked at meanwhile.
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
        let told: Vec<_> = submitters.into_iter().map(|thread| thread.join().unwrap()).collect();
        let mut sum = Told::default();
        for (round, (how, before, after, report)) in rounds.into_iter().enumerate() {
            let (a, b) = (told[0][round], told[1][round]);
            let case = format!("round {round}: {how:?} {a:?} {b:?} {report:?}");
            let (answered, cancelled) = (a.answered + b.answered, a.cancelled + b.cancelled);
            let (refused, closed) = (a.refused + b.refused, a.closed + b.closed);
            assert_eq!(answered + cancelled + refused + closed + a.full + b.full, 6, "{case}");
            assert_eq!(after.completed - before.completed, answered, "{case}");
            // One that `try_submit` refuses at the very moment of the stop has an event; before and after it has none.
            let ended = after.cancelled - before.cancelled;
            assert!(
                (cancelled + closed..=cancelled + closed + refused).contains(&ended),
                "{case}"
            );
            assert_eq!(after.failed, before.failed, "{case}");
            assert!(
                report.completed <= answered && report.cancelled <= ended && report.failed == 0,
                "{case}"
            );
            if how == Shutdown::Graceful {
                assert_eq!(cancelled, 0, "{case}");
            }
            sum.answered += answered;
            sum.cancelled += cancelled;
            sum.refused += refused;
            sum.closed += closed;
        }
        // The race was one.
        assert!(sum.answered > 0 && sum.refused > 0, "{sum:?}");
    });
}

#[test]
fn starts_and_stops_that_race_leave_it_running_or_stopped_and_nothing_between() {
    within_a_minute(|| {
        let home = Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let client = service_fn(async |_: Request<()>| Ok::<_, BoxError>(Response::new(())));
        let executor = unlimited().build(client).unwrap();
        let started = Arc::new(AtomicUsize::new(0));
        let threads: Vec<_> = (0..4)
            .map(|thread| {
                let (executor, started, home) = (executor.clone(), started.clone(), home.handle().clone());
                thread::spawn(move || {
                    for round in 0..2_000 {
                        if thread % 2 == 0 {
                            let _home = home.enter();
                            match executor.start() {
                                Ok(()) => {
                                    started.fetch_add(1, Ordering::Relaxed);
                                }
                                Err(error) => assert!(error.is_already_running(), "{error:?}"),
                            }
                            if let Ok(call) = executor.try_submit(Request::new(())) {
                                // Answered or cancelled, and never a hang.
                                let _ = block_on(call);
                            }
                        } else {
                            let how = match round % 2 {
                                0 => Shutdown::Graceful,
                                _ => Shutdown::Immediate,
                            };
                            block_on(executor.stop(how));
                        }
                    }
                })
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
        block_on(executor.stop(Shutdown::Graceful));
        assert!(!executor.is_running());
        assert_eq!(executor.monitor().totals().open(), 0);
        assert!(started.load(Ordering::Relaxed) > 1);
        // And of many starts at once one is the first.
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
async fn who_waits_for_a_place_when_it_is_stopped_is_not_let_in_by_the_next_start() {
    let executor = unlimited()
        .queue_capacity(1)
        .concurrency_limit(1)
        .build(client(ms(100)).0)
        .unwrap();
    executor.start().unwrap();
    drop(executor.submit(request("flies")).await.unwrap());
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
async fn a_client_that_panics_when_it_is_dropped_holds_up_no_stop() {
    #[derive(Clone)]
    struct Grumbles(Arc<AtomicBool>);
    impl Drop for Grumbles {
        fn drop(&mut self) {
            if self.0.load(Ordering::SeqCst) && !thread::panicking() {
                panic!("dropped");
            }
        }
    }
    for how in [Shutdown::Graceful, Shutdown::Immediate] {
        for workers in [1, 3] {
            let armed = Arc::new(AtomicBool::new(false));
            let grumbles = Grumbles(armed.clone());
            let client = service_fn(move |_: Request<&'static str>| {
                let _grumbles = &grumbles;
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
