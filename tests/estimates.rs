//! Tests of what a call is charged before its answer is known: declared tokens in each budget, and answers estimated by
//! those of the same model.

mod support;

use http::{Request, Response};
use std::{
    convert::Infallible,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use support::ms;
use tokio::time::{Instant, sleep};
use tower::{BoxError, Service, ServiceExt, service_fn};
use tower_outbound::{
    ApiTokens, ApiTokensUsed, Call, Cost, Executor, Limits, Rate, RateLimitLayer, RateLimiter, Shutdown, TokenUsage,
    error::CostExceedsBurst,
    provider::{CharacterEstimate, QuantileEstimate},
    rate::{ByUsage, CallKind, RequestCost, UsedCost},
};
use tracing_subscriber::layer::SubscriberExt;

/// Counts the warnings.
#[derive(Clone, Default)]
struct Warnings(Arc<AtomicUsize>);

impl<S: tracing::Subscriber> tracing_subscriber::Layer<S> for Warnings {
    fn on_event(&self, event: &tracing::Event<'_>, _: tracing_subscriber::layer::Context<'_, S>) {
        if *event.metadata().level() == tracing::Level::WARN {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Requests a minute, and input and output tokens apart.
fn apart() -> Limits {
    Limits::new()
        .requests(Rate::per_minute(60))
        .input_tokens(Rate::per_minute(30_000))
        .output_tokens(Rate::per_minute(8_000))
}

fn post(body: impl Into<String>) -> Request<String> {
    Request::post("http://localhost/v1/chat/completions")
        .body(body.into())
        .unwrap()
}

fn answered(input: u64, output: u64) -> Response<()> {
    let used = ApiTokensUsed::unknown();
    used.set_usage(TokenUsage::input_output(input, output));
    Response::builder().extension(used).body(()).unwrap()
}

/// An estimate that also records what each answered call was charged, with the tokens of its answer and the time of its
/// end.
#[derive(Clone)]
struct Recorded {
    estimate: QuantileEstimate,
    charges: Arc<Mutex<Vec<(u64, Cost)>>>,
}

impl RequestCost<Request<String>> for Recorded {
    fn cost(&self, req: &Request<String>) -> Cost {
        self.estimate.cost(req)
    }

    fn kind(&self, req: &Request<String>) -> Option<CallKind> {
        self.estimate.kind(req)
    }

    fn prepare(&self, req: &mut Request<String>) -> bool {
        self.estimate.prepare(req)
    }
}

impl UsedCost<Response<()>> for Recorded {
    fn used(&self, _: Cost, _: Result<&Response<()>, &BoxError>) -> Option<Cost> {
        unreachable!("calls are settled by their kind")
    }

    fn used_by_kind(
        &self,
        kind: Option<CallKind>,
        charged: Cost,
        result: Result<&Response<()>, &BoxError>,
    ) -> Option<Cost> {
        let used = self.estimate.used_by_kind(kind, charged, result)?;
        self.charges.lock().unwrap().push((used.output_tokens, charged));
        Some(used)
    }
}

#[tokio::test(start_paused = true)]
async fn the_calls_of_each_model_are_charged_by_its_own_answers_and_the_rate_is_used() {
    let recorded = Recorded {
        estimate: QuantileEstimate::new(0.95).unwrap(),
        charges: Arc::default(),
    };
    let begun = Instant::now();
    let started: Arc<Mutex<Vec<(Duration, u64)>>> = Arc::default();
    let log = started.clone();
    let client = service_fn(move |req: Request<String>| {
        let output = if req.body().contains("short") { 20 } else { 2_000 };
        log.lock().unwrap().push((begun.elapsed(), 10 + output));
        async move {
            sleep(ms(500)).await;
            Ok::<_, Infallible>(answered(10, output))
        }
    });
    let executor = Executor::builder()
        .queue_capacity(1_000)
        .concurrency_limit(20)
        .limits(Limits::new().tokens(Rate::per_minute(60_000).burst(12_000)))
        .estimate(recorded.clone())
        .build(client)
        .unwrap();
    executor.start().unwrap();
    // All calls are in the queue before the first answer is there.
    for _ in 0..400 {
        for model in ["short", "long"] {
            let prompt = "x".repeat(40);
            let body = format!(r#"{{"messages":[{{"content":"{prompt}"}}],"max_tokens":4000,"model":"{model}"}}"#);
            drop(executor.submit(post(body)).await.unwrap());
        }
    }
    executor.stop(Shutdown::Graceful).await;
    assert_eq!(executor.monitor().totals().completed, 800);

    let charges = recorded.charges.lock().unwrap();
    for output in [20, 2_000] {
        let of_model: Vec<_> = charges.iter().filter(|(answer, _)| *answer == output).collect();
        let is_estimated = |charged: &Cost| *charged == Cost::input_output_tokens(10, 4_000);
        let first = of_model.iter().take_while(|(_, charged)| is_estimated(charged)).count();
        // Besides the 20 calls that are needed, those that had a permit when the twentieth answer came.
        assert!((20..=40).contains(&first), "{first}");
        let rest = &of_model[first..];
        assert!(
            rest.iter()
                .all(|(_, charged)| *charged == Cost::input_output_tokens(10, output))
        );
        assert_eq!(of_model.len(), 400);
    }

    let started = started.lock().unwrap();
    let (last, others) = started.split_last().unwrap();
    let used: u64 = others.iter().map(|(_, tokens)| tokens).sum();
    let allowed = 12_000.0 + 1_000.0 * last.0.as_secs_f64();
    let share = used as f64 / allowed;
    assert!((0.97..=1.0).contains(&share), "{share}");
}

#[tokio::test(start_paused = true)]
async fn a_layer_without_an_executor_tells_models_apart_too() {
    let estimate = QuantileEstimate::new(1.0).unwrap();
    let limiter = RateLimiter::new(Limits::new().output_tokens(Rate::per_minute(1_000_000))).unwrap();
    let mut service = tower::ServiceBuilder::new()
        .layer(RateLimitLayer::with_cost(limiter, estimate.clone()).settle(estimate.clone()))
        .service(service_fn(async |req: Request<String>| {
            let output = if req.uri().path().contains("short") { 20 } else { 2_000 };
            Ok::<_, BoxError>(answered(10, output))
        }));
    for _ in 0..20 {
        for model in ["short", "long"] {
            let uri = format!("http://localhost/v1beta/models/{model}:generateContent");
            let request = Request::post(uri).body("{}".to_owned()).unwrap();
            service.ready().await.unwrap().call(request).await.unwrap();
        }
    }
    let answer_of = |model| estimate.answer_of(CallKind::of(model));
    assert_eq!((answer_of("short"), answer_of("long")), (Some(20), Some(2_000)));
    assert_eq!((answer_of("new"), estimate.answer()), (None, None));
}

#[tokio::test(start_paused = true)]
async fn models_share_a_quantile_where_a_cost_function_of_ones_own_hides_them() {
    let estimate = QuantileEstimate::new(1.0).unwrap();
    let inner = estimate.clone();
    let client = service_fn(async |_: Request<String>| Ok::<_, Infallible>(answered(10, 300)));
    let executor = Executor::builder()
        .limits(
            Limits::new()
                .tokens(Rate::per_minute(1_000_000))
                .budget("images", Rate::per_minute(1_000)),
        )
        .cost(move |req: &Request<String>| inner.cost(req).with("images", 2))
        .settle(estimate.clone())
        .build(client)
        .unwrap();
    executor.start().unwrap();
    for number in 0..20 {
        let body = format!(r#"{{"model":"m{number}","max_tokens":4000}}"#);
        executor.submit(post(body)).await.unwrap().await.unwrap();
    }
    assert_eq!(estimate.answer(), Some(300));
    assert_eq!(executor.monitor().available().of("images"), Some(960));
    executor.stop(Shutdown::Graceful).await;
}

#[test]
fn a_request_whose_body_was_replaced_is_read_again() {
    let estimate = QuantileEstimate::new(0.9).unwrap();
    let mut request = post(r#"{"model":"m","prompt":"12345678","max_tokens":5}"#);
    assert!(estimate.prepare(&mut request));
    // What an executor adds for the event is no declaration.
    request.extensions_mut().insert(ApiTokens(7));
    assert_eq!(estimate.cost(&request), Cost::input_output_tokens(2, 5));
    *request.body_mut() = r#"{"model":"other","prompt":"1234567890123456","max_tokens":50}"#.to_owned();
    estimate.prepare(&mut request);
    assert_eq!(estimate.cost(&request), Cost::input_output_tokens(4, 50));
    assert_eq!(estimate.kind(&request), Some(CallKind::of("other")));
    let declared = Cost::request().with("images", 1);
    request.extensions_mut().insert(declared);
    assert_eq!(estimate.cost(&request), declared);
}

#[tokio::test(start_paused = true)]
async fn declared_tokens_are_charged_to_each_budget_of_tokens_that_is_limited() {
    let client = service_fn(async |_: Request<String>| {
        sleep(ms(10)).await;
        Ok::<_, Infallible>(answered(700, 100))
    });
    let executor = Executor::builder()
        .limits(apart())
        .settle(ByUsage::default())
        .build(client)
        .unwrap();
    executor.start().unwrap();
    let left = || {
        let available = executor.monitor().available();
        (available.input_tokens.unwrap(), available.output_tokens.unwrap())
    };
    let call = executor.submit(Call::from(post("")).tokens(1_000)).await.unwrap();
    support::settle().await;
    assert_eq!(left(), (29_000, 7_000));
    assert_eq!(call.event().snapshot().api_tokens, 1_000);
    // The answer tells the kinds apart. It has taken 10 ms, in which the rates bring 5 and 1.
    call.await.unwrap();
    assert_eq!(left(), (29_305, 7_901));
    // Told apart, each budget is charged its own.
    let told = Call::from(post("")).cost(Cost::input_output_tokens(900, 300));
    let call = executor.submit(told).await.unwrap();
    support::settle().await;
    assert_eq!(left(), (28_405, 7_601));
    drop(call);
    executor.stop(Shutdown::Graceful).await;
}

#[tokio::test(start_paused = true)]
async fn declared_tokens_above_the_burst_of_a_kind_are_an_error_that_names_it() {
    let limiter = RateLimiter::new(apart()).unwrap();
    let client = || service_fn(async |_: Request<String>| Ok::<_, BoxError>(answered(1, 1)));
    let declared = || {
        let mut request = post("");
        request.extensions_mut().insert(ApiTokens(9_000));
        request
    };
    let budget_of = |error: &CostExceedsBurst| (error.budget(), error.cost(), error.burst());
    for executor in [
        Executor::builder().limiter(limiter.clone()).build(client()).unwrap(),
        Executor::builder()
            .limiter(limiter.clone())
            .cost(CharacterEstimate::new())
            .build(client())
            .unwrap(),
        Executor::builder()
            .limiter(limiter.clone())
            .estimate(QuantileEstimate::new(0.9).unwrap())
            .build(client())
            .unwrap(),
    ] {
        executor.start().unwrap();
        let error = executor.submit(declared()).await.unwrap_err();
        let found = error.find::<CostExceedsBurst>().unwrap();
        assert_eq!(budget_of(found), ("output_tokens", 9_000, 8_000));
    }
    let mut layered = tower::Layer::layer(&RateLimitLayer::new(limiter.clone()), client());
    let error = layered.ready().await.unwrap().call(declared()).await.unwrap_err();
    let found = error.downcast_ref::<CostExceedsBurst>().unwrap();
    assert_eq!(budget_of(found), ("output_tokens", 9_000, 8_000));
    assert_eq!(limiter.available().requests, Some(60));
}

#[tokio::test(start_paused = true)]
async fn the_wait_behind_queued_calls_counts_their_declared_tokens_in_each_budget() {
    let client = service_fn(async |_: Request<String>| Ok::<_, Infallible>(answered(1, 1)));
    let executor = Executor::builder()
        .limits(Limits::new().output_tokens(Rate::per_second(1_000)))
        .build(client)
        .unwrap();
    executor.start().unwrap();
    let mut calls = Vec::new();
    for _ in 0..10 {
        calls.push(executor.submit(Call::from(post("")).tokens(1_000)).await.unwrap());
    }
    // Ten calls take a second each but the first, so the next one waits for ten.
    let late = Call::from(post("")).tokens(1_000).timeout(ms(9_900));
    let error = executor.submit(late).await.unwrap_err();
    assert!(error.is_deadline_exceeded(), "{error:?}");
    let call = Call::from(post("")).tokens(1_000).timeout(ms(10_100));
    executor.submit(call).await.unwrap().await.unwrap();
    executor.stop(Shutdown::Graceful).await;
}

#[tokio::test(start_paused = true)]
async fn a_cost_that_names_tokens_but_none_of_the_limited_kinds_is_warned_of_once() {
    let warnings = Warnings::default();
    let _guard = tracing::subscriber::set_default(tracing_subscriber::registry().with(warnings.clone()));
    let warned = async |limits: Limits, cost: fn(&Request<String>) -> Cost| {
        let before = warnings.0.load(Ordering::Relaxed);
        let client = service_fn(async |_: Request<String>| Ok::<_, Infallible>(answered(1, 1)));
        let executor = Executor::builder().limits(limits).cost(cost).build(client).unwrap();
        executor.start().unwrap();
        for _ in 0..3 {
            executor.submit(post("")).await.unwrap().await.unwrap();
        }
        executor.stop(Shutdown::Graceful).await;
        warnings.0.load(Ordering::Relaxed) - before
    };
    assert_eq!(warned(apart(), |_| Cost::tokens(100)).await, 1);
    assert_eq!(warned(apart(), |_| ApiTokens(100).into()).await, 0);
    assert_eq!(warned(apart(), |_| Cost::request()).await, 0);
    let total = Limits::new().tokens(Rate::per_minute(1_000));
    assert_eq!(warned(total, |_| Cost::tokens(100)).await, 0);
}
