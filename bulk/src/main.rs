//! Sends every request of a file to a metered API, exactly as fast as its limits allow.
//!
//! ```text
//! cargo run --release -p tower-outbound-bulk                # 500 requests to a local provider
//! cargo run --release -p tower-outbound-bulk -- --help
//! ```
//!
//! What to watch: the local provider answers every request above its limits with 429, and the summary shows that there
//! was none. The binding limit, here the tokens per minute, is still used to nearly 100 %, as the last line of the
//! summary shows.
//!
//! | file | what it holds |
//! |---|---|
//! | `run.rs` | the run from start to end: submit the requests, wait for the last call, Ctrl-C |
//! | `client.rs` | the client: reqwest with layers that read limits, usage and bodies |
//! | `args.rs`, `limits.rs` | the command line, and the limits it sets |
//! | `input.rs` | a line of the input, and its number of tokens |
//! | `result.rs`, `output.rs` | a line of the results, and the file of results |
//! | `progress.rs` | the progress that is shown during the run |
//! | `counts.rs`, `summary.rs` | the counts of a run, and the summary at its end |
//! | `provider.rs`, `bucket.rs` | the local provider, and the bucket it counts with |

mod args;
mod bucket;
mod client;
mod counts;
mod input;
mod limits;
mod output;
mod progress;
mod provider;
mod result;
mod run;
mod summary;

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
