//! The limits of a run: those that the executor keeps, and those that the local provider enforces.

mod charges;
mod further;
mod own;

pub(crate) use charges::{Charges, cost_of};
pub(crate) use further::{Further, FurtherRate, FurtherSums};
pub(crate) use own::{COST_FIELD, DefaultAmount, LOCAL_COST, OwnBudgets};

use crate::args::{Args, LimitArgs, LocalArgs};
use anyhow::ensure;
use std::{fmt, num::NonZeroU64, str::FromStr, time::Duration};
use tower_outbound::{Limits, Rate, RateLimiter, rate::Budget};

/// An amount per minute; `None` if there is no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PerMinute(pub(crate) Option<u64>);

/// A rate per minute with its burst.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pace {
    pub(crate) per_minute: u64,
    pub(crate) burst: u64,
    /// The amount that the provider is assumed to allow at the start.
    pub(crate) initial: u64,
    /// Whether the burst is sent at the start if the provider reports that it has as much left.
    pub(crate) follows: bool,
}

/// What the limiter takes over from the responses of the provider.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LimitFeedback {
    /// What is left, where that is less than assumed.
    Keep,
    /// Reported limits as well. Where none are reported, limits are found from the provider's 429s.
    Adopt,
    /// The same, and what is left also where that is more: a minute's amount may be sent at once.
    Follow,
}

/// The limits of requests and tokens (`None` where there is no limit), and the limit of requests in flight.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    pub(crate) requests: Option<Pace>,
    pub(crate) tokens: Option<Pace>,
    /// The limits of other budgets, and of other periods than a minute.
    pub(crate) further: Further,
    pub(crate) concurrency: usize,
}

impl Bounds {
    /// The limits of the command line.
    pub(crate) fn new(args: &Args) -> anyhow::Result<Self> {
        let LimitArgs {
            rpm,
            tpm,
            rpm_burst,
            tpm_burst,
            ..
        } = &args.limits;
        ensure!(
            rpm.0.is_some() || rpm_burst.is_none(),
            "--rpm-burst cannot be combined with --rpm off"
        );
        ensure!(
            tpm.0.is_some() || tpm_burst.is_none(),
            "--tpm-burst cannot be combined with --tpm off"
        );
        let pace = |per_minute: u64, burst: Option<NonZeroU64>| {
            let follows = burst.is_none() && args.limits.feedback() == LimitFeedback::Follow;
            let at_start = burst.map_or_else(|| default_burst(per_minute), NonZeroU64::get);
            Pace {
                per_minute,
                burst: if follows { per_minute } else { at_start },
                // The earlier run may have used up the burst just before this run starts.
                initial: if args.files.resume { 0 } else { at_start },
                follows,
            }
        };
        Ok(Self {
            requests: rpm.0.map(|rpm| pace(rpm, *rpm_burst)),
            tokens: tpm.0.map(|tpm| pace(tpm, *tpm_burst)),
            further: Further::new(args)?,
            concurrency: args.limits.concurrency.get(),
        })
    }

    /// The limits of the local provider, which may differ from those that the executor is given.
    pub(crate) fn of_local(&self, local: &LocalArgs) -> Self {
        let enforced = |given: Option<Pace>, local: Option<PerMinute>| match local {
            Some(PerMinute(per_minute)) => per_minute.map(|per_minute| {
                let burst = default_burst(per_minute);
                Pace {
                    per_minute,
                    burst,
                    initial: burst,
                    follows: false,
                }
            }),
            None => given,
        };
        Self {
            requests: enforced(self.requests, local.local_rpm),
            tokens: enforced(self.tokens, local.local_tpm),
            further: self.further.of_local(&local.local_budget),
            ..*self
        }
    }

    /// Returns these bounds with the rates of `limits`. Feedback of the provider may have changed the rates of the
    /// limiter during the run.
    pub(crate) fn with_rates_of(&self, limits: &Limits) -> Self {
        let current = |given: Option<Pace>, budget| {
            let rate = limits
                .rates()
                .find(|(name, _)| *name == budget)
                .map(|(_, rate)| rate.amount() as u64);
            given.zip(rate).map(|(pace, per_minute)| Pace {
                per_minute,
                burst: pace.burst.min(per_minute),
                initial: pace.initial.min(per_minute),
                follows: pace.follows,
            })
        };
        Self {
            requests: current(self.requests, Budget::Requests),
            tokens: current(self.tokens, Budget::Tokens),
            ..*self
        }
    }

    /// Returns these bounds with the rates of `limits` where those are higher.
    fn at_least(&self, limits: &Limits) -> Self {
        let current = self.with_rates_of(limits);
        let higher = |given: Option<Pace>, current: Option<Pace>| {
            given.zip(current).map(|(given, current)| Pace {
                per_minute: given.per_minute.max(current.per_minute),
                ..given
            })
        };
        Self {
            requests: higher(self.requests, current.requests),
            tokens: higher(self.tokens, current.tokens),
            ..*self
        }
    }

