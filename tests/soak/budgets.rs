//! The budgets of the soak test: what each call costs, the limits, and the checks of each budget.
//!
//! Requests, input tokens, output tokens and images have a rate that changes during the test. The rate of images refuses
//! calls instead of letting them wait. Besides, each budget has a *ledger*, a rate whose bucket does not refill: what is
//! missing in it at the end was charged to calls. The ledger of money is a cap of a calendar month that refuses calls,
//! and is never used up.

use crate::fault::Fault;
use fastrand::Rng;
use std::time::{Duration, SystemTime};
use tokio::time::Instant;
use tower_outbound::{Cost, Limits, NetworkRequestEvent, Rate, RateLimiter, TokenUsage};

/// The burst of each ledger. Half of it is available at the start, so that refunds always fit into the bucket.
const LEDGER: u64 = 1_000_000_000_000;

const IMAGES: &str = "images";
/// Millionths of a dollar.
const MONEY: &str = "micro_usd";

/// The budgets with a rate that changes, and the largest cost of a call in each.
const PACED: [(&str, u64); 4] = [
    ("requests", 1),
    ("input_tokens", 60),
    ("output_tokens", 50),
    (IMAGES, 3),
];
/// The budgets with a ledger.
const COUNTED: [&str; 6] = ["requests", "tokens", "input_tokens", "output_tokens", IMAGES, MONEY];

/// The rate per second and the burst of each budget in [`PACED`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Paced([(u64, u64); PACED.len()]);

/// What the admitted calls were charged, by their events, for each budget in [`COUNTED`].
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Charged([u64; COUNTED.len()]);

// === impl Paced ===

impl Paced {
    pub(crate) const INITIAL: Self = Self([(20_000, 100), (1_000_000, 5_000), (700_000, 4_000), (100, 10)]);

    pub(crate) fn draw(rng: &mut Rng) -> Self {
        Self([
            (rng.u64(2_000..40_000), rng.u64(1..200)),
            (rng.u64(80_000..2_000_000), rng.u64(60..10_000)),
            (rng.u64(60_000..1_500_000), rng.u64(50..8_000)),
            (rng.u64(20..200), rng.u64(3..12)),
        ])
    }

    /// Returns the limits with these rates and with the ledgers. What providers limit is paced by the minute, which is
    /// the period that they report.
    pub(crate) fn limits(&self) -> Limits {
        let mut limits = ledgers();
        for ((budget, _), (rate, burst)) in PACED.iter().zip(self.0) {
            let paced = if *budget == IMAGES {
                Rate::per_second(rate).refuse()
            } else {
                Rate::per_minute(rate * 60)
            };
            limits = limits.budget(*budget, paced.burst(burst));
        }
        limits
    }

    pub(crate) fn limiter(&self) -> RateLimiter {
        // The middle of a month, which does not end during the test.
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_763_200_000);
        RateLimiter::at(self.limits(), now).unwrap()
    }

    /// Checks that the limits in force are these, or have lower amounts, as the provider has reported.
    pub(crate) fn check(&self, limiter: &RateLimiter) {
        let (configured, in_force) = (self.limits(), limiter.limits());
        assert_eq!(configured.rates().count(), in_force.rates().count());
        for ((of, most), (budget, rate)) in configured.rates().zip(in_force.rates()) {
            assert_eq!(
                (of, most.period(), most.burst_amount()),
                (budget, rate.period(), rate.burst_amount())
            );
            assert!(rate.amount() <= most.amount(), "{budget}: {rate:?} above {most:?}");
        }
    }

    /// Checks with a leaky bucket for each budget that no window of time had more than its limit allows. Each admitted
    /// call has the least that it was charged, however it has ended.
    pub(crate) fn check_windows(&self, admitted: impl Iterator<Item = (Instant, Cost)>) {
        let mut levels = [0.0_f64; PACED.len()];
        let mut last = None;
        for (at, cost) in admitted {
            let since = last.map_or(Duration::ZERO, |last| at.saturating_duration_since(last));
            last = Some(at);
            for (((budget, largest), (rate, burst)), level) in PACED.iter().zip(self.0).zip(&mut levels) {
                *level = (*level - since.as_secs_f64() * rate as f64).max(0.0) + cost.of(*budget) as f64;
                // The limiter makes up for a late timer by what the rate yields in up to 5 ms. Four more calls allow for
                // each of the two threads being delayed between an admission and its record, and across a change of the
                // limits.
                let most = burst as f64 + rate as f64 * 0.005 + 4.0 * *largest as f64;
                assert!(
                    *level <= most,
                    "{level} {budget} in a window at {rate}/s with a burst of {burst}"
                );
            }
        }
    }
}

