//! A stop that finishes the calls whose request has been sent, and cancels all others at once.

mod support;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::BodyExt;
use std::{
    convert::Infallible,
    future::{Future, pending, ready},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};
use support::{Arrivals, HANG, ms, pass, request, within_a_minute};
use tokio::time::{self, Instant, Sleep, timeout};
use tower::{
    BoxError, Service, ServiceExt,
    layer::layer_fn,
    retry::{Policy, RetryLayer},
    service_fn,
};
use tower_outbound::{Executor, ExecutorBuilder, Limits, RequestStatus, Shutdown};

const FAR: Duration = Duration::from_secs(100_000);

fn unlimited() -> ExecutorBuilder {
    Executor::builder().limits(Limits::new())
}

/// Tries a call with a status of 400 or more again, after `backoff`.
#[derive(Clone)]
struct RetryAfter(Duration);

impl<B: Clone, R, E> Policy<Request<B>, Response<R>, E> for RetryAfter {
    type Future = Pin<Box<dyn Future<Output = ()> + Send>>;

    fn retry(&mut self, _: &mut Request<B>, result: &mut Result<Response<R>, E>) -> Option<Self::Future> {
        let fails = result.as_ref().is_ok_and(|response| response.status().as_u16() >= 400);
        fails.then(|| match self.0 {
            Duration::ZERO => Box::pin(ready(())) as Self::Future,
            backoff => Box::pin(time::sleep(backoff)),
        })
    }

    fn clone_request(&mut self, req: &Request<B>) -> Option<Request<B>> {
        let mut clone = Request::new(req.body().clone());
        *clone.uri_mut() = req.uri().clone();
        Some(clone)
    }
}

/// Returns an executor whose calls are answered with `status` after `takes`, and are tried again after `backoff`.
fn retrying(status: u16, takes: Duration, backoff: Duration) -> (Executor<&'static str, ()>, Arrivals) {
    let arrivals = Arrivals::new();
    let recorded = arrivals.clone();
    let client = service_fn(move |req: Request<&'static str>| {
        recorded.record(req.body());
        async move {
            time::sleep(takes).await;
            let mut response = Response::new(());
            *response.status_mut() = StatusCode::from_u16(status).unwrap();
            Ok::<_, Infallible>(response)
        }
    });
    let executor = unlimited()
        .layer(RetryLayer::new(RetryAfter(backoff)))
        .build(client)
        .unwrap();
    executor.start().unwrap();
    (executor, arrivals)
}

#[tokio::test(start_paused = true)]
async fn a_call_in_a_retrys_backoff_is_cancelled_at_once() {
    let (executor, arrivals) = retrying(503, ms(100), ms(10_000));
    let call = executor.submit(request("call")).await.unwrap();
    pass(ms(1_000)).await;
    let report = executor.stop(Shutdown::SentWithin(FAR)).await;
    assert_eq!((report.completed, report.cancelled, report.elapsed), (0, 1, ms(0)));
    assert!(call.await.unwrap_err().is_cancelled());
    assert_eq!(arrivals.times().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn an_attempt_on_the_wire_is_finished_and_not_tried_again() {
    for backoff in [ms(0), ms(1), ms(10_000)] {
        let (executor, arrivals) = retrying(503, ms(3_000), backoff);
        let call = executor.submit(request("call")).await.unwrap();
        pass(ms(1_000)).await;
        let event = call.event().clone();
        let report = executor.stop(Shutdown::SentWithin(FAR)).await;
        assert_eq!((report.failed, report.cancelled, report.elapsed), (0, 1, ms(2_000)));
        assert!(call.await.unwrap_err().is_cancelled());
        assert_eq!(arrivals.times().len(), 1);
        let record = event.snapshot();
        assert_eq!(record.status, RequestStatus::Cancelled);
        let codes: Vec<_> = record.attempts.iter().map(|attempt| attempt.status_code).collect();
        assert_eq!(codes, [Some(503)]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_failure_that_is_not_tried_again_is_delivered() {
    let client = service_fn(|_: Request<&'static str>| async {
        time::sleep(ms(3_000)).await;
        Err::<Response<()>, _>(std::io::Error::other("broken"))
    });
    let executor = unlimited().build(client).unwrap();
    executor.start().unwrap();
    let call = executor.submit(request("call")).await.unwrap();
    pass(ms(1_000)).await;
    let report = executor.stop(Shutdown::SentWithin(FAR)).await;
    assert_eq!((report.failed, report.cancelled, report.elapsed), (1, 0, ms(2_000)));
    assert!(call.await.unwrap_err().to_string().contains("broken"));
}

/// A layer whose service handles each response for `takes` before it returns the response.
#[derive(Clone)]
struct Handles<S> {
    inner: S,
    takes: Duration,
}

impl<S, Req> Service<Req> for Handles<S>
where
    S: Service<Req, Response: Send, Error: Send>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, req: Req) -> Self::Future {
        let (called, takes) = (self.inner.call(req), self.takes);
        Box::pin(async move {
            let result = called.await;
            time::sleep(takes).await;
            result
        })
    }
}

#[tokio::test(start_paused = true)]
async fn a_response_that_a_layer_still_handles_is_delivered() {
    for (status, completed) in [(200, 1), (404, 0)] {
        let client = service_fn(move |_: Request<&'static str>| async move {
            Ok::<_, Infallible>(Response::builder().status(status).body(()).unwrap())
        });
        let takes = ms(5_000);
        let executor = unlimited()
            .layer(layer_fn(move |inner| Handles { inner, takes }))
            .build(client)
            .unwrap();
        executor.start().unwrap();
        let call = executor.submit(request("call")).await.unwrap();
        pass(ms(1_000)).await;
        let report = executor.stop(Shutdown::SentWithin(FAR)).await;
        assert_eq!((report.completed, report.cancelled), (completed, 1 - completed));
        assert_eq!(report.elapsed, ms(4_000 * completed));
        assert_eq!(call.await.is_ok(), completed == 1);
    }
}

/// Sends each request twice, the second time a second after the first, and returns the first result.
#[derive(Clone)]
struct Hedge<S>(S);

impl<S> Service<Request<&'static str>> for Hedge<S>
where
    S: Service<Request<&'static str>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Send,
    S::Response: Send,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, req: Request<&'static str>) -> Self::Future {
        let first: Self::Future = Box::pin(self.0.clone().oneshot(req));
        let second: Self::Future = Box::pin(self.0.clone().oneshot(request("second")));
        Box::pin(async move {
            let hedged = async move {
                time::sleep(ms(1_000)).await;
                second.await
            };
            tokio::select! {
                result = first => result,
                result = hedged => result,
            }
        })
    }
}

