//! Checks the `Debug` and `Display` output of every public type. Each value holds a secret wherever its type can hold
//! one.

#[cfg(feature = "full")]
mod shared;
#[cfg(feature = "full")]
mod web;

use crate::{
    support::{ms, pass},
    table::{Secrets, call},
};
use http::{Request, Response};
use hyper::body::Bytes;
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::{Debug, Display},
    fs,
    path::Path,
    sync::{Arc, Mutex},
};
use tower::{BoxError, Layer, Service, ServiceExt, service_fn};
use tower_outbound::{
    ApiTokens, Call, ConcurrencyLimitLayer, Cost, EventHandle, EventLayer, Executor, KeyedRateLimiter, Limits,
    QueueLayer, Rate, RateLimitLayer, RateLimiter, RequestStatus, Schedule, Shutdown, TokenUsage,
    error::{AcquireError, TooManyKeys},
    event::{
        AttemptEnd, CallEnd, Describe, Events, Http, Metadata, Model, Nothing, Observer, Payload, RequestDetails,
        ResponseDetails, WaitCause,
    },
    executor::{BudgetRate, Closure, Config},
    rate::{Budget, ByExtension},
    schedule::{self, CurrentCall, Flow, FlowKey, Level},
};

/// Keeps what an observer is told of the attempts and calls that have ended.
#[derive(Default)]
struct Ends(Mutex<(Vec<AttemptEnd>, Vec<CallEnd>)>);

impl Observer for Ends {
    fn attempt_ended(&self, _: &EventHandle, end: &AttemptEnd) {
        self.0.lock().unwrap().0.push(end.clone());
    }

    fn call_ended(&self, _: &EventHandle, end: &CallEnd) {
        self.0.lock().unwrap().1.push(end.clone());
    }
}

/// The `Debug` and `Display` output of the public types, by the name of the type.
#[derive(Default)]
struct Shown(BTreeMap<String, String>);

impl Shown {
    fn debug<T: Debug>(&mut self, value: &T) {
        self.0
            .entry(name_of::<T>())
            .or_default()
            .push_str(&format!("{value:?}\n{value:#?}\n"));
    }

    fn display<T: Debug + Display>(&mut self, value: &T) {
        self.debug(value);
        self.0
            .entry(name_of::<T>())
            .or_default()
            .push_str(&format!("{value}\n{value:#}\n"));
    }
}

fn name_of<T>() -> String {
    let name = std::any::type_name::<T>();
    let path = name.split('<').next().unwrap_or_default();
    path.rsplit("::").next().unwrap_or_default().to_owned()
}

/// A request without the header `x-own`, which is redacted only if `Http` is configured to do so.
fn request(secrets: &Secrets) -> Request<Bytes> {
    let mut request = call(secrets, "h.example", "/a").into_request().unwrap();
    request.headers_mut().remove("x-own");
    request
}

/// Collects the names of all public types from the source files, to check that none is missing in the test.
fn public_types(folder: &Path, names: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            public_types(&path, names);
            continue;
        }
        for line in fs::read_to_string(&path).unwrap().lines().map(str::trim_start) {
            if let Some(rest) = line
                .strip_prefix("pub struct ")
                .or_else(|| line.strip_prefix("pub enum "))
            {
                names.extend(
                    rest.split(|letter: char| !letter.is_alphanumeric())
                        .next()
                        .map(str::to_owned),
                );
            }
        }
    }
}

/// Returns the error of a call that can never begin, because the call that awaits it holds the only permit.
async fn deadlock() -> tower_outbound::error::Deadlock {
    let executor = Executor::builder().concurrency_limit(1).build_for_closures().unwrap();
    executor.start().unwrap();
    let inner = executor.clone();
    let outer = Call::<Closure<String>>::new(move || {
        let inner = inner.clone();
        async move {
            inner
                .submit(Call::new(|| async { Ok::<_, BoxError>((200, String::new())) }))
                .await?
                .await?;
            Ok::<_, BoxError>((200, String::new()))
        }
    });
    let error = executor.submit(outer).await.unwrap().await.unwrap_err();
    *error.find().unwrap()
}

