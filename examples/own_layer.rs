//! Shows the two places where an executor takes a user's own layer. `src/executor/stack.rs` explains what each place is
//! for.
//!
//! What to watch: the same counting layer is used twice. The copy around the limits and the retry sees each of the six
//! calls once. The copy around the client sees each of the eight attempts, because every third response is a 503 that
//! is retried.
//!
//! `cargo run --example own_layer`

mod support;

use http::Request;
use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};
use tower::{Layer, Service, retry::RetryLayer};
use tower_outbound::Executor;

/// Counts the requests that pass through the layer. Clones share the count.
#[derive(Clone, Default)]
struct CountLayer(Arc<AtomicUsize>);

#[derive(Clone)]
struct Count<S> {
    inner: S,
    seen: Arc<AtomicUsize>,
}

impl<S> Layer<S> for CountLayer {
    type Service = Count<S>;

    fn layer(&self, inner: S) -> Count<S> {
        Count {
            inner,
            seen: self.0.clone(),
        }
    }
}

impl<S: Service<Req>, Req> Service<Req> for Count<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Req) -> S::Future {
        self.seen.fetch_add(1, Ordering::Relaxed);
        self.inner.call(request)
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let url = support::server(Some(3)).await?;
    let (calls, attempts) = (CountLayer::default(), CountLayer::default());

    let executor = Executor::builder()
        // These two layers are around the limits. The layer that is added last is the outermost.
        .layer(RetryLayer::new(support::RetryOn503(2)))
        .layer(calls.clone())
        // This layer is around the client, inside the limits.
        .build(attempts.layer(support::http_client()))?;

    let events = executor
        .run(async move |executor| {
            let mut events = Vec::new();
            for _ in 0..6 {
                let call = executor.submit(Request::get(&url).body(String::new())?).await?;
                events.push(call.event().clone());
            }
            anyhow::Ok(events)
        })
        .await??;

    // `run` has stopped the executor gracefully, so every call has ended.
    for (number, event) in events.iter().enumerate() {
        let event = event.snapshot();
        let codes: Vec<_> = event
            .attempts
            .iter()
            .filter_map(|attempt| attempt.status_code)
            .collect();
        println!("call {number}: {} {codes:?}", event.status);
        anyhow::ensure!(event.response_status_code == Some(200), "{event:?}");
    }
    let seen = (calls.0.load(Ordering::Relaxed), attempts.0.load(Ordering::Relaxed));
    println!("seen around the limits: {}, around the client: {}", seen.0, seen.1);
    anyhow::ensure!(seen == (6, 8), "six calls, two of them made twice: {seen:?}");
    Ok(())
}
