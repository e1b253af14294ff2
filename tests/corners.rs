//! Corner cases of the layers: user code that blocks or panics, tracing spans, attempts that overlap, the deepest debt
//! of a bucket, and the release of memory and permits.

use http::{Request, Response};
use std::{
    error::Error,
    fmt,
    future::{Future, Ready, pending, ready},
    hint::black_box,
    mem,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    thread::{self, sleep},
    time::Duration,
};
use tokio::{
    runtime::Handle,
    sync::Semaphore,
    task::{block_in_place, yield_now},
    time,
};
use tower::{BoxError, Layer, Service, ServiceBuilder, ServiceExt, service_fn};
use tower_outbound::{
    Concurrency, ConcurrencyLimitLayer, Cost, EventLayer, Executor, Limits, QueueLayer, Rate, RateLimiter,
    event::{Events, Nothing, RequestStatus},
};

const MS: Duration = Duration::from_millis(1);

type Client = tower::util::BoxCloneService<(), (), BoxError>;

fn client() -> Client {
    Client::new(service_fn(async |(): ()| Ok(())))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn two_workers_run_the_computing_of_two_calls_in_parallel() -> Result<(), BoxError> {
    let arrived = Arc::new((Mutex::new(0), Condvar::new()));
    let waits_for_both = service_fn(move |(): ()| {
        let arrived = arrived.clone();
        async move {
            // The call blocks its worker in its first poll, without an `await`, until both calls have arrived.
            Ok::<_, BoxError>(block_in_place(|| {
                let (count, changed) = &*arrived;
                let mut count = count.lock().unwrap();
                *count += 1;
                changed.notify_all();
                let (count, _) = changed
                    .wait_timeout_while(count, 5_000 * MS, |count| *count < 2)
                    .unwrap();
                *count
            }))
        }
    });
    let queue = ServiceBuilder::new()
        .layer(QueueLayer::new(4)?.workers(2)?)
        .service(waits_for_both);
    let (first, second) = tokio::try_join!(queue.clone().oneshot(()), queue.clone().oneshot(()))?;
    assert_eq!((first, second), (2, 2));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_client_may_block_on_a_limiter_of_its_own() -> Result<(), BoxError> {
    let limiter = RateLimiter::new(Limits::new().requests(Rate::per_second(20).burst(1)))?;
    let polls = Arc::new(AtomicUsize::new(0));
    let blocks = {
        let polls = polls.clone();
        service_fn(move |(): ()| {
            let (limiter, polls) = (limiter.clone(), polls.clone());
            async move {
                block_in_place(|| {
                    Handle::current().block_on(async {
                        for _ in 0..2 {
                            let mut acquire = Box::pin(limiter.acquire(Cost::request()));
                            std::future::poll_fn(|cx| {
                                polls.fetch_add(1, Ordering::Relaxed);
                                acquire.as_mut().poll(cx)
                            })
                            .await?;
                        }
                        Ok::<_, BoxError>(())
                    })
                })
            }
        })
    };
    let queue = ServiceBuilder::new().layer(QueueLayer::new(4)?).service(blocks);
    time::timeout(5_000 * MS, queue.oneshot(())).await??;
    assert!(polls.load(Ordering::Relaxed) < 10, "the client waits and does not spin");
    Ok(())
}

#[tokio::test]
async fn the_times_of_an_event_include_what_a_users_layer_takes() -> Result<(), BoxError> {
    // This test runs in real time: a layer that computes blocks its thread, and a paused clock would not advance
    // meanwhile.
    let calling = EventLayer::calling().describe(Nothing).layer(client());
    let twice = service_fn(move |(): ()| {
        let (mut first, mut second) = (calling.clone(), calling.clone());
        async move {
            sleep(20 * MS);
            first.call(()).await?;
            sleep(20 * MS);
            second.call(()).await?;
            sleep(20 * MS);
            Ok::<_, BoxError>(())
        }
    });
    let call = EventLayer::processing().describe(Nothing).layer(twice).call(());
    let event = call.event();
    call.await?;

    let event = event.snapshot();
    let [first, second] = &event.attempts[..] else {
        panic!("two attempts")
    };
    let at_least_20_ms = |earlier: Option<_>, later: Option<std::time::SystemTime>| {
        let between = later.unwrap().duration_since(earlier.unwrap()).unwrap();
        assert!(between >= 20 * MS, "{between:?}");
    };
    at_least_20_ms(event.processing_started_at, event.call_started_at);
    at_least_20_ms(first.ended_at, Some(second.started_at));
    at_least_20_ms(second.ended_at, event.completed_at);
    Ok(())
}

#[tokio::test]
async fn the_callers_span_follows_the_call_even_if_the_events_span_is_filtered_out() -> Result<(), Box<dyn Error>> {
    use tracing::Instrument;
    use tracing_subscriber::{
        filter::{LevelFilter, Targets},
        layer::SubscriberExt,
    };
    let filter = Targets::new()
        .with_default(LevelFilter::INFO)
        .with_target("tower_outbound", LevelFilter::OFF);
    let _subscriber = tracing::subscriber::set_default(tracing_subscriber::registry().with(filter));
    let executor = Executor::builder().build(service_fn(async |_: Request<()>| {
        let span = tracing::Span::current().metadata().map(|metadata| metadata.name());
        Ok::<_, BoxError>(Response::new(span))
    }))?;
    executor.start()?;
    let call = executor.submit(Request::get("http://localhost/").body(())?);
    let call = call.instrument(tracing::info_span!("caller")).await?;
    assert_eq!(*call.await?.body(), Some("caller"));
    Ok(())
}

#[test]
fn a_span_that_panics_when_it_closes_leaves_no_caller_waiting() {
    use tracing_subscriber::layer::{Context, Layer, SubscriberExt};

    struct Panics;
    impl<S: tracing::Subscriber> Layer<S> for Panics {
        fn on_close(&self, _: tracing::span::Id, _: Context<'_, S>) {
            assert!(
                thread::current().name() != Some("worker") || thread::panicking(),
                "closed"
            );
        }
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("worker")
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let mut queue = ServiceBuilder::new()
            .layer(QueueLayer::new(4).unwrap())
            .service(client());
        let dispatch = tracing::Dispatch::new(tracing_subscriber::registry().with(Panics));
        let response = tracing::dispatcher::with_default(&dispatch, || {
            let _entered = tracing::info_span!("caller").entered();
            queue.call(())
        });
        time::timeout(5_000 * MS, response).await.expect("no hang").unwrap();
    });
}

#[tokio::test(start_paused = true)]
async fn a_span_that_panics_when_the_outcome_is_recorded_takes_no_call_out_of_the_totals() {
    use tracing_subscriber::layer::{Context, Layer, SubscriberExt};

    struct Panics;
    impl<S: tracing::Subscriber> Layer<S> for Panics {
        fn on_record(&self, _: &tracing::span::Id, record: &tracing::span::Record<'_>, _: Context<'_, S>) {
            let mut names = Vec::new();
            record.record(&mut |field: &tracing::field::Field, _: &dyn fmt::Debug| names.push(field.name()));
            assert!(!names.contains(&"status"), "no outcomes, please");
        }
    }
    let _subscribed = tracing::subscriber::set_default(tracing_subscriber::registry().with(Panics));
    let events = Events::new();
    let mut queue = ServiceBuilder::new()
        .layer(EventLayer::queued().describe(Nothing).report_to(&events))
        .layer(QueueLayer::new(4).unwrap())
        .layer(EventLayer::processing().describe(Nothing))
        .service(client());
    for call in [queue.call(()), queue.call(())] {
        let event = call.event();
        assert!(call.await.unwrap_err().to_string().contains("no outcomes, please"));
        assert_eq!(event.status(), RequestStatus::Completed);
    }
    assert_eq!((events.totals().completed, events.totals().open()), (2, 0));
}

#[tokio::test(start_paused = true)]
async fn an_attempt_that_ends_after_a_later_one_updates_the_event() {
    let waits = service_fn(async |seconds: u64| {
        time::sleep(Duration::from_secs(seconds)).await;
        Ok::<_, BoxError>(())
    });
    let calling = EventLayer::calling().describe(Nothing).layer(waits);
    let both = service_fn(move |(): ()| {
        let (mut first, mut second) = (calling.clone(), calling.clone());
        async move {
            let _ = tokio::join!(first.call(2), second.call(1));
            pending::<Result<(), BoxError>>().await
        }
    });
    let call = EventLayer::processing().describe(Nothing).layer(both).call(());
    let event = call.event();
    let _ = time::timeout(Duration::from_secs(50), call).await;
    let event = event.snapshot();
    assert_eq!(
        event.attempts[0].ended_at,
        Some(event.created_at + Duration::from_secs(2))
    );
    assert!(event.updated_at >= event.created_at + Duration::from_secs(2));
}

#[tokio::test(start_paused = true)]
async fn the_deepest_debt_of_the_largest_bucket_is_counted() -> Result<(), Box<dyn Error>> {
    let rate = Rate::new(0.5, Duration::from_nanos(1 << 62)).burst(1_u64 << 63);
    let limiter = RateLimiter::new(Limits::new().tokens(rate))?;
    let nothing = Cost::none();
    for _ in 0..3 {
        let estimate = limiter.acquire_estimate(nothing).await?;
        estimate.settle(Cost::tokens(u64::MAX).with("requests", 0));
        time::sleep(Duration::from_secs(1)).await;
        assert_eq!(limiter.available().tokens, Some(0));
    }
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn an_error_whose_conversion_panics_fails_only_that_call() {
    #[derive(Debug)]
    struct Bad;
    impl From<Bad> for BoxError {
        fn from(_: Bad) -> Self {
            panic!("no conversion")
        }
    }
    let queue = ServiceBuilder::new()
        .layer(QueueLayer::new(4).unwrap())
        .service(service_fn(async |bad: bool| {
            time::sleep(if bad { MS } else { 20 * MS }).await;
            if bad { Err(Bad) } else { Ok(()) }
        }));
    let (good, bad) = tokio::join!(queue.clone().oneshot(false), queue.clone().oneshot(true));
    good.unwrap();
    assert!(bad.unwrap_err().to_string().contains("no conversion"));
}

#[tokio::test(start_paused = true)]
async fn an_error_whose_display_panics_fails_only_that_call() {
    #[derive(Debug)]
    struct Bad;
    impl fmt::Display for Bad {
        fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
            panic!("no words")
        }
    }
    impl Error for Bad {}
    #[derive(Clone)]
    struct NotReadyAtFirst(bool);
    impl Service<()> for NotReadyAtFirst {
        type Response = ();
        type Error = BoxError;
        type Future = Ready<Result<(), BoxError>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
            match mem::replace(&mut self.0, true) {
                true => Poll::Ready(Ok(())),
                false => Poll::Ready(Err(Bad.into())),
            }
        }

        fn call(&mut self, (): ()) -> Self::Future {
            ready(Ok(()))
        }
    }
    let mut queue = ServiceBuilder::new()
        .layer(EventLayer::queued().describe(Nothing))
        .layer(QueueLayer::new(4).unwrap())
        .service(NotReadyAtFirst(false));
    let (bad, good) = (queue.call(()), queue.call(()));
    let (bad_event, good_event) = (bad.event(), good.event());
    good.await.unwrap();
    assert_eq!(good_event.status(), RequestStatus::Completed);
    assert_eq!(bad_event.status(), RequestStatus::Failed);
    assert!(bad_event.snapshot().error_message.unwrap().contains("no words"));
}

