//! The `trouble` group: what a limiter lets through when something happens to the calls that wait for it.
//!
//! Calls that each wait once arrive at the same time. Then waiting calls are cancelled, the limit is paused, all threads
//! are blocked, or calls turn out to use another amount than was estimated. The limit stays the same, so an exact limiter
//! keeps to its burst and its rate in every situation. A limiter that has promised each call its time of admission in
//! advance can only keep to that promise or to the limit.

use crate::{
    common::median,
    figures::{Budget, Call, CostOf, admissions, empirical_burst, overtakings, used_rate},
    limiters::{self, Limiter, Limits, Pacer, Pauses, Settles, WithPacer},
    load::{THREADS, build_runtime},
    table::CATCH_UP,
};
use std::{
    fmt,
    future::Future,
    ops::RangeInclusive,
    sync::{Arc, Barrier},
    thread,
    time::Duration,
};
use tokio::{
    task::{AbortHandle, JoinSet},
    time::{Instant, sleep, timeout},
};
use tower_outbound::Cost;

const REQUESTS: Budget = Budget::new(100, 1);
/// The tokens that each call is estimated to use, and their limit: a call of this estimate every 10 ms.
const ESTIMATE: u64 = 100;
const TOKENS: Budget = Budget::new(10_000, ESTIMATE);
/// The time from the arrival of the calls until something happens to them.
const BEFORE: Duration = Duration::from_millis(100);
/// Calls that still wait after this time are given up.
const LONGEST: Duration = Duration::from_secs(10);
/// The acceptable rate of tower-outbound, in percent. The shortest run lasts for 100 ms, of which a single timer may be
/// late by some.
const RATE: RangeInclusive<f64> = 95.0..=105.0;

/// What happens to the calls that wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trouble {
    /// Half of the waiting calls are cancelled, each while a new call arrives.
    Cancelled,
    Paused,
    /// All threads of the runtime are blocked, as by a computation that does not yield.
    Stalled,
    /// As soon as a call is admitted, it turns out to use twice its estimate.
    TwiceTheEstimate,
    /// As soon as a call is admitted, it turns out to use a fifth of its estimate.
    FifthOfTheEstimate,
}

/// How many calls wait, and how long a pause or a stall lasts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scale {
    waiting: usize,
    interruption: Duration,
}

/// The figures of one limiter in one situation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Effect {
    /// The empirical burst of what the calls used.
    burst: f64,
    /// The rate at which the calls used their budget, in percent of the limit. Time in which the limit is paused or the
    /// threads are blocked is left out.
    rate: f64,
    /// The time from the arrival of the first call to the admission of the last one, in milliseconds.
    last: f64,
    overtaken: f64,
    /// The number of calls that were given up after [`LONGEST`].
    given_up: f64,
}

/// A row of the table. `effect` is `None` if the limiter has no such operation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Row {
    limiter: Limiter,
    trouble: Trouble,
    effect: Option<Effect>,
}

/// One run.
#[derive(Clone, Copy, Debug)]
struct Run {
    trouble: Trouble,
    scale: Scale,
}

// === impl Trouble ===

