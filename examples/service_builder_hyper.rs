//! Uses the layers without the executor, around hyper's client, with tracing.
//!
//! What to watch: five calls are sent at once (the burst), and then one every 50 ms. Every line that is traced around
//! the client is in the span `outbound_call` of its call, although a worker task makes the call. When the span closes,
//! its fields have the outcome of the call.
//!
//! `cargo run --example service_builder_hyper`

mod support;

use http::Request;
use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use std::time::{Duration, SystemTime};
use tower::{BoxError, Service, ServiceBuilder, ServiceExt};
use tower_http::trace::{DefaultOnResponse, TraceLayer};
use tower_outbound::{
    ApiTokens, ConcurrencyLimitLayer, EventLayer, Limits, QueueLayer, Rate, RateLimitLayer, RateLimiter, RequestId,
};
use tracing::{Level, Span};
use tracing_subscriber::fmt::format::FmtSpan;

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    tracing_subscriber::fmt()
        .compact()
        .without_time()
        .with_ansi(false)
        .with_span_events(FmtSpan::CLOSE)
        .init();
    let url = support::server(None).await?;
    let limits = Limits::new()
        .requests(Rate::per_second(20).burst(5))
        .tokens(Rate::per_minute(60_000));
    let limiter = RateLimiter::new(limits)?;

    let client = Client::builder(TokioExecutor::new()).build_http::<Full<Bytes>>();
    let mut service = ServiceBuilder::new()
        // Opens the event of each call, and its span.
        .layer(EventLayer::queued())
        // From this layer inwards, worker tasks make the calls.
        .layer(QueueLayer::new(100)?)
        // Writes the outcome of the call to its event.
        .layer(EventLayer::processing())
        .layer(ConcurrencyLimitLayer::new(10)?)
        // Charges both requests and tokens, or neither.
        .layer(RateLimitLayer::new(limiter.clone()))
        // Records each attempt in the event.
        .layer(EventLayer::calling())
        // Traces a line for each response, in the span of its call.
        .layer(
            TraceLayer::new_for_http()
                .make_span_with(|_: &Request<Full<Bytes>>| Span::current())
                .on_response(DefaultOnResponse::new().level(Level::INFO)),
        )
        .service(client);

    let mut calls = Vec::new();
    for number in 0..9 {
        let request = Request::post(&url)
            .extension(RequestId::from(format!("call-{number}")))
            .extension(ApiTokens(100))
            .body(Full::from("{}"))?;
        calls.push(service.ready().await?.call(request));
    }
    let mut begun = None;
    let mut sent = Vec::new();
    for call in calls {
        let event = call.event().clone();
        let body = call.await?.into_body().collect().await?.to_bytes();
        let event = event.snapshot();
        let begun = *begun.get_or_insert(event.created_at);
        let since = |at: Option<SystemTime>| at.and_then(|at| at.duration_since(begun).ok()).unwrap_or_default();
        let (called, ended) = (since(event.call_started_at), since(event.completed_at));
        println!(
            "{}: called after {called:.0?}, ended after {ended:.0?}: {body:?}",
            event.request_id
        );
        sent.push(called);
    }
    println!("budgets left: {:?}", limiter.available());
    // The burst of five calls is sent at once, and then one call every 50 ms. A call may be up to 5 ms early, because
    // the limiter makes up for a late timer by that much.
    for (number, called) in sent.iter().enumerate().skip(5) {
        let earliest = Duration::from_millis(50 * (number as u64 - 4) - 5);
        assert!(*called >= earliest, "call {number} is too early: {sent:?}");
    }
    assert!(sent[4] < sent[5], "the burst is sent first: {sent:?}");
    Ok(())
}
