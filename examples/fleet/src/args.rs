//! The arguments.

use clap::Parser;

/// Several processes share one quota through Redis, and go on when Redis is killed.
#[derive(Debug, Parser)]
pub(crate) struct Args {
    /// How many processes there are.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(crate) workers: u32,
    /// For how long they send.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(4..=3_600))]
    pub(crate) seconds: u64,
    /// What the provider allows, all of them together.
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u64).range(1..=20_000))]
    pub(crate) requests_per_second: u64,
    /// What it allows at once.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u64).range(1..=20_000))]
    pub(crate) burst: u64,
    /// Leave Redis alone.
    #[arg(long)]
    pub(crate) no_kill: bool,

    /// Be a worker.
    #[arg(long, hide = true, requires = "redis", requires = "provider")]
    pub(crate) worker: Option<u32>,
    #[arg(long, hide = true)]
    pub(crate) redis: Option<String>,
    #[arg(long, hide = true)]
    pub(crate) provider: Option<String>,
}
