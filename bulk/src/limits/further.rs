//! [`Further`]: the limits of a run besides those of requests and of tokens per minute.

use super::own::{self, OwnBudgets};
use crate::args::Args;
use anyhow::ensure;
use std::{fmt, str::FromStr, time::Duration};
use tower_outbound::{Cost, Limits, Rate, rate::Budget};

/// One limit of any budget that a request's cost has an amount of.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct FurtherRate {
    pub(crate) budget: Budget,
    pub(crate) amount: u64,
    pub(crate) period: Duration,
    /// What may be sent at once at the start.
    initial: u64,
}

/// The limits besides those of requests and of tokens per minute.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Further {
    rates: [Option<FurtherRate>; MAX],
}

/// How much of each further limit requests take, in the order of the limits.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct FurtherSums([u64; MAX]);

/// The largest number of further limits.
const MAX: usize = 8;

/// How long the first requests travel at most, with the time in which their connections are made.
const TRAVEL: Duration = Duration::from_millis(500);

const MINUTE: Duration = Duration::from_secs(60);

const PERIODS: [(&str, Duration); 4] = [
    ("s", Duration::from_secs(1)),
    ("min", MINUTE),
    ("h", Duration::from_secs(60 * 60)),
    ("day", Duration::from_secs(24 * 60 * 60)),
];

// === impl Further ===

impl Further {
    #[cfg(test)]
    pub(crate) const NONE: Self = Self { rates: [None; MAX] };

    /// The further limits of the command line.
    pub(crate) fn new(args: &Args) -> anyhow::Result<Self> {
        let limits = &args.limits;
        OwnBudgets::check(limits)?;
        ensure!(
            args.local.local_budget.len() <= MAX,
            "--local-budget: at most {MAX} limits"
        );
        let per_minute = |budget, amount: Option<u64>| {
            amount.map(|amount| FurtherRate {
                budget,
                amount,
                period: MINUTE,
                initial: amount,
            })
        };
        let all = [
            per_minute(Budget::InputTokens, limits.input_tokens.0),
            per_minute(Budget::OutputTokens, limits.output_tokens.0),
        ];
        let all: Vec<_> = all.into_iter().flatten().chain(limits.budget.iter().copied()).collect();
        ensure!(all.len() <= MAX, "--budget: at most {MAX} further limits");
        for (at, rate) in all.iter().enumerate() {
            let is_twice = all[..at]
                .iter()
                .any(|other| (other.budget, other.period) == (rate.budget, rate.period));
            ensure!(!is_twice, "--budget: two limits of {} for the same period", rate.budget);
        }
        let mut further = Self::default();
        for (place, mut rate) in further.rates.iter_mut().zip(all) {
            if args.files.resume {
                // The earlier run may have used up the limit just before this run starts.
                rate.initial = 0;
            }
            *place = Some(rate);
        }
        Ok(further)
    }

    /// The further limits of the local provider: those that it is given, or else those of the run.
    pub(crate) fn of_local(self, given: &[FurtherRate]) -> Self {
        if given.is_empty() {
            return self;
        }
        let mut further = Self::default();
        for (place, rate) in further.rates.iter_mut().zip(given) {
            *place = Some(*rate);
        }
        further
    }

    pub(crate) fn rates(&self) -> impl Iterator<Item = FurtherRate> + '_ {
        self.rates.iter().flatten().copied()
    }

    /// Returns the first limit of this budget.
    pub(crate) fn of(&self, budget: Budget) -> Option<FurtherRate> {
        self.rates().find(|rate| rate.budget == budget)
    }

    /// Returns whether a request of this cost can ever be sent.
    pub(crate) fn fits(&self, cost: &Cost) -> bool {
        self.rates().all(|rate| cost.of(rate.budget) <= rate.amount)
    }

    /// Adds what a request of this cost takes to `sums`.
    pub(crate) fn add_cost(&self, cost: &Cost, sums: &mut FurtherSums) {
        for (sum, rate) in sums.0.iter_mut().zip(self.rates()) {
            *sum = sum.saturating_add(cost.of(rate.budget));
        }
    }

    /// The shortest time in which requests that take so much can be sent.
    pub(crate) fn min_time(&self, sums: &FurtherSums) -> Duration {
        let times = self.rates().zip(sums.0).map(|(rate, sum)| {
            let beyond = sum.saturating_sub(rate.initial) as f64;
            Duration::try_from_secs_f64(beyond * rate.period.as_secs_f64() / rate.amount as f64)
                .unwrap_or(Duration::MAX)
        });
        times.max().unwrap_or_default()
    }

    pub(crate) fn add_to(&self, limits: Limits) -> Limits {
        self.rates()
            .fold(limits, |limits, rate| limits.budget(rate.budget, rate.rate()))
    }
}

// === impl FurtherRate ===

