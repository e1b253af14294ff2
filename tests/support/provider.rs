//! A provider that enforces its limits exactly: it counts what each call truly uses, sends the headers and the usage
//! that the real one sends, and answers 429 to a call above any of its limits.

#![allow(unreachable_pub)]

use bytes::Bytes;
use http::{Request, Response, response::Builder};
use http_body_util::Full;
use std::{
    convert::Infallible,
    fmt::Write as _,
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
    time::Duration,
};
use tokio::time::{Instant, sleep};
use tower::Service;

/// What a call truly uses, which only the provider knows: an extension of its request.
#[derive(Clone, Copy, Debug)]
pub struct Truth {
    pub input: u64,
    pub output: u64,
    pub takes: Duration,
}

/// How a limit lets its amount be used.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Shape {
    /// A bucket of one period's amount, full at the start, which fills continuously.
    Bucket,
    /// The amount in any time of the length of the period.
    Sliding,
    /// The amount in each period, counted from the provider's start.
    Fixed,
}

/// A limit of the provider.
#[derive(Clone, Copy, Debug)]
pub struct Limit {
    pub budget: &'static str,
    pub amount: u64,
    pub period: Duration,
    pub shape: Shape,
}

/// In which form the provider speaks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Dialect {
    OpenAi,
    /// OpenAI's headers, with the limit of requests a day.
    Groq,
    Anthropic,
    Gemini,
    Mistral,
    /// No headers. Reserves what the request declares, and settles when the answer has ended, with output counted five
    /// times.
    Bedrock,
}

/// What the provider has counted of one limit: a list of what was used when.
#[derive(Debug)]
struct Counted {
    limit: Limit,
    used: Vec<(Duration, i128)>,
    /// What the bucket lacks, in its amount times the nanoseconds of the period, as of the last use.
    missing: i128,
    at: Duration,
}

#[derive(Clone)]
pub struct Provider {
    dialect: Dialect,
    begun: Instant,
    counted: Arc<Mutex<Vec<Counted>>>,
    rejections: Arc<Mutex<Vec<String>>>,
}

// === impl Counted ===

impl Counted {
    fn new(limit: Limit) -> Self {
        Self {
            limit,
            used: Vec::new(),
            missing: 0,
            at: Duration::ZERO,
        }
    }

    fn unit(&self) -> i128 {
        self.limit.period.as_nanos() as i128
    }

    fn fill(&mut self, now: Duration) {
        let passed = now.saturating_sub(self.at).as_nanos() as i128;
        self.missing = (self.missing - passed * i128::from(self.limit.amount)).max(0);
        self.at = now;
    }

    /// What is left now. Below zero if more was used than was reserved.
    fn left(&mut self, now: Duration) -> i128 {
        let Limit {
            amount, period, shape, ..
        } = self.limit;
        let since = |from: Option<Duration>| -> i128 {
            let is_in = |at: Duration| from.is_none_or(|from| at > from);
            self.used
                .iter()
                .rev()
                .take_while(|(at, _)| is_in(*at))
                .map(|(_, used)| used)
                .sum()
        };
        match shape {
            Shape::Sliding => i128::from(amount) - since(now.checked_sub(period)),
            Shape::Fixed => {
                let windows = now.as_nanos() / period.as_nanos();
                let start = period * u32::try_from(windows).unwrap();
                i128::from(amount) - since(start.checked_sub(Duration::from_nanos(1)))
            }
            Shape::Bucket => {
                self.fill(now);
                (i128::from(amount) * self.unit() - self.missing).div_euclid(self.unit())
            }
        }
    }

    fn take(&mut self, now: Duration, used: i128) {
        self.fill(now);
        self.missing = (self.missing + used * self.unit()).max(0);
        self.used.push((now, used));
    }

    /// What could have been used until `now`.
    fn allowed(&self, now: Duration) -> f64 {
        let amount = self.limit.amount as f64;
        let periods = now.as_secs_f64() / self.limit.period.as_secs_f64();
        match self.limit.shape {
            Shape::Bucket => amount * (1.0 + periods),
            Shape::Sliding | Shape::Fixed => amount * (periods.floor() + 1.0),
        }
    }
}

// === impl Provider ===

impl Provider {
    pub fn new(dialect: Dialect, limits: impl IntoIterator<Item = Limit>) -> Self {
        Self {
            dialect,
            begun: Instant::now(),
            counted: Arc::new(Mutex::new(limits.into_iter().map(Counted::new).collect())),
            rejections: Arc::default(),
        }
    }

    /// Why calls were answered with 429.
    pub fn rejections(&self) -> Vec<String> {
        self.rejections.lock().unwrap().clone()
    }

    /// Returns the part of each limit that was used until the last call arrived, with the limit's budget.
    pub fn used_parts(&self) -> Vec<(&'static str, f64)> {
        let counted = self.counted.lock().unwrap();
        let part = |counted: &Counted| {
            let last = counted.used.last().map_or(Duration::ZERO, |(at, _)| *at);
            let used: i128 = counted.used.iter().map(|(_, used)| used).sum();
            (counted.limit.budget, used as f64 / counted.allowed(last))
        };
        counted.iter().map(part).collect()
    }

    /// Returns what is left of a budget now: the least over its limits.
    pub fn left(&self, budget: &str) -> i128 {
        let now = self.begun.elapsed();
        let mut counted = self.counted.lock().unwrap();
        let of_budget = counted.iter_mut().filter(|counted| counted.limit.budget == budget);
        of_budget
            .map(|counted| counted.left(now))
            .min()
            .expect("the budget is limited")
    }

