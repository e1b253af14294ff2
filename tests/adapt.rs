//! Limits that are found from a provider's rejections, against models of what providers enforce, on the paused clock.

mod support;

use http::{Request, Response};
use std::{
    convert::Infallible,
    sync::{Arc, Mutex},
    time::Duration,
};
use support::ms;
use tokio::time::{Instant, sleep};
use tower::{Layer, ServiceExt, retry::RetryLayer, service_fn};
use tower_outbound::{
    Cost, Executor, Limits, Rate, RateLimiter,
    provider::{FeedbackLayer, Provider},
    retry::RetryPolicy,
};

/// A model of nginx's `limit_req rate=... burst=... nodelay`: a leaky bucket whose level falls at the rate. A request
/// that would raise the level above the burst is answered at once with `status`, and does not count.
struct Nginx {
    rate: f64,
    burst: f64,
    status: u16,
    retry_after: Option<u64>,
    /// A server that fails with 503 at random, for this share of the requests.
    failing: f64,
    random: fastrand::Rng,
    level: f64,
    last: Instant,
    accepted: usize,
    rejected: usize,
}

type Shared = Arc<Mutex<Nginx>>;

fn nginx(rate: f64, status: u16) -> Shared {
    Arc::new(Mutex::new(Nginx {
        rate,
        burst: 9.0,
        status,
        retry_after: None,
        failing: 0.0,
        random: fastrand::Rng::with_seed(1),
        level: 0.0,
        last: Instant::now(),
        accepted: 0,
        rejected: 0,
    }))
}

impl Nginx {
    fn respond(&mut self) -> Response<String> {
        if self.random.f64() < self.failing {
            return Response::builder().status(503).body(String::new()).unwrap();
        }
        let now = Instant::now();
        let leaked = now.duration_since(self.last).as_secs_f64() * self.rate;
        let level = (self.level - leaked).max(0.0);
        if level > self.burst {
            self.rejected += 1;
            let mut response = Response::builder().status(self.status);
            if let Some(seconds) = self.retry_after {
                response = response.header("retry-after", seconds);
            }
            return response.body(String::new()).unwrap();
        }
        (self.level, self.last) = (level + 1.0, now);
        self.accepted += 1;
        Response::new(String::new())
    }
}

/// Returns an executor that is told `told` per second, and its limiter. A response takes `latency`, a rejection comes at
/// once.
fn executor(nginx: &Shared, told: u64, latency: Duration, seed: u64) -> (Executor<String, String>, RateLimiter) {
    let rate = Rate::per_minute(told * 60).burst(told).initial(told);
    let limiter = RateLimiter::new(Limits::new().requests(rate)).unwrap();
    let nginx = nginx.clone();
    let client = service_fn(move |_: Request<String>| {
        let nginx = nginx.clone();
        async move {
            sleep(ms(1)).await;
            let response = nginx.lock().unwrap().respond();
            if response.status().is_success() {
                sleep(latency).await;
            }
            Ok::<_, Infallible>(response)
        }
    });
    let client = FeedbackLayer::new(limiter.clone(), Provider::Ietf)
        .adapt()
        .layer(client);
    let retries = RetryPolicy::new().max_retries(8).budget(None).seed(seed);
    let executor = Executor::builder()
        .queue_capacity(100)
        .concurrency_limit(32.max(2 * told as usize * latency.as_millis() as usize / 1_000))
        .limiter(limiter.clone())
        .layer(RetryLayer::new(retries))
        .build(client)
        .unwrap();
    executor.start().unwrap();
    (executor, limiter)
}

async fn submit(executor: &Executor<String, String>, count: usize) -> usize {
    let mut calls = Vec::new();
    for _ in 0..count {
        let call = executor.submit(Request::new(String::new())).await.unwrap();
        calls.push(tokio::spawn(call));
    }
    let mut done = 0;
    for call in calls {
        done += usize::from(call.await.unwrap().is_ok_and(|response| response.status().is_success()));
    }
    done
}

/// Returns how many requests were accepted and rejected so far.
fn counts(nginx: &Shared) -> (usize, usize) {
    let nginx = nginx.lock().unwrap();
    (nginx.accepted, nginx.rejected)
}

/// Returns the amount per second that the limiter admits now.
fn per_second(limiter: &RateLimiter) -> f64 {
    limiter.limits().rates().map(|(_, rate)| rate.amount()).sum::<f64>() / 60.0
}

