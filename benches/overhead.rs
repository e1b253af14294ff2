//! What a call costs around a service that does nothing, side by side with Tower's own layers.
//!
//! `cargo bench --bench overhead`. Each figure is the median of several rounds, ours and the peer's in turn; compare
//! the ratios, not the times. The last lines are for machines: `ratio <ours>/<peer> <callers> <runtime> = x.xx`.

use http::{Request, Response};
use std::{convert::Infallible, future::Future, hint::black_box, time::Duration};
use tokio::{runtime, time::Instant};
use tower::{Service, ServiceBuilder, ServiceExt, service_fn};
use tower_outbound::{ConcurrencyLimitLayer, Cost, EventLayer, Limits, QueueLayer, Rate, RateLimitLayer, RateLimiter};

const ROUNDS: usize = 9;
const CALLS: usize = 40_000;
/// Never reached.
const PLENTY: u64 = 1_000_000_000_000;

fn client() -> impl Service<Request<()>, Response = Response<()>, Error = Infallible, Future: Send> + Clone + Send + Sync
{
    service_fn(async |_: Request<()>| Ok(Response::new(())))
}

fn request() -> Request<()> {
    Request::new(())
}

fn limiter() -> RateLimiter {
    RateLimiter::new(
        Limits::new()
            .requests(Rate::per_second(PLENTY))
            .tokens(Rate::per_second(PLENTY)),
    )
    .expect("the rates make sense")
}

/// Nanoseconds a call, with so many callers each of which makes one call after the other.
async fn measure<S, Req>(service: S, callers: usize, request: fn() -> Req) -> f64
where
    S: Service<Req, Future: Send, Response: Send, Error: std::fmt::Debug + Send> + Clone + Send + 'static,
    Req: Send + 'static,
{
    let each = CALLS / callers;
    let start = Instant::now();
    let tasks: Vec<_> = (0..callers)
        .map(|_| {
            let mut service = service.clone();
            tokio::spawn(async move {
                for _ in 0..each {
                    let response = service.ready().await.expect("ready").call(request()).await;
                    black_box(response.expect("a response"));
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.expect("no panic");
    }
    start.elapsed().as_nanos() as f64 / (each * callers) as f64
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

async fn compare<A, B>(
    name: &str,
    callers: usize,
    runtime: &str,
    ours: impl Fn() -> A,
    peer: impl Fn() -> B,
    lines: &mut Vec<String>,
) where
    A: Future<Output = f64>,
    B: Future<Output = f64>,
{
    let (mut ours_ns, mut peer_ns, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let (a, b) = (ours().await, peer().await);
        ratios.push(a / b);
        ours_ns.push(a);
        peer_ns.push(b);
    }
    let ratio = median(ratios);
    println!(
        "{name:<62} {callers:>4} {runtime:<8} {:>7.0} ns {:>7.0} ns  {ratio:.2}",
        median(ours_ns),
        median(peer_ns)
    );
    lines.push(format!("ratio {name} {callers} {runtime} = {ratio:.2}"));
}

async fn all(runtime: &str, lines: &mut Vec<String>) {
    for callers in [1, 64] {
        let tower = || async move {
            let service = ServiceBuilder::new()
                .buffer(1_024)
                .concurrency_limit(1_024)
                .rate_limit(PLENTY, Duration::from_secs(1))
                .service(client());
            measure(service, callers, request).await
        };
        let with_events = || async move {
            let service = ServiceBuilder::new()
                .layer(EventLayer::queued())
                .layer(QueueLayer::new(1_024).expect("a capacity"))
                .layer(EventLayer::processing())
                .layer(ConcurrencyLimitLayer::new(1_024).expect("a limit"))
                .layer(RateLimitLayer::new(limiter()))
                .layer(EventLayer::calling())
                .service(client());
            measure(service, callers, request).await
        };
        let without_events = || async move {
            let service = ServiceBuilder::new()
                .layer(QueueLayer::new(1_024).expect("a capacity"))
                .layer(ConcurrencyLimitLayer::new(1_024).expect("a limit"))
                .layer(RateLimitLayer::new(limiter()))
                .service(client());
            measure(service, callers, request).await
        };
        let concurrency = || async move {
            let layer = ConcurrencyLimitLayer::new(1_024).expect("a limit");
            measure(ServiceBuilder::new().layer(layer).service(client()), callers, request).await
        };
        let tower_concurrency = || async move {
            let layer = tower::limit::GlobalConcurrencyLimitLayer::new(1_024);
            measure(ServiceBuilder::new().layer(layer).service(client()), callers, request).await
        };
        let peer = "tower-buffer+concurrency+rate";
        compare(
            &format!("stack-with-events/{peer}"),
            callers,
            runtime,
            with_events,
            tower,
            lines,
        )
        .await;
        compare(
            &format!("stack-without-events/{peer}"),
            callers,
            runtime,
            without_events,
            tower,
            lines,
        )
        .await;
        compare(
            "concurrency/tower-concurrency",
            callers,
            runtime,
            concurrency,
            tower_concurrency,
            lines,
        )
        .await;
    }
    let acquire = || async {
        let limiter = limiter();
        let start = Instant::now();
        for _ in 0..CALLS {
            black_box(limiter.try_acquire(Cost::tokens(3)).is_ok());
        }
        start.elapsed().as_nanos() as f64 / CALLS as f64
    };
    let now = || async {
        let start = Instant::now();
        for _ in 0..CALLS {
            black_box(Instant::now());
        }
        start.elapsed().as_nanos() as f64 / CALLS as f64
    };
    compare("try_acquire-two-budgets/instant-now", 1, runtime, acquire, now, lines).await;
}

fn main() {
    let mut lines = Vec::new();
    println!(
        "{:<62} {:>4} {:<8} {:>10} {:>10}  ratio",
        "ours/peer", "", "", "ours", "peer"
    );
    runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime")
        .block_on(all("current", &mut lines));
    let two = runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    two.block_on(async {
        tokio::spawn(async move {
            all("two", &mut lines).await;
            lines
        })
        .await
    })
    .expect("no panic")
    .iter()
    .for_each(|line| println!("{line}"));
}
