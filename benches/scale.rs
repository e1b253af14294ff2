//! Measures the costs of a queue with up to a million calls: memory and time per call to queue, make and cancel the
//! calls. Also measures the costs of waiting for a rate limit and of an idle executor.
//!
//! `cargo bench -p tower-outbound-benches --bench scale` takes about three minutes. `-- --quick` runs a tenth of the
//! calls, and `-- TEXT` runs only the sections whose names contain the text. The last lines of the output are for
//! programs: `scale <section>-<column> <n> = <figure>`.
//!
//! In each round, every size of the queue (`n`) is measured once. Each figure is the median of all rounds except the
//! first, which is a warm-up. Figures are per call. Times are processor time of the thread, and include the time to
//! count its allocations.
//!
//! | section | what is measured |
//! |---|---|
//! | `executor-kept`, `executor-dropped` | calls queued in an executor, whose handles are kept, or dropped at once |
//! | `queue-kept`, `queue-dropped` | calls queued by only a `QueueLayer`, with handles kept, or dropped at once |
//! | `cancel` | cancelling queued calls: by their handles, by dropping their futures, by stopping the executor |
//! | `wait-queue` | waiters of a rate limiter, which begin to wait and stop waiting |
//! | `idle` | an idle executor, and one with 1,000 callers that wait for an empty bucket |
//!
//! | column | meaning |
//! |---|---|
//! | `bytes`, `allocations` | in use while the calls are queued, including handles that are kept, without requests |
//! | `submit-ns` | to make a request and submit its call |
//! | `drain-ns` | from letting the first call end to the outcome of the last call |
//! | `total-ns` | `submit-ns` and `drain-ns` together |
//! | `faults` | page faults |
//! | `first-ns`, `first-faults` | `total-ns` and `faults` of the warm-up, in which memory may be new to the process |
//! | `…-ratio` | the time at the largest size, divided by the time at the smallest size |
//! | `handles-ns`, `futures-ns`, `stop-ns` | to cancel a call by its handle, by dropping its future, by a stop |
//! | `join-ns`, `leave-ns` | for a waiter to begin to wait, and to stop waiting |
//! | `wake-ups/s`, `parks/s`, `cpu-us/s` | wake-ups of all threads, parks of Tokio's workers, processor time in µs |

mod common;

use allocation_counter::{AllocationInfo, measure};
use clap::Parser;
use common::{median, thread_cpu_time};
use http::{Request, Response};
use std::{
    convert::Infallible,
    fs,
    future::Future,
    hint::black_box,
    iter,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Waker},
    thread,
    time::Duration,
};
use tokio::{
    runtime::{self, Runtime},
    sync::Semaphore,
    task::yield_now,
};
use tower::{Service, ServiceBuilder, ServiceExt, service_fn};
use tower_outbound::{
    CallHandle, ConcurrencyLimitLayer, Cost, Executor, ExecutorBuilder, Limits, Queue, QueueLayer, Rate, RateLimiter,
    Shutdown, queue::ResponseFuture,
};

const URL: &str = "https://api.example.com/v1/chat/completions";
/// A rate per second that is never reached.
const UNREACHED: u64 = 1_000_000_000_000;
/// The smallest number of calls in a round: with smaller sizes of the queue, queueing and running the calls is repeated
/// until this number is reached.
const CALLS_PER_ROUND: usize = 100_000;
/// The number of rounds of the sections without ratios.
const FEW_ROUNDS: usize = 3;
/// How long an idle executor is observed.
const OBSERVATION: Duration = Duration::from_secs(3);

const BYTES: Bar = Bar { max: 768.0, aim: 512.0 };
const RATIO: Bar = Bar { max: 1.5, aim: 1.2 };
const NONE: Bar = Bar { max: 0.0, aim: 0.0 };

type Section = fn(&Scale, &mut Table);

const SECTIONS: [(&str, Section); 7] = [
    ("executor-kept", queued::<Executor<(), ()>, true>),
    ("executor-dropped", queued::<Executor<(), ()>, false>),
    ("queue-kept", queued::<Queue<Request<()>, Response<()>>, true>),
    ("queue-dropped", queued::<Queue<Request<()>, Response<()>>, false>),
    ("cancel", cancel),
    ("wait-queue", wait_queue),
    ("idle", idle),
];

