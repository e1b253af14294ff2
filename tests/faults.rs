//! One fault at a time, at every step of a call. A scenario runs one task per step, and is repeated with the fault
//! after each number of steps. A fault in one call must not affect other calls, and all places in the queue and all
//! permits must be released.
//!
//! The scenario has two permits, a rate of one request per 25 ms, a queue with one place, and a client that responds
//! after 40 ms. Three calls are made before the watched call, and two after it. The first four calls, with the times in
//! milliseconds at which they wait for the rate and are at the client:
//!
//! ```text
//! first     client 0-40
//! second    rate 0-25, client 25-65
//! third     queued until the first has ended, rate 40-50, client 50-90
//! watched   no place until 40, queued until 65, rate 65-75, client 75-115
//! ```

mod support;

use futures_util::FutureExt;
use http::{Request, Response, StatusCode};
use std::{
    collections::BTreeMap,
    fmt,
    future::{Future, pending},
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    task::{Context, Poll},
    thread,
    time::Duration,
};
use support::{ms, threaded_runtime};
use tokio::{
    runtime,
    task::yield_now,
    time::{self, Instant, sleep},
};
use tokio_test::task;
use tower::{BoxError, Service, ServiceBuilder, ServiceExt, service_fn};
use tower_outbound::{
    ApiTokens, Call, CallHandle, Concurrency, ConcurrencyLimitLayer, Cost, EventHandle, EventLayer, Executor, Limits,
    QueueLayer, Rate, RateLimitLayer, RateLimiter, RequestId, RequestStatus, Shutdown,
    event::{Describe, Events, RequestDetails, ResponseDetails, Subscription, Totals},
    rate::RequestCost,
};

const BEFORE: [&str; 3] = ["first", "second", "third"];
const WATCHED: &str = "watched";
const BEHIND: [&str; 2] = ["fourth", "fifth"];

/// The burst of tokens, which is more than all calls of a scenario cost. The rate is so low that practically no tokens
/// are refilled within a scenario.
const TOKENS: u64 = 10_000;
const BETWEEN: Duration = Duration::from_millis(25);
const CLIENT_TAKES: Duration = Duration::from_millis(40);
/// The interval by which the paused clock is advanced. Every time in the scenario is a multiple of it.
const TICK: Duration = Duration::from_millis(5);
/// The number of steps per advance of the clock. One of them advances the clock, and each of the others lets one task
/// run, which is enough for all tasks that can run.
const STEPS: usize = 10;
/// An upper limit: no scenario has as many steps.
const MAX_STEPS: usize = 50 * STEPS;

type TestExecutor = Executor<&'static str, ()>;
type CallResult = Pin<Box<dyn Future<Output = Result<(), BoxError>> + Send>>;

fn tokens(name: &str) -> u64 {
    name.bytes().map(u64::from).sum()
}

fn limits() -> Limits {
    Limits::new()
        .requests(Rate::new(1, BETWEEN).burst(1))
        .tokens(Rate::per_day(0.001).burst(TOKENS))
}

/// Runs `scenario` with a paused clock. The event interval of 1 makes the runtime return to `scenario` after each task
/// that it has polled.
fn in_steps<F: Future>(scenario: F) -> F::Output {
    runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .event_interval(1)
        .build()
        .unwrap()
        .block_on(scenario)
}

/// Lets one task of the runtime run. Every [`STEPS`]th step advances the clock by one [`TICK`] instead.
async fn step(number: usize) {
    if number % STEPS == STEPS - 1 {
        time::advance(TICK).await;
    } else {
        yield_now().await;
    }
}

/// Lets all tasks of the runtime run until they wait, without any time passing. It yields fewer times than
/// [`support::settle`], because it is called thousands of times.
async fn settle() {
    for _ in 0..STEPS {
        yield_now().await;
    }
}

/// A client that records the calls that reach it.
#[derive(Clone)]
struct Client {
    begun: Instant,
    arrivals: Arc<Mutex<Vec<(&'static str, Duration)>>>,
    /// The number of calls that are at the client now.
    busy: Arc<AtomicUsize>,
}

/// A guard that counts one call as being at the client until the guard is dropped.
struct Busy(Arc<AtomicUsize>);

impl Client {
    fn new() -> Self {
        Self {
            begun: Instant::now(),
            arrivals: Arc::default(),
            busy: Arc::default(),
        }
    }

    fn arrive(&self, name: &'static str) -> Busy {
        self.arrivals.lock().unwrap().push((name, self.begun.elapsed()));
        self.busy.fetch_add(1, Ordering::SeqCst);
        Busy(self.busy.clone())
    }

    async fn respond(self, name: &'static str) -> Result<Response<()>, BoxError> {
        let _busy = self.arrive(name);
        yield_now().await;
        sleep(CLIENT_TAKES).await;
        yield_now().await;
        Ok(Response::new(()))
    }

    fn arrivals(&self) -> BTreeMap<&'static str, Duration> {
        self.arrivals.lock().unwrap().iter().copied().collect()
    }

