//! Tests that no secret is shown in events, errors, spans, log lines, or the `Debug` output of a public type.

mod public;
mod recorded;
#[path = "../support/mod.rs"]
mod support;
mod table;
mod texts;
mod tracing_output;

use http::{HeaderValue, Request, Response};
use std::fmt::Write;
use support::{ms, pass};
use tower::{BoxError, ServiceExt, service_fn};
use tower_outbound::{
    Call, Cost, Executor, Limits, Rate, RequestStatus, Shutdown,
    event::{Http, Value},
    rate::Budget,
};
use tracing::Instrument;
use tracing_output::TracingOutput;
use tracing_subscriber::layer::SubscriberExt;

const SECRET: &str = "s3cr3t";

fn secrets_everywhere() -> Request<String> {
    let mut marked = HeaderValue::from_static(SECRET);
    marked.set_sensitive(true);
    let mut request = Request::post(format!(
        "https://user:{SECRET}@api.example.com/v1?api_key={SECRET}&key={SECRET}&token={SECRET}&X-Amz-Signature={SECRET}&page=2"
    ));
    for name in [
        "authorization",
        "x-api-key",
        "api-key",
        "x-goog-api-key",
        "cookie",
        "proxy-authorization",
        "x-auth-token",
    ] {
        request = request.header(name, format!("Bearer {SECRET}"));
    }
    request
        .header("x-marked", marked)
        .header("x-own", SECRET)
        .header("referer", format!("https://u:{SECRET}@h/?sig={SECRET}"))
        .body(SECRET.to_owned())
        .unwrap()
}

fn failed(url: &http::Uri) -> BoxError {
    let cause = std::io::Error::other(format!("could not connect to {url}"));
    let error = std::io::Error::other(Outer(
        format!("error sending request for url ({url}): Bearer {SECRET} refused"),
        cause,
    ));
    error.into()
}

#[derive(Debug)]
struct Outer(String, std::io::Error);

impl std::fmt::Display for Outer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Outer {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.1)
    }
}

fn call() -> Call<String> {
    Call::from(secrets_everywhere())
        .payload(Value::from([
            ("api_key", Value::from(SECRET)),
            ("text", Value::from(format!("http://u:{SECRET}@h/"))),
        ]))
        .metadata("callback", format!("https://h/?access_token={SECRET}"))
}

#[tokio::test(start_paused = true)]
async fn no_secret_of_a_call_is_shown_however_the_call_ends() {
    let tracing_output = TracingOutput::default();
    let _guard = tracing::subscriber::set_default(tracing_subscriber::registry().with(tracing_output.clone()));

    let client = service_fn(async |request: Request<String>| {
        let url = request.uri().clone();
        tokio::time::sleep(ms(10)).await;
        match request.headers().get("then").map(HeaderValue::as_bytes) {
            Some(b"fail") => Err(failed(&url)),
            Some(b"panic") => panic!("could not reach {url}"),
            Some(b"hang") => std::future::pending().await,
            _ => Ok(Response::builder()
                .header("set-cookie", format!("session={SECRET}"))
                .header("location", format!("https://h/?token={SECRET}"))
                .body(format!("{SECRET} in the body"))
                .unwrap()),
        }
    });
    // Five budgets, of which one refuses the fifth call.
    let limits = Limits::new()
        .requests(Rate::per_second(100))
        .input_tokens(Rate::per_minute(1_000))
        .output_tokens(Rate::per_minute(1_000))
        .budget("images", Rate::per_minute(10))
        .budget("cents", Rate::utc_day(4).refuse());
    let executor = Executor::builder()
        .describe(Http::default().redact("x-own".parse().unwrap()))
        .limits(limits)
        .cost(|_: &Request<String>| Cost::input_output_tokens(5, 5).with("images", 1).with("cents", 1))
        .settle(|charged: Cost, result: Result<&Response<String>, &BoxError>| {
            let _ = result.ok()?;
            Some(charged.with(Budget::InputTokens, 7))
        })
        .build(client)
        .unwrap();
    executor.start().unwrap();

    let mut seen = String::new();
    let mut errors = 0;
    for (then, status) in [
        ("respond", RequestStatus::Completed),
        ("fail", RequestStatus::Failed),
        ("panic", RequestStatus::Failed),
        ("hang", RequestStatus::Cancelled),
    ] {
        let handle = executor.submit(call().header("then", then)).await.unwrap();
        pass(ms(20)).await;
        handle.cancel();
        let event = handle.event().finished().await;
        assert_eq!(event.status, status);
        write!(seen, "\n{event:?} {handle:?} {:?}", handle.event()).unwrap();
        if let Err(error) = handle.await {
            errors += 1;
            write!(seen, "\n{error} {error:?}").unwrap();
            let mut source = std::error::Error::source(&error);
            while let Some(cause) = source {
                write!(seen, "\n{cause} {cause:?}").unwrap();
                source = cause.source();
            }
        }
    }
    assert_eq!(errors, 3);
    let exhausted = executor.submit(call()).await.unwrap().await.unwrap_err();
    assert!(exhausted.is_exhausted());
    write!(seen, "\n{exhausted} {exhausted:?} {:?}", executor.monitor().available()).unwrap();
    write!(seen, "\n{:?}", executor.monitor().limiter().limits()).unwrap();
    write!(seen, "\n{:?} {executor:?} {:?}", call(), executor.monitor()).unwrap();
    executor.stop(Shutdown::Graceful).await;
    let refused = executor.try_submit(call()).unwrap_err();
    write!(seen, "\n{refused}").unwrap();
    seen.push_str(&tracing_output.text());

    assert!(
        !seen.contains(SECRET),
        "{}",
        seen.lines().find(|line| line.contains(SECRET)).unwrap()
    );
    // Texts that are not secret are still shown.
    for shown in [
        "page=2",
        "api.example.com",
        "POST",
        "error sending request",
        "could not reach",
        "cents",
    ] {
        assert!(seen.contains(shown), "{shown}");
    }
}

