//! Limiters that follow the buckets of a provider, against a model that enforces them exactly, on the paused clock.

mod support;

use http::{Request, Response};
use std::time::{Duration, SystemTime};
use support::{
    ms,
    refilling_provider::{Headers, Provider as Model},
};
use tokio::time::{Instant, sleep};
use tower::{Layer, ServiceExt, retry::RetryLayer};
use tower_outbound::{
    ApiTokens, Cost, Executor, Limits, Rate, RateLimiter,
    provider::{FeedbackLayer, Learned, Provider, Source},
    rate::Budget,
    retry::RetryPolicy,
};

const SECOND: Duration = Duration::from_secs(1);

struct Client {
    executor: Executor<u64, &'static str>,
    limiter: RateLimiter,
    feedback: FeedbackLayer,
}

/// Returns a client of `model` that follows it up to `most`.
fn client(model: &Model, headers: Provider, most: Limits, seed: u64) -> Client {
    let limiter = RateLimiter::new(most).unwrap();
    let feedback = FeedbackLayer::new(limiter.clone(), headers).follow();
    let retries = RetryPolicy::new().max_retries(8).budget(None).seed(seed);
    let executor = Executor::builder()
        .queue_capacity(10_000)
        .concurrency_limit(1_000)
        .limiter(limiter.clone())
        .layer(RetryLayer::new(retries))
        .build(feedback.layer(model.client()))
        .unwrap();
    executor.start().unwrap();
    Client {
        executor,
        limiter,
        feedback,
    }
}

/// Makes `count` calls of `tokens` tokens, and returns how long they take.
async fn run(client: &Client, count: usize, tokens: u64) -> Duration {
    let start = Instant::now();
    let mut calls = Vec::new();
    for _ in 0..count {
        let mut request = Request::new(tokens);
        request.extensions_mut().insert(ApiTokens(tokens));
        calls.push(tokio::spawn(client.executor.submit(request).await.unwrap()));
    }
    for call in calls {
        assert!(call.await.unwrap().unwrap().status().is_success());
    }
    start.elapsed()
}

/// Keeps the client busy with calls of 100 tokens.
fn keep_busy(client: Client) -> tokio::task::JoinHandle<Duration> {
    tokio::spawn(async move { run(&client, 9_000, 100).await })
}

fn per_minute(requests: u64, tokens: u64) -> Limits {
    Limits::new()
        .requests(Rate::per_minute(requests))
        .tokens(Rate::per_minute(tokens))
}

const DIALECTS: [(Headers, Provider); 2] = [
    (Headers::OpenAi, Provider::OpenAi),
    (Headers::Anthropic, Provider::Anthropic),
];

