//! A layer of your own, in the two places an executor has for it: see `src/executor/stack.rs`.
//!
//! Watch: around the limits, the layer sees a call once, however often it goes to the wire; around the client, it sees
//! every attempt.
//!
//! `cargo run --example own_layer`

mod support;

use http::{Request, Response};
use std::{
    future,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};
use tower::{BoxError, Layer, Service, ServiceBuilder, retry::Policy, retry::RetryLayer};
use tower_outbound::{Executor, Shutdown};

/// Counts what passes.
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

/// Again, until it is no 503.
#[derive(Clone)]
struct Again;

impl<R> Policy<Request<String>, Response<R>, BoxError> for Again {
    type Future = future::Ready<()>;

    fn retry(&mut self, _: &mut Request<String>, result: &mut Result<Response<R>, BoxError>) -> Option<Self::Future> {
        result
            .as_ref()
            .is_ok_and(|response| response.status() == 503)
            .then(|| future::ready(()))
    }

    fn clone_request(&mut self, request: &Request<String>) -> Option<Request<String>> {
        Some(request.clone())
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let url = support::server(Some(3)).await?;
    let (calls, attempts) = (CountLayer::default(), CountLayer::default());

    let executor = Executor::builder()
        // Around the limits; the last one is the outermost.
        .layer(RetryLayer::new(Again))
        .layer(calls.clone())
        // Around the client, inside the limits.
        .build(
            ServiceBuilder::new()
                .layer(attempts.clone())
                .service(support::reqwest_client()),
        )?;
    executor.start()?;
    for _ in 0..6 {
        drop(executor.submit(Request::get(&url).body(String::new())?).await?);
    }
    let report = executor.stop(Shutdown::Graceful).await;

    let (calls, attempts) = (calls.0.load(Ordering::Relaxed), attempts.0.load(Ordering::Relaxed));
    println!("{calls} calls, {attempts} attempts, {report:?}");
    anyhow::ensure!(
        calls == 6 && attempts == 8 && report.completed == 6,
        "every third attempt is a 503"
    );
    Ok(())
}
