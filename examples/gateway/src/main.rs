//! A gateway between the tenants of a service and a metered API: axum in front, one executor behind.
//!
//! What to watch:
//! - **Tenants** are told by their API keys, and share the provider's limits fairly. Calls with the header
//!   `x-class: batch` go after the tenant's other calls.
//! - **Streams** pass through as they come. A client that goes away cancels its call, queued or on the wire.
//! - **429** says how long to wait: a call is refused at once if the limits cannot let it begin within the timeout.
//! - **SIGTERM** finishes the accepted calls, and `/metrics` counts calls, attempts, waits by their cause, and tokens.
//!
//! `PROVIDER_KEY=… TENANTS=key-of-acme=acme,key-of-other=other cargo run -p tower-outbound-gateway -- --provider URL`

mod metrics;

use anyhow::Context;
use axum::{
    Router,
    body::{Body, Bytes, to_bytes},
    extract::State,
    http::{Request, StatusCode, header, request::Parts},
    response::{IntoResponse, Response},
    routing::{any, get},
};
use clap::Parser;
use metrics::Metrics;
use std::{collections::HashMap, sync::Arc, time::Duration};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tower::{ServiceBuilder, retry::RetryLayer};
use tower_outbound::{
    Call, Executor, Limits, Rate, RateLimiter, Schedule, Shutdown,
    body::StreamBody,
    client::Reqwest,
    error::Error,
    provider::{CharacterEstimate, FeedbackLayer, MeteredBody, Provider, UsageLayer},
    rate::ByUsage,
    retry::{RetryPolicy, never_sent},
    schedule::Level,
};

#[derive(Parser)]
struct Args {
    /// Where to listen.
    #[arg(long, default_value = "127.0.0.1:8080")]
    listen: String,
    /// The URL of the provider, to which the path of a request is appended.
    #[arg(long)]
    provider: String,
    /// The key of this service at the provider.
    #[arg(long, env, hide_env_values = true)]
    provider_key: String,
    /// The tenants: `KEY=NAME`, separated by commas.
    #[arg(long, env, hide_env_values = true, value_delimiter = ',')]
    tenants: Vec<String>,
    /// Requests per second, of all tenants together.
    #[arg(long, default_value_t = 10)]
    requests: u64,
    /// Tokens per minute, of all tenants together.
    #[arg(long, default_value_t = 1_000_000)]
    tokens: u64,
    /// The most calls on the wire at once.
    #[arg(long, default_value_t = 100)]
    concurrency: usize,
    /// Seconds that a call may take, from its request to the last byte of its response.
    #[arg(long, default_value_t = 120)]
    timeout: u64,
}

struct Gateway {
    executor: Executor<Bytes, StreamBody<MeteredBody<reqwest::Body>>>,
    metrics: Arc<Metrics>,
    /// The name of each tenant, by its key.
    tenants: HashMap<String, String>,
    args: Args,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    // The provider of cryptography of reqwest's TLS. It fails only if there is one already.
    _ = rustls::crypto::ring::default_provider().install_default();
    let mut sigterm = signal(SignalKind::terminate())?;
    let listener = TcpListener::bind(&args.listen).await?;
    println!("listening on {}", listener.local_addr()?);

    let timeout = Duration::from_secs(args.timeout);
    let gateway = Arc::new(Gateway::new(args, timeout)?);
    gateway.executor.start()?;
    let (executor, metrics) = (gateway.executor.clone(), gateway.metrics.clone());
    let monitor = executor.monitor();
    let router = Router::new()
        .route("/metrics", get(async move || metrics.page(&monitor)))
        .fallback(any(forward))
        .with_state(gateway);
    // After the signal, axum accepts no connections and waits for the open responses, which end within the timeout. A
    // client that does not read its response can hold that up: let the supervisor kill what is left after a while.
    let stop = async move { _ = sigterm.recv().await };
    axum::serve(listener, router).with_graceful_shutdown(stop).await?;
    executor.stop(Shutdown::Within(timeout)).await;
    println!("{:?}", executor.monitor().totals());
    Ok(())
}

