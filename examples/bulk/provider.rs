//! A local provider of a chat-like API, which enforces its limits.

use crate::{
    bucket::Bucket,
    limits::{Bounds, Pace},
};
use axum::{
    Json, Router,
    extract::State,
    http::{HeaderMap, HeaderValue, StatusCode, header::RETRY_AFTER},
    response::{IntoResponse, Response},
    routing::post,
};
use serde::Deserialize;
use serde_json::{Value, json};
use std::{
    io,
    net::{SocketAddr, TcpListener},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};
use tokio::time::Instant;

/// How much more than the burst the provider lets pass, told as time.
///
/// The limiter makes up for a timer that fires late, by up to 5 ms, and what it lets go evenly does not arrive evenly:
/// another 5 ms for the way. The rate over any longer time is enforced to the token.
const SLACK: Duration = Duration::from_millis(10);

pub(crate) struct Provider {
    listener: TcpListener,
    address: SocketAddr,
    meter: Meter,
}

/// What has been admitted.
struct Meter {
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
    started: Instant,
    admitted: u64,
}

/// Why a request was not.
enum Refusal {
    NotYet { what: &'static str, wait: Duration },
    Never { what: &'static str },
}

#[derive(Deserialize)]
struct Chat {
    #[serde(default)]
    model: String,
    messages: Vec<Message>,
    #[serde(default, alias = "max_completion_tokens")]
    max_tokens: u64,
}

#[derive(Deserialize)]
struct Message {
    content: String,
}

impl Provider {
    pub(crate) fn bind(address: SocketAddr, bounds: &Bounds) -> io::Result<Self> {
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        let bucket = |pace: Option<Pace>| pace.map(|pace| Bucket::new(pace, SLACK));
        let (requests, tokens) = (bucket(bounds.requests), bucket(bounds.tokens));
        let meter = Meter {
            requests,
            tokens,
            started: Instant::now(),
            admitted: 0,
        };
        Ok(Self {
            address: listener.local_addr()?,
            listener,
            meter,
        })
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}/v1/chat/completions", self.address)
    }

    /// Never ends.
    pub(crate) async fn serve(self) -> io::Result<()> {
        let router = Router::new()
            .route("/v1/chat/completions", post(chat))
            .with_state(Arc::new(Mutex::new(self.meter)));
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

async fn chat(State(meter): State<Arc<Mutex<Meter>>>, Json(chat): Json<Chat>) -> Response {
    let characters: usize = chat
        .messages
        .iter()
        .map(|message| message.content.chars().count())
        .sum();
    let prompt = characters.div_ceil(4) as u64;
    let total = prompt.saturating_add(chat.max_tokens);
    let admitted = meter.lock().unwrap_or_else(PoisonError::into_inner).admit(total);
    let number = match admitted {
        Ok(number) => number,
        Err(refusal) => return refusal.into_response(),
    };
    tokio::time::sleep(latency(number)).await;
    let question = chat.messages.last().map_or("", |message| &message.content);
    let opening: String = question.chars().take(40).collect();
    Json(json!({
        "id": format!("chatcmpl-{number:08}"),
        "object": "chat.completion",
        "model": chat.model,
        "choices": [{
            "index": 0,
            "message": { "role": "assistant", "content": format!("An answer to: {opening}…") },
            "finish_reason": "stop",
        }],
        "usage": { "prompt_tokens": prompt, "completion_tokens": chat.max_tokens, "total_tokens": total },
    }))
    .into_response()
}

impl Meter {
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
                .map_or(Some(Duration::ZERO), |bucket| bucket.wait(amount, now))
            {
                Some(Duration::ZERO) => {}
                Some(wait) => return Err(Refusal::NotYet { what, wait }),
                None => return Err(Refusal::Never { what }),
            }
        }
        if let Some(bucket) = &mut self.requests {
            bucket.take(1);
        }
        if let Some(bucket) = &mut self.tokens {
            bucket.take(tokens);
        }
        self.admitted += 1;
        Ok(self.admitted)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        match self {
            Self::NotYet { what, wait } => {
                let message = format!(
                    "Rate limit reached for {what} per minute. Try again in {} ms.",
                    wait.as_millis()
                );
                let mut headers = HeaderMap::new();
                // Whole seconds, rounded up: earlier it would be refused again.
                headers.insert(
                    RETRY_AFTER,
                    HeaderValue::from(wait.as_nanos().div_ceil(1_000_000_000) as u64),
                );
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

/// Between 40 and 120 ms, the same in every run. (SplitMix64, seeded with the request's number.)
fn latency(number: u64) -> Duration {
    let mut mixed = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    Duration::from_micros(40_000 + (mixed ^ (mixed >> 31)) % 80_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_refused_for_its_tokens_does_not_count() {
        let bucket = |burst| {
            Some(Bucket::new(
                Pace {
                    per_minute: 1,
                    burst,
                    initial: burst,
                },
                Duration::ZERO,
            ))
        };
        let mut meter = Meter {
            requests: bucket(1),
            tokens: bucket(99),
            started: Instant::now(),
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
