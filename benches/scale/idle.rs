//! Executors and limiters that do nothing: memory, wake-ups, processor time.

use crate::{
    Scale,
    measure::{Memory, current_thread},
    subject::{Blocker, request},
    table::{Bar, Table},
    waiting::slow_rate,
};
use allocation_counter::measure;
use std::{fs, iter, thread, time::Duration};
use tokio::runtime;
use tower_outbound::{Concurrency, Cost, Executor, ExecutorBuilder, Limits, RateLimiter};

/// How long an idle executor is observed.
const OBSERVATION: Duration = Duration::from_secs(3);
/// The memory of one is that of so many, divided by their number.
const MANY: usize = 100;

const NONE: Bar = Bar { max: 0.0, aim: 0.0 };
const EXECUTOR_BYTES: Bar = Bar {
    max: 4_096.0,
    aim: 4_096.0,
};
const LIMITER_BYTES: Bar = Bar { max: 512.0, aim: 512.0 };

/// Measures the memory of executors, limiters and semaphores that are not used.
pub(crate) fn memory(_: &Scale, table: &mut Table) {
    let runtime = current_thread();
    let _entered = runtime.enter();
    let executor = || start_idle(0);
    let limits = || Limits::new().requests(slow_rate()).tokens(slow_rate());
    let limiter = || RateLimiter::new(limits()).expect("the rates are valid");
    let concurrency = || Concurrency::new(1).expect("the limit is valid");
    table.add("executor-bytes", 1, bytes_of(executor));
    table.add("limiter-bytes", 1, bytes_of(limiter));
    table.add("concurrency-bytes", 1, bytes_of(concurrency));
    table.bar("executor-bytes", 1, EXECUTOR_BYTES);
    table.bar("limiter-bytes", 1, LIMITER_BYTES);
}

/// The bytes on the heap that belong to one of these. The first one is not counted, because it may initialize something.
fn bytes_of<T>(make: impl Fn() -> T) -> f64 {
    let _first = make();
    let mut all = Vec::with_capacity(MANY);
    let counted = measure(|| all.extend(iter::repeat_with(make).take(MANY)));
    assert_eq!(all.len(), MANY);
    Memory::per_item(&counted, MANY).bytes
}

/// Measures an executor without calls, and an executor whose callers wait for a bucket that stays empty.
pub(crate) fn idle(_: &Scale, table: &mut Table) {
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
