//! How well callers are paced: ours side by side with every peer that makes its callers wait.
//!
//! `cargo bench -p tower-outbound-benches --bench pacing`, about two and a half minutes. 64 callers on two threads ask
//! for one call after the other; each setting is given to one limiter after the other. `-- --help` tells how to choose
//! rows, repeat them, or draw a picture.
//!
//! - **achieved**: `(admitted - burst) / (rate x elapsed)`, from the first admission to the end of the run. With two
//!   budgets, the time an exact limiter would have needed for these calls in this order instead of
//!   `(admitted - burst) / rate`.
//! - **burst**: the largest of `admitted - rate x length` over all windows of time, however long. A bucket with a burst
//!   of b never shows more than b. A caller can only note the time after it was woken, so what a thread is held up
//!   between two notes is added.
//! - **p50, p99**: waits of calls that were admitted once all callers had been in line (64 / rate), and of those that
//!   were still waiting in the end, if for longer than that. First come, first served, all wait equally long. **max**
//!   is the longest of all.
//! - **cpu**: processor time of the whole process in percent of one core.
//! - **overtaken**: calls admitted while one that had arrived more than a millisecond earlier was still waiting, and
//!   waited for more than a millisecond longer.
//!
//! Ours is held to these bars: 99 % achieved; a burst of at most `burst + 1 + rate x 5 ms`, for late timers are made up
//! for; p99 / p50 at most 1.2 up to 1000/s; at 20000/s with a burst of one at most 15 % of a core.
//!
//! The last lines are for machines: `pacing <limiter> <setting>: achieved = .., burst = .., ..`.

mod figures;
mod limiters;
mod load;
mod plot;
mod table;

use clap::Parser;
use figures::{Budget, Figures};
use limiters::{Limiter, PLENTY};
use load::{CALLERS, Load};
use std::time::Duration;
use table::Row;

/// How well callers are paced: ours and its peers.
#[derive(Debug, Parser)]
struct Args {
    /// Only rows whose name contains this, as in "governor 1000/s burst 1"
    filter: Option<String>,
    /// A second for each row instead of four
    #[arg(long)]
    quick: bool,
    /// Run everything so often, and print medians
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Draw pacing.svg and pacing.png into the target directory instead
    #[arg(long)]
    plot: bool,
    /// Given by cargo
    #[arg(long, hide = true)]
    bench: bool,
}

/// What is asked of one limiter after the other.
#[derive(Clone, Debug)]
struct Setting {
    name: String,
    requests: Budget,
    tokens: Budget,
    most_tokens: u64,
    limiters: &'static [Limiter],
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
    // Half a thousand tokens is what a call costs on average.
    let weighted = [
        ("requests", Budget::new(1_000, 10), Budget::new(2_000_000, 20_000)),
        ("tokens", Budget::new(4_000, 40), Budget::new(500_500, 5_000)),
        ("both", Budget::new(1_000, 10), Budget::new(500_500, 5_000)),
    ];
    let even = even.map(|(rate, burst)| Setting {
        name: format!("{rate}/s burst {burst}"),
        requests: Budget::new(rate, burst),
        tokens: PLENTY,
        most_tokens: 1,
        limiters: &Limiter::ALL,
    });
    let weighted = weighted.map(|(binding, requests, tokens)| Setting {
        name: format!("weighted, {binding} binding"),
        requests,
        tokens,
        most_tokens: 1_000,
        limiters: &[Limiter::Ours],
    });
    even.into_iter().chain(weighted).collect()
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
        let chosen = |limiter: &&Limiter| {
            let name = format!("{limiter} {}", setting.name);
            args.filter.as_ref().is_none_or(|filter| name.contains(filter))
        };
        let limiters: Vec<_> = setting.limiters.iter().filter(chosen).collect();
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
        table::print_setting(&setting, &measured);
        rows.extend(measured);
    }
    table::print_foot(&rows);
    Ok(())
}

impl Setting {
    fn measure(&self, limiter: Limiter, length: Duration) -> Figures {
        let load = Load {
            requests: self.requests,
            tokens: self.tokens,
            most_tokens: self.most_tokens,
            quiet: Duration::ZERO,
            length,
        };
        let record = load.run(limiter);
        let warm_up = Duration::from_secs_f64(CALLERS as f64 / self.calls_per_second());
        Figures::new(&record.calls, record.cpu, [self.requests, self.tokens], warm_up, length)
    }

    fn is_weighted(&self) -> bool {
        self.most_tokens > 1
    }

    fn calls_per_second(&self) -> f64 {
        let mean_tokens = (1 + self.most_tokens) as f64 / 2.0;
        (self.requests.rate as f64).min(self.tokens.rate as f64 / mean_tokens)
    }
}
