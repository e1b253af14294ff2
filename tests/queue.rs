//! Tests of the guarantees of `Queue`.

mod support;

use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};
use support::{Scripted, client, ms, pass, paused_runtime, request, settle};
use tokio::time::{Instant, sleep, timeout};
use tokio_test::{assert_pending, assert_ready_err, assert_ready_ok, task};
use tower::{BoxError, Layer, Service, ServiceExt, service_fn};
use tower_outbound::{
    Queue, QueueLayer,
    error::{Cancelled, Closed, Panicked},
};
use tower_test::{assert_request_eq, mock};

type Mocked = (
    Queue<&'static str, &'static str>,
    mock::Handle<&'static str, &'static str>,
);

fn queue(capacity: usize) -> Mocked {
    let (service, handle) = mock::pair();
    (QueueLayer::new(capacity).unwrap().layer(service), handle)
}

/// Makes services that are not ready until `set_ready` is called.
#[derive(Clone, Default)]
struct Readiness {
    is_ready: Arc<AtomicBool>,
    waker: Arc<Mutex<Option<Waker>>>,
    /// How often `poll_ready` of the services was called.
    polls: Arc<AtomicUsize>,
}

impl Readiness {
    fn set_ready(&self) {
        self.is_ready.store(true, Ordering::SeqCst);
        if let Some(waker) = self.waker.lock().unwrap().take() {
            waker.wake();
        }
    }

    fn service(
        &self,
    ) -> impl Service<&'static str, Response = &'static str, Error = BoxError, Future: Send> + Clone + Send + use<>
    {
        let readiness = self.clone();
        Scripted {
            ready: move |cx: &mut Context<'_>| {
                readiness.polls.fetch_add(1, Ordering::SeqCst);
                if readiness.is_ready.load(Ordering::SeqCst) {
                    return Poll::Ready(Ok::<_, BoxError>(()));
                }
                *readiness.waker.lock().unwrap() = Some(cx.waker().clone());
                Poll::Pending
            },
        }
    }
}

#[tokio::test(start_paused = true)]
async fn calls_begin_in_the_order_in_which_they_were_accepted_with_any_number_of_workers() {
    for workers in [1, 2, 5, 50] {
        let begun = Arc::new(Mutex::new(Vec::new()));
        let recorded = begun.clone();
        let service = service_fn(move |number: usize| {
            recorded.lock().unwrap().push(number);
            async move {
                sleep(Duration::from_millis((number as u64 * 7) % 13)).await;
                Ok::<_, BoxError>(number)
            }
        });
        let mut queue = QueueLayer::new(1_000).unwrap().workers(workers).unwrap().layer(service);
        let mut calls = Vec::new();
        for number in 0..200 {
            calls.push(queue.ready().await.unwrap().call(number));
        }
        for (number, call) in calls.into_iter().enumerate() {
            assert_eq!(call.await.unwrap(), number);
        }
        assert_eq!(*begun.lock().unwrap(), (0..200).collect::<Vec<_>>());
    }
}

#[tokio::test(start_paused = true)]
async fn a_full_queue_makes_the_caller_wait_until_there_is_a_place() {
    let readiness = Readiness::default();
    let mut queue = QueueLayer::new(2).unwrap().layer(readiness.service());
    let a = queue.ready().await.unwrap().call("a");
    let b = queue.ready().await.unwrap().call("b");
    settle().await;
    assert_eq!((queue.depth(), queue.capacity()), (2, 2));
    let mut other = queue.clone();
    let mut ready = task::spawn(other.ready());
    assert_pending!(ready.poll());
    readiness.set_ready();
    settle().await;
    assert!(ready.is_woken());
    assert_ready_ok!(ready.poll());
    assert_eq!((a.await.unwrap(), b.await.unwrap()), ("a", "b"));
}

