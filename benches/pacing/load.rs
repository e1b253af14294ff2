//! The load of a run: callers that each make one call after the other. Each run has its own runtime.

use crate::{
    common::process_cpu_time,
    figures::{Budget, Call},
    limiters::{Limiter, Pacer, WithPacer},
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
    pub(crate) requests: Budget,
    pub(crate) tokens: Budget,
    /// Each call costs a random number of tokens from one to this number.
    pub(crate) most_tokens: u64,
    /// If this is not zero, one call is made at the start, and the callers begin after this time.
    pub(crate) pause: Duration,
    /// The length of the run.
    pub(crate) length: Duration,
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

// === impl Load ===

impl Load {
    /// Runs the load on a limiter. Only tower-outbound and throttle-net limit tokens; the others limit requests only.
    pub(crate) fn run(&self, limiter: Limiter) -> Record {
        limiter.with(self.requests, self.tokens, *self)
    }

    fn run_on<P: Pacer>(&self, pacer: impl FnOnce() -> P) -> Record {
        build_runtime().block_on(async {
            let mut pacer = pacer();
            let (start, cpu) = (Instant::now(), process_cpu_time());
            let mut calls = Vec::new();
            if !self.pause.is_zero() {
                calls.push(Call {
                    arrived: Duration::ZERO,
                    waited_until: pacer.admit(1).await - start,
                    admitted: true,
                    tokens: 1,
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
                let tokens = costs.u64(1..=self.most_tokens);
                calls.push(Call {
                    arrived: start.elapsed(),
                    waited_until: self.length,
                    admitted: false,
                    tokens,
                });
                let admitted = pacer.admit(tokens).await - start;
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