#[tokio::test(start_paused = true)]
async fn no_public_type_shows_a_secret() {
    let secrets = Secrets::default();
    let mut shown = Shown::default();
    let client = service_fn(async |request: Request<Bytes>| {
        tokio::time::sleep(ms(10)).await;
        match request.headers().get("then") {
            Some(_) => panic!("could not reach {}", request.uri()),
            None => Ok::<_, BoxError>(Response::new(Bytes::new())),
        }
    });

    // Requests, and the types that describe requests.
    shown.debug(&call(&secrets, "h.example", "/a"));
    let malformed = call(&secrets, "h.example", "/a").header("x-\n", secrets.of("malformed header"));
    shown.debug(&malformed);
    let extensions = request(&secrets).extensions().clone();
    shown.debug(extensions.get::<Metadata>().unwrap());
    shown.debug(extensions.get::<Payload>().unwrap());
    shown.debug(&ApiTokens(1));
    let mut details = RequestDetails::default();
    Describe::<_, Response<()>>::request(&Http::default(), &request(&secrets), &mut details);
    shown.debug(&details);
    let mut details = ResponseDetails::default();
    details
        .headers(request(&secrets).headers())
        .body(secrets.word("parameter"));
    details.failure("Refused", format!("{} refused", request(&secrets).uri()));
    shown.debug(&details);
    shown.debug(&Http::default().redact("x-own".parse().unwrap()));
    shown.debug(&Http::default().response_body(json as fn(&Bytes) -> _));
    shown.debug(&Nothing);
    shown.debug(&Model::from("model"));

    // The executor with a queued, a running and a panicking call.
    let ends = Arc::new(Ends::default());
    let executor = Executor::builder()
        .queue_capacity(1)
        .concurrency_limit(1)
        .observe(ends.clone());
    shown.debug(&executor);
    let executor = executor.build(client).unwrap();
    shown.debug(&executor.submit(request(&secrets)).await.unwrap_err());
    executor.start().unwrap();
    let mut updates = executor.monitor().subscribe();
    let first = executor.submit(request(&secrets)).await.unwrap();
    pass(ms(1)).await;
    let mut service = executor.clone();
    let second = service.ready().await.unwrap().call(request(&secrets));
    shown.debug(&second);
    pass(ms(1)).await;
    let third = tokio::spawn({
        let executor = executor.clone();
        let call = Call::from(request(&secrets)).header("then", "panic");
        async move { executor.submit(call).await }
    });
    pass(ms(1)).await;
    let refused = executor.try_submit(request(&secrets)).unwrap_err();
    shown.display(&refused);
    shown.debug(&executor);
    shown.debug(&executor.monitor());
    shown.debug(&first);
    shown.debug(&first.event());
    shown.debug(&first.event().clone());
    shown.debug(&updates);
    shown.debug(&updates.recv().await.unwrap().unwrap());
    shown.debug(&executor.monitor().totals());
    shown.debug(first.event().snapshot().attempts.first().unwrap());
    shown.display(&first.request_id());
    shown.display(&first.event().status());
    first.event().log(format!("calling {}", request(&secrets).uri()));
    shown.debug(first.event().snapshot().logs.first().unwrap());
    shown.debug(&first.event().snapshot());
    shown.debug(&first.event().server().unwrap());
    first.await.unwrap();
    second.await.unwrap();
    let error = third.await.unwrap().unwrap().await.unwrap_err();
    shown.display(&error);
    shown.display(error.find::<tower_outbound::error::Panicked>().unwrap());
    shown.debug(&tower_outbound::event::Refusal::Full);
    let (attempts, calls) = std::mem::take(&mut *ends.0.lock().unwrap());
    attempts.iter().for_each(|end| shown.debug(end));
    calls.iter().for_each(|end| shown.debug(end));
    shown.debug(calls.iter().find_map(|end| end.waits.first()).unwrap());
    shown.display(&WaitCause::Budget(Budget::Tokens));
    shown.display(&"budget:No".parse::<WaitCause>().unwrap_err());
    shown.debug(&executor.stop(Shutdown::Graceful).await);
    shown.debug(&Shutdown::Graceful);
    shown.debug(&Config::default());

    // Each layer with its service and its response future.
    let slow = service_fn(async |_: Request<Bytes>| {
        tokio::time::sleep(ms(10)).await;
        Ok::<_, BoxError>(Response::new(Bytes::new()))
    });
    let limits = Limits::new()
        .requests(Rate::per_second(5))
        .tokens(Rate::per_second(5))
        .input_tokens(Rate::per_second(5))
        .output_tokens(Rate::per_second(5))
        .budget("cents", Rate::utc_day(5).refuse());
    let limiter = RateLimiter::new(limits).unwrap();
    let limit = ConcurrencyLimitLayer::new(1).unwrap();
    let events = Events::new();
    shown.debug(&limit);
    shown.debug(limit.limit());
    shown.debug(&limiter);
    shown.debug(&limiter.available());
    limiter.pause_for(ms(10));
    let pause = limiter.paused().unwrap();
    shown.debug(&pause);
    shown.debug(&pause.source());
    shown.display(&pause.source());
    limiter.resume();
    let by_key = KeyedRateLimiter::<String>::new(Limits::new().requests(Rate::per_day(1))).unwrap();
    let by_key = by_key.max_keys(1).unwrap();
    by_key
        .try_acquire(&secrets.of("key of a limit"), Cost::request())
        .unwrap();
    shown.debug(&by_key);
    match by_key.try_acquire(&secrets.of("another key of a limit"), Cost::request()) {
        Err(AcquireError::TooManyKeys(full)) => shown.display(&full),
        other => panic!("{other:?}"),
    }
    shown.debug(&RateLimitLayer::new(limiter.clone()));
    shown.debug(&EventLayer::calling().report_to(&events));
    shown.debug(&events);
    let mut concurrent = limit.layer(slow);
    shown.debug(&concurrent);
    shown.debug(&concurrent.ready().await.unwrap().call(request(&secrets)));
    let mut paced = RateLimitLayer::new(limiter.clone()).layer(slow);
    shown.debug(&paced);
    shown.debug(&paced.ready().await.unwrap().call(request(&secrets)));
    let mut recorded = EventLayer::calling().report_to(&events).layer(slow);
    shown.debug(&recorded);
    shown.debug(&recorded.ready().await.unwrap().call(request(&secrets)));
    let layer = QueueLayer::new(1).unwrap();
    shown.debug(&layer);
    let mut queue = layer.layer(slow);
    let mut waiting = queue.try_call(request(&secrets)).unwrap();
    shown.debug(&waiting);
    shown.display(&queue.try_call(request(&secrets)).unwrap_err());
    shown.debug(&queue);
    pass(ms(1)).await;
    shown.debug(&waiting);
    waiting.cancel();
    let cancelled = (&mut waiting).await.unwrap_err();
    shown.display(cancelled.downcast_ref::<tower_outbound::error::Cancelled>().unwrap());
    shown.debug(&waiting);
    queue.abort();
    let closed = queue.ready().await.unwrap_err();
    shown.display(closed.downcast_ref::<tower_outbound::error::Closed>().unwrap());

    // A schedule, whose keys are shown.
    let tenants = Schedule::new().level(Level::by("tenant"));
    let scheduled = |schedule: &Schedule| {
        QueueLayer::new(9)
            .unwrap()
            .schedule(schedule.clone(), Flow::of, ByExtension)
    };
    shown.debug(&Level::by("tenant"));
    shown.debug(&Flow::from("acme"));
    shown.display(&FlowKey::from("acme"));
    tenants.pause("", tokio::time::Instant::now() + ms(10)).unwrap();
    let mut queue = scheduled(&tenants).unwrap().layer(slow);
    let paused = queue.call(request(&secrets));
    shown.debug(&paused);
    shown.debug(&queue);
    shown.debug(&tenants);
    shown.debug(&tenants.flows(1)[0]);
    paused.await.unwrap();
    let mut full = scheduled(&tenants.max_keys(0)).unwrap().layer(slow);
    let error = full.call(request(&secrets)).await.unwrap_err();
    shown.display(error.downcast_ref::<TooManyKeys>().unwrap());

    shown.debug(&current_call().await);

    // Types whose output has only numbers and fixed texts.
    shown.debug(&limiter.acquire_estimate(Cost::tokens(1)).await.unwrap());
    shown.debug(&limiter.try_acquire(Cost::tokens(5)).unwrap_err());
    shown.display(&limiter.check(Cost::tokens(9)).unwrap_err());
    shown.debug(&Cost::tokens(1));
    shown.debug(&Rate::per_second(1));
    shown.debug(&tower_outbound::rate::Amount::from(1));
    shown.debug(&Limits::new());
    shown.debug(&Limits::new().plan().unwrap());
    shown.debug(&tower_outbound::rate::Binding::Concurrency);
    shown.debug(&ByExtension);
    if let Budget::Named(name) = Budget::from("images") {
        shown.debug(&name);
    }
    let capped = RateLimiter::new(Limits::new().requests(Rate::per_day(1).refuse())).unwrap();
    shown.debug(&capped.save().unwrap());
    capped.try_acquire(Cost::request()).unwrap();
    match capped.try_acquire(Cost::request()) {
        Err(AcquireError::Exhausted(exhausted)) => shown.display(&exhausted),
        other => panic!("{other:?}"),
    }
    shown.debug(&BudgetRate {
        rate: 1.0,
        period_secs: 60.0,
        burst: None,
    });
    shown.debug(&TokenUsage::default());
    shown.display(&RateLimiter::new(Limits::new().requests(Rate::per_second(0))).unwrap_err());
    shown.display(&"calling".parse::<RequestStatus>().unwrap_err());

    // A closure that has captured a secret.
    let secret = secrets.of("what a closure has");
    let closure = Call::<Closure<String>>::new(move || {
        let secret = secret.clone();
        async move { Ok::<_, BoxError>((200, secret)) }
    });
    shown.debug(&closure);
    shown.debug(closure.into_request().unwrap().body());
    shown.debug(&tower_outbound::executor::ClosureClient::<()>::new());
    shown.display(&lagged().await);
    shown.display(&deadlock().await);

    #[cfg(feature = "full")]
    {
        let label = secrets.of("what a metric is labelled with");
        shown.debug(&tower_outbound::metrics::Metrics::new().label("tenant", label));
        shown.debug(&tower_outbound::metrics::WAIT);
        shown.debug(&tower_outbound::metrics::WAIT.kind);
        web::show(&secrets, &mut shown).await;
        shared::show(&secrets, &mut shown).await;
    }

    let leaks = secrets.leaks(&shown.0);
    assert!(leaks.is_empty(), "{leaks:#?}");
    let mut names = BTreeSet::new();
    public_types(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut names);
    // `Value` is not checked: a value shows its texts, because it is redacted only when an event records it.
    names.remove("Value");
    // `StackLayers` is not checked: `build` creates the only value and does not return it.
    names.remove("StackLayers");
    if !cfg!(feature = "full") {
        // Without the feature `full`, some of the types do not exist, and others are not created in this test.
        return;
    }
    let missing: Vec<_> = names.iter().filter(|name| !shown.0.contains_key(*name)).collect();
    assert!(missing.is_empty(), "{missing:?}");
    // Texts that are not secret are still shown.
    for (name, word) in [
        ("NetworkRequestEvent", secrets.word("parameter")),
        ("RequestDetails", secrets.word("parameter")),
        ("ResponseDetails", secrets.word("header with a scheme in it")),
        ("Metadata", secrets.word("metadata")),
        ("Payload", secrets.word("field of the payload")),
        ("Panicked", secrets.word("parameter")),
        ("Error", secrets.word("parameter")),
        ("LogEntry", secrets.word("parameter")),
    ] {
        assert!(shown.0[name].contains(&word), "{name}: {}", shown.0[name]);
    }
}

fn json(body: &Bytes) -> tower_outbound::event::Value {
    String::from_utf8_lossy(body).into_owned().into()
}

/// Returns the call that a schedule has chosen, as a layer finds it.
async fn current_call() -> CurrentCall {
    let limit = ConcurrencyLimitLayer::new(1).unwrap();
    let schedule = Schedule::new().concurrency(limit.limit().clone());
    let mut queue = QueueLayer::new(1)
        .unwrap()
        .schedule(schedule, Flow::of, ByExtension)
        .unwrap()
        .layer(service_fn(async |_: Request<()>| {
            Ok::<_, BoxError>(schedule::current().unwrap())
        }));
    queue.call(Request::new(())).await.unwrap()
}

/// Returns the error that a subscriber of events receives if it is too slow.
async fn lagged() -> tower_outbound::event::Lagged {
    let events = Events::new();
    let mut updates = events.subscribe();
    let mut service = EventLayer::calling()
        .report_to(&events)
        .layer(service_fn(async |_: Request<()>| Ok::<_, BoxError>(Response::new(()))));
    for _ in 0..2_000 {
        service.call(Request::new(())).await.unwrap();
    }
    updates.recv().await.unwrap().unwrap_err()
}