    /// Returns the total cost, in tokens, of the calls that reached the client.
    fn tokens(&self) -> u64 {
        self.arrivals.lock().unwrap().iter().map(|(name, _)| tokens(name)).sum()
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// How the calls of a scenario are made.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    /// The calls are made with `Executor::submit`. A call runs on when its handle is dropped.
    Submit,
    /// The calls are made with `Executor::submit`, and each handle cancels its call when the handle is dropped.
    Cancel,
    /// The calls are made with an executor as a Tower service.
    Service,
    /// The calls are made with a stack of layers, without an executor.
    Stack,
    /// The calls are closures that are submitted to an executor for closures.
    Closure,
    /// The calls are made with a service that has the concurrency limit as its only layer.
    OnlyConcurrency,
    /// The calls are made with a service that has the rate limit as its only layer.
    OnlyRate,
}

const EVERY_WAY: [Way; 7] = [
    Way::Submit,
    Way::Cancel,
    Way::Service,
    Way::Stack,
    Way::Closure,
    Way::OnlyConcurrency,
    Way::OnlyRate,
];

/// What one scenario needs: the service or executor that makes the calls, the client, the limits, and the events.
struct Setup {
    way: Way,
    executor: Option<TestExecutor>,
    client: Client,
    limiter: RateLimiter,
    permits: Concurrency,
    call: Box<dyn Fn(&'static str) -> CallResult>,
    /// Returns the number of calls in the queue.
    depth: Box<dyn Fn() -> usize>,
    totals: Box<dyn Fn() -> Totals>,
    updates: Option<Subscription>,
    /// The event updates that were received so far: the new status, and the handle of the event.
    received: Vec<(RequestStatus, EventHandle)>,
}

fn request(name: &'static str) -> Request<&'static str> {
    Request::get("http://localhost/")
        .extension(ApiTokens(tokens(name)))
        .extension(RequestId::from(name))
        .body(name)
        .unwrap()
}

struct CancelOnDrop<B, R>(CallHandle<B, R>);

impl<B, R> Drop for CancelOnDrop<B, R> {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

impl Setup {
    fn new(way: Way, workers: usize) -> Self {
        let client = Client::new();
        let limiter = RateLimiter::new(limits()).unwrap();
        let permits = Concurrency::new(2).unwrap();
        let service = {
            let client = client.clone();
            service_fn(move |req: Request<&'static str>| client.clone().respond(req.body()))
        };
        let builder = Executor::builder()
            .queue_capacity(1)
            .workers(workers)
            .limiter(limiter.clone())
            .concurrency(permits.clone());
        let mut kept = None;
        let mut depth: Box<dyn Fn() -> usize> = Box::new(|| 0);
        let mut updates = None;
        let mut totals: Box<dyn Fn() -> Totals> = Box::new(Totals::default);
        let call: Box<dyn Fn(&'static str) -> CallResult> = match way {
            Way::Submit | Way::Cancel | Way::Service => {
                let executor = builder.build(service).unwrap();
                executor.start().unwrap();
                kept = Some(executor.clone());
                let monitor = executor.monitor();
                updates = Some(monitor.subscribe());
                depth = Box::new({
                    let monitor = monitor.clone();
                    move || monitor.queue_depth()
                });
                totals = Box::new(move || monitor.totals());
                Box::new(move |name| {
                    let executor = executor.clone();
                    match way {
                        Way::Submit => Box::pin(async move {
                            executor.submit(request(name)).await?.await?;
                            Ok(())
                        }),
                        Way::Cancel => Box::pin(async move {
                            let mut handle = CancelOnDrop(executor.submit(request(name)).await?);
                            (&mut handle.0).await?;
                            Ok(())
                        }),
                        _ => Box::pin(executor.oneshot(request(name)).map(|result| {
                            result?;
                            Ok(())
                        })),
                    }
                })
            }
            Way::Closure => {
                let executor = builder.build_for_closures::<()>().unwrap();
                executor.start().unwrap();
                let monitor = executor.monitor();
                updates = Some(monitor.subscribe());
                depth = Box::new({
                    let monitor = monitor.clone();
                    move || monitor.queue_depth()
                });
                totals = Box::new(move || monitor.totals());
                let client = client.clone();
                Box::new(move |name| {
                    let (executor, client) = (executor.clone(), client.clone());
                    let call = Call::new(move || client.clone().respond(name));
                    Box::pin(async move {
                        let call = call.tokens(tokens(name)).request_id(name);
                        executor.submit(call).await?.await?;
                        Ok(())
                    })
                })
            }
            Way::Stack => {
                let queue = QueueLayer::new(1).unwrap().workers(workers).unwrap();
                let queue = ServiceBuilder::new()
                    .layer(queue)
                    .layer(EventLayer::processing())
                    .layer(ConcurrencyLimitLayer::with_limit(permits.clone()))
                    .layer(RateLimitLayer::new(limiter.clone()))
                    .layer(EventLayer::calling())
                    .service(service);
                let watch = queue.clone();
                depth = Box::new(move || watch.depth());
                let events = Events::new();
                updates = Some(events.subscribe());
                let service = ServiceBuilder::new()
                    .layer(EventLayer::queued().report_to(&events))
                    .service(queue);
                totals = Box::new(move || events.totals());
                Box::new(move |name| Box::pin(service.clone().oneshot(request(name)).map(|result| result.map(drop))))
            }
            Way::OnlyConcurrency => {
                let layer = ConcurrencyLimitLayer::with_limit(permits.clone());
                let service = ServiceBuilder::new().layer(layer).service(service);
                Box::new(move |name| Box::pin(service.clone().oneshot(request(name)).map(|result| result.map(drop))))
            }
            Way::OnlyRate => {
                let layer = RateLimitLayer::new(limiter.clone());
                let service = ServiceBuilder::new().layer(layer).service(service);
                Box::new(move |name| Box::pin(service.clone().oneshot(request(name)).map(|result| result.map(drop))))
            }
        };
        Self {
            way,
            executor: kept,
            client,
            limiter,
            permits,
            call,
            depth,
            totals,
            updates,
            received: Vec::new(),
        }
    }

    /// Starts a call for each of the names, one after the other, in a task of its own.
    async fn make_calls(&self, names: &[&'static str]) -> Vec<tokio::task::JoinHandle<Result<(), BoxError>>> {
        let mut calls = Vec::new();
        for name in names {
            calls.push(tokio::spawn((self.call)(name)));
            settle().await;
        }
        calls
    }

    fn receive_updates(&mut self) {
        let Some(updates) = &mut self.updates else { return };
        while let Some(Some(update)) = updates.recv().now_or_never() {
            let update = update.expect("the subscription has not lagged");
            self.received.push((update.status, update.event));
        }
    }

    fn event(&mut self, name: &str) -> Option<EventHandle> {
        self.receive_updates();
        let mut events = self.received.iter().map(|(_, event)| event);
        events.find(|event| event.request_id().to_string() == name).cloned()
    }

    /// Checks that no place in the queue and no permit is held, that only calls that reached the client were charged,
    /// and that each event has ended exactly once.
    fn check_all_is_released(&mut self, what: &dyn fmt::Debug) {
        self.receive_updates();
        assert_eq!((self.depth)(), 0, "{what:?}: places");
        assert_eq!(self.permits.in_flight(), 0, "{what:?}: permits");
        assert_eq!(
            self.client.busy.load(Ordering::SeqCst),
            0,
            "{what:?}: calls at the client"
        );
        if self.way != Way::OnlyConcurrency {
            let left = self.limiter.available().tokens.unwrap();
            assert_eq!(TOKENS - left, self.client.tokens(), "{what:?}: tokens");
        }
        let totals = (self.totals)();
        assert_eq!(totals.open(), 0, "{what:?}: {totals:?}");
        let mut ended = BTreeMap::<String, usize>::new();
        for (status, event) in &self.received {
            let ends = ended.entry(event.request_id().to_string()).or_default();
            *ends += usize::from(status.is_terminal());
            let terminal = event.status();
            assert!(
                !status.is_terminal() || *status == terminal,
                "{what:?}: {status} and {terminal}"
            );
        }
        assert!(ended.values().all(|ends| *ends == 1), "{what:?}: {ended:?}");
        assert_eq!(totals.opened, ended.len() as u64, "{what:?}");
    }

    /// Checks that the calls reached the client at intervals of 25 ms or more. In total, up to 5 ms less is allowed,
    /// because the limiter makes up for late timers by that much.
    fn check_the_rate(&self, what: &dyn fmt::Debug) {
        let mut times: Vec<_> = self.client.arrivals.lock().unwrap().iter().map(|(_, at)| *at).collect();
        times.sort_unstable();
        for (nth, from) in times.iter().enumerate() {
            for (more, at) in (1_u32..).zip(&times[nth + 1..]) {
                assert!(*at + ms(5) >= *from + BETWEEN * more, "{what:?}: {times:?}");
            }
        }
    }
}

/// What happened in one scenario in which the watched call was dropped.
struct Observed {
    /// The number of times that the watched call was polled.
    polls: usize,
    /// The time from the start of the scenario to the drop of the watched call.
    dropped: Duration,
    /// Whether the watched call reached the client, either before its future was dropped or because the call ran on
    /// after that.
    is_made: bool,
    /// The time from the start of the scenario to the arrival of each of the other calls at the client.
    arrivals: BTreeMap<&'static str, Duration>,
}

impl Observed {
    /// Returns when each of the other calls has to reach the client, as the time since the start of the scenario. If
    /// the watched call was dropped before it reached the client, the calls behind it are made as if the watched call
    /// had never existed.
    fn expected(&self, way: Way) -> BTreeMap<&'static str, Duration> {
        let (third, behind) = match (way, self.is_made) {
            (Way::OnlyConcurrency, false) => (ms(40), [ms(40), ms(80)]),
            (Way::OnlyConcurrency, true) => (ms(40), [self.dropped, ms(80)]),
            (_, false) => (ms(50), [ms(75), ms(100)]),
            (_, true) => (ms(50), [ms(100), ms(125)]),
        };
        let second = if way == Way::OnlyConcurrency { ms(0) } else { ms(25) };
        let times = [ms(0), second, third].into_iter().chain(behind);
        BEFORE.into_iter().chain(BEHIND).zip(times).collect()
    }
}

/// Runs a scenario in which the watched call is polled `polls` times, or until it is done, and is then dropped. Checks
/// that everything is released after that.
async fn dropped_after(way: Way, workers: usize, polls: usize) -> Observed {
    let what = (way, workers, polls);
    let mut setup = Setup::new(way, workers);
    let mut others = setup.make_calls(&BEFORE).await;
    let mut watched = task::spawn((setup.call)(WATCHED));
    let behind = |setup: &Setup| BEHIND.map(|name| tokio::spawn((setup.call)(name)));
    let mut done = None;
    let mut polled = 0;
    while polled < polls && done.is_none() {
        if polled == 1 {
            others.extend(behind(&setup));
        }
        if let Poll::Ready(result) = watched.poll() {
            done = Some(result);
        }
        polled += 1;
        if done.is_none() {
            step(polled).await;
        }
    }
    let event = setup.event(WATCHED);
    let before = event.as_ref().map(EventHandle::status);
    let was_at_client = setup.client.arrivals().contains_key(WATCHED);
    let dropped = setup.client.begun.elapsed();
    drop(watched);
    if polled <= 1 {
        others.extend(behind(&setup));
    }
    for other in others {
        other.await.unwrap().unwrap();
    }
    settle().await;

    if let Some(result) = &done {
        assert!(result.is_ok(), "{what:?}: {result:?}");
    }
    let runs_on = matches!(way, Way::Submit | Way::Closure);
    let expected = before.map(|before| match before {
        ended if ended.is_terminal() => ended,
        RequestStatus::Pending => RequestStatus::Cancelled,
        _ if runs_on => RequestStatus::Completed,
        _ => RequestStatus::Cancelled,
    });
    let event = setup.event(WATCHED);
    if let Some(event) = event.as_ref().filter(|_| runs_on) {
        event.finished().await;
    }
    assert_eq!(event.map(|event| event.status()), expected, "{what:?}: {before:?}");
    if expected != Some(RequestStatus::Completed) && done.is_none() {
        let is_at_client = setup.client.arrivals().contains_key(WATCHED);
        assert_eq!(is_at_client, was_at_client, "{what:?}: a dropped call was made");
    }
    settle().await;
    setup.check_all_is_released(&what);
    if way != Way::OnlyConcurrency {
        setup.check_the_rate(&what);
    }
    let mut arrivals = setup.client.arrivals();
    arrivals.remove(WATCHED);
    Observed {
        polls: polled,
        dropped,
        is_made: was_at_client || expected == Some(RequestStatus::Completed),
        arrivals,
    }
}

#[test]
fn a_call_that_is_dropped_at_any_step_delays_no_other_call_and_the_next_one_moves_up_at_once() {
    for way in EVERY_WAY {
        for workers in [1, 3] {
            let whole = in_steps(dropped_after(way, workers, MAX_STEPS));
            assert!(whole.polls < MAX_STEPS, "{way:?}: the call never completes");
            assert!(whole.is_made);
            assert_eq!(whole.arrivals, whole.expected(way), "{way:?}");
            for polls in 0..whole.polls {
                let observed = in_steps(dropped_after(way, workers, polls));
                assert_eq!(observed.polls, polls);
                assert_eq!(observed.arrivals, observed.expected(way), "{way:?}, {workers}, {polls}");
            }
        }
    }
}

// --- Interference ---

/// Makes all calls of the scenario, and runs `interfere` after `after` steps, or earlier if all calls have ended.
/// Returns the number of steps before `interfere`, the results of the calls, and the output of `interfere`.
async fn interrupted<Fut: Future>(
    setup: &mut Setup,
    after: usize,
    interfere: impl FnOnce(&Setup) -> Fut,
) -> (usize, Vec<Result<(), BoxError>>, Fut::Output) {
    let mut calls = setup.make_calls(&BEFORE).await;
    calls.extend(setup.make_calls(&[WATCHED]).await);
    calls.extend(setup.make_calls(&BEHIND).await);
    let mut steps = 0;
    while steps < after && !calls.iter().all(|call| call.is_finished()) {
        steps += 1;
        step(steps).await;
    }
    let output = interfere(setup).await;
    let mut results = Vec::new();
    for call in calls {
        results.push(call.await.unwrap());
    }
    settle().await;
    (steps, results, output)
}

/// Runs the scenario once for each number of steps, with `interfere` after that number of steps. Each time, everything
/// must be released and the rate must hold. The arguments of `check` are a description, an undisturbed scenario, the
/// disturbed one, the results of its calls, and the output of `interfere`.
fn at_every_step<Fut: Future>(
    interfere: impl Fn(&Setup) -> Fut,
    check: impl Fn(&str, &Setup, &Setup, Vec<Result<(), BoxError>>, Fut::Output),
) {
    let undisturbed = |workers| {
        in_steps(async move {
            let mut setup = Setup::new(Way::Submit, workers);
            let (steps, ..) = interrupted(&mut setup, MAX_STEPS, |_| async {}).await;
            assert!(steps < MAX_STEPS, "the calls never end");
            (steps, setup)
        })
    };
    let whole = [undisturbed(1), undisturbed(3)];
    for after in 0..=whole[0].0 {
        // The scenario runs with one worker and with three in turn, not with both after each number of steps: little
        // changes from one step to the next.
        let (workers, (_, undisturbed)) = ([1, 3][after % 2], &whole[after % 2]);
        in_steps(async {
            let what = format!("{workers} workers, after {after} steps");
            let mut setup = Setup::new(Way::Submit, workers);
            let (_, results, output) = interrupted(&mut setup, after, &interfere).await;
            setup.check_all_is_released(&what);
            setup.check_the_rate(&what);
            check(&what, undisturbed, &setup, results, output);
        });
    }
}

#[test]
fn limits_that_are_changed_and_changed_back_at_any_step_have_no_effect() {
    at_every_step(
        |setup| {
            let (limiter, permits) = (setup.limiter.clone(), setup.permits.clone());
            async move {
                let wider = Limits::new()
                    .requests(Rate::new(1, BETWEEN).burst(10))
                    .tokens(Rate::per_day(0.001).burst(2 * TOKENS));
                limiter.set_limits(wider).unwrap();
                limiter.set_limits(limits()).unwrap();
                permits.set(1).unwrap();
                permits.set(2).unwrap();
            }
        },
        |what, undisturbed, setup, results, ()| {
            assert!(results.iter().all(Result::is_ok), "{what}: {results:?}");
            assert_eq!(setup.client.arrivals(), undisturbed.client.arrivals(), "{what}");
        },
    );
}

#[test]
fn a_limit_that_is_lowered_and_raised_again_at_any_step_loses_no_call() {
    at_every_step(
        |setup| {
            let permits = setup.permits.clone();
            async move {
                permits.set(1).unwrap();
                sleep(ms(30)).await;
                permits.set(2).unwrap();
            }
        },
        |what, _, setup, results, ()| {
            assert!(results.iter().all(Result::is_ok), "{what}: {results:?}");
            assert_eq!(setup.client.arrivals().len(), 6, "{what}");
        },
    );
}

#[test]
fn a_pause_at_any_step_admits_no_call_until_it_ends() {
    let pause = ms(35);
    at_every_step(
        |setup| {
            let (limiter, begun) = (setup.limiter.clone(), setup.client.begun);
            async move {
                limiter.pause_for(pause);
                begun.elapsed()
            }
        },
        |what, _, setup, results, from| {
            assert!(results.iter().all(Result::is_ok), "{what}: {results:?}");
            for at in setup.client.arrivals().values() {
                assert!(
                    *at <= from || *at >= from + pause,
                    "{what}: {at:?} in a pause from {from:?}"
                );
            }
        },
    );
}

#[test]
fn a_clock_that_jumps_at_any_step_admits_no_burst() {
    at_every_step(
        |_| time::advance(ms(200)),
        |what, _, setup, results, ()| {
            assert!(results.iter().all(Result::is_ok), "{what}: {results:?}");
            assert_eq!(setup.client.arrivals().len(), 6, "{what}");
        },
    );
}

#[test]
fn a_stop_at_any_step_accounts_for_every_call_and_the_executor_can_start_again() {
    for how in [
        Shutdown::Graceful,
        Shutdown::Within(ms(60)),
        Shutdown::SentWithin(ms(60)),
        Shutdown::Immediate,
    ] {
        at_every_step(
            |setup| {
                let (executor, client, limiter) = (
                    setup.executor.clone().unwrap(),
                    setup.client.clone(),
                    setup.limiter.clone(),
                );
                let before = executor.monitor().totals();
                async move {
                    let begun = Instant::now();
                    let report = executor.stop(how).await;
                    assert_eq!(report.elapsed, begun.elapsed());
                    assert!(executor.submit(request("late")).await.unwrap_err().is_not_running());
                    let after = executor.monitor().totals();
                    assert_eq!(client.busy.load(Ordering::SeqCst), 0);
                    let charged = TOKENS - limiter.available().tokens.unwrap();
                    assert_eq!(charged, client.tokens());

                    executor.start().unwrap();
                    executor.submit(request("next")).await.unwrap().await.unwrap();
                    (before, report, after)
                }
            },
            |what, _, setup, results, (before, report, after)| {
                let what = format!("{how:?}, {what}: {report:?}");
                let ended = after.ended() - before.ended();
                assert_eq!(report.completed + report.failed + report.cancelled, ended, "{what}");
                assert_eq!((report.left, report.failed), (0, 0), "{what}");
                // Calls that waited for a place in the queue may fail only after the stop has returned. So the totals
                // at the end are compared with the results of all calls.
                let totals = (setup.totals)();
                assert_eq!(totals.completed, after.completed + 1, "{what}");
                let refused = results.iter().filter(|result| result.is_err()).count();
                assert_eq!(totals.cancelled as usize, refused, "{what}: {results:?}");
                match how {
                    // A graceful stop finishes every call that has a place in the queue. Only calls without a place are
                    // cancelled.
                    Shutdown::Graceful => assert_eq!(report.cancelled, after.cancelled - before.cancelled, "{what}"),
                    Shutdown::Immediate => assert_eq!((report.completed, report.elapsed), (0, ms(0)), "{what}"),
                    Shutdown::Within(limit) | Shutdown::SentWithin(limit) => assert!(report.elapsed <= limit, "{what}"),
                }
                for result in results {
                    let Err(error) = result else { continue };
                    let error = error.downcast::<tower_outbound::Error>().unwrap();
                    assert!(
                        error.is_cancelled() || error.is_closed() || error.is_not_running(),
                        "{what}: {error}"
                    );
                }
            },
        );
    }
}

// --- Panics ---

/// The point at which user code panics.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Panics {
    /// The client panics when it is cloned for a call.
    Clone,
    /// The client panics in `poll_ready`.
    Ready,
    /// The client panics in `call`.
    Call,
    /// The client's future panics when it is polled for the first time.
    FirstPoll,
    LaterPoll,
    /// The client's future panics when the cancellation of its call drops it.
    FutureDropped,
    /// The response panics when it is dropped. It is dropped because the call's handle was dropped without being
    /// awaited.
    ResponseDropped,
    /// The `Describe` implementation panics when it describes the response for the event.
    Describe,
    /// The client's error panics when it is formatted.
    ErrorText,
    /// The cost function panics when it computes the cost of the watched call for the nth time; the first time (1) is
    /// in `submit`.
    Cost(usize),
    /// The `Describe` implementation panics when it describes the request for the event, in `submit`.
    DescribeRequest,
    /// The request panics when the cancellation of its queued call drops it.
    RequestDropped,
}

const EVERYWHERE: [Panics; 13] = [
    Panics::Clone,
    Panics::Ready,
    Panics::Call,
    Panics::FirstPoll,
    Panics::LaterPoll,
    Panics::FutureDropped,
    Panics::ResponseDropped,
    Panics::Describe,
    Panics::ErrorText,
    Panics::Cost(1),
    Panics::Cost(2),
    Panics::DescribeRequest,
    Panics::RequestDropped,
];

/// A value that panics when it is dropped, if its flag is set.
#[derive(Debug, Default)]
struct PanicsOnDrop(bool);

impl Drop for PanicsOnDrop {
    fn drop(&mut self) {
        assert!(!self.0, "dropped");
    }
}

struct Body {
    name: &'static str,
    on_drop: PanicsOnDrop,
}

#[derive(Debug)]
struct PanicsOnDisplay;

impl fmt::Display for PanicsOnDisplay {
    fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
        panic!("formatted")
    }
}

impl std::error::Error for PanicsOnDisplay {}

/// A client that panics at one point of the watched call. The points `Clone` and `Ready` belong to no particular call:
/// there the client panics once, after `armed` was set.
struct Fragile {
    panics: Panics,
    armed: Arc<Mutex<bool>>,
    client: Client,
}

impl Fragile {
    /// Returns whether the client has to panic at `point` now, and clears `armed` if so.
    fn has_to_panic(&self, point: Panics) -> bool {
        self.panics == point && std::mem::take(&mut *self.armed.lock().unwrap())
    }
}

impl Clone for Fragile {
    fn clone(&self) -> Self {
        assert!(!self.has_to_panic(Panics::Clone), "cloned");
        Self {
            panics: self.panics,
            armed: self.armed.clone(),
            client: self.client.clone(),
        }
    }
}

impl Service<Request<Body>> for Fragile {
    type Response = Response<PanicsOnDrop>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Response<PanicsOnDrop>, BoxError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        assert!(!self.has_to_panic(Panics::Ready), "made ready");
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut req: Request<Body>) -> Self::Future {
        req.body_mut().on_drop.0 = false;
        let name = req.body().name;
        let busy = self.client.arrive(name);
        let panics = Some(self.panics).filter(|_| name == WATCHED);
        assert_ne!(panics, Some(Panics::Call), "called");
        Box::pin(async move {
            let (_busy, _on_drop) = (busy, PanicsOnDrop(panics == Some(Panics::FutureDropped)));
            assert_ne!(panics, Some(Panics::FirstPoll), "polled");
            sleep(CLIENT_TAKES).await;
            assert_ne!(panics, Some(Panics::LaterPoll), "polled again");
            if panics == Some(Panics::ErrorText) {
                return Err(PanicsOnDisplay.into());
            }
            let mut response = Response::new(PanicsOnDrop(panics == Some(Panics::ResponseDropped)));
            if panics.is_some() {
                *response.status_mut() = StatusCode::IM_A_TEAPOT;
            }
            Ok(response)
        })
    }
}

/// A `Describe` implementation that panics for the watched call, if its field is one of the two points at which a
/// request or response is described.
#[derive(Clone)]
struct FragileDescribe(Panics);

impl Describe<Request<Body>, Response<PanicsOnDrop>> for FragileDescribe {
    fn request(&self, req: &Request<Body>, _: &mut RequestDetails) {
        let is_watched = req.body().name == WATCHED;
        assert!(!is_watched || self.0 != Panics::DescribeRequest, "request described");
    }

