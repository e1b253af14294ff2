//! Measures tower-outbound's rate limiter beside that of throttle-net: processor time per call where no call waits, and
//! of the process while 64 callers wait.
//!
//! `cargo bench -p tower-outbound-benches --bench limiters [-- FILTER]` takes about a minute; `-- --quick` takes seconds.
//!
//! In each round, both limiters are measured in turns, a few milliseconds each, so that other load on the machine
//! affects both. A figure is the median of the rounds, and a ratio is the median of the rounds' ratios. Compare the
//! ratios, not the figures. The last lines of the output are for programs: `limiters <case> = <ratio>`.
//!
//! | case | what is measured |
//! |---|---|
//! | `try-acquire` | `try_acquire` of one budget that is never exhausted |
//! | `refused` | `try_acquire` of one budget that is exhausted |
//! | `acquire-two-budgets` | `acquire` of two budgets that are never exhausted, so that no call waits |
//! | `waiting` | 64 callers on two threads, one call after the other, at 100 calls per second with a burst of 1 |

mod common;

use clap::Parser;
use common::{median, process_cpu_time, thread_cpu_time};
use std::{future::Future, hint::black_box, iter, sync::Arc, time::Duration};
use throttle_net::{MultiLimiter, Throttle};
use tokio::{
    runtime,
    task::JoinSet,
    time::{Instant, sleep},
};
use tower_outbound::{Cost, Limits, Rate, RateLimiter};

/// The calls in one turn. A round has [`TURNS`] turns of each limiter.
const CALLS: u32 = 20_000;
const TURNS: u32 = 20;
/// A rate per second that is never reached, also not by the capacity of throttle-net in 32 bits.
const UNREACHED: u32 = 4_000_000_000;
/// The tokens that one call costs.
const TOKENS: u32 = 3;
const CALLERS: usize = 64;
/// The callers begin to wait during this time, which is not measured.
const WARM_UP: Duration = Duration::from_millis(300);
const DAY: Duration = Duration::from_secs(86_400);

/// Rate limiters where no call waits, and their processor time while callers wait: tower-outbound and throttle-net.
#[derive(Parser)]
struct Options {
    /// Measure only the cases whose name contains this text
    filter: Option<String>,
    /// Measure three short rounds
    #[arg(long)]
    quick: bool,
    /// Run only this case of tower-outbound, or of throttle-net as in throttle-net:refused, for a profiler
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
    /// The number of calls with --only, in units of 20,000
    #[arg(long, value_name = "N", default_value_t = 1)]
    times: u32,
    /// Passed by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

/// A case where no call waits. Each function returns the processor time of its calls.
struct Case {
    name: &'static str,
    ours: fn(Run) -> Duration,
    throttle_net: fn(Run) -> Duration,
}

/// How a case is run.
#[derive(Clone, Copy)]
struct Run {
    /// The number of calls, in units of [`CALLS`].
    times: u32,
    clock: fn() -> Duration,
}

const CASES: [Case; 4] = [
    Case {
        name: "try-acquire",
        ours: |run| {
            let limiter = one_budget(Rate::per_second(u64::from(UNREACHED)));
            run.on_a_thread(async || {
                for _ in 0..CALLS {
                    assert!(black_box(&limiter).try_acquire(Cost::request()).is_ok());
                }
            })
        },
        throttle_net: |run| {
            let throttle = Throttle::per_second(UNREACHED);
            run.on_a_thread(async || {
                for _ in 0..CALLS {
                    assert!(black_box(&throttle).try_acquire());
                }
            })
        },
    },
    Case {
        name: "refused",
        ours: |run| {
            let limiter = one_budget(Rate::per_day(1));
            limiter
                .try_acquire(Cost::request())
                .expect("the first call is admitted");
            run.on_a_thread(async || {
                for _ in 0..CALLS {
                    assert!(black_box(&limiter).try_acquire(Cost::request()).is_err());
                }
            })
        },
        throttle_net: |run| {
            let throttle = Throttle::per_duration(1, DAY);
            assert!(throttle.try_acquire(), "the first call is admitted");
            run.on_a_thread(async || {
                for _ in 0..CALLS {
                    assert!(!black_box(&throttle).try_acquire());
                }
            })
        },
    },
    Case {
        name: "acquire-two-budgets",
        ours: |run| {
            let rate = Rate::per_second(u64::from(UNREACHED));
            let limiter = RateLimiter::new(Limits::new().requests(rate).tokens(rate)).expect("the rates are valid");
            run.on_a_thread(async || {
                for _ in 0..CALLS {
                    let acquired = black_box(&limiter).acquire(Cost::tokens(u64::from(TOKENS))).await;
                    assert!(acquired.is_ok());
                }
            })
        },
        throttle_net: |run| {
            let throttle = MultiLimiter::builder()
                .dimension("requests", Throttle::per_second(UNREACHED))
                .dimension("tokens", Throttle::per_second(UNREACHED))
                .build();
            run.on_a_thread(async || {
                for _ in 0..CALLS {
                    let costs = [("requests", 1), ("tokens", TOKENS)];
                    assert!(black_box(&throttle).acquire_costs(&costs).await.is_ok());
                }
            })
        },
    },
    Case {
        name: "acquire-three-budgets",
        ours: |run| {
            let rate = Rate::per_second(u64::from(UNREACHED));
            let limits = Limits::new().requests(rate).input_tokens(rate).output_tokens(rate);
            let limiter = RateLimiter::new(limits).expect("the rates are valid");
            let tokens = u64::from(TOKENS);
            run.on_a_thread(async || {
                for _ in 0..CALLS {
                    let cost = Cost::input_output_tokens(tokens, tokens);
                    assert!(black_box(&limiter).acquire(cost).await.is_ok());
                }
            })
        },
        throttle_net: |run| {
            let throttle = MultiLimiter::builder()
                .dimension("requests", Throttle::per_second(UNREACHED))
                .dimension("input_tokens", Throttle::per_second(UNREACHED))
                .dimension("output_tokens", Throttle::per_second(UNREACHED))
                .build();
            run.on_a_thread(async || {
                for _ in 0..CALLS {
                    let costs = [("requests", 1), ("input_tokens", TOKENS), ("output_tokens", TOKENS)];
                    assert!(black_box(&throttle).acquire_costs(&costs).await.is_ok());
                }
            })
        },
    },
];

const WAITING: &str = "waiting";

fn one_budget(rate: Rate) -> RateLimiter {
    RateLimiter::new(Limits::new().requests(rate)).expect("the rate is valid")
}

// === Where no call waits ===

impl Run {
    /// Runs `calls` on one thread.
    fn on_a_thread(self, calls: impl AsyncFn()) -> Duration {
        let runtime = runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime can be built");
        runtime.block_on(async {
            let begun = (self.clock)();
            for _ in 0..self.times {
                calls().await;
            }
            (self.clock)() - begun
        })
    }
}

/// One round: nanoseconds per call of both limiters.
fn round_of(case: &Case, turns: u32) -> [f64; 2] {
    let mut sums = [Duration::ZERO; 2];
    let run = Run {
        times: 1,
        clock: thread_cpu_time,
    };
    for turn in 0..turns {
        // Neither is always the first.
        let order = if turn % 2 == 0 { [0, 1] } else { [1, 0] };
        for limiter in order {
            sums[limiter] += [case.ours, case.throttle_net][limiter](run);
        }
    }
    sums.map(|sum| sum.as_nanos() as f64 / f64::from(turns * CALLS))
}

// === Where callers wait ===

/// One round: processor time of the process while callers wait, in percent of one core.
fn round_of_waiting(length: Duration) -> [f64; 2] {
    let limiter = one_budget(Rate::per_second(100).burst(1));
    let ours = cpu_of_callers(length, || {
        let limiter = limiter.clone();
        async move {
            loop {
                limiter
                    .acquire(Cost::request())
                    .await
                    .expect("the cost is not above the burst");
            }
        }
    });
    let throttle = Arc::new(Throttle::smooth(100, Duration::from_secs(1)));
    let throttle_net = cpu_of_callers(length, || {
        let throttle = throttle.clone();
        async move {
            loop {
                throttle.acquire().await.expect("the cost is not above the capacity");
            }
        }
    });
    [ours, throttle_net]
}

fn cpu_of_callers<F: Future<Output = ()> + Send + 'static>(length: Duration, caller: impl Fn() -> F) -> f64 {
    let runtime = runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime can be built");
    runtime.block_on(async {
        let _callers: JoinSet<()> = iter::repeat_with(caller).take(CALLERS).collect();
        sleep(WARM_UP).await;
        let (begun, cpu) = (Instant::now(), process_cpu_time());
        sleep(length).await;
        100.0 * (process_cpu_time() - cpu).as_secs_f64() / begun.elapsed().as_secs_f64()
    })
}

