//! The layers one by one around reqwest, among Tower's and tower-http's own.
//!
//! Watch: every fourth answer is a 503; the call is made again, and each attempt pays its own rate. The server gets the
//! keys of both headers, and the record has neither: one was set below it, the other is redacted.
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
        // Opens the event.
        .layer(EventLayer::queued().report_to(&events))
        // From here on, workers drive the calls.
        .layer(QueueLayer::new(100)?)
        // Writes the outcome.
        .layer(EventLayer::processing())
        // Counts the waiting for limits, too. Below them it would count the call alone.
        .timeout(Duration::from_secs(5))
        // Outside the limits: every attempt takes its own permit and pays its own rate.
        .retry(support::Again(2))
        .layer(ConcurrencyLimitLayer::new(4)?)
        // Last of the limits: the budget is taken next to the wire.
        .layer(RateLimitLayer::new(limiter))
        // Records each attempt.
        .layer(EventLayer::calling())
        // A line for what comes back, in the call's own span: the one of tower-http would tell the URL as it is.
        .layer(
            TraceLayer::new_for_http()
                .make_span_with(|_: &Request<String>| Span::current())
                .on_response(DefaultOnResponse::new().level(Level::INFO)),
        )
        // Inside everything: what it adds is sent, and never recorded.
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
    anyhow::ensure!(attempts == 10, "two calls of eight are made twice");
    Ok(())
}
