//! One fault at a time, at every moment there is: a call is taken through the stack step by step, and at each step the
//! same story is told anew with the fault just there. Whatever it is, nobody else may notice, and all must be given back.
//!
//! The story, in milliseconds. Two permits, a request every 25, a queue of one place; the wire takes 40. Three calls are
//! before the one that is watched, and two behind it:
//!
//! ```text
//! first     wire 0-40
//! second    rate 0-25, wire 25-65
//! third     queued until first is over, rate 40-50, wire 50-90
//! watched   no place until 40, queued until 65, rate 65-75, wire 75-115
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
use support::ms;
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

/// More than there are. They do not come back within a story.
const TOKENS: u64 = 10_000;
const BETWEEN: Duration = Duration::from_millis(25);
const WIRE: Duration = Duration::from_millis(40);
/// All that happens, happens at a multiple of it.
const TICK: Duration = Duration::from_millis(5);
/// Tasks that run before the clock goes on: more than there is to do.
const STEPS: usize = 10;
/// The longest story is over by then.
const LONG: usize = 50 * STEPS;

type Plain = Executor<&'static str, ()>;
type Answer = Pin<Box<dyn Future<Output = Result<(), BoxError>> + Send>>;

fn tokens(name: &str) -> u64 {
    name.bytes().map(u64::from).sum()
}

fn limits() -> Limits {
    Limits::new()
        .requests(Rate::new(1, BETWEEN).burst(1))
        .tokens(Rate::per_day(0.001).burst(TOKENS))
}

/// A runtime with a clock that stands still, whose tasks run one by one.
fn in_steps<F: Future>(story: F) -> F::Output {
    runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .event_interval(1)
        .build()
        .unwrap()
        .block_on(story)
}

/// Lets one task run. Now and then it gets later.
async fn step(number: usize) {
    if number % STEPS == STEPS - 1 {
        time::advance(TICK).await;
    } else {
        yield_now().await;
    }
}

/// Lets every task run that can, without any time passing.
async fn settle() {
    for _ in 0..STEPS {
        yield_now().await;
    }
}

/// Who was on the wire, and when.
#[derive(Clone)]
struct Wire {
    begun: Instant,
    arrivals: Arc<Mutex<Vec<(&'static str, Duration)>>>,
    busy: Arc<AtomicUsize>,
}

struct Busy(Arc<AtomicUsize>);

impl Wire {
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

    async fn carry(self, name: &'static str) -> Result<Response<()>, BoxError> {
        let _busy = self.arrive(name);
        yield_now().await;
        sleep(WIRE).await;
        yield_now().await;
        Ok(Response::new(()))
    }

    fn arrivals(&self) -> BTreeMap<&'static str, Duration> {
        self.arrivals.lock().unwrap().iter().copied().collect()
    }

