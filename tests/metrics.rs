//! Tests of metrics: each call is counted exactly once in each, whatever becomes of it.

mod support;

use http::{Request, Response, StatusCode};
use metrics_util::debugging::{DebugValue, DebuggingRecorder, Snapshotter};
use std::{
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};
use support::{client, ms, request, settle};
use tokio::time::sleep;
use tower::{BoxError, Service, ServiceBuilder, ServiceExt, service_fn};
use tower_outbound::{
    ApiTokensUsed, Call, Cost, EventLayer, Events, Executor, Limits, Rate, RateLimitLayer, RateLimiter, Shutdown,
    metrics::{INSTRUMENTS, InstrumentKind, Metrics},
    retry::RetryPolicy,
};

/// What was recorded since the last look: the values of each metric, by its name and labels as in
/// `name{label=value, …}`.
#[derive(Debug, Default)]
struct Page(BTreeMap<String, Vec<f64>>);

impl Page {
    fn of(snapshotter: &Snapshotter) -> Self {
        let mut page = BTreeMap::new();
        for (key, _, _, value) in snapshotter.snapshot().into_vec() {
            let key = key.key();
            let labels: Vec<_> = key
                .labels()
                .map(|label| format!("{}={}", label.key(), label.value()))
                .collect();
            let name = if labels.is_empty() {
                key.name().to_owned()
            } else {
                format!("{}{{{}}}", key.name(), labels.join(", "))
            };
            let values = match value {
                DebugValue::Counter(count) => vec![count as f64],
                DebugValue::Gauge(value) => vec![value.into_inner()],
                DebugValue::Histogram(values) => values.into_iter().map(f64::from).collect(),
            };
            page.insert(name, values);
        }
        Self(page)
    }

    /// The values of a metric, of which counters that are zero have none.
    fn values(&self, name: &str) -> Vec<f64> {
        let values = self.0.get(name).cloned().unwrap_or_default();
        if values == [0.0] { Vec::new() } else { values }
    }

    /// The metrics whose names begin so and that have values other than zero.
    fn named(&self, start: &str) -> Vec<(&str, f64)> {
        self.0
            .iter()
            .filter(|(name, values)| name.starts_with(start) && values.iter().any(|value| *value != 0.0))
            .map(|(name, values)| (name.as_str(), values.iter().sum()))
            .collect()
    }
}

/// Returns metrics, and what they record.
fn metrics() -> (Metrics, Snapshotter) {
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    (Metrics::new().recorder(recorder), snapshotter)
}