    fn response(&self, res: &Response<PanicsOnDrop>, _: &mut ResponseDetails) {
        let is_watched = res.status() == StatusCode::IM_A_TEAPOT;
        assert!(!is_watched || self.0 != Panics::Describe, "response described");
    }
}

/// Runs the scenario with a panic of user code, and checks that the panic fails no call except the one in which it
/// happens. `armed` is set after `armed_after` steps. Returns the number of steps until all calls had ended.
async fn with_a_panic(panics: Panics, workers: usize, armed_after: usize) -> usize {
    let what = (panics, workers, armed_after);
    let client = Client::new();
    let armed = Arc::new(Mutex::new(false));
    let fragile = Fragile {
        panics,
        armed: armed.clone(),
        client: client.clone(),
    };
    let limiter = RateLimiter::new(limits()).unwrap();
    let executor = Executor::builder()
        .queue_capacity(2)
        .workers(workers)
        .limiter(limiter.clone())
        .concurrency_limit(2)
        .describe(FragileDescribe(panics))
        .cost(FragileCost {
            panics,
            computed: Arc::default(),
        })
        .build(fragile)
        .unwrap();
    executor.start().unwrap();
    let monitor = executor.monitor();
    let mut updates = monitor.subscribe();

    let submit = |name: &'static str| {
        let on_drop = PanicsOnDrop(name == WATCHED && panics == Panics::RequestDropped);
        task::spawn({
            let executor = executor.clone();
            async move { executor.submit(Request::new(Body { name, on_drop })).await }
        })
    };
    let mut handles = Vec::new();
    for name in BEFORE {
        handles.push(submit(name).await.unwrap());
        settle().await;
    }
    let mut watched = submit(WATCHED);
    let submitted = catch_unwind(AssertUnwindSafe(|| watched.poll()));
    let watched = match submitted {
        Ok(Poll::Ready(submitted)) => Some(submitted.unwrap()),
        Ok(Poll::Pending) => panic!("there is a place"),
        Err(_) => {
            drop(watched);
            None
        }
    };
    let behind: Vec<_> = BEHIND.into_iter().map(|name| tokio::spawn(submit(name))).collect();

