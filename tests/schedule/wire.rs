//! The effects of a schedule on calls of a real HTTP client to a real HTTP server, on a paused clock: hyper on both ends
//! of connections in memory.

use super::*;
use crate::support::pass;
use axum::{Router, routing::post};
use http_body_util::{BodyExt, Empty};
use hyper::body::Bytes;
use hyper::client::conn::http1::SendRequest;
use hyper_util::{rt::TokioIo, service::TowerToHyperService};
use std::task::{Context, Poll};
use tower::BoxError;

/// A server that takes `takes` for each request, and logs the number in its path.
fn router(log: Log, takes: Duration) -> Router {
    let handler = move |axum::extract::Path(number): axum::extract::Path<u64>| {
        let log = log.clone();
        async move {
            log.add(number);
            sleep(takes).await;
            number.to_string()
        }
    };
    Router::new().route("/{number}", post(handler))
}

/// A client with a pool of connections.
#[derive(Clone)]
struct Wire {
    router: Router,
    idle: Arc<Mutex<Vec<SendRequest<Empty<Bytes>>>>>,
}

impl Wire {
    async fn connection(&self) -> Result<SendRequest<Empty<Bytes>>, BoxError> {
        if let Some(idle) = self.idle.lock().unwrap().pop() {
            return Ok(idle);
        }
        let (near, far) = tokio::io::duplex(4_096);
        let service = TowerToHyperService::new(self.router.clone());
        tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(far), service));
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(near)).await?;
        tokio::spawn(connection);
        Ok(sender)
    }
}

impl Service<Request> for Wire {
    type Response = Response;
    type Error = BoxError;
    type Future = futures_util::future::BoxFuture<'static, Result<Response, BoxError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request) -> Self::Future {
        let wire = self.clone();
        Box::pin(async move {
            let mut sender = wire.connection().await?;
            let request = http::Request::post(format!("/{}", request.body()))
                .header("host", "localhost")
                .body(Empty::new())?;
            sender.ready().await?;
            let response = sender.send_request(request).await?;
            let (head, body) = response.into_parts();
            body.collect().await?;
            wire.idle.lock().unwrap().push(sender);
            Ok(http::Response::from_parts(head, ()))
        })
    }
}

/// Returns a started executor whose client sends real requests, and the log of the server.
fn wire_executor(schedule: &Schedule, limits: Limits, permits: usize, takes: Duration) -> (TestExecutor, Log) {
    let log = Log::new();
    let wire = Wire {
        router: router(log.clone(), takes),
        idle: Arc::default(),
    };
    let executor = Executor::builder()
        .concurrency_limit(permits)
        .limits(limits)
        .schedule(schedule.clone())
        .build(wire)
        .unwrap();
    executor.start().unwrap();
    (executor, log)
}

#[tokio::test(start_paused = true)]
async fn a_small_tenant_beside_a_large_one_ends_within_five_seconds() {
    let schedule = tenants();
    let (executor, log) = wire_executor(&schedule, per_second(10), 10, ms(500));
    for number in 0..10_000 {
        drop(spawn_call(&executor, flow_call("large", number)));
    }
    sleep(ms(1_000)).await;
    let small = (0..10).map(|number| flow_call("small", 100_000 + number));
    all_end_well(submit_all(&executor, small).await).await;
    let took = log.start.elapsed() - ms(1_000);
    assert!(took <= ms(5_000), "{took:?}");
    // The rate was used all the time.
    let (sent, elapsed) = (log.numbers().len() as u128, log.start.elapsed().as_millis());
    assert!(sent >= elapsed / 100, "{sent} in {elapsed} ms");
    executor.stop(Shutdown::Immediate).await;
    assert_nothing_is_left(&executor, &schedule);
}

