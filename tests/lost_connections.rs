//! Tests of retries over real connections: servers on raw sockets that break off where the test says, and an HTTP/2
//! server, each reached through reqwest and through hyper-util's client.
//!
//! These tests run in real time, since sockets do not know of a paused clock. Each takes a few seconds at most.

use bytes::Bytes;
use http::{Method, Request, Response};
use http_body_util::Full;
use hyper_util::{client::legacy, rt::TokioExecutor};
use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::{sleep, timeout},
};
use tower::{BoxError, Layer, ServiceExt, retry::RetryLayer, timeout::TimeoutLayer, util::BoxCloneSyncService};
use tower_outbound::{
    Executor, Limits,
    body::CollectLayer,
    client::Reqwest,
    error::BodyFailed,
    retry::{RetryPolicy, never_sent},
};

/// How long a client waits for a server that has gone silent. Servers that answer do so much sooner.
const PATIENCE: Duration = Duration::from_millis(400);
const HANG: Duration = Duration::from_secs(30);

type Client = BoxCloneSyncService<Request<String>, Response<Bytes>, BoxError>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Protocol {
    Http1,
    Http2,
}

fn through_reqwest(protocol: Protocol) -> Client {
    let builder = reqwest::Client::builder().no_proxy().read_timeout(PATIENCE);
    let client = match protocol {
        Protocol::Http1 => builder,
        // reqwest itself repeats requests that the server has refused to process. This is switched off, so that the
        // policy sees the errors.
        Protocol::Http2 => builder.http2_prior_knowledge().retry(reqwest::retry::never()),
    };
    let client = CollectLayer::new(10_000).layer(Reqwest::new(client.build().unwrap()));
    BoxCloneSyncService::new(client)
}

fn through_hyper_util(protocol: Protocol) -> Client {
    let client: legacy::Client<_, Full<Bytes>> = legacy::Client::builder(TokioExecutor::new())
        .http2_only(protocol == Protocol::Http2)
        .build_http();
    let client = CollectLayer::new(10_000).layer(client);
    let client = client.map_request(|request: Request<String>| request.map(|body| Full::from(Bytes::from(body))));
    BoxCloneSyncService::new(TimeoutLayer::new(PATIENCE).layer(client))
}

