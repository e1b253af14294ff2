//! Shows the types of the feature `http` for the test of public types.

use super::{Shown, request};
use crate::table::Secrets;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody as Frames};
use hyper::body::Bytes;
use std::{
    io,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};
use tower::{BoxError, Layer, Service, ServiceExt, retry::Policy, service_fn};
use tower_outbound::{
    ApiTokensUsed, Deadline, DeadlineLayer, EventHandle, EventLayer, Executor, Limits, Rate, RateLimiter,
    body::{BodyLayer, CheckLayer, CollectLayer, StreamLayer},
    client::Reqwest,
    error::{BadResponse, BodyFailed, BodyTooLarge, DeadlineExceeded, RetryAfterTooLong},
    event::{Events, LimitReport, Observer},
    provider::{
        AverageEstimate, CharacterEstimate, FeedbackLayer, Provider, QuantileEstimate, Reset, Source, Unit, UsageLayer,
    },
    rate::{AsCharged, Budget, ByUsage, CallKind},
    retry::{ByClone, ByWholeBody, RetryPolicy},
};

type Body = Frames<futures_util::stream::Iter<std::vec::IntoIter<Result<Frame<Bytes>, io::Error>>>>;

/// A service that responds with the headers and the body of the request, which hold secrets, and fails in the middle of
/// the body.
fn client() -> impl Service<Request<Bytes>, Response = Response<Body>, Error = BoxError, Future: Send + Unpin>
+ Clone
+ Send
+ std::fmt::Debug
+ 'static {
    service_fn(|request: Request<Bytes>| {
        let frames = vec![
            Ok(Frame::data(request.body().clone())),
            Err(io::Error::other(format!("broke off at {}", request.uri()))),
        ];
        let mut response = Response::new(Frames::new(futures_util::stream::iter(frames)));
        *response.headers_mut() = request.headers().clone();
        std::future::ready(Ok(response))
    })
}

/// Keeps a limit that a response has reported.
#[derive(Default)]
struct Reported(Mutex<Option<LimitReport>>);

impl Observer for Reported {
    fn limit_reported(&self, _: &EventHandle, report: &LimitReport) {
        *self.0.lock().unwrap() = Some(*report);
    }
}

async fn limit_report() -> LimitReport {
    let events = Events::new();
    let reported = Arc::new(Reported::default());
    events.observe(reported.clone());
    let limiter = RateLimiter::new(Limits::new().requests(Rate::per_minute(5))).unwrap();
    let client = service_fn(async |_: Request<()>| {
        Response::builder()
            .header("x-ratelimit-remaining-requests", "1")
            .body(())
    });
    let client = FeedbackLayer::new(limiter, Provider::OpenAi).layer(client);
    let service = EventLayer::processing().report_to(&events).layer(client);
    service.oneshot(Request::new(())).await.unwrap();
    reported.0.lock().unwrap().take().unwrap()
}

