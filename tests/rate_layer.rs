//! Tests of the guarantees of `RateLimitLayer`.

mod support;

use http::Request;
use support::{client, ms, pass, request};
use tokio::time::Instant;
use tokio_test::{assert_pending, assert_ready_err, assert_ready_ok, task};
use tower::{Layer, Service, ServiceBuilder, ServiceExt};
use tower_outbound::{ApiTokens, Cost, Limits, Rate, RateLimitLayer, RateLimiter, error::CostExceedsBurst};
use tower_test::mock;

fn limiter(limits: Limits) -> RateLimiter {
    RateLimiter::new(limits).unwrap()
}

#[tokio::test(start_paused = true)]
async fn calls_are_paced() {
    let (client, arrivals) = client(ms(0));
    let limiter = limiter(Limits::new().requests(Rate::per_second(10).burst(2)));
    let service = RateLimitLayer::new(limiter).layer(client);
    let calls: Vec<_> = (0..5)
        .map(|_| tokio::spawn(service.clone().oneshot(request("call"))))
        .collect();
    for call in calls {
        call.await.unwrap().unwrap();
    }
    assert_eq!(arrivals.times(), [ms(0), ms(0), ms(100), ms(200), ms(300)]);
}

#[tokio::test(start_paused = true)]
async fn tokens_come_from_a_function_or_the_extension_or_are_zero() {
    let (client, _) = client(ms(0));
    let limiter = limiter(Limits::new().tokens(Rate::per_second(1).burst(100)));
    let left = || limiter.available().tokens.unwrap();

    let service = RateLimitLayer::new(limiter.clone()).layer(client.clone());
    service.clone().oneshot(request("none")).await.unwrap();
    assert_eq!(left(), 100);
    let with_tokens = || Request::get("/").extension(ApiTokens(30)).body("30").unwrap();
    service.oneshot(with_tokens()).await.unwrap();
    assert_eq!(left(), 70);

    // A cost function takes precedence over the `ApiTokens` extension of the request.
    let service = RateLimitLayer::with_cost(limiter.clone(), |_: &Request<&str>| Cost::tokens(5)).layer(client);
    service.oneshot(with_tokens()).await.unwrap();
    assert_eq!(left(), 65);
}

#[tokio::test(start_paused = true)]
async fn requests_of_any_type_can_be_paced() {
    let (service, mut handle) = mock::pair::<u32, ()>();
    handle.allow(1);
    let limiter = limiter(Limits::new().tokens(Rate::per_second(1).burst(10)));
    let mut service = ServiceBuilder::new()
        .layer(RateLimitLayer::with_cost(limiter.clone(), |n: &u32| {
            Cost::tokens((*n).into())
        }))
        .service(service);
    let mut call = task::spawn(service.ready().await.unwrap().call(7));
    assert_pending!(call.poll());
    let (request, respond) = handle.next_request().await.unwrap();
    assert_eq!(request, 7);
    respond.send_response(());
    assert_ready_ok!(call.poll());
    assert_eq!(limiter.available().tokens, Some(3));
}

#[tokio::test(start_paused = true)]
async fn a_dropped_call_has_taken_nothing_from_any_bucket() {
    let (client, arrivals) = client(ms(0));
    let limiter = limiter(
        Limits::new()
            .requests(Rate::per_second(1).burst(10))
            .tokens(Rate::per_second(10).burst(100).initial(50)),
    );
    let mut service = RateLimitLayer::new(limiter.clone()).layer(client);
    let heavy = Request::get("/").extension(ApiTokens(100)).body("heavy").unwrap();
    let mut call = task::spawn(service.ready().await.unwrap().call(heavy));
    assert_pending!(call.poll());
    pass(ms(1_000)).await;
    drop(call);
    let left = limiter.available();
    assert_eq!((left.requests, left.tokens), (Some(10), Some(60)));
    assert_eq!(arrivals.times(), []);
}

#[tokio::test(start_paused = true)]
async fn a_cost_above_the_burst_fails_at_once() {
    let (client, _) = client(ms(0));
    let limiter = limiter(Limits::new().tokens(Rate::per_second(10)));
    let mut service = RateLimitLayer::new(limiter).layer(client);
    let heavy = Request::get("/").extension(ApiTokens(11)).body("heavy").unwrap();
    let error = assert_ready_err!(task::spawn(service.ready().await.unwrap().call(heavy)).poll());
    assert!(error.is::<CostExceedsBurst>());
}

#[tokio::test(start_paused = true)]
async fn a_call_that_was_never_polled_delays_no_other() {
    let (client, _) = client(ms(0));
    let limiter = limiter(Limits::new().requests(Rate::per_second(10).burst(1)));
    let mut service = RateLimitLayer::new(limiter).layer(client);
    let start = Instant::now();
    let _never = service.ready().await.unwrap().call(request("never"));
    service.ready().await.unwrap().call(request("call")).await.unwrap();
    assert_eq!(start.elapsed(), ms(0));
}

#[tokio::test(start_paused = true)]
async fn one_limiter_can_pace_several_services() {
    let (client, arrivals) = client(ms(0));
    let layer = RateLimitLayer::new(limiter(Limits::new().requests(Rate::per_second(10).burst(1))));
    let (a, b) = (layer.layer(client.clone()), layer.layer(client));
    let (a, b) = tokio::join!(a.oneshot(request("a")), b.oneshot(request("b")));
    a.unwrap();
    b.unwrap();
    assert_eq!(arrivals.times(), [ms(0), ms(100)]);
}
