//! The limits of the local provider: what it admits, what it reports of them in headers, and how it rejects.

use super::{answer::error, bucket::Bucket};
use crate::limits::{Bounds, Pace};
use axum::{
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode},
    response::{IntoResponse, Response},
};
use std::time::{Duration, SystemTime};
use tokio::time::Instant;
use tower_outbound::provider::Provider as Dialect;

/// What the provider admits beyond the burst: the amount that flows in during this time.
///
/// The limiter makes up for up to 5 ms of a late timer. Requests that are sent at even intervals do not arrive at even
/// intervals, so another 5 ms are allowed for the network. Over longer times the provider enforces the rate exactly.
const SLACK: Duration = Duration::from_millis(10);

/// The limits of the provider, and the numbers of requests it has received and admitted.
pub(super) struct Meter {
    requests: Option<(Pace, Bucket)>,
    tokens: Option<(Pace, Bucket)>,
    started: Instant,
    /// The number of requests that the provider has received.
    seen: u64,
    admitted: u64,
}

/// Why the provider did not admit a request.
pub(super) enum Rejection {
    NotYet { budget: &'static str, wait: Duration },
    Never { budget: &'static str },
}

/// A limit of the provider and the amount that remains of it, as reported in response headers.
struct Remaining {
    limit: u64,
    remaining: u64,
    until_full: Duration,
}

// === impl Meter ===

impl Meter {
    pub(super) fn new(bounds: &Bounds) -> Self {
        let bucket = |pace: Option<Pace>| pace.map(|pace| (pace, Bucket::new(pace, SLACK)));
        Self {
            requests: bucket(bounds.requests),
            tokens: bucket(bounds.tokens),
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

    /// Charges the request to both budgets or to none: a request that is rejected for its tokens does not count as a
    /// request. Returns the number of the admitted request.
    pub(super) fn admit(&mut self, tokens: u64) -> Result<u64, Rejection> {
        let now = self.started.elapsed();
        let budgets = [
            ("requests", &mut self.requests, 1),
            ("tokens", &mut self.tokens, tokens),
        ];
        for (budget, bucket, amount) in budgets {
            let wait = bucket.as_mut().map_or(Some(Duration::ZERO), |(pace, bucket)| {
                // A provider admits a request up to the amount of one minute, even if its bucket is that of a second.
                if amount > pace.burst && amount <= pace.per_minute {
                    bucket.grow(amount - pace.burst);
                    pace.burst = amount;
                }
                bucket.wait(amount, now)
            });
            match wait {
                Some(Duration::ZERO) => {}
                Some(wait) => return Err(Rejection::NotYet { budget, wait }),
                None => return Err(Rejection::Never { budget }),
            }
        }
        if let Some((_, bucket)) = &mut self.requests {
            bucket.take(1);
        }
        if let Some((_, bucket)) = &mut self.tokens {
            bucket.take(tokens);
        }
        self.admitted += 1;
        Ok(self.admitted)
    }

    /// The response headers that report the limits and the remaining amounts.
    pub(super) fn headers(&self, dialect: Dialect) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (budget, bucket) in [("requests", &self.requests), ("tokens", &self.tokens)] {
            let Some((pace, bucket)) = bucket else { continue };
            let remaining = Remaining {
                limit: pace.per_minute,
                remaining: bucket.left(),
                until_full: bucket.until_full(),
            };
            remaining.write_to(&mut headers, dialect, budget);
        }
        headers
    }
}

// === impl Remaining ===

impl Remaining {
    fn write_to(&self, headers: &mut HeaderMap, dialect: Dialect, budget: &str) {
        let names = match dialect {
            Dialect::OpenAi | Dialect::AzureOpenAi => {
                ["limit", "remaining", "reset"].map(|part| format!("x-ratelimit-{part}-{budget}"))
            }
            Dialect::Anthropic => {
                ["limit", "remaining", "reset"].map(|part| format!("anthropic-ratelimit-{budget}-{part}"))
            }
            Dialect::Mistral => {
                let budget = if budget == "requests" { "req" } else { budget };
                ["limit", "remaining", "reset"].map(|part| format!("x-ratelimit-{part}-{budget}-minute"))
            }
            // The other providers report no limits, or limits for periods other than a minute.
            _ => return,
        };
        let reset = match dialect {
            Dialect::Anthropic => humantime::format_rfc3339_seconds(SystemTime::now() + self.until_full).to_string(),
            Dialect::AzureOpenAi => self.until_full.as_secs().to_string(),
            _ => format!("{}ms", self.until_full.as_millis()),
        };
        let values = [self.limit.to_string(), self.remaining.to_string(), reset];
        for (name, value) in names.iter().zip(values) {
            if let (Ok(name), Ok(value)) = (name.parse::<HeaderName>(), HeaderValue::try_from(value)) {
                headers.insert(name, value);
            }
        }
    }
}

// === impl Rejection ===

impl IntoResponse for Rejection {
    fn into_response(self) -> Response {
        match self {
            Self::NotYet { budget, wait } => {
                let message = format!(
                    "Rate limit reached for {budget} per minute. Try again in {} ms.",
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
            Self::Never { budget } => {
                let message = format!("The request is larger than the limit of {budget} per minute.");
                (StatusCode::BAD_REQUEST, error(budget, "request_too_large", &message)).into_response()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_rejected_for_its_tokens_does_not_count() {
        let bucket = |burst| {
            let pace = Pace {
                per_minute: 1,
                burst,
                initial: burst,
                follows: false,
            };
            Some((pace, Bucket::new(pace, Duration::ZERO)))
        };
        let mut meter = Meter {
            requests: bucket(1),
            tokens: bucket(99),
            started: Instant::now(),
            seen: 0,
            admitted: 0,
        };
        assert!(meter.admit(100).is_ok());
        for _ in 0..5 {
            assert!(matches!(
                meter.admit(100),
                Err(Rejection::NotYet { budget: "tokens", .. })
            ));
        }
        assert!(meter.admit(0).is_ok());
        assert!(matches!(
            meter.admit(0),
            Err(Rejection::NotYet { budget: "requests", .. })
        ));
        assert!(matches!(
            meter.admit(101),
            Err(Rejection::NotYet { budget: "requests", .. })
        ));
    }
}