#[tokio::test(start_paused = true)]
async fn a_second_attempt_that_is_refused_does_not_disturb_the_first() {
    let (client, arrivals) = support::client(ms(3_000));
    let executor = unlimited().layer(layer_fn(Hedge)).build(client).unwrap();
    executor.start().unwrap();
    let call = executor.submit(request("first")).await.unwrap();
    pass(ms(500)).await;
    let report = executor.stop(Shutdown::SentWithin(FAR)).await;
    assert_eq!((report.completed, report.elapsed), (1, ms(2_500)));
    call.await.unwrap();
    assert_eq!(arrivals.names(), ["first"]);
}

/// A body with a number of frames, each of which takes a second.
struct Slow {
    frames: usize,
    sleep: Pin<Box<Sleep>>,
}

impl http_body::Body for Slow {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.frames == 0 {
            return Poll::Ready(None);
        }
        std::task::ready!(self.sleep.as_mut().poll(cx));
        self.frames -= 1;
        self.sleep.as_mut().reset(Instant::now() + ms(1_000));
        Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(b"x")))))
    }
}

#[tokio::test(start_paused = true)]
async fn a_streamed_body_counts_as_on_the_wire_until_its_end() {
    let client = service_fn(|_: Request<&'static str>| async {
        Ok::<_, Infallible>(Response::new(Slow {
            frames: 10,
            sleep: Box::pin(time::sleep(ms(1_000))),
        }))
    });
    let executor = unlimited().build_streaming(client).unwrap();
    executor.start().unwrap();
    let call = executor.submit(request("call")).await.unwrap();
    let response = call.await.unwrap();
    let read = tokio::spawn(response.into_body().collect());
    pass(ms(1_500)).await;
    let report = executor.stop(Shutdown::SentWithin(FAR)).await;
    assert_eq!((report.completed, report.cancelled, report.elapsed), (1, 0, ms(8_500)));
    assert_eq!(read.await.unwrap().unwrap().to_bytes().len(), 10);
}

