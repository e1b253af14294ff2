//! The command line.

mod config;
mod files;
mod key;
mod limits;
mod local;
mod send;
mod target;
mod view;

pub(crate) use files::{FileArgs, OnMalformed, OutputFormat, is_stdout};
pub(crate) use limits::LimitArgs;
pub(crate) use local::LocalArgs;
pub(crate) use send::SendArgs;
pub(crate) use target::Target;
pub(crate) use view::{CostArgs, ViewArgs};

use clap::{ArgMatches, CommandFactory, FromArgMatches, Parser, error::ErrorKind};
use std::{env, ffi::OsString, net::SocketAddr, path::PathBuf};

/// Sends every request of a file to a metered API, within its limits, and writes a result line for each.
///
/// The file has one JSON object per line: the body of a request, or a line of a batch file with `custom_id`, `method`,
/// `url` and `body`.
///
/// Without --url and --base-url the program starts a provider of its own on 127.0.0.1 and sends the requests there. This
/// local provider enforces the limits: it answers requests above them with 429.
#[derive(Parser)]
#[command(name = "bulk", version, after_help = AFTER_SHORT_HELP, after_long_help = AFTER_HELP)]
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

    /// Send nothing: run only the local provider, at this address (127.0.0.1:8080, for example), until Ctrl-C
    ///
    /// Another `bulk --url` can send to it.
    #[arg(long, value_name = "ADDRESS", help_heading = "Local provider", 
          conflicts_with_all = ["url", "base_url", "any_host", "resume"])]
    pub(crate) serve: Option<SocketAddr>,

    /// Read options from this file (TOML), under the names that they have here
    ///
    /// For example: `rpm = 500`, `header = ["x-team: a"]`, `keep-going = true`. The command line wins over the file.
    #[arg(long, value_name = "FILE", help_heading = None)]
    config: Option<PathBuf>,

    /// Print a script that completes the options of this program in a shell, and exit
    #[arg(long, value_name = "SHELL", exclusive = true, hide_short_help = true, help_heading = None)]
    pub(crate) completions: Option<clap_complete::Shell>,

    /// Print the manual page in roff, and exit
    #[arg(long, exclusive = true, hide_short_help = true, help_heading = None)]
    pub(crate) man: bool,
}

const AFTER_HELP: &str = "\
Results: one line per request, written when the request ends. COMPLETED: a response with a 2xx status. FAILED: a
response with any other status (429, for example), or no response, after the last retry. CANCELLED: cut off on the wire
when the run was stopped. A 2xx whose body is no answer (an error object, HTML, a broken stream) is FAILED, too, and so
is a malformed line of the input, unless --on-malformed says otherwise. With --errors FILE the lines that are not
COMPLETED are in that file, and only there. With --resume only COMPLETED requests are skipped. If a request has several
lines, the last one is its result.

Ctrl-C, SIGTERM and SIGHUP, once: nothing more is sent, what is on the wire finishes (at most --drain seconds), and the
rest is left for --resume. Twice: what is on the wire is cancelled, too.

Exit codes:
  0    every request has a COMPLETED line
  1    the run could not start, or was broken off: because of the input, the output or the settings, because every
       further request would have failed, or because --max-cost is reached
  2    the command line is wrong
  3    some requests FAILED, or some lines of the input are malformed (with --on-malformed fail)
  4    some requests have no result line
  130  interrupted by Ctrl-C (143: by SIGTERM, 129: by SIGHUP)";

const AFTER_SHORT_HELP: &str = "\
Try it:   bulk
Use it:   bulk --base-url https://api.openai.com/v1 --input batch.jsonl --output results.jsonl --rpm 500 --tpm 200000
More:     bulk --help says what each option does, what results mean, and what the exit codes are";

impl Args {
    /// Reads the command line, and the file of `--config` if it names one. Ends the process if they are wrong, or ask
    /// for help.
    pub(crate) fn read() -> Self {
        Self::from_command_line(&env::args_os().collect::<Vec<_>>()).unwrap_or_else(|error| error.exit())
    }

    fn from_command_line(command_line: &[OsString]) -> Result<Self, clap::Error> {
        let matches = Self::command().try_get_matches_from(command_line)?;
        let config: Option<&PathBuf> = matches.get_one("config");
        let Some(path) = config else {
            return Self::of(&matches);
        };
        let mut command = Self::command();
        let from_file = config::arguments(path, &command, &matches)
            .map_err(|reason| command.error(ErrorKind::ValueValidation, reason))?;
        let all = config::before_command_line(from_file, command_line);
        Self::of(&command.try_get_matches_from(all)?)
    }

    fn of(matches: &ArgMatches) -> Result<Self, clap::Error> {
        Self::from_arg_matches(matches).map_err(|error| error.format(&mut Self::command()))
    }

    /// Returns whether the run sends to the local provider and writes its results to the default output.
    pub(crate) const fn is_demonstration(&self) -> bool {
        self.send.is_local() && self.files.has_default_output()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
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
