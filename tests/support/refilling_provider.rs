//! A model of a provider that enforces token buckets exactly, and reports them as OpenAI or Anthropic do.

use http::{Request, Response, response};
use std::{
    convert::Infallible,
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::time::{Instant, sleep};
use tower::util::BoxCloneSyncService;

/// The client of a provider: the body of a request is the number of tokens that it costs.
pub type ProviderClient = BoxCloneSyncService<Request<u64>, Response<&'static str>, Infallible>;

/// How a provider reports its buckets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Headers {
    OpenAi,
    Anthropic,
    /// The names of OpenAI, with amounts that are not true: this limit and this remainder.
    Lie(u64, u64),
    None,
}

/// A bucket of a provider: `limit` a minute, of which it holds at most `capacity`.
#[derive(Clone, Copy, Debug)]
pub struct ProviderBucket {
    pub limit: f64,
    pub capacity: f64,
    pub held: f64,
    at: Instant,
}

/// The provider. Clones share the buckets.
#[derive(Clone)]
pub struct Provider {
    state: Arc<Mutex<State>>,
    headers: Headers,
    /// The time from the client to the provider, and from the provider to the client.
    way: Duration,
}

struct State {
    requests: ProviderBucket,
    tokens: ProviderBucket,
    /// When each call was accepted.
    accepted: Vec<Instant>,
    rejected: Vec<Instant>,
}

impl ProviderBucket {
    /// Returns a full bucket that holds the amount of a minute.
    pub fn new(limit: f64) -> Self {
        Self {
            limit,
            capacity: limit,
            held: limit,
            at: Instant::now(),
        }
    }

    fn fill(&mut self) {
        let elapsed = self.at.elapsed().as_secs_f64();
        self.held = (self.held + elapsed * self.limit / 60.0).min(self.capacity);
        self.at = Instant::now();
    }

    fn until_full(&self) -> Duration {
        Duration::from_secs_f64((self.capacity - self.held).max(0.0) * 60.0 / self.limit)
    }
}

impl Provider {
    /// Returns a provider that allows `requests` and `tokens` a minute and has full buckets.
    pub fn new(requests: f64, tokens: f64, headers: Headers, way: Duration) -> Self {
        let state = State {
            requests: ProviderBucket::new(requests),
            tokens: ProviderBucket::new(tokens),
            accepted: Vec::new(),
            rejected: Vec::new(),
        };
        Self {
            state: Arc::new(Mutex::new(state)),
            headers,
            way,
        }
    }

    /// Changes the buckets of requests and of tokens.
    pub fn change(&self, change: impl FnOnce(&mut ProviderBucket, &mut ProviderBucket)) {
        let mut state = self.state.lock().unwrap();
        let State { requests, tokens, .. } = &mut *state;
        requests.fill();
        tokens.fill();
        change(requests, tokens);
    }

    /// Takes a call of `tokens` tokens, as another client would. Returns whether it was accepted.
    pub fn take(&self, tokens: u64) -> bool {
        self.state.lock().unwrap().take(tokens)
    }

    /// Returns how many calls were accepted and rejected since `since`.
    pub fn counts(&self, since: Instant) -> (usize, usize) {
        let state = self.state.lock().unwrap();
        let count = |times: &[Instant]| times.iter().filter(|at| **at >= since).count();
        (count(&state.accepted), count(&state.rejected))
    }

    /// Returns the same provider, this far away.
    pub fn with_way(&self, way: Duration) -> Self {
        Self { way, ..self.clone() }
    }

    /// Returns when each call was rejected.
    pub fn rejections(&self) -> Vec<Instant> {
        self.state.lock().unwrap().rejected.clone()
    }

    pub fn client(&self) -> ProviderClient {
        let provider = self.clone();
        BoxCloneSyncService::new(tower::service_fn(move |request: Request<u64>| {
            let provider = provider.clone();
            async move {
                sleep(provider.way).await;
                let response = provider.respond(*request.body());
                sleep(provider.way).await;
                Ok(response)
            }
        }))
    }

    fn respond(&self, tokens: u64) -> Response<&'static str> {
        let mut state = self.state.lock().unwrap();
        let status = if state.take(tokens) { 200 } else { 429 };
        let buckets = [("requests", state.requests), ("tokens", state.tokens)];
        let mut response = Response::builder().status(status);
        for (name, bucket) in buckets {
            response = self.report(response, name, &bucket);
        }
        response.body("").unwrap()
    }

    fn report(&self, response: response::Builder, name: &str, bucket: &ProviderBucket) -> response::Builder {
        let (limit, remaining) = match self.headers {
            Headers::Lie(limit, remaining) => (limit, remaining),
            _ => (bucket.limit as u64, bucket.held as u64),
        };
        match self.headers {
            Headers::None => response,
            Headers::Anthropic => {
                // A date in whole seconds, counted from the date of the response.
                let full = bucket.until_full().as_secs_f64().ceil() as u64;
                let full = format!(
                    "2026-10-21T{:02}:{:02}:{:02}Z",
                    7 + full / 3_600,
                    full / 60 % 60,
                    full % 60
                );
                response
                    .header("date", "Wed, 21 Oct 2026 07:00:00 GMT")
                    .header(format!("anthropic-ratelimit-{name}-limit"), limit)
                    .header(format!("anthropic-ratelimit-{name}-remaining"), remaining)
                    .header(format!("anthropic-ratelimit-{name}-reset"), full)
            }
            Headers::OpenAi | Headers::Lie(..) => response
                .header(format!("x-ratelimit-limit-{name}"), limit)
                .header(format!("x-ratelimit-remaining-{name}"), remaining)
                .header(
                    format!("x-ratelimit-reset-{name}"),
                    format!("{}ms", bucket.until_full().as_millis()),
                ),
        }
    }
}

impl State {
    fn take(&mut self, tokens: u64) -> bool {
        self.requests.fill();
        self.tokens.fill();
        let is_accepted = self.requests.held >= 1.0 && self.tokens.held >= tokens as f64;
        if is_accepted {
            self.requests.held -= 1.0;
            self.tokens.held -= tokens as f64;
            self.accepted.push(Instant::now());
        } else {
            self.rejected.push(Instant::now());
        }
        is_accepted
    }
}
