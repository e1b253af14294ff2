//! Tests of the guarantees of `RateLimitLayer`.

mod support;

use http::Request;
use std::{
    convert::Infallible,
    future::{Future, Ready, poll_fn, ready},
    pin::pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
    time::Duration,
};
use support::{client, ms, pass, request};
use tokio::{task::coop, time::Instant};
use tokio_test::{assert_pending, assert_ready_err, assert_ready_ok, task};
use tower::{Layer, Service, ServiceBuilder, ServiceExt};
use tower_outbound::{ApiTokens, Cost, Limits, Rate, RateLimitLayer, RateLimiter, error::CostExceedsBurst};
use tower_test::mock;

fn limiter(limits: Limits) -> RateLimiter {
    RateLimiter::new(limits).unwrap()
}

/// A cost has room for four names. A function that gives it more panics, which must stay with its call.
#[tokio::test(start_paused = true)]
async fn a_cost_of_a_fifth_named_budget_fails_its_call_and_no_other() {
    use tower::{BoxError, service_fn};
    use tower_outbound::{QueueLayer, error::Panicked};

    let limiter = RateLimiter::new(Limits::new().budget("layer-0", Rate::per_second(5))).unwrap();
    let cost = |names: &u64| {
        let named = (0..*names).map(|number| format!("layer-{number}"));
        named.fold(Cost::request(), |cost, name| cost.with(&*name, 1))
    };
    let service = ServiceBuilder::new()
        .layer(QueueLayer::new(10).unwrap())
        .layer(RateLimitLayer::with_cost(limiter.clone(), cost))
        .service(service_fn(|names: u64| async move { Ok::<_, BoxError>(names) }));
    let calls = [4, 5, 1].map(|names| service.clone().oneshot(names));
    let [four, five, one] = futures_util::future::join_all(calls).await.try_into().unwrap();
    assert_eq!((four.unwrap(), one.unwrap()), (4, 1));
    let error = five.unwrap_err();
    assert!(
        error.is::<Panicked>() || error.to_string().contains("panicked"),
        "{error}"
    );
    assert_eq!(limiter.available().of("layer-0"), Some(3));
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

#[tokio::test(start_paused = true)]
async fn a_call_that_waits_holds_no_place_of_the_inner_service() {
    let (service, mut handle) = mock::pair::<u32, ()>();
    let limiter = limiter(Limits::new().requests(Rate::per_second(1).burst(1)));
    let paced = RateLimitLayer::with_cost(limiter, |_: &u32| Cost::request()).layer(service.clone());
    handle.allow(1);
    let mut first = task::spawn(paced.clone().oneshot(1));
    assert_pending!(first.poll());
    let mut waits = task::spawn(paced.oneshot(2));
    assert_pending!(waits.poll());
    // The inner service has one place, and it is not reserved for the call that waits.
    handle.allow(1);
    let mut direct = service;
    assert_ready_ok!(task::spawn(direct.ready()).poll());
}

/// Records when each of its clones was asked to be ready and called.
#[derive(Clone, Default)]
struct Asked {
    at: Option<Instant>,
    ages: Arc<Mutex<Vec<Duration>>>,
}

impl Service<()> for Asked {
    type Response = ();
    type Error = Infallible;
    type Future = Ready<Result<(), Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.at = Some(Instant::now());
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, (): ()) -> Self::Future {
        let at = self.at.take().expect("called without having been ready");
        self.ages.lock().unwrap().push(at.elapsed());
        ready(Ok(()))
    }
}

#[tokio::test(start_paused = true)]
async fn the_inner_service_is_asked_to_be_ready_when_the_call_is_made() {
    let (service, begun) = (Asked::default(), Instant::now());
    let limiter = limiter(Limits::new().requests(Rate::per_minute(1).burst(1)));
    let mut paced = RateLimitLayer::with_cost(limiter, |(): &()| Cost::request()).layer(service.clone());
    for _ in 0..3 {
        paced.ready().await.unwrap().call(()).await.unwrap();
    }
    assert_eq!(begun.elapsed(), ms(120_000));
    assert_eq!(*service.ages.lock().unwrap(), [ms(0); 3]);
}

