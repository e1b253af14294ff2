//! What a queue costs when a million calls are in it: memory and time for each of them, queued, made and cancelled; and
//! what it costs to wait.
//!
//! `cargo bench -p tower-outbound-benches --bench scale`, with `-- --quick` for a tenth of the calls, and with part
//! of a section's name for that one alone. The sizes of a queue take turns in every round, and each figure is the
//! median of the rounds; the first only warms up. Figures are for one call, and times are the thread's CPU time,
//! counting its allocations included. The last lines are for machines: `scale <section>-<column> <n> = <figure>`.
//!
//! - *Bytes* and *allocations* are those live while the calls are queued: with the handle that the caller keeps,
//!   without the request.
//! - *Submit* includes making the request. *Drain* is from the moment the first call may end to the last one's outcome.
//! - *Faults* are page faults. In the *first* round, which is the warm-up, memory may be new to the process.
//! - *Ratio* is the time at the largest size to that at the smallest.

use allocation_counter::{AllocationInfo, measure};
use clap::Parser;
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
/// Never reached.
const PLENTY: u64 = 1_000_000_000_000;
/// In each round a small size is repeated until there were so many calls.
const CALLS_PER_ROUND: usize = 100_000;
/// Where no ratio is told.
const FEW_ROUNDS: usize = 3;
const WATCH: Duration = Duration::from_secs(3);

const BYTES: Bar = Bar {
    most: 768.0,
    aim: 512.0,
};
const RATIO: Bar = Bar { most: 1.5, aim: 1.2 };
const NONE: Bar = Bar { most: 0.0, aim: 0.0 };

type Section = fn(&Scale, &mut Table);

const SECTIONS: [(&str, Section); 7] = [
    ("executor-kept", queued::<Executor<(), ()>, true>),
    ("executor-dropped", queued::<Executor<(), ()>, false>),
    ("queue-kept", queued::<Queue<Request<()>, Response<()>>, true>),
    ("queue-dropped", queued::<Queue<Request<()>, Response<()>>, false>),
    ("cancel", cancel),
    ("line", line),
    ("idle", idle),
];

#[derive(Parser)]
struct Options {
    /// Only the sections whose name contains this.
    filter: Option<String>,
    /// A tenth of the calls, and fewer rounds.
    #[arg(long)]
    quick: bool,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

/// How much to measure.
struct Scale {
    sizes: [usize; 3],
    rounds: usize,
}

// === A queue whose calls wait ===

/// Every call of its client waits until it is open.
#[derive(Clone)]
struct Gate {
    open: Arc<Semaphore>,
    made: Arc<AtomicUsize>,
}

/// A started queue, one call of which is made at a time.
trait Subject: Sized {
    type Call;

    fn start(capacity: usize, gate: &Gate) -> Self;
    async fn submit(&mut self) -> Self::Call;
    async fn response(call: Self::Call);
    fn let_run(call: Self::Call);
    fn depth(&self) -> usize;
}

impl Gate {
    fn closed() -> Self {
        Self {
            open: Arc::new(Semaphore::new(0)),
            made: Arc::default(),
        }
    }

    fn open(&self) {
        self.open.add_permits(1);
    }

    async fn close(&self) {
        self.open.acquire().await.expect("an open semaphore").forget();
    }

    fn made(&self) -> usize {
        self.made.load(Ordering::Relaxed)
    }

    fn client(
        &self,
    ) -> impl Service<Request<()>, Response = Response<()>, Error = Infallible, Future: Send> + Clone + Send + 'static
    {
        let gate = self.clone();
        service_fn(move |_| {
            let gate = gate.clone();
            async move {
                let _open = gate.open.acquire().await;
                gate.made.fetch_add(1, Ordering::Relaxed);
                Ok(Response::new(()))
            }
        })
    }
}

impl Subject for Executor<(), ()> {
    type Call = CallHandle<(), ()>;

    fn start(capacity: usize, gate: &Gate) -> Self {
        let executor = ExecutorBuilder::new()
            .queue_capacity(capacity)
            .concurrency_limit(1)
            .requests(Rate::per_second(PLENTY))
            .tokens(Rate::per_second(PLENTY))
            .build(gate.client())
            .expect("the settings make sense");
        executor.start().expect("a runtime");
        executor
    }

    async fn submit(&mut self) -> Self::Call {
        Self::submit(self, request()).await.expect("it runs")
    }

