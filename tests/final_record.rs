//! When an event has ended, its record is final: nothing of its call is left, and nothing that happens later changes
//! what is recorded of the call. And what events cost in memory.

mod support;

use futures_util::FutureExt;
use http::{HeaderMap, HeaderValue, Request, Response};
use std::{
    future::Future,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
};
use support::{HANG, ms, pass};
use tokio::{
    sync::oneshot,
    time::{sleep, timeout},
};
use tokio_test::task;
use tower::{BoxError, Layer, Service, ServiceBuilder, ServiceExt, service_fn};
use tower_outbound::{
    Call, ConcurrencyLimitLayer, EventHandle, EventLayer, Executor, Limits, NetworkRequestEvent, QueueLayer,
    RequestStatus,
    event::{self, Events},
};

/// A service that counts how many of its futures exist, also after they have completed.
#[derive(Clone)]
struct Counted<S> {
    client: S,
    futures: Arc<AtomicUsize>,
}

struct CountedFuture<F> {
    future: Pin<Box<F>>,
    futures: Arc<AtomicUsize>,
}

impl<S: Service<Req>, Req> Service<Req> for Counted<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = CountedFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.client.poll_ready(cx)
    }

    fn call(&mut self, req: Req) -> Self::Future {
        self.futures.fetch_add(1, Ordering::SeqCst);
        CountedFuture {
            future: Box::pin(self.client.call(req)),
            futures: self.futures.clone(),
        }
    }
}

impl<F: Future> Future for CountedFuture<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        self.future.as_mut().poll(cx)
    }
}