#[test]
fn memory_of_many_calls_is_freed_while_one_call_still_runs() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let mut kept = None;
    let counted = allocation_counter::measure(|| {
        kept = Some(runtime.block_on(async {
            let released = Arc::new(Semaphore::new(0));
            let release = released.clone();
            let mut queue = ServiceBuilder::new()
                .layer(QueueLayer::new(3_000).unwrap())
                .service(service_fn(move |is_long: bool| {
                    let released = released.clone();
                    async move {
                        let large = [1_u8; 4_096];
                        if is_long {
                            pending::<()>().await;
                        }
                        drop(released.acquire().await);
                        black_box(&large);
                        Ok::<_, BoxError>(())
                    }
                }));
            let long = queue.call(true);
            let short: Vec<_> = (0..2_000).map(|_| queue.call(false)).collect();
            while queue.in_flight() < 2_001 {
                yield_now().await;
            }
            release.add_permits(2_000);
            for call in short {
                call.await.unwrap();
            }
            assert_eq!(queue.in_flight(), 1);
            // The tasks of the calls that have ended end when they are polled next.
            for _ in 0..100 {
                yield_now().await;
            }
            (queue, long)
        }));
    });
    assert!(
        counted.bytes_current < 1_000_000,
        "{} bytes are still allocated",
        counted.bytes_current
    );
    drop(kept);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn permits_add_up_after_dropped_calls_and_changed_limits() -> Result<(), BoxError> {
    let limit = Concurrency::new(3)?;
    let service = ServiceBuilder::new()
        .layer(ConcurrencyLimitLayer::with_limit(limit.clone()))
        .service(service_fn(async |turns: u64| {
            for _ in 0..turns % 3 {
                yield_now().await;
            }
            Ok::<_, BoxError>(())
        }));
    let callers: Vec<_> = (0..12_u64)
        .map(|caller| {
            let (service, limit) = (service.clone(), limit.clone());
            tokio::spawn(async move {
                for turn in 0..1_000_u64 {
                    let call = service.clone().oneshot(turn);
                    if (caller * 31 + turn).is_multiple_of(7) {
                        let _ = time::timeout(Duration::from_micros(turn % 50), call).await;
                    } else {
                        call.await?;
                    }
                    if turn.is_multiple_of(50) {
                        limit.set(1 + usize::try_from((caller + turn) % 4)?)?;
                    }
                }
                Ok::<_, BoxError>(())
            })
        })
        .collect();
    for caller in callers {
        time::timeout(60_000 * MS, caller).await.expect("no hang")??;
    }
    assert_eq!(limit.in_flight(), 0);
    Ok(())
}
