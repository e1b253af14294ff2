//! A local provider of a chat-like API, which enforces its limits, tells them in the words of a real one, and has bad
//! moments.

use crate::{
    args::{Args, Local},
    bucket::Bucket,
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

/// How much more than the burst the provider lets pass, told as time.
///
/// The limiter makes up for a timer that fires late, by up to 5 ms, and what it lets go evenly does not arrive evenly:
/// another 5 ms for the way. The rate over any longer time is enforced to the token.
const SLACK: Duration = Duration::from_millis(10);

/// How long a slow answer stops in the middle.
const SLOW: Duration = Duration::from_millis(400);

pub(crate) struct Provider {
    listener: TcpListener,
    address: SocketAddr,
    service: Service,
}

/// What answers.
struct Service {
    meter: Mutex<Meter>,
    dialect: Dialect,
    manners: Local,
}

/// What has been admitted.
struct Meter {
    requests: Option<(Pace, Bucket)>,
    tokens: Option<(Pace, Bucket)>,
    started: Instant,
    /// Requests that came.
    seen: u64,
    admitted: u64,
}

/// Why a request was not.
enum Refusal {
    NotYet { what: &'static str, wait: Duration },
    Never { what: &'static str },
}

/// A limit, and what is left of it.
struct Left {
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

/// What is answered.
struct Answer<'a> {
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
                dialect: args.provider,
                manners: args.local.clone(),
            },
        })
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}/v1/chat/completions", self.address)
    }

    /// Never ends.
    pub(crate) async fn serve(self) -> io::Result<()> {
        let router = Router::new().fallback(post(chat)).with_state(Arc::new(self.service));
        axum::serve(tokio::net::TcpListener::from_std(self.listener)?, router).await
    }

    /// On a thread of its own, as a provider is a machine of its own: it need not wait until ours has time for it.
    pub(crate) fn serve_apart(self) -> io::Result<()> {
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
        manners,
    } = &*service;
    let characters: usize = chat
        .messages
        .iter()
        .map(|message| message.content.chars().count())
        .sum();
    let prompt = characters.div_ceil(4) as u64;
    let completion = (chat.max_tokens * u64::from(manners.local_usage)).div_ceil(100);
    let (admitted, seen, headers) = {
        let mut meter = meter.lock().unwrap_or_else(PoisonError::into_inner);
        meter.seen += 1;
        let seen = meter.seen;
        if percent(manners.local_seed, seen, 0) < manners.local_faults {
            return fault();
        }
        let admitted = meter.admit(prompt.saturating_add(completion));
        (admitted, seen, meter.headers(*dialect))
    };
    let number = match admitted {
        Ok(number) => number,
        Err(refusal) => return (headers, refusal).into_response(),
    };
    sleep(latency(number)).await;
    let question = chat.messages.last().map_or("", |message| &message.content);
    let opening: String = question.chars().take(40).collect();
    let answer = Answer {
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
            answer.as_events(*dialect),
        )
            .into_response();
    }
    let whole = answer.as_json(*dialect).to_string();
    let body = if percent(manners.local_seed, seen, 1) < manners.local_slow {
        let (first, rest) = whole.split_at(whole.len() / 4);
        pieces(vec![(Duration::ZERO, first.to_owned()), (SLOW, rest.to_owned())])
    } else {
        whole.into()
    };
    (headers, [(CONTENT_TYPE, "application/json")], body).into_response()
}

/// A bad moment. It does not say when to come back.
fn fault() -> Response {
    let body = error(
        "server_error",
        "overloaded",
        "The server is overloaded. Please try again later.",
    );
    (StatusCode::SERVICE_UNAVAILABLE, body).into_response()
}

/// A body that is sent piece by piece, each after a while.
fn pieces(pieces: Vec<(Duration, String)>) -> Body {
    Body::from_stream(stream::unfold(pieces.into_iter(), async |mut pieces| {
        let (after, piece) = pieces.next()?;
        sleep(after).await;
        Some((Ok::<_, Infallible>(Bytes::from(piece)), pieces))
    }))
}

// === impl Answer ===

