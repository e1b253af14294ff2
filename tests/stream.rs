//! Tests of streamed responses: a call lasts until the body of its response has ended.

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use std::{
    convert::Infallible,
    io,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    sync::mpsc,
    time::{Instant, advance, sleep, timeout},
};
use tower::{BoxError, Layer, ServiceBuilder, ServiceExt, retry::Policy, service_fn};
use tower_outbound::{
    Call, ConcurrencyLimitLayer, EventLayer, Executor, Limits, QueueLayer, RequestStatus, Shutdown,
    body::{BodyLayer, CollectLayer, StreamBody, StreamLayer},
    error::{BodyFailed, BodyTooLarge, Cancelled},
    event::Events,
};

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// A body whose frames the test sends through a channel.
struct Pieces(mpsc::UnboundedReceiver<Result<&'static str, io::Error>>);

type Sender = mpsc::UnboundedSender<Result<&'static str, io::Error>>;

impl Body for Pieces {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        let piece = self.0.poll_recv(cx);
        piece.map(|piece| piece.map(|piece| piece.map(|piece| Frame::data(Bytes::from_static(piece.as_bytes())))))
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::new()
    }
}

/// A test server that responds with the status code given as the body of the request. The test sends the body of each
/// response.
#[derive(Clone, Default)]
struct Server {
    open: Arc<Mutex<Vec<Sender>>>,
}

impl Server {
    fn client(
        &self,
    ) -> impl tower::Service<Request<u16>, Response = Response<Pieces>, Error = Infallible, Future: Send>
    + Clone
    + Send
    + 'static {
        let server = self.clone();
        service_fn(move |request: Request<u16>| {
            let (sender, receiver) = mpsc::unbounded_channel();
            server.open.lock().unwrap().push(sender);
            async move {
                sleep(ms(10)).await;
                let mut response = Response::new(Pieces(receiver));
                *response.status_mut() = StatusCode::from_u16(*request.body()).unwrap();
                Ok(response)
            }
        })
    }

    fn body(&self, at: usize) -> Sender {
        self.open.lock().unwrap()[at].clone()
    }

    /// Ends the body of the response number `at`.
    fn end(&self, at: usize) {
        let (closed, _) = mpsc::unbounded_channel();
        self.open.lock().unwrap()[at] = closed;
    }

    fn calls(&self) -> usize {
        self.open.lock().unwrap().len()
    }
}

fn executor(server: &Server, concurrency: usize) -> Executor<u16, StreamBody<Pieces>> {
    let builder = Executor::builder().limits(Limits::new()).concurrency_limit(concurrency);
    let executor = builder.build_streaming(server.client()).unwrap();
    executor.start().unwrap();
    executor
}

fn get(status: u16) -> Call<u16> {
    Call::from(Request::new(status))
}

