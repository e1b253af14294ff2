//! Measures the time and the allocations per call around a service that does nothing, for tower-outbound and its peers
//! side by side.
//!
//! `cargo bench -p tower-outbound-benches --bench overhead [-- FILTER]` takes about a minute without a filter.
//!
//! In each round, every contender of a group is measured once, so that other load on the machine affects all of them. A
//! time is the median of the rounds, and a ratio is the median of the rounds' ratios. Compare the ratios, not the
//! times. Allocations are counted in a separate run on one thread. The last lines of the output are for programs:
//! `ratio <contender>/<peer> <callers> <threads> = x.xx`.

#[path = "../common.rs"]
mod common;
mod contenders;
mod measure;

use clap::Parser;
use contenders::Contender;
use measure::{Figures, Threads};

const ROUNDS: usize = 11;

/// Time and allocations per call around a service that does nothing: tower-outbound and its peers, side by side.
#[derive(Parser)]
struct Options {
    /// Measure only the pairs whose name contains this text, as in `executor/tower-stack`
    filter: Option<String>,
    /// Run only this contender, on one thread and without measuring it, for a profiler
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
    /// The number of callers with --only
    #[arg(long, value_name = "N", default_value_t = 64)]
    callers: usize,
    /// The number of calls with --only, in units of 40,000
    #[arg(long, value_name = "N", default_value_t = 1)]
    times: usize,
    /// Passed by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

/// Contenders that are measured in the same rounds, and the pairs of them that are compared.
struct Group {
    callers: &'static [usize],
    contenders: &'static [Contender],
    pairs: &'static [(&'static str, &'static str)],
}

const GROUPS: [Group; 4] = [
    Group {
        callers: &[1, 64, 512],
        contenders: &[
            contenders::EXECUTOR,
            contenders::STACK_WITH_EVENTS,
            contenders::STACK_WITHOUT_EVENTS,
            contenders::TOWER_STACK,
            contenders::RESILIENCE_STACK,
        ],
        pairs: &[
            ("executor", "tower-stack"),
            ("stack-with-events", "tower-stack"),
            ("stack-without-events", "tower-stack"),
            ("executor", "tower-resilience-stack"),
            ("stack-with-events", "tower-resilience-stack"),
            ("stack-without-events", "tower-resilience-stack"),
        ],
    },
    Group {
        callers: &[1, 64, 512],
        contenders: &[
            contenders::QUEUE,
            contenders::TOWER_BUFFER,
            contenders::CONCURRENCY,
            contenders::TOWER_CONCURRENCY,
            contenders::RESILIENCE_BULKHEAD,
            contenders::RATE,
            contenders::RESILIENCE_RATE,
            contenders::EVENT,
            contenders::TOWER_HTTP_TRACE,
        ],
        pairs: &[
            ("queue", "tower-buffer"),
            ("concurrency", "tower-concurrency"),
            ("concurrency", "tower-resilience-bulkhead"),
            ("rate", "tower-resilience-rate"),
            ("event", "tower-http-trace"),
        ],
    },
    // Tower's rate limit cannot be cloned, so this group has only one caller.
    Group {
        callers: &[1],
        contenders: &[contenders::RATE, contenders::TOWER_RATE],
        pairs: &[("rate", "tower-rate")],
    },
    Group {
        callers: &[1],
        contenders: &[
            contenders::TRY_ACQUIRE,
            contenders::GOVERNOR_CHECK,
            contenders::INSTANT_NOW,
            contenders::ACQUIRE,
            contenders::GOVERNOR_UNTIL_READY,
            contenders::LEAKY_BUCKET_ACQUIRE,
        ],
        pairs: &[
            ("try-acquire", "governor-check"),
            ("try-acquire", "tokio-instant-now"),
            ("acquire", "governor-until-ready"),
            ("acquire", "leaky-bucket-acquire"),
        ],
    },
];

fn main() {
    let options = Options::parse();
    if let Some(name) = &options.only {
        let all = GROUPS.iter().flat_map(|group| group.contenders);
        let Some(contender) = all.into_iter().find(|contender| contender.name == name) else {
            eprintln!("there is no contender called {name}: the first column of the table has the names");
            std::process::exit(2);
        };
        let calls = measure::run_only(contender, options.callers, options.times);
        println!("{calls} calls of {name}");
        return;
    }
    let filter = options.filter;
    let wanted = |pair: &(&str, &str)| {
        let name = format!("{}/{}", pair.0, pair.1);
        filter.as_ref().is_none_or(|filter| name.contains(filter))
    };
    let mut lines = Vec::new();
    println!(
        "{:<52} {:>8} {:>8} {:>12} {:>13}",
        "", "callers", "threads", "ns per call", "allocations"
    );
    for group in &GROUPS {
        let pairs: Vec<_> = group.pairs.iter().copied().filter(wanted).collect();
        if pairs.is_empty() {
            continue;
        }
        let contenders: Vec<_> = group
            .contenders
            .iter()
            .filter(|contender| {
                pairs
                    .iter()
                    .any(|(name, peer)| [*name, *peer].contains(&contender.name))
            })
            .collect();
        for threads in Threads::ALL {
            for &callers in group.callers {
                let figures = measure::in_turns(&contenders, threads, callers, ROUNDS);
                for (contender, figures) in contenders.iter().zip(&figures) {
                    println!(
                        "{:<52} {callers:>8} {:>8} {:>12.0} {:>13.1}",
                        contender.name,
                        threads.name(),
                        figures.median_ns(),
                        figures.allocations
                    );
                }
                let figures_of = |name: &str| -> &Figures {
                    let at = contenders.iter().position(|contender| contender.name == name);
                    &figures[at.expect("a pair's contenders are in its group")]
                };
                for (name, peer) in &pairs {
                    let ratio = figures_of(name).ratio(figures_of(peer));
                    lines.push(format!("ratio {name}/{peer} {callers} {} = {ratio:.2}", threads.name()));
                }
                println!();
            }
        }
    }
    lines.iter().for_each(|line| println!("{line}"));
}
