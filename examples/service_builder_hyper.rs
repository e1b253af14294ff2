//! The layers one by one around hyper's client, with tracing.
//!
//! Watch: twenty a second, five of them at once in the beginning; and every line of the client's own trace is in the
//! span `outbound_call` of its call, although a worker makes it.
//!
//! `cargo run --example service_builder_hyper`

mod support;

use http::Request;
use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tower::{BoxError, Service, ServiceBuilder, ServiceExt};
use tower_http::trace::TraceLayer;
use tower_outbound::{
    ApiTokens, ConcurrencyLimitLayer, EventLayer, Limits, QueueLayer, Rate, RateLimitLayer, RateLimiter,
};
use tracing::Level;
use tracing_subscriber::{filter::Targets, fmt, layer::SubscriberExt, util::SubscriberInitExt};

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let only = Targets::new()
        .with_target("tower_outbound", Level::INFO)
        .with_target("tower_http", Level::DEBUG);
    tracing_subscriber::registry()
        .with(fmt::layer().compact().without_time())
        .with(only)
        .init();
    let url = support::server(None).await?;
    let limits = Limits::new()
        .requests(Rate::per_second(20).burst(5))
        .tokens(Rate::per_minute(60_000));
    let limiter = RateLimiter::new(limits)?;

    let client = Client::builder(TokioExecutor::new()).build_http::<Full<Bytes>>();
    let mut service = ServiceBuilder::new()
        // Opens the event and its span.
        .layer(EventLayer::queued())
        // From here on, workers drive the calls.
        .layer(QueueLayer::new(100)?)
        // Writes the outcome.
        .layer(EventLayer::processing())
        .layer(ConcurrencyLimitLayer::new(10)?)
        // Requests and tokens, both or neither.
        .layer(RateLimitLayer::new(limiter.clone()))
        // Records the attempt.
        .layer(EventLayer::calling())
        // Traces what goes to the wire.
        .layer(TraceLayer::new_for_http())
        .service(client);

    let mut calls = Vec::new();
    for _ in 0..9 {
        let request = Request::post(&url).extension(ApiTokens(100)).body(Full::from("{}"))?;
        calls.push(service.ready().await?.call(request));
    }
    let events: Vec<_> = calls.iter().map(|call| call.event().clone()).collect();
    let mut waits = Vec::new();
    for (call, event) in calls.into_iter().zip(events) {
        let body = call.await?.into_body().collect().await?.to_bytes();
        let event = event.snapshot();
        let waited = event.time_waiting().unwrap_or_default();
        println!(
            "waited {waited:>12.3?}, called {:>12.3?}: {body:?}",
            event.time_calling().unwrap_or_default()
        );
        waits.push(waited.as_millis());
    }
    println!("left: {:?}", limiter.available());
    // Five at once, and then one every 50 ms.
    assert!(waits[4] < 40 && waits[5] >= 45 && waits[8] >= 195, "{waits:?}");
    Ok(())
}