#[tokio::test(start_paused = true)]
async fn nothing_is_charged_while_the_inner_service_is_not_ready_and_no_other_call_waits_for_it() {
    let limiter = limiter(Limits::new().requests(Rate::per_second(10).burst(1)));
    let layer = RateLimitLayer::with_cost(limiter.clone(), |_: &u32| Cost::request());
    let (slow, mut slow_handle) = mock::pair::<u32, ()>();
    let (quick, mut quick_handle) = mock::pair::<u32, ()>();
    slow_handle.allow(0);
    quick_handle.allow(2);
    let mut slow = task::spawn(layer.layer(slow).oneshot(1));
    assert_pending!(slow.poll());
    assert_eq!(limiter.available().requests, Some(1));

    let mut quick = task::spawn(layer.layer(quick).oneshot(2));
    assert_pending!(quick.poll());
    assert_eq!(quick_handle.next_request().await.unwrap().0, 2);
    assert_eq!(limiter.available().requests, Some(0));

    // The token is gone when the service is ready. The call gives the readiness back and waits.
    slow_handle.allow(1);
    assert!(slow.is_woken());
    assert_pending!(slow.poll());
    pass(ms(100)).await;
    assert!(slow.is_woken());
    slow_handle.allow(1);
    assert_pending!(slow.poll());
    assert_eq!(slow_handle.next_request().await.unwrap().0, 1);
    assert_eq!(limiter.available().requests, Some(0));
}

/// The first call has waited for its turn, and its inner service is not ready then.
#[tokio::test(start_paused = true)]
async fn a_call_whose_inner_service_is_not_ready_at_its_turn_delays_the_next_one_by_five_milliseconds() {
    let limiter = limiter(Limits::new().requests(Rate::per_second(10).burst(1)));
    let layer = RateLimitLayer::with_cost(limiter.clone(), |_: &u32| Cost::request());
    limiter.try_acquire(Cost::request()).unwrap();
    let begun = Instant::now();
    let (slow, mut slow_handle) = mock::pair::<u32, ()>();
    slow_handle.allow(0);
    let slow = tokio::spawn(layer.layer(slow).oneshot(1));
    pass(ms(1)).await;
    let quick = RateLimitLayer::with_cost(limiter, |(): &()| Cost::request()).layer(Asked::default());
    quick.oneshot(()).await.unwrap();
    assert_eq!(begun.elapsed(), ms(105));
    slow_handle.allow(2);
    let (request, respond) = slow_handle.next_request().await.unwrap();
    assert_eq!(request, 1);
    respond.send_response(());
    slow.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_inner_service_that_fails_to_become_ready_fails_the_call_and_nothing_is_charged() {
    let (service, mut handle) = mock::pair::<u32, ()>();
    handle.send_error("not ready");
    let limiter = limiter(Limits::new().requests(Rate::per_second(1).burst(1)));
    let mut paced = RateLimitLayer::with_cost(limiter.clone(), |_: &u32| Cost::request()).layer(service);
    let mut failed = task::spawn(paced.call(1));
    assert_eq!(assert_ready_err!(failed.poll()).to_string(), "not ready");
    assert_eq!(limiter.available().requests, Some(1));
    limiter.try_acquire(Cost::request()).unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_loop_of_calls_that_need_not_wait_lets_other_tasks_run() {
    let limiter = limiter(Limits::new());
    let mut paced = RateLimitLayer::with_cost(limiter.clone(), |(): &()| Cost::request()).layer(Asked::default());
    // A call counts as one unit of the budget of 128.
    let other = tokio::spawn(async {});
    let mut calls = 0;
    while !other.is_finished() {
        calls += 1;
        assert!(calls < 1_000, "the task never yields");
        paced.ready().await.unwrap().call(()).await.unwrap();
    }
    assert!(calls > 100, "{calls}");

    let other = tokio::spawn(async {});
    let mut calls = 0;
    while !other.is_finished() {
        calls += 1;
        assert!(calls < 1_000, "the task never yields");
        limiter.acquire(Cost::request()).await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_wait_that_yields_has_taken_nothing() {
    let limiter = limiter(Limits::new().requests(Rate::per_second(1).burst(1)));
    while coop::has_budget_remaining() {
        coop::consume_budget().await;
    }
    let mut acquire = pin!(limiter.acquire(Cost::request()));
    poll_fn(|cx| {
        assert!(acquire.as_mut().poll(cx).is_pending());
        Poll::Ready(())
    })
    .await;
    assert_eq!(limiter.available().requests, Some(1));
    acquire.await.unwrap();
    assert_eq!(limiter.available().requests, Some(0));
}