#[tokio::test(start_paused = true)]
async fn a_full_queue_refuses_a_call_and_returns_the_request() {
    let readiness = Readiness::default();
    let mut queue = QueueLayer::new(1).unwrap().layer(readiness.service());
    let _a = queue.try_call("a").unwrap();
    let refused = queue.try_call("b").unwrap_err();
    assert!(refused.is_full() && !refused.is_closed());
    assert_eq!(refused.to_string(), "the queue is full");
    assert_eq!(refused.into_request(), "b");
    queue.close();
    let refused = queue.try_call("c").unwrap_err();
    assert!(refused.is_closed());
    assert_eq!(refused.to_string(), "the queue is closed");
    assert_eq!(refused.into_request(), "c");
}

#[tokio::test(start_paused = true)]
async fn a_layer_and_its_clone_make_separate_queues() {
    let layer = QueueLayer::new(1).unwrap().workers(2).unwrap();
    assert_eq!(format!("{:?}", layer.clone()), "QueueLayer { capacity: 1, workers: 2 }");
    let readiness = Readiness::default();
    let (mut one, mut other) = (
        layer.layer(readiness.service()),
        layer.clone().layer(readiness.service()),
    );
    let _held = one.try_call("held").unwrap();
    assert!(one.try_call("too many").unwrap_err().is_full());
    let _free = other.try_call("free").unwrap();
    one.close();
    assert!(one.is_closed() && !other.is_closed());
}

