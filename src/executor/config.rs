//! [`Config`]: an executor's settings as plain values, as a configuration file has them.

use super::builder::ExecutorBuilder;
use crate::{
    concurrency::Concurrency,
    error::InvalidConfig,
    queue::QueueLayer,
    rate::{Budget, Limits, Rate},
};
use std::{collections::BTreeMap, time::Duration};

/// An executor's settings as plain values. With the feature `serde`, they can be read from JSON or any other format.
///
/// Every field has a default. [`into_builder`](Self::into_builder) checks the values.
///
/// ```
/// # #[cfg(feature = "serde")] {
/// use tower_outbound::{Executor, executor::Config};
///
/// let config: Config = serde_json::from_str(
///     r#"{
///         "requests_rate": 50,
///         "requests_period_secs": 60,
///         "budgets": {
///             "requests": [{ "rate": 10000, "period_secs": 86400 }],
///             "input_tokens": [{ "rate": 30000 }],
///             "output_tokens": [{ "rate": 8000, "burst": 4000 }],
///             "images": [{ "rate": 5, "period_secs": 1 }, { "rate": 1000, "period_secs": 86400 }]
///         }
///     }"#,
/// )?;
/// let executor = config.into_builder()?.build_for_closures::<String>()?;
/// let available = executor.monitor().available();
/// assert_eq!((available.requests, available.input_tokens, available.of("images")), (Some(50), Some(30_000), Some(5)));
/// # }
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(default, deny_unknown_fields)
)]
pub struct Config {
    /// How many calls the queue holds. Default: 1000.
    pub queue_capacity: usize,
    /// How many calls may be in flight at once. Default: 10.
    pub concurrency_limit: usize,
    /// How many requests may be sent per `requests_period_secs`. Default: 10.
    pub requests_rate: f64,
    /// The period of `requests_rate`, the rate of requests, in seconds. Default: 1.
    pub requests_period_secs: f64,
    /// The most requests that may be sent at one instant. Default: `requests_rate`, but at least 1.
    pub requests_burst: Option<f64>,
    /// How many of the API's tokens may be used per `tokens_period_secs`. Default: not limited.
    pub tokens_rate: Option<f64>,
    /// The period of `tokens_rate`, the rate of the API's tokens, in seconds. Default: 60.
    pub tokens_period_secs: f64,
    /// The most API tokens that may be used at one instant. Default: `tokens_rate`, but at least 1.
    pub tokens_burst: Option<f64>,
    /// The rates of further budgets, by the budget's name: `input_tokens`, `output_tokens`, or a name of your own, such
    /// as `images`. A budget may have several rates, all of which hold. The rates of `requests` and `tokens` are added to
    /// the one above. Default: none.
    pub budgets: BTreeMap<String, Vec<BudgetRate>>,
    /// How many calls may start at once: see [`ExecutorBuilder::workers`](super::ExecutorBuilder::workers). Default: 1.
    pub workers: usize,
}

/// One rate of a budget in [`Config::budgets`].
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
pub struct BudgetRate {
    /// How much of the budget may be used per `period_secs`.
    pub rate: f64,
    /// The period of the rate, in seconds. Default: 60.
    #[cfg_attr(feature = "serde", serde(default = "default_period_secs"))]
    pub period_secs: f64,
    /// The most that may be used at one instant. Default: `rate`, but at least 1.
    #[cfg_attr(feature = "serde", serde(default))]
    pub burst: Option<f64>,
}

#[cfg(feature = "serde")]
const fn default_period_secs() -> f64 {
    60.0
}

// === impl Config ===

impl Default for Config {
    fn default() -> Self {
        Self {
            queue_capacity: 1_000,
            concurrency_limit: 10,
            requests_rate: 10.0,
            requests_period_secs: 1.0,
            requests_burst: None,
            tokens_rate: None,
            tokens_period_secs: 60.0,
            tokens_burst: None,
            budgets: BTreeMap::new(),
            workers: 1,
        }
    }
}

