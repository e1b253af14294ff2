//! The limits of the local provider: what it admits, and how it rejects.

use super::{answer::error, bucket::Bucket, headers::Report};
use crate::limits::{Bounds, Pace};
use axum::{
    http::{HeaderMap, StatusCode},
    response::{IntoResponse, Response},
};
use std::{collections::HashMap, time::Duration};
use tokio::time::Instant;
use tower_outbound::{Cost, provider::Provider as Dialect, rate::Budget};

/// What the provider admits beyond the burst: the amount that flows in during this time.
///
/// The limiter makes up for up to 5 ms of a late timer. Requests that are sent at even intervals do not arrive at even
/// intervals, so another 5 ms are allowed for the network. Over longer times the provider enforces the rate exactly.
const SLACK: Duration = Duration::from_millis(10);

const MINUTE: Duration = Duration::from_secs(60);

/// The limits of the provider, and the numbers of requests it has received and admitted.
pub(super) struct Meter {
    limits: Vec<Limit>,
    started: Instant,
    /// The number of requests that the provider has received.
    seen: u64,
    admitted: u64,
}

/// A limit with what is left of it.
struct Limit {
    budget: Budget,
    amount: u64,
    period: Duration,
    burst: u64,
    bucket: Bucket,
}

/// Why the provider did not admit a request.
pub(super) enum Rejection {
    NotYet {
        budget: &'static str,
        period: &'static str,
        wait: Duration,
    },
    Never {
        budget: &'static str,
        period: &'static str,
    },
}

// === impl Meter ===

impl Meter {
    pub(super) fn new(bounds: &Bounds) -> Self {
        let per_minute =
            |budget, pace: Option<Pace>| pace.map(|pace| Limit::new(budget, pace.per_minute, MINUTE, pace.burst));
        let paces = [
            per_minute(Budget::Requests, bounds.requests),
            per_minute(Budget::Tokens, bounds.tokens),
        ];
        let further = bounds.further.rates();
        let further = further.map(|rate| Limit::new(rate.budget, rate.amount, rate.period, rate.amount));
        Self {
            limits: paces.into_iter().flatten().chain(further).collect(),
            started: Instant::now(),
            seen: 0,
            admitted: 0,
        }
    }

    /// Counts a request that the provider receives, and returns its number.
    pub(super) const fn see(&mut self) -> u64 {
        self.seen += 1;
        self.seen
    }

    /// Charges the request to all limits or to none: a request that is rejected for its tokens does not count as a
    /// request. It takes `cost` of the built-in budgets, and what was `told` of others, or else 1. Returns the number of
    /// the admitted request.
    pub(super) fn admit(&mut self, cost: &Cost, told: &HashMap<String, u64>) -> Result<u64, Rejection> {
        let now = self.started.elapsed();
        let amount_of = |budget: Budget| match budget {
            Budget::Named(name) => told.get(name.as_str()).copied().unwrap_or(1),
            budget => cost.of(budget),
        };
        for limit in &mut self.limits {
            let (budget, period) = (limit.budget.name(), period_name(limit.period));
            match limit.wait(amount_of(limit.budget), now) {
                Some(Duration::ZERO) => {}
                Some(wait) => return Err(Rejection::NotYet { budget, period, wait }),
                None => return Err(Rejection::Never { budget, period }),
            }
        }
        for limit in &mut self.limits {
            limit.bucket.take(amount_of(limit.budget));
        }
        self.admitted += 1;
        Ok(self.admitted)
    }

    /// The response headers that report the limits and the remaining amounts.
    pub(super) fn headers(&self, dialect: Dialect) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for limit in &self.limits {
            let report = Report {
                budget: limit.budget,
                period: limit.period,
                limit: limit.amount,
                remaining: limit.bucket.left(),
                until_full: limit.bucket.until_full(),
            };
            report.add_to(&mut headers, dialect);
        }
        headers
    }
}

// === impl Limit ===

