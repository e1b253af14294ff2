//! The `Debug` and `Display` of everything public that a secret gets near to.

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
};
use tower::{BoxError, Layer, Service, ServiceExt, service_fn};
use tower_outbound::{
    ApiTokens, Call, ConcurrencyLimitLayer, Cost, EventLayer, Executor, Limits, QueueLayer, Rate, RateLimitLayer,
    RateLimiter, RequestStatus, Shutdown,
    event::{Describe, Events, Http, Metadata, Nothing, Payload, RequestDetails, ResponseDetails},
    executor::{Closure, Config},
    rate::ByExtension,
};

/// What each public type tells, by its name.
#[derive(Default)]
struct Told(BTreeMap<String, String>);

impl Told {
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

/// Without the header that only its own description knows to be secret.
fn request(secrets: &Secrets) -> Request<Bytes> {
    let mut request = call(secrets, "h.example", "/a").into_request().unwrap();
    request.headers_mut().remove("x-own");
    request
}

/// As they stand in the sources, so that none is forgotten.
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

#[tokio::test(start_paused = true)]
async fn no_public_type_tells_a_secret() {
    let secrets = Secrets::default();
    let mut told = Told::default();
    let client = service_fn(async |request: Request<Bytes>| {
        tokio::time::sleep(ms(10)).await;
        match request.headers().get("then") {
            Some(_) => panic!("could not reach {}", request.uri()),
            None => Ok::<_, BoxError>(Response::new(Bytes::new())),
        }
    });

    // What is to be sent.
    told.debug(&call(&secrets, "h.example", "/a"));
    let malformed = call(&secrets, "h.example", "/a").header("x-\n", secrets.of("malformed header"));
    told.debug(&malformed);
    let extensions = request(&secrets).extensions().clone();
    told.debug(extensions.get::<Metadata>().unwrap());
    told.debug(extensions.get::<Payload>().unwrap());
    told.debug(&ApiTokens(1));
    let mut details = RequestDetails::default();
    Describe::<_, Response<()>>::request(&Http::default(), &request(&secrets), &mut details);
    told.debug(&details);
    let mut details = ResponseDetails::default();
    details
        .headers(request(&secrets).headers())
        .body(secrets.word("parameter"));
    details.failure("Refused", format!("{} refused", request(&secrets).uri()));
    told.debug(&details);
    told.debug(&Http::default().redact("x-own".parse().unwrap()));
    told.debug(&Http::default().response_body(json as fn(&Bytes) -> _));
    told.debug(&Nothing);

    // The executor, with calls in every state.
    let executor = Executor::builder().queue_capacity(1).concurrency_limit(1);
    told.debug(&executor);
    let executor = executor.build(client).unwrap();
    told.debug(&executor.submit(request(&secrets)).await.unwrap_err());
    executor.start().unwrap();
    let mut updates = executor.monitor().subscribe();
    let first = executor.submit(request(&secrets)).await.unwrap();
    pass(ms(1)).await;
    let mut service = executor.clone();
    let second = service.ready().await.unwrap().call(request(&secrets));
    told.debug(&second);
    pass(ms(1)).await;
    let third = tokio::spawn({
        let executor = executor.clone();
        let call = Call::from(request(&secrets)).header("then", "panic");
        async move { executor.submit(call).await }
    });
    pass(ms(1)).await;
    let refused = executor.try_submit(request(&secrets)).unwrap_err();
    told.display(&refused);
    told.debug(&executor);
    told.debug(&executor.monitor());
    told.debug(&first);
    told.debug(&first.event());
    told.debug(&first.event().clone());
    told.debug(&updates);
    told.debug(&updates.recv().await.unwrap().unwrap());
    told.debug(&executor.monitor().totals());
    told.debug(first.event().snapshot().attempts.first().unwrap());
    told.display(&first.request_id());
    told.display(&first.event().status());
    first.event().log(format!("calling {}", request(&secrets).uri()));
    told.debug(first.event().snapshot().logs.first().unwrap());
    told.debug(&first.event().snapshot());
    first.await.unwrap();
    second.await.unwrap();
    let error = third.await.unwrap().unwrap().await.unwrap_err();
    told.display(&error);
    told.display(error.find::<tower_outbound::error::Panicked>().unwrap());
    told.debug(&executor.stop(Shutdown::Graceful).await);
    told.debug(&Shutdown::Graceful);
    told.debug(&Config::default());

    // The layers one by one.
    let slow = service_fn(async |_: Request<Bytes>| {
        tokio::time::sleep(ms(10)).await;
        Ok::<_, BoxError>(Response::new(Bytes::new()))
    });
    let limiter = RateLimiter::new(Limits::new().requests(Rate::per_second(5)).tokens(Rate::per_second(5))).unwrap();
    let limit = ConcurrencyLimitLayer::new(1).unwrap();
    let events = Events::new();
    told.debug(&limit);
    told.debug(limit.limit());
    told.debug(&limiter);
    told.debug(&limiter.available());
    told.debug(&RateLimitLayer::new(limiter.clone()));
    told.debug(&EventLayer::calling().report_to(&events));
    told.debug(&events);
    let mut concurrent = limit.layer(slow);
    told.debug(&concurrent);
    told.debug(&concurrent.ready().await.unwrap().call(request(&secrets)));
    let mut paced = RateLimitLayer::new(limiter.clone()).layer(slow);
    told.debug(&paced);
    told.debug(&paced.ready().await.unwrap().call(request(&secrets)));
    let mut recorded = EventLayer::calling().report_to(&events).layer(slow);
    told.debug(&recorded);
    told.debug(&recorded.ready().await.unwrap().call(request(&secrets)));
    let layer = QueueLayer::new(1).unwrap();
    told.debug(&layer);
    let mut queue = layer.layer(slow);
    let mut waiting = queue.try_call(request(&secrets)).unwrap();
    told.debug(&waiting);
    told.display(&queue.try_call(request(&secrets)).unwrap_err());
    told.debug(&queue);
    pass(ms(1)).await;
    told.debug(&waiting);
    waiting.cancel();
    let cancelled = (&mut waiting).await.unwrap_err();
    told.display(cancelled.downcast_ref::<tower_outbound::error::Cancelled>().unwrap());
    told.debug(&waiting);
    queue.abort();
    let closed = queue.ready().await.unwrap_err();
    told.display(closed.downcast_ref::<tower_outbound::error::Closed>().unwrap());

    // What has no place for a secret, and tells numbers only.
    told.debug(&limiter.acquire_estimate(Cost::tokens(1)).await.unwrap());
    told.debug(&limiter.try_acquire(Cost::tokens(5)).unwrap_err());
    told.display(&limiter.check(Cost::tokens(9)).unwrap_err());
    told.debug(&Cost::tokens(1));
    told.debug(&Rate::per_second(1));
    told.debug(&tower_outbound::rate::Amount::from(1));
    told.debug(&Limits::new());
    told.debug(&ByExtension);
    told.display(&RateLimiter::new(Limits::new().requests(Rate::per_second(0))).unwrap_err());
    told.display(&"calling".parse::<RequestStatus>().unwrap_err());

    // Closures keep theirs to themselves.
    let secret = secrets.of("what a closure has");
    let closure = Call::<Closure<String>>::new(move || {
        let secret = secret.clone();
        async move { Ok::<_, BoxError>((200, secret)) }
    });
    told.debug(&closure);
    told.debug(closure.into_request().unwrap().body());
    told.debug(&tower_outbound::executor::ClosureClient::<()>::new());
    let behind = lagged().await;
    told.display(&behind);

    #[cfg(feature = "full")]
    {
        web::tell(&secrets, &mut told).await;
        shared::tell(&secrets, &mut told).await;
    }

    let leaks = secrets.leaks(&told.0);
    assert!(leaks.is_empty(), "{leaks:#?}");
    let mut names = BTreeSet::new();
    public_types(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut names);
    // A value is what it is, as the text is that it may hold: it is redacted when it is recorded.
    names.remove("Value");
    if !cfg!(feature = "full") {
        // Its types are not there, or nobody makes them.
        return;
    }
    let missing: Vec<_> = names.iter().filter(|name| !told.0.contains_key(*name)).collect();
    assert!(missing.is_empty(), "{missing:?}");
    // And they tell what they should.
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
        assert!(told.0[name].contains(&word), "{name}: {}", told.0[name]);
    }
}

fn json(body: &Bytes) -> tower_outbound::event::Value {
    String::from_utf8_lossy(body).into_owned().into()
}

/// What a subscriber is told who is too slow.
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