#[tokio::test(start_paused = true)]
async fn limits_that_are_twice_as_high_as_the_providers_cost_a_few_percent_of_the_time() {
    // The provider needs 9.9 s for 1,000 requests.
    for (status, latency, bar) in [
        (429, ms(1), ms(10_200)),
        (503, ms(1), ms(10_200)),
        (429, ms(2_000), ms(12_500)),
    ] {
        let nginx = nginx(100.0, status);
        let (executor, _) = executor(&nginx, 200, latency, 1);
        let start = Instant::now();
        assert_eq!(submit(&executor, 1_000).await, 1_000);
        let took = start.elapsed();
        assert!(took <= bar, "{status}, {latency:?}: {took:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_provider_that_asks_for_pauses_is_not_asked_for_many() {
    let nginx = nginx(100.0, 429);
    nginx.lock().unwrap().retry_after = Some(1);
    let (executor, _) = executor(&nginx, 200, ms(1), 1);
    let start = Instant::now();
    assert_eq!(submit(&executor, 1_000).await, 1_000);
    let took = start.elapsed();
    // Four pauses of a second.
    assert!(took <= ms(14_000), "{took:?}");
    assert!(counts(&nginx).1 <= 40, "{:?}", counts(&nginx));
}

#[tokio::test(start_paused = true)]
async fn a_rejection_that_asks_for_no_time_at_all_is_not_a_pause() {
    let took = async |retry_after| {
        let nginx = nginx(100.0, 429);
        nginx.lock().unwrap().retry_after = retry_after;
        let (executor, _) = executor(&nginx, 200, ms(1), 1);
        let start = Instant::now();
        assert_eq!(submit(&executor, 1_000).await, 1_000);
        start.elapsed()
    };
    assert_eq!(took(Some(0)).await, took(None).await);
}

#[tokio::test(start_paused = true)]
async fn limits_that_are_right_are_left_alone() {
    let nginx = nginx(100.0, 429);
    let (executor, limiter) = executor(&nginx, 100, ms(1), 1);
    // The limiter's burst is above that of the provider, so the first calls are rejected.
    assert_eq!(submit(&executor, 1_000).await, 1_000);
    sleep(Duration::from_secs(20)).await;
    assert_eq!(submit(&executor, 1).await, 1);
    assert!((per_second(&limiter) - 100.0).abs() < 1e-9, "{}", per_second(&limiter));
}

#[tokio::test(start_paused = true)]
async fn a_server_that_fails_now_and_then_does_not_lower_the_limits() {
    let nginx = nginx(200.0, 429);
    nginx.lock().unwrap().burst = 1_000.0;
    nginx.lock().unwrap().failing = 0.02;
    let (executor, limiter) = executor(&nginx, 100, ms(50), 1);
    for _ in 0..60 {
        assert_eq!(submit(&executor, 100).await, 100);
        assert!((per_second(&limiter) - 100.0).abs() < 1e-9, "{}", per_second(&limiter));
    }
}

#[tokio::test(start_paused = true)]
async fn a_limit_that_halves_is_followed_within_3_s_and_one_that_doubles_within_15_s() {
    let nginx = nginx(100.0, 429);
    let (executor, limiter) = executor(&nginx, 200, ms(1), 1);
    let work = tokio::spawn(async move { submit(&executor, 40_000).await });
    for (rate, within) in [(100.0, 3), (50.0, 3), (100.0, 15), (200.0, 15), (50.0, 3)] {
        nginx.lock().unwrap().rate = rate;
        sleep(Duration::from_secs(within)).await;
        let before = counts(&nginx);
        sleep(Duration::from_secs(20)).await;
        let after = counts(&nginx);
        let share = (after.0 - before.0) as f64 / (20.0 * rate);
        let rejected = (after.1 - before.1) as f64 / (20.0 * rate);
        assert!((0.97..1.01).contains(&share), "{rate} per second: {share}");
        assert!(rejected < 0.01, "{rate} per second: {rejected}");
        assert!(per_second(&limiter) <= 200.0);
    }
    work.abort();
}

#[tokio::test(start_paused = true)]
async fn two_clients_that_share_one_limit_get_equal_shares() {
    for told in [[200, 200], [200, 400]] {
        let shared = nginx(100.0, 429);
        let (first, one) = executor(&shared, told[0], ms(1), 1);
        let (second, two) = executor(&shared, told[1], ms(1), 2);
        let work = tokio::spawn(async move { submit(&first, 40_000).await });
        // The second client comes when the first one uses all that the provider allows.
        sleep(Duration::from_secs(20)).await;
        let more = tokio::spawn(async move { submit(&second, 40_000).await });
        sleep(Duration::from_secs(20)).await;
        let before = counts(&shared);
        let mut means = [0.0, 0.0];
        for _ in 0..200 {
            sleep(ms(100)).await;
            means[0] += per_second(&one) / 200.0;
            means[1] += per_second(&two) / 200.0;
        }
        let after = counts(&shared);
        assert!(after.0 - before.0 >= 1_950, "{}", after.0 - before.0);
        assert!(after.1 - before.1 <= 40, "{}", after.1 - before.1);
        assert!(means.iter().all(|mean| (42.0..58.0).contains(mean)), "{means:?}");
        work.abort();
        more.abort();
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_that_needs_the_configured_burst_waits_while_the_rates_are_lowered() {
    let rate = Rate::per_minute(60_000_u64).burst(60_000_u64).initial(0_u64);
    let limiter = RateLimiter::new(Limits::new().tokens(rate)).unwrap();
    let large = tokio::spawn({
        let limiter = limiter.clone();
        async move { limiter.acquire(Cost::tokens(58_000)).await }
    });
    let nginx = nginx(0.0, 429);
    nginx.lock().unwrap().burst = -1.0;
    let client = service_fn(move |_: Request<String>| {
        let response = nginx.lock().unwrap().respond();
        async move { Ok::<_, Infallible>(response) }
    });
    let client = FeedbackLayer::new(limiter.clone(), Provider::Ietf)
        .adapt()
        .layer(client);
    let response = client.oneshot(Request::new(String::new())).await.unwrap();
    assert_eq!(response.status(), 429);
    assert_eq!(per_second(&limiter), 900.0);
    assert_eq!(large.await.unwrap(), Ok(()));
}