impl Config {
    /// Returns a builder of executors with these settings.
    ///
    /// # Errors
    ///
    /// Returns [`InvalidConfig`], which names the field that is out of range (zero, negative, not a number, a burst
    /// below one), such as `budgets.images.rate`; the name of a budget that is not valid, or is that of a built-in budget
    /// in another spelling, such as `budgets.input-tokens`; or `tokens_rate` if it is missing although its period or
    /// burst is given.
    pub fn into_builder(self) -> Result<ExecutorBuilder, InvalidConfig> {
        // This queue layer and this concurrency limit are made only to check the settings, and are dropped: the builder
        // makes its own.
        let queue = QueueLayer::<()>::new(self.queue_capacity)?;
        Concurrency::new(self.concurrency_limit)?;
        queue.workers(self.workers)?;

        let requests = rate(
            "requests",
            self.requests_rate,
            self.requests_period_secs,
            self.requests_burst,
        )?;
        check(&Limits::new().requests(requests))?;
        let builder = ExecutorBuilder::new()
            .queue_capacity(self.queue_capacity)
            .concurrency_limit(self.concurrency_limit)
            .workers(self.workers);
        // A config that says nothing about rates leaves the builder free to use a shared limiter.
        let default = Self::default();
        let is_default = (self.requests_rate, self.requests_period_secs, self.requests_burst)
            == (
                default.requests_rate,
                default.requests_period_secs,
                default.requests_burst,
            );
        let has_more = self.budgets.contains_key(Budget::Requests.name());
        let builder = if is_default && !has_more {
            builder
        } else {
            builder.requests(requests)
        };
        let builder = self.with_tokens(builder)?;
        self.with_budgets(builder)
    }

    fn with_tokens(&self, builder: ExecutorBuilder) -> Result<ExecutorBuilder, InvalidConfig> {
        let Some(tokens) = self.tokens_rate else {
            let unused = self.tokens_burst.is_some() || self.tokens_period_secs != Self::default().tokens_period_secs;
            let error = || {
                InvalidConfig::new(
                    "tokens_rate",
                    "is missing, but its period or burst is given: add it, or leave them out",
                )
            };
            return if unused { Err(error()) } else { Ok(builder) };
        };
        let tokens = rate("tokens", tokens, self.tokens_period_secs, self.tokens_burst)?;
        check(&Limits::new().tokens(tokens))?;
        Ok(builder.tokens(tokens))
    }

    fn with_budgets(&self, mut builder: ExecutorBuilder) -> Result<ExecutorBuilder, InvalidConfig> {
        let mut all = Limits::new();
        for (name, rates) in &self.budgets {
            let budget = budget(name)?;
            for BudgetRate {
                rate,
                period_secs,
                burst,
            } in rates
            {
                let field = |of: &str| format!("budgets.{name}.{of}");
                let rate = rate_of(*rate, *period_secs, *burst).map_err(|error| error.renamed(field("period_secs")))?;
                let of_limits = format!("{name}.");
                Limits::new().budget(budget, rate).check().map_err(|error| {
                    let of = error.field().strip_prefix(&of_limits).unwrap_or(error.field());
                    let of = of.replace("amount", "rate").replace("period", "period_secs");
                    error.renamed(field(&of))
                })?;
                all = all.budget(budget, rate);
                builder = builder.add_rate(budget, rate);
            }
        }
        all.check().map_err(|error| error.renamed("budgets".to_owned()))?;
        Ok(builder)
    }
}