impl FurtherRate {
    /// The rate for the limiter. It begins with 95 % of what may be sent at once, or without what half a second adds, if
    /// that is less: the provider's bucket is full while the first requests travel to it, and cannot gain what the
    /// limiter's bucket gains in this time.
    fn rate(self) -> Rate {
        let added = u128::from(self.amount) * TRAVEL.as_nanos() / self.period.as_nanos();
        let kept_back = (self.initial / 20).max(u64::try_from(added).unwrap_or(u64::MAX));
        let initial = self.initial.saturating_sub(kept_back).max(self.initial.min(1));
        Rate::new(self.amount, self.period).initial(initial)
    }
}

impl FromStr for FurtherRate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, rate) = text
            .split_once('=')
            .ok_or("must be NAME=N/PERIOD, such as requests=14400/day")?;
        let budget = own::budget(name)?;
        let (amount, period) = rate
            .split_once('/')
            .ok_or("must have a period, such as requests=14400/day")?;
        let amount = amount.parse().ok().filter(|amount: &u64| *amount > 0);
        let amount = amount.ok_or("must have a whole number above zero")?;
        let period = PERIODS.into_iter().find(|(name, _)| *name == period);
        let (_, period) = period.ok_or("the period must be s, min, h or day")?;
        Ok(Self {
            budget,
            amount,
            period,
            initial: amount,
        })
    }
}

impl fmt::Display for FurtherRate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let period = PERIODS.into_iter().find(|(_, period)| *period == self.period);
        let name = self.budget.name().replace('_', " ");
        write!(f, "{} {name}/{}", self.amount, period.map_or("?", |(name, _)| name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use tower_outbound::RateLimiter;

    fn further(args: &[&str]) -> anyhow::Result<Further> {
        Further::new(&Args::parse_from([&["bulk"], args].concat()))
    }

    #[test]
    fn a_further_limit_has_a_name_an_amount_and_a_period() {
        let rate: FurtherRate = "requests=14400/day".parse().unwrap();
        assert_eq!(
            (rate.budget, rate.amount, rate.period.as_secs()),
            (Budget::Requests, 14_400, 86_400)
        );
        assert_eq!(rate.to_string(), "14400 requests/day");
        let own: FurtherRate = "images=5/min".parse().unwrap();
        assert_eq!((own.budget, own.amount), (Budget::from("images"), 5));
        for (bad, named) in [
            ("requests", "NAME=N/PERIOD"),
            ("input-tokens=5/min", "`input_tokens`"),
            ("Images=5/min", "a-z"),
            ("requests=5", "period"),
            ("requests=0/min", "above zero"),
            ("requests=x/min", "whole number"),
            ("requests=5/week", "s, min, h or day"),
        ] {
            let error = bad.parse::<FurtherRate>().unwrap_err();
            assert!(error.contains(named), "{error}");
        }
    }

    #[test]
    fn all_further_limits_hold_at_once() {
        let args = [
            "--input-tokens",
            "30000",
            "--output-tokens",
            "8000",
            "--budget",
            "tokens=500000/day",
        ];
        let further = further(&args).unwrap();
        let limiter = RateLimiter::new(further.add_to(Limits::new())).unwrap();
        let available = limiter.available();
        assert_eq!(
            (available.input_tokens, available.output_tokens),
            (Some(28_500), Some(7_600))
        );
        assert_eq!((available.tokens, available.requests), (Some(475_000), None));
        assert!(further.fits(&Cost::input_output_tokens(30_000, 8_000)));
        assert!(!further.fits(&Cost::input_output_tokens(100, 8_001)));
    }

    #[test]
    fn the_limit_that_takes_longest_gives_the_shortest_time() {
        let further = further(&["--budget", "images=60/min", "--budget", "requests=100/h"]).unwrap();
        let mut sums = FurtherSums::default();
        for _ in 0..50 {
            further.add_cost(&Cost::request().with("images", 3), &mut sums);
        }
        assert_eq!(further.min_time(&sums), Duration::from_secs(90));
        assert_eq!(further.min_time(&FurtherSums::default()), Duration::ZERO);
    }

    #[test]
    fn a_limit_begins_without_what_it_gains_while_the_first_requests_travel() {
        for (limit, initial) in [
            ("images=10/s", 5),
            ("images=1/s", 1),
            ("images=60/min", 57),
            ("images=2/day", 2),
            ("images=100/day", 95),
        ] {
            let further = further(&["--budget", limit]).unwrap();
            let limiter = RateLimiter::new(further.add_to(Limits::new())).unwrap();
            assert_eq!(limiter.available().of("images"), Some(initial), "{limit}");
        }
    }

    #[test]
    fn two_limits_of_a_budget_for_one_period_are_refused() {
        let error = further(&["--output-tokens", "8000", "--budget", "output_tokens=9000/min"]).unwrap_err();
        assert!(error.to_string().contains("output_tokens"), "{error}");
    }
}
