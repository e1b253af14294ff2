//! The layers one by one around reqwest, among Tower's and tower-http's own.
//!
//! Watch: every fourth answer is a 503; the call is made again, and each attempt pays its own rate. The key is sent,
//! and is nowhere in the record.
//!
//! `cargo run --example service_builder_reqwest`

mod support;

use http::{HeaderValue, Request, Response, header::AUTHORIZATION};
use std::{future, time::Duration};
use tower::{BoxError, Service, ServiceBuilder, ServiceExt, retry::Policy};
use tower_http::set_header::SetRequestHeaderLayer;
use tower_outbound::{
    ConcurrencyLimitLayer, EventLayer, Limits, QueueLayer, Rate, RateLimitLayer, RateLimiter, event::Events,
};

/// Once more after a 503, at most so many times.
#[derive(Clone)]
struct Again(u32);

impl<R> Policy<Request<String>, Response<R>, BoxError> for Again {
    type Future = future::Ready<()>;

    fn retry(&mut self, _: &mut Request<String>, result: &mut Result<Response<R>, BoxError>) -> Option<Self::Future> {
        let again = self.0 > 0 && result.as_ref().is_ok_and(|response| response.status() == 503);
        self.0 = self.0.saturating_sub(1);
        again.then(|| future::ready(()))
    }

    fn clone_request(&mut self, request: &Request<String>) -> Option<Request<String>> {
        Some(request.clone())
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
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
        .retry(Again(2))
        .layer(ConcurrencyLimitLayer::new(4)?)
        // Last of all, next to the wire.
        .layer(RateLimitLayer::new(limiter))
        // Records each attempt.
        .layer(EventLayer::calling())
        // Inside everything: what it adds is sent, and never recorded.
        .layer(SetRequestHeaderLayer::overriding(
            AUTHORIZATION,
            HeaderValue::from_static("Bearer secret"),
        ))
        .service(support::reqwest_client());

    let mut calls = Vec::new();
    for _ in 0..8 {
        let request = Request::get(&url).body(String::new())?;
        calls.push(service.ready().await.map_err(anyhow::Error::from_boxed)?.call(request));
    }
    for (number, call) in calls.into_iter().enumerate() {
        let event = call.event().clone();
        let status = call.await.map_err(anyhow::Error::from_boxed)?.status();
        let event = event.finished().await;
        let codes: Vec<_> = event
            .attempts
            .iter()
            .filter_map(|attempt| attempt.status_code)
            .collect();
        println!(
            "call {number}: {status} after {codes:?}, waited {:?}",
            event.time_waiting().unwrap_or_default()
        );
        anyhow::ensure!(status == 200 && !format!("{event:?}").contains("secret"), "{event:?}");
    }
    println!("{:?}", events.totals());
    Ok(())
}
