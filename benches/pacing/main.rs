//! Measures how exactly, fairly and cheaply a rate limiter lets calls wait: tower-outbound, and every peer that lets
//! its callers wait.
//!
//! `cargo bench -p tower-outbound-benches --bench pacing` takes about four minutes. 64 callers on two threads
//! each make one call after the other. Each setting is run on one limiter after the other. `-- --help` shows how to
//! select rows, repeat them, or draw a picture.
//!
//! The columns of the table:
//!
//! - **achieved**: `(admitted - burst) / (rate x elapsed)`, from the first admission to the end of the run. With several
//!   budgets, `(admitted - burst) / rate` is replaced by the time that an exact limiter needs for these calls in this
//!   order.
//! - **burst**: the largest value of `admitted - rate x length` over all windows of time of any length. For an exact
//!   bucket with a burst of b, the value is never above b. A caller records the time after it was woken, so a delay of
//!   its thread between two records adds to the value.
//! - **p50, p99**: quantiles of the waits of two kinds of calls: those that were admitted after 64 / rate, when the
//!   queue has reached its full length, and those that were still waiting at the end and had waited for longer than
//!   64 / rate. With first come, first served, all calls wait equally long. **max**: the longest wait of all calls.
//! - **cpu**: processor time of the whole process in percent of one core.
//! - **overtaken**: the number of calls that were admitted although a call that had arrived more than a millisecond
//!   earlier was still waiting, and went on waiting for more than a millisecond.
//!
//! tower-outbound has to keep these bounds: achieved is not below 99 %; burst is not above `burst + 1 + rate x 5 ms`,
//! because the limiter makes up for up to 5 ms of a late timer; p99/p50 is not above 1.2 at rates up to 1000/s; cpu is
//! not above 15 % at 20000/s with a burst of 1. Each of its rows ends with `ok`, or with `not reached` and the names of
//! the columns.
//!
//! The rows whose names begin with `trouble` show something else: what a limiter lets through when waiting calls are
//! cancelled, the limit is paused, threads are blocked, or calls use another amount than was estimated. The README of the
//! benches explains their columns.
//!
//! The last lines of the output are for programs: `pacing <limiter> <setting>: achieved = .., burst = .., ..`.

#[path = "../common.rs"]
mod common;
mod figures;
mod limiters;
mod load;
mod plot;
mod table;
mod trouble;

use clap::Parser;
use figures::{Budget, Figures};
use limiters::{Limiter, Limits};
use load::{CALLERS, Load, Tokens};
use std::time::Duration;
use table::Row;
use trouble::Trouble;

