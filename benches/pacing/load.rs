//! The load of a run: callers that each make one call after the other. Each run has its own runtime.

use crate::{
    common::process_cpu_time,
    figures::Call,
    limiters::{Limiter, Limits, Pacer, WithPacer},
};
use std::time::Duration;
use tokio::{
    runtime::{self, Runtime},
    time::{self, Instant},
};

pub(crate) const CALLERS: u64 = 64;

/// The number of threads of each runtime.
pub(crate) const THREADS: usize = 2;

/// The load that a limiter is measured with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    pub(crate) limits: Limits,
    pub(crate) tokens: Tokens,
    /// If this is not zero, one call is made at the start, and the callers begin after this time.
    pub(crate) pause: Duration,
    /// The length of the run.
    pub(crate) length: Duration,
}

/// How many tokens calls cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tokens {
    /// Each call costs a random number from one to this number.
    UpTo(u64),
    /// The prompt and the answer each cost a random number of tokens: from one to [`LIGHT`](Self::LIGHT), and in turns of
    /// [`TURN`](Self::TURN) of neither, the prompt, and the answer, to [`HEAVY`](Self::HEAVY).
    InTurns,
}

impl WithPacer for Load {
    type Output = Record;

    fn run<P: Pacer>(self, pacer: impl FnOnce() -> P) -> Record {
        self.run_on(pacer)
    }
}

/// The measurements of a run.
#[derive(Clone, Debug)]
pub(crate) struct Record {
    pub(crate) calls: Vec<Call>,
    /// The processor time of the process, in percent of one core.
    pub(crate) cpu: f64,
}

// === impl Tokens ===

impl Tokens {
    pub(crate) const LIGHT: u64 = 100;
    pub(crate) const HEAVY: u64 = 1_000;
    pub(crate) const TURN: Duration = Duration::from_millis(500);

    /// Returns the tokens of the prompt and of the answer of a call that is made at this time.
    fn draw(self, rng: &mut fastrand::Rng, at: Duration) -> (u64, u64) {
        let turn = match self {
            Self::UpTo(most) => return (rng.u64(1..=most), 0),
            Self::InTurns => at.as_millis() / Self::TURN.as_millis() % 3,
        };
        let most = |is_heavy| if is_heavy { Self::HEAVY } else { Self::LIGHT };
        (rng.u64(1..=most(turn == 1)), rng.u64(1..=most(turn == 2)))
    }
}

// === impl Load ===

impl Load {
    /// Runs the load on a limiter.
    pub(crate) fn run(&self, limiter: Limiter) -> Record {
        limiter.with(self.limits, *self)
    }

    fn run_on<P: Pacer>(&self, pacer: impl FnOnce() -> P) -> Record {
        build_runtime().block_on(async {
            let mut pacer = pacer();
            let (start, cpu) = (Instant::now(), process_cpu_time());
            let mut calls = Vec::new();
            if !self.pause.is_zero() {
                calls.push(Call {
                    arrived: Duration::ZERO,
                    waited_until: pacer.admit(self.limits.cost(1, 0)).await - start,
                    admitted: true,
                    tokens: 1,
                    output: 0,
                });
                time::sleep_until(start + self.pause).await;
            }
            let callers: Vec<_> = (0..CALLERS)
                .map(|number| tokio::spawn(self.call_repeatedly(pacer.clone(), start, number)))
                .collect();
            for caller in callers {
                calls.extend(caller.await.expect("no caller panics"));
            }
            let cpu = (process_cpu_time() - cpu).as_secs_f64() / start.elapsed().as_secs_f64();
            Record {
                calls,
                cpu: 100.0 * cpu,
            }
        })
    }

    async fn call_repeatedly<P: Pacer>(self, mut pacer: P, start: Instant, number: u64) -> Vec<Call> {
        let mut costs = fastrand::Rng::with_seed(number);
        let mut calls: Vec<Call> = Vec::new();
        let calling = async {
            loop {
                let arrived = start.elapsed();
                let (tokens, output) = self.tokens.draw(&mut costs, arrived);
                calls.push(Call {
                    arrived,
                    waited_until: self.length,
                    admitted: false,
                    tokens,
                    output,
                });
                let admitted = pacer.admit(self.limits.cost(tokens, output)).await - start;
                if let Some(call) = calls.last_mut().filter(|_| admitted < self.length) {
                    call.waited_until = admitted;
                    call.admitted = true;
                }
            }
        };
        // The loop never ends by itself: the timeout ends it.
        let _ = time::timeout_at(start + self.length, calling).await;
        // The timer may be late, so that a call begins after the end of the run. Such a call is not counted.
        calls.retain(|call| call.arrived < self.length);
        calls
    }
}

pub(crate) fn build_runtime() -> Runtime {
    runtime::Builder::new_multi_thread()
        .worker_threads(THREADS)
        .enable_all()
        .build()
        .expect("a runtime can be built")
}
