//! Measures the time and the allocations per call around a service that answers at once, for tower-outbound and its
//! peers side by side, with empty requests and with those of a chat API.
//!
//! `cargo bench -p tower-outbound-benches --bench overhead [-- FILTER]` takes about two minutes without a filter. With
//! `--wire`, it measures the processor time per request with a real HTTP client instead.
//!
//! In each round, every contender of a group is measured once, so that other load on the machine affects all of them. A
//! time is the median of the rounds, and a ratio is the median of the rounds' ratios. Compare the ratios, not the
//! times. Allocations are counted in a separate run on one thread. The last lines of the output are for programs:
//! `ratio <contender>/<peer> <callers> <threads> = x.xx`.

#[path = "../common.rs"]
mod common;
mod contenders;
mod groups;
mod limiters;
mod measure;
mod traffic;
mod wire;

use clap::Parser;
use groups::GROUPS;
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
    /// Measure only the processor time per request with a real HTTP client and a local server
    #[arg(long)]
    wire: bool,
    /// Be the server of --wire, until the standard input is closed
    #[arg(long, hide = true)]
    serve: bool,
    /// Passed by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() {
    let options = Options::parse();
    if options.serve {
        wire::serve();
        return;
    }
    if options.wire {
        wire::compare(ROUNDS);
        return;
    }
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