impl Gateway {
    fn new(args: Args, timeout: Duration) -> anyhow::Result<Self> {
        let mut tenants = HashMap::new();
        for tenant in &args.tenants {
            let (key, name) = tenant.split_once('=').context("a tenant is KEY=NAME")?;
            tenants.insert(key.to_owned(), name.to_owned());
        }
        let schedule = Schedule::new()
            .class("interactive", Duration::ZERO)
            .class("batch", Duration::from_secs(600))
            .level(Level::by("tenant"));
        let limits = Limits::new()
            .requests(Rate::per_second(args.requests).burst(1))
            .tokens(Rate::per_minute(args.tokens));
        let limiter = RateLimiter::new(limits)?;
        let client = ServiceBuilder::new()
            .layer(FeedbackLayer::new(limiter.clone(), Provider::OpenAi))
            .layer(UsageLayer::new())
            .service(Reqwest::default());
        let metrics = Arc::new(Metrics::default());
        let executor = Executor::builder()
            .schedule(schedule)
            .limiter(limiter)
            .concurrency_limit(args.concurrency)
            .timeout(timeout)
            .cost(CharacterEstimate::new())
            .settle(ByUsage::default().unless_sent(never_sent))
            .layer(RetryLayer::new(RetryPolicy::new().provider(Provider::OpenAi)))
            .observe(metrics.clone())
            .build_streaming(client)?;
        Ok(Self {
            executor,
            metrics,
            tenants,
            args,
        })
    }

    /// Returns the call to the provider, in the name of the tenant whose key the client's request has.
    fn call(&self, client: &Parts, body: Bytes) -> Result<Call<Bytes>, StatusCode> {
        let text = |name| client.headers.get(name).and_then(|value| value.to_str().ok());
        let key = text("authorization").and_then(|value| value.strip_prefix("Bearer "));
        let tenant = key.and_then(|key| self.tenants.get(key));
        let tenant = tenant.ok_or(StatusCode::UNAUTHORIZED)?;
        let path = client.uri.path_and_query().map_or("/", |path| path.as_str());
        let mut request = Request::builder()
            .method(client.method.clone())
            .uri(format!("{}{path}", self.args.provider))
            .header(header::AUTHORIZATION, format!("Bearer {}", self.args.provider_key));
        // What is not named here, such as the client's key and cookies, stays here.
        for name in [header::CONTENT_TYPE, header::ACCEPT] {
            if let Some(value) = client.headers.get(&name) {
                request = request.header(name, value);
            }
        }
        let request = request.body(body).map_err(|_| StatusCode::BAD_REQUEST)?;
        let class = text("x-class").unwrap_or("interactive").to_owned();
        Ok(Call::from(request).flow(tenant.as_str()).class(class))
    }
}

async fn forward(State(gateway): State<Arc<Gateway>>, request: Request<Body>) -> Result<Response, Response> {
    let (client, body) = request.into_parts();
    // The body is kept in memory, so that its tokens can be estimated and it can be sent again.
    let body = to_bytes(body, 32 << 20).await;
    let body = body.map_err(|_| StatusCode::PAYLOAD_TOO_LARGE.into_response())?;
    let call = gateway.call(&client, body).map_err(IntoResponse::into_response)?;
    // Waits for a place in the queue, which a schedule gives in fair shares: a tenant that fills the queue keeps no other
    // one out, as it would with `try_submit`.
    let call = gateway.executor.submit(call).await.map_err(|error| refusal(&error))?;
    // axum drops this future when the client goes away, and later the body of the response.
    let response = call.cancel_on_drop().await.map_err(|error| refusal(&error))?;
    let mut response = response.map(Body::new);
    // These are about the connection to the provider.
    for name in [header::CONNECTION, header::TRANSFER_ENCODING] {
        response.headers_mut().remove(name);
    }
    Ok(response)
}

/// Returns the response for a call that has failed.
fn refusal(error: &Error) -> Response {
    if let Some(wait) = error.retry_after() {
        // Rounded up: the header has whole seconds, and a client that comes too early is refused again.
        let seconds = wait.as_secs_f64().ceil().to_string();
        let headers = [(header::RETRY_AFTER, seconds)];
        return (StatusCode::TOO_MANY_REQUESTS, headers, error.to_string()).into_response();
    }
    let status = match error {
        error if error.is_cost_exceeds_burst() => StatusCode::PAYLOAD_TOO_LARGE,
        error if error.is_deadline_exceeded() => StatusCode::GATEWAY_TIMEOUT,
        error if error.is_not_running() || error.is_closed() => StatusCode::SERVICE_UNAVAILABLE,
        _ => StatusCode::BAD_GATEWAY,
    };
    (status, error.to_string()).into_response()
}
