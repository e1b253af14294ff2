//! The options of limits, and of the costs that count against them.

use crate::limits::{DefaultAmount, FurtherRate, PerMinute};
use std::num::{NonZeroU64, NonZeroUsize};

#[derive(clap::Args)]
#[command(next_help_heading = "Limits")]
pub(crate) struct LimitArgs {
    /// Limit of requests per minute, or `off`
    #[arg(long, value_name = "N", default_value = "1500")]
    pub(crate) rpm: PerMinute,

    /// Limit of tokens per minute, or `off`
    #[arg(long, value_name = "N", default_value = "240000")]
    pub(crate) tpm: PerMinute,

    /// Limit of tokens of the prompts per minute, or `off`, for providers that limit them apart
    ///
    /// A prompt is estimated as what a request is estimated to need without its `max_tokens`.
    #[arg(long, value_name = "N", default_value = "off")]
    pub(crate) input_tokens: PerMinute,

    /// Limit of tokens of the answers per minute, or `off`, for providers that limit them apart
    ///
    /// An answer is estimated as the `max_tokens` of its request, or as --estimate-quantile says.
    #[arg(long, value_name = "N", default_value = "off")]
    pub(crate) output_tokens: PerMinute,

    /// A further limit, such as requests=14400/day or images=100/min; may be given several times
    ///
    /// NAME is requests, tokens, input_tokens, output_tokens, or a name of your own, and PERIOD is s, min, h or day. At
    /// most N may be sent at once, so up to twice N in the first period.
    ///
    /// With a name of your own, the field `cost` of a line tells what its request takes: `"cost": {"images": 2}`, beside
    /// `custom_id`. It is not sent. A request whose line does not tell takes 1, or what --budget-default says. There may
    /// be four such names.
    #[arg(long, value_name = "NAME=N/PERIOD")]
    pub(crate) budget: Vec<FurtherRate>,

    /// What a request takes of a --budget with a name of your own, such as images=2, if its line does not tell
    /// [default: 1]
    #[arg(long, value_name = "NAME=N")]
    pub(crate) budget_default: Vec<DefaultAmount>,

    /// Requests that may be sent at once after a pause [default: one second's worth of --rpm]
    #[arg(long, value_name = "N")]
    pub(crate) rpm_burst: Option<NonZeroU64>,

    /// Tokens that may be charged at once after a pause [default: one second's worth of --tpm, or what a request needs]
    ///
    /// A request that needs more fails without being sent. By default the burst grows when a larger request comes, to at
    /// most one minute's worth.
    #[arg(long, value_name = "N")]
    pub(crate) tpm_burst: Option<NonZeroU64>,

    /// Limit of requests in flight at once
    #[arg(long, value_name = "N", default_value = "32")]
    pub(crate) concurrency: NonZeroUsize,

    /// Limit of requests that wait in memory
    ///
    /// The file is read further as they are sent.
    #[arg(long, value_name = "N", default_value = "100")]
    pub(crate) queue: NonZeroUsize,

    /// The field of a line that holds its number of tokens, as a path with dots: `tokens`, `usage.total`
    ///
    /// Without it, tokens are estimated as a quarter of the characters of the messages plus `max_tokens`.
    #[arg(long, value_name = "PATH")]
    pub(crate) tokens_field: Option<String>,

    /// Factor, from 0.01 to 100, by which token estimates are multiplied
    ///
    /// When a response reports the tokens that were used, the difference is settled in any case. Without effect if
    /// --tokens-field is given.
    #[arg(long, value_name = "FACTOR", default_value = "1", value_parser = factor)]
    pub(crate) estimate_times: f64,

    /// Estimate each answer by this quantile of those before of the same model, such as 0.95
    ///
    /// For requests whose `max_tokens` is far above what answers take: with 0.95, one answer in twenty takes more than it
    /// was charged, and the difference is settled. The last 128 answers of each of 64 models count, from 20 answers on.
    /// By default, an answer is charged as its `max_tokens`, and nothing if there is none.
    #[arg(long, value_name = "Q", value_parser = quantile)]
    pub(crate) estimate_quantile: Option<f64>,

    /// Keep the limits given here, even if the provider reports others or rejects requests within them
    ///
    /// Its remaining quota and its `retry-after` are obeyed in any case.
    #[arg(long)]
    pub(crate) keep_limits: bool,

    /// Share the limits with other runs through this Redis or Valkey server: redis://host:port/
    ///
    /// All runs that name the same --quota share its limits. The program has to be built with the feature `redis`.
    #[arg(long, value_name = "URL", requires = "quota", help_heading = "Shared limits")]
    pub(crate) redis: Option<String>,

    /// The name of the limits that are shared through --redis
    #[arg(long, value_name = "NAME", requires = "redis", help_heading = "Shared limits")]
    pub(crate) quota: Option<String>,
}

fn factor(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(factor) if (0.01..=100.0).contains(&factor) => Ok(factor),
        _ => Err("must be a number from 0.01 to 100".into()),
    }
}

fn quantile(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(quantile) if quantile > 0.0 && quantile <= 1.0 => Ok(quantile),
        _ => Err("must be a number above 0 and at most 1".into()),
    }
}
