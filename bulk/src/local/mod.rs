//! A local provider of a chat-like API. It enforces its limits, reports them in the headers that a real provider uses,
//! and fails or delays some of its responses.

mod bucket;

use crate::{
    args::{Args, LocalArgs},
    limits::{Bounds, Pace},
};
use axum::{
    Json, Router,
    body::Body,
    extract::State,
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::post,
};
use bucket::Bucket;
use futures_util::stream;
use hyper::body::Bytes;
use serde::Deserialize;
use serde_json::{Value, json};
use std::{
    convert::Infallible,
    io,
    net::{SocketAddr, TcpListener},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, SystemTime},
};
use tokio::time::{Instant, sleep};
use tower_outbound::provider::Provider as Dialect;

/// What the provider admits beyond the burst: the amount that flows in during this time.
///
/// The limiter makes up for up to 5 ms of a late timer. Requests that are sent at even intervals do not arrive at even
/// intervals, so another 5 ms are allowed for the network. Over longer times the provider enforces the rate exactly.
const SLACK: Duration = Duration::from_millis(10);

/// The pause in the middle of a slow response.
const SLOW: Duration = Duration::from_millis(400);

pub(crate) struct Provider {
    listener: TcpListener,
    address: SocketAddr,
    service: Service,
}

/// The state of the provider that all requests share.
struct Service {
    meter: Mutex<Meter>,
    dialect: Dialect,
    behaviour: LocalArgs,
}

/// The limits of the provider, and the numbers of requests it has received and admitted.
struct Meter {
    requests: Option<(Pace, Bucket)>,
    tokens: Option<(Pace, Bucket)>,
    started: Instant,
    /// The number of requests that the provider has received.
    seen: u64,
    admitted: u64,
}

/// Why the provider did not admit a request.
enum Rejection {
    NotYet { budget: &'static str, wait: Duration },
    Never { budget: &'static str },
}

/// A limit of the provider and the amount that remains of it, as reported in response headers.
struct Remaining {
    limit: u64,
    remaining: u64,
    until_full: Duration,
}

#[derive(Deserialize)]
struct Chat {
    #[serde(default)]
    model: String,
    messages: Vec<Message>,
    #[serde(default, alias = "max_completion_tokens")]
    max_tokens: u64,
    #[serde(default)]
    stream: bool,
}

#[derive(Deserialize)]
struct Message {
    content: String,
}

/// The content of a chat response.
struct ChatResponse<'a> {
    number: u64,
    model: &'a str,
    text: String,
    prompt: u64,
    completion: u64,
}

// === impl Provider ===

impl Provider {
    pub(crate) fn bind(address: SocketAddr, bounds: &Bounds, args: &Args) -> io::Result<Self> {
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        Ok(Self {
            address: listener.local_addr()?,
            listener,
            service: Service {
                meter: Mutex::new(Meter::new(bounds)),
                dialect: args.send.provider(),
                behaviour: args.local.clone(),
            },
        })
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}/v1/chat/completions", self.address)
    }

    /// Serves requests until an error ends the server.
    pub(crate) async fn serve(self) -> io::Result<()> {
        let router = Router::new().fallback(post(chat)).with_state(Arc::new(self.service));
        axum::serve(tokio::net::TcpListener::from_std(self.listener)?, router).await
    }

    /// Serves requests on a separate thread, so that a busy runtime of the client does not delay them.
    pub(crate) fn serve_on_own_thread(self) -> io::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        thread::Builder::new()
            .name("provider".into())
            .spawn(move || runtime.block_on(self.serve()))?;
        Ok(())
    }
}

async fn chat(State(service): State<Arc<Service>>, Json(chat): Json<Chat>) -> Response {
    let Service {
        meter,
        dialect,
        behaviour,
    } = &*service;
    let characters: usize = chat
        .messages
        .iter()
        .map(|message| message.content.chars().count())
        .sum();
    let prompt = characters.div_ceil(4) as u64;
    let completion = (chat.max_tokens * u64::from(behaviour.local_usage)).div_ceil(100);
    let (admitted, seen, headers) = {
        let mut meter = meter.lock().unwrap_or_else(PoisonError::into_inner);
        meter.seen += 1;
        let seen = meter.seen;
        if percent(behaviour.local_seed, seen, 0) < behaviour.local_faults {
            return fault();
        }
        let admitted = meter.admit(prompt.saturating_add(completion));
        (admitted, seen, meter.headers(*dialect))
    };
    let number = match admitted {
        Ok(number) => number,
        Err(rejection) => return (headers, rejection).into_response(),
    };
    sleep(latency(number)).await;
    let question = chat.messages.last().map_or("", |message| &message.content);
    let opening: String = question.chars().take(40).collect();
    let response = ChatResponse {
        number,
        model: &chat.model,
        text: format!("An answer to: {opening}…"),
        prompt,
        completion,
    };
    if chat.stream {
        return (
            headers,
            [(CONTENT_TYPE, "text/event-stream")],
            response.as_events(*dialect),
        )
            .into_response();
    }
    let whole = response.as_json(*dialect).to_string();
    let body = if percent(behaviour.local_seed, seen, 1) < behaviour.local_slow {
        let (first, rest) = whole.split_at(whole.len() / 4);
        pieces(vec![(Duration::ZERO, first.to_owned()), (SLOW, rest.to_owned())])
    } else {
        whole.into()
    };
    (headers, [(CONTENT_TYPE, "application/json")], body).into_response()
}