// === impl Charged ===

impl Charged {
    /// Adds up what the call was charged: its estimate for every attempt. If the call reports its usage, the usage
    /// replaces the estimate of one attempt.
    pub(crate) fn add(&mut self, event: &NetworkRequestEvent, estimate: &Cost) {
        let attempts = event.attempts.len() as u64;
        let used = match (event.input_tokens_used, event.output_tokens_used) {
            (Some(input), Some(output)) => {
                assert_eq!(event.api_tokens_used, Some(input + output));
                priced(TokenUsage::input_output(input, output), *estimate)
            }
            (None, None) => *estimate,
            kinds => panic!("one kind of token was reported alone: {kinds:?}"),
        };
        for (budget, sum) in COUNTED.iter().zip(&mut self.0) {
            *sum += attempts * estimate.of(*budget) + used.of(*budget) - estimate.of(*budget);
        }
    }

    /// The number of attempts, each of which costs one request.
    pub(crate) fn attempts(&self) -> u64 {
        self.0[0]
    }

    /// Checks that so much is missing in the ledgers. Removes the other rates from the limiter.
    pub(crate) fn check(&self, limiter: &RateLimiter) {
        limiter.set_limits(ledgers()).unwrap();
        let available = limiter.available();
        for (budget, charged) in COUNTED.iter().zip(self.0) {
            assert_eq!(available.of(*budget), Some(LEDGER / 2 - charged), "{budget}");
        }
    }
}

// === Costs ===

/// Returns the estimated cost of a call. It is above and below what calls turn out to use.
pub(crate) fn estimate(rng: &mut Rng) -> Cost {
    let (input, output) = (rng.u64(30..=60), rng.u64(20..=50));
    let images = if rng.u8(..16) == 0 { rng.u64(1..=3) } else { 0 };
    let cost = Cost::input_output_tokens(input, output).with(IMAGES, images);
    cost.with(MONEY, price(input, output))
}

/// Returns the least that a call of this estimate is charged, whether or not it reports what it has used.
pub(crate) fn least(estimate: &Cost, fault: Fault) -> Cost {
    let (input, output) = fault.usage();
    Cost::input_output_tokens(estimate.input_tokens.min(input), estimate.output_tokens.min(output))
        .with(IMAGES, estimate.of(IMAGES))
}

/// Returns the cost of a call that has used so many tokens. Its images cost what was estimated.
pub(crate) fn priced(used: TokenUsage, estimate: Cost) -> Cost {
    let (input, output) = (used.input.unwrap_or(0), used.output.unwrap_or(0));
    Cost::input_output_tokens(input, output)
        .with(IMAGES, estimate.of(IMAGES))
        .with(MONEY, price(input, output))
}

fn price(input: u64, output: u64) -> u64 {
    3 * input + 15 * output
}

/// A rate for each budget whose bucket does not refill during the test.
fn ledgers() -> Limits {
    let without_refill = Rate::new(1_u64, Duration::from_secs(100 * 365 * 86_400)).burst(LEDGER);
    let month = Rate::utc_month(LEDGER).refuse();
    COUNTED.iter().fold(Limits::new(), |limits, budget| {
        let rate = if *budget == MONEY { month } else { without_refill };
        limits.budget(*budget, rate.initial(LEDGER / 2))
    })
}