async fn settle() {
    for _ in 0..20 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_lasts_until_the_last_byte_while_its_caller_has_the_response_from_the_head_on() {
    let server = Server::default();
    let executor = executor(&server, 1);
    let call = executor.submit(get(200)).await.unwrap();
    let next = executor.submit(get(200)).await.unwrap();
    let event = call.event().clone();
    let begun = Instant::now();

    let response = call.await.unwrap();
    assert_eq!((response.status(), begun.elapsed()), (StatusCode::OK, ms(10)));
    assert_eq!(event.status(), RequestStatus::Calling);
    let mut body = response.into_body();
    advance(ms(50)).await;
    server.body(0).send(Ok("one ")).unwrap();
    assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), "one ");
    advance(ms(30)).await;
    server.body(0).send(Ok("two")).unwrap();
    assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), "two");
    settle().await;
    // The first call still holds the permit, so the second call has not been sent.
    assert_eq!((server.calls(), executor.monitor().in_flight()), (1, 1));

    advance(ms(5)).await;
    server.end(0);
    assert!(body.frame().await.is_none());
    let event = event.finished().await;
    assert_eq!(event.status, RequestStatus::Completed);
    assert_eq!((event.response_status_code, event.response_bytes), (Some(200), Some(7)));
    assert_eq!(event.time_to_first_byte(), Some(ms(60)));
    assert_eq!(event.time_to_last_byte(), Some(ms(90)));
    assert_eq!(event.time_calling(), Some(ms(95)));
    assert_eq!(event.attempts[0].status_code, Some(200));

    let next = next.await.unwrap();
    server.end(1);
    assert_eq!(next.into_body().collect().await.unwrap().to_bytes(), "");
    settle().await;
    assert_eq!(executor.monitor().totals().completed, 2);
    assert_eq!(executor.monitor().in_flight(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_dropped_body_cancels_its_call_and_releases_the_permit() {
    let server = Server::default();
    let executor = executor(&server, 1);
    for at in 0..3 {
        let call = executor.submit(get(200)).await.unwrap();
        let event = call.event().clone();
        let mut body = call.await.unwrap().into_body();
        if at > 0 {
            server.body(at).send(Ok("some")).unwrap();
            body.frame().await.unwrap().unwrap();
        }
        drop(body);
        let event = event.finished().await;
        assert_eq!(event.status, RequestStatus::Cancelled);
        assert_eq!(event.response_bytes, Some(if at > 0 { 4 } else { 0 }));
        assert_eq!(event.attempts[0].error_type.as_deref(), Some("Cancelled"));
        settle().await;
        assert_eq!(executor.monitor().in_flight(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn a_failed_body_fails_its_call_and_its_reader_has_the_unchanged_error() {
    let server = Server::default();
    let executor = executor(&server, 1);
    let call = executor.submit(get(200)).await.unwrap();
    let event = call.event().clone();
    let mut body = call.await.unwrap().into_body();
    server
        .body(0)
        .send(Err(io::Error::other("reset at https://u:p@h/")))
        .unwrap();
    let error = body.frame().await.unwrap().unwrap_err();
    assert!(error.is::<io::Error>());
    assert!(body.frame().await.is_none() && body.is_end_stream());
    let event = event.finished().await;
    assert_eq!(event.status, RequestStatus::Failed);
    assert_eq!(event.error_type.as_deref(), Some("BodyFailed"));
    assert_eq!(
        event.error_message.as_deref(),
        Some("the response's body failed: reset at https://h/")
    );
}

#[tokio::test(start_paused = true)]
async fn a_cancelled_or_stopped_call_ends_its_body_with_an_error() {
    let server = Server::default();
    let executor = executor(&server, 5);
    let mut call = executor.submit(get(200)).await.unwrap();
    let mut body = (&mut call).await.unwrap().into_body();
    let waiting = tokio::spawn(async move { body.frame().await });
    settle().await;
    call.cancel();
    let error = waiting.await.unwrap().unwrap().unwrap_err();
    assert!(error.is::<Cancelled>());
    assert_eq!(call.event().finished().await.status, RequestStatus::Cancelled);

    let call = executor.submit(get(200)).await.unwrap();
    let event = call.event().clone();
    let mut body = call.await.unwrap().into_body();
    let report = executor.stop(Shutdown::Immediate).await;
    assert_eq!(report.cancelled, 1);
    assert!(body.frame().await.unwrap().unwrap_err().is::<Cancelled>());
    assert!(body.frame().await.is_none());
    assert_eq!(event.status(), RequestStatus::Cancelled);
}

#[tokio::test(start_paused = true)]
async fn a_graceful_stop_waits_for_bodies() {
    let server = Server::default();
    let executor = executor(&server, 5);
    let call = executor.submit(get(200)).await.unwrap();
    let body = call.await.unwrap().into_body();
    let stop = tokio::spawn({
        let executor = executor.clone();
        async move { executor.stop(Shutdown::Graceful).await }
    });
    sleep(ms(500)).await;
    assert!(!stop.is_finished());
    server.body(0).send(Ok("late")).unwrap();
    server.end(0);
    assert_eq!(body.collect().await.unwrap().to_bytes(), "late");
    assert_eq!(stop.await.unwrap().completed, 1);
}

/// A policy that retries a 503: it sends the request again for a status of 200, and keeps the body of the 503.
#[derive(Clone)]
struct RetryUnavailable(Arc<Mutex<Vec<Bytes>>>);

impl Policy<Request<u16>, Response<StreamBody<Pieces>>, BoxError> for RetryUnavailable {
    type Future = std::future::Ready<()>;

    fn retry(
        &mut self,
        request: &mut Request<u16>,
        result: &mut Result<Response<StreamBody<Pieces>>, BoxError>,
    ) -> Option<Self::Future> {
        let response = result.as_ref().ok().filter(|response| response.status() == 503)?;
        let document = response.body().bytes()?.clone();
        self.0.lock().unwrap().push(document);
        *request.body_mut() = 200;
        Some(std::future::ready(()))
    }

    fn clone_request(&mut self, request: &Request<u16>) -> Option<Request<u16>> {
        Some(request.clone())
    }
}

#[tokio::test(start_paused = true)]
async fn a_failed_response_is_read_within_the_call_so_that_it_can_be_retried() {
    let (server, documents) = (Server::default(), Arc::default());
    let executor = Executor::builder()
        .layer(tower::retry::RetryLayer::new(RetryUnavailable(Arc::clone(&documents))))
        .build_streaming(server.client())
        .unwrap();
    executor.start().unwrap();
    let call = executor.submit(get(503)).await.unwrap();
    let event = call.event().clone();
    sleep(ms(20)).await;
    server.body(0).send(Ok("too ")).unwrap();
    server.body(0).send(Ok("busy")).unwrap();
    server.end(0);
    let body = call.await.unwrap().into_body();
    assert_eq!(*documents.lock().unwrap(), ["too busy"]);
    server.body(1).send(Ok("here")).unwrap();
    server.end(1);
    assert_eq!(body.collect().await.unwrap().to_bytes(), "here");
    let event = event.finished().await;
    let codes: Vec<_> = event.attempts.iter().map(|attempt| attempt.status_code).collect();
    assert_eq!(codes, [Some(503), Some(200)]);
    assert_eq!(event.response_bytes, Some(4));
}

#[tokio::test(start_paused = true)]
async fn of_a_failed_response_at_most_64_kib_are_read() {
    const LONG: &str = match std::str::from_utf8(&[b'x'; 50_000]) {
        Ok(text) => text,
        Err(_) => "",
    };
    let server = Server::default();
    let executor = executor(&server, 1);
    let call = executor.submit(get(500)).await.unwrap();
    sleep(ms(20)).await;
    for _ in 0..3 {
        server.body(0).send(Ok(LONG)).unwrap();
    }
    let response = call.await.unwrap();
    assert_eq!(response.status(), 500);
    assert_eq!(response.body().bytes().unwrap().len(), 64 * 1024);
    assert_eq!(
        response.into_body().collect().await.unwrap().to_bytes().len(),
        64 * 1024
    );
    // The rest of the body beyond 64 KiB was dropped, so the server can send no more of it.
    assert!(server.body(0).send(Ok("more")).is_err());
}

#[tokio::test(start_paused = true)]
async fn a_detached_call_does_not_wait_for_its_body() {
    let server = Server::default();
    let executor = executor(&server, 1);
    let call = executor.submit(get(200)).await.unwrap();
    let event = call.event().clone();
    drop(call);
    let event = event.finished().await;
    assert_eq!(
        (event.status, event.time_calling()),
        (RequestStatus::Completed, Some(ms(10)))
    );
}

#[tokio::test(start_paused = true)]
async fn an_executor_as_a_service_cancels_a_call_that_is_dropped_before_the_head_and_not_after() {
    let server = Server::default();
    let executor = executor(&server, 5);
    let monitor = executor.monitor();
    let call = executor.clone().oneshot(Request::new(200));
    assert!(timeout(ms(5), call).await.is_err());
    settle().await;
    assert_eq!((monitor.totals().cancelled, monitor.in_flight()), (1, 0));

    let body = executor.clone().oneshot(Request::new(200)).await.unwrap().into_body();
    settle().await;
    assert_eq!((monitor.totals().cancelled, monitor.in_flight()), (1, 1));
    server.end(1);
    body.collect().await.unwrap();
    settle().await;
    assert_eq!((monitor.totals().completed, monitor.in_flight()), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn a_body_layer_and_a_stream_layer_do_the_same_in_any_stack() {
    let (server, events) = (Server::default(), Events::new());
    let concurrency = ConcurrencyLimitLayer::new(1).unwrap();
    let limit = concurrency.limit().clone();
    let service = ServiceBuilder::new()
        .layer(StreamLayer::new())
        .layer(EventLayer::queued().report_to(&events))
        .layer(QueueLayer::new(10).unwrap())
        .layer(EventLayer::processing())
        .layer(concurrency)
        .layer(EventLayer::calling())
        .layer(BodyLayer::new())
        .service(server.client());
    let body = service.clone().oneshot(Request::new(200)).await.unwrap().into_body();
    settle().await;
    assert_eq!((events.totals().open(), limit.in_flight()), (1, 1));
    server.body(0).send(Ok("hello")).unwrap();
    server.end(0);
    assert_eq!(body.collect().await.unwrap().to_bytes(), "hello");
    settle().await;
    assert_eq!((events.totals().completed, limit.in_flight()), (1, 0));

    // Dropping the response future before the response has arrived cancels the call.
    assert!(
        timeout(ms(5), service.clone().oneshot(Request::new(200)))
            .await
            .is_err()
    );
    settle().await;
    assert_eq!((events.totals().cancelled, limit.in_flight()), (1, 0));
    // Dropping the body of the response cancels the call, too.
    drop(service.clone().oneshot(Request::new(200)).await.unwrap());
    settle().await;
    assert_eq!((events.totals().cancelled, limit.in_flight()), (2, 0));
}

#[tokio::test(start_paused = true)]
async fn a_timeout_around_the_limits_ends_a_body_that_takes_too_long() {
    let server = Server::default();
    let executor = Executor::builder()
        .layer(tower::timeout::TimeoutLayer::new(ms(100)))
        .build_streaming(server.client())
        .unwrap();
    executor.start().unwrap();
    let call = executor.submit(get(200)).await.unwrap();
    let event = call.event().clone();
    let begun = Instant::now();
    let mut body = call.await.unwrap().into_body();
    assert!(body.frame().await.unwrap().unwrap_err().is::<Cancelled>());
    assert_eq!(begun.elapsed(), ms(100));
    let event = event.finished().await;
    assert_eq!(
        (event.status, event.error_type.as_deref()),
        (RequestStatus::Failed, Some("Elapsed"))
    );
}

#[tokio::test(start_paused = true)]
async fn a_body_layer_without_a_stream_layer_passes_bodies_on() {
    let server = Server::default();
    let service = BodyLayer::new().layer(server.client());
    for status in [200, 500] {
        let response = service.clone().oneshot(Request::new(status)).await.unwrap();
        assert_eq!(response.body().bytes(), None);
        server.end(server.calls() - 1);
        response.into_body().collect().await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_collected_body_is_a_part_of_its_call_and_may_be_recorded() {
    let server = Server::default();
    let executor = Executor::builder()
        .concurrency_limit(1)
        .build(CollectLayer::new(20).record().layer(server.client()))
        .unwrap();
    executor.start().unwrap();
    let call = executor.submit(get(200)).await.unwrap();
    let event = call.event().clone();
    sleep(ms(50)).await;
    server.body(0).send(Ok(r#"{"token":"#)).unwrap();
    sleep(ms(50)).await;
    assert_eq!(event.status(), RequestStatus::Calling);
    server.body(0).send(Ok(r#""s3"}"#)).unwrap();
    server.end(0);
    assert_eq!(call.await.unwrap().into_body(), r#"{"token":"s3"}"#);
    let event = event.finished().await;
    assert_eq!(event.response_body.unwrap().as_str(), Some(r#"{"token":"[redacted]"}"#));
    assert_eq!(event.response_bytes, Some(14));
    assert_eq!((event.attempts.len(), event.status), (1, RequestStatus::Completed));

    // The body of the second call is one byte longer than the limit of 20 bytes.
    let call = executor.submit(get(200)).await.unwrap();
    let event = call.event().clone();
    sleep(ms(20)).await;
    server.body(1).send(Ok("12345678901234567890")).unwrap();
    server.body(1).send(Ok("1")).unwrap();
    let error = call.await.unwrap_err();
    assert_eq!(error.find::<BodyTooLarge>().unwrap().limit(), 20);
    assert_eq!(event.finished().await.error_type.as_deref(), Some("BodyTooLarge"));

    let call = executor.submit(get(200)).await.unwrap();
    sleep(ms(20)).await;
    server.body(2).send(Err(io::Error::other("reset"))).unwrap();
    let error = call.await.unwrap_err();
    assert_eq!(error.find::<BodyFailed>().unwrap().message(), "reset");
}

/// An executor that retries as often as it likes without a delay of its own, around a client whose bodies are streamed.
fn retrying(server: &Server) -> Executor<u16, StreamBody<Pieces>> {
    let executor = Executor::builder()
        .limits(Limits::new())
        .layer(tower::retry::RetryLayer::new(RetryUnavailable(Arc::default())))
        .build_streaming(server.client())
        .unwrap();
    executor.start().unwrap();
    executor
}

#[tokio::test(start_paused = true)]
async fn a_failure_whose_body_does_not_end_is_returned_after_fifteen_seconds_with_what_has_arrived() {
    let server = Server::default();
    let streaming = executor(&server, 5);
    let collecting = Executor::builder()
        .limits(Limits::new())
        .build(CollectLayer::new(1_000).layer(server.client()))
        .unwrap();
    collecting.start().unwrap();
    for status in [302, 404, 429, 503] {
        let begun = Instant::now();
        let at = server.calls();
        let streamed = streaming.submit(get(status)).await.unwrap();
        let collected = collecting.submit(get(status)).await.unwrap();
        let events = [streamed.event().clone(), collected.event().clone()];
        sleep(ms(20)).await;
        server.body(at).send(Ok("slow")).unwrap();
        server.body(at + 1).send(Ok("slow")).unwrap();
        let (streamed, collected) = (streamed.await.unwrap(), collected.await.unwrap());
        assert_eq!(begun.elapsed(), ms(15_010));
        assert_eq!([streamed.status().as_u16(), collected.status().as_u16()], [status; 2]);
        assert_eq!(streamed.body().bytes().unwrap(), "slow");
        assert_eq!(collected.body(), "slow");
        for event in events {
            let event = event.finished().await;
            assert_eq!(
                (event.response_status_code, event.response_bytes),
                (Some(status), Some(4))
            );
            assert_eq!(event.attempts[0].status_code, Some(status));
            let reason = StatusCode::from_u16(status).unwrap();
            assert_eq!(
                event.logs[0].message,
                format!("The body of the response {reason} is cut off: it did not end within 15s")
            );
        }
    }
    assert_eq!(
        (streaming.monitor().in_flight(), collecting.monitor().in_flight()),
        (0, 0)
    );
    // The rest of the body was dropped.
    assert!(server.body(0).send(Ok("more")).is_err());
}

#[tokio::test(start_paused = true)]
async fn a_failure_whose_body_does_not_end_is_retried() {
    let server = Server::default();
    let executor = retrying(&server);
    let begun = Instant::now();
    let call = executor.submit(get(503)).await.unwrap();
    let event = call.event().clone();
    let response = call.await.unwrap();
    assert_eq!((response.status(), begun.elapsed()), (StatusCode::OK, ms(15_020)));
    server.end(1);
    response.into_body().collect().await.unwrap();
    let codes: Vec<_> = event
        .finished()
        .await
        .attempts
        .iter()
        .map(|it| it.status_code)
        .collect();
    assert_eq!(codes, [Some(503), Some(200)]);
}

#[tokio::test(start_paused = true)]
async fn how_long_the_body_of_a_failure_is_read_can_be_set() {
    let server = Server::default();
    let begun = Instant::now();
    let layer = CollectLayer::new(1_000).failure_timeout(ms(250));
    let response = layer.layer(server.client()).oneshot(Request::new(500)).await.unwrap();
    assert_eq!((response.status().as_u16(), begun.elapsed()), (500, ms(260)));

    let begun = Instant::now();
    let service = ServiceBuilder::new()
        .layer(StreamLayer::new())
        .layer(BodyLayer::new().failure_timeout(Duration::ZERO))
        .service(server.client());
    let response = service.oneshot(Request::new(500)).await.unwrap();
    assert_eq!((response.status().as_u16(), begun.elapsed()), (500, ms(10)));

    let begun = Instant::now();
    let builder = Executor::builder().failure_timeout(ms(50));
    let executor = builder.build_streaming(server.client()).unwrap();
    executor.start().unwrap();
    executor.submit(get(500)).await.unwrap().await.unwrap();
    assert_eq!(begun.elapsed(), ms(60));
}

#[tokio::test(start_paused = true)]
async fn a_failure_whose_body_fails_or_is_too_large_is_returned_with_what_has_arrived() {
    let server = Server::default();
    let streaming = executor(&server, 5);
    let call = streaming.submit(get(503)).await.unwrap();
    let event = call.event().clone();
    sleep(ms(20)).await;
    server.body(0).send(Ok("half")).unwrap();
    server
        .body(0)
        .send(Err(io::Error::other("reset at https://u:p@h/")))
        .unwrap();
    let response = call.await.unwrap();
    assert_eq!(response.status(), 503);
    assert_eq!(response.body().bytes().unwrap(), "half");
    assert_eq!(
        event.finished().await.logs[0].message,
        "The body of the response 503 Service Unavailable is cut off: reset at https://h/"
    );

    let collecting = CollectLayer::new(6).layer(server.client());
    let call = tokio::spawn(collecting.oneshot(Request::new(500)));
    settle().await;
    server.body(1).send(Ok("four")).unwrap();
    server.body(1).send(Ok("five!")).unwrap();
    let response = call.await.unwrap().unwrap();
    assert_eq!((response.status().as_u16(), &**response.body()), (500, &b"fourfi"[..]));
}

#[tokio::test(start_paused = true)]
async fn the_status_of_an_attempt_is_recorded_even_if_a_deadline_ends_its_body() {
    let server = Server::default();
    let executor = Executor::builder()
        .limits(Limits::new())
        .timeout(ms(1_000))
        .build(CollectLayer::new(1_000).layer(server.client()))
        .unwrap();
    executor.start().unwrap();
    for status in [200, 429] {
        let begun = Instant::now();
        let call = executor.submit(get(status)).await.unwrap();
        let event = call.event().clone();
        assert!(call.await.unwrap_err().is_deadline_exceeded());
        assert_eq!(begun.elapsed(), ms(1_000));
        let event = event.finished().await;
        assert_eq!(event.attempts[0].status_code, Some(status));
    }

    // The same for a streamed response, of which the caller has the head.
    let builder = Executor::builder().timeout(ms(1_000));
    let executor = builder.build_streaming(server.client()).unwrap();
    executor.start().unwrap();
    let call = executor.submit(get(200)).await.unwrap();
    let event = call.event().clone();
    let _unread = call.await.unwrap();
    let event = event.finished().await;
    assert_eq!(
        (event.status, event.attempts[0].status_code),
        (RequestStatus::Failed, Some(200))
    );
}

/// A body that has always another frame, which is empty.
struct Endless;

impl Body for Endless {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(Some(Ok(Frame::data(Bytes::new()))))
    }
}

/// In real time, since a paused clock stands still while a task is always ready.
#[tokio::test]
async fn a_body_of_endless_empty_frames_does_not_escape_its_timeouts() {
    let client = service_fn(|request: Request<u16>| {
        let response = Response::builder().status(*request.body()).body(Endless);
        std::future::ready(Ok::<_, Infallible>(response.unwrap()))
    });
    let service = CollectLayer::new(1_000).failure_timeout(ms(50)).layer(client);
    let response = timeout(Duration::from_secs(30), service.clone().oneshot(Request::new(500)));
    assert_eq!(response.await.unwrap().unwrap().status(), 500);
    assert!(timeout(ms(50), service.oneshot(Request::new(200))).await.is_err());
}