#[tokio::test(start_paused = true)]
async fn a_second_stop_takes_effect_at_once() {
    let (client, _) = support::client(ms(10_000));
    let executor = unlimited().concurrency_limit(2).build(client).unwrap();
    for second in [
        Shutdown::Immediate,
        Shutdown::Within(ms(0)),
        Shutdown::SentWithin(ms(0)),
    ] {
        executor.start().unwrap();
        for _ in 0..5 {
            drop(executor.submit(request("call")).await.unwrap());
        }
        pass(ms(100)).await;
        let second = async {
            time::sleep(ms(1_000)).await;
            executor.stop(second).await
        };
        let (first, second) = tokio::join!(executor.stop(Shutdown::SentWithin(FAR)), second);
        // The queued calls were cancelled at once, and the two on the wire by the second stop.
        assert_eq!((first.cancelled, first.elapsed), (5, ms(1_000)));
        assert_eq!((second.cancelled, second.elapsed), (2, ms(0)));
    }
    // A graceful stop may be followed by one that cancels what was not sent.
    executor.start().unwrap();
    for _ in 0..5 {
        drop(executor.submit(request("call")).await.unwrap());
    }
    pass(ms(100)).await;
    let second = async {
        time::sleep(ms(1_000)).await;
        executor.stop(Shutdown::SentWithin(FAR)).await
    };
    let (first, second) = tokio::join!(executor.stop(Shutdown::Graceful), second);
    assert_eq!((first.completed, first.cancelled, first.elapsed), (2, 3, ms(9_900)));
    assert_eq!((second.completed, second.cancelled, second.elapsed), (2, 3, ms(8_900)));
    // A new start sends again.
    executor.start().unwrap();
    executor.submit(request("call")).await.unwrap().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_stop_whose_future_is_dropped_has_cancelled_what_was_not_sent() {
    let (client, arrivals) = support::client(ms(10_000));
    let executor = unlimited().concurrency_limit(2).build(client).unwrap();
    executor.start().unwrap();
    for _ in 0..5 {
        drop(executor.submit(request("call")).await.unwrap());
    }
    pass(ms(100)).await;
    timeout(ms(500), executor.stop(Shutdown::SentWithin(ms(1_000))))
        .await
        .unwrap_err();
    pass(FAR).await;
    let totals = executor.monitor().totals();
    assert_eq!((totals.completed, totals.cancelled), (2, 3));
    assert_eq!(arrivals.times().len(), 2);
    executor.start().unwrap();
}

#[test]
fn no_call_whose_request_was_sent_is_cancelled_by_a_race() {
    within_a_minute(|| {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(4)
            .enable_all()
            .build()
            .unwrap();
        for round in 0..300 {
            let (sent, answered) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
            let counts = (sent.clone(), answered.clone());
            let client = service_fn(move |_: Request<&'static str>| {
                let (sent, answered) = counts.clone();
                sent.fetch_add(1, Ordering::SeqCst);
                async move {
                    for _ in 0..20 {
                        tokio::task::yield_now().await;
                    }
                    answered.fetch_add(1, Ordering::SeqCst);
                    Ok::<_, Infallible>(Response::new(()))
                }
            });
            let executor = unlimited().concurrency_limit(8).workers(4).build(client).unwrap();
            runtime.block_on(async {
                executor.start().unwrap();
                let submits = {
                    let executor = executor.clone();
                    tokio::spawn(async move {
                        let mut calls = Vec::new();
                        while let Ok(call) = executor.submit(request("call")).await {
                            calls.push(tokio::spawn(call));
                            if calls.len() == 400 {
                                break;
                            }
                        }
                        calls
                    })
                };
                for _ in 0..round {
                    tokio::task::yield_now().await;
                }
                let stop = executor.stop(Shutdown::SentWithin(HANG));
                let report = timeout(HANG, stop).await.expect("no hang");
                let mut responses = 0;
                for call in submits.await.unwrap() {
                    match timeout(HANG, call).await.expect("no hang").unwrap() {
                        Ok(_) => responses += 1,
                        Err(error) => assert!(error.is_cancelled() || error.is_closed(), "{error}"),
                    }
                }
                assert_eq!(report.failed, 0);
                let (sent, answered) = (sent.load(Ordering::SeqCst), answered.load(Ordering::SeqCst));
                assert_eq!((answered, responses), (sent, sent));
            });
        }
    });
}

#[tokio::test(start_paused = true)]
async fn a_call_that_waits_in_a_layer_before_its_first_attempt_is_cancelled() {
    let (client, arrivals) = support::client(ms(0));
    let waits = layer_fn(|inner| {
        drop(inner);
        service_fn(|_: Request<&'static str>| pending::<Result<Response<&'static str>, BoxError>>())
    });
    let executor = unlimited().layer(waits).build(client).unwrap();
    executor.start().unwrap();
    let call = executor.submit(request("call")).await.unwrap();
    pass(ms(100)).await;
    assert_eq!(executor.stop(Shutdown::SentWithin(FAR)).await.elapsed, ms(0));
    assert!(call.await.unwrap_err().is_cancelled());
    assert!(arrivals.times().is_empty());
}