fn clients(protocol: Protocol) -> [(&'static str, Client); 2] {
    [
        ("reqwest", through_reqwest(protocol)),
        ("hyper-util", through_hyper_util(protocol)),
    ]
}

fn request(method: Method, address: SocketAddr) -> Request<String> {
    let request = Request::builder().method(method).uri(format!("http://{address}/"));
    request.body("prompt".into()).unwrap()
}

fn policy() -> RetryPolicy {
    RetryPolicy::new()
        .backoff(Duration::ZERO, Duration::ZERO)
        .max_retries(2)
}

/// Sends one request with the method POST through `policy`, and returns the status and the body of the response, or the
/// error.
async fn post(policy: RetryPolicy, client: Client, address: SocketAddr) -> Result<(u16, Bytes), BoxError> {
    let service = RetryLayer::new(policy).layer(client);
    let response = timeout(HANG, service.oneshot(request(Method::POST, address)));
    let response = response.await.expect("the call ends")?;
    Ok((response.status().as_u16(), response.into_body()))
}

/// What the raw server does with a connection once it has read the request.
#[derive(Clone, Copy, Debug)]
enum Break {
    /// Writes the text and closes the connection.
    Closes(&'static str),
    /// Writes the text and resets the connection.
    Resets(&'static str),
    /// Writes the text and neither writes more nor closes the connection.
    Stalls(&'static str),
}

const HEAD: &str = "HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n";
const CHUNKED: &str = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";

const BREAKS: [Break; 15] = [
    Break::Closes(""),
    Break::Closes("HTTP/1.1 200 OK\r\ncontent-le"),
    Break::Closes(HEAD),
    Break::Closes("HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nthe beginning"),
    Break::Closes(CHUNKED),
    Break::Closes("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n"),
    Break::Resets(""),
    Break::Resets("HTTP/1.1 200 OK\r\ncontent-le"),
    Break::Resets(HEAD),
    Break::Resets("HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nthe beginning"),
    Break::Stalls(""),
    Break::Stalls(HEAD),
    Break::Stalls("HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nthe beginning"),
    // The head of a failure is retried, whatever becomes of its body.
    Break::Closes("HTTP/1.1 503 Busy\r\ncontent-length: 100\r\n\r\nthe beginning"),
    Break::Resets("HTTP/1.1 503 Busy\r\ncontent-length: 100\r\n\r\nthe beginning"),
];

/// Starts a server that treats the first connections as `breaks` says, one entry for each, and answers the request of
/// any further one with 200. Returns its address and the number of connections so far.
async fn raw_server(breaks: &[Break]) -> (SocketAddr, Arc<AtomicUsize>) {
    let breaks = breaks.to_vec();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let connections = Arc::new(AtomicUsize::new(0));
    let count = connections.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let number = count.fetch_add(1, Ordering::SeqCst);
            tokio::spawn(serve(stream, breaks.get(number).copied()));
        }
    });
    (address, connections)
}

async fn serve(mut stream: TcpStream, how: Option<Break>) {
    let mut read = Vec::new();
    // The request ends with its body, or with its head if it has no body.
    while !read.ends_with(b"prompt") {
        match stream.read_buf(&mut read).await {
            Ok(count) if count > 0 => {}
            _ => return,
        }
    }
    let text = match how {
        None => "HTTP/1.1 200 OK\r\ncontent-length: 4\r\nconnection: close\r\n\r\ngood",
        Some(Break::Closes(text) | Break::Resets(text) | Break::Stalls(text)) => text,
    };
    stream.write_all(text.as_bytes()).await.unwrap();
    match how {
        None | Some(Break::Closes(_)) => {}
        Some(Break::Resets(_)) => {
            // The client reads what was written before the reset discards it.
            sleep(Duration::from_millis(20)).await;
            stream.set_zero_linger().unwrap();
        }
        Some(Break::Stalls(_)) => sleep(HANG).await,
    }
}

#[tokio::test]
async fn a_call_whose_connection_breaks_off_anywhere_is_retried() {
    for how in BREAKS {
        let (address, connections) = raw_server(&[how]).await;
        for (name, client) in clients(Protocol::Http1) {
            connections.store(0, Ordering::SeqCst);
            let result = post(policy(), client, address).await;
            let (status, body) = result.unwrap_or_else(|error| panic!("{name}, {how:?}: {error:?}"));
            assert_eq!((status, &*body), (200, &b"good"[..]), "{name}, {how:?}");
            assert_eq!(connections.load(Ordering::SeqCst), 2, "{name}, {how:?}");
        }
    }
}

#[tokio::test]
async fn a_connection_that_always_breaks_off_fails_the_call_after_its_retries_with_the_last_error() {
    for (name, client) in clients(Protocol::Http1) {
        let (address, connections) = raw_server(&[Break::Closes(HEAD); 9]).await;
        let error = post(policy(), client, address).await.unwrap_err();
        let error = error.downcast::<BodyFailed>().unwrap();
        assert!(error.is_transient(), "{name}: {error}");
        assert_eq!(connections.load(Ordering::SeqCst), 3, "{name}");
    }
}

#[tokio::test]
async fn a_post_that_may_have_been_processed_is_not_retried_if_only_idempotent_calls_are() {
    let policy = policy().retry_only_idempotent();
    for how in [
        Break::Closes(""),
        Break::Closes(HEAD),
        Break::Resets(""),
        Break::Stalls(""),
    ] {
        for (name, client) in clients(Protocol::Http1) {
            for (method, key, expected) in [
                (Method::POST, None, 1),
                (Method::POST, Some("7"), 2),
                (Method::PUT, None, 2),
            ] {
                let (address, connections) = raw_server(&[how]).await;
                let mut request = request(method.clone(), address);
                if let Some(key) = key {
                    request.headers_mut().insert("idempotency-key", key.parse().unwrap());
                }
                let service = RetryLayer::new(policy.clone()).layer(client.clone());
                let result = service.oneshot(request).await;
                assert_eq!(result.is_ok(), expected == 2, "{name}, {how:?}, {method}");
                assert_eq!(
                    connections.load(Ordering::SeqCst),
                    expected,
                    "{name}, {how:?}, {method}"
                );
            }
        }
    }
}

#[tokio::test]
async fn a_post_that_was_never_sent_is_retried_in_any_case() {
    for (name, client) in clients(Protocol::Http1) {
        let address = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        // The listener is closed, so the connection is refused.
        let error = client
            .clone()
            .oneshot(request(Method::POST, address))
            .await
            .unwrap_err();
        assert!(never_sent(&error), "{name}: {error:?}");

        let executor = Executor::builder()
            .limits(Limits::new())
            .layer(RetryLayer::new(policy().retry_only_idempotent()))
            .build(client)
            .unwrap();
        executor.start().unwrap();
        let call = executor.submit(request(Method::POST, address)).await.unwrap();
        let event = call.event().clone();
        call.await.unwrap_err();
        assert_eq!(event.finished().await.attempts.len(), 3, "{name}");
    }
}

#[tokio::test]
async fn a_broken_connection_was_not_never_sent() {
    for how in [
        Break::Closes(""),
        Break::Closes(HEAD),
        Break::Resets(""),
        Break::Stalls(HEAD),
    ] {
        for (name, client) in clients(Protocol::Http1) {
            let (address, _) = raw_server(&[how]).await;
            let error = client.oneshot(request(Method::POST, address)).await.unwrap_err();
            assert!(!never_sent(&error), "{name}, {how:?}: {error:?}");
        }
    }
}

#[tokio::test]
async fn a_response_that_is_not_http_is_not_retried() {
    for (name, client) in clients(Protocol::Http1) {
        let (address, connections) = raw_server(&[Break::Closes("SSH-2.0-OpenSSH_9.6\r\n\r\n")]).await;
        post(policy(), client, address).await.unwrap_err();
        assert_eq!(connections.load(Ordering::SeqCst), 1, "{name}");
    }
}

/// What the HTTP/2 server does with a request.
#[derive(Clone, Copy, Debug)]
enum Http2Break {
    /// Ends the stream of the request with RST_STREAM.
    ResetsStream(h2::Reason),
    /// Ends the stream after the head and the first bytes of the response.
    ResetsBody,
    /// Ends the connection with GOAWAY.
    GoesAway(h2::Reason),
    /// Closes the socket.
    Closes,
}

/// Starts an HTTP/2 server that treats the first request as `how` says, and answers any further one with 200. Returns
/// its address and the number of requests so far.
async fn http2_server(how: Http2Break) -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let requests = Arc::new(AtomicUsize::new(0));
    let count = requests.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve_http2(stream, how, count.clone()));
        }
    });
    (address, requests)
}