    async fn response(call: Self::Call) {
        black_box(call.await.expect("a response"));
    }

    fn let_run(call: Self::Call) {
        drop(call);
    }

    fn depth(&self) -> usize {
        self.monitor().queue_depth()
    }
}

impl Subject for Queue<Request<()>, Response<()>> {
    type Call = ResponseFuture<Request<()>, Response<()>>;

    fn start(capacity: usize, gate: &Gate) -> Self {
        ServiceBuilder::new()
            .layer(QueueLayer::new(capacity).expect("a capacity"))
            .layer(ConcurrencyLimitLayer::new(1).expect("a limit"))
            .service(gate.client())
    }

    async fn submit(&mut self) -> Self::Call {
        self.ready().await.expect("it is open").call(request())
    }

    async fn response(call: Self::Call) {
        black_box(call.await.expect("a response"));
    }

    fn let_run(call: Self::Call) {
        call.detach();
    }

    fn depth(&self) -> usize {
        Self::depth(self)
    }
}

fn request() -> Request<()> {
    Request::post(URL).body(()).expect("a request")
}

/// Makes a call that waits at the gate, and all later ones behind it.
async fn hold<S: Subject>(subject: &mut S) -> S::Call {
    let first = subject.submit().await;
    while subject.depth() > 0 {
        yield_now().await;
    }
    first
}

/// Queues `n` calls. If their handles are not kept, the last one's is returned all the same, to wait for it.
async fn fill<S: Subject>(subject: &mut S, n: usize, keep: bool) -> Vec<S::Call> {
    let mut calls = Vec::with_capacity(if keep { n } else { 1 });
    for _ in 0..n {
        if !keep {
            calls.pop().into_iter().for_each(S::let_run);
        }
        calls.push(subject.submit().await);
    }
    calls
}

// === Queued calls ===

/// One size in one round, for one call.
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

/// What there is of it when all calls are queued, for one of them.
struct Memory {
    bytes: f64,
    allocations: f64,
}

impl Memory {
    fn each(counted: &AllocationInfo, n: usize) -> Self {
        Self {
            bytes: counted.bytes_current as f64 / n as f64,
            allocations: counted.count_current as f64 / n as f64,
        }
    }
}

/// Calls whose handles the caller keeps, or drops at once.
fn queued<S: Subject, const KEEP: bool>(scale: &Scale, table: &mut Table) {
    let runtime = current_thread();
    let round = || scale.sizes.map(|n| queue_and_drain::<S>(&runtime, n, KEEP));
    let first = round();
    let rounds: Vec<_> = iter::repeat_with(round).take(scale.rounds).collect();
    let request = request_alone(scale.sizes[0]);

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

/// Queues `n` calls and lets them run, as often as makes a round. The memory is that of the first time.
fn queue_and_drain<S: Subject>(runtime: &Runtime, n: usize, keep: bool) -> Queued {
    let times = CALLS_PER_ROUND.div_ceil(n);
    let gate = Gate::closed();
    let mut subject = runtime.block_on(async { S::start(n + 1, &gate) });
    let (mut submit, mut drain) = (Duration::ZERO, Duration::ZERO);
    let mut memory = None;
    let faults_before = page_faults();
    for time in 1..=times {
        let first = runtime.block_on(hold(&mut subject));
        let mut calls = Vec::new();
        let begun = ThreadTime::now();
        let counted = measure(|| calls = runtime.block_on(fill(&mut subject, n, keep)));
        submit += begun.elapsed();
        assert_eq!(subject.depth(), n, "all are queued");
        memory.get_or_insert(Memory::each(&counted, n));

        let begun = ThreadTime::now();
        runtime.block_on(async {
            gate.open();
            for call in iter::once(first).chain(calls) {
                S::response(call).await;
            }
        });
        drain += begun.elapsed();
        assert_eq!(subject.depth(), 0);
        assert_eq!(gate.made(), time * (n + 1), "each was made once");
        runtime.block_on(gate.close());
    }
    let calls = (times * n) as f64;
    Queued {
        memory: memory.expect("there was a first time"),
        submit_ns: submit.as_nanos() as f64 / calls,
        drain_ns: drain.as_nanos() as f64 / calls,
        page_faults: page_faults().saturating_sub(faults_before) as f64 / calls,
    }
}

/// What a request takes by itself.
fn request_alone(n: usize) -> Memory {
    let mut requests = Vec::new();
    let counted = measure(|| requests = iter::repeat_with(request).take(n).collect());
    assert_eq!(black_box(requests).capacity(), n);
    Memory::each(&counted, n)
}

// === Cancelling ===

fn cancel(scale: &Scale, table: &mut Table) {
    let [_, _, n] = scale.sizes;
    table.add("handles-ns", n, cancelled(n, cancel_handles));
    table.add("futures-ns", n, cancelled(n, drop_futures));
    table.add("stop-ns", n, cancelled(n, stop));
}

/// Nanoseconds for each of `n` queued calls, which `cancel` cancels.
fn cancelled<S: Subject>(n: usize, cancel: impl AsyncFn(S, Gate, Vec<S::Call>) -> Duration) -> f64 {
    let runtime = current_thread();
    let round = || {
        runtime.block_on(async {
            let gate = Gate::closed();
            let mut subject = S::start(n + 1, &gate);
            let first = hold(&mut subject).await;
            let calls = fill(&mut subject, n, true).await;
            assert_eq!(subject.depth(), n, "all are queued");
            let elapsed = cancel(subject, gate, calls).await;
            drop(first);
            elapsed.as_nanos() as f64 / n as f64
        })
    };
    median(iter::repeat_with(round).take(FEW_ROUNDS + 1).skip(1))
}

/// Each call by its handle, which is dropped.
async fn cancel_handles(executor: Executor<(), ()>, gate: Gate, calls: Vec<CallHandle<(), ()>>) -> Duration {
    let n = calls.len() as u64;
    let begun = ThreadTime::now();
    for call in calls {
        call.cancel();
    }
    let elapsed = begun.elapsed();

    let monitor = executor.monitor();
    assert_eq!((monitor.queue_depth(), monitor.totals().cancelled), (0, n));
    gate.open();
    let report = executor.stop(Shutdown::Graceful).await;
    assert_eq!((report.completed, report.cancelled, gate.made()), (1, 0, 1));
    elapsed
}

/// Each call by dropping its future.
async fn drop_futures(
    queue: Queue<Request<()>, Response<()>>,
    gate: Gate,
    calls: Vec<ResponseFuture<Request<()>, Response<()>>>,
) -> Duration {
    let begun = ThreadTime::now();
    drop(calls);
    let elapsed = begun.elapsed();

    assert_eq!(queue.depth(), 0);
    gate.open();
    queue.close();
    queue.ended().await;
    assert_eq!(gate.made(), 1, "only the first was made");
    elapsed
}

/// All at once. The handles are still there.
async fn stop(executor: Executor<(), ()>, gate: Gate, calls: Vec<CallHandle<(), ()>>) -> Duration {
    let begun = ThreadTime::now();
    let report = executor.stop(Shutdown::Immediate).await;
    let elapsed = begun.elapsed();

    let monitor = executor.monitor();
    let (all, totals) = (calls.len() as u64 + 1, monitor.totals());
    assert_eq!((report.cancelled, totals.opened, totals.cancelled), (all, all, all));
    assert_eq!((monitor.queue_depth(), gate.made()), (0, 0));
    elapsed
}

// === Waiting ===

fn slow_rate() -> Rate {
    Rate::per_hour(1).burst(1)
}

/// Waiters in a limiter's own line. Their bytes are the line's; the futures are the callers'.
fn line(scale: &Scale, table: &mut Table) {
    let runtime = current_thread();
    for n in scale.sizes {
        let round = || runtime.block_on(async { join_and_leave(n) });
        let rounds: Vec<_> = iter::repeat_with(round).take(FEW_ROUNDS + 1).skip(1).collect();
        for (figure, column) in ["bytes", "join-ns", "leave-ns"].into_iter().enumerate() {
            table.add(column, n, median(rounds.iter().map(|round| round[figure] / n as f64)));
        }
    }
}

/// Bytes, and nanoseconds to join the line and to leave it again, for all together.
fn join_and_leave(n: usize) -> [f64; 3] {
    let limiter = RateLimiter::new(Limits::new().requests(slow_rate())).expect("the rate makes sense");
    limiter.try_acquire(Cost::request()).expect("the first is free");
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

/// An executor that has nothing to do, and one whose callers wait for a bucket that stays empty.
fn idle(_: &Scale, table: &mut Table) {
    for callers in [0, 1_000] {
        let runtime = runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .expect("a runtime");
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
        let (Some(before), parks_before) = (Threads::look(), parks()) else {
            println!("idle: not measured, there is no Linux /proc");
            return;
        };
        thread::sleep(WATCH);
        let (after, parks) = (Threads::look().expect("/proc"), parks() - parks_before);

        let monitor = executor.monitor();
        assert_eq!(
            (monitor.in_flight(), monitor.calling()),
            (callers, 0),
            "nobody was admitted"
        );
        let a_second = |total: f64| total / WATCH.as_secs_f64();
        let cpu = (after.cpu - before.cpu).as_nanos() as f64 / 1_000.0;
        table.add("wake-ups/s", callers, a_second((after.wakeups - before.wakeups) as f64));
        table.add("parks/s", callers, a_second(parks as f64));
        table.add("cpu-us/s", callers, a_second(cpu));
        table.bar("wake-ups/s", callers, NONE);
        runtime.shutdown_background();
    }
}

fn start_idle(callers: usize) -> Executor<(), ()> {
    let gate = Gate::closed();
    gate.open();
    let executor = ExecutorBuilder::new()
        .concurrency_limit(callers.max(1))
        .requests(slow_rate())
        .build(gate.client())
        .expect("the settings make sense");
    executor.start().expect("a runtime");
    let monitor = executor.monitor();
    monitor
        .limiter()
        .local()
        .expect("it is of this process")
        .try_acquire(Cost::request())
        .expect("the first is free");
    for _ in 0..callers {
        let executor = executor.clone();
        tokio::spawn(async move { executor.submit(request()).await.expect("it runs").await });
    }
    executor
}

/// What this process's threads have used, except the one that looks.
struct Threads {
    cpu: Duration,
    wakeups: u64,
}

impl Threads {
    fn look() -> Option<Self> {
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

/// So far, in this thread; zero where nobody counts them.
fn page_faults() -> u64 {
    let stat = fs::read_to_string("/proc/thread-self/stat").unwrap_or_default();
    // The fields after the name, which is in parentheses and may have spaces.
    let fields = stat.rsplit(')').next().unwrap_or_default();
    fields
        .split_whitespace()
        .nth(7)
        .and_then(|count| count.parse().ok())
        .unwrap_or(0)
}

// === The report ===

/// A section's figures: a column for each kind, a row for each size.
struct Table {
    section: &'static str,
    figures: Vec<(&'static str, usize, f64)>,
    bars: Vec<(&'static str, usize, Bar)>,
}

/// What a figure may be at most, and should be.
struct Bar {
    most: f64,
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
        figures.find_map(|&(of, size, figure)| (of == column && size == n).then_some(figure))
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
        for (column, n, Bar { most, aim }) in &self.bars {
            let Some(figure) = self.figure(column, *n) else {
                continue;
            };
            let verdict = match figure {
                figure if figure <= *aim => "ok",
                figure if figure <= *most => "ok, not the aim",
                _ => "MISS",
            };
            let name = format!("{}-{column}", self.section);
            println!("{name:<32}{n:>9} {figure:>9.2} {most:>6} {aim:>6}  {verdict}");
        }
    }

    fn print_for_machines(&self) {
        for (column, n, figure) in &self.figures {
            println!("scale {}-{column} {n} = {figure:.2}", self.section);
        }
    }
}

fn median(figures: impl IntoIterator<Item = f64>) -> f64 {
    let mut figures: Vec<_> = figures.into_iter().collect();
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}

fn current_thread() -> Runtime {
    runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime")
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
    tables.iter().for_each(Table::print_for_machines);
}

/// This thread's processor time.
struct ThreadTime(Duration);

impl ThreadTime {
    #[cfg(unix)]
    fn now() -> Self {
        use rustix::time::{ClockId, clock_gettime};

        let time = clock_gettime(ClockId::ThreadCPUTime);
        let seconds = u64::try_from(time.tv_sec).expect("not negative");
        let nanos = u32::try_from(time.tv_nsec).expect("below a second");
        Self(Duration::new(seconds, nanos))
    }

    /// Not measured.
    #[cfg(not(unix))]
    fn now() -> Self {
        Self(Duration::ZERO)
    }

    fn elapsed(&self) -> Duration {
        Self::now().0 - self.0
    }
}