/// A response with status 503, without a `retry-after`.
fn fault() -> Response {
    let body = error(
        "server_error",
        "overloaded",
        "The server is overloaded. Please try again later.",
    );
    (StatusCode::SERVICE_UNAVAILABLE, body).into_response()
}

/// A body that is sent in pieces. Before each piece it waits for the piece's delay.
fn pieces(pieces: Vec<(Duration, String)>) -> Body {
    Body::from_stream(stream::unfold(pieces.into_iter(), async |mut pieces| {
        let (after, piece) = pieces.next()?;
        sleep(after).await;
        Some((Ok::<_, Infallible>(Bytes::from(piece)), pieces))
    }))
}

// === impl ChatResponse ===

impl ChatResponse<'_> {
    fn usage(&self, dialect: Dialect) -> Value {
        let Self { prompt, completion, .. } = self;
        match dialect {
            Dialect::Anthropic => json!({ "input_tokens": prompt, "output_tokens": completion }),
            _ => json!({
                "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
            }),
        }
    }

    fn as_json(&self, dialect: Dialect) -> Value {
        let Self {
            number, model, text, ..
        } = self;
        match dialect {
            Dialect::Anthropic => json!({
                "id": format!("msg_{number:08}"),
                "type": "message",
                "role": "assistant",
                "model": model,
                "content": [{ "type": "text", "text": text }],
                "stop_reason": "end_turn",
                "usage": self.usage(dialect),
            }),
            _ => json!({
                "id": format!("chatcmpl-{number:08}"),
                "object": "chat.completion",
                "model": model,
                "choices": [{
                    "index": 0,
                    "message": { "role": "assistant", "content": text },
                    "finish_reason": "stop",
                }],
                "usage": self.usage(dialect),
            }),
        }
    }

    /// The text of the response as server-sent events: a word every 20 ms, and the usage at the end.
    fn as_events(&self, dialect: Dialect) -> Body {
        let event = |data: &Value| format!("data: {data}\n\n");
        let word = |word: &str| match dialect {
            Dialect::Anthropic => json!({ "type": "content_block_delta", "delta": { "text": word } }),
            _ => json!({ "object": "chat.completion.chunk", "choices": [{ "delta": { "content": word } }] }),
        };
        let words = self
            .text
            .split_inclusive(' ')
            .map(|text| (Duration::from_millis(20), event(&word(text))));
        let last = match dialect {
            Dialect::Anthropic => event(&json!({ "type": "message_delta", "usage": self.usage(dialect) })),
            _ => event(&json!({ "choices": [], "usage": self.usage(dialect) })) + "data: [DONE]\n\n",
        };
        pieces(words.chain([(Duration::ZERO, last)]).collect())
    }
}

// === impl Meter ===

impl Meter {
    fn new(bounds: &Bounds) -> Self {
        let bucket = |pace: Option<Pace>| pace.map(|pace| (pace, Bucket::new(pace, SLACK)));
        Self {
            requests: bucket(bounds.requests),
            tokens: bucket(bounds.tokens),
            started: Instant::now(),
            seen: 0,
            admitted: 0,
        }
    }

    /// Charges the request to both budgets or to none: a request that is rejected for its tokens does not count as a
    /// request. Returns the number of the admitted request.
    fn admit(&mut self, tokens: u64) -> Result<u64, Rejection> {
        let now = self.started.elapsed();
        let budgets = [
            ("requests", &mut self.requests, 1),
            ("tokens", &mut self.tokens, tokens),
        ];
        for (budget, bucket, amount) in budgets {
            match bucket
                .as_mut()
                .map_or(Some(Duration::ZERO), |(_, bucket)| bucket.wait(amount, now))
            {
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
    fn headers(&self, dialect: Dialect) -> HeaderMap {
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
                let message = format!("The request is larger than the burst of {budget} per minute.");
                (StatusCode::BAD_REQUEST, error(budget, "request_too_large", &message)).into_response()
            }
        }
    }
}

fn error(kind: &str, code: &str, message: &str) -> Json<Value> {
    Json(json!({ "error": { "type": kind, "code": code, "message": message } }))
}

/// The latency of a response: between 40 and 120 ms, the same in every run.
fn latency(number: u64) -> Duration {
    Duration::from_micros(40_000 + mixed(number) % 80_000)
}

/// A pseudo-random number from 0 to 99, the same in every run with this seed. Different values of `stream` give
/// independent sequences.
fn percent(seed: u64, number: u64, stream: u64) -> u8 {
    (mixed(mixed(seed ^ (stream << 32)) ^ number) % 100) as u8
}

/// Mixes the bits of a number with the output function of the random generator SplitMix64.
fn mixed(number: u64) -> u64 {
    let mut mixed = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
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

    #[test]
    fn the_latency_of_a_request_is_between_40_and_120_ms_in_every_run() {
        for number in 1..1_000 {
            assert!((40..=120).contains(&latency(number).as_millis()));
            assert_eq!(latency(number), latency(number));
        }
    }
}
