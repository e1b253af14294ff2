//! Parses the command line.

use clap::Parser;

/// Several processes share one quota through Redis, and continue when Redis is killed.
#[derive(Debug, Parser)]
pub(crate) struct Args {
    /// The number of worker processes, from 1 to 64
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(crate) workers: u32,
    /// How long the workers send requests, in seconds, from 4 to 3600
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(4..=3_600))]
    pub(crate) seconds: u64,
    /// The quota: requests per second that the provider allows for all processes together
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u64).range(1..=20_000))]
    pub(crate) requests_per_second: u64,
    /// The burst: requests that the provider allows at once after a pause
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u64).range(1..=20_000))]
    pub(crate) burst: u64,
    /// Do not kill Redis
    #[arg(long)]
    pub(crate) no_kill: bool,

    /// Run as the worker with this number. The program passes this option, `--redis` and `--provider` to its
    /// worker processes
    #[arg(long, hide = true, requires = "redis", requires = "provider")]
    pub(crate) worker: Option<u32>,
    #[arg(long, hide = true)]
    pub(crate) redis: Option<String>,
    #[arg(long, hide = true)]
    pub(crate) provider: Option<String>,
}