#[derive(Parser)]
struct Options {
    /// Run only the sections whose name contains this text
    filter: Option<String>,
    /// Run with a tenth of the calls, and fewer rounds
    #[arg(long)]
    quick: bool,
    /// Passed by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

/// The sizes of the queue that are measured, and the number of rounds.
struct Scale {
    sizes: [usize; 3],
    rounds: usize,
}

// === A queue whose calls wait ===

/// Makes a client whose calls block until the bench unblocks them.
#[derive(Clone)]
struct Blocker {
    permit: Arc<Semaphore>,
    /// The number of calls that have ended.
    ended: Arc<AtomicUsize>,
}

/// A started executor or queue with a concurrency limit of one.
trait Subject: Sized {
    type Call;

    fn start(capacity: usize, blocker: &Blocker) -> Self;
    async fn submit(&mut self) -> Self::Call;
    async fn response(call: Self::Call);
    /// Drops the handle without cancelling the call.
    fn detach(call: Self::Call);
    fn depth(&self) -> usize;
}

impl Blocker {
    fn new() -> Self {
        Self {
            permit: Arc::new(Semaphore::new(0)),
            ended: Arc::default(),
        }
    }

    fn unblock(&self) {
        self.permit.add_permits(1);
    }

    async fn block(&self) {
        self.permit.acquire().await.expect("the semaphore is open").forget();
    }

    fn ended(&self) -> usize {
        self.ended.load(Ordering::Relaxed)
    }

    fn client(
        &self,
    ) -> impl Service<Request<()>, Response = Response<()>, Error = Infallible, Future: Send> + Clone + Send + 'static
    {
        let blocker = self.clone();
        service_fn(move |_| {
            let blocker = blocker.clone();
            async move {
                let _permit = blocker.permit.acquire().await;
                blocker.ended.fetch_add(1, Ordering::Relaxed);
                Ok(Response::new(()))
            }
        })
    }
}

impl Subject for Executor<(), ()> {
    type Call = CallHandle<(), ()>;

    fn start(capacity: usize, blocker: &Blocker) -> Self {
        let executor = ExecutorBuilder::new()
            .queue_capacity(capacity)
            .concurrency_limit(1)
            .requests(Rate::per_second(UNREACHED))
            .tokens(Rate::per_second(UNREACHED))
            .build(blocker.client())
            .expect("the settings are valid");
        executor.start().expect("there is a runtime");
        executor
    }

    async fn submit(&mut self) -> Self::Call {
        Self::submit(self, request()).await.expect("the executor is running")
    }

    async fn response(call: Self::Call) {
        black_box(call.await.expect("the call succeeds"));
    }

    fn detach(call: Self::Call) {
        drop(call);
    }

    fn depth(&self) -> usize {
        self.monitor().queue_depth()
    }
}

impl Subject for Queue<Request<()>, Response<()>> {
    type Call = ResponseFuture<Request<()>, Response<()>>;

    fn start(capacity: usize, blocker: &Blocker) -> Self {
        ServiceBuilder::new()
            .layer(QueueLayer::new(capacity).expect("the capacity is valid"))
            .layer(ConcurrencyLimitLayer::new(1).expect("the limit is valid"))
            .service(blocker.client())
    }

    async fn submit(&mut self) -> Self::Call {
        self.ready().await.expect("the queue is open").call(request())
    }

    async fn response(call: Self::Call) {
        black_box(call.await.expect("the call succeeds"));
    }

    fn detach(call: Self::Call) {
        call.detach();
    }