    let event = watched.as_ref().map(|watched| watched.event().clone());
    let mut steps = 0;
    let mut over_after = 0;
    let mut watched = watched;
    while steps < MAX_STEPS && over_after == 0 {
        if steps == armed_after {
            *armed.lock().unwrap() = true;
        }
        let status = event.as_ref().map(EventHandle::status);
        match (panics, status, &watched) {
            (Panics::FutureDropped, Some(RequestStatus::Calling), Some(handle)) => handle.cancel(),
            (Panics::ResponseDropped, Some(RequestStatus::Calling), Some(_)) => watched = None,
            (Panics::RequestDropped, Some(RequestStatus::Queued), Some(handle)) => {
                // `cancel` drops the queued request on the caller's thread, so the panic of that drop is raised in the
                // caller.
                assert!(catch_unwind(AssertUnwindSafe(|| handle.cancel())).is_err());
                watched = None;
            }
            _ => {}
        }
        steps += 1;
        step(steps).await;
        if monitor.totals().open() == 0 && behind.iter().all(|call| call.is_finished()) {
            over_after = steps;
        }
    }
    assert!(over_after > 0, "{what:?}: the calls never end");
    for call in behind {
        handles.push(call.await.unwrap().unwrap());
    }
    let failed: Vec<_> = handles
        .iter()
        .filter(|call| call.event().status() == RequestStatus::Failed)
        .collect();
    let status = event.as_ref().map(EventHandle::status);
    let expected = match panics {
        // A panic at these two points fails one call, which need not be the watched one.
        Panics::Clone | Panics::Ready => {
            let failed = failed.len() + usize::from(status == Some(RequestStatus::Failed));
            assert!(failed <= 1, "{what:?}: {failed} failed");
            let has_panicked = armed_after < MAX_STEPS && !*armed.lock().unwrap();
            assert_eq!(failed == 1, has_panicked, "{what:?}");
            status
        }
        Panics::Cost(1) | Panics::DescribeRequest => None,
        Panics::FutureDropped | Panics::RequestDropped => Some(RequestStatus::Cancelled),
        Panics::ResponseDropped => Some(RequestStatus::Completed),
        Panics::Call
        | Panics::FirstPoll
        | Panics::LaterPoll
        | Panics::Describe
        | Panics::ErrorText
        | Panics::Cost(_) => Some(RequestStatus::Failed),
    };
    assert_eq!(status, expected, "{what:?}");
    if !matches!(panics, Panics::Clone | Panics::Ready) {
        assert!(failed.is_empty(), "{what:?}: {failed:?}");
    }
    if let (Some(RequestStatus::Failed), Some(watched)) = (status, &mut watched) {
        assert!(watched.await.unwrap_err().is_panicked(), "{what:?}");
    }