impl Limit {
    fn new(budget: Budget, amount: u64, period: Duration, burst: u64) -> Self {
        Self {
            budget,
            amount,
            period,
            burst,
            bucket: Bucket::new(amount, period, burst, SLACK),
        }
    }

    /// How long it takes until `amount` is available; `None` if it never is.
    fn wait(&mut self, amount: u64, now: Duration) -> Option<Duration> {
        // A provider admits a request up to the amount of one minute, even if its bucket is that of a second.
        if amount > self.burst && amount <= self.amount {
            self.bucket.grow(amount - self.burst);
            self.burst = amount;
        }
        self.bucket.wait(amount, now)
    }
}

fn period_name(period: Duration) -> &'static str {
    match period.as_secs() {
        1 => "second",
        60 => "minute",
        3_600 => "hour",
        _ => "day",
    }
}

// === impl Rejection ===

impl IntoResponse for Rejection {
    fn into_response(self) -> Response {
        match self {
            Self::NotYet { budget, period, wait } => {
                let message = format!(
                    "Rate limit reached for {budget} per {period}. Try again in {} ms.",
                    wait.as_millis()
                );
                // The delays are rounded up, because a request that is sent earlier is rejected again.
                let headers = [
                    ("retry-after", wait.as_nanos().div_ceil(1_000_000_000).to_string()),
                    ("retry-after-ms", wait.as_nanos().div_ceil(1_000_000).to_string()),
                ];
                (
                    StatusCode::TOO_MANY_REQUESTS,
                    headers,
                    error(budget, "rate_limit_exceeded", &message),
                )
                    .into_response()
            }
            Self::Never { budget, period } => {
                let message = format!("The request is larger than the limit of {budget} per {period}.");
                (StatusCode::BAD_REQUEST, error(budget, "request_too_large", &message)).into_response()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meter(limits: &[(&str, u64, u64)]) -> Meter {
        let limits = limits.iter().map(|(budget, amount, burst)| {
            let budget = Budget::from(*budget);
            Limit {
                bucket: Bucket::new(*amount, MINUTE, *burst, Duration::ZERO),
                ..Limit::new(budget, *amount, MINUTE, *burst)
            }
        });
        Meter {
            limits: limits.collect(),
            started: Instant::now(),
            seen: 0,
            admitted: 0,
        }
    }

    fn rejected_for(admitted: &Result<u64, Rejection>) -> Option<&'static str> {
        match admitted {
            Ok(_) => None,
            Err(Rejection::NotYet { budget, .. } | Rejection::Never { budget, .. }) => Some(*budget),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_rejected_for_its_tokens_does_not_count() {
        let mut meter = meter(&[("requests", 1, 1), ("tokens", 1, 99)]);
        let mut admit = |tokens| rejected_for(&meter.admit(&Cost::tokens(tokens), &HashMap::new()));
        assert_eq!(admit(100), None);
        for _ in 0..5 {
            assert_eq!(admit(100), Some("tokens"));
        }
        assert_eq!(admit(0), None);
        assert_eq!(admit(0), Some("requests"));
        assert_eq!(admit(101), Some("requests"));
    }

    #[tokio::test(start_paused = true)]
    async fn every_budget_is_enforced_and_one_that_a_request_does_not_tell_takes_one() {
        let mut meter = meter(&[("input_tokens", 60, 60), ("output_tokens", 60, 9), ("images", 60, 4)]);
        let mut admit = |input, output, images: Option<u64>| {
            let told = images.map(|images| ("images".to_owned(), images)).into_iter().collect();
            rejected_for(&meter.admit(&Cost::input_output_tokens(input, output), &told))
        };
        // Each bucket admits one more than its burst.
        assert_eq!(admit(1, 6, Some(3)), None);
        assert_eq!(admit(1, 5, Some(0)), Some("output_tokens"));
        assert_eq!(admit(61, 1, Some(0)), Some("input_tokens"));
        assert_eq!(admit(1, 1, Some(3)), Some("images"));
        assert_eq!(admit(1, 1, None), None);
        assert_eq!(admit(1, 1, None), None);
        assert_eq!(admit(1, 1, None), Some("images"));
    }
}
