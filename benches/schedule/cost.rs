//! What a call costs with a schedule, by the number of flows.

use crate::common::{median, thread_cpu_time};
use http::{Request, Response};
use std::{convert::Infallible, hint::black_box, sync::Arc, time::Duration};
use tokio::{
    runtime::{Builder, Runtime},
    sync::Semaphore,
};
use tower::service_fn;
use tower_outbound::{Call, Executor, Limits, Rate, Schedule, schedule::Level};

/// A rate per second that is never reached.
const UNREACHED: u64 = 1_000_000_000_000;

const MONTH: Duration = Duration::from_secs(30 * 24 * 60 * 60);

#[derive(Clone, Copy)]
struct Subject {
    name: &'static str,
    /// The number of flows that the calls belong to; `None` without a schedule.
    flows: Option<u64>,
    /// The number of further flows, which are known and have no calls.
    idle: u64,
}

const SUBJECTS: [Subject; 7] = [
    Subject::new("no schedule", None, 0),
    Subject::new("1 flow", Some(1), 0),
    Subject::new("10 flows", Some(10), 0),
    Subject::new("1,000 flows", Some(1_000), 0),
    Subject::new("100,000 flows", Some(100_000), 0),
    Subject::new("10 flows, 10 idle", Some(10), 10),
    Subject::new("10 flows, 100,000 idle", Some(10), 100_000),
];

/// Measures and prints the table. Returns the lines for programs.
pub(crate) fn print(rounds: usize, calls: u64) -> Vec<String> {
    let mut runs: [Vec<f64>; SUBJECTS.len()] = Default::default();
    for round in 0..rounds {
        // Each round starts with another subject, so that none is always measured first.
        for turn in 0..SUBJECTS.len() {
            let at = (turn + round) % SUBJECTS.len();
            runs[at].push(SUBJECTS[at].run(calls));
        }
    }
    println!("{:<26} {:>12} {:>12}", "", "ns per call", "ns more");
    let mut lines = Vec::new();
    for (subject, ns) in SUBJECTS.iter().zip(&runs) {
        let more = median(ns.iter().zip(&runs[0]).map(|(ns, without)| ns - without));
        let ns = median(ns.iter().copied());
        println!("{:<26} {ns:>12.0} {more:>12.0}", subject.name);
        let name = subject.name.replace(", ", "-").replace(' ', "-").replace(',', "");
        lines.push(format!("schedule {name}: ns = {ns:.0}, more = {more:.0}"));
    }
    lines
}

impl Subject {
    const fn new(name: &'static str, flows: Option<u64>, idle: u64) -> Self {
        Self { name, flows, idle }
    }

    /// Returns the processor time per call in nanoseconds.
    fn run(self, calls: u64) -> f64 {
        current_thread().block_on(async move {
            let blocker = Arc::new(Semaphore::new(0));
            let client = {
                let blocker = blocker.clone();
                service_fn(move |_: Request<()>| {
                    let blocker = blocker.clone();
                    async move {
                        let _permit = blocker.acquire().await;
                        Ok::<_, Infallible>(Response::new(()))
                    }
                })
            };
            let mut executor = Executor::builder()
                .queue_capacity(usize::try_from(calls + 1).expect("a usize has 64 bits"))
                .concurrency_limit(1)
                .requests(Rate::per_second(UNREACHED))
                .tokens(Rate::per_second(UNREACHED));
            if self.flows.is_some() {
                executor = executor.schedule(self.schedule());
            }
            let executor = executor.build(client).expect("the settings are valid");
            executor.start().expect("there is a runtime");
            let submit = |flow: u64| executor.submit(Call::from(Request::new(())).flow(flow));
            let flows = self.flows.unwrap_or(1);
            // The idle flows have each made a call.
            blocker.add_permits(1);
            for flow in 0..self.idle {
                let call = submit(flows + flow).await.expect("there is a place");
                black_box(call.await.expect("the call succeeds"));
            }
            blocker.acquire().await.expect("the semaphore is open").forget();

            // The first call blocks the others until all are there.
            let start = thread_cpu_time();
            let mut last = submit(0).await.expect("there is a place");
            for call in 0..calls {
                last = submit(call % flows).await.expect("there is a place");
            }
            blocker.add_permits(1);
            black_box(last.await.expect("the call succeeds"));
            (thread_cpu_time() - start).as_nanos() as f64 / calls as f64
        })
    }

    /// Where there are idle flows, a key is known for half a minute after a call.
    fn schedule(self) -> Schedule {
        let level = Level::by("flow");
        if self.idle == 0 {
            return Schedule::new().level(level);
        }
        let limits = || Limits::new().requests(Rate::new(100_000, MONTH));
        Schedule::new().level(level.limits(move |_| Some(limits())))
    }
}

fn current_thread() -> Runtime {
    let runtime = Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime can be built")
}
