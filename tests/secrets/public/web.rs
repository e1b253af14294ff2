//! The same for what is there for http.

use super::{Told, request};
use crate::table::Secrets;
use http::{HeaderMap, Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody as Frames};
use hyper::body::Bytes;
use std::{io, time::Duration, time::SystemTime};
use tower::{BoxError, Layer, Service, ServiceExt, retry::Policy, service_fn};
use tower_outbound::{
    ApiTokensUsed, Deadline, DeadlineLayer, Executor, Limits, Rate, RateLimiter,
    body::{BodyLayer, CollectLayer, StreamLayer},
    client::Reqwest,
    error::{BodyFailed, BodyTooLarge, DeadlineExceeded, RetryAfterTooLong},
    provider::{AverageEstimate, CharacterEstimate, FeedbackLayer, Provider, Reset, Unit, UsageLayer},
    rate::{AsCharged, Budget, ByUsage},
    retry::RetryPolicy,
};

type Body = Frames<futures_util::stream::Iter<std::vec::IntoIter<Result<Frame<Bytes>, io::Error>>>>;

/// Answers with the secrets it was sent, and breaks off.
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

pub(super) async fn tell(secrets: &Secrets, told: &mut Told) {
    let limiter = RateLimiter::new(Limits::new().requests(Rate::per_second(5))).unwrap();

    // Clients and bodies.
    told.debug(&BodyLayer::new());
    let mut bodies = BodyLayer::new().layer(client());
    told.debug(&bodies);
    told.debug(&bodies.call(request(secrets)));
    told.debug(&StreamLayer::new());
    let mut streams = StreamLayer::new().layer(bodies);
    told.debug(&streams);
    let future = streams.call(request(secrets));
    told.debug(&future);
    let response = future.await.unwrap();
    told.debug(response.body());
    drop(response);
    told.debug(&CollectLayer::new(9).record());
    let mut collect = CollectLayer::new(9_999_999).layer(client());
    told.debug(&collect);
    let future = collect.call(request(secrets));
    told.debug(&future);
    let failed = future.await.unwrap_err();
    told.display(failed.downcast_ref::<BodyFailed>().unwrap());
    let mut long = request(secrets);
    *long.body_mut() = Bytes::from_static(&[b'x'; 10]);
    let too_large = CollectLayer::new(9).layer(client()).call(long).await.unwrap_err();
    told.display(too_large.downcast_ref::<BodyTooLarge>().unwrap());
    told.debug(&UsageLayer::new());
    let mut usage = UsageLayer::new().layer(client());
    told.debug(&usage);
    let future = usage.call(request(secrets));
    told.debug(&future);
    let response = future.await.unwrap();
    told.debug(response.extensions().get::<ApiTokensUsed>().unwrap());
    told.debug(response.body());
    drop(response.into_body().collect().await);
    let mut headers = HeaderMap::new();
    headers.insert("x-own-key", secrets.of("default header").parse().unwrap());
    let reqwest = reqwest::Client::builder().default_headers(headers).build().unwrap();
    let mut reqwest = Reqwest::new(reqwest);
    told.debug(&reqwest);
    told.debug(&reqwest.call(request(secrets)));

    // What providers say.
    let feedback = FeedbackLayer::new(limiter.clone(), Provider::OpenAi)
        .adopt_limits()
        .adapt();
    told.debug(&feedback);
    let mut listens = feedback.layer(client());
    told.debug(&listens);
    told.debug(&listens.call(request(secrets)));
    let mut headers = request(secrets).headers().clone();
    headers.insert("x-ratelimit-remaining-tokens", 5.into());
    headers.insert("x-ratelimit-reset-tokens", "5s".parse().unwrap());
    headers.insert("retry-after", secrets.of("retry-after").parse().unwrap());
    let heard = Provider::OpenAi.rate_limit_info(&headers, SystemTime::now());
    told.debug(&heard);
    told.debug(&heard.windows[0]);
    told.debug(&Reset::Full(Duration::ZERO));
    told.debug(&Unit::Tokens);
    told.display(&Provider::OpenAi);
    told.display(&secrets.of("provider").parse::<Provider>().unwrap_err());

    // Retries, settlement, deadlines.
    let mut policy = RetryPolicy::new().max_delay(Duration::from_secs(1));
    told.debug(&policy);
    let mut answered = Ok(Response::builder()
        .status(503)
        .body(request(secrets).into_body())
        .unwrap());
    told.debug(&Policy::retry(&mut policy, &mut request(secrets), &mut answered).unwrap());
    let mut answered = Ok(Response::builder()
        .status(429)
        .header("retry-after", "9")
        .body(Bytes::new())
        .unwrap());
    assert!(Policy::retry(&mut policy, &mut request(secrets), &mut answered).is_none());
    told.display(answered.unwrap_err().downcast_ref::<RetryAfterTooLong>().unwrap());
    told.debug(&AverageEstimate::new(5));
    told.debug(&CharacterEstimate::new());
    told.debug(&ByUsage::default());
    told.debug(&AsCharged);
    told.debug(&Budget::Tokens);
    told.debug(&Deadline::after(Duration::ZERO));
    let layer = DeadlineLayer::new().timeout(Duration::ZERO);
    told.debug(&layer);
    let deadlines = layer.layer(client());
    told.debug(&deadlines);
    let late = deadlines.oneshot(request(secrets)).await.unwrap_err();
    told.display(late.downcast_ref::<DeadlineExceeded>().unwrap());

    let executor = Executor::builder().build_streaming(client()).unwrap();
    executor.start().unwrap();
    let body = executor
        .submit(request(secrets))
        .await
        .unwrap()
        .await
        .unwrap()
        .into_body();
    told.debug(&body);
    drop(body.collect().await);
}
