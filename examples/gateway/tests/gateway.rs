//! The promises of the gateway, kept by the program itself in front of a local provider. Times are real, since two processes
//! talk over sockets: each wait is bounded, and nothing is expected to be fast.

use axum::{
    Router,
    body::{Body, Bytes},
    extract::State,
    http::{HeaderMap, StatusCode},
    response::{IntoResponse, Response},
    routing::any,
};
use futures_util::{StreamExt, stream};
use reqwest::RequestBuilder;
use rustix::process::{Pid, Signal, kill_process};
use std::{
    io::{BufRead, BufReader, Read},
    process::{Child, ChildStdout, Command, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::{
    net::TcpListener,
    sync::Semaphore,
    time::{Instant, sleep_until, timeout},
};

/// The most that anything here may take. It is only reached if the gateway is broken.
const BOUND: Duration = Duration::from_secs(30);

/// A provider that answers in two parts, the second of which it sends when the test lets it.
#[derive(Clone)]
struct Provider {
    url: String,
    seen: Arc<Mutex<Seen>>,
    may_finish: Arc<Semaphore>,
}

#[derive(Default)]
struct Seen {
    bodies: Vec<String>,
    keys: Vec<String>,
    /// How many responses are being sent.
    open: usize,
}

/// Counts a response as open until it is sent or dropped.
struct Open(Provider);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.seen.lock().unwrap().open -= 1;
    }
}

impl Provider {
    async fn start(may_finish: usize) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let provider = Self {
            url: format!("http://{}", listener.local_addr().unwrap()),
            seen: Arc::default(),
            may_finish: Arc::new(Semaphore::new(may_finish)),
        };
        let router = Router::new().fallback(any(Self::answer)).with_state(provider.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        provider
    }

