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
//! | `args/` | the command line, a file for each group of options |
//! | `limits/` | the limits that the command line sets, and what a request is charged |
//! | `input/` | the file of requests, its forms, and the number of tokens of a request |
//! | `output/` | the file of results, its lines, and what an earlier run wrote |
//! | `run/` | the run from start to end: feed the executor, watch the health of the attempts, stop |
//! | `price/` | prices, what requests cost, and the bound of it |
//! | `client/` | the client: reqwest with layers that read limits, usage and bodies; certificates to trust |
//! | `attempts.rs` | counts each attempt as it ends |
//! | `secrets.rs` | the keys of a run, to hide them |
//! | `plan.rs` | what a run would do, send and cost, without sending |
//! | `report.rs` | the picture of a run |
//! | `recording.rs` | how the run went over time |
//! | `view/` | what is shown during the run |
//! | `summary/` | the counts of a run, and the summary at its end |
//! | `local/` | the local provider: its answers, its limits, the bucket it counts with, and its headers |

mod args;
mod attempts;
mod client;
mod input;
mod limits;
mod local;
mod output;
mod plan;
mod price;
mod recording;
mod report;
mod run;
mod secrets;
mod summary;
mod view;

use args::Args;
use clap::{CommandFactory, error::ErrorKind};
use std::{
    io::{self, Write},
    process::ExitCode,
};

#[tokio::main]
async fn main() -> ExitCode {
    let args = Args::read();
    if let Some(shell) = args.completions {
        let mut script = Vec::new();
        clap_complete::generate(shell, &mut Args::command(), "bulk", &mut script);
        return print(&script);
    }
    if args.man {
        let mut page = Vec::new();
        return match clap_mangen::Man::new(Args::command()).render(&mut page) {
            Ok(()) => print(&page),
            Err(error) => failed(&error.into()),
        };
    }
    let target = args.send.target().unwrap_or_else(|error| {
        Args::command()
            .error(ErrorKind::ValueValidation, format!("{error:#}"))
            .exit();
    });
    match run::run(args, target).await {
        Ok(code) => code,
        Err(error) => failed(&error),
    }
}

fn failed(error: &anyhow::Error) -> ExitCode {
    // Standard error may be closed, which must not hide how the run ended.
    let _ = writeln!(io::stderr(), "error: {error:#}");
    ExitCode::FAILURE
}

/// Writes to the standard output. A reader that has read enough, such as `head`, is no failure.
fn print(text: &[u8]) -> ExitCode {
    match io::stdout().write_all(text) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => failed(&error.into()),
        _ => ExitCode::SUCCESS,
    }
}