/// How exactly, fairly and cheaply a rate limiter lets calls wait: tower-outbound and its peers.
#[derive(Debug, Parser)]
struct Args {
    /// Run only the rows whose name contains this text, as in "governor 1000/s burst 1"
    filter: Option<String>,
    /// Run each row for one second instead of four
    #[arg(long)]
    quick: bool,
    /// Run each row this many times, and print the median of each figure
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Draw pacing.svg and pacing.png in the target directory, and measure nothing
    #[arg(long)]
    plot: bool,
    /// Passed by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

/// The limits and costs that one limiter after the other is run with. Those that do not limit tokens are left out where
/// these are limited.
#[derive(Clone, Debug)]
struct Setting {
    name: String,
    limits: Limits,
    tokens: Tokens,
}

fn settings() -> Vec<Setting> {
    let even = [
        (100, 1),
        (100, 10),
        (1_000, 1),
        (1_000, 100),
        (20_000, 1),
        (20_000, 200),
    ];
    // A call costs 1 to 1,000 tokens, 500.5 on average.
    let weighted = [
        ("requests", Budget::new(1_000, 10), Budget::new(2_000_000, 20_000)),
        ("tokens", Budget::new(4_000, 40), Budget::new(500_500, 5_000)),
        ("both", Budget::new(1_000, 10), Budget::new(500_500, 5_000)),
    ];
    let even = even.map(|(rate, burst)| Setting {
        name: format!("{rate}/s burst {burst}"),
        limits: Limits::requests(Budget::new(rate, burst)),
        tokens: Tokens::UpTo(1),
    });
    let weighted = weighted.map(|(binding, requests, tokens)| Setting {
        name: format!("weighted, {binding} binding"),
        limits: Limits {
            requests,
            tokens,
            output: None,
        },
        tokens: Tokens::UpTo(1_000),
    });
    // Light calls wait for a request. A call with a heavy prompt, or a heavy answer, costs 500.5 tokens of it on average,
    // and waits for these.
    let in_turns = Setting {
        name: "three budgets, binding in turns".to_owned(),
        limits: Limits {
            requests: Budget::new(1_000, 10),
            tokens: Budget::new(250_250, 2_500),
            output: Some(Budget::new(250_250, 2_500)),
        },
        tokens: Tokens::InTurns,
    };
    even.into_iter().chain(weighted).chain([in_turns]).collect()
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    if args.plot {
        return plot::draw();
    }
    let length = Duration::from_secs(if args.quick { 1 } else { 4 });
    let mut rows = Vec::new();
    table::print_head();
    for setting in settings() {
        let chosen = |limiter: &&Limiter| args.selects(&format!("{limiter} {}", setting.name));
        let limiters = Limiter::ALL.iter().filter(chosen);
        let (limiters, unable): (Vec<&Limiter>, Vec<_>) =
            limiters.partition(|limiter| setting.is_counted_by(**limiter));
        let mut rounds = vec![Vec::new(); limiters.len()];
        for _ in 0..args.rounds {
            for (limiter, rounds) in limiters.iter().zip(&mut rounds) {
                rounds.push(setting.measure(**limiter, length));
            }
        }
        let measured = limiters.into_iter().zip(&rounds);
        let measured: Vec<_> = measured
            .map(|(limiter, rounds)| Row::new(*limiter, &setting, Figures::median(rounds)))
            .collect();
        table::print_setting(&setting, &measured, &unable);
        rows.extend(measured);
    }
    let troubles = measure_trouble(&args);
    trouble::print(&troubles);
    table::print_foot(&rows);
    trouble::print_for_programs(&troubles);
    Ok(())
}

/// In each round, every limiter is measured once.
fn measure_trouble(args: &Args) -> Vec<trouble::Row> {
    let scale = if args.quick {
        trouble::Scale::QUICK
    } else {
        trouble::Scale::FULL
    };
    let mut rows = Vec::new();
    for trouble in Trouble::ALL {
        let limiters: Vec<_> = Limiter::ALL
            .into_iter()
            .filter(|limiter| args.selects(&format!("{limiter} {trouble}")))
            .collect();
        let mut rounds = vec![Vec::new(); limiters.len()];
        for _ in 0..args.rounds {
            for (limiter, rounds) in limiters.iter().zip(&mut rounds) {
                rounds.extend(trouble.run(*limiter, scale));
            }
        }
        let measured = limiters.into_iter().zip(&rounds);
        rows.extend(measured.map(|(limiter, rounds)| trouble::Row::new(limiter, trouble, rounds)));
    }
    rows
}

impl Args {
    fn selects(&self, name: &str) -> bool {
        self.filter.as_ref().is_none_or(|filter| name.contains(filter))
    }
}

impl Setting {
    fn measure(&self, limiter: Limiter, length: Duration) -> Figures {
        let load = Load {
            limits: self.limits,
            tokens: self.tokens,
            pause: Duration::ZERO,
            length,
        };
        let record = load.run(limiter);
        let warm_up = Duration::from_secs_f64(CALLERS as f64 / self.calls_per_second());
        Figures::new(&record.calls, record.cpu, &self.limits.budgets(), warm_up, length)
    }

    fn is_weighted(&self) -> bool {
        self.tokens != Tokens::UpTo(1)
    }

    fn is_counted_by(&self, limiter: Limiter) -> bool {
        !self.is_weighted() || limiter.limits_tokens()
    }

    /// The number of calls per second that an exact limiter admits; where the costs change, the lowest.
    fn calls_per_second(&self) -> f64 {
        let most_tokens = match self.tokens {
            Tokens::UpTo(most) => most,
            Tokens::InTurns => Tokens::HEAVY,
        };
        let mean_tokens = (1 + most_tokens) as f64 / 2.0;
        let Limits { requests, tokens, .. } = self.limits;
        (requests.rate as f64).min(tokens.rate as f64 / mean_tokens)
    }
}
