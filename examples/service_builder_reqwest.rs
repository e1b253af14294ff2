//! Uses the layers without the executor, around reqwest, together with layers of Tower and tower-http.
//!
//! What to watch: every fourth response is a 503. Its call is retried, and each attempt is charged to the rate limit.
//! The server receives the keys in both headers, but no event shows them: one header is set by a layer below the event
//! layers, and the other is redacted.
//!
//! `cargo run --features reqwest --example service_builder_reqwest`

mod support;

use anyhow::Error;
use http::{HeaderValue, Request, header::AUTHORIZATION};
use http_body_util::BodyExt;
use std::time::Duration;
use tower::{Service, ServiceBuilder, ServiceExt};
use tower_http::{
    set_header::SetRequestHeaderLayer,
    trace::{DefaultOnResponse, TraceLayer},
};
use tower_outbound::{
    ConcurrencyLimitLayer, EventLayer, Limits, QueueLayer, Rate, RateLimitLayer, RateLimiter, RequestId,
    client::Reqwest, event::Events,
};
use tracing::{Level, Span};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt()
        .compact()
        .without_time()
        .with_ansi(false)
        .init();
    let url = support::server(Some(4)).await?;
    let limiter = RateLimiter::new(Limits::new().requests(Rate::per_second(20).burst(2)))?;
    let events = Events::new();

    let mut service = ServiceBuilder::new()
        // Opens the event of each call.
        .layer(EventLayer::queued().report_to(&events))
        // From this layer inwards, worker tasks make the calls.
        .layer(QueueLayer::new(100)?)
        // Writes the outcome of the call to its event.
        .layer(EventLayer::processing())
        // The timeout includes the time in which the call waits for the limits. A timeout layer below the limits would
        // cover each attempt only.
        .timeout(Duration::from_secs(5))
        // The retry layer is outside the limits, so that every attempt takes its own permit and is charged to the rate
        // limit.
        .retry(support::RetryOn503(2))
        .layer(ConcurrencyLimitLayer::new(4)?)
        // The rate limit is the innermost of the limits, so that the budget is charged immediately before the request
        // is sent.
        .layer(RateLimitLayer::new(limiter))
        // Records each attempt in the event.
        .layer(EventLayer::calling())
        // Traces a line for each response, in the span of its call. The span that tower-http makes by default would
        // show the URL without redaction.
        .layer(
            TraceLayer::new_for_http()
                .make_span_with(|_: &Request<String>| Span::current())
                .on_response(DefaultOnResponse::new().level(Level::INFO)),
        )
        // The innermost layer adds a header that is sent, but not recorded.
        .layer(SetRequestHeaderLayer::overriding(
            AUTHORIZATION,
            HeaderValue::from_static("Bearer secret"),
        ))
        .service(Reqwest::default());

    let mut calls = Vec::new();
    for number in 0..8 {
        let request = Request::get(&url)
            .extension(RequestId::from(format!("call-{number}")))
            .header("x-api-key", "secret too")
            .body(String::new())?;
        calls.push(service.ready().await.map_err(Error::from_boxed)?.call(request));
    }
    let mut attempts = 0;
    for call in calls {
        let event = call.event().clone();
        let response = call.await.map_err(Error::from_boxed)?;
        let answer: serde_json::Value = serde_json::from_slice(&response.into_body().collect().await?.to_bytes())?;
        let event = event.snapshot();
        let codes: Vec<_> = event
            .attempts
            .iter()
            .filter_map(|attempt| attempt.status_code)
            .collect();
        let waited = event.time_waiting().unwrap_or_default();
        println!(
            "{}: {codes:?}, waited {waited:.0?}, sent {} keys, recorded {:?}",
            event.request_id, answer["keys"], event.headers
        );
        anyhow::ensure!(answer["keys"] == 2, "the server got {answer}");
        anyhow::ensure!(event.response_status_code == Some(200), "{event:?}");
        anyhow::ensure!(!format!("{event:?}").contains("secret"), "a key is in {event:?}");
        attempts += codes.len();
    }
    println!("{:?}, {attempts} attempts", events.totals());
    anyhow::ensure!(attempts == 10, "two of the eight calls are made twice");
    Ok(())
}
