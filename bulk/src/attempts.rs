//! [`AttemptsLayer`]: counts attempts as they end, also those of requests that are still under way.
//!
//! The event of a request is complete only when the request has ended, which may be hours after its first attempt. What
//! is shown during the run, and what failed attempts were charged, is counted here.

use crate::{limits::Charges, secrets::Secrets};
use futures_util::{FutureExt, future::BoxFuture};
use http::{Request, Response, StatusCode, header::RETRY_AFTER};
use hyper::body::Bytes;
use std::{
    collections::{BTreeMap, HashSet},
    fmt::Write as _,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
};
use tower::{BoxError, Layer, Service};
use tower_outbound::{RequestId, event, rate::RequestCost, retry::never_sent};

/// The number of kinds of failures that are counted separately. Further kinds are counted together as `others`.
const MAX_KINDS: usize = 100;

/// The number of characters of a failure that are kept.
const MAX_TEXT: usize = 300;

/// Counts the attempts of the client below it. Belongs directly around the client, below the layer that retries.
#[derive(Clone, Debug)]
pub(crate) struct AttemptsLayer {
    attempts: Arc<Attempts>,
    charges: Charges,
}

/// The service of [`AttemptsLayer`].
#[derive(Clone, Debug)]
pub(crate) struct CountAttempts<S> {
    inner: S,
    layer: AttemptsLayer,
}

/// The counts of all attempts of a run.
#[derive(Debug, Default)]
pub(crate) struct Attempts {
    secrets: Secrets,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    counts: AttemptCounts,
    /// The requests whose last attempt has failed, and which may be tried again.
    failed: HashSet<RequestId>,
}

/// What [`Attempts`] has counted so far.
#[derive(Clone, Debug, Default)]
pub(crate) struct AttemptCounts {
    /// The number of responses with status 429.
    pub(crate) status_429: u64,
    /// The number of failed attempts of each kind.
    pub(crate) kinds: BTreeMap<String, u64>,
    /// The number of failed attempts that were charged to the limits, because they were sent or may have been.
    pub(crate) requests_in_vain: u64,
    /// The tokens that were charged for these attempts.
    pub(crate) tokens_in_vain: u64,
    /// The number of requests that have failed and wait to be tried again.
    pub(crate) waiting_to_retry: usize,
    pub(crate) last_failure: Option<String>,
    /// The last failure whose response asks to wait: `429 Too Many Requests, Retry-After 75`.
    pub(crate) last_delay: Option<String>,
}

// === impl AttemptsLayer ===

impl AttemptsLayer {
    /// Counts in `attempts`, and takes an attempt to be charged what `charges` say.
    pub(crate) const fn new(attempts: Arc<Attempts>, charges: Charges) -> Self {
        Self { attempts, charges }
    }
}

impl<S> Layer<S> for AttemptsLayer {
    type Service = CountAttempts<S>;

    fn layer(&self, inner: S) -> Self::Service {
        CountAttempts {
            inner,
            layer: self.clone(),
        }
    }
}

// === impl CountAttempts ===

impl<S> Service<Request<Bytes>> for CountAttempts<S>
where
    S: Service<Request<Bytes>, Response = Response<Bytes>, Error = BoxError>,
    S::Future: Send + 'static,
{
    type Response = Response<Bytes>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Response<Bytes>, BoxError>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Bytes>) -> Self::Future {
        let tokens = self.layer.charges.cost(&request).tokens;
        let id = event::current().map(|event| event.request_id());
        let attempts = self.layer.attempts.clone();
        if let Some(id) = &id {
            attempts.lock().failed.remove(id);
        }
        let attempt = self.inner.call(request);
        attempt
            .inspect(move |result| attempts.ended(id, tokens, result))
            .boxed()
    }
}

// === impl Attempts ===

impl Attempts {
    /// Starts at zero. Failures are kept without `secrets`.
    pub(crate) fn new(secrets: Secrets) -> Self {
        Self {
            secrets,
            ..Self::default()
        }
    }

    pub(crate) fn counts(&self) -> AttemptCounts {
        let state = self.lock();
        AttemptCounts {
            waiting_to_retry: state.failed.len(),
            ..state.counts.clone()
        }
    }

    /// Records that a request has ended, so that it will not be tried again.
    pub(crate) fn request_ended(&self, id: &RequestId) {
        self.lock().failed.remove(id);
    }

