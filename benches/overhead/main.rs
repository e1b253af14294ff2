//! What a call costs around a service that does nothing: ours, and every peer, side by side.
//!
//! `cargo bench -p tower-outbound-benches --bench overhead [-- FILTER]`
//!
//! All contenders of a group take turns in every round, so that whatever else the machine does hits them alike; a
//! figure is the median of the rounds, a ratio the median of the rounds' ratios. Compare the ratios, not the times.
//! Allocations are counted in a run of their own, on one thread. The last lines are for machines:
//! `ratio <ours>/<peer> <callers> <runtime> = x.xx`.

mod contenders;
mod measure;

use clap::Parser;
use contenders::Contender;
use measure::{Figures, Pool};

const ROUNDS: usize = 11;

/// What a call costs around a service that does nothing: ours, and every peer, side by side.
#[derive(Parser)]
struct Options {
    /// Only pairs whose name, as in `executor/tower-stack`, has this in it.
    filter: Option<String>,
    /// Runs this contender alone, on one thread, for whoever looks on from outside: a profiler, say.
    #[arg(long, value_name = "NAME")]
    alone: Option<String>,
    /// So many callers for the one that runs alone.
    #[arg(long, default_value_t = 64)]
    callers: usize,
    /// So many times 40,000 calls for the one that runs alone.
    #[arg(long, default_value_t = 1)]
    times: usize,
    /// Passed by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

/// Contenders that take turns, and who is compared with whom.
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
    // Tower's rate limit has no clones, and so no second caller.
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
    if let Some(name) = &options.alone {
        let all = GROUPS.iter().flat_map(|group| group.contenders);
        let Some(contender) = all.into_iter().find(|contender| contender.name == name) else {
            eprintln!("there is no contender called {name}");
            std::process::exit(2);
        };
        let calls = measure::alone(contender, options.callers, options.times);
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
        "", "callers", "threads", "ns a call", "allocations"
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
                    .any(|(ours, peer)| [*ours, *peer].contains(&contender.name))
            })
            .collect();
        for pool in Pool::ALL {
            for &callers in group.callers {
                let figures = measure::in_turns(&contenders, pool, callers, ROUNDS);
                for (contender, figures) in contenders.iter().zip(&figures) {
                    println!(
                        "{:<52} {callers:>8} {:>8} {:>12.0} {:>13.1}",
                        contender.name,
                        pool.name(),
                        figures.median_ns(),
                        figures.allocations
                    );
                }
                let of = |name: &str| -> &Figures {
                    let at = contenders.iter().position(|contender| contender.name == name);
                    &figures[at.expect("a pair's contenders are in its group")]
                };
                for (ours, peer) in &pairs {
                    let ratio = of(ours).ratio(of(peer));
                    lines.push(format!("ratio {ours}/{peer} {callers} {} = {ratio:.2}", pool.name()));
                }
                println!();
            }
        }
    }
    lines.iter().for_each(|line| println!("{line}"));
}