fn main() {
    let options = Options::parse();
    if let Some(name) = &options.only {
        let (name, is_peer) = match name.strip_prefix("throttle-net:") {
            Some(name) => (name, true),
            None => (name.as_str(), false),
        };
        let Some(case) = CASES.iter().find(|case| case.name == name) else {
            eprintln!("there is no case called {name}: the first column of the table has the names");
            std::process::exit(2);
        };
        // Without measuring it: reading the processor time crashes under valgrind.
        let run = Run {
            times: options.times,
            clock: || Duration::ZERO,
        };
        if is_peer {
            (case.throttle_net)(run)
        } else {
            (case.ours)(run)
        };
        println!("{} calls of {name}", options.times * CALLS);
        return;
    }
    let (rounds, turns, length) = if options.quick {
        (3, 2, Duration::from_millis(500))
    } else {
        (11, TURNS, Duration::from_secs(2))
    };
    let wanted = |name: &str| options.filter.as_ref().is_none_or(|filter| name.contains(filter));
    println!(
        "{:<22} {:>16} {:>16} {:>8}",
        "", "tower-outbound", "throttle-net", "ratio"
    );
    let mut lines = Vec::new();
    let mut report = |name: &str, unit: &str, round: &dyn Fn() -> [f64; 2]| {
        if !wanted(name) {
            return;
        }
        let rounds: Vec<_> = iter::repeat_with(round).take(rounds).collect();
        let [ours, peer] = [0, 1].map(|limiter| median(rounds.iter().map(|round| round[limiter])));
        let ratio = median(rounds.iter().map(|[ours, peer]| ours / peer));
        println!("{name:<22} {ours:>11.2} {unit:<4} {peer:>11.2} {unit:<4} {ratio:>8.2}");
        lines.push(format!("limiters {name} = {ratio:.2}"));
    };
    for case in &CASES {
        report(case.name, "ns", &|| round_of(case, turns));
    }
    report(WAITING, "%", &|| round_of_waiting(length));
    println!();
    lines.iter().for_each(|line| println!("{line}"));
}