pub(super) async fn show(secrets: &Secrets, shown: &mut Shown) {
    shown.debug(&limit_report().await);
    let limiter = RateLimiter::new(Limits::new().requests(Rate::per_second(5))).unwrap();

    // Clients, bodies, and their layers.
    shown.debug(&BodyLayer::new());
    let mut bodies = BodyLayer::new().layer(client());
    shown.debug(&bodies);
    shown.debug(&bodies.call(request(secrets)));
    shown.debug(&StreamLayer::new());
    let mut streams = StreamLayer::new().layer(bodies);
    shown.debug(&streams);
    let future = streams.call(request(secrets));
    shown.debug(&future);
    let response = future.await.unwrap();
    shown.debug(response.body());
    drop(response);
    shown.debug(&CollectLayer::new(9).record());
    let mut collect = CollectLayer::new(9_999_999).layer(client());
    shown.debug(&collect);
    let future = collect.call(request(secrets));
    shown.debug(&future);
    let failed = future.await.unwrap_err();
    shown.display(failed.downcast_ref::<BodyFailed>().unwrap());
    let mut long = request(secrets);
    *long.body_mut() = Bytes::from_static(&[b'x'; 10]);
    let too_large = CollectLayer::new(9).layer(client()).call(long).await.unwrap_err();
    shown.display(too_large.downcast_ref::<BodyTooLarge>().unwrap());
    // The error has the whole response, and a message of its body.
    let refused = service_fn(|request: Request<Bytes>| {
        let message = format!("could not reach {}", request.uri());
        let body = serde_json::json!({"error": {"message": message}, "prompt": request.body().to_vec()});
        let mut response = Response::new(Bytes::from(body.to_string()));
        *response.headers_mut() = request.headers().clone();
        std::future::ready(Ok::<_, BoxError>(response))
    });
    shown.debug(&CheckLayer::new());
    let mut check = CheckLayer::new().layer(refused);
    shown.debug(&check);
    let future = check.call(request(secrets));
    shown.debug(&future);
    let error = future.await.unwrap_err();
    let error = error.downcast_ref::<BadResponse>().unwrap();
    shown.display(error);
    shown.debug(&error.reason());
    assert!(error.message().is_some());
    shown.debug(&UsageLayer::new());
    let mut usage = UsageLayer::new().layer(client());
    shown.debug(&usage);
    let future = usage.call(request(secrets));
    shown.debug(&future);
    let response = future.await.unwrap();
    shown.debug(response.extensions().get::<ApiTokensUsed>().unwrap());
    shown.debug(response.body());
    drop(response.into_body().collect().await);
    let mut headers = HeaderMap::new();
    headers.insert("x-own-key", secrets.of("default header").parse().unwrap());
    let reqwest = reqwest::Client::builder().default_headers(headers).build().unwrap();
    let mut reqwest = Reqwest::new(reqwest);
    shown.debug(&reqwest);
    shown.debug(&reqwest.call(request(secrets)));

    // The layer that reads a provider's limits from responses, and its types.
    let feedback = FeedbackLayer::new(limiter.clone(), Provider::OpenAi)
        .adopt_limits()
        .adapt();
    shown.debug(&feedback);
    let mut service = feedback.layer(client());
    shown.debug(&service);
    shown.debug(&service.call(request(secrets)));
    let mut headers = request(secrets).headers().clone();
    headers.insert("x-ratelimit-remaining-tokens", 5.into());
    headers.insert("x-ratelimit-reset-tokens", "5s".parse().unwrap());
    headers.insert("retry-after", secrets.of("retry-after").parse().unwrap());
    let info = Provider::OpenAi.rate_limit_info(&headers, SystemTime::now());
    shown.debug(&info);
    shown.debug(&info.windows[0]);
    shown.debug(&Reset::Full(Duration::ZERO));
    shown.debug(&Unit::Tokens);
    shown.display(&Provider::OpenAi);
    shown.display(&secrets.of("provider").parse::<Provider>().unwrap_err());
    shown.debug(&Provider::OpenAi.key_header(&secrets.of("key")).unwrap());
    shown.display(
        &Provider::OpenAi
            .key_header(&format!("{} x", secrets.of("key")))
            .unwrap_err(),
    );

    // Retries, settlement and deadlines.
    let mut policy = RetryPolicy::new().max_delay(Duration::from_secs(1));
    shown.debug(&policy);
    let mut result = Ok(Response::builder()
        .status(503)
        .body(request(secrets).into_body())
        .unwrap());
    shown.debug(&Policy::retry(&mut policy, &mut request(secrets), &mut result).unwrap());
    // The error has the whole response, whose headers and body may contain secrets.
    let (head, body) = request(secrets).into_parts();
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::TOO_MANY_REQUESTS;
    *response.headers_mut() = head.headers;
    response.headers_mut().insert("retry-after", 9.into());
    let mut result = Ok(response);
    assert!(Policy::retry(&mut policy, &mut request(secrets), &mut result).is_none());
    shown.display(result.unwrap_err().downcast_ref::<RetryAfterTooLong>().unwrap());
    shown.debug(&ByClone);
    shown.debug(&ByWholeBody);
    shown.debug(&AverageEstimate::new(5));
    shown.debug(&QuantileEstimate::new(0.95).unwrap());
    let limiter = RateLimiter::new(Limits::new().requests(Rate::per_minute(5))).unwrap();
    let learned = FeedbackLayer::new(limiter, Provider::OpenAi).follow().learned();
    shown.debug(&learned[0]);
    shown.debug(&Source::Told);
    shown.debug(&CharacterEstimate::new());
    shown.debug(&ByUsage::default());
    shown.debug(&AsCharged);
    shown.debug(&Budget::Tokens);
    shown.debug(&CallKind::of("sk-secret-model"));
    shown.debug(&Deadline::after(Duration::ZERO));
    let layer = DeadlineLayer::new().timeout(Duration::ZERO);
    shown.debug(&layer);
    let deadlines = layer.layer(client());
    shown.debug(&deadlines);
    let late = deadlines.oneshot(request(secrets)).await.unwrap_err();
    shown.display(late.downcast_ref::<DeadlineExceeded>().unwrap());

    let executor = Executor::builder().build_streaming(client()).unwrap();
    executor.start().unwrap();
    let body = executor
        .submit(request(secrets))
        .await
        .unwrap()
        .await
        .unwrap()
        .into_body();
    shown.debug(&body);
    drop(body.collect().await);
}
