//! The stopwatch: contenders in turns, nanoseconds and allocations a call.

use crate::contenders::Contender;
use std::{future::Future, hint::black_box, pin::Pin};
use tokio::{
    runtime::{Builder, Runtime},
    time::Instant,
};
use tower::{Service, ServiceExt};

/// Calls in one measurement.
pub(crate) const CALLS: usize = 40_000;

pub(crate) type Run = Pin<Box<dyn Future<Output = f64>>>;

/// What runs the callers.
#[derive(Clone, Copy)]
pub(crate) enum Pool {
    CurrentThread,
    TwoWorkers,
}

/// One contender's measurements.
pub(crate) struct Figures {
    /// Nanoseconds a call, a value for each round.
    ns: Vec<f64>,
    /// A call.
    pub(crate) allocations: f64,
}

impl Pool {
    pub(crate) const ALL: [Self; 2] = [Self::CurrentThread, Self::TwoWorkers];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::CurrentThread => "one",
            Self::TwoWorkers => "two",
        }
    }

    fn build(self) -> Runtime {
        let runtime = match self {
            Self::CurrentThread => Builder::new_current_thread().enable_all().build(),
            Self::TwoWorkers => Builder::new_multi_thread().worker_threads(2).enable_all().build(),
        };
        runtime.expect("a runtime")
    }
}

impl Figures {
    pub(crate) fn median_ns(&self) -> f64 {
        median(self.ns.clone())
    }

    /// The median of what the rounds say, each of which hit both alike.
    pub(crate) fn ratio(&self, peer: &Self) -> f64 {
        median(self.ns.iter().zip(&peer.ns).map(|(ours, peer)| ours / peer).collect())
    }
}

pub(crate) fn in_turns(contenders: &[&Contender], pool: Pool, callers: usize, rounds: usize) -> Vec<Figures> {
    let mut figures: Vec<_> = contenders
        .iter()
        .map(|contender| Figures {
            ns: Vec::with_capacity(rounds),
            allocations: allocations(contender, callers),
        })
        .collect();
    let runtime = pool.build();
    for round in 0..rounds {
        // Whoever comes first in one round comes later in the next.
        for turn in 0..contenders.len() {
            let at = (turn + round) % contenders.len();
            figures[at].ns.push(runtime.block_on((contenders[at].run)(callers)));
        }
    }
    figures
}

/// Runs it and nothing else. Returns how many calls were made.
pub(crate) fn alone(contender: &Contender, callers: usize, times: usize) -> usize {
    let runtime = Pool::CurrentThread.build();
    for _ in 0..times {
        runtime.block_on((contender.run)(callers));
    }
    CALLS / callers * callers * times
}

fn allocations(contender: &Contender, callers: usize) -> f64 {
    let runtime = Pool::CurrentThread.build();
    let counted = allocation_counter::measure(|| {
        runtime.block_on((contender.run)(callers));
    });
    counted.count_total as f64 / CALLS as f64
}

/// Each service has a caller, which makes one call after the other.
pub(crate) async fn calls<S, Req>(services: Vec<S>, request: fn() -> Req) -> f64
where
    S: Service<Req, Future: Send, Response: Send, Error: std::fmt::Debug + Send> + Send + 'static,
    Req: Send + 'static,
{
    let callers = services.len();
    let each = CALLS / callers;
    let start = Instant::now();
    let tasks: Vec<_> = services
        .into_iter()
        .map(|mut service| {
            tokio::spawn(async move {
                for _ in 0..each {
                    let response = service.ready().await.expect("ready").call(request()).await;
                    black_box(response.expect("a response"));
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.expect("no panic");
    }
    start.elapsed().as_nanos() as f64 / (each * callers) as f64
}

/// The same thing again and again.
pub(crate) fn repeated(mut once: impl FnMut()) -> f64 {
    let start = Instant::now();
    (0..CALLS).for_each(|_| once());
    start.elapsed().as_nanos() as f64 / CALLS as f64
}

/// The same, for something to be awaited.
pub(crate) async fn repeated_async(mut once: impl AsyncFnMut()) -> f64 {
    let start = Instant::now();
    for _ in 0..CALLS {
        once().await;
    }
    start.elapsed().as_nanos() as f64 / CALLS as f64
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