const REQUESTS: &str = "http.client.request.duration{http.request.method=GET, server.address=localhost, server.port=80, \
                        http.response.status_code=200}";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_ten_thousand_quick_calls_each_is_counted_exactly_once_in_every_metric() {
    const CALLS: usize = 10_000;
    let (metrics, recorded) = metrics();
    let quick = service_fn(async |_: Request<&'static str>| Ok::<_, Infallible>(Response::new("")));
    let executor = Executor::builder()
        .limits(
            Limits::new()
                .requests(Rate::per_second(1_000_000))
                .tokens(Rate::per_second(1_000_000)),
        )
        .observe(metrics.gen_ai("chat", "openai"))
        .build(quick)
        .unwrap();
    executor.start().unwrap();
    // A subscriber that never reads, and a server that never scrapes, hold up nothing.
    let _slow = executor.monitor().subscribe();
    let calls = (0..CALLS).map(|_| {
        let executor = executor.clone();
        async move {
            let call = Call::from(request("call")).tokens(10);
            executor.submit(call).await.unwrap().await.unwrap()
        }
    });
    futures_util::future::join_all(calls).await;
    executor.stop(Shutdown::Graceful).await;
    let page = Page::of(&recorded);
    for histogram in [
        REQUESTS,
        "outbound.call.duration{outbound.status=COMPLETED}",
        "gen_ai.client.operation.duration{gen_ai.operation.name=chat, gen_ai.provider.name=openai}",
    ] {
        assert_eq!(page.0[histogram].len(), CALLS, "{histogram}");
    }
    let count = CALLS as f64;
    assert_eq!(
        page.named("outbound.calls"),
        [("outbound.calls{outbound.status=COMPLETED}", count)]
    );
    assert_eq!(
        page.named("outbound.charged"),
        // Of what kind the tokens are is not known, so they are charged to the budgets of both.
        [
            ("outbound.charged{outbound.budget=input_tokens}", 10.0 * count),
            ("outbound.charged{outbound.budget=output_tokens}", 10.0 * count),
            ("outbound.charged{outbound.budget=requests}", count),
            ("outbound.charged{outbound.budget=tokens}", 10.0 * count)
        ]
    );
    for never in [
        "outbound.refused",
        "outbound.throttled",
        "outbound.retries",
        "outbound.used",
    ] {
        assert_eq!(page.named(never), [], "{never}");
    }
}

#[tokio::test(start_paused = true)]
async fn waits_are_counted_by_cause_and_budget() {
    let (metrics, recorded) = metrics();
    let limits = Limits::new()
        .requests(Rate::per_second(2).burst(1))
        .budget("images", Rate::per_second(10).burst(20));
    let executor = Executor::builder()
        .limits(limits)
        .observe(metrics)
        .build(client(ms(0)).0)
        .unwrap();
    executor.start().unwrap();
    let call = |images| Call::from(request("call")).cost(Cost::request().with("images", images));
    // The buckets hold 1 request and 20 images.
    for images in [10, 10, 15] {
        executor.submit(call(images)).await.unwrap().await.unwrap();
    }
    let page = Page::of(&recorded);
    assert_eq!(
        page.named("outbound.wait"),
        [
            ("outbound.wait{outbound.cause=budget, outbound.budget=images}", 1.0),
            ("outbound.wait{outbound.cause=budget, outbound.budget=requests}", 0.5)
        ]
    );
    assert_eq!(
        page.named("outbound.charged"),
        [
            ("outbound.charged{outbound.budget=images}", 35.0),
            ("outbound.charged{outbound.budget=requests}", 3.0)
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn a_call_that_is_throttled_and_retried_is_one_call_with_two_attempts() {
    let (metrics, recorded) = metrics();
    let attempts = Arc::new(AtomicU32::new(0));
    let provider = service_fn(move |_: Request<&'static str>| {
        let first = attempts.fetch_add(1, Ordering::Relaxed) == 0;
        async move {
            sleep(ms(200)).await;
            let response = Response::builder();
            Ok::<_, BoxError>(if first {
                response.status(429).header("retry-after", "2").body("").unwrap()
            } else {
                response.body("done").unwrap()
            })
        }
    });
    let executor = Executor::builder()
        .layer(tower::retry::RetryLayer::new(RetryPolicy::new()))
        .observe(metrics.gen_ai("chat", "openai"))
        .build(provider)
        .unwrap();
    executor.start().unwrap();
    executor.submit(request("call")).await.unwrap().await.unwrap();
    let page = Page::of(&recorded);
    assert_eq!(page.named("outbound.throttled"), [("outbound.throttled", 1.0)]);
    assert_eq!(page.named("outbound.retries"), [("outbound.retries", 1.0)]);
    assert_eq!(
        page.named("outbound.calls"),
        [("outbound.calls{outbound.status=COMPLETED}", 1.0)]
    );
    assert_eq!(page.values(REQUESTS), [0.2]);
    let rejected = REQUESTS.replace("code=200", "code=429, error.type=429");
    assert_eq!(page.values(&rejected), [0.2]);
    let backoff = page.values("outbound.wait{outbound.cause=backoff}");
    assert!(backoff.len() == 1 && backoff[0] >= 2.0, "{backoff:?}");
    // The operation took as long as its attempts: the call has waited for the rest.
    let operation = "gen_ai.client.operation.duration{gen_ai.operation.name=chat, gen_ai.provider.name=openai}";
    let took = page.values(operation);
    assert!(took.len() == 1 && (took[0] - 0.4).abs() < 1e-9, "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn a_call_that_fails_is_counted_with_its_error() {
    let (metrics, recorded) = metrics();
    let broken = service_fn(async |_: Request<&'static str>| {
        Err::<Response<&'static str>, _>(std::io::Error::other("the connection is lost"))
    });
    let executor = Executor::builder()
        .observe(metrics.gen_ai("chat", "openai"))
        .build(broken)
        .unwrap();
    executor.start().unwrap();
    executor.submit(request("call")).await.unwrap().await.unwrap_err();
    let page = Page::of(&recorded);
    assert_eq!(
        page.named("outbound.calls"),
        [("outbound.calls{outbound.status=FAILED}", 1.0)]
    );
    let failed = |start| page.0.keys().filter(|name| name.starts_with(start)).collect::<Vec<_>>();
    assert_eq!(
        failed("http.client"),
        [&REQUESTS.replace("http.response.status_code=200", "error.type=std::io::error::Error")]
    );
    assert_eq!(
        failed("gen_ai"),
        [
            "gen_ai.client.operation.duration{gen_ai.operation.name=chat, gen_ai.provider.name=openai, \
             error.type=std::io::error::Error}"
        ]
    );
    assert_eq!(page.named("outbound.refused"), []);
}

#[tokio::test(start_paused = true)]
async fn a_call_that_is_cancelled_is_counted_as_cancelled_with_the_attempt_that_it_ends() {
    let (metrics, recorded) = metrics();
    let executor = Executor::builder().observe(metrics).build(client(ms(5_000)).0).unwrap();
    executor.start().unwrap();
    let call = executor.submit(request("call")).await.unwrap();
    sleep(ms(100)).await;
    call.cancel();
    call.await.unwrap_err();
    executor.stop(Shutdown::Graceful).await;
    let page = Page::of(&recorded);
    assert_eq!(
        page.named("outbound.calls"),
        [("outbound.calls{outbound.status=CANCELLED}", 1.0)]
    );
    let request = REQUESTS.replace("http.response.status_code=200", "error.type=Cancelled");
    assert_eq!(page.values(&request), [0.1]);
    assert_eq!(page.values("outbound.call.duration{outbound.status=CANCELLED}"), [0.1]);
}

#[tokio::test(start_paused = true)]
async fn a_call_that_is_refused_is_counted_by_reason_and_has_made_no_request() {
    let (metrics, recorded) = metrics();
    let executor = Executor::builder()
        .limits(Limits::new().budget("cents", Rate::per_day(100).refuse()))
        .concurrency_limit(1)
        .observe(metrics.gen_ai("chat", "openai"))
        .build(client(ms(10_000)).0)
        .unwrap();
    executor.start().unwrap();
    let call = |cents| Call::from(request("call")).cost(Cost::request().with("cents", cents));
    executor.submit(call(60)).await.unwrap().await.unwrap();
    executor.submit(call(60)).await.unwrap().await.unwrap_err();
    let _running = executor.submit(call(1)).await.unwrap();
    let late = executor.submit(call(1).timeout(ms(300))).await.unwrap();
    late.await.unwrap_err();
    let page = Page::of(&recorded);
    assert_eq!(
        page.named("outbound.refused"),
        [
            ("outbound.refused{outbound.reason=deadline_exceeded}", 1.0),
            ("outbound.refused{outbound.reason=exhausted}", 1.0)
        ]
    );
    assert_eq!(page.values("outbound.calls{outbound.status=FAILED}"), [2.0]);
    // One call was made.
    assert_eq!(page.values(REQUESTS), [10.0]);
    let operations = page.named("gen_ai.client.operation.duration");
    assert_eq!(operations.len(), 1, "{operations:?}");
    assert_eq!(operations[0].1, 10.0);
}

#[tokio::test(start_paused = true)]
async fn a_call_whose_time_ends_on_the_wire_was_not_refused() {
    let (metrics, recorded) = metrics();
    let executor = Executor::builder()
        .observe(metrics)
        .build(client(ms(10_000)).0)
        .unwrap();
    executor.start().unwrap();
    let late = executor.submit(Call::from(request("call")).timeout(ms(300)));
    late.await.unwrap().await.unwrap_err();
    let page = Page::of(&recorded);
    assert_eq!(
        page.named("outbound.calls"),
        [("outbound.calls{outbound.status=FAILED}", 1.0)]
    );
    assert_eq!(page.named("outbound.refused"), []);
}

#[tokio::test(start_paused = true)]
async fn what_a_call_has_used_is_compared_with_what_it_was_charged() -> Result<(), BoxError> {
    let (metrics, recorded) = metrics();
    let events = Events::new();
    events.observe(metrics);
    let limiter = RateLimiter::new(Limits::new().tokens(Rate::per_minute(1_000)))?;
    let mut service = ServiceBuilder::new()
        .layer(EventLayer::processing().report_to(&events))
        .layer(
            RateLimitLayer::with_cost(limiter, |_: &Request<&'static str>| Cost::tokens(100))
                .settle(|_: Cost, _: Result<&Response<&'static str>, &BoxError>| Some(Cost::tokens(40))),
        )
        .service(client(ms(0)).0);
    service.ready().await?.call(request("call")).await?;
    let page = Page::of(&recorded);
    let tokens = "{outbound.budget=tokens}";
    assert_eq!(page.values(&format!("outbound.charged{tokens}")), [100.0]);
    assert_eq!(page.values(&format!("outbound.used{tokens}")), [40.0]);
    assert_eq!(page.values(&format!("outbound.estimate.error{tokens}")), [2.5]);
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn tokens_are_counted_by_type() {
    let (metrics, recorded) = metrics();
    let model = service_fn(async |_: Request<&'static str>| {
        let used = ApiTokensUsed::unknown();
        used.set_usage(tower_outbound::TokenUsage::input_output(900, 300));
        Ok::<_, Infallible>(Response::builder().extension(used).body("").unwrap())
    });
    let executor = Executor::builder()
        .observe(metrics.gen_ai("chat", "anthropic"))
        .build(model)
        .unwrap();
    executor.start().unwrap();
    executor.submit(request("call")).await.unwrap().await.unwrap();
    let of = "gen_ai.client.token.usage{gen_ai.operation.name=chat, gen_ai.provider.name=anthropic, gen_ai.token.type=";
    assert_eq!(
        Page::of(&recorded).named("gen_ai.client.token.usage"),
        [(&*format!("{of}input}}"), 900.0), (&*format!("{of}output}}"), 300.0)]
    );
}

#[tokio::test(start_paused = true)]
async fn gauges_show_what_the_monitor_shows() {
    let (metrics, recorded) = metrics();
    let metrics = Arc::new(metrics.label("executor", "chat"));
    let limits = Limits::new()
        .requests(Rate::per_second(100))
        .requests(Rate::per_day(1_000))
        .tokens(Rate::per_minute(500));
    let executor = Executor::builder()
        .limits(limits)
        .concurrency_limit(2)
        .observe(metrics.clone())
        .build(client(ms(1_000)).0)
        .unwrap();
    executor.start().unwrap();
    let mut calls = Vec::new();
    for _ in 0..5 {
        calls.push(executor.submit(Call::from(request("call")).tokens(10)).await.unwrap());
    }
    settle().await;
    executor.monitor().limiter().pause_for(ms(2_500));
    metrics.record(&executor.monitor());
    let page = Page::of(&recorded);
    let gauges: Vec<_> = page
        .0
        .iter()
        .filter(|(name, _)| {
            INSTRUMENTS.iter().any(|instrument| {
                instrument.kind == InstrumentKind::Gauge && name.split('{').next() == Some(instrument.name)
            })
        })
        .map(|(name, values)| {
            (
                name.replace("executor=chat", "").replace("{, ", "{").replace("{}", ""),
                values[0],
            )
        })
        .collect();
    let expected = [
        ("outbound.available{outbound.budget=requests}", 98.0),
        ("outbound.available{outbound.budget=tokens}", 480.0),
        ("outbound.in_flight.limit", 2.0),
        ("outbound.in_flight", 2.0),
        ("outbound.limit{outbound.budget=requests, outbound.period=1}", 100.0),
        (
            "outbound.limit{outbound.budget=requests, outbound.period=86400}",
            1_000.0,
        ),
        ("outbound.limit{outbound.budget=tokens, outbound.period=60}", 500.0),
        ("outbound.pause", 2.5),
        ("outbound.queue.depth", 3.0),
    ]
    .map(|(name, value)| (name.to_owned(), value));
    assert_eq!(gauges, expected);
}

#[tokio::test(start_paused = true)]
async fn nothing_of_a_call_is_a_label_but_what_was_asked_for() {
    let call = || {
        let request = Request::post("https://user:secret@example.com:8443/v1/tenants/42?key=secret").body("call");
        Call::from(request.unwrap())
            .metadata("tenant", "acme")
            .metadata("model", "large")
            .metadata("api_key", "secret-key")
    };
    let run = async |metrics: Metrics| {
        let executor = Executor::builder().observe(metrics).build(client(ms(10)).0).unwrap();
        executor.start().unwrap();
        executor.submit(call()).await.unwrap().await.unwrap();
    };
    let (plain, recorded) = metrics();
    run(plain).await;
    let text = format!("{:?}", Page::of(&recorded).0);
    for absent in ["acme", "large", "secret", "tenants"] {
        assert!(!text.contains(absent), "{absent} is in {text}");
    }
    assert!(text.contains("server.address=example.com, server.port=8443"), "{text}");

    let (labelled, recorded) = metrics();
    run(labelled
        .label("region", "eu")
        .label_metadata("gen_ai.request.model", "model")
        .label_metadata("credential", "api_key"))
    .await;
    let page = Page::of(&recorded);
    let labels = "region=eu, gen_ai.request.model=large, credential=[redacted]";
    assert_eq!(
        page.named("outbound.calls"),
        [(&*format!("outbound.calls{{{labels}, outbound.status=COMPLETED}}"), 1.0)]
    );
    assert!(
        page.0
            .keys()
            .any(|name| name.starts_with(&format!("http.client.request.duration{{{labels}")))
    );
    assert!(!format!("{:?}", page.0).contains("secret-key"));
}

#[tokio::test(start_paused = true)]
async fn the_number_of_series_is_bounded_and_every_call_is_still_counted() {
    const CALLS: usize = 2_000;
    let (metrics, recorded) = metrics();
    let executor = Executor::builder()
        .limits(Limits::new())
        .observe(metrics.label_metadata("tenant", "tenant"))
        .build(client(ms(0)).0)
        .unwrap();
    executor.start().unwrap();
    for number in 0..CALLS {
        let request = Request::get(format!("http://host-{number}.test/"))
            .body("call")
            .unwrap();
        // The first half of the calls is of one tenant, with 1,000 servers.
        let tenant = if number < CALLS / 2 { 0 } else { number };
        let call = Call::from(request).metadata("tenant", tenant as u64);
        executor.submit(call).await.unwrap().await.unwrap();
    }
    let page = Page::of(&recorded);
    let counted: f64 = page.named("outbound.calls").iter().map(|(_, count)| count).sum();
    assert_eq!(counted as usize, CALLS);
    let tenants: BTreeSet<_> = page
        .named("outbound.calls")
        .iter()
        .map(|(name, _)| name.to_string())
        .collect();
    assert_eq!(tenants.len(), 1_001);
    let requests: Vec<_> = page
        .0
        .iter()
        .filter(|(name, _)| name.starts_with("http.client"))
        .collect();
    assert_eq!(requests.iter().map(|(_, values)| values.len()).sum::<usize>(), CALLS);
    let first: Vec<_> = requests.iter().filter(|(name, _)| name.contains("tenant=0,")).collect();
    assert_eq!(first.len(), 513);
    let others = first.iter().find(|(name, _)| name.contains("server.address=_OTHER"));
    assert_eq!(others.unwrap().1.len(), 1_000 - 512);
}

#[tokio::test]
async fn a_call_of_a_closure_is_counted_and_is_no_http_request() {
    let (metrics, recorded) = metrics();
    let executor = Executor::builder()
        .observe(metrics)
        .build_for_closures::<String>()
        .unwrap();
    executor.start().unwrap();
    let call = Call::new(|| async { Ok::<_, Infallible>((StatusCode::OK.as_u16(), String::from("hello"))) });
    executor.submit(call).await.unwrap().await.unwrap();
    let page = Page::of(&recorded);
    assert_eq!(
        page.named("outbound.calls"),
        [("outbound.calls{outbound.status=COMPLETED}", 1.0)]
    );
    assert_eq!(page.named("http.client"), []);
}

/// The lines of a metric in the excerpt of the conventions.
fn convention(name: &str) -> &'static str {
    const EXCERPT: &str = include_str!("conventions/opentelemetry.md");
    let heading = format!("### Metric: `{name}`");
    let (_, section) = EXCERPT
        .split_once(&heading)
        .unwrap_or_else(|| panic!("{name} is not in the excerpt"));
    section.split("### ").next().unwrap()
}

#[test]
fn names_units_buckets_and_attributes_are_those_of_the_conventions() {
    let conventional: Vec<_> = INSTRUMENTS
        .iter()
        .filter(|instrument| !instrument.name.starts_with("outbound."))
        .collect();
    assert_eq!(conventional.len(), 3);
    for instrument in conventional {
        let section = convention(instrument.name);
        let row = format!(
            "| `{}` | {:?} | `{}` | {} |",
            instrument.name, instrument.kind, instrument.unit, instrument.description
        );
        assert!(section.contains(&row), "{row}\n{section}");
        let buckets = section
            .lines()
            .find(|line| line.contains("SHOULD be specified"))
            .unwrap();
        let list = buckets.rsplit_once('[').unwrap().1.split(']').next().unwrap();
        let buckets: Vec<f64> = list.split(',').map(|bound| bound.trim().parse().unwrap()).collect();
        assert_eq!(instrument.buckets, buckets, "{}", instrument.name);
        for attribute in instrument.attributes {
            assert!(
                section.contains(&format!("| `{attribute}` | ")),
                "{attribute} of {}",
                instrument.name
            );
        }
        for line in section.lines().filter(|line| line.contains("| `Required`")) {
            let attribute = line.split('`').nth(1).unwrap();
            assert!(
                instrument.attributes.contains(&attribute),
                "{attribute} of {}",
                instrument.name
            );
        }
    }
}

#[test]
fn every_histogram_has_ascending_buckets_and_those_of_waits_reach_two_minutes() {
    for instrument in INSTRUMENTS {
        let is_histogram = instrument.kind == InstrumentKind::Histogram;
        assert_eq!(is_histogram, !instrument.buckets.is_empty(), "{}", instrument.name);
        assert!(instrument.buckets.is_sorted(), "{}", instrument.name);
        assert_eq!(
            INSTRUMENTS.iter().filter(|other| other.name == instrument.name).count(),
            1
        );
    }
    assert_eq!(tower_outbound::metrics::WAIT.buckets.last(), Some(&120.0));
}

#[test]
fn the_page_about_metrics_lists_each_with_its_unit_and_attributes() {
    let page = include_str!("../docs/metrics.md");
    for instrument in INSTRUMENTS {
        let attributes: Vec<_> = instrument.attributes.iter().map(|name| format!("`{name}`")).collect();
        let row = format!(
            "| `{}` | {} | `{}` | {} | {} |",
            instrument.name,
            format!("{:?}", instrument.kind).to_lowercase(),
            instrument.unit,
            attributes.join(", "),
            instrument.description
        );
        assert!(page.contains(&row), "{row}");
    }
}
