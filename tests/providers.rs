//! Tests with responses that a real server on loopback streams, and with callers that read, drop or cancel them.

use axum::{
    Router,
    body::{Body, Bytes},
    response::Response,
    routing::post,
};
use futures_util::stream;
use http::Request;
use http_body_util::BodyExt;
use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::time::{sleep, timeout};
use tower::Layer;
use tower_outbound::{
    Call, Executor, Limits, Rate, RateLimiter, RequestStatus, Shutdown,
    body::StreamBody,
    client::Reqwest,
    provider::{MeteredBody, UsageLayer},
    rate::ByUsage,
};

const HANG: Duration = Duration::from_secs(30);

/// Counts the response streams of the test server: those open now, the most open at once, and all since the start.
#[derive(Default)]
struct Streams {
    open: AtomicUsize,
    max_open: AtomicUsize,
    total: AtomicUsize,
}

/// A guard that counts one open stream of the test server. The response body owns the guard, so the stream counts as
/// open until the server drops the body.
struct Open(Arc<Streams>);

impl Open {
    fn new(streams: &Arc<Streams>) -> Self {
        let open = streams.open.fetch_add(1, Ordering::SeqCst) + 1;
        streams.max_open.fetch_max(open, Ordering::SeqCst);
        streams.total.fetch_add(1, Ordering::SeqCst);
        Self(streams.clone())
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Starts a server that responds with `words` server-sent events, 5 ms apart, and then an event that reports a usage of
/// 40 tokens. Returns the URL of the server.
async fn server(streams: Arc<Streams>, words: usize) -> String {
    let answer = move || {
        let open = Open::new(&streams);
        async move {
            let events = stream::unfold((0, open), move |(sent, open)| async move {
                let event = match sent {
                    sent if sent < words => {
                        sleep(Duration::from_millis(5)).await;
                        "data: {\"choices\":[{\"delta\":{\"content\":\"word \"}}]}\n\n"
                    }
                    sent if sent == words => {
                        "data: {\"choices\":[],\"usage\":{\"total_tokens\":40}}\n\ndata: [DONE]\n\n"
                    }
                    _ => return None,
                };
                Some((
                    Ok::<_, Infallible>(Bytes::from_static(event.as_bytes())),
                    (sent + 1, open),
                ))
            });
            Response::builder()
                .header("content-type", "text/event-stream")
                .body(Body::from_stream(events))
                .unwrap()
        }
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, Router::new().route("/", post(answer))).await });
    format!("http://{address}/")
}

/// Starts an executor with a concurrency limit of five, and with daily rates so high that no call of a test waits for
/// them.
fn executor() -> (Executor<String, StreamBody<MeteredBody<reqwest::Body>>>, RateLimiter) {
    let limiter = RateLimiter::new(
        Limits::new()
            .requests(Rate::per_day(1_000))
            .tokens(Rate::per_day(100_000)),
    )
    .unwrap();
    let executor = Executor::builder()
        .concurrency_limit(5)
        .limiter(limiter.clone())
        .settle(ByUsage::default())
        .build_streaming(UsageLayer::new().layer(Reqwest::new(reqwest::Client::new())))
        .unwrap();
    executor.start().unwrap();
    (executor, limiter)
}

fn call(url: &str) -> Call<String> {
    Call::from(Request::post(url).body(String::from("{}")).unwrap()).tokens(100)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_streams_under_a_limit_of_five_never_exceed_it_and_are_all_settled() {
    let streams = Arc::<Streams>::default();
    let url = server(streams.clone(), 6).await;
    let (executor, limiter) = executor();
    let mut readers = Vec::new();
    for _ in 0..50 {
        let call = executor.submit(call(&url)).await.unwrap();
        readers.push(tokio::spawn(async move {
            let event = call.event().clone();
            let body = call.await.unwrap().into_body().collect().await.unwrap().to_bytes();
            (body.len(), event.finished().await)
        }));
    }
    for reader in readers {
        let (length, event) = timeout(HANG, reader).await.unwrap().unwrap();
        assert_eq!(
            (event.status, event.response_bytes),
            (RequestStatus::Completed, Some(length as u64))
        );
        assert_eq!(event.api_tokens_used, Some(40));
        assert!(event.time_to_first_byte() < event.time_to_last_byte());
    }
    assert_eq!(streams.total.load(Ordering::SeqCst), 50);
    assert_eq!(streams.max_open.load(Ordering::SeqCst), 5);
    assert_eq!(executor.monitor().in_flight(), 0);
    // The 50 calls have used 50 requests and 50 x 40 tokens. The upper bounds allow for what the buckets refill during
    // the test.
    let left = limiter.available();
    assert!((950..=951).contains(&left.requests.unwrap()), "{left:?}");
    assert!((98_000..=98_020).contains(&left.tokens.unwrap()), "{left:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_that_are_dropped_or_cancelled_halfway_leak_nothing() {
    let streams = Arc::<Streams>::default();
    let url = server(streams.clone(), 200).await;
    let (executor, limiter) = executor();
    let mut readers = Vec::new();
    for number in 0..50 {
        let call = executor.submit(call(&url)).await.unwrap();
        readers.push(tokio::spawn(async move {
            let event = call.event().clone();
            match number % 4 {
                // The caller drops the response before it reads the body.
                0 => drop(call.await),
                // The caller drops the body after three frames.
                1 => {
                    let mut body = call.await.unwrap().into_body();
                    for _ in 0..3 {
                        body.frame().await.unwrap().unwrap();
                    }
                }
                // The task that reads the body is aborted.
                2 => {
                    let reading = tokio::spawn(async move { call.await.unwrap().into_body().collect().await });
                    while event.snapshot().attempts.is_empty() {
                        sleep(Duration::from_millis(1)).await;
                    }
                    sleep(Duration::from_millis(10)).await;
                    reading.abort();
                    assert!(reading.await.unwrap_err().is_cancelled());
                }
                // The caller cancels the call through its handle while it reads the body.
                _ => {
                    let mut call = call;
                    let mut body = (&mut call).await.unwrap().into_body();
                    body.frame().await.unwrap().unwrap();
                    call.cancel();
                    while let Some(frame) = body.frame().await {
                        let Err(error) = frame else { continue };
                        assert!(error.is::<tower_outbound::error::Cancelled>());
                    }
                }
            }
            event.finished().await
        }));
    }
    let mut sent = 0;
    for reader in readers {
        let event = timeout(HANG, reader).await.unwrap().unwrap();
        assert!(
            [RequestStatus::Cancelled, RequestStatus::Completed].contains(&event.status),
            "{event:?}"
        );
        sent += event.attempts.len();
    }
    let monitor = executor.monitor();
    let report = timeout(HANG, executor.stop(Shutdown::Graceful)).await.unwrap();
    assert_eq!(
        (
            report.left,
            monitor.in_flight(),
            monitor.queue_depth(),
            monitor.totals().open()
        ),
        (0, 0, 0, 0)
    );
    let left = limiter.available();
    let sent = sent as u64;
    assert!(
        (1_000 - sent..=1_001 - sent).contains(&left.requests.unwrap()),
        "{left:?} {sent}"
    );
    // A stream that ends halfway reports no usage, so each call that was sent stays charged with its estimate of 100
    // tokens.
    assert!(
        (100_000 - 100 * sent..=100_020 - 100 * sent).contains(&left.tokens.unwrap()),
        "{left:?} {sent}"
    );
    timeout(HANG, async {
        while streams.open.load(Ordering::SeqCst) > 0 {
            sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .expect("the server sees every connection or stream end");
}