    let mut ends = 0;
    while let Some(Some(update)) = updates.recv().now_or_never() {
        ends += u64::from(update.unwrap().status.is_terminal());
    }
    let totals = monitor.totals();
    assert_eq!((totals.open(), ends), (0, totals.opened), "{what:?}: {totals:?}");
    assert_eq!(
        (monitor.queue_depth(), monitor.in_flight(), monitor.calling()),
        (0, 0, 0),
        "{what:?}"
    );
    assert_eq!(client.busy.load(Ordering::SeqCst), 0, "{what:?}");
    // One call may have been charged without reaching the client, because user code panicked in between.
    let charged = TOKENS - limiter.available().tokens.unwrap();
    assert!(
        (0..=1).contains(&(charged - client.arrivals().len() as u64)),
        "{what:?}: {charged}"
    );
    let report = executor.stop(Shutdown::Graceful).await;
    assert_eq!(report.elapsed, Duration::ZERO, "{what:?}");
    over_after
}

/// A cost function that returns one token. It panics for the watched call if `panics` is the number of this
/// computation.
#[derive(Clone)]
struct FragileCost {
    panics: Panics,
    /// The number of times that the cost of the watched call was computed.
    computed: Arc<AtomicUsize>,
}

impl RequestCost<Request<Body>> for FragileCost {
    fn cost(&self, req: &Request<Body>) -> Cost {
        if req.body().name == WATCHED {
            let nth = self.computed.fetch_add(1, Ordering::SeqCst) + 1;
            assert_ne!(self.panics, Panics::Cost(nth), "cost computed");
        }
        Cost::tokens(1)
    }
}

#[test]
fn a_panic_anywhere_fails_that_call_and_everything_is_released() {
    for panics in EVERYWHERE {
        for workers in [1, 3] {
            in_steps(with_a_panic(panics, workers, 0));
        }
    }
}

#[test]
fn a_client_that_panics_in_clone_or_poll_ready_at_any_step_fails_one_call_at_most() {
    for panics in [Panics::Clone, Panics::Ready] {
        let whole = in_steps(with_a_panic(panics, 1, MAX_STEPS));
        for armed_after in 0..whole {
            in_steps(with_a_panic(panics, [1, 3][armed_after % 2], armed_after));
        }
    }
}

// --- Shutdown ---

/// A value that reports through `begun` that its drop has begun, and then blocks until the test releases it through
/// `release`.
struct BlocksOnDrop {
    begun: mpsc::Sender<()>,
    release: mpsc::Receiver<()>,
}

impl Drop for BlocksOnDrop {
    fn drop(&mut self) {
        let _ = self.begun.send(());
        let _ = self.release.recv();
    }
}

#[test]
fn a_stop_waits_until_the_last_call_is_cancelled_by_the_end_of_its_runtime() {
    let home = threaded_runtime();
    let executor = Executor::builder()
        .limits(Limits::new())
        .concurrency_limit(1)
        .build(service_fn(async |_: Request<Option<BlocksOnDrop>>| {
            pending::<Result<Response<()>, BoxError>>().await
        }))
        .unwrap();
    let (begun, has_begun) = mpsc::channel();
    let (releases, release) = mpsc::channel();
    let mut blocks = Some(BlocksOnDrop { begun, release });
    let calls = home.block_on(async {
        executor.start().unwrap();
        let mut calls = Vec::new();
        // Of the four calls, one is at the client, one was taken from the queue by the worker and waits for a permit,
        // and two are in the queue.
        for body in [None, None, blocks.take(), None] {
            calls.push(executor.submit(Request::new(body)).await.unwrap());
            while calls.len() == 1 && executor.monitor().calling() == 0 {
                yield_now().await;
            }
        }
        calls
    });
    let ends = thread::spawn(move || drop(home));
    has_begun.recv().unwrap();
    let mut stop = task::spawn(executor.stop(Shutdown::Graceful));
    let last = calls.last().unwrap().event().clone();
    assert_eq!(last.status(), RequestStatus::Queued);
    assert!(stop.poll().is_pending(), "the last call has not been cancelled yet");
    releases.send(()).unwrap();
    ends.join().unwrap();
    assert!(stop.is_woken());
    let Poll::Ready(report) = stop.poll() else {
        panic!("every call is cancelled")
    };
    assert_eq!(last.status(), RequestStatus::Cancelled);
    assert_eq!((report.cancelled, executor.monitor().totals().cancelled), (1, 4));
}