    /// What those who were on the wire cost together.
    fn tokens(&self) -> u64 {
        self.arrivals.lock().unwrap().iter().map(|(name, _)| tokens(name)).sum()
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// How a call is made.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    /// `submit`; who drops the handle lets the call run on.
    Submit,
    /// `submit`; who drops the handle cancels first.
    Cancel,
    Service,
    /// Layers, put together by hand.
    Stack,
    Closure,
    PermitAlone,
    RateAlone,
}

const EVERY_WAY: [Way; 7] = [
    Way::Submit,
    Way::Cancel,
    Way::Service,
    Way::Stack,
    Way::Closure,
    Way::PermitAlone,
    Way::RateAlone,
];

struct World {
    way: Way,
    executor: Option<Plain>,
    wire: Wire,
    limiter: RateLimiter,
    permits: Concurrency,
    call: Box<dyn Fn(&'static str) -> Answer>,
    /// Calls in the queue.
    depth: Box<dyn Fn() -> usize>,
    totals: Box<dyn Fn() -> Totals>,
    updates: Option<Subscription>,
    told: Vec<(RequestStatus, EventHandle)>,
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

impl World {
    fn new(way: Way, workers: usize) -> Self {
        let wire = Wire::new();
        let limiter = RateLimiter::new(limits()).unwrap();
        let permits = Concurrency::new(2).unwrap();
        let carries = {
            let wire = wire.clone();
            service_fn(move |req: Request<&'static str>| wire.clone().carry(req.body()))
        };
        let builder = Executor::builder()
            .queue_capacity(1)
            .workers(workers)
            .limiter(limiter.clone())
            .concurrency(permits.clone());
        let mut known = None;
        let mut depth: Box<dyn Fn() -> usize> = Box::new(|| 0);
        let mut updates = None;
        let mut totals: Box<dyn Fn() -> Totals> = Box::new(Totals::default);
        let call: Box<dyn Fn(&'static str) -> Answer> = match way {
            Way::Submit | Way::Cancel | Way::Service => {
                let executor = builder.build(carries).unwrap();
                executor.start().unwrap();
                known = Some(executor.clone());
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
                        _ => Box::pin(executor.oneshot(request(name)).map(|answer| {
                            answer?;
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
                let wire = wire.clone();
                Box::new(move |name| {
                    let (executor, wire) = (executor.clone(), wire.clone());
                    let call = Call::new(move || wire.clone().carry(name));
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
                    .service(carries);
                let watch = queue.clone();
                depth = Box::new(move || watch.depth());
                let events = Events::new();
                updates = Some(events.subscribe());
                let service = ServiceBuilder::new()
                    .layer(EventLayer::queued().report_to(&events))
                    .service(queue);
                totals = Box::new(move || events.totals());
                Box::new(move |name| Box::pin(service.clone().oneshot(request(name)).map(|answer| answer.map(drop))))
            }
            Way::PermitAlone => {
                let layer = ConcurrencyLimitLayer::with_limit(permits.clone());
                let service = ServiceBuilder::new().layer(layer).service(carries);
                Box::new(move |name| Box::pin(service.clone().oneshot(request(name)).map(|answer| answer.map(drop))))
            }
            Way::RateAlone => {
                let layer = RateLimitLayer::new(limiter.clone());
                let service = ServiceBuilder::new().layer(layer).service(carries);
                Box::new(move |name| Box::pin(service.clone().oneshot(request(name)).map(|answer| answer.map(drop))))
            }
        };
        Self {
            way,
            executor: known,
            wire,
            limiter,
            permits,
            call,
            depth,
            totals,
            updates,
            told: Vec::new(),
        }
    }

    /// The others' calls, each made in its turn.
    async fn others(&self, names: &[&'static str]) -> Vec<tokio::task::JoinHandle<Result<(), BoxError>>> {
        let mut calls = Vec::new();
        for name in names {
            calls.push(tokio::spawn((self.call)(name)));
            settle().await;
        }
        calls
    }

    fn listen(&mut self) {
        let Some(updates) = &mut self.updates else { return };
        while let Some(Some(update)) = updates.recv().now_or_never() {
            let update = update.expect("nothing is missed");
            self.told.push((update.status, update.event));
        }
    }

    fn event(&mut self, name: &str) -> Option<EventHandle> {
        self.listen();
        let mut events = self.told.iter().map(|(_, event)| event);
        events.find(|event| event.request_id().to_string() == name).cloned()
    }

    /// Nothing is held, nobody is there, and who paid was on the wire.
    fn check_all_is_back(&mut self, what: &dyn fmt::Debug) {
        self.listen();
        assert_eq!((self.depth)(), 0, "{what:?}: places");
        assert_eq!(self.permits.in_flight(), 0, "{what:?}: permits");
        assert_eq!(self.wire.busy.load(Ordering::SeqCst), 0, "{what:?}: the wire");
        if self.way != Way::PermitAlone {
            let left = self.limiter.available().tokens.unwrap();
            assert_eq!(TOKENS - left, self.wire.tokens(), "{what:?}: tokens");
        }
        let totals = (self.totals)();
        assert_eq!(totals.open(), 0, "{what:?}: {totals:?}");
        let mut ended = BTreeMap::<String, usize>::new();
        for (status, event) in &self.told {
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

    /// At no time more than one request in 25 ms, and what a late timer is made up for.
    fn check_the_rate(&self, what: &dyn fmt::Debug) {
        let mut times: Vec<_> = self.wire.arrivals.lock().unwrap().iter().map(|(_, at)| *at).collect();
        times.sort_unstable();
        for (nth, from) in times.iter().enumerate() {
            for (more, at) in (1_u32..).zip(&times[nth + 1..]) {
                assert!(*at + ms(5) >= *from + BETWEEN * more, "{what:?}: {times:?}");
            }
        }
    }
}

/// What came of one story.
struct Told {
    /// How often the watched call was polled.
    polls: usize,
    /// When the watched call was dropped, and when the others were on the wire.
    dropped: Duration,
    /// Whether the watched call got to the wire, before it was dropped or since it ran on.
    is_made: bool,
    arrivals: BTreeMap<&'static str, Duration>,
}

impl Told {
    /// Who is dropped before it is on the wire is as if it had never been; the next moves up at once.
    fn expected(&self, way: Way) -> BTreeMap<&'static str, Duration> {
        let (third, behind) = match (way, self.is_made) {
            (Way::PermitAlone, false) => (ms(40), [ms(40), ms(80)]),
            (Way::PermitAlone, true) => (ms(40), [self.dropped, ms(80)]),
            (_, false) => (ms(50), [ms(75), ms(100)]),
            (_, true) => (ms(50), [ms(100), ms(125)]),
        };
        let second = if way == Way::PermitAlone { ms(0) } else { ms(25) };
        let times = [ms(0), second, third].into_iter().chain(behind);
        BEFORE.into_iter().chain(BEHIND).zip(times).collect()
    }
}

/// Polls the watched call `polls` times, or until it is done, and drops it.
async fn dropped_after(way: Way, workers: usize, polls: usize) -> Told {
    let what = (way, workers, polls);
    let mut world = World::new(way, workers);
    let mut others = world.others(&BEFORE).await;
    let mut watched = task::spawn((world.call)(WATCHED));
    let behind = |world: &World| BEHIND.map(|name| tokio::spawn((world.call)(name)));
    let mut done = None;
    let mut polled = 0;
    while polled < polls && done.is_none() {
        if polled == 1 {
            others.extend(behind(&world));
        }
        if let Poll::Ready(answer) = watched.poll() {
            done = Some(answer);
        }
        polled += 1;
        if done.is_none() {
            step(polled).await;
        }
    }
    let event = world.event(WATCHED);
    let before = event.as_ref().map(EventHandle::status);
    let was_on_the_wire = world.wire.arrivals().contains_key(WATCHED);
    let dropped = world.wire.begun.elapsed();
    drop(watched);
    if polled <= 1 {
        others.extend(behind(&world));
    }
    for other in others {
        other.await.unwrap().unwrap();
    }
    settle().await;

    if let Some(answer) = &done {
        assert!(answer.is_ok(), "{what:?}: {answer:?}");
    }
    let runs_on = matches!(way, Way::Submit | Way::Closure);
    let expected = before.map(|before| match before {
        over if over.is_terminal() => over,
        RequestStatus::Pending => RequestStatus::Cancelled,
        _ if runs_on => RequestStatus::Completed,
        _ => RequestStatus::Cancelled,
    });
    let event = world.event(WATCHED);
    if let Some(event) = event.as_ref().filter(|_| runs_on) {
        event.finished().await;
    }
    assert_eq!(event.map(|event| event.status()), expected, "{what:?}: {before:?}");
    if expected != Some(RequestStatus::Completed) && done.is_none() {
        let is_on_the_wire = world.wire.arrivals().contains_key(WATCHED);
        assert_eq!(
            is_on_the_wire, was_on_the_wire,
            "{what:?}: a call that was given up was made"
        );
    }
    settle().await;
    world.check_all_is_back(&what);
    if way != Way::PermitAlone {
        world.check_the_rate(&what);
    }
    let mut arrivals = world.wire.arrivals();
    arrivals.remove(WATCHED);
    Told {
        polls: polled,
        dropped,
        is_made: was_on_the_wire || expected == Some(RequestStatus::Completed),
        arrivals,
    }
}

#[test]
fn a_call_that_is_dropped_at_any_await_delays_nobody_and_the_next_moves_up_at_once() {
    for way in EVERY_WAY {
        for workers in [1, 3] {
            let whole = in_steps(dropped_after(way, workers, LONG));
            assert!(whole.polls < LONG, "{way:?}: it is done some time");
            assert!(whole.is_made);
            assert_eq!(whole.arrivals, whole.expected(way), "{way:?}");
            for polls in 0..whole.polls {
                let told = in_steps(dropped_after(way, workers, polls));
                assert_eq!(told.polls, polls);
                assert_eq!(told.arrivals, told.expected(way), "{way:?}, {workers}, {polls}");
            }
        }
    }
}

// --- others' interference ---

/// Makes all calls, and lets `happens` happen after so many steps. Returns how many steps it took to the end.
async fn interrupted<Fut: Future>(
    world: &mut World,
    after: usize,
    happens: impl FnOnce(&World) -> Fut,
) -> (usize, Vec<Result<(), BoxError>>, Fut::Output) {
    let mut calls = world.others(&BEFORE).await;
    calls.extend(world.others(&[WATCHED]).await);
    calls.extend(world.others(&BEHIND).await);
    let mut steps = 0;
    while steps < after && !calls.iter().all(|call| call.is_finished()) {
        steps += 1;
        step(steps).await;
    }
    let output = happens(world).await;
    let mut answers = Vec::new();
    for call in calls {
        answers.push(call.await.unwrap());
    }
    settle().await;
    (steps, answers, output)
}

/// Tells the story with `happens` at every moment, and checks what has to hold whatever happens.
fn at_every_moment<Fut: Future>(
    happens: impl Fn(&World) -> Fut,
    check: impl Fn(&str, &World, &World, Vec<Result<(), BoxError>>, Fut::Output),
) {
    let undisturbed = |workers| {
        in_steps(async move {
            let mut world = World::new(Way::Submit, workers);
            let (steps, ..) = interrupted(&mut world, LONG, |_| async {}).await;
            assert!(steps < LONG, "it is over some time");
            (steps, world)
        })
    };
    let whole = [undisturbed(1), undisturbed(3)];
    for after in 0..=whole[0].0 {
        // One worker and three in turn: from step to step little changes.
        let (workers, (_, undisturbed)) = ([1, 3][after % 2], &whole[after % 2]);
        in_steps(async {
            let what = format!("{workers} workers, after {after} steps");
            let mut world = World::new(Way::Submit, workers);
            let (_, answers, output) = interrupted(&mut world, after, &happens).await;
            world.check_all_is_back(&what);
            world.check_the_rate(&what);
            check(&what, undisturbed, &world, answers, output);
        });
    }
}

#[test]
fn limits_that_change_and_change_back_at_any_moment_change_nothing() {
    at_every_moment(
        |world| {
            let (limiter, permits) = (world.limiter.clone(), world.permits.clone());
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
        |what, undisturbed, world, answers, ()| {
            assert!(answers.iter().all(Result::is_ok), "{what}: {answers:?}");
            assert_eq!(world.wire.arrivals(), undisturbed.wire.arrivals(), "{what}");
        },
    );
}

#[test]
fn a_limit_lowered_and_raised_again_at_any_moment_loses_nobody() {
    at_every_moment(
        |world| {
            let permits = world.permits.clone();
            async move {
                permits.set(1).unwrap();
                sleep(ms(30)).await;
                permits.set(2).unwrap();
            }
        },
        |what, _, world, answers, ()| {
            assert!(answers.iter().all(Result::is_ok), "{what}: {answers:?}");
            assert_eq!(world.wire.arrivals().len(), 6, "{what}");
        },
    );
}

#[test]
fn a_pause_at_any_moment_lets_nobody_through_until_it_ends() {
    let pause = ms(35);
    at_every_moment(
        |world| {
            let (limiter, begun) = (world.limiter.clone(), world.wire.begun);
            async move {
                limiter.pause_for(pause);
                begun.elapsed()
            }
        },
        |what, _, world, answers, from| {
            assert!(answers.iter().all(Result::is_ok), "{what}: {answers:?}");
            for at in world.wire.arrivals().values() {
                assert!(
                    *at <= from || *at >= from + pause,
                    "{what}: {at:?} in a pause from {from:?}"
                );
            }
        },
    );
}

#[test]
fn a_clock_that_jumps_at_any_moment_lets_no_burst_through() {
    at_every_moment(
        |_| time::advance(ms(200)),
        |what, _, world, answers, ()| {
            assert!(answers.iter().all(Result::is_ok), "{what}: {answers:?}");
            assert_eq!(world.wire.arrivals().len(), 6, "{what}");
        },
    );
}

#[test]
fn a_stop_at_any_moment_accounts_for_every_call_and_leaves_an_executor_that_starts_again() {
    for how in [Shutdown::Graceful, Shutdown::Within(ms(60)), Shutdown::Immediate] {
        at_every_moment(
            |world| {
                let (executor, wire, limiter) = (
                    world.executor.clone().unwrap(),
                    world.wire.clone(),
                    world.limiter.clone(),
                );
                let before = executor.monitor().totals();
                async move {
                    let begun = Instant::now();
                    let report = executor.stop(how).await;
                    assert_eq!(report.elapsed, begun.elapsed());
                    assert!(executor.submit(request("late")).await.unwrap_err().is_not_running());
                    let after = executor.monitor().totals();
                    assert_eq!(wire.busy.load(Ordering::SeqCst), 0);
                    let charged = TOKENS - limiter.available().tokens.unwrap();
                    assert_eq!(charged, wire.tokens());

                    executor.start().unwrap();
                    executor.submit(request("next")).await.unwrap().await.unwrap();
                    (before, report, after)
                }
            },
            |what, _, world, answers, (before, report, after)| {
                let what = format!("{how:?}, {what}: {report:?}");
                let ended = after.ended() - before.ended();
                assert_eq!(report.completed + report.failed + report.cancelled, ended, "{what}");
                assert_eq!((report.left, report.failed), (0, 0), "{what}");
                // Only who had no place yet is told later.
                let totals = (world.totals)();
                assert_eq!(totals.completed, after.completed + 1, "{what}");
                let refused = answers.iter().filter(|answer| answer.is_err()).count();
                assert_eq!(totals.cancelled as usize, refused, "{what}: {answers:?}");
                match how {
                    // Whoever had a place is finished.
                    Shutdown::Graceful => assert_eq!(report.cancelled, after.cancelled - before.cancelled, "{what}"),
                    Shutdown::Immediate => assert_eq!((report.completed, report.elapsed), (0, ms(0)), "{what}"),
                    Shutdown::Within(limit) => assert!(report.elapsed <= limit, "{what}"),
                }
                for answer in answers {
                    let Err(error) = answer else { continue };
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

// --- panics ---

/// Where others' code panics.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Panics {
    /// When the client is cloned for this call.
    Clone,
    Ready,
    Call,
    FirstPoll,
    LaterPoll,
    /// When its future is dropped, since the call is cancelled.
    FutureDropped,
    /// When nobody fetches the response, and it is dropped.
    ResponseDropped,
    /// When it is asked what a response is.
    Describe,
    /// When an error is asked what it says.
    ErrorText,
    /// When it is asked what a request costs; the first time in `submit`.
    Cost(usize),
    /// When it is asked what a request is, in `submit`.
    DescribeRequest,
    /// When the request is dropped, since the call is cancelled in the queue.
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

/// Goes off when it is dropped, if it is armed.
#[derive(Debug, Default)]
struct Bomb(bool);

impl Drop for Bomb {
    fn drop(&mut self) {
        assert!(!self.0, "dropped");
    }
}

struct Body {
    name: &'static str,
    bomb: Bomb,
}

#[derive(Debug)]
struct Unspeakable;

impl fmt::Display for Unspeakable {
    fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
        panic!("what it says")
    }
}

impl std::error::Error for Unspeakable {}

/// Breaks where it is told to, for the watched call. What belongs to no call breaks once, as soon as `armed`.
struct Fragile {
    panics: Panics,
    armed: Arc<Mutex<bool>>,
    wire: Wire,
}

impl Fragile {
    /// Whether it is to break here and now.
    fn breaks(&self, here: Panics) -> bool {
        self.panics == here && std::mem::take(&mut *self.armed.lock().unwrap())
    }
}

impl Clone for Fragile {
    fn clone(&self) -> Self {
        assert!(!self.breaks(Panics::Clone), "cloned");
        Self {
            panics: self.panics,
            armed: self.armed.clone(),
            wire: self.wire.clone(),
        }
    }
}

impl Service<Request<Body>> for Fragile {
    type Response = Response<Bomb>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Bomb>, BoxError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        assert!(!self.breaks(Panics::Ready), "made ready");
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut req: Request<Body>) -> Self::Future {
        req.body_mut().bomb.0 = false;
        let name = req.body().name;
        let busy = self.wire.arrive(name);
        let panics = Some(self.panics).filter(|_| name == WATCHED);
        assert_ne!(panics, Some(Panics::Call), "called");
        Box::pin(async move {
            let (_busy, _bomb) = (busy, Bomb(panics == Some(Panics::FutureDropped)));
            assert_ne!(panics, Some(Panics::FirstPoll), "polled");
            sleep(WIRE).await;
            assert_ne!(panics, Some(Panics::LaterPoll), "polled again");
            if panics == Some(Panics::ErrorText) {
                return Err(Unspeakable.into());
            }
            let mut response = Response::new(Bomb(panics == Some(Panics::ResponseDropped)));
            if panics.is_some() {
                *response.status_mut() = StatusCode::IM_A_TEAPOT;
            }
            Ok(response)
        })
    }
}

#[derive(Clone)]
struct Fussy(Panics);

impl Describe<Request<Body>, Response<Bomb>> for Fussy {
    fn request(&self, req: &Request<Body>, _: &mut RequestDetails) {
        let is_watched = req.body().name == WATCHED;
        assert!(!is_watched || self.0 != Panics::DescribeRequest, "asked what it is");
    }

    fn response(&self, res: &Response<Bomb>, _: &mut ResponseDetails) {
        let is_watched = res.status() == StatusCode::IM_A_TEAPOT;
        assert!(!is_watched || self.0 != Panics::Describe, "asked what came back");
    }
}

/// What came of all calls, with a panic that nobody hears of but who it happens to.
async fn with_a_panic(panics: Panics, workers: usize, armed_after: usize) -> usize {
    let what = (panics, workers, armed_after);
    let wire = Wire::new();
    let armed = Arc::new(Mutex::new(false));
    let fragile = Fragile {
        panics,
        armed: armed.clone(),
        wire: wire.clone(),
    };
    let asked = AtomicUsize::new(0);
    let limiter = RateLimiter::new(limits()).unwrap();
    let executor = Executor::builder()
        .queue_capacity(2)
        .workers(workers)
        .limiter(limiter.clone())
        .concurrency_limit(2)
        .describe(Fussy(panics))
        .cost(Asked {
            panics,
            asked: Arc::new(asked),
        })
        .build(fragile)
        .unwrap();
    executor.start().unwrap();
    let monitor = executor.monitor();
    let mut updates = monitor.subscribe();

    let submit = |name: &'static str| {
        let bomb = Bomb(name == WATCHED && panics == Panics::RequestDropped);
        task::spawn({
            let executor = executor.clone();
            async move { executor.submit(Request::new(Body { name, bomb })).await }
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
    while steps < LONG && over_after == 0 {
        if steps == armed_after {
            *armed.lock().unwrap() = true;
        }
        let status = event.as_ref().map(EventHandle::status);
        match (panics, status, &watched) {
            (Panics::FutureDropped, Some(RequestStatus::Calling), Some(handle)) => handle.cancel(),
            (Panics::ResponseDropped, Some(RequestStatus::Calling), Some(_)) => watched = None,
            (Panics::RequestDropped, Some(RequestStatus::Queued), Some(handle)) => {
                // The caller's own request: the caller hears it.
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
    assert!(over_after > 0, "{what:?}: it is over some time");
    for call in behind {
        handles.push(call.await.unwrap().unwrap());
    }
    let failed: Vec<_> = handles
        .iter()
        .filter(|call| call.event().status() == RequestStatus::Failed)
        .collect();
    let status = event.as_ref().map(EventHandle::status);
    let expected = match panics {
        // In whichever call it is.
        Panics::Clone | Panics::Ready => {
            let failed = failed.len() + usize::from(status == Some(RequestStatus::Failed));
            assert!(failed <= 1, "{what:?}: {failed} failed");
            let went_off = armed_after < LONG && !*armed.lock().unwrap();
            assert_eq!(failed == 1, went_off, "{what:?}");
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
    assert_eq!(wire.busy.load(Ordering::SeqCst), 0, "{what:?}");
    // Who paid and was not there panicked in between.
    let charged = TOKENS - limiter.available().tokens.unwrap();
    assert!(
        (0..=1).contains(&(charged - wire.arrivals().len() as u64)),
        "{what:?}: {charged}"
    );
    let report = executor.stop(Shutdown::Graceful).await;
    assert_eq!(report.elapsed, Duration::ZERO, "{what:?}");
    over_after
}

/// A token a call.
#[derive(Clone)]
struct Asked {
    panics: Panics,
    asked: Arc<AtomicUsize>,
}

impl RequestCost<Request<Body>> for Asked {
    fn cost(&self, req: &Request<Body>) -> Cost {
        if req.body().name == WATCHED {
            let nth = self.asked.fetch_add(1, Ordering::SeqCst) + 1;
            assert_ne!(self.panics, Panics::Cost(nth), "asked what it costs");
        }
        Cost::tokens(1)
    }
}

#[test]
fn a_panic_anywhere_fails_that_call_and_gives_everything_back() {
    for panics in EVERYWHERE {
        for workers in [1, 3] {
            in_steps(with_a_panic(panics, workers, 0));
        }
    }
}

#[test]
fn a_client_that_panics_when_it_is_cloned_or_made_ready_at_any_moment_fails_one_call_at_most() {
    for panics in [Panics::Clone, Panics::Ready] {
        let whole = in_steps(with_a_panic(panics, 1, LONG));
        for armed_after in 0..whole {
            in_steps(with_a_panic(panics, [1, 3][armed_after % 2], armed_after));
        }
    }
}

// --- ends ---

/// Says when it is dropped, and takes until it may.
struct Lingers {
    dropped: mpsc::Sender<()>,
    may: mpsc::Receiver<()>,
}

impl Drop for Lingers {
    fn drop(&mut self) {
        let _ = self.dropped.send(());
        let _ = self.may.recv();
    }
}

#[test]
fn a_stop_waits_until_the_last_call_is_told_that_its_runtime_has_ended() {
    let home = runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let executor = Executor::builder()
        .limits(Limits::new())
        .concurrency_limit(1)
        .build(service_fn(async |_: Request<Option<Lingers>>| {
            pending::<Result<Response<()>, BoxError>>().await
        }))
        .unwrap();
    let (dropped, is_dropped) = mpsc::channel();
    let (go, may) = mpsc::channel();
    let mut lingers = Some(Lingers { dropped, may });
    let calls = home.block_on(async {
        executor.start().unwrap();
        let mut calls = Vec::new();
        // On the wire, in the worker's hands, and two in the queue.
        for body in [None, None, lingers.take(), None] {
            calls.push(executor.submit(Request::new(body)).await.unwrap());
            while calls.len() == 1 && executor.monitor().calling() == 0 {
                yield_now().await;
            }
        }
        calls
    });
    let ends = thread::spawn(move || drop(home));
    is_dropped.recv().unwrap();
    let mut stop = task::spawn(executor.stop(Shutdown::Graceful));
    let told = calls.last().unwrap().event().clone();
    assert_eq!(told.status(), RequestStatus::Queued);
    assert!(stop.poll().is_pending(), "the last call has not been told yet");
    go.send(()).unwrap();
    ends.join().unwrap();
    assert!(stop.is_woken());
    let Poll::Ready(report) = stop.poll() else {
        panic!("everybody is told")
    };
    assert_eq!(told.status(), RequestStatus::Cancelled);
    assert_eq!((report.cancelled, executor.monitor().totals().cancelled), (1, 4));
}