async fn serve_http2(stream: TcpStream, how: Http2Break, count: Arc<AtomicUsize>) {
    let mut connection = h2::server::handshake(stream).await.unwrap();
    while let Some(Ok((_request, mut respond))) = connection.accept().await {
        let is_first = count.fetch_add(1, Ordering::SeqCst) == 0;
        match how {
            Http2Break::ResetsStream(reason) if is_first => respond.send_reset(reason),
            Http2Break::ResetsBody if is_first => {
                let mut body = respond.send_response(Response::new(()), false).unwrap();
                body.send_data(Bytes::from_static(b"the beginning"), false).unwrap();
                // The reset would discard the head and the data if they were not on the way yet.
                tokio::spawn(async move {
                    sleep(Duration::from_millis(20)).await;
                    body.send_reset(h2::Reason::INTERNAL_ERROR);
                });
            }
            Http2Break::GoesAway(reason) if is_first => connection.abrupt_shutdown(reason),
            Http2Break::Closes if is_first => return,
            _ => {
                let mut body = respond.send_response(Response::new(()), false).unwrap();
                body.send_data(Bytes::from_static(b"good"), true).unwrap();
            }
        }
    }
}

#[tokio::test]
async fn a_call_whose_http2_stream_or_connection_ends_early_is_retried() {
    for how in [
        Http2Break::ResetsStream(h2::Reason::REFUSED_STREAM),
        Http2Break::ResetsStream(h2::Reason::INTERNAL_ERROR),
        Http2Break::ResetsStream(h2::Reason::ENHANCE_YOUR_CALM),
        Http2Break::ResetsBody,
        Http2Break::GoesAway(h2::Reason::NO_ERROR),
        Http2Break::GoesAway(h2::Reason::INTERNAL_ERROR),
        Http2Break::Closes,
    ] {
        for (name, client) in clients(Protocol::Http2) {
            let (address, requests) = http2_server(how).await;
            let result = post(policy(), client, address).await;
            let (status, body) = result.unwrap_or_else(|error| panic!("{name}, {how:?}: {error:?}"));
            assert_eq!((status, &*body), (200, &b"good"[..]), "{name}, {how:?}");
            assert_eq!(requests.load(Ordering::SeqCst), 2, "{name}, {how:?}");
        }
    }
}
