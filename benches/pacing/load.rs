//! The load: callers that are never satisfied, on a runtime of their own.

use crate::{
    figures::{Budget, Call},
    limiters::{self, Limiter, Pacer},
};
use std::time::Duration;
use tokio::{
    runtime,
    time::{self, Instant},
};

pub(crate) const CALLERS: u64 = 64;

const THREADS: usize = 2;

/// What a limiter is given to do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    pub(crate) requests: Budget,
    pub(crate) tokens: Budget,
    /// Each call costs between one token and this many.
    pub(crate) most_tokens: u64,
    /// There is one call in the beginning, and no other until so much later.
    pub(crate) quiet: Duration,
    pub(crate) length: Duration,
}

/// What came of it.
#[derive(Clone, Debug)]
pub(crate) struct Record {
    pub(crate) calls: Vec<Call>,
    /// Processor time in percent of one core.
    pub(crate) cpu: f64,
}

// === impl Load ===

impl Load {
    /// Peers limit requests only.
    pub(crate) fn run(&self, limiter: Limiter) -> Record {
        match limiter {
            Limiter::Ours => self.put_on(|| limiters::ours(self.requests, self.tokens)),
            Limiter::Governor => self.put_on(|| limiters::governor(self.requests)),
            Limiter::LeakyBucket => self.put_on(|| limiters::leaky_bucket(self.requests)),
            Limiter::TowerResilience => self.put_on(|| limiters::tower_resilience(self.requests)),
            Limiter::Tower => self.put_on(|| limiters::tower(self.requests)),
        }
    }

    fn put_on<P: Pacer>(&self, pacer: impl FnOnce() -> P) -> Record {
        let runtime = runtime::Builder::new_multi_thread()
            .worker_threads(THREADS)
            .enable_all()
            .build()
            .expect("a runtime");
        runtime.block_on(async {
            let mut pacer = pacer();
            let (start, cpu) = (Instant::now(), cpu_time());
            let mut calls = Vec::new();
            if !self.quiet.is_zero() {
                calls.push(Call {
                    arrived: Duration::ZERO,
                    left: pacer.admit(1).await - start,
                    admitted: true,
                    tokens: 1,
                });
                time::sleep_until(start + self.quiet).await;
            }
            let callers: Vec<_> = (0..CALLERS)
                .map(|number| tokio::spawn(self.call_on_and_on(pacer.clone(), start, number)))
                .collect();
            for caller in callers {
                calls.extend(caller.await.expect("no panic"));
            }
            let cpu = (cpu_time() - cpu).as_secs_f64() / start.elapsed().as_secs_f64();
            Record {
                calls,
                cpu: 100.0 * cpu,
            }
        })
    }

    async fn call_on_and_on<P: Pacer>(self, mut pacer: P, start: Instant, number: u64) -> Vec<Call> {
        let mut costs = fastrand::Rng::with_seed(number);
        let mut calls: Vec<Call> = Vec::new();
        let calling = async {
            loop {
                let tokens = costs.u64(1..=self.most_tokens);
                calls.push(Call {
                    arrived: start.elapsed(),
                    left: self.length,
                    admitted: false,
                    tokens,
                });
                let admitted = pacer.admit(tokens).await - start;
                if let Some(call) = calls.last_mut().filter(|_| admitted < self.length) {
                    call.left = admitted;
                    call.admitted = true;
                }
            }
        };
        // Never done, so it is the end that ends it.
        let _ = time::timeout_at(start + self.length, calling).await;
        // The timer may be late.
        calls.retain(|call| call.arrived < self.length);
        calls
    }
}

#[cfg(unix)]
fn cpu_time() -> Duration {
    use rustix::time::{ClockId, clock_gettime};

    let time = clock_gettime(ClockId::ProcessCPUTime);
    let seconds = u64::try_from(time.tv_sec).expect("not negative");
    Duration::new(seconds, u32::try_from(time.tv_nsec).expect("below a second"))
}

/// Not measured.
#[cfg(not(unix))]
fn cpu_time() -> Duration {
    Duration::ZERO
}