    /// Returns whether a request with this number of tokens can ever be sent.
    pub(crate) fn fits(&self, tokens: u64, args: &LimitArgs) -> bool {
        self.tokens.is_none_or(|pace| {
            let most = if args.tpm_burst.is_some() {
                pace.burst
            } else {
                pace.per_minute
            };
            tokens <= most
        })
    }

    pub(crate) fn limits(&self) -> Limits {
        let mut limits = Limits::new();
        if let Some(pace) = self.requests {
            limits = limits.requests(pace.rate());
        }
        if let Some(pace) = self.tokens {
            limits = limits.tokens(pace.rate());
        }
        self.further.add_to(limits)
    }

    /// Returns the pace of a budget with a further limit.
    pub(crate) fn pace_of(&self, budget: Budget) -> Option<Pace> {
        self.further.of(budget).map(|rate| Pace {
            per_minute: (rate.amount as f64 * 60.0 / rate.period.as_secs_f64()) as u64,
            burst: rate.amount,
            initial: rate.amount,
            follows: false,
        })
    }

    /// The shortest time in which these numbers of requests and tokens can be sent.
    pub(crate) fn min_time(&self, requests: u64, tokens: u64) -> Duration {
        let requests = self.requests.map(|pace| pace.time_for(requests));
        let tokens = self.tokens.map(|pace| pace.time_for(tokens));
        requests.max(tokens).unwrap_or_default()
    }
}

impl LimitArgs {
    /// Returns what the limiter takes over from the provider. Limits that are shared through a store are not raised to
    /// what is left.
    pub(crate) const fn feedback(&self) -> LimitFeedback {
        match (self.keep_limits, &self.redis) {
            (true, _) => LimitFeedback::Keep,
            (false, Some(_)) => LimitFeedback::Adopt,
            (false, None) => LimitFeedback::Follow,
        }
    }
}

impl Pace {
    /// The rate for the limiter, whose bucket begins with 95 % of `initial`.
    ///
    /// While the first requests travel to the provider, the limiter's bucket is filling again, but the provider's
    /// bucket is still full and cannot gain anything. Without the missing 5 %, the first burst would exceed the
    /// provider's bucket by what the limiter's bucket gains in this time.
    fn rate(self) -> Rate {
        Rate::per_minute(self.per_minute)
            .burst(self.burst)
            .initial(self.initial - self.initial / 20)
    }

    /// The shortest time until this amount has been admitted.
    fn time_for(self, amount: u64) -> Duration {
        let at_start = if self.follows { self.burst } else { self.initial };
        let beyond = amount.saturating_sub(at_start);
        Duration::from_secs_f64(beyond as f64 * 60.0 / self.per_minute as f64)
    }
}

/// The burst if the command line sets none: the amount of one second, because a provider that counts by the second
/// rejects a larger burst with 429. It is never below 1.
fn default_burst(per_minute: u64) -> u64 {
    (per_minute / 60).max(1)
}

/// The burst of tokens of a limiter, which grows when a request needs more.
///
/// A request must fit into the bucket. If the burst were that of the largest request from the start, one large request
/// would let many small ones pass at once, which a provider that counts by the second rejects. Growing leaves in the
/// bucket what it holds, so that the pace of the requests before the large one stays as it was.
pub(crate) struct TokenBurst {
    limiter: RateLimiter,
    bounds: Bounds,
    /// Whether the command line leaves the burst to the program.
    may_grow: bool,
}

impl TokenBurst {
    pub(crate) const fn new(limiter: RateLimiter, bounds: Bounds, args: &LimitArgs) -> Self {
        Self {
            limiter,
            bounds,
            may_grow: args.tpm_burst.is_none(),
        }
    }

    /// Raises the burst to `tokens`, but not above the amount of one minute: no provider admits a larger request.
    pub(crate) fn grow_for(&mut self, tokens: u64) {
        let Some(pace) = self.bounds.tokens else { return };
        if !self.may_grow || tokens <= pace.burst || tokens > pace.per_minute {
            return;
        }
        self.bounds.tokens = Some(Pace { burst: tokens, ..pace });
        // A rate that was lowered, because the provider reports less or answers 429, is set to what the command line
        // says again: if it is still too much, the next response lowers it. A rate that was raised stays.
        let limits = self.bounds.at_least(&self.limiter.limits()).limits();
        // This fails only for numbers that the limiter cannot represent. The request is then refused by name.
        let _ = self.limiter.set_limits(limits);
    }

    /// Says why a request with this number of tokens cannot be sent, and which option to raise. `None` without a limit of
    /// tokens.
    pub(crate) fn too_small_for(&self, tokens: u64) -> Option<String> {
        let (given, now) = (self.bounds.tokens?, self.bounds().tokens?);
        let Pace { per_minute, burst, .. } = now;
        Some(if per_minute < given.per_minute {
            format!(
                "it needs {tokens} tokens, and the provider allows {per_minute} tokens per minute: shorten the request"
            )
        } else if self.may_grow {
            format!(
                "it needs {tokens} tokens, and the limit is {per_minute} tokens per minute: raise --tpm, or shorten the \
                 request"
            )
        } else {
            format!(
                "it needs {tokens} tokens, and at most {burst} may be charged at once: raise --tpm-burst, or shorten the \
                 request"
            )
        })
    }