    async fn answer(State(provider): State<Self>, headers: HeaderMap, body: String) -> Response {
        {
            let mut seen = provider.seen.lock().unwrap();
            seen.keys
                .push(format!("{:?} {:?}", headers["authorization"], headers.get("cookie")));
            seen.bodies.push(body);
            seen.open += 1;
        }
        let open = Open(provider);
        let first = stream::iter(["data: one\n\n"]);
        let rest = stream::once(async move {
            open.0.may_finish.acquire().await.unwrap().forget();
            "data: {\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":4}}\n\n"
        });
        let body = Body::from_stream(first.chain(rest).map(Ok::<_, std::io::Error>));
        ([("content-type", "text/event-stream")], body).into_response()
    }

    fn bodies(&self) -> Vec<String> {
        self.seen.lock().unwrap().bodies.clone()
    }

    async fn until(&self, what: &str, is_so: impl Fn(&Seen) -> bool) {
        let waited = timeout(BOUND, async {
            while !is_so(&self.seen.lock().unwrap()) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        waited
            .await
            .unwrap_or_else(|_| panic!("not so after {BOUND:?}: {what}"));
    }
}

/// The program, which is killed when the test ends.
struct Gateway {
    process: Child,
    output: BufReader<ChildStdout>,
    url: String,
    client: reqwest::Client,
}

impl Gateway {
    fn start(provider: &Provider, args: &[&str]) -> Self {
        // As in the gateway itself: reqwest's TLS comes without a provider of cryptography.
        _ = rustls::crypto::ring::default_provider().install_default();
        let client = reqwest::Client::new();
        let mut process = Command::new(env!("CARGO_BIN_EXE_gateway"))
            .args(["--listen", "127.0.0.1:0", "--provider", &provider.url])
            .args(args)
            .env("PROVIDER_KEY", "secret")
            .env("TENANTS", "key-of-large=large,key-of-small=small")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(process.stdout.take().unwrap());
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        let url = format!("http://{}", line.trim().rsplit(' ').next().unwrap());
        Self {
            process,
            output,
            url,
            client,
        }
    }

    fn request(&self, tenant: &str, body: &str) -> RequestBuilder {
        let request = self.client.post(format!("{}/v1/chat/completions", self.url));
        request.bearer_auth(format!("key-of-{tenant}")).body(body.to_owned())
    }

    /// Sends a request in a task, so that it is on its way while the test goes on.
    fn send(&self, request: RequestBuilder) -> tokio::task::JoinHandle<StatusCode> {
        tokio::spawn(async move {
            let response = request.send().await.unwrap();
            let status = response.status();
            _ = response.bytes().await;
            status
        })
    }

    async fn metric(&self, series: &str) -> f64 {
        let page = self.client.get(format!("{}/metrics", self.url)).send().await.unwrap();
        let page = page.text().await.unwrap();
        let value = page
            .lines()
            .find_map(|line| line.strip_prefix(series)?.trim().parse().ok());
        value.unwrap_or(0.0)
    }

    async fn until_metric(&self, series: &str, value: f64) {
        let waited = timeout(BOUND, async {
            while self.metric(series).await != value {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        waited
            .await
            .unwrap_or_else(|_| panic!("{series} is not {value} after {BOUND:?}"));
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        _ = self.process.kill();
        _ = self.process.wait();
    }
}

async fn chunk(response: &mut reqwest::Response) -> Bytes {
    timeout(BOUND, response.chunk()).await.unwrap().unwrap().unwrap()
}

#[tokio::test]
async fn a_stream_passes_through_as_it_comes_and_only_the_gateways_key_goes_to_the_provider() {
    let provider = Provider::start(0).await;
    let gateway = Gateway::start(&provider, &[]);
    let unknown = gateway.request("nobody", "{}").send().await.unwrap();
    assert_eq!(unknown.status(), StatusCode::UNAUTHORIZED);

    let request = gateway.request("small", "{}").header("cookie", "private");
    let mut response = request.send().await.unwrap();
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    // The provider sends the rest only after the client has the first part.
    assert_eq!(chunk(&mut response).await, "data: one\n\n");
    provider.may_finish.add_permits(1);
    assert!(chunk(&mut response).await.starts_with(b"data: {\"usage\""));
    assert!(response.chunk().await.unwrap().is_none());
    assert_eq!(provider.seen.lock().unwrap().keys, ["\"Bearer secret\" None"]);

    gateway
        .until_metric("outbound_calls_total{status=\"COMPLETED\"}", 1.0)
        .await;
    assert_eq!(gateway.metric("outbound_attempts_total{code=\"200\"}").await, 1.0);
    assert_eq!(gateway.metric("outbound_tokens_total{kind=\"output\"}").await, 4.0);
    assert_eq!(gateway.metric("outbound_in_flight").await, 0.0);
}

#[tokio::test]
async fn a_client_that_goes_away_cancels_its_call_on_the_wire_and_in_the_queue() {
    let provider = Provider::start(0).await;
    let gateway = Gateway::start(&provider, &["--concurrency", "1"]);
    let mut streaming = gateway.request("small", "streaming").send().await.unwrap();
    chunk(&mut streaming).await;
    let queued = gateway.send(gateway.request("small", "queued"));
    gateway.until_metric("outbound_queue_depth", 1.0).await;
    queued.abort();
    gateway
        .until_metric("outbound_calls_total{status=\"CANCELLED\"}", 1.0)
        .await;
    assert_eq!(gateway.metric("outbound_queue_depth").await, 0.0);

    drop(streaming);
    provider
        .until("the provider's response is dropped", |seen| seen.open == 0)
        .await;
    gateway
        .until_metric("outbound_calls_total{status=\"CANCELLED\"}", 2.0)
        .await;
    assert_eq!(provider.bodies(), ["streaming"]);
}

#[tokio::test]
async fn a_call_that_cannot_begin_in_time_gets_a_429_and_is_accepted_after_its_retry_after() {
    let provider = Provider::start(1_000).await;
    let gateway = Gateway::start(&provider, &["--requests", "2", "--timeout", "4"]);
    let mut calls = Vec::new();
    let refused = loop {
        // Each call is sent when the gateway has the one before.
        let mut call = gateway.send(gateway.request("large", "{}"));
        if let Ok(status) = timeout(Duration::from_millis(50), &mut call).await {
            if status.unwrap() == StatusCode::TOO_MANY_REQUESTS {
                break gateway.request("large", "{}").send().await.unwrap();
            }
        } else {
            calls.push(call);
        }
        assert!(calls.len() < 20, "no call was refused");
    };
    let refused_at = Instant::now();
    assert_eq!(refused.status(), StatusCode::TOO_MANY_REQUESTS);
    let seconds = refused.headers()["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((1..=4).contains(&seconds), "{seconds}");

    sleep_until(refused_at + Duration::from_secs(seconds)).await;
    let again = gateway.request("large", "{}").send().await.unwrap();
    assert_ne!(again.status(), StatusCode::TOO_MANY_REQUESTS);
    // The last one begins shortly before its deadline, which a busy machine can miss.
    calls.pop();
    for call in calls {
        assert_eq!(call.await.unwrap(), StatusCode::OK, "an accepted call ends in time");
    }
}

#[tokio::test]
async fn tenants_share_fairly_and_an_interactive_call_goes_before_the_batch_of_its_tenant() {
    let provider = Provider::start(0).await;
    let gateway = Gateway::start(&provider, &["--concurrency", "1", "--requests", "1000"]);
    let mut calls = vec![gateway.send(gateway.request("large", "first"))];
    provider
        .until("the first call is on the wire", |seen| seen.open == 1)
        .await;
    for _ in 0..10 {
        let batch = gateway.request("large", "batch").header("x-class", "batch");
        calls.push(gateway.send(batch));
    }
    gateway.until_metric("outbound_queue_depth", 10.0).await;
    calls.push(gateway.send(gateway.request("large", "interactive")));
    calls.push(gateway.send(gateway.request("small", "small")));
    gateway.until_metric("outbound_queue_depth", 12.0).await;

    provider.may_finish.add_permits(calls.len());
    for call in calls {
        assert_eq!(timeout(BOUND, call).await.unwrap().unwrap(), StatusCode::OK);
    }
    let order = provider.bodies();
    let place = |body: &str| order.iter().position(|other| other == body).unwrap();
    assert!(place("small") <= 2, "{order:?}");
    assert!(place("interactive") <= 2, "{order:?}");
}

#[tokio::test]
async fn sigterm_finishes_what_was_accepted_refuses_what_comes_and_ends() {
    let provider = Provider::start(0).await;
    let mut gateway = Gateway::start(&provider, &["--concurrency", "1"]);
    let mut streaming = gateway.request("small", "streaming").send().await.unwrap();
    chunk(&mut streaming).await;
    let queued = gateway.send(gateway.request("small", "queued"));
    gateway.until_metric("outbound_queue_depth", 1.0).await;

    let pid = Pid::from_raw(i32::try_from(gateway.process.id()).unwrap()).unwrap();
    kill_process(pid, Signal::TERM).unwrap();
    let refused = timeout(BOUND, async {
        // Each attempt has a connection of its own.
        while let Ok(response) = reqwest::get(format!("{}/metrics", gateway.url)).await {
            _ = response.bytes().await;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    refused.await.expect("new connections are refused");

    provider.may_finish.add_permits(2);
    assert!(chunk(&mut streaming).await.starts_with(b"data: {\"usage\""));
    assert!(streaming.chunk().await.unwrap().is_none());
    assert_eq!(timeout(BOUND, queued).await.unwrap().unwrap(), StatusCode::OK);
    assert_eq!(provider.bodies(), ["streaming", "queued"]);
    let report = tokio::task::spawn_blocking(move || {
        let mut report = String::new();
        gateway.output.read_to_string(&mut report).unwrap();
        assert!(gateway.process.wait().unwrap().success());
        report
    });
    let report = timeout(BOUND, report).await.unwrap().unwrap();
    assert!(report.contains("completed: 2, failed: 0, cancelled: 0"), "{report}");
}
