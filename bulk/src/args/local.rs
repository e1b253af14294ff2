//! The options of the local provider.

use crate::limits::{FurtherRate, PerMinute};

/// The behaviour of the local provider.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Local provider")]
pub(crate) struct LocalArgs {
    /// Requests per minute that the local provider allows, or `off` [default: the value of --rpm]
    #[arg(long, hide_short_help = true, value_name = "N")]
    pub(crate) local_rpm: Option<PerMinute>,

    /// Tokens per minute that the local provider allows, or `off` [default: the value of --tpm]
    #[arg(long, hide_short_help = true, value_name = "N")]
    pub(crate) local_tpm: Option<PerMinute>,

    /// A further limit of the local provider, such as output_tokens=8000/min [default: those of --input-tokens,
    /// --output-tokens and --budget]
    ///
    /// May be given several times. What a request takes of a budget with a name of your own stands in its header
    /// `x-local-cost`, which this program sends to its own local provider: `images=2, seconds=30`. A request without it
    /// takes 1.
    #[arg(long, hide_short_help = true, value_name = "NAME=N/PERIOD")]
    pub(crate) local_budget: Vec<FurtherRate>,

    /// Percentage of `max_tokens` that each response uses, from 1 to 100
    #[arg(long, hide_short_help = true, value_name = "PERCENT", default_value = "100",
          value_parser = clap::value_parser!(u8).range(1..=100))]
    pub(crate) local_usage: u8,

    /// Percentage of requests that are answered with 503, from 0 to 100
    #[arg(long, hide_short_help = true, value_name = "PERCENT", default_value = "2",
          value_parser = clap::value_parser!(u8).range(0..=100))]
    pub(crate) local_faults: u8,

    /// Percentage of responses whose body pauses for 400 ms in the middle, from 0 to 100
    #[arg(long, hide_short_help = true, value_name = "PERCENT", default_value = "5",
          value_parser = clap::value_parser!(u8).range(0..=100))]
    pub(crate) local_slow: u8,

    /// Seed that selects the requests with a 503 or a slow response; the same seed selects the same ones
    #[arg(long, hide_short_help = true, value_name = "N", default_value = "1")]
    pub(crate) local_seed: u64,
}