    /// The bounds with the rates and bursts of now.
    pub(crate) fn bounds(&self) -> Bounds {
        self.bounds.with_rates_of(&self.limiter.limits())
    }
}

impl FromStr for PerMinute {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.parse() {
            _ if text == "off" => Ok(Self(None)),
            Ok(0) => Err("must be above zero; `off` means no limit"),
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
                None => write!(f, "no limit of {name}, ")?,
            }
        }
        for rate in self.further.rates() {
            write!(f, "{rate}, ")?;
        }
        write!(f, "{} in flight", self.concurrency)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use tower_outbound::{Cost, RateLimiter};

    #[test]
    fn a_rate_is_a_number_or_off() {
        assert_eq!("500".parse(), Ok(PerMinute(Some(500))));
        assert_eq!("off".parse(), Ok(PerMinute(None)));
        for bad in ["0", "-5", "many", ""] {
            assert!(bad.parse::<PerMinute>().is_err(), "{bad}");
        }
    }

    #[test]
    fn the_default_burst_is_the_amount_of_one_second() {
        assert_eq!(default_burst(240_000), 4_000);
        assert_eq!(default_burst(300), 5);
        assert_eq!(default_burst(3), 1);
    }

    #[test]
    fn a_minutes_amount_may_be_sent_at_once_where_the_provider_is_followed() {
        let bounds = |more: &[&str]| {
            let args = Args::parse_from([&["bulk", "--rpm", "600"], more].concat());
            Bounds::new(&args).unwrap().requests.unwrap()
        };
        let followed = bounds(&[]);
        assert_eq!((followed.burst, followed.initial, followed.follows), (600, 10, true));
        assert_eq!(followed.time_for(600), Duration::ZERO);
        let kept = bounds(&["--keep-limits"]);
        assert_eq!((kept.burst, kept.initial, kept.follows), (10, 10, false));
        let set = bounds(&["--rpm-burst", "20"]);
        assert_eq!((set.burst, set.initial, set.follows), (20, 20, false));
    }

    #[tokio::test(start_paused = true)]
    async fn the_burst_grows_for_a_larger_request_and_leaves_the_level_as_it_is() {
        let args = Args::parse_from(["bulk", "--tpm", "60000", "--rpm", "off", "--keep-limits"]);
        let bounds = Bounds::new(&args).unwrap();
        let limiter = RateLimiter::new(bounds.limits()).unwrap();
        let mut burst = TokenBurst::new(limiter.clone(), bounds, &args.limits);
        limiter.acquire(Cost::tokens(950)).await.unwrap();
        burst.grow_for(60_001);
        assert_eq!(burst.bounds().tokens.unwrap().burst, 1_000);
        burst.grow_for(50_000);
        assert_eq!(burst.bounds().tokens.unwrap().burst, 50_000);
        assert_eq!(limiter.available().tokens, Some(0));
        // A thousand tokens flow in each second.
        let begun = tokio::time::Instant::now();
        limiter.acquire(Cost::tokens(50_000)).await.unwrap();
        assert_eq!(begun.elapsed().as_secs(), 50);
    }

    #[test]
    fn a_burst_of_the_command_line_does_not_grow() {
        let args = Args::parse_from(["bulk", "--tpm", "60000", "--tpm-burst", "2000"]);
        let bounds = Bounds::new(&args).unwrap();
        assert!(bounds.fits(2_000, &args.limits) && !bounds.fits(2_001, &args.limits));
        let limiter = RateLimiter::new(bounds.limits()).unwrap();
        let mut burst = TokenBurst::new(limiter, bounds, &args.limits);
        burst.grow_for(3_000);
        assert_eq!(burst.bounds().tokens.unwrap().burst, 2_000);
        assert!(burst.too_small_for(3_000).unwrap().contains("raise --tpm-burst"));
    }

    #[test]
    fn a_request_that_is_too_large_says_which_option_to_raise() {
        let args = Args::parse_from(["bulk", "--tpm", "60000"]);
        let bounds = Bounds::new(&args).unwrap();
        let limiter = RateLimiter::new(bounds.limits()).unwrap();
        let burst = TokenBurst::new(limiter.clone(), bounds, &args.limits);
        assert!(burst.too_small_for(70_000).unwrap().contains("raise --tpm,"));
        // The provider reports less, which no option changes.
        let reported = Limits::new()
            .requests(Rate::per_minute(1_500))
            .tokens(Rate::per_minute(3_000));
        limiter.set_limits(reported).unwrap();
        let message = burst.too_small_for(50_000).unwrap();
        assert!(
            message.contains("the provider allows 3000 tokens") && !message.contains("raise"),
            "{message}"
        );
    }

    #[test]
    fn the_initial_burst_takes_no_time() {
        let pace = Pace {
            per_minute: 60,
            burst: 10,
            initial: 10,
            follows: false,
        };
        assert_eq!(pace.time_for(10), Duration::ZERO);
        assert_eq!(pace.time_for(12), Duration::from_secs(2));
    }
}