#[tokio::test(start_paused = true)]
async fn interactive_calls_beside_bursts_of_batch_calls_wait_less_than_a_second() {
    const RATE: u64 = 20;
    const BATCH: u64 = 1_000_000;
    let minutes = Duration::from_secs(30 * 60);
    let class = Level::by("class").weight(|class| if class == "interactive" { 4 } else { 1 });
    let schedule = Schedule::new().level(class).level(Level::by("tenant"));
    let (executor, log) = wire_executor(&schedule, per_second(RATE), 40, ms(500));
    let mut random = fastrand::Rng::with_seed(15);
    // 20 batch calls a second, and 2 interactive ones: 110 % of the rate.
    let batch = {
        let executor = executor.clone();
        tokio::spawn(async move {
            for burst in 0..180 {
                for number in 0..200 {
                    let tenant = number % 20;
                    let call = call(BATCH + burst * 200 + number).flow(["batch".into(), tenant.to_string()]);
                    drop(spawn_call(&executor, call));
                }
                sleep(ms(10_000)).await;
            }
        })
    };
    let mut submitted = Vec::new();
    while log.start.elapsed() < minutes {
        let call = call(submitted.len() as u64).flow(["interactive".into(), random.u64(..20).to_string()]);
        submitted.push(log.start.elapsed());
        drop(spawn_call(&executor, call));
        sleep(Duration::from_secs_f64(-(-random.f64()).ln_1p() / 2.0)).await;
    }
    batch.abort();
    pass(ms(10_000)).await;
    let arrivals = log.arrivals().into_iter().filter(|(number, _)| *number < BATCH);
    let mut waits: Vec<_> = arrivals.map(|(number, at)| at - submitted[number as usize]).collect();
    waits.sort_unstable();
    assert!(
        waits.len() >= submitted.len() - 5 && waits.len() > 3_000,
        "{} of {}",
        waits.len(),
        submitted.len()
    );
    let (median, p99) = (waits[waits.len() / 2], waits[waits.len() * 99 / 100]);
    println!("interactive calls wait {median:?} in the median, {p99:?} at the 99th percentile");
    assert!(p99 <= ms(1_000), "{p99:?}");
    // Neither is the rate left unused, nor are the batch calls starved.
    let sent = log.numbers().len() as u64;
    assert!(sent >= RATE * minutes.as_secs(), "{sent}");
    executor.stop(Shutdown::Immediate).await;
    assert_nothing_is_left(&executor, &schedule);
}

/// Sends 10,000 calls to 50 hosts with `level`, 100 at once in all, each of which takes `takes`. Returns when the calls of
/// each host arrived, and when the last call had ended.
async fn ten_thousand_calls_to_fifty_hosts(level: Level, takes: Duration) -> (Vec<Vec<Duration>>, Duration) {
    let schedule = Schedule::new().level(level);
    let (executor, log) = wire_executor(&schedule, Limits::new(), 100, takes);
    let calls: Vec<_> = (0..CALLS)
        .map(|number| spawn_call(&executor, call(number).flow(number % HOSTS)))
        .collect();
    for call in calls {
        call.await.unwrap().unwrap();
    }
    let took = log.start.elapsed();
    let mut by_host = vec![Vec::new(); HOSTS as usize];
    for (number, at) in log.arrivals() {
        by_host[(number % HOSTS) as usize].push(at);
    }
    assert!(by_host.iter().all(|at| at.len() as u64 == CALLS / HOSTS));
    pass(ms(1)).await;
    assert_nothing_is_left(&executor, &schedule);
    (by_host, took)
}

const HOSTS: u64 = 50;
const CALLS: u64 = 10_000;

/// Whether no two calls of a host are closer to each other than its rate allows.
fn keeps_five_a_second(at: &[Duration]) -> bool {
    at.windows(2).all(|pair| pair[1] - pair[0] >= ms(199))
}

#[tokio::test(start_paused = true)]
async fn ten_thousand_calls_to_fifty_hosts_keep_the_rate_of_each_and_lose_no_time() {
    let level = Level::by("host").limits(|_| Some(per_second(5)));
    let (by_host, took) = ten_thousand_calls_to_fifty_hosts(level, ms(100)).await;
    let bound = ms(200) * (CALLS / HOSTS - 1) as u32 + ms(100);
    assert!(took >= bound && took <= bound + bound / 50, "{took:?} of {bound:?}");
    for at in by_host {
        assert!(keeps_five_a_second(&at), "{at:?}");
    }
}

/// Of calls that take 450 ms, a rate of 5 a second would have three in flight. Of calls that take 100 ms, the rate allows
/// one.
#[tokio::test(start_paused = true)]
async fn fifty_hosts_with_two_calls_at_once_each_keep_that_and_their_rate_and_lose_no_time() {
    for (takes, bound) in [
        (ms(450), ms(450) * (CALLS / HOSTS / 2) as u32 + ms(200)),
        (ms(100), ms(200) * (CALLS / HOSTS - 1) as u32 + ms(100)),
    ] {
        let level = Level::by("host")
            .limits(|_| Some(per_second(5)))
            .concurrency(|_| Some(2));
        let (by_host, took) = ten_thousand_calls_to_fifty_hosts(level, takes).await;
        assert!(took >= bound && took <= bound + bound / 50, "{took:?} of {bound:?}");
        for at in by_host {
            assert!(keeps_five_a_second(&at), "{at:?}");
            // The server has at most two calls of the host at once.
            assert!(at.windows(3).all(|three| three[2] - three[0] >= takes), "{at:?}");
        }
    }
}
