//! Measures contenders in turns: nanoseconds and allocations per call.

use crate::{common::median, contenders::Contender};
use std::{future::Future, hint::black_box, pin::Pin};
use tokio::{
    runtime::{Builder, Runtime},
    time::Instant,
};
use tower::{Service, ServiceExt};

/// The number of calls in one measurement.
pub(crate) const CALLS: usize = 40_000;

/// A measurement, as a future whose output is nanoseconds per call.
pub(crate) type Run = Pin<Box<dyn Future<Output = f64>>>;

/// The number of threads that run the callers.
#[derive(Clone, Copy)]
pub(crate) enum Threads {
    One,
    Two,
}

/// The measurements of one contender.
pub(crate) struct Figures {
    /// Nanoseconds per call, one value for each round.
    ns: Vec<f64>,
    /// Allocations per call.
    pub(crate) allocations: f64,
}

impl Threads {
    pub(crate) const ALL: [Self; 2] = [Self::One, Self::Two];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::One => "one",
            Self::Two => "two",
        }
    }

    pub(crate) fn build(self) -> Runtime {
        let runtime = match self {
            Self::One => Builder::new_current_thread().enable_all().build(),
            Self::Two => Builder::new_multi_thread().worker_threads(2).enable_all().build(),
        };
        runtime.expect("a runtime can be built")
    }
}

impl Figures {
    pub(crate) fn median_ns(&self) -> f64 {
        median(self.ns.iter().copied())
    }

    /// The ratio of the times of this contender and a peer: the median of the ratios of all rounds.
    pub(crate) fn ratio(&self, peer: &Self) -> f64 {
        median(self.ns.iter().zip(&peer.ns).map(|(this, peer)| this / peer))
    }
}

/// Measures each contender once in each round.
pub(crate) fn in_turns(contenders: &[&Contender], threads: Threads, callers: usize, rounds: usize) -> Vec<Figures> {
    let mut figures: Vec<_> = contenders
        .iter()
        .map(|contender| Figures {
            ns: Vec::with_capacity(rounds),
            allocations: allocations(contender, callers),
        })
        .collect();
    let runtime = threads.build();
    for round in 0..rounds {
        // Each round starts with another contender than the round before, so that none is always measured first.
        for turn in 0..contenders.len() {
            let at = (turn + round) % contenders.len();
            figures[at].ns.push(runtime.block_on((contenders[at].run)(callers)));
        }
    }
    figures
}

/// Runs a contender without measuring it. Returns the number of calls it made.
pub(crate) fn run_only(contender: &Contender, callers: usize, times: usize) -> usize {
    let runtime = Threads::One.build();
    for _ in 0..times {
        runtime.block_on((contender.run)(callers));
    }
    CALLS / callers * callers * times
}

/// Counts the allocations per call, on one thread.
fn allocations(contender: &Contender, callers: usize) -> f64 {
    let runtime = Threads::One.build();
    let counted = allocation_counter::measure(|| {
        runtime.block_on((contender.run)(callers));
    });
    counted.count_total as f64 / CALLS as f64
}

/// Makes [`CALLS`] calls in total. Each service has its own caller, which makes one call after the other. Returns
/// nanoseconds per call.
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
                    let response = service
                        .ready()
                        .await
                        .expect("the service is ready")
                        .call(request())
                        .await;
                    black_box(response.expect("the call succeeds"));
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.expect("no caller panics");
    }
    start.elapsed().as_nanos() as f64 / (each * callers) as f64
}

/// Calls a function [`CALLS`] times. Returns nanoseconds per call.
pub(crate) fn repeated(mut once: impl FnMut()) -> f64 {
    let start = Instant::now();
    (0..CALLS).for_each(|_| once());
    start.elapsed().as_nanos() as f64 / CALLS as f64
}

/// Calls an async function [`CALLS`] times, and awaits each future before the next call. Returns nanoseconds per call.
pub(crate) async fn repeated_async(mut once: impl AsyncFnMut()) -> f64 {
    let start = Instant::now();
    for _ in 0..CALLS {
        once().await;
    }
    start.elapsed().as_nanos() as f64 / CALLS as f64
}
