//! Sends every request of a file to a metered API: as fast as its limits allow, and no faster.
//!
//! ```text
//! cargo run --release -p tower-outbound-bulk                # 500 requests to a local provider
//! cargo run --release -p tower-outbound-bulk -- --help
//! ```
//!
//! What to watch: the local provider answers 429 to whatever is above its limits, and never has to. The tokens a minute
//! are used to the full all the same; the last line of the summary says to how many percent.
//!
//! | file | what it is about |
//! |---|---|
//! | `run.rs` | the job from start to end: feed the executor, drain it, Ctrl-C |
//! | `client.rs` | the client: reqwest, listened to and metered |
//! | `args.rs`, `limits.rs` | what was asked for |
//! | `input.rs` | a line of the file, and how many tokens it needs |
//! | `result.rs`, `output.rs` | a line of results, and the file they go to |
//! | `progress.rs` | what is shown meanwhile |
//! | `tally.rs`, `summary.rs` | what is counted, and shown at the end |
//! | `provider.rs`, `bucket.rs` | the local provider, and how it counts |

mod args;
mod bucket;
mod client;
mod input;
mod limits;
mod output;
mod progress;
mod provider;
mod result;
mod run;
mod summary;
mod tally;

use args::Args;
use clap::{CommandFactory, Parser, error::ErrorKind};
use std::process::ExitCode;

#[tokio::main]
async fn main() -> ExitCode {
    let args = Args::parse();
    let target = args.target().unwrap_or_else(|error| {
        Args::command()
            .error(ErrorKind::ValueValidation, format!("{error:#}"))
            .exit();
    });
    match run::run(args, target).await {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