#[tokio::test(start_paused = true)]
async fn a_short_job_uses_at_once_what_is_left() {
    for (headers, dialect) in DIALECTS {
        let rates = [
            Rate::per_minute(60),
            Rate::per_minute(60).initial(0),
            Rate::per_minute(600),
        ];
        for (rate, way) in rates.into_iter().flat_map(|rate| [(rate, ms(1)), (rate, ms(50))]) {
            let model = Model::new(60.0, 1e9, headers, way);
            let client = client(&model, dialect, Limits::new().requests(rate), 1);
            let start = Instant::now();
            let took = run(&client, 60, 1).await;
            assert!(took <= ms(3_000), "{took:?}");
            assert!(model.counts(start).1 <= 1, "{:?}", model.counts(start));
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_job_of_a_minutes_amount_is_done_in_seconds() {
    for (headers, dialect) in DIALECTS {
        let model = Model::new(600.0, 60_000.0, headers, ms(40));
        let client = client(&model, dialect, per_minute(600, 60_000), 1);
        let start = Instant::now();
        let took = run(&client, 600, 100).await;
        assert!(took <= 10 * SECOND, "{took:?}");
        assert!(model.counts(start).1 <= 3, "{:?}", model.counts(start));
    }
}

#[tokio::test(start_paused = true)]
async fn a_limit_that_differs_from_the_configured_one_or_changes_is_followed_within_10_s() {
    for (headers, dialect) in DIALECTS {
        for way in [ms(1), ms(50), ms(500), ms(1_000)] {
            let model = Model::new(300.0, 30_000.0, headers, way);
            let client = client(&model, dialect, per_minute(1_200, 120_000), 1);
            let work = keep_busy(client);
            let start = Instant::now();
            for rate in [300.0, 600.0, 150.0, 1_200.0, 300.0] {
                model.change(|requests, tokens| {
                    for (bucket, rate) in [(requests, rate), (tokens, rate * 100.0)] {
                        (bucket.limit, bucket.capacity) = (rate, rate);
                        bucket.held = bucket.held.min(rate);
                    }
                });
                let changed = Instant::now();
                sleep(10 * SECOND).await;
                let before = model.counts(changed);
                sleep(20 * SECOND).await;
                let after = model.counts(changed);
                let share = (after.0 - before.0) as f64 / (rate / 3.0);
                assert!(share >= 0.95, "{share}");
            }
            let total = model.counts(start);
            // What was sent before a limit fell is covered by the reserve.
            assert!(total.1 as f64 <= 0.001 * total.0 as f64, "{way:?}: {total:?}");
            work.abort();
        }
    }
}

#[tokio::test(start_paused = true)]
async fn clients_that_share_an_account_take_equal_shares() {
    for (headers, dialect) in DIALECTS {
        let ways = [1, 50, 250, 500, 1_000].map(ms);
        for (way, joins) in ways.into_iter().flat_map(|way| [(way, 0), (way, 15)]) {
            let model = Model::new(600.0, 60_000.0, headers, way);
            let start = Instant::now();
            let one = client(&model, dialect, per_minute(600, 60_000), 1);
            let two = client(&model, dialect, per_minute(1_200, 120_000), 2);
            let monitors = [one.executor.monitor().clone(), two.executor.monitor().clone()];
            let done = || monitors.each_ref().map(|monitor| monitor.totals().completed);
            let first = keep_busy(one);
            sleep(joins * SECOND).await;
            let second = keep_busy(two);
            sleep(10 * SECOND).await;
            let before = done();
            sleep(60 * SECOND).await;
            let (after, total) = (done(), model.counts(start));
            let shares = [0, 1].map(|of| (after[of] - before[of]) as f64 / 600.0);
            assert!(shares[0] + shares[1] >= 0.95, "{shares:?}");
            assert!(shares.iter().all(|share| (0.42..0.58).contains(share)), "{shares:?}");
            assert!(total.1 as f64 <= 0.01 * total.0 as f64, "{way:?}, {joins}: {total:?}");
            first.abort();
            second.abort();
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_report_that_is_not_true_neither_stops_nor_frees_all_calls() {
    for (limit, remaining) in [(1, 0), (u64::MAX, u64::MAX), (600, 0), (0, 0), (600, u64::MAX)] {
        let model = Model::new(1e9, 1e12, Headers::Lie(limit, remaining), ms(10));
        let client = client(&model, Provider::OpenAi, per_minute(600, 60_000), 1);
        let work = keep_busy(client);
        let start = Instant::now();
        sleep(60 * SECOND).await;
        let (accepted, _) = model.counts(start);
        assert!((6..=1_201).contains(&accepted), "{limit}, {remaining}: {accepted}");
        work.abort();
    }
}

#[tokio::test(start_paused = true)]
async fn a_configured_burst_is_the_most_at_one_instant() {
    let model = Model::new(600.0, 1e9, Headers::OpenAi, ms(10));
    let most = Limits::new().requests(Rate::per_minute(600).burst(5));
    let work = keep_busy(client(&model, Provider::OpenAi, most, 1));
    let start = Instant::now();
    sleep(10 * SECOND).await;
    let (accepted, rejected) = model.counts(start);
    assert!(
        (95..=106).contains(&accepted) && rejected == 0,
        "{accepted}, {rejected}"
    );
    work.abort();
}

#[tokio::test(start_paused = true)]
async fn where_the_provider_tells_nothing_its_rejections_do() {
    let model = Model::new(300.0, 1e9, Headers::None, ms(20));
    model.change(|requests, _| (requests.capacity, requests.held) = (5.0, 5.0));
    let most = Limits::new().requests(Rate::per_minute(600).burst(10));
    let client = client(&model, Provider::OpenAi, most, 1);
    let feedback = client.feedback.clone();
    let work = keep_busy(client);
    sleep(10 * SECOND).await;
    let from = Instant::now();
    sleep(30 * SECOND).await;
    let (accepted, rejected) = model.counts(from);
    assert!(accepted >= 142 && rejected <= 8, "{accepted}, {rejected}");
    let learned = &feedback.learned()[0];
    assert_eq!((learned.source, learned.level), (Source::Found, None));
    assert!((250.0..360.0).contains(&learned.amount), "{learned:?}");
    work.abort();
}

#[tokio::test(start_paused = true)]
async fn where_the_provider_tells_nothing_one_call_in_a_hundred_is_rejected_after_the_limit_was_found() {
    // With a round trip of a second, each try costs several calls.
    for (limit, way, bound) in [(300.0, ms(20), 0.01), (300.0, ms(500), 0.0125), (550.0, ms(500), 0.01)] {
        let model = Model::new(limit, 1e9, Headers::None, way);
        model.change(|requests, _| (requests.capacity, requests.held) = (5.0, 5.0));
        let most = Limits::new().requests(Rate::per_minute(600).burst(10));
        let work = keep_busy(client(&model, Provider::OpenAi, most, 1));
        // The limit is found twice.
        sleep(60 * SECOND).await;
        let from = Instant::now();
        sleep(540 * SECOND).await;
        let (accepted, rejected) = model.counts(from);
        assert!(accepted as f64 >= 0.95 * limit * 9.0, "{limit}, {way:?}: {accepted}");
        assert!(
            rejected as f64 <= bound * accepted as f64,
            "{limit}, {way:?}: {accepted}, {rejected}"
        );
        work.abort();
    }
}

#[tokio::test(start_paused = true)]
async fn no_more_than_a_seconds_requests_are_sent_before_the_first_response_for_2_s() {
    let model = Model::new(1_200.0, 1e9, Headers::OpenAi, ms(5_000));
    let work = keep_busy(client(&model, Provider::OpenAi, per_minute(600, 1_000_000), 1));
    sleep(ms(4_999)).await;
    let start = Instant::now();
    sleep(ms(1_900)).await;
    assert_eq!(model.counts(start).0, 10);
    sleep(SECOND).await;
    assert!((18..=20).contains(&model.counts(start).0), "{:?}", model.counts(start));
    work.abort();
}

#[tokio::test(start_paused = true)]
async fn what_was_learned_can_be_read() {
    let model = Model::new(300.0, 30_000.0, Headers::OpenAi, ms(10));
    model.change(|requests, tokens| (requests.held, tokens.held) = (101.0, 20_100.0));
    let client = client(&model, Provider::OpenAi, per_minute(600, 60_000), 1);
    run(&client, 1, 100).await;
    let learned: Vec<Learned> = client.feedback.learned();
    let told = learned.iter().map(|of| (of.budget, of.amount, of.capacity, of.source));
    assert_eq!(
        told.collect::<Vec<_>>(),
        [
            (Budget::Requests, 300.0, Some(300), Source::Told),
            (Budget::Tokens, 30_000.0, Some(30_000), Source::Told),
        ]
    );
    assert!(
        client
            .limiter
            .limits()
            .rates()
            .all(|(_, rate)| rate.amount() <= 30_000.0)
    );
}

/// Returns the response of a provider with these headers to one call through `feedback`.
async fn respond(feedback: &FeedbackLayer, pairs: &[(&'static str, &'static str)]) {
    let mut response = Response::builder();
    for (name, value) in pairs {
        response = response.header(*name, *value);
    }
    let response = response.body(()).unwrap();
    let client = tower::service_fn(move |_: Request<()>| std::future::ready(Ok::<_, ()>(response.clone())));
    feedback.layer(client).oneshot(Request::new(())).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn limits_of_input_and_output_tokens_and_of_a_day_are_applied_to_their_rates() {
    let limits = Limits::new()
        .requests(Rate::per_minute(100))
        .requests(Rate::per_day(1_000))
        .input_tokens(Rate::per_minute(1_000))
        .output_tokens(Rate::per_minute(1_000));
    let limiter = RateLimiter::new(limits).unwrap();
    let feedback = FeedbackLayer::new(limiter.clone(), Provider::Anthropic);
    let pairs = [
        ("anthropic-ratelimit-input-tokens-remaining", "500"),
        ("anthropic-ratelimit-output-tokens-remaining", "200"),
    ];
    respond(&feedback, &pairs).await;
    let available = limiter.available();
    assert_eq!(
        (available.input_tokens, available.output_tokens),
        (Some(500), Some(200))
    );
    // 990 of 1,000 are filled in 14 minutes and a bit: a day's limit.
    let feedback = FeedbackLayer::new(limiter.clone(), Provider::OpenAi);
    let pairs = [
        ("x-ratelimit-limit-requests", "1000"),
        ("x-ratelimit-remaining-requests", "10"),
        ("x-ratelimit-reset-requests", "23h45m36s"),
    ];
    respond(&feedback, &pairs).await;
    assert_eq!(limiter.available().requests, Some(10));
    sleep(60 * SECOND).await;
    let pairs = [
        ("x-ratelimit-limit-requests", "100"),
        ("x-ratelimit-remaining-requests", "5"),
        ("x-ratelimit-reset-requests", "57s"),
    ];
    respond(&feedback, &pairs).await;
    assert_eq!(limiter.available().requests, Some(5));
    sleep(60 * SECOND).await;
    assert_eq!(limiter.available().requests, Some(11));
}

#[tokio::test(start_paused = true)]
async fn of_an_organizations_and_a_projects_limit_the_lower_one_is_followed() {
    let limiter = RateLimiter::new(Limits::new().tokens(Rate::per_minute(60_000))).unwrap();
    let feedback = FeedbackLayer::new(limiter.clone(), Provider::OpenAi).follow();
    let pairs = [
        ("x-ratelimit-limit-tokens", "50000"),
        ("x-ratelimit-remaining-tokens", "49000"),
        ("x-ratelimit-limit-project-tokens", "30000"),
        ("x-ratelimit-remaining-project-tokens", "9000"),
    ];
    respond(&feedback, &pairs).await;
    let learned = feedback.learned()[0];
    assert_eq!((learned.amount, learned.capacity), (30_000.0, Some(30_000)));
    assert!(limiter.available().tokens <= Some(9_000), "{:?}", limiter.available());
}

/// Headers of Groq, whose requests are those of a day.
async fn report_day(feedback: &FeedbackLayer, limit: &'static str, remaining: &'static str) {
    let pairs = [
        ("x-ratelimit-limit-requests", limit),
        ("x-ratelimit-remaining-requests", remaining),
    ];
    respond(feedback, &pairs).await;
}

#[tokio::test(start_paused = true)]
async fn a_rate_by_the_calendar_is_lowered_to_what_is_reported_and_never_raised_before_its_day_ends() {
    let limits = Limits::new().requests(Rate::utc_day(1_000));
    let ten_hours = SystemTime::UNIX_EPOCH + 14 * 3_600 * SECOND;
    let limiter = RateLimiter::at(limits, ten_hours).unwrap();
    let feedback = FeedbackLayer::new(limiter.clone(), Provider::Groq).follow();
    report_day(&feedback, "1000", "300").await;
    assert_eq!(limiter.available().requests, Some(300));
    // What others seem to give back is not taken.
    report_day(&feedback, "5000", "4000").await;
    assert_eq!(limiter.available().requests, Some(300));
    let learned = feedback.learned()[0];
    assert_eq!(
        (learned.amount, learned.level, learned.source),
        (1_000.0, Some(300), Source::Told)
    );
    for _ in 0..100 {
        limiter.acquire(Cost::request()).await.unwrap();
    }
    report_day(&feedback, "1000", "150").await;
    assert_eq!(limiter.available().requests, Some(150));
    sleep(9 * 3_600 * SECOND).await;
    assert_eq!(limiter.available().requests, Some(150));
    sleep(2 * 3_600 * SECOND).await;
    assert_eq!(limiter.available().requests, Some(1_000));
}

#[tokio::test(start_paused = true)]
async fn a_lower_limit_of_a_day_is_followed_beside_that_of_a_minute() {
    let limits = Limits::new()
        .requests(Rate::utc_day(1_000))
        .tokens(Rate::per_minute(60_000));
    let limiter = RateLimiter::at(limits, SystemTime::UNIX_EPOCH).unwrap();
    let feedback = FeedbackLayer::new(limiter.clone(), Provider::Groq).follow();
    let pairs = [
        ("x-ratelimit-limit-requests", "400"),
        ("x-ratelimit-remaining-requests", "20"),
        ("x-ratelimit-limit-tokens", "30000"),
        ("x-ratelimit-remaining-tokens", "9000"),
    ];
    respond(&feedback, &pairs).await;
    let amounts: Vec<f64> = limiter.limits().rates().map(|(_, rate)| rate.amount()).collect();
    assert_eq!(amounts, [400.0, 30_000.0]);
    assert_eq!(limiter.available().requests, Some(20));
    sleep(24 * 3_600 * SECOND).await;
    assert_eq!(limiter.available().requests, Some(400));
    // The limit is raised again, but not above the configured one.
    report_day(&feedback, "2000", "2000").await;
    assert_eq!(limiter.limits().rates().next().unwrap().1.amount(), 1_000.0);
}

#[tokio::test(start_paused = true)]
async fn a_report_about_the_day_before_does_not_lower_the_new_one() {
    let limits = Limits::new().requests(Rate::utc_day(1_000));
    let midnight = SystemTime::UNIX_EPOCH + 24 * 3_600 * SECOND - SECOND;
    let limiter = RateLimiter::at(limits, midnight).unwrap();
    let feedback = FeedbackLayer::new(limiter.clone(), Provider::Groq).follow();
    let response = Response::builder().header("x-ratelimit-remaining-requests", "3");
    let response = response.body(()).unwrap();
    let client = tower::service_fn(move |_: Request<()>| {
        let response = response.clone();
        async move {
            sleep(2 * SECOND).await;
            Ok::<_, ()>(response)
        }
    });
    feedback.layer(client).oneshot(Request::new(())).await.unwrap();
    assert_eq!(limiter.available().requests, Some(1_000));
}