#[tokio::test(start_paused = true)]
async fn debug_shows_the_state_of_a_call_and_not_its_request() {
    let (mut queue, mut handle) = queue(1);
    let mut call = queue.try_call("s3cret").unwrap();
    let waiting = queue.call("s3cret");
    let shown = |future: &dyn std::fmt::Debug| format!("{future:?}");
    assert_eq!(shown(&call), "queue::ResponseFuture(Queued)");
    assert_eq!(shown(&waiting), r#"queue::ResponseFuture("WaitingForPlace")"#);
    assert_eq!(
        shown(&queue),
        "Queue { capacity: 1, depth: 1, in_flight: 0, closed: false }"
    );
    settle().await;
    assert_eq!(shown(&call), "queue::ResponseFuture(Running)");
    assert_request_eq!(handle, "s3cret").send_response("s3cret");
    settle().await;
    assert_eq!(shown(&call), "queue::ResponseFuture(Done)");
    assert_eq!((&mut call).await.unwrap(), "s3cret");
    assert_eq!(shown(&call), r#"queue::ResponseFuture("Finished")"#);
    let refused = {
        queue.close();
        queue.try_call("s3cret").unwrap_err()
    };
    assert_eq!(shown(&refused), "Refused { closed: true, .. }");
}

#[tokio::test(start_paused = true)]
async fn three_thousand_callers_at_a_full_queue_all_get_a_response() {
    let (client, arrivals) = client(ms(1));
    let queue = QueueLayer::new(10).unwrap().layer(client);
    let calls: Vec<_> = (0..3_000)
        .map(|_| tokio::spawn(queue.clone().oneshot(request("call"))))
        .collect();
    for call in calls {
        call.await.unwrap().unwrap();
    }
    assert_eq!(arrivals.times().len(), 3_000);
}

#[tokio::test(start_paused = true)]
async fn the_queue_never_holds_more_than_it_has_places() {
    let readiness = Readiness::default();
    let queue = QueueLayer::new(3).unwrap().layer(readiness.service());
    // All ten clones of the queue become ready while its three places are free. Only then are the clones called.
    let mut clones: Vec<_> = (0..10).map(|_| queue.clone()).collect();
    for clone in &mut clones {
        clone.ready().await.unwrap();
    }
    let mut calls: Vec<_> = clones.iter_mut().map(|clone| task::spawn(clone.call("call"))).collect();
    for call in &mut calls {
        assert_pending!(call.poll());
    }
    assert_eq!(queue.depth(), 3);
    readiness.set_ready();
    for call in calls {
        assert_eq!(call.into_inner().await.unwrap(), "call");
    }
}

#[tokio::test(start_paused = true)]
async fn a_handle_that_is_ready_and_never_called_does_not_block_the_others() {
    let readiness = Readiness::default();
    let queue = QueueLayer::new(1).unwrap().layer(readiness.service());
    let mut idle: Vec<_> = (0..5).map(|_| queue.clone()).collect();
    for handle in &mut idle {
        handle.ready().await.unwrap();
    }
    let mut busy = queue.clone();
    let call = busy.ready().await.unwrap().call("busy");
    // This clone of the queue has to wait until the queue has a place for it. It becomes ready, but is not called.
    let mut late = queue.clone();
    let mut late = task::spawn(late.ready());
    assert_pending!(late.poll());
    readiness.set_ready();
    assert_eq!(call.await.unwrap(), "busy");
    assert!(late.is_woken());
    assert_ready_ok!(late.poll());
    let start = Instant::now();
    assert_eq!(queue.clone().oneshot("next").await.unwrap(), "next");
    assert!(start.elapsed() <= ms(6), "{:?}", start.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_response_future_that_is_not_polled_does_not_delay_other_calls() {
    let (client, arrivals) = client(ms(10));
    let mut queue = QueueLayer::new(10).unwrap().layer(client);
    let held = queue.ready().await.unwrap().call(request("held"));
    let mut calls = Vec::new();
    for _ in 0..5 {
        calls.push(queue.ready().await.unwrap().call(request("call")));
    }
    for call in calls {
        call.await.unwrap();
    }
    assert_eq!(arrivals.names(), ["held", "call", "call", "call", "call", "call"]);
    // The first call has completed although its response future was not polled, so awaiting it now takes no time.
    let start = Instant::now();
    held.await.unwrap();
    assert_eq!(start.elapsed(), ms(0));
}

#[tokio::test(start_paused = true)]
async fn a_dropped_call_frees_its_place_at_once() {
    let readiness = Readiness::default();
    let mut queue = QueueLayer::new(5).unwrap().layer(readiness.service());
    let mut calls = Vec::new();
    for name in ["a", "b", "c", "d", "e"] {
        calls.push(queue.ready().await.unwrap().call(name));
    }
    settle().await;
    assert_eq!(queue.depth(), 5);
    assert_pending!(task::spawn(queue.clone().ready()).poll());
    drop(calls);
    // No task has run since the calls were dropped, so the drop itself has freed their places.
    assert_eq!(queue.depth(), 0);
    let next = queue.try_call("f").unwrap();
    readiness.set_ready();
    assert_eq!(next.await.unwrap(), "f");
}

#[tokio::test(start_paused = true)]
async fn calls_that_are_dropped_while_the_service_is_not_ready_leave_nothing_behind() {
    let alive = Arc::new(());
    let readiness = Readiness::default();
    let stalled = readiness.clone();
    let service = tower::ServiceBuilder::new()
        .map_request(|_: Arc<()>| "call")
        .service(stalled.service());
    let mut queue = QueueLayer::new(10).unwrap().layer(service);
    for _ in 0..10_000 {
        let call = queue.ready().await.unwrap().call(alive.clone());
        drop(call);
    }
    assert_eq!(Arc::strong_count(&alive), 1);
    assert_eq!(queue.depth(), 0);
}

/// Counts how often its values are dropped.
struct CountsDrops(Arc<AtomicUsize>);

impl Drop for CountsDrops {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_in_flight_is_dropped_with_its_future_unless_it_is_detached() {
    let dropped = Arc::new(AtomicUsize::new(0));
    let drops = dropped.clone();
    let service = service_fn(move |takes: Duration| {
        let counted = CountsDrops(drops.clone());
        async move {
            sleep(takes).await;
            drop(counted);
            Ok::<_, BoxError>(())
        }
    });
    let mut queue = QueueLayer::new(10).unwrap().layer(service);
    let call = queue.ready().await.unwrap().call(ms(1_000));
    pass(ms(10)).await;
    assert_eq!((queue.in_flight(), dropped.load(Ordering::SeqCst)), (1, 0));
    drop(call);
    settle().await;
    assert_eq!((queue.in_flight(), dropped.load(Ordering::SeqCst)), (0, 1));

    queue.ready().await.unwrap().call(ms(1_000)).detach();
    pass(ms(999)).await;
    assert_eq!((queue.in_flight(), dropped.load(Ordering::SeqCst)), (1, 1));
    pass(ms(1)).await;
    assert_eq!((queue.in_flight(), dropped.load(Ordering::SeqCst)), (0, 2));
}

#[tokio::test(start_paused = true)]
async fn cancelling_a_call_wakes_its_caller() {
    let (client, _) = client(ms(1_000));
    let mut queue = QueueLayer::new(10).unwrap().layer(client);
    let mut call = task::spawn(queue.ready().await.unwrap().call(request("call")));
    assert_pending!(call.poll());
    settle().await;
    call.cancel();
    // The caller is told when the call's future has been dropped.
    assert!(!call.is_woken());
    settle().await;
    assert!(call.is_woken());
    assert!(assert_ready_err!(call.poll()).is::<Cancelled>());
}

#[tokio::test(start_paused = true)]
async fn cancelling_a_call_that_waits_for_a_place_wakes_its_caller() {
    let mut queue = QueueLayer::new(1).unwrap().layer(Readiness::default().service());
    let _first = queue.try_call("first").unwrap();
    let mut second = task::spawn(queue.call("second"));
    assert_pending!(second.poll());
    second.cancel();
    assert!(second.is_woken());
    assert!(assert_ready_err!(second.poll()).is::<Cancelled>());
}

#[tokio::test(start_paused = true)]
async fn the_service_is_polled_for_readiness_only_when_there_is_a_call() {
    let readiness = Readiness::default();
    readiness.set_ready();
    let mut queue = QueueLayer::new(10).unwrap().layer(readiness.service());
    settle().await;
    assert_eq!(readiness.polls.load(Ordering::SeqCst), 0);
    queue.ready().await.unwrap().call("call").await.unwrap();
    settle().await;
    assert_eq!(readiness.polls.load(Ordering::SeqCst), 1);
}

#[tokio::test(start_paused = true)]
async fn an_error_from_readiness_fails_one_call_and_the_next_succeeds() {
    let polls = Arc::new(AtomicUsize::new(0));
    let service = Scripted {
        ready: move |_: &mut Context<'_>| match polls.fetch_add(1, Ordering::SeqCst) {
            0 => Poll::Ready(Err(std::io::Error::other("not now"))),
            _ => Poll::Ready(Ok(())),
        },
    };
    let mut queue = QueueLayer::new(10).unwrap().layer(service);
    let (first, second) = (
        queue.ready().await.unwrap().call("first"),
        queue.ready().await.unwrap().call("second"),
    );
    assert_eq!(first.await.unwrap_err().to_string(), "not now");
    assert_eq!(second.await.unwrap(), "second");
}

#[tokio::test(start_paused = true)]
async fn a_panic_in_readiness_call_or_future_fails_that_call_and_no_other() {
    struct Fragile {
        readiness_polls: usize,
    }
    impl Service<&'static str> for Fragile {
        type Response = &'static str;
        type Error = BoxError;
        type Future = Pin<Box<dyn Future<Output = Result<&'static str, BoxError>> + Send>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
            self.readiness_polls += 1;
            assert_ne!(self.readiness_polls, 2, "readiness panicked");
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, req: &'static str) -> Self::Future {
            assert_ne!(req, "call", "the call panicked");
            Box::pin(async move {
                sleep(ms(1)).await;
                assert_ne!(req, "future", "the future panicked: {}", "https://u:p@h/?key=s");
                Ok(req)
            })
        }
    }
    for workers in [1, 3] {
        let mut queue = QueueLayer::new(10)
            .unwrap()
            .workers(workers)
            .unwrap()
            .layer(Fragile { readiness_polls: 0 });
        let mut calls = Vec::new();
        for name in ["fine", "readiness", "call", "future", "fine again"] {
            calls.push(queue.ready().await.unwrap().call(name));
        }
        let mut results = Vec::new();
        for call in calls {
            results.push(call.await);
        }
        assert_eq!(results[0].as_ref().unwrap(), &"fine");
        for (result, message) in
            results[1..4]
                .iter()
                .zip(["readiness panicked", "the call panicked", "the future panicked"])
        {
            let panicked = result.as_ref().unwrap_err().downcast_ref::<Panicked>().unwrap();
            assert!(panicked.message().contains(message), "{panicked}");
            assert!(!panicked.message().contains("key=s"));
        }
        assert_eq!(results[4].as_ref().unwrap(), &"fine again");
    }
}

#[tokio::test(start_paused = true)]
async fn a_panic_when_a_future_or_a_response_is_dropped_affects_no_other_call() {
    struct Bomb;
    impl Drop for Bomb {
        fn drop(&mut self) {
            panic!("dropped");
        }
    }
    enum Kind {
        Future,
        Response,
        Fine,
    }
    let service = service_fn(|kind: Kind| async move {
        match kind {
            Kind::Future => {
                let _bomb = Bomb;
                sleep(ms(1_000_000)).await;
                Ok(None)
            }
            Kind::Response => Ok(Some(Bomb)),
            Kind::Fine => Ok::<_, BoxError>(None),
        }
    });
    let mut queue = QueueLayer::new(10).unwrap().layer(service);
    let call = queue.ready().await.unwrap().call(Kind::Future);
    settle().await;
    drop(call);
    queue.ready().await.unwrap().call(Kind::Response).detach();
    settle().await;
    assert!(queue.ready().await.unwrap().call(Kind::Fine).await.unwrap().is_none());
    assert_eq!(queue.in_flight(), 0);
}

#[tokio::test(start_paused = true)]
async fn close_accepts_no_more_calls_and_finishes_the_accepted_ones() {
    let (client, arrivals) = client(ms(10));
    let mut queue = QueueLayer::new(100).unwrap().layer(client);
    for _ in 0..100 {
        queue.try_call(request("call")).unwrap().detach();
    }
    queue.close();
    assert!(queue.is_closed());
    assert!(queue.clone().oneshot(request("late")).await.unwrap_err().is::<Closed>());
    queue.ended().await;
    assert_eq!(arrivals.times().len(), 100);
    assert_eq!((queue.depth(), queue.in_flight()), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn close_wakes_callers_that_wait_for_a_place() {
    let readiness = Readiness::default();
    let mut queue = QueueLayer::new(1).unwrap().layer(readiness.service());
    let _a = queue.try_call("a").unwrap();
    let mut other = queue.clone();
    let mut ready = task::spawn(other.ready());
    assert_pending!(ready.poll());
    let mut calling = task::spawn(queue.call("b"));
    assert_pending!(calling.poll());
    queue.close();
    assert!(ready.is_woken() && calling.is_woken());
    assert!(ready.poll().map(|ready| ready.is_err_and(|error| error.is::<Closed>())) == Poll::Ready(true));
    assert!(assert_ready_err!(calling.poll()).is::<Closed>());
}

#[tokio::test(start_paused = true)]
async fn abort_cancels_every_call_and_wakes_every_caller() {
    let (client, _) = client(ms(1_000));
    let limited = tower_outbound::ConcurrencyLimitLayer::new(2).unwrap().layer(client);
    let mut queue = QueueLayer::new(10).unwrap().workers(2).unwrap().layer(limited);
    let calls: Vec<_> = (0..6).map(|_| queue.try_call(request("call")).unwrap()).collect();
    settle().await;
    assert_eq!((queue.in_flight(), queue.depth()), (2, 4));
    queue.abort();
    queue.ended().await;
    assert_eq!((queue.in_flight(), queue.depth()), (0, 0));
    for call in calls {
        assert!(timeout(ms(1), call).await.unwrap().unwrap_err().is::<Cancelled>());
    }
}

#[tokio::test(start_paused = true)]
async fn dropping_the_last_handle_closes_the_queue_and_accepted_calls_are_finished() {
    let (client, arrivals) = client(ms(10));
    let mut queue = QueueLayer::new(10).unwrap().layer(client);
    let waiting = queue.try_call(request("waiting")).unwrap();
    queue.try_call(request("detached")).unwrap().detach();
    drop(queue);
    waiting.await.unwrap();
    settle().await;
    assert_eq!(arrivals.names(), ["waiting", "detached"]);
}

#[test]
fn shutting_the_runtime_down_cancels_the_calls_that_are_left() {
    let first = paused_runtime();
    let (queued, running, queue) = first.block_on(async {
        let service = service_fn(async |_: ()| std::future::pending::<Result<(), BoxError>>().await);
        let limited = tower_outbound::ConcurrencyLimitLayer::new(1).unwrap().layer(service);
        let mut queue = QueueLayer::new(10).unwrap().layer(limited);
        let running = queue.try_call(()).unwrap();
        settle().await;
        let queued = queue.try_call(()).unwrap();
        (queued, running, queue)
    });
    drop(first);
    paused_runtime().block_on(async {
        assert!(queued.await.unwrap_err().is::<Cancelled>());
        assert!(running.await.unwrap_err().is::<Cancelled>());
        assert!(queue.clone().oneshot(()).await.unwrap_err().is::<Closed>());
    });
}

#[tokio::test(start_paused = true)]
async fn a_service_that_is_not_clone_can_be_queued() {
    let (service, mut handle) = mock::pair::<&'static str, &'static str>();
    handle.allow(1);
    /// A service that does not implement `Clone`.
    struct Unique<S>(S);
    impl<S: Service<R>, R> Service<R> for Unique<S> {
        type Response = S::Response;
        type Error = S::Error;
        type Future = S::Future;
        fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
            self.0.poll_ready(cx)
        }
        fn call(&mut self, req: R) -> S::Future {
            self.0.call(req)
        }
    }
    let mut queue = QueueLayer::new(1).unwrap().layer(Unique(service));
    let call = queue.ready().await.unwrap().call("call");
    settle().await;
    assert_request_eq!(handle, "call").send_response("done");
    assert_eq!(call.await.unwrap(), "done");
}

#[tokio::test(start_paused = true)]
async fn a_call_is_made_only_when_the_service_is_ready() {
    let (mut queue, mut handle) = queue(10);
    handle.allow(0);
    let call = queue.try_call("call").unwrap();
    settle().await;
    assert_pending!(task::spawn(handle.next_request()).poll());
    handle.allow(1);
    settle().await;
    assert_request_eq!(handle, "call").send_response("done");
    assert_eq!(call.await.unwrap(), "done");
}

#[test]
fn a_capacity_or_a_number_of_workers_of_zero_is_an_error_that_names_the_field() {
    assert_eq!(QueueLayer::<()>::new(0).unwrap_err().field(), "queue_capacity");
    assert_eq!(
        QueueLayer::<()>::new(1).unwrap().workers(0).unwrap_err().field(),
        "workers"
    );
}

#[tokio::test(start_paused = true)]
async fn a_call_can_be_cancelled_before_it_has_a_place() {
    let (client, arrivals) = client(ms(10));
    let limited = tower_outbound::ConcurrencyLimitLayer::new(1).unwrap().layer(client);
    let mut queue = QueueLayer::new(1).unwrap().layer(limited);
    queue.try_call(request("running")).unwrap().detach();
    settle().await;
    queue.try_call(request("queued")).unwrap().detach();
    let mut waiting = queue.call(request("waiting"));
    assert!(!waiting.is_accepted());
    waiting.cancel();
    assert!(waiting.await.unwrap_err().is::<Cancelled>());
    queue.close();
    queue.ended().await;
    assert_eq!(arrivals.names(), ["running", "queued"]);
}

#[test]
fn calls_without_a_deadline_need_no_timer_of_the_runtime_and_one_with_a_deadline_panics_before_it_is_accepted() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let echo = service_fn(async |number: u32| Ok::<_, BoxError>(number));
        let layer = QueueLayer::new(10).unwrap();
        let soon = |number: &u32| (*number > 100).then(|| tower_outbound::Deadline::after(ms(1)));
        let mut queue = layer.deadline(soon).layer(echo);
        let calls: Vec<_> = (0..10).map(|number| queue.try_call(number).unwrap()).collect();
        for (number, call) in (0..).zip(calls) {
            assert_eq!(call.await.unwrap(), number);
        }
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| queue.try_call(101)));
        assert!(panicked.is_err());
        assert_eq!((queue.depth(), queue.in_flight()), (0, 0));
    });
}