impl Answer<'_> {
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

    /// A word every 20 ms, and at the end what was used.
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

    /// Both or neither: a request that is refused for its tokens does not count as a request.
    fn admit(&mut self, tokens: u64) -> Result<u64, Refusal> {
        let now = self.started.elapsed();
        let budgets = [
            ("requests", &mut self.requests, 1),
            ("tokens", &mut self.tokens, tokens),
        ];
        for (what, bucket, amount) in budgets {
            match bucket
                .as_mut()
                .map_or(Some(Duration::ZERO), |(_, bucket)| bucket.wait(amount, now))
            {
                Some(Duration::ZERO) => {}
                Some(wait) => return Err(Refusal::NotYet { what, wait }),
                None => return Err(Refusal::Never { what }),
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

    /// What is left, in the provider's words.
    fn headers(&self, dialect: Dialect) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (what, bucket) in [("requests", &self.requests), ("tokens", &self.tokens)] {
            let Some((pace, bucket)) = bucket else { continue };
            let left = Left {
                limit: pace.per_minute,
                remaining: bucket.left(),
                until_full: bucket.until_full(),
            };
            left.tell(dialect, what, &mut headers);
        }
        headers
    }
}

// === impl Left ===

impl Left {
    fn tell(&self, dialect: Dialect, what: &str, headers: &mut HeaderMap) {
        let names = match dialect {
            Dialect::OpenAi | Dialect::AzureOpenAi => {
                ["limit", "remaining", "reset"].map(|part| format!("x-ratelimit-{part}-{what}"))
            }
            Dialect::Anthropic => {
                ["limit", "remaining", "reset"].map(|part| format!("anthropic-ratelimit-{what}-{part}"))
            }
            Dialect::Mistral => {
                let what = if what == "requests" { "req" } else { what };
                ["limit", "remaining", "reset"].map(|part| format!("x-ratelimit-{part}-{what}-minute"))
            }
            // The others say nothing, or count by other times.
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

// === impl Refusal ===

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        match self {
            Self::NotYet { what, wait } => {
                let message = format!(
                    "Rate limit reached for {what} per minute. Try again in {} ms.",
                    wait.as_millis()
                );
                // Rounded up: earlier it would be refused again.
                let headers = [
                    ("retry-after", wait.as_nanos().div_ceil(1_000_000_000).to_string()),
                    ("retry-after-ms", wait.as_nanos().div_ceil(1_000_000).to_string()),
                ];
                (
                    StatusCode::TOO_MANY_REQUESTS,
                    headers,
                    error(what, "rate_limit_exceeded", &message),
                )
                    .into_response()
            }
            Self::Never { what } => {
                let message = format!("The request is larger than what {what} per minute allow at once.");
                (StatusCode::BAD_REQUEST, error(what, "request_too_large", &message)).into_response()
            }
        }
    }
}

fn error(kind: &str, code: &str, message: &str) -> Json<Value> {
    Json(json!({ "error": { "type": kind, "code": code, "message": message } }))
}

/// Between 40 and 120 ms, the same in every run.
fn latency(number: u64) -> Duration {
    Duration::from_micros(40_000 + mixed(number) % 80_000)
}

/// Less than a hundred, the same in every run with this seed.
fn percent(seed: u64, number: u64, of: u64) -> u8 {
    (mixed(mixed(seed ^ (of << 32)) ^ number) % 100) as u8
}

/// SplitMix64.
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
    fn a_request_refused_for_its_tokens_does_not_count() {
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
            assert!(matches!(meter.admit(100), Err(Refusal::NotYet { what: "tokens", .. })));
        }
        assert!(meter.admit(0).is_ok());
        assert!(matches!(meter.admit(0), Err(Refusal::NotYet { what: "requests", .. })));
        assert!(matches!(
            meter.admit(101),
            Err(Refusal::NotYet { what: "requests", .. })
        ));
    }

    #[test]
    fn a_latency_is_small_and_always_the_same() {
        for number in 1..1_000 {
            assert!((40..=120).contains(&latency(number).as_millis()));
            assert_eq!(latency(number), latency(number));
        }
    }
}