    fn ended(&self, id: Option<RequestId>, tokens: u64, result: &Result<Response<Bytes>, BoxError>) {
        let (kind, body) = match result {
            Ok(response) if response.status().is_success() => return,
            Ok(response) => {
                let body = excerpt(response.body(), MAX_TEXT, &self.secrets);
                (response.status().to_string(), body)
            }
            Err(error) => (clean(&self.secrets.hide(&chain(error)), MAX_TEXT), None),
        };
        let mut state = self.lock();
        let State { counts, failed } = &mut *state;
        failed.extend(id);
        if !result.as_ref().is_err_and(never_sent) {
            counts.requests_in_vain += 1;
            counts.tokens_in_vain = counts.tokens_in_vain.saturating_add(tokens);
        }
        if let Ok(response) = result {
            counts.status_429 += u64::from(response.status() == StatusCode::TOO_MANY_REQUESTS);
            if let Some(delay) = response
                .headers()
                .get(RETRY_AFTER)
                .and_then(|delay| delay.to_str().ok())
            {
                counts.last_delay = Some(format!("{kind}, Retry-After {}", clean(delay, 40)));
            }
        }
        let text = body.map_or_else(|| kind.clone(), |body| format!("{kind}: {body}"));
        let has_room = counts.kinds.len() < MAX_KINDS;
        match counts.kinds.get_mut(&kind) {
            Some(count) => *count += 1,
            None if has_room => {
                counts.kinds.insert(kind, 1);
            }
            None => *counts.kinds.entry("others".to_owned()).or_default() += 1,
        }
        counts.last_failure = Some(text);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns the beginning of a body for people to read: on one line, without secrets (those of the run, and what looks
/// like one), and at most `max` characters. `None` for an empty body.
pub(crate) fn excerpt(body: &[u8], max: usize, secrets: &Secrets) -> Option<String> {
    let text = match std::str::from_utf8(body) {
        Ok(text) => text,
        // The body is cut in the middle of a character.
        Err(error) if error.error_len().is_none() => std::str::from_utf8(&body[..error.valid_up_to()]).ok()?,
        Err(_) => return Some(format!("({} bytes that are no text)", body.len())),
    };
    let text = clean(&secrets.hide(beginning(text, max)), max);
    (!text.is_empty()).then_some(text)
}

/// Removes secrets, puts a space in place of each run of spaces and control characters, which could change what a
/// terminal shows, and cuts the text after `max` characters.
pub(crate) fn clean(text: &str, max: usize) -> String {
    let redacted = event::redact_text(beginning(text, max));
    let words = redacted.split(|letter: char| letter.is_whitespace() || letter.is_control());
    let mut clean = String::new();
    for word in words.filter(|word| !word.is_empty()) {
        let separator = if clean.is_empty() { "" } else { " " };
        let _ = write!(clean, "{separator}{word}");
    }
    match clean.char_indices().nth(max) {
        Some((end, _)) => format!("{}…", &clean[..end]),
        None => clean,
    }
}

/// Returns the beginning of a text, from which `max` characters are shown. A secret that is cut in two could not be
/// recognized, so secrets are removed before the text is cut to `max`; a long text is cut roughly before, because removing
/// secrets takes time.
fn beginning(text: &str, max: usize) -> &str {
    text.char_indices().nth(8 * max).map_or(text, |(end, _)| &text[..end])
}

/// The messages of an error and of its sources. A message that repeats that of its source is left out.
fn chain(error: &BoxError) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let message = cause.to_string();
        if !text.contains(&message) {
            let _ = write!(text, ": {message}");
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Args;
    use clap::Parser;
    use tower::{ServiceBuilder, ServiceExt, service_fn};
    use tower_outbound::{ApiTokens, Limits, RateLimiter};

    fn charges() -> Charges {
        let limiter = RateLimiter::new(Limits::new()).unwrap();
        Charges::new(limiter, &Args::parse_from(["bulk"]).limits).unwrap()
    }

    fn response(status: u16, body: &'static str) -> Response<Bytes> {
        let mut response = Response::new(Bytes::from(body));
        *response.status_mut() = StatusCode::from_u16(status).unwrap();
        response
    }

    async fn send(attempts: &Arc<Attempts>, result: Result<Response<Bytes>, BoxError>) {
        let mut result = Some(result);
        let client = service_fn(move |_: Request<Bytes>| std::future::ready(result.take().unwrap()));
        let service = ServiceBuilder::new()
            .layer(AttemptsLayer::new(attempts.clone(), charges()))
            .service(client);
        let mut request = Request::new(Bytes::new());
        request.extensions_mut().insert(ApiTokens(50));
        let _ = service.oneshot(request).await;
    }

    #[tokio::test]
    async fn a_failed_attempt_is_in_vain_unless_it_was_never_sent() {
        let attempts = Arc::<Attempts>::default();
        send(&attempts, Ok(response(200, "{}"))).await;
        send(&attempts, Ok(response(503, "busy"))).await;
        send(&attempts, Ok(response(429, ""))).await;
        send(&attempts, Err("reset".into())).await;
        let refused = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
        send(&attempts, Err(refused.into())).await;
        let counts = attempts.counts();
        assert_eq!(
            (counts.requests_in_vain, counts.tokens_in_vain, counts.status_429),
            (3, 150, 1)
        );
        assert_eq!(counts.kinds.len(), 4);
    }

    #[tokio::test]
    async fn the_last_failure_is_shown_with_its_body() {
        let attempts = Arc::<Attempts>::default();
        for body in ["busy", "still busy"] {
            send(&attempts, Ok(response(503, body))).await;
        }
        assert_eq!(
            attempts.counts().last_failure.unwrap(),
            "503 Service Unavailable: still busy"
        );
        assert_eq!(attempts.counts().kinds["503 Service Unavailable"], 2);
    }

    #[tokio::test]
    async fn a_response_that_asks_to_wait_is_remembered_with_its_delay() {
        let attempts = Arc::<Attempts>::default();
        let mut throttled = response(429, "");
        throttled.headers_mut().insert(RETRY_AFTER, "75".parse().unwrap());
        send(&attempts, Ok(throttled)).await;
        let delay = attempts.counts().last_delay.unwrap();
        assert_eq!(delay, "429 Too Many Requests, Retry-After 75");
    }

    #[test]
    fn an_excerpt_is_one_line_without_secrets_or_control_characters() {
        let none = Secrets::default();
        let body = "{\"error\": \"no\",\n\t\"api_key\": \"sk-12345678\"}\u{1b}[2J";
        assert_eq!(
            excerpt(body.as_bytes(), 500, &none).unwrap(),
            "{\"error\": \"no\", \"api_key\": \"[redacted]\"} [2J"
        );
        assert_eq!(excerpt("äöü".as_bytes(), 2, &none).unwrap(), "äö…");
        assert_eq!(excerpt(b"\xff\xfe", 10, &none).unwrap(), "(2 bytes that are no text)");
        assert_eq!(excerpt(b" \n", 10, &none), None);
    }
}