#[tokio::test(start_paused = true)]
async fn each_call_has_a_span_that_follows_it_through_the_queue_and_records_its_end() {
    let tracing_output = TracingOutput::default();
    let _guard = tracing::subscriber::set_default(tracing_subscriber::registry().with(tracing_output.clone()));
    let client = service_fn(async |_: Request<()>| {
        tracing::info!("in the client");
        Ok::<_, BoxError>(Response::builder().status(202).body(()).unwrap())
    });
    let executor = Executor::builder().build(client).unwrap();
    executor.start().unwrap();
    let request = || Request::get("http://api.example.com/").body(()).unwrap();
    let handle = executor
        .submit(Call::from(request()).request_id("my-own"))
        .await
        .unwrap();
    let event = handle.event().clone();
    handle.await.unwrap();
    pass(ms(1)).await;
    let text = tracing_output.text();
    let lines: Vec<_> = text.lines().filter(|line| !line.is_empty()).collect();
    assert_eq!(
        lines[0],
        "span outbound_call request_id=my-own http.request.method=\"GET\" server.address=\"api.example.com\""
    );
    assert!(
        lines[1].starts_with("in outbound_call: message=in the client"),
        "{}",
        lines[1]
    );
    assert!(
        lines[1].ends_with("status=\"COMPLETED\" http.response.status_code=202"),
        "{}",
        lines[1]
    );
    // The span closes when the call ends, although the test still holds a handle to the event.
    assert_eq!(lines[2], "closed");
    drop(event);
    // A call through the `Service` interface of the executor opens a span, too.
    executor.clone().oneshot(request()).await.unwrap();
    assert_eq!(tracing_output.text().matches("span outbound_call").count(), 2);
}

#[tokio::test(start_paused = true)]
async fn the_span_of_the_caller_follows_a_call_through_the_queue() {
    let tracing_output = TracingOutput::default();
    let _guard = tracing::subscriber::set_default(tracing_subscriber::registry().with(tracing_output.clone()));
    let client = service_fn(async |_: ()| {
        tracing::info!("before");
        tokio::time::sleep(ms(1)).await;
        tracing::info!("after");
        Ok::<_, BoxError>(())
    });
    let queue = tower::ServiceBuilder::new()
        .layer(tower_outbound::QueueLayer::new(1).unwrap())
        .service(client);
    let caller = tracing::info_span!("the_caller");
    queue.oneshot(()).instrument(caller).await.unwrap();
    assert!(tracing_output.text().contains("in the_caller: message=before"));
    assert!(tracing_output.text().contains("in the_caller: message=after"));
}