/// Returns the budget with this name. A name that is another spelling of a built-in budget's is an error: no call would
/// ever take anything of it, and the limit that was meant would not hold.
fn budget(name: &str) -> Result<Budget, InvalidConfig> {
    let field = || format!("budgets.{}", name.chars().take(80).collect::<String>());
    let letters = |name: &str| -> String {
        let letters = name.chars().filter(char::is_ascii_alphanumeric);
        let letters: String = letters.map(|letter| letter.to_ascii_lowercase()).collect();
        letters.trim_end_matches('s').to_owned()
    };
    let built_in = [
        Budget::Requests,
        Budget::Tokens,
        Budget::InputTokens,
        Budget::OutputTokens,
    ];
    let similar = built_in.iter().find(|budget| letters(budget.name()) == letters(name));
    match similar {
        Some(budget) if budget.name() == name => Ok(*budget),
        Some(budget) => Err(InvalidConfig::new(field(), format!("is no budget: write `{budget}`"))),
        None => name.parse().map_err(|error: InvalidConfig| error.renamed(field())),
    }
}

fn rate(budget: &str, amount: f64, period_secs: f64, burst: Option<f64>) -> Result<Rate, InvalidConfig> {
    rate_of(amount, period_secs, burst).map_err(|error| error.renamed(format!("{budget}_period_secs")))
}

fn rate_of(amount: f64, period_secs: f64, burst: Option<f64>) -> Result<Rate, InvalidConfig> {
    let period = Duration::try_from_secs_f64(period_secs)
        .map_err(|_| InvalidConfig::new("period_secs", format!("must be above zero, is {period_secs}")))?;
    let rate = Rate::new(amount, period);
    Ok(burst.map_or(rate, |burst| rate.burst(burst)))
}

/// Checks the limits. An error names the field as [`Config`] does: `requests_rate`, where [`Limits`] has
/// `requests.amount`.
fn check(limits: &Limits) -> Result<(), InvalidConfig> {
    limits.check().map_err(|error| {
        let field = error
            .field()
            .replace(".amount", "_rate")
            .replace(".period", "_period_secs")
            .replace('.', "_");
        error.renamed(field)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(change: impl FnOnce(&mut Config)) -> Config {
        let mut config = Config::default();
        change(&mut config);
        config
    }

    #[test]
    fn numbers_out_of_range_are_refused_and_their_field_is_named() {
        let bad: [(&str, Config); 17] = [
            ("queue_capacity", with(|c| c.queue_capacity = 0)),
            ("concurrency_limit", with(|c| c.concurrency_limit = 0)),
            ("workers", with(|c| c.workers = 0)),
            ("requests_rate", with(|c| c.requests_rate = 0.0)),
            ("requests_rate", with(|c| c.requests_rate = -1.0)),
            ("requests_rate", with(|c| c.requests_rate = f64::NAN)),
            ("requests_rate", with(|c| c.requests_rate = f64::INFINITY)),
            ("requests_rate", with(|c| c.requests_rate = 1e-9)),
            ("requests_period_secs", with(|c| c.requests_period_secs = 0.0)),
            ("requests_period_secs", with(|c| c.requests_period_secs = -1.0)),
            ("requests_period_secs", with(|c| c.requests_period_secs = f64::NAN)),
            ("requests_period_secs", with(|c| c.requests_period_secs = 1e15)),
            ("requests_burst", with(|c| c.requests_burst = Some(0.5))),
            ("requests_burst", with(|c| c.requests_burst = Some(-3.0))),
            ("tokens_rate", with(|c| c.tokens_rate = Some(0.0))),
            (
                "tokens_period_secs",
                with(|c| (c.tokens_rate, c.tokens_period_secs) = (Some(1.0), 0.0)),
            ),
            (
                "tokens_burst",
                with(|c| (c.tokens_rate, c.tokens_burst) = (Some(1.0), Some(0.0))),
            ),
        ];
        for (field, config) in bad {
            assert_eq!(
                config
                    .clone()
                    .into_builder()
                    .err()
                    .map(|error| error.field().to_owned())
                    .as_deref(),
                Some(field)
            );
        }
        assert!(Config::default().into_builder().is_ok());
        assert!(with(|c| c.requests_rate = 0.5).into_builder().is_ok());
    }
}
