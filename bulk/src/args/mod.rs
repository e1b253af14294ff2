//! The command line.

mod files;
mod limits;
mod local;
mod send;
mod view;

pub(crate) use files::{FileArgs, OnMalformed, OutputFormat};
pub(crate) use limits::LimitArgs;
pub(crate) use local::LocalArgs;
pub(crate) use send::{SendArgs, Target};
pub(crate) use view::ViewArgs;

use clap::Parser;
use std::net::SocketAddr;

/// Sends every request of a JSONL file to a metered API, within its limits, and writes a result line for each.
///
/// The file has one JSON object per line. The object is the body of a POST request, without its `custom_id`, which only
/// names the request in the results. A line may also have the form of batch files, `{"custom_id": …, "body": {…}}`:
/// then its `body` is sent.
///
/// Without --url the program starts a provider of its own on 127.0.0.1 and sends the requests there. This local
/// provider enforces the limits: it answers requests above them with 429.
#[derive(Parser)]
#[command(name = "bulk", after_help = AFTER_HELP)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) files: FileArgs,

    #[command(flatten)]
    pub(crate) send: SendArgs,

    #[command(flatten)]
    pub(crate) limits: LimitArgs,

    #[command(flatten)]
    pub(crate) view: ViewArgs,

    #[command(flatten)]
    pub(crate) local: LocalArgs,

    /// Send nothing: run only the local provider, at this address (127.0.0.1:8080, for example), until Ctrl-C. Another
    /// `bulk --url` can send to it
    #[arg(long, value_name = "ADDRESS", help_heading = "Local provider", conflicts_with_all = ["url", "resume"])]
    pub(crate) serve: Option<SocketAddr>,
}

const AFTER_HELP: &str = "\
Results: one line per request, written when the request ends. COMPLETED: a response with a 2xx status. FAILED: a
response with any other status (429, for example), or no response, after the last retry. CANCELLED: ended by Ctrl-C.
With --resume only COMPLETED requests are skipped. If a request has several lines, the last one is its result.

Ctrl-C, once: no more requests are read, and those already read are finished; --resume sends the rest. Twice: those
already read are cancelled.

Exit codes:
  0    every request has a COMPLETED line (skipped malformed lines do not count)
  1    the run could not start, or was broken off, because of the input, the output or the settings
  2    the command line is wrong
  3    some requests FAILED
  4    some requests have no result line
  130  interrupted by Ctrl-C";

impl Args {
    /// Returns whether the run sends to the local provider and writes its results to the default output.
    pub(crate) const fn is_demonstration(&self) -> bool {
        self.send.is_local() && self.files.has_default_output()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use clap::CommandFactory;
    use tower_outbound::provider::Provider;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn the_help_names_every_provider() {
        let help = Args::command().render_long_help().to_string();
        for provider in Provider::ALL {
            assert!(help.contains(&provider.to_string()), "{provider}");
        }
    }
}