impl<F> Drop for CountedFuture<F> {
    fn drop(&mut self) {
        self.futures.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A waker that waits for the end of an event, and looks at the record at the very moment at which it is woken.
struct Observer<T> {
    finished: Mutex<Pin<Box<dyn Future<Output = NetworkRequestEvent> + Send>>>,
    look: Box<dyn Fn(&NetworkRequestEvent) -> T + Send + Sync>,
    seen: Mutex<Option<T>>,
}

impl<T: Send + 'static> Observer<T> {
    fn watch(event: &EventHandle, look: impl Fn(&NetworkRequestEvent) -> T + Send + Sync + 'static) -> Arc<Self> {
        let event = event.clone();
        let observer = Arc::new(Self {
            finished: Mutex::new(Box::pin(async move { event.finished().await })),
            look: Box::new(look),
            seen: Mutex::new(None),
        });
        observer.clone().wake();
        observer
    }

    fn seen(&self) -> Option<T> {
        self.seen.lock().unwrap().take()
    }
}

impl<T: Send + 'static> Wake for Observer<T> {
    fn wake(self: Arc<Self>) {
        let waker = Waker::from(self.clone());
        let mut finished = self.finished.lock().unwrap();
        if let Poll::Ready(event) = finished.as_mut().poll(&mut Context::from_waker(&waker)) {
            *self.seen.lock().unwrap() = Some((self.look)(&event));
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    Response,
    Error,
    Panic,
    Dropped,
}

#[tokio::test(start_paused = true)]
async fn when_an_event_ends_its_attempt_is_closed_its_permit_is_free_and_the_totals_agree() {
    for queue in [false, true] {
        for end in [End::Response, End::Error, End::Panic, End::Dropped] {
            let (events, futures) = (Events::new(), Arc::new(AtomicUsize::new(0)));
            let limit = ConcurrencyLimitLayer::new(1).unwrap();
            let permits = limit.limit().clone();
            let client = service_fn(move |_: Request<()>| async move {
                sleep(ms(10)).await;
                match end {
                    End::Error => Err(BoxError::from("refused")),
                    End::Panic => panic!("the client panics"),
                    End::Response | End::Dropped => Ok(Response::new(())),
                }
            });
            let mut stack = ServiceBuilder::new()
                .layer(EventLayer::processing().report_to(&events))
                .layer(limit)
                .layer(EventLayer::calling().report_to(&events))
                .service(Counted {
                    client,
                    futures: futures.clone(),
                });
            let mut updates = events.subscribe();
            let call = if queue {
                let mut service = QueueLayer::new(1).unwrap().layer(stack);
                service.ready().await.unwrap().call(Request::new(())).boxed()
            } else {
                stack.ready().await.unwrap().call(Request::new(())).boxed()
            };
            let mut call = task::spawn(call);
            let _ = call.poll();
            pass(ms(1)).await;
            let event = updates.recv().await.unwrap().unwrap().event;
            assert_eq!(
                (futures.load(Ordering::SeqCst), permits.in_flight(), events.calling()),
                (1, 1, 1)
            );

            let observer = Observer::watch(&event, {
                let (events, permits, futures) = (events.clone(), permits.clone(), futures.clone());
                move |event| {
                    let attempt = event.attempts[0].clone();
                    let left = (futures.load(Ordering::SeqCst), permits.in_flight(), events.calling());
                    (attempt, left, events.totals().open(), events.totals().ended())
                }
            });
            if end == End::Dropped {
                drop(call);
                pass(ms(1)).await;
            } else {
                pass(ms(10)).await;
                let _ = catch_unwind(AssertUnwindSafe(|| call.poll()));
            }
            let seen = observer.seen();
            let (attempt, left, open, ended) = seen.unwrap_or_else(|| panic!("{end:?} has ended the event"));
            assert!(attempt.ended_at.is_some(), "{end:?}");
            assert_eq!((left, open, ended), ((0, 0, 0), 0, 1), "{end:?} {queue}");
            assert_eq!(event.snapshot().attempts, [attempt]);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_thread_that_sees_the_end_of_an_event_sees_its_final_record_and_the_totals() {
    let client = service_fn(async |req: Request<u64>| {
        tokio::task::yield_now().await;
        match req.body() % 3 {
            0 => Err(BoxError::from("refused")),
            _ => Ok(Response::new(())),
        }
    });
    let executor = Executor::builder().limits(Limits::new()).concurrency_limit(1);
    let executor = executor.build(client).unwrap();
    executor.start().unwrap();
    let monitor = executor.monitor();
    for number in 0..3_000 {
        let call = executor.submit(Call::from(Request::new(number))).await.unwrap();
        let event = call.event().clone();
        // The reader runs on another thread than the call, and waits for the event only.
        let (monitor, calling) = (monitor.clone(), event.clone());
        let reader = tokio::spawn(async move {
            let event = calling.finished().await;
            (event, monitor.totals(), monitor.calling(), monitor.in_flight())
        });
        let (record, totals, calling, in_flight) = timeout(HANG, reader).await.expect("no hang").unwrap();
        assert_eq!((totals.ended(), totals.open()), (number + 1, 0));
        assert_eq!((calling, in_flight), (0, 0));
        assert!(record.attempts.iter().all(|attempt| attempt.ended_at.is_some()));
        let _ = call.await;
        assert_eq!(event.snapshot(), record);
    }
}

#[tokio::test(start_paused = true)]
async fn an_attempt_that_outlives_its_event_is_closed_with_it_and_changes_nothing_later() {
    let events = Events::new();
    let mut updates = events.subscribe();
    let (answer, answered) = oneshot::channel::<u16>();
    let answered = Arc::new(Mutex::new(Some(answered)));
    let calling = EventLayer::calling().describe(event::Nothing).report_to(&events);
    let client = calling.layer(service_fn(move |_: ()| {
        let answered = answered.lock().unwrap().take();
        async move {
            match answered {
                Some(answered) => answered.await.map_err(BoxError::from),
                None => Ok(204),
            }
        }
    }));
    // A service that returns while its request to the client still runs in a task.
    let early = service_fn({
        let client = client.clone();
        move |(): ()| {
            let mut client = client.clone();
            tokio::spawn(
                event::current()
                    .unwrap()
                    .instrument(async move { client.call(()).await }),
            );
            async {
                sleep(ms(10)).await;
                Ok::<_, BoxError>(200_u16)
            }
        }
    });
    let mut service = EventLayer::queued()
        .describe(event::Nothing)
        .report_to(&events)
        .layer(early);
    service.ready().await.unwrap().call(()).await.unwrap();

    let handle = updates.recv().await.unwrap().unwrap().event;
    let record = handle.snapshot();
    assert_eq!(record.status, RequestStatus::Completed);
    assert_eq!(record.attempts.len(), 1);
    assert_eq!(record.attempts[0].ended_at, record.completed_at);
    assert_eq!(record.attempts[0].error_type.as_deref(), Some("Cancelled"));
    assert_eq!(events.calling(), 0);

    // The attempt ends, and another one is made.
    answer.send(200).unwrap();
    pass(ms(5)).await;
    let mut client = client;
    assert!(handle.in_scope(|| task::spawn(client.call(())).poll()).is_ready());
    assert_eq!(handle.snapshot(), record);
    assert_eq!((events.calling(), events.totals().ended()), (0, 1));
}

#[tokio::test(start_paused = true)]
async fn a_task_that_stops_waiting_for_an_event_leaves_no_waker_behind() {
    struct Idle;
    impl Wake for Idle {
        fn wake(self: Arc<Self>) {}
    }
    let client = service_fn(async |_: Request<()>| {
        sleep(ms(10)).await;
        Ok::<_, BoxError>(Response::new(()))
    });
    let call = EventLayer::calling().layer(client).call(Request::new(()));
    let mut event = call.event();
    event.changed().await;
    for round in 0..3 {
        let idle = Arc::new(Idle);
        let waker = Waker::from(idle.clone());
        let mut first = Box::pin(event.changed());
        assert!(first.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
        assert!(first.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
        assert_eq!(Arc::strong_count(&idle), 3, "{round}");
        drop(first);
        assert_eq!(Arc::strong_count(&idle), 2, "{round}");
    }
    call.await.unwrap();
    assert_eq!(event.changed().await, RequestStatus::Completed);
}

#[test]
fn an_events_without_subscribers_takes_half_a_kilobyte() {
    let mut kept = None;
    let counted = allocation_counter::measure(|| kept = Some(Events::new()));
    assert!(counted.bytes_current <= 512, "{} bytes", counted.bytes_current);
    // The first subscriber brings the buffer of 4,096 updates.
    let events = kept.unwrap();
    let subscribed = allocation_counter::measure(|| drop(events.subscribe()));
    assert!(subscribed.bytes_current > 4_096);
}

fn real_headers() -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert("authorization", HeaderValue::from_static("Bearer s3cret"));
    for name in ["x-request-id", "x-ratelimit-remaining-tokens", "location", "alt-svc"] {
        headers.insert(
            name,
            HeaderValue::from_static("https://u:s3cret@h.example/?token=s3cret&page=2"),
        );
    }
    headers
}

#[tokio::test(start_paused = true)]
async fn recording_headers_takes_one_allocation_for_each_map_and_redaction_waits_for_a_reader() {
    let client = service_fn(async |_: Request<()>| {
        let mut response = Response::new(());
        *response.headers_mut() = real_headers();
        Ok::<_, BoxError>(response)
    });
    let call = || {
        let mut request = Request::get("http://u:s3cret@h.example/?token=s3cret")
            .body(())
            .unwrap();
        *request.headers_mut() = real_headers();
        request
    };
    let mut events = Vec::with_capacity(1);
    let bare = allocation_counter::measure(|| {
        assert!(task::spawn(std::pin::pin!({ client }.call(call()))).poll().is_ready());
    });
    let recorded = allocation_counter::measure(|| {
        let future = EventLayer::calling().layer(client).call(call());
        events.push(future.event());
        assert!(task::spawn(std::pin::pin!(future)).poll().is_ready());
    });
    // The event itself, and the headers of the request and of the response.
    assert_eq!(recorded.count_total - bare.count_total, 3);
    let shown = format!("{:?}", events[0].snapshot());
    assert!(!shown.contains("s3cret") && shown.contains("https://h.example/?token=[redacted]&page=2"));
}

#[cfg(feature = "http")]
mod bodies {
    use super::*;
    use bytes::Bytes;
    use http_body_util::{BodyExt, Full, StreamBody};
    use tower_outbound::body::CollectLayer;

    #[tokio::test(start_paused = true)]
    async fn a_call_whose_body_is_dropped_ends_as_cancelled_when_its_permit_is_free() {
        let client = service_fn(async |_: Request<()>| {
            let frames = futures_util::stream::pending::<Result<http_body::Frame<Bytes>, BoxError>>();
            Ok::<_, BoxError>(Response::new(StreamBody::new(frames)))
        });
        let executor = Executor::builder().limits(Limits::new()).concurrency_limit(1);
        let executor = executor.build_streaming(client).unwrap();
        executor.start().unwrap();
        let monitor = executor.monitor();
        let call = executor.submit(Request::new(())).await.unwrap();
        let event = call.event().clone();
        let body = call.await.unwrap().into_body();
        let observer = Observer::watch(&event, {
            let monitor = monitor.clone();
            move |event| (event.status, event.attempts[0].ended_at.is_some(), monitor.in_flight())
        });
        drop(body);
        pass(ms(1)).await;
        let seen = observer.seen();
        assert_eq!(seen, Some((RequestStatus::Cancelled, true, 0)));
        assert_eq!(monitor.totals().cancelled, 1);
    }

    #[tokio::test(start_paused = true)]
    async fn the_progress_of_a_body_moves_the_time_of_the_last_update() {
        let events = Events::new();
        let mut updates = events.subscribe();
        let client = service_fn(async |_: Request<()>| {
            sleep(ms(20)).await;
            Ok::<_, BoxError>(Response::new(Full::new(Bytes::from_static(b"body")).boxed()))
        });
        let collect = CollectLayer::new(10).layer(client);
        // A layer that goes on after the body was read.
        let slow = service_fn(move |request| {
            let mut collect = collect.clone();
            async move {
                let response = collect.call(request).await;
                sleep(ms(1_000)).await;
                response
            }
        });
        let mut call = task::spawn(
            EventLayer::queued()
                .report_to(&events)
                .layer(slow)
                .call(Request::new(())),
        );
        assert!(call.poll().is_pending());
        pass(ms(20)).await;
        assert!(call.poll().is_pending());
        pass(ms(500)).await;
        let record = updates.recv().await.unwrap().unwrap().event.snapshot();
        assert_eq!(record.response_bytes, Some(4));
        assert_eq!(record.updated_at, record.last_byte_at.unwrap());
        assert_eq!(record.updated_at, record.created_at + ms(20));
    }
}
