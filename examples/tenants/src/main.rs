//! Three tenants share an account with two models: one floods it with calls, one is steady, one is a trickle.
//!
//! The same calls are made twice: first in, first out, and fair between tenants. The limits hold in both runs: those of
//! the account, and those of the large model, which all tenants share.
//!
//! What to watch: first in, first out, the two small tenants wait until the flood is over. In the fair run they wait for
//! a few milliseconds, and the flood takes no longer than before. A line of the table is a flow: how many of its calls
//! wait and are open, how far it has got ahead of the others, and which limit blocks it.
//!
//! Run it with `cargo run --release -p tower-outbound-tenants`; it takes ten seconds. `-- --plot docs/fairness.svg` draws
//! the picture in the README.

mod load;
mod plot;
mod provider;
mod run;
mod table;

use anyhow::ensure;
use clap::Parser;
use load::TENANTS;
use run::{Order, run};
use std::path::PathBuf;

/// A flood and a trickle of calls through one executor: first in, first out, and fair between tenants.
#[derive(Debug, Parser)]
struct Args {
    /// Draw a picture of both runs
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let url = provider::start().await?;
    println!("First in, first out");
    let first_in = run(Order::FirstComeFirstServed, &url).await?;
    println!("\nFair between tenants");
    let fair = run(Order::Fair, &url).await?;

    println!("\n{:>10} {:>22} {:>22}", "", "first in, first out", "fair");
    println!(
        "{:>10} {:>11} {:>10} {:>11} {:>10}",
        "tenant", "longest", "last", "longest", "last"
    );
    for ((tenant, first_in), fair) in TENANTS.iter().zip(&first_in).zip(&fair) {
        print!("{:>10}", tenant.name);
        for run in [first_in, fair] {
            let last = run.at.last().copied().unwrap_or_default();
            print!(" {:>9.2} s {:>8.2} s", run.longest.as_secs_f64(), last.as_secs_f64());
        }
        println!();
    }
    if let Some(file) = &args.plot {
        plot::draw(file, &first_in, &fair)?;
        println!("\n{}", file.display());
    }
    for ((tenant, first_in), fair) in TENANTS.iter().zip(&first_in).zip(&fair).skip(1) {
        ensure!(
            fair.longest * 3 < first_in.longest,
            "{} still waits for the flood",
            tenant.name
        );
    }
    Ok(())
}
