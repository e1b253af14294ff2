//! Measures what a schedule gives and what it costs: an executor with a schedule beside one without, and beside the fair
//! queue of throttle-net.
//!
//! `cargo bench -p tower-outbound-benches --bench schedule` takes about two minutes; `-- --quick` 20 seconds. In each
//! round everything that is compared is measured once, one after the other, and a figure is the median of the rounds.
//!
//! - **small tenant**: a large tenant makes all its calls at once, and then a small one makes ten. **achieved** is the
//!   part of the rate that is reached until the last call, and **the ten** is the time until the last of the ten. All
//!   waits are real.
//! - **cost**: processor time per call of 100,000 calls that are submitted, wait, and are answered at once. The limits
//!   are never reached. The calls are those of one flow, or of more flows in turns. **idle** flows had a call before, and
//!   are still known, because their limits are not full again.
//!
//! The last lines of the output are for programs: `schedule <name>: <figure> = ..`.

#[path = "../common.rs"]
mod common;
mod cost;
mod small_tenant;

use clap::Parser;

/// What a schedule gives and what it costs.
#[derive(Debug, Parser)]
struct Args {
    /// Measure only the table whose name contains this text: "small tenant" or "cost"
    filter: Option<String>,
    /// Measure one round, with fewer calls
    #[arg(long)]
    quick: bool,
    /// Passed by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() {
    let args = Args::parse();
    let rounds = if args.quick { 1 } else { 5 };
    let selects = |name: &str| args.filter.as_ref().is_none_or(|filter| name.contains(filter));
    let mut lines = Vec::new();
    if selects("small tenant") {
        lines.extend(small_tenant::print(rounds.min(3), args.quick));
        println!();
    }
    if selects("cost") {
        lines.extend(cost::print(rounds, if args.quick { 10_000 } else { 100_000 }));
        println!();
    }
    lines.iter().for_each(|line| println!("{line}"));
}