    fn depth(&self) -> usize {
        Self::depth(self)
    }
}

fn request() -> Request<()> {
    Request::post(URL).body(()).expect("the request is valid")
}

/// Submits a call and waits until it is in flight, where the blocker blocks it. All later calls wait in the queue.
async fn submit_first<S: Subject>(subject: &mut S) -> S::Call {
    let first = subject.submit().await;
    while subject.depth() > 0 {
        yield_now().await;
    }
    first
}

/// Queues `n` calls, and returns their handles. If `keep` is false, only the last handle is returned, with which the
/// caller can wait for the end of all calls.
async fn fill<S: Subject>(subject: &mut S, n: usize, keep: bool) -> Vec<S::Call> {
    let mut calls = Vec::with_capacity(if keep { n } else { 1 });
    for _ in 0..n {
        if !keep {
            calls.pop().into_iter().for_each(S::detach);
        }
        calls.push(subject.submit().await);
    }
    calls
}

// === Queued calls ===

/// The figures of one size of the queue in one round, per call.
struct Queued {
    memory: Memory,
    submit_ns: f64,
    drain_ns: f64,
    page_faults: f64,
}

impl Queued {
    const fn total_ns(&self) -> f64 {
        self.submit_ns + self.drain_ns
    }
}

/// The memory in use while all calls are queued, per call.
struct Memory {
    bytes: f64,
    allocations: f64,
}

impl Memory {
    fn per_call(counted: &AllocationInfo, n: usize) -> Self {
        Self {
            bytes: counted.bytes_current as f64 / n as f64,
            allocations: counted.count_current as f64 / n as f64,
        }
    }
}

/// Measures queued calls whose handles the caller keeps, or drops at once.
fn queued<S: Subject, const KEEP: bool>(scale: &Scale, table: &mut Table) {
    let runtime = current_thread();
    let round = || scale.sizes.map(|n| queue_and_drain::<S>(&runtime, n, KEEP));
    let first = round();
    let rounds: Vec<_> = iter::repeat_with(round).take(scale.rounds).collect();
    let request = bare_requests(scale.sizes[0]);

    for (size, n) in scale.sizes.into_iter().enumerate() {
        let median = |figure: fn(&Queued) -> f64| median(rounds.iter().map(|sizes| figure(&sizes[size])));
        table.add("bytes", n, median(|queued| queued.memory.bytes) - request.bytes);
        table.add(
            "allocations",
            n,
            median(|queued| queued.memory.allocations) - request.allocations,
        );
        table.add("submit-ns", n, median(|queued| queued.submit_ns));
        table.add("drain-ns", n, median(|queued| queued.drain_ns));
        table.add("total-ns", n, median(Queued::total_ns));
        table.add("faults", n, median(|queued| queued.page_faults));
        table.add("first-ns", n, first[size].total_ns());
        table.add("first-faults", n, first[size].page_faults);
    }
    let [_, _, most] = scale.sizes;
    let ratio = |figure: fn(&Queued) -> f64| median(rounds.iter().map(|[few, _, many]| figure(many) / figure(few)));
    table.add("submit-ratio", most, ratio(|queued| queued.submit_ns));
    table.add("drain-ratio", most, ratio(|queued| queued.drain_ns));
    table.add("total-ratio", most, ratio(Queued::total_ns));
    table.bar("bytes", most, BYTES);
    table.bar("total-ratio", most, RATIO);
}

/// Queues `n` calls and lets them run, and repeats this until there were [`CALLS_PER_ROUND`] calls. The memory is that
/// of the first repetition.
fn queue_and_drain<S: Subject>(runtime: &Runtime, n: usize, keep: bool) -> Queued {
    let times = CALLS_PER_ROUND.div_ceil(n);
    let blocker = Blocker::new();
    let mut subject = runtime.block_on(async { S::start(n + 1, &blocker) });
    let (mut submit, mut drain) = (Duration::ZERO, Duration::ZERO);
    let mut memory = None;
    let faults_before = page_faults();
    for time in 1..=times {
        let first = runtime.block_on(submit_first(&mut subject));
        let mut calls = Vec::new();
        let begun = ThreadTime::now();
        let counted = measure(|| calls = runtime.block_on(fill(&mut subject, n, keep)));
        submit += begun.elapsed();
        assert_eq!(subject.depth(), n, "all calls are queued");
        memory.get_or_insert(Memory::per_call(&counted, n));

        let begun = ThreadTime::now();
        runtime.block_on(async {
            blocker.unblock();
            for call in iter::once(first).chain(calls) {
                S::response(call).await;
            }
        });
        drain += begun.elapsed();
        assert_eq!(subject.depth(), 0);
        assert_eq!(blocker.ended(), time * (n + 1), "each call was made once");
        runtime.block_on(blocker.block());
    }
    let calls = (times * n) as f64;
    Queued {
        memory: memory.expect("there is at least one repetition"),
        submit_ns: submit.as_nanos() as f64 / calls,
        drain_ns: drain.as_nanos() as f64 / calls,
        page_faults: page_faults().saturating_sub(faults_before) as f64 / calls,
    }
}

/// The memory of a request that belongs to no call.
fn bare_requests(n: usize) -> Memory {
    let mut requests = Vec::new();
    let counted = measure(|| requests = iter::repeat_with(request).take(n).collect());
    assert_eq!(black_box(requests).capacity(), n);
    Memory::per_call(&counted, n)
}

// === Cancelling ===

fn cancel(scale: &Scale, table: &mut Table) {
    let [_, _, n] = scale.sizes;
    table.add("handles-ns", n, time_to_cancel(n, cancel_handles));
    table.add("futures-ns", n, time_to_cancel(n, drop_futures));
    table.add("stop-ns", n, time_to_cancel(n, stop));
}

/// Returns the nanoseconds per call in which `cancel` cancels `n` queued calls.
fn time_to_cancel<S: Subject>(n: usize, cancel: impl AsyncFn(S, Blocker, Vec<S::Call>) -> Duration) -> f64 {
    let runtime = current_thread();
    let round = || {
        runtime.block_on(async {
            let blocker = Blocker::new();
            let mut subject = S::start(n + 1, &blocker);
            let first = submit_first(&mut subject).await;
            let calls = fill(&mut subject, n, true).await;
            assert_eq!(subject.depth(), n, "all calls are queued");
            let elapsed = cancel(subject, blocker, calls).await;
            drop(first);
            elapsed.as_nanos() as f64 / n as f64
        })
    };
    median(iter::repeat_with(round).take(FEW_ROUNDS + 1).skip(1))
}

/// Cancels each call by its handle.
async fn cancel_handles(executor: Executor<(), ()>, blocker: Blocker, calls: Vec<CallHandle<(), ()>>) -> Duration {
    let n = calls.len() as u64;
    let begun = ThreadTime::now();
    for call in calls {
        call.cancel();
    }
    let elapsed = begun.elapsed();

    let monitor = executor.monitor();
    assert_eq!((monitor.queue_depth(), monitor.totals().cancelled), (0, n));
    blocker.unblock();
    let report = executor.stop(Shutdown::Graceful).await;
    assert_eq!((report.completed, report.cancelled, blocker.ended()), (1, 0, 1));
    elapsed
}

/// Cancels each call by dropping its future.
async fn drop_futures(
    queue: Queue<Request<()>, Response<()>>,
    blocker: Blocker,
    calls: Vec<ResponseFuture<Request<()>, Response<()>>>,
) -> Duration {
    let begun = ThreadTime::now();
    drop(calls);
    let elapsed = begun.elapsed();

    assert_eq!(queue.depth(), 0);
    blocker.unblock();
    queue.close();
    queue.ended().await;
    assert_eq!(blocker.ended(), 1, "only the first call was made");
    elapsed
}

/// Cancels all calls by stopping the executor, while their handles still exist.
async fn stop(executor: Executor<(), ()>, blocker: Blocker, calls: Vec<CallHandle<(), ()>>) -> Duration {
    let begun = ThreadTime::now();
    let report = executor.stop(Shutdown::Immediate).await;
    let elapsed = begun.elapsed();

    let monitor = executor.monitor();
    let (all, totals) = (calls.len() as u64 + 1, monitor.totals());
    assert_eq!((report.cancelled, totals.opened, totals.cancelled), (all, all, all));
    assert_eq!((monitor.queue_depth(), blocker.ended()), (0, 0));
    elapsed
}

// === Waiting ===

fn slow_rate() -> Rate {
    Rate::per_hour(1).burst(1)
}

/// Measures waiters in the wait queue of a rate limiter. Their bytes are those of the wait queue, without the futures,
/// which the callers allocate.
fn wait_queue(scale: &Scale, table: &mut Table) {
    let runtime = current_thread();
    for n in scale.sizes {
        let round = || runtime.block_on(async { join_and_leave(n) });
        let rounds: Vec<_> = iter::repeat_with(round).take(FEW_ROUNDS + 1).skip(1).collect();
        for (figure, column) in ["bytes", "join-ns", "leave-ns"].into_iter().enumerate() {
            table.add(column, n, median(rounds.iter().map(|round| round[figure] / n as f64)));
        }
    }
}

/// Lets `n` waiters join the wait queue of a rate limiter and leave it. Returns for all of them together the bytes, the
/// nanoseconds to join, and the nanoseconds to leave.
fn join_and_leave(n: usize) -> [f64; 3] {
    let limiter = RateLimiter::new(Limits::new().requests(slow_rate())).expect("the rate is valid");
    limiter
        .try_acquire(Cost::request())
        .expect("the bucket holds the cost of the first call");
    let wait = || Box::pin(limiter.acquire(Cost::request()));
    let mut waiters: Vec<_> = iter::repeat_with(wait).take(n).collect();

    let begun = ThreadTime::now();
    let counted = measure(|| {
        let mut cx = Context::from_waker(Waker::noop());
        for waiter in &mut waiters {
            assert!(waiter.as_mut().poll(&mut cx).is_pending());
        }
    });
    let joined = begun.elapsed();
    let begun = ThreadTime::now();
    drop(waiters);
    let left = begun.elapsed();
    [
        counted.bytes_current as f64,
        joined.as_nanos() as f64,
        left.as_nanos() as f64,
    ]
}

/// Measures an executor without calls, and an executor whose callers wait for a bucket that stays empty.
fn idle(_: &Scale, table: &mut Table) {
    for callers in [0, 1_000] {
        let runtime = runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .expect("a runtime can be built");
        let executor = runtime.block_on(async { start_idle(callers) });
        while executor.monitor().in_flight() < callers {
            thread::sleep(Duration::from_millis(10));
        }
        thread::sleep(Duration::from_millis(500));

        let parks = || -> u64 {
            let metrics = runtime.metrics();
            (0..metrics.num_workers())
                .map(|worker| metrics.worker_park_count(worker))
                .sum()
        };
        let (Some(before), parks_before) = (Threads::read(), parks()) else {
            println!("idle: not measured, because there is no /proc as on Linux");
            return;
        };
        thread::sleep(OBSERVATION);
        let (after, parks) = (Threads::read().expect("there is a /proc"), parks() - parks_before);

        let monitor = executor.monitor();
        assert_eq!(
            (monitor.in_flight(), monitor.calling()),
            (callers, 0),
            "no call was admitted"
        );
        let per_second = |total: f64| total / OBSERVATION.as_secs_f64();
        let cpu = (after.cpu - before.cpu).as_nanos() as f64 / 1_000.0;
        table.add(
            "wake-ups/s",
            callers,
            per_second((after.wakeups - before.wakeups) as f64),
        );
        table.add("parks/s", callers, per_second(parks as f64));
        table.add("cpu-us/s", callers, per_second(cpu));
        table.bar("wake-ups/s", callers, NONE);
        runtime.shutdown_background();
    }
}

fn start_idle(callers: usize) -> Executor<(), ()> {
    let blocker = Blocker::new();
    blocker.unblock();
    let executor = ExecutorBuilder::new()
        .concurrency_limit(callers.max(1))
        .requests(slow_rate())
        .build(blocker.client())
        .expect("the settings are valid");
    executor.start().expect("there is a runtime");
    let monitor = executor.monitor();
    monitor
        .limiter()
        .local()
        .expect("the limiter is local")
        .try_acquire(Cost::request())
        .expect("the bucket holds the cost of the first call");
    for _ in 0..callers {
        let executor = executor.clone();
        tokio::spawn(async move { executor.submit(request()).await.expect("the executor is running").await });
    }
    executor
}

/// The processor time and wake-ups of all threads of this process except the current one.
struct Threads {
    cpu: Duration,
    /// The number of voluntary context switches: a thread that waits and is woken makes one.
    wakeups: u64,
}

impl Threads {
    /// Reads the figures from `/proc`. Returns `None` on a system without a `/proc` like that of Linux.
    fn read() -> Option<Self> {
        let own = fs::read_link("/proc/thread-self").ok()?;
        let mut threads = Self {
            cpu: Duration::ZERO,
            wakeups: 0,
        };
        for task in fs::read_dir("/proc/self/task").ok()? {
            let task = task.ok()?;
            if own.file_name() == Some(&task.file_name()) {
                continue;
            }
            let schedule = fs::read_to_string(task.path().join("schedstat")).ok()?;
            threads.cpu += Duration::from_nanos(schedule.split_whitespace().next()?.parse().ok()?);
            let status = fs::read_to_string(task.path().join("status")).ok()?;
            let switches = status
                .lines()
                .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"))?;
            threads.wakeups += switches.trim().parse::<u64>().ok()?;
        }
        Some(threads)
    }
}

/// The number of page faults of the current thread so far; zero where the system does not report them.
fn page_faults() -> u64 {
    let stat = fs::read_to_string("/proc/thread-self/stat").unwrap_or_default();
    // The name of the thread is in parentheses and may contain spaces, so the fields are counted after its end.
    let fields = stat.rsplit(')').next().unwrap_or_default();
    fields
        .split_whitespace()
        .nth(7)
        .and_then(|count| count.parse().ok())
        .unwrap_or(0)
}

// === The report ===

/// The figures of a section: a column for each kind of figure, a row for each size.
struct Table {
    section: &'static str,
    figures: Vec<(&'static str, usize, f64)>,
    bars: Vec<(&'static str, usize, Bar)>,
}

/// The largest acceptable value of a figure, and the value to aim for.
struct Bar {
    max: f64,
    aim: f64,
}

impl Table {
    const fn new(section: &'static str) -> Self {
        Self {
            section,
            figures: Vec::new(),
            bars: Vec::new(),
        }
    }

    fn add(&mut self, column: &'static str, n: usize, figure: f64) {
        self.figures.push((column, n, figure));
    }

    fn bar(&mut self, column: &'static str, n: usize, bar: Bar) {
        self.bars.push((column, n, bar));
    }

    fn figure(&self, column: &str, n: usize) -> Option<f64> {
        let mut figures = self.figures.iter();
        figures.find_map(|&(name, size, figure)| (name == column && size == n).then_some(figure))
    }

    fn print(&self) {
        let (mut columns, mut sizes) = (Vec::new(), Vec::new());
        for &(column, n, _) in &self.figures {
            if !columns.contains(&column) {
                columns.push(column);
            }
            if !sizes.contains(&n) {
                sizes.push(n);
            }
        }
        print!("{:<17}{:>9}", self.section, "n");
        columns.iter().for_each(|column| print!(" {column:>12}"));
        for n in sizes {
            print!("\n{:<17}{n:>9}", "");
            for column in &columns {
                let figure = self.figure(column, n).map(|figure| format!("{figure:.2}"));
                print!(" {:>12}", figure.unwrap_or_default());
            }
        }
        println!("\n");
    }

    fn print_verdicts(&self) {
        for (column, n, Bar { max, aim }) in &self.bars {
            let Some(figure) = self.figure(column, *n) else {
                continue;
            };
            let verdict = match figure {
                figure if figure <= *aim => "ok",
                figure if figure <= *max => "ok, aim not reached",
                _ => "not reached",
            };
            let name = format!("{}-{column}", self.section);
            println!("{name:<32}{n:>9} {figure:>9.2} {max:>6} {aim:>6}  {verdict}");
        }
    }

    fn print_for_programs(&self) {
        for (column, n, figure) in &self.figures {
            println!("scale {}-{column} {n} = {figure:.2}", self.section);
        }
    }
}

fn current_thread() -> Runtime {
    runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime can be built")
}

fn main() {
    let options = Options::parse();
    let scale = if options.quick {
        Scale {
            sizes: [1_000, 10_000, 100_000],
            rounds: 3,
        }
    } else {
        Scale {
            sizes: [1_000, 100_000, 1_000_000],
            rounds: 9,
        }
    };
    let mut tables = Vec::new();
    for (section, measure) in SECTIONS {
        if options.filter.as_ref().is_none_or(|filter| section.contains(filter)) {
            let mut table = Table::new(section);
            measure(&scale, &mut table);
            table.print();
            tables.push(table);
        }
    }
    println!("{:<32}{:>9} {:>9} {:>6} {:>6}", "", "n", "figure", "bar", "aim");
    tables.iter().for_each(Table::print_verdicts);
    println!();
    tables.iter().for_each(Table::print_for_programs);
}

/// A stopwatch for the processor time of the current thread.
struct ThreadTime(Duration);

impl ThreadTime {
    fn now() -> Self {
        Self(thread_cpu_time())
    }

    fn elapsed(&self) -> Duration {
        thread_cpu_time() - self.0
    }
}
