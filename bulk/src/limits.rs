//! The limits of a run: the same for the executor that keeps them and the local provider that checks.

use crate::args::{Args, Local};
use anyhow::ensure;
use std::{fmt, num::NonZeroU64, str::FromStr, time::Duration};
use tower_outbound::{Limits, Rate, rate::Budget};

/// How many a minute; `None`: not limited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PerMinute(Option<u64>);

/// A rate with its burst.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pace {
    pub(crate) per_minute: u64,
    pub(crate) burst: u64,
    /// What the provider is thought to have for us at the start.
    pub(crate) initial: u64,
}

/// Both rates, where there are any, and the requests in flight at once.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    pub(crate) requests: Option<Pace>,
    pub(crate) tokens: Option<Pace>,
    pub(crate) concurrency: usize,
}

impl Bounds {
    /// What was asked for, where the largest request needs so many tokens.
    pub(crate) fn new(args: &Args, largest: u64) -> anyhow::Result<Self> {
        let Args {
            rpm,
            tpm,
            rpm_burst,
            tpm_burst,
            ..
        } = args;
        ensure!(
            rpm.0.is_some() || rpm_burst.is_none(),
            "--rpm-burst has no meaning with --rpm off"
        );
        ensure!(
            tpm.0.is_some() || tpm_burst.is_none(),
            "--tpm-burst has no meaning with --tpm off"
        );
        let pace = |per_minute: u64, burst: Option<NonZeroU64>, largest| {
            let burst = burst.map_or_else(|| default_burst(per_minute, largest), NonZeroU64::get);
            // The run before may have used up the burst a moment ago.
            let initial = if args.resume { 0 } else { burst };
            Pace {
                per_minute,
                burst,
                initial,
            }
        };
        Ok(Self {
            requests: rpm.0.map(|rpm| pace(rpm, *rpm_burst, 1)),
            tokens: tpm.0.map(|tpm| pace(tpm, *tpm_burst, largest)),
            concurrency: args.concurrency.get(),
        })
    }

    /// What the local provider really allows.
    pub(crate) fn of_local(&self, local: &Local, largest: u64) -> Self {
        let real = |told: Option<Pace>, own: Option<PerMinute>, largest| match own {
            Some(PerMinute(per_minute)) => per_minute.map(|per_minute| {
                let burst = default_burst(per_minute, largest);
                Pace {
                    per_minute,
                    burst,
                    initial: burst,
                }
            }),
            None => told,
        };
        Self {
            requests: real(self.requests, local.local_rpm, 1),
            tokens: real(self.tokens, local.local_tpm, largest),
            ..*self
        }
    }

    /// What they are by now: the provider may have said something else.
    pub(crate) fn as_they_are(&self, limits: &Limits) -> Self {
        let now = |told: Option<Pace>, budget| {
            let rate = limits
                .rates()
                .find(|(of, _)| *of == budget)
                .map(|(_, rate)| rate.amount() as u64);
            told.zip(rate).map(|(pace, per_minute)| Pace {
                per_minute,
                burst: pace.burst.min(per_minute),
                initial: pace.initial.min(per_minute),
            })
        };
        Self {
            requests: now(self.requests, Budget::Requests),
            tokens: now(self.tokens, Budget::Tokens),
            ..*self
        }
    }

    pub(crate) fn limits(&self) -> Limits {
        let mut limits = Limits::new();
        if let Some(pace) = self.requests {
            limits = limits.requests(pace.rate());
        }
        if let Some(pace) = self.tokens {
            limits = limits.tokens(pace.rate());
        }
        limits
    }

    /// How long so much takes at least.
    pub(crate) fn least_time(&self, requests: u64, tokens: u64) -> Duration {
        let requests = self.requests.map(|pace| pace.time_for(requests));
        let tokens = self.tokens.map(|pace| pace.time_for(tokens));
        requests.max(tokens).unwrap_or_default()
    }
}

impl Pace {
    /// It starts a twentieth short of what the provider has. While the first requests are on their way our bucket fills
    /// again, but the provider's, still full, cannot: the burst at the start would be too much by that.
    fn rate(self) -> Rate {
        Rate::per_minute(self.per_minute)
            .burst(self.burst)
            .initial(self.initial - self.initial / 20)
    }

    /// How long until so much was admitted.
    fn time_for(self, amount: u64) -> Duration {
        let beyond = amount.saturating_sub(self.initial);
        Duration::from_secs_f64(beyond as f64 * 60.0 / self.per_minute as f64)
    }
}

/// Small, because providers that count by the second answer 429 to a minute's worth at once; but the largest request
/// has to fit. Not more than a minute's worth, though: beyond that no provider lets a single request pass.
fn default_burst(per_minute: u64, largest: u64) -> u64 {
    (per_minute / 60).max(largest.min(per_minute)).max(1)
}

impl FromStr for PerMinute {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.parse() {
            _ if text == "off" => Ok(Self(None)),
            Ok(0) => Err("must be above zero; for no limit say `off`"),
            Ok(number) => Ok(Self(Some(number))),
            Err(_) => Err("must be a whole number, or `off`"),
        }
    }
}

impl fmt::Display for Bounds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, pace) in [("requests", self.requests), ("tokens", self.tokens)] {
            match pace {
                Some(Pace { per_minute, burst, .. }) => write!(f, "{per_minute} {name}/min (burst {burst}), ")?,
                None => write!(f, "any number of {name}, ")?,
            }
        }
        write!(f, "{} in flight", self.concurrency)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_a_number_or_off() {
        assert_eq!("500".parse(), Ok(PerMinute(Some(500))));
        assert_eq!("off".parse(), Ok(PerMinute(None)));
        for bad in ["0", "-5", "many", ""] {
            assert!(bad.parse::<PerMinute>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_burst_is_a_second_or_the_largest_request() {
        assert_eq!(default_burst(240_000, 493), 4_000);
        assert_eq!(default_burst(6_000, 493), 493);
        assert_eq!(default_burst(300, 493), 300);
        assert_eq!(default_burst(3, 1), 1);
    }

    #[test]
    fn the_burst_takes_no_time() {
        let pace = Pace {
            per_minute: 60,
            burst: 10,
            initial: 10,
        };
        assert_eq!(pace.time_for(10), Duration::ZERO);
        assert_eq!(pace.time_for(12), Duration::from_secs(2));
    }
}