impl Trouble {
    pub(crate) const ALL: [Self; 5] = [
        Self::Cancelled,
        Self::Paused,
        Self::Stalled,
        Self::TwiceTheEstimate,
        Self::FifthOfTheEstimate,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::Cancelled => "trouble cancelled",
            Self::Paused => "trouble paused",
            Self::Stalled => "trouble stalled",
            Self::TwiceTheEstimate => "trouble twice the estimate",
            Self::FifthOfTheEstimate => "trouble fifth of the estimate",
        }
    }

    const fn description(self) -> &'static str {
        match self {
            Self::Cancelled => "at 100/s, half of the waiting calls are cancelled while as many others arrive",
            Self::Paused => "at 100/s, the limit is paused",
            Self::Stalled => "at 100/s, all threads are blocked",
            Self::TwiceTheEstimate => "at 10,000 tokens/s, each call uses 200 tokens and not 100 as estimated",
            Self::FifthOfTheEstimate => "at 10,000 tokens/s, each call uses 20 tokens and not 100 as estimated",
        }
    }

    /// The amount that each call uses, the limit of that amount, and how to read the amount from a call.
    fn used(self) -> (u64, Budget, CostOf) {
        match self {
            Self::Cancelled | Self::Paused | Self::Stalled => (1, REQUESTS, Call::one),
            Self::TwiceTheEstimate => (2 * ESTIMATE, TOKENS, Call::tokens),
            Self::FifthOfTheEstimate => (ESTIMATE / 5, TOKENS, Call::tokens),
        }
    }

    /// Brings a limiter into this trouble. Returns `None` if the limiter has no such operation.
    pub(crate) fn run(self, limiter: Limiter, scale: Scale) -> Option<Effect> {
        let run = Run { trouble: self, scale };
        let calls = match (self, limiter) {
            (Self::Cancelled | Self::Stalled, _) => limiter.with(Limits::requests(REQUESTS), run),
            (Self::Paused, Limiter::TowerOutbound) => {
                run.paused(|| limiters::tower_outbound(Limits::requests(REQUESTS)))
            }
            (Self::Paused, Limiter::ThrottleNet) => run.paused(|| limiters::throttle_net(Limits::requests(REQUESTS))),
            (Self::TwiceTheEstimate | Self::FifthOfTheEstimate, Limiter::TowerOutbound) => {
                run.settled(|| limiters::tower_outbound(Limits::tokens(TOKENS)))
            }
            (Self::TwiceTheEstimate | Self::FifthOfTheEstimate, Limiter::ThrottleNet) => {
                run.settled(|| limiters::throttle_net(Limits::tokens(TOKENS)))
            }
            _ => return None,
        };
        Some(Effect::new(&calls, run))
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

// === impl Scale ===

impl Scale {
    pub(crate) const FULL: Self = Self {
        waiting: 200,
        interruption: Duration::from_secs(1),
    };
    pub(crate) const QUICK: Self = Self {
        waiting: 100,
        interruption: Duration::from_millis(500),
    };
}

// === impl Run ===

/// The runs of calls that any limiter can do.
impl WithPacer for Run {
    type Output = Vec<Call>;

    fn run<P: Pacer>(self, pacer: impl FnOnce() -> P) -> Vec<Call> {
        build_runtime().block_on(async {
            let mut calls = Calls::new(pacer());
            let waiting = calls.arrive(self.scale.waiting);
            sleep(BEFORE).await;
            if self.trouble == Trouble::Stalled {
                block_all_threads(self.scale.interruption);
            } else {
                let mut waiting: Vec<_> = waiting.into_iter().filter(|call| !call.is_finished()).collect();
                fastrand::Rng::with_seed(1).shuffle(&mut waiting);
                for call in waiting.into_iter().take(self.scale.waiting / 2) {
                    call.abort();
                    calls.arrive(1);
                }
            }
            calls.wait().await
        })
    }
}

impl Run {
    fn paused<P: Pauses>(self, pacer: impl FnOnce() -> P) -> Vec<Call> {
        build_runtime().block_on(async {
            let mut calls = Calls::new(pacer());
            calls.arrive(self.scale.waiting);
            sleep(BEFORE).await;
            calls.pacer.pause_for(self.scale.interruption);
            calls.wait().await
        })
    }

    /// Half as many calls wait, because each waits for twice as long if it uses twice its estimate.
    fn settled<P: Settles>(self, pacer: impl FnOnce() -> P) -> Vec<Call> {
        let (used, ..) = self.trouble.used();
        build_runtime().block_on(async {
            let mut calls = Calls::new(pacer());
            for _ in 0..self.scale.waiting / 2 {
                let mut pacer = calls.pacer.clone();
                calls.spawn(used, async move {
                    let (admitted, estimate) = pacer.admit_estimate(ESTIMATE).await;
                    pacer.settle(estimate, used);
                    admitted
                });
            }
            calls.wait().await
        })
    }

    /// The time in which no call could be admitted.
    fn lost(self) -> Duration {
        match self.trouble {
            Trouble::Paused | Trouble::Stalled => self.scale.interruption,
            _ => Duration::ZERO,
        }
    }
}

/// Calls that each wait for the limiter once.
struct Calls<P> {
    pacer: P,
    start: Instant,
    calls: JoinSet<Call>,
}

impl<P: Pacer> Calls<P> {
    fn new(pacer: P) -> Self {
        Self {
            pacer,
            start: Instant::now(),
            calls: JoinSet::new(),
        }
    }

    fn arrive(&mut self, calls: usize) -> Vec<AbortHandle> {
        let arrive = |_| {
            let mut pacer = self.pacer.clone();
            self.spawn(1, async move { pacer.admit(Cost::tokens(1)).await })
        };
        (0..calls).map(arrive).collect()
    }

    /// A call that uses this many tokens, and is admitted at the instant that the future returns.
    fn spawn(&mut self, tokens: u64, admitted: impl Future<Output = Instant> + Send + 'static) -> AbortHandle {
        let start = self.start;
        let arrived = start.elapsed();
        self.calls.spawn(async move {
            let admitted = timeout(LONGEST, admitted).await.ok();
            Call {
                arrived,
                waited_until: admitted.unwrap_or_else(Instant::now) - start,
                admitted: admitted.is_some(),
                tokens,
                output: 0,
            }
        })
    }

    /// Waits for the end of all calls. Returns those that were not cancelled.
    async fn wait(mut self) -> Vec<Call> {
        let mut ended = Vec::new();
        while let Some(call) = self.calls.join_next().await {
            match call {
                Ok(call) => ended.push(call),
                Err(error) => assert!(error.is_cancelled(), "no call panics"),
            }
        }
        ended
    }
}

fn block_all_threads(length: Duration) {
    let all = Arc::new(Barrier::new(THREADS));
    for _ in 0..THREADS {
        let all = all.clone();
        tokio::spawn(async move {
            // Until each thread is in here: none is left to take the work of the others.
            all.wait();
            thread::sleep(length);
        });
    }
}

// === impl Effect ===

impl Effect {
    fn new(calls: &[Call], run: Run) -> Self {
        let (_, budget, cost) = run.trouble.used();
        let admissions = admissions(calls);
        let last = admissions.last().map_or(Duration::ZERO, |call| call.waited_until);
        Self {
            burst: empirical_burst(&admissions, budget, cost),
            rate: used_rate(&admissions, budget, cost, run.lost()),
            last: last.as_secs_f64() * 1e3,
            overtaken: overtakings(calls) as f64,
            given_up: (calls.len() - admissions.len()) as f64,
        }
    }

    /// Takes the median over all rounds, for each figure separately. Returns `None` if there are none.
    fn median(rounds: &[Self]) -> Option<Self> {
        let median = |figure: fn(&Self) -> f64| median(rounds.iter().map(figure));
        (!rounds.is_empty()).then(|| Self {
            burst: median(|effect| effect.burst),
            rate: median(|effect| effect.rate),
            last: median(|effect| effect.last),
            overtaken: median(|effect| effect.overtaken),
            given_up: median(|effect| effect.given_up),
        })
    }
}

// === impl Row ===

impl Row {
    pub(crate) fn new(limiter: Limiter, trouble: Trouble, rounds: &[Effect]) -> Self {
        Self {
            limiter,
            trouble,
            effect: Effect::median(rounds),
        }
    }

    /// The most that tower-outbound promises for the burst. The cost of one call is added, which may be recorded late.
    fn bound(&self) -> f64 {
        let (used, budget, _) = self.trouble.used();
        budget.burst as f64 + used as f64 + budget.inflow(CATCH_UP)
    }

    fn print(&self) {
        let Some(effect) = self.effect else {
            println!("  {:<16} {:>9}", self.limiter, "cannot");
            return;
        };
        let Effect {
            burst,
            rate,
            last,
            overtaken,
            given_up,
        } = effect;
        let is_ours = self.limiter == Limiter::TowerOutbound;
        let bound = if is_ours {
            format!("<= {:.1}", self.bound())
        } else {
            String::new()
        };
        print!(
            "  {:<16} {burst:>9.1} {bound:<9} {rate:>7.1} % {last:>8.0} {overtaken:>9.0}",
            self.limiter
        );
        if given_up > 0.0 {
            print!("  {given_up:.0} given up");
        }
        if is_ours {
            let is_ok = burst <= self.bound() && RATE.contains(&rate) && given_up == 0.0;
            print!("  {}", if is_ok { "ok" } else { "not reached" });
        }
        println!();
    }

    fn print_for_programs(&self) {
        print!("pacing {} {}: ", self.limiter, self.trouble);
        match self.effect {
            Some(effect) => println!(
                "burst = {:.1}, rate = {:.1}, last = {:.0}, overtaken = {:.0}, given up = {:.0}",
                effect.burst, effect.rate, effect.last, effect.overtaken, effect.given_up
            ),
            None => println!("cannot"),
        }
    }
}

// === Printing ===

pub(crate) fn print(rows: &[Row]) {
    if rows.is_empty() {
        return;
    }
    println!(
        "\n  {:<16} {:>9} {:9} {:>9} {:>8} {:>9}",
        "", "burst", "", "rate", "last, ms", "overtaken"
    );
    for trouble in Trouble::ALL {
        let mut rows = rows.iter().filter(|row| row.trouble == trouble).peekable();
        if rows.peek().is_some() {
            println!("{trouble}: {}", trouble.description());
        }
        rows.for_each(Row::print);
    }
}

pub(crate) fn print_for_programs(rows: &[Row]) {
    rows.iter().for_each(Row::print_for_programs);
}