    fn amount(&self, budget: &str, truth: &Truth) -> i128 {
        let output = if self.dialect == Dialect::Bedrock { 5 } else { 1 };
        i128::from(match budget {
            "requests" => 1,
            "tokens" => truth.input + output * truth.output,
            "input_tokens" => truth.input,
            "output_tokens" => truth.output,
            _ => panic!("no call uses {budget}"),
        })
    }

    /// Counts a call that arrives, or says which limit it exceeds.
    fn arrive(&self, reserve: impl Fn(&str) -> i128) -> Result<(), String> {
        let now = self.begun.elapsed();
        let mut counted = self.counted.lock().unwrap();
        for counted in counted.iter_mut() {
            let (left, needed) = (counted.left(now), reserve(counted.limit.budget));
            if left < needed {
                return Err(format!("at {now:?}: {needed} of {left} left of {:?}", counted.limit));
            }
        }
        for counted in counted.iter_mut() {
            let needed = reserve(counted.limit.budget);
            counted.take(now, needed);
        }
        Ok(())
    }

    fn correct(&self, by: impl Fn(&str) -> i128) {
        let now = self.begun.elapsed();
        for counted in self.counted.lock().unwrap().iter_mut() {
            let by = by(counted.limit.budget);
            counted.take(now, by);
        }
    }

    /// Adds the rate-limit headers of a response.
    fn with_headers(&self, response: Builder) -> Builder {
        let now = self.begun.elapsed();
        let mut counted = self.counted.lock().unwrap();
        let shown = counted.iter_mut().filter_map(|counted| {
            let Limit { budget, amount, .. } = counted.limit;
            let is_day = counted.limit.period > Duration::from_secs(3_600);
            let left = counted.left(now).max(0);
            let full_in = Duration::from_nanos((counted.missing / i128::from(amount)) as u64);
            let names = match (self.dialect, budget) {
                (Dialect::OpenAi, _) => ["x-ratelimit-limit-", "x-ratelimit-remaining-", "x-ratelimit-reset-"]
                    .map(|name| format!("{name}{budget}")),
                (Dialect::Groq, _) if is_day == (budget == "requests") => {
                    ["x-ratelimit-limit-", "x-ratelimit-remaining-", "x-ratelimit-reset-"]
                        .map(|name| format!("{name}{budget}"))
                }
                (Dialect::Anthropic, _) => ["limit", "remaining", "reset"]
                    .map(|name| format!("anthropic-ratelimit-{}-{name}", budget.replace('_', "-"))),
                (Dialect::Mistral, "tokens") => {
                    ["limit", "remaining", "unsent"].map(|name| format!("x-ratelimit-{name}-tokens-minute"))
                }
                _ => return None,
            };
            // Anthropic rounds tokens to the nearest thousand.
            let left = match self.dialect {
                Dialect::Anthropic if budget != "requests" => (left + 500) / 1_000 * 1_000,
                _ => left,
            };
            let reset = match self.dialect {
                Dialect::Anthropic => format!("2026-02-25T{}Z", time_of_day(now + full_in)),
                _ => format!("{}ms", full_in.as_millis()),
            };
            Some((names, [amount.to_string(), left.to_string(), reset]))
        });
        let date = format!("Wed, 25 Feb 2026 {} GMT", time_of_day(now));
        shown.fold(response.header("date", date), |response, (names, values)| {
            let pairs = names.into_iter().zip(values);
            let sent = pairs.filter(|(name, _)| !name.contains("unsent"));
            sent.fold(response, |response, (name, value)| response.header(name, value))
        })
    }

    fn usage(&self, Truth { input, output, .. }: Truth) -> String {
        match self.dialect {
            Dialect::OpenAi | Dialect::Groq | Dialect::Mistral => format!(
                r#"{{"choices":[],"usage":{{"prompt_tokens":{input},"completion_tokens":{output},"total_tokens":{}}}}}"#,
                input + output
            ),
            Dialect::Anthropic | Dialect::Bedrock => {
                format!(r#"{{"type":"message","usage":{{"input_tokens":{input},"output_tokens":{output}}}}}"#)
            }
            Dialect::Gemini => format!(
                r#"{{"candidates":[],"usageMetadata":{{"promptTokenCount":{input},"candidatesTokenCount":{output},"totalTokenCount":{}}}}}"#,
                input + output
            ),
        }
    }
}

fn time_of_day(time: Duration) -> String {
    let seconds = time.as_secs() % 86_400;
    let mut text = String::new();
    write!(
        text,
        "{:02}:{:02}:{:02}",
        seconds / 3_600,
        seconds / 60 % 60,
        seconds % 60
    )
    .unwrap();
    text
}

impl Service<Request<String>> for Provider {
    type Response = Response<Full<Bytes>>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<String>) -> Self::Future {
        let provider = self.clone();
        let truth = *request.extensions().get::<Truth>().expect("each call has its truth");
        let declared: serde_json::Value = serde_json::from_str(request.body()).expect("JSON");
        let max_tokens = declared["max_tokens"].as_u64().expect("each call has a bound");
        Box::pin(async move {
            let reserve = |budget: &str| match (provider.dialect, budget) {
                (Dialect::Bedrock, "tokens") => i128::from(truth.input + max_tokens),
                _ => provider.amount(budget, &truth),
            };
            if let Err(reason) = provider.arrive(reserve) {
                provider.rejections.lock().unwrap().push(reason);
                let refused = Response::builder().status(429).body(Full::default());
                return Ok(refused.unwrap());
            }
            // The head tells what was left when the request had arrived.
            let head = provider.with_headers(Response::builder().header("content-type", "application/json"));
            sleep(truth.takes).await;
            provider.correct(|budget| provider.amount(budget, &truth) - reserve(budget));
            Ok(head.body(Full::from(provider.usage(truth))).unwrap())
        })
    }
}
