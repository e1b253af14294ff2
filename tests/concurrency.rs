//! What the service `ConcurrencyLimit` guarantees. The tests poll its futures by hand.

mod support;

use std::{
    convert::Infallible,
    future::poll_fn,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::Poll,
};
use support::{client, ms, pass, request, settle};
use tokio::{
    task::{JoinSet, coop},
    time::Instant,
};
use tokio_test::{assert_pending, assert_ready, assert_ready_err, assert_ready_ok, task};
use tower::{Layer, Service, ServiceExt};
use tower_outbound::{Concurrency, ConcurrencyLimit, ConcurrencyLimitLayer};
use tower_test::{assert_request_eq, mock};

type Handle = mock::Handle<&'static str, &'static str>;
type Limited = ConcurrencyLimit<mock::Mock<&'static str, &'static str>>;

fn limited(limit: usize) -> (Limited, Concurrency, Handle) {
    let (service, handle) = mock::pair();
    let layer = ConcurrencyLimitLayer::new(limit).unwrap();
    (layer.layer(service), layer.limit().clone(), handle)
}

/// Calls the service, which must be ready, and polls the response future once; the future must be pending.
macro_rules! call {
    ($service:expr, $name:expr) => {{
        assert_ready_ok!(task::spawn($service.ready()).poll());
        let mut call = task::spawn($service.call($name));
        assert_pending!(call.poll());
        call
    }};
}

#[tokio::test(start_paused = true)]
async fn at_most_n_are_in_flight_over_all_clones() {
    let (client, arrivals) = client(ms(100));
    let service = ConcurrencyLimitLayer::new(3).unwrap().layer(client);
    let calls: Vec<_> = (0..10)
        .map(|_| tokio::spawn(service.clone().oneshot(request("call"))))
        .collect();
    for call in calls {
        call.await.unwrap().unwrap();
    }
    let expected: Vec<_> = (0..10).map(|call| ms(100 * (call / 3))).collect();
    assert_eq!(arrivals.times(), expected);
}

#[tokio::test(start_paused = true)]
async fn readiness_waits_for_a_permit_and_is_woken_by_one() {
    let (mut service, limit, mut handle) = limited(1);
    handle.allow(10);
    let mut first = call!(service, "first");
    assert_request_eq!(handle, "first").send_response("done");
    let mut other = service.clone();
    let mut ready = task::spawn(other.ready());
    assert_pending!(ready.poll());
    assert_eq!(limit.in_flight(), 1);

    assert_ready_ok!(first.poll());
    assert_eq!(limit.in_flight(), 0);
    assert!(ready.is_woken());
    assert_ready_ok!(ready.poll());
}

#[tokio::test(start_paused = true)]
async fn a_permit_is_free_when_the_call_has_completed_failed_panicked_or_been_dropped() {
    let (mut service, limit, mut handle) = limited(1);
    handle.allow(10);

    let mut done = call!(service, "done");
    assert_eq!(limit.in_flight(), 1);
    assert_request_eq!(handle, "done").send_response("");
    assert_ready_ok!(done.poll());
    assert_eq!(limit.in_flight(), 0);

    let mut failed = call!(service, "failed");
    assert_eq!(limit.in_flight(), 1);
    assert_request_eq!(handle, "failed").send_error("no");
    assert_ready_err!(failed.poll());
    assert_eq!(limit.in_flight(), 0);

    let dropped = call!(service, "dropped");
    assert_eq!(limit.in_flight(), 1);
    drop(dropped);
    assert_eq!(limit.in_flight(), 0);

    let panics = tower::service_fn(|()| async { panic!("in the client") as Result<(), std::io::Error> });
    let mut panics = ConcurrencyLimitLayer::with_limit(limit.clone()).layer(panics);
    let call = tokio::spawn(async move { panics.ready().await.unwrap().call(()).await });
    assert!(call.await.unwrap_err().is_panic());
    assert_eq!(limit.in_flight(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_completed_future_that_is_kept_holds_no_permit() {
    let (mut service, limit, mut handle) = limited(1);
    handle.allow(1);
    let mut call = call!(service, "call");
    assert_request_eq!(handle, "call").send_response("");
    assert_ready_ok!(call.poll());
    // The permit is free again, although the completed response future has not been dropped yet.
    assert_eq!(limit.in_flight(), 0);
    drop(call);
}

#[tokio::test]
async fn a_permit_is_released_after_the_inner_call_was_dropped() {
    /// Records at its drop how many calls are in flight.
    struct OnDrop(Concurrency, Arc<AtomicUsize>);
    impl Drop for OnDrop {
        fn drop(&mut self) {
            self.1.store(self.0.in_flight(), Ordering::Relaxed);
        }
    }
    for completes in [true, false] {
        let layer = ConcurrencyLimitLayer::new(1).unwrap();
        let (limit, at_drop) = (layer.limit().clone(), Arc::new(AtomicUsize::new(0)));
        let guard = (limit.clone(), Arc::clone(&at_drop));
        let service = tower::service_fn(move |()| {
            let guard = OnDrop(guard.0.clone(), guard.1.clone());
            poll_fn(move |_| {
                // The future owns the guard, also when it has completed.
                let _ = &guard;
                if completes {
                    Poll::Ready(Ok::<_, Infallible>(()))
                } else {
                    Poll::Pending
                }
            })
        });
        let mut service = layer.layer(service);
        assert_ready_ok!(task::spawn(service.ready()).poll());
        let mut call = task::spawn(service.call(()));
        assert_eq!(call.poll().is_ready(), completes);
        drop(call);
        assert_eq!(at_drop.load(Ordering::Relaxed), 1);
        assert_eq!(limit.in_flight(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn a_clone_that_is_ready_and_never_called_does_not_block_the_others() {
    let (service, limit, mut handle) = limited(1);
    handle.allow(10);
    let mut idle: Vec<_> = (0..5).map(|_| service.clone()).collect();
    for service in &mut idle {
        assert_ready_ok!(task::spawn(service.ready()).poll());
    }
    assert_eq!(limit.in_flight(), 0);
    let mut busy = service.clone();
    let _call = call!(busy, "busy");
}

#[tokio::test(start_paused = true)]
async fn a_clone_that_waited_for_readiness_and_is_never_called_delays_the_next_one_by_five_milliseconds() {
    let (service, _, mut handle) = limited(1);
    handle.allow(10);
    let (mut first, mut idle, mut next) = (service.clone(), service.clone(), service.clone());
    let mut running = call!(first, "first");
    let mut idle_ready = task::spawn(idle.ready());
    let mut next_ready = task::spawn(next.ready());
    assert_pending!(idle_ready.poll());
    assert_pending!(next_ready.poll());

    assert_request_eq!(handle, "first").send_response("");
    assert_ready_ok!(running.poll());
    assert!(idle_ready.is_woken() && !next_ready.is_woken());
    assert_ready_ok!(idle_ready.poll());
    pass(ms(4)).await;
    assert!(!next_ready.is_woken());
    pass(ms(2)).await;
    assert!(next_ready.is_woken());
    assert_ready_ok!(next_ready.poll());
}

#[tokio::test(start_paused = true)]
async fn waiters_that_are_never_polled_again_do_not_add_up() {
    for (idle, delay) in [(1, 5), (9, 10), (73, 15), (585, 20)] {
        let (service, _, mut handle) = limited(1);
        handle.allow(10);
        let mut running = service.clone();
        let mut running = call!(running, "first");
        let mut idle: Vec<_> = (0..idle).map(|_| service.clone()).collect();
        for service in &mut idle {
            assert_pending!(task::spawn(service.ready()).poll());
        }
        let mut next: Vec<_> = (0..3).map(|_| service.clone()).collect();
        let mut next: Vec<_> = next.iter_mut().map(|service| task::spawn(service.ready())).collect();
        next.iter_mut().for_each(|ready| assert_pending!(ready.poll()));

        let begun = Instant::now();
        assert_request_eq!(handle, "first").send_response("");
        assert_ready_ok!(running.poll());
        pass(ms(delay - 1)).await;
        assert!(next.iter().all(|ready| !ready.is_woken()));
        pass(ms(1)).await;
        assert_eq!(begun.elapsed(), ms(delay));
        assert!(next.iter().all(task::Spawn::is_woken));
        assert_ready_ok!(next[0].poll());
    }
}

/// Eight waiters are notified at once after the first has not responded. As soon as one of them has taken the permit,
/// the others are notified one by one again, in order.
#[tokio::test(start_paused = true)]
async fn one_waiter_is_notified_at_a_time_as_soon_as_one_has_responded() {
    let (service, _, mut handle) = limited(1);
    handle.allow(10);
    let mut running = service.clone();
    let mut running = call!(running, "running");
    let mut idle = service.clone();
    assert_pending!(task::spawn(idle.ready()).poll());
    let mut waiting: Vec<_> = (0..4).map(|_| task::spawn(service.clone().oneshot("waited"))).collect();
    waiting.iter_mut().for_each(|call| assert_pending!(call.poll()));

    assert_request_eq!(handle, "running").send_response("");
    assert_ready_ok!(running.poll());
    pass(ms(5)).await;
    assert!(waiting.iter().all(task::Spawn::is_woken));
    // The third is polled first, and gets the permit. The others wait in order.
    for next in [2, 0, 1, 3] {
        assert!(waiting[next].is_woken());
        assert_pending!(waiting[next].poll());
        assert_request_eq!(handle, "waited").send_response("");
        if next == 2 {
            [0, 1, 3]
                .into_iter()
                .for_each(|call| assert_pending!(waiting[call].poll()));
        }
        assert_ready_ok!(waiting[next].poll());
    }
}

/// A timer that is armed while the task has used up its cooperative budget must be armed all the same.
#[tokio::test(start_paused = true)]
async fn a_release_without_cooperative_budget_still_skips_a_waiter_that_does_not_respond() {
    let (service, _, mut handle) = limited(1);
    handle.allow(10);
    let mut running = service.clone();
    let running = call!(running, "first");
    let (mut idle, mut next) = (service.clone(), service);
    assert_pending!(task::spawn(idle.ready()).poll());
    let mut next = task::spawn(next.ready());
    assert_pending!(next.poll());
    tokio::spawn(async move {
        while coop::has_budget_remaining() {
            coop::consume_budget().await;
        }
        drop(running);
    })
    .await
    .unwrap();
    pass(ms(5)).await;
    assert!(next.is_woken());
}

#[tokio::test(start_paused = true)]
async fn a_call_holds_a_permit_before_its_future_is_polled() {
    let (mut service, limit, mut handle) = limited(1);
    handle.allow(10);
    assert_ready_ok!(task::spawn(service.ready()).poll());
    let first = service.call("first");
    assert_eq!(limit.in_flight(), 1);
    assert_pending!(task::spawn(service.ready()).poll());
    drop(first);
    assert_eq!(limit.in_flight(), 0);
    assert_ready_ok!(task::spawn(service.ready()).poll());
}

#[tokio::test(start_paused = true)]
async fn a_future_that_is_not_polled_keeps_its_permit_while_nobody_waits_for_one() {
    let (mut service, limit, mut handle) = limited(1);
    handle.allow(10);
    let mut call = task::spawn(service.call("call"));
    pass(ms(3_600_000)).await;
    assert_eq!(limit.in_flight(), 1);
    assert_pending!(call.poll());
    assert_request_eq!(handle, "call").send_response("");
    assert_ready_ok!(call.poll());
    assert_eq!(limit.in_flight(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_future_that_is_never_polled_blocks_a_waiter_for_five_milliseconds_and_loses_its_permit() {
    let (mut service, limit, mut handle) = limited(1);
    handle.allow(10);
    let mut late = task::spawn(service.call("late"));
    pass(ms(1_000)).await;
    let mut other = task::spawn(service.call("other"));
    assert_pending!(other.poll());
    pass(ms(4)).await;
    assert!(!other.is_woken());
    pass(ms(1)).await;
    assert!(other.is_woken());
    assert_pending!(other.poll());
    assert_eq!(limit.in_flight(), 1);

    // The late one waits for another permit.
    assert_pending!(late.poll());
    assert_request_eq!(handle, "other").send_response("");
    assert_ready_ok!(other.poll());
    assert!(late.is_woken());
    assert_pending!(late.poll());
    assert_request_eq!(handle, "late").send_response("");
    assert_ready_ok!(late.poll());
    assert_eq!(limit.in_flight(), 0);
}

/// The waiter began to wait when the first call was made. The second call has taken its permit after that, and has lost
/// nothing when the first one loses its permit.
#[tokio::test(start_paused = true)]
async fn only_calls_that_were_made_five_milliseconds_ago_lose_their_permits() {
    let (mut service, limit, mut handle) = limited(2);
    handle.allow(10);
    let busy = call!(service, "busy");
    let _late = service.call("late");
    let mut ready = [service.clone(), service.clone()];
    let [first, second] = &mut ready;
    let mut first_ready = task::spawn(first.ready());
    let mut second_ready = task::spawn(second.ready());
    assert_pending!(first_ready.poll());
    assert_pending!(second_ready.poll());
    pass(ms(3)).await;
    drop(busy);
    assert_ready_ok!(first_ready.poll());
    drop(first_ready);
    let in_time = first.call("in time");
    pass(ms(2)).await;
    assert!(second_ready.is_woken());
    assert_ready_ok!(second_ready.poll());
    drop(second_ready);
    let mut in_time = task::spawn(in_time);
    assert_pending!(in_time.poll());
    assert_request_eq!(handle, "busy").send_response("");
    assert_request_eq!(handle, "in time").send_response("");
    assert_ready_ok!(in_time.poll());
    assert_eq!(limit.in_flight(), 0);
}

#[tokio::test(start_paused = true)]
async fn futures_that_are_never_polled_do_not_add_up() {
    let (mut service, limit, mut handle) = limited(1);
    handle.allow(10);
    let begun = Instant::now();
    let mut never = Vec::new();
    for _ in 0..500 {
        never.push(service.ready().await.unwrap().call("never"));
    }
    service.ready().await.unwrap();
    assert!(begun.elapsed() <= ms(25), "{:?}", begun.elapsed());

    // As soon as calls are polled, each holds its permit from when it is made.
    drop(never);
    drop(call!(service, "polled"));
    let _not_polled = service.call("not polled");
    assert_eq!(limit.in_flight(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_loop_that_spawns_its_calls_is_held_back_by_the_limit() {
    let (client, _) = client(ms(100));
    let mut service = ConcurrencyLimitLayer::new(3).unwrap().layer(client);
    let mut calls = JoinSet::new();
    for _ in 0..30 {
        calls.spawn(service.ready().await.unwrap().call(request("call")));
        while calls.try_join_next().is_some() {}
        assert!(calls.len() <= 3);
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_without_a_permit_keeps_the_position_that_its_service_had() {
    let (service, limit, mut handle) = limited(1);
    handle.allow(10);
    let mut busy = service.clone();
    let running = call!(busy, "running");
    let (mut first, mut second) = (service.clone(), service);
    assert_pending!(task::spawn(first.ready()).poll());
    let mut second = task::spawn(second.ready());
    assert_pending!(second.poll());
    let mut first = task::spawn(first.call("first"));
    assert_eq!(limit.in_flight(), 1);
    assert_pending!(first.poll());
    drop(running);
    assert!(first.is_woken() && !second.is_woken());
}

#[tokio::test(start_paused = true)]
async fn a_call_that_waits_for_a_permit_holds_no_place_of_the_inner_service() {
    let (service, mut handle) = mock::pair::<&str, &str>();
    let layer = ConcurrencyLimitLayer::new(1).unwrap();
    let (mut limited, mut direct) = (layer.layer(service.clone()), service);
    handle.allow(1);
    let running = call!(limited, "running");
    let mut waits = task::spawn(limited.oneshot("waits"));
    assert_pending!(waits.poll());
    // The inner service has one place, and it is not reserved for the call that waits.
    handle.allow(1);
    assert_ready_ok!(task::spawn(direct.ready()).poll());
    drop(running);
}

#[tokio::test(start_paused = true)]
async fn a_call_whose_inner_service_is_not_ready_holds_no_permit() {
    let (service, limit, mut handle) = limited(1);
    let mut waits = task::spawn(service.clone().oneshot("waits"));
    handle.allow(0);
    assert_pending!(waits.poll());
    assert_eq!(limit.in_flight(), 0);

    // The other service has the same limit and is ready.
    let (other, mut other_handle) = mock::pair::<&str, &str>();
    other_handle.allow(1);
    let mut other = ConcurrencyLimitLayer::with_limit(limit.clone()).layer(other);
    let running = call!(other, "other");

    // The call is made when both are there.
    handle.allow(1);
    assert!(waits.is_woken());
    assert_pending!(waits.poll());
    drop(running);
    assert!(waits.is_woken());
    assert_pending!(waits.poll());
    assert_request_eq!(handle, "waits").send_response("");
    assert_ready_ok!(waits.poll());
    assert_eq!(limit.in_flight(), 0);
}

#[tokio::test(start_paused = true)]
async fn an_inner_service_that_fails_to_become_ready_fails_the_call_and_holds_no_permit() {
    let (service, limit, mut handle) = limited(1);
    handle.send_error("not ready");
    let mut failed = service.clone();
    let mut failed = task::spawn(failed.call("failed"));
    assert_eq!(limit.in_flight(), 1);
    assert_eq!(assert_ready_err!(failed.poll()).to_string(), "not ready");
    assert_eq!(limit.in_flight(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_loop_of_calls_that_need_not_wait_lets_other_tasks_run() {
    let service = tower::service_fn(async |()| Ok::<_, std::convert::Infallible>(()));
    let mut service = ConcurrencyLimitLayer::new(1).unwrap().layer(service);
    let other = tokio::spawn(async {});
    let mut calls = 0;
    while !other.is_finished() {
        calls += 1;
        assert!(calls < 1_000, "the task never yields");
        service.ready().await.unwrap().call(()).await.unwrap();
    }
    // A call counts as one unit of the budget of 128.
    assert!(calls > 100, "{calls}");
}

#[tokio::test(start_paused = true)]
async fn calls_that_find_no_permit_wait_for_one_in_order() {
    let (service, _, mut handle) = limited(1);
    handle.allow(10);
    // All three clones are ready, because readiness reserves nothing. Only one of their calls can have the permit.
    let mut clones: Vec<_> = (0..3).map(|_| service.clone()).collect();
    for service in &mut clones {
        assert_ready_ok!(task::spawn(service.ready()).poll());
    }
    let mut calls: Vec<_> = clones
        .iter_mut()
        .zip(["a", "b", "c"])
        .map(|(s, name)| task::spawn(s.call(name)))
        .collect();
    calls.iter_mut().for_each(|call| assert_pending!(call.poll()));
    for name in ["a", "b", "c"] {
        assert_request_eq!(handle, name).send_response("");
        let mut first = calls.remove(0);
        assert_ready_ok!(first.poll());
        if let Some(next) = calls.first_mut() {
            assert!(next.is_woken());
            assert_pending!(next.poll());
        }
    }
}

#[tokio::test(start_paused = true)]
async fn the_limit_can_be_changed_while_calls_run_and_wait() {
    let (service, limit, mut handle) = limited(2);
    handle.allow(10);
    let mut service = service;
    let _first = call!(service, "1");
    let second = call!(service, "2");
    let mut waiting = service.clone();
    let mut waiting = task::spawn(waiting.ready());
    assert_pending!(waiting.poll());

    limit.set(3).unwrap();
    assert!(waiting.is_woken());
    assert_ready_ok!(waiting.poll());

    limit.set(1).unwrap();
    assert_eq!((limit.get(), limit.in_flight()), (1, 2));
    drop(second);
    let mut other = service.clone();
    assert_pending!(task::spawn(other.ready()).poll());
    assert_eq!(limit.set(0).unwrap_err().field(), "concurrency_limit");
    assert_eq!(limit.get(), 1);
}

#[tokio::test(start_paused = true)]
async fn several_services_can_share_one_limit() {
    let limit = Concurrency::new(1).unwrap();
    let layer = ConcurrencyLimitLayer::with_limit(limit);
    let ((a, mut a_handle), (b, mut b_handle)) = (mock::pair::<&str, &str>(), mock::pair::<&str, &str>());
    let (mut a, mut b) = (layer.layer(a), layer.layer(b));
    a_handle.allow(1);
    b_handle.allow(1);
    let _call = call!(a, "a");
    assert_pending!(task::spawn(b.ready()).poll());
}

#[tokio::test(start_paused = true)]
async fn the_instance_that_was_ready_is_the_one_that_is_called() {
    /// A service that panics when it is called without having been polled ready. A new clone of it is not ready.
    #[derive(Default)]
    struct Once(bool);
    impl Clone for Once {
        fn clone(&self) -> Self {
            Self(false)
        }
    }
    impl Service<()> for Once {
        type Response = ();
        type Error = std::convert::Infallible;
        type Future = std::future::Ready<Result<(), Self::Error>>;
        fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), Self::Error>> {
            self.0 = true;
            std::task::Poll::Ready(Ok(()))
        }
        fn call(&mut self, (): ()) -> Self::Future {
            assert!(self.0, "called without having been ready");
            std::future::ready(Ok(()))
        }
    }
    let mut service = ConcurrencyLimitLayer::new(1).unwrap().layer(Once::default());
    for _ in 0..3 {
        service.ready().await.unwrap().call(()).await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn dropping_a_notified_waiter_notifies_the_next_one() {
    let (service, _, mut handle) = limited(1);
    handle.allow(10);
    let (mut first, mut second, mut third) = (service.clone(), service.clone(), service.clone());
    let mut running = call!(first, "first");
    let mut gives_up = task::spawn(async move { second.ready().await.map(drop) });
    let mut waits = task::spawn(third.ready());
    assert_pending!(gives_up.poll());
    assert_pending!(waits.poll());
    assert_request_eq!(handle, "first").send_response("");
    assert_ready!(running.poll()).unwrap();
    assert!(gives_up.is_woken());
    drop(gives_up);
    settle().await;
    assert!(waits.is_woken());
    assert_ready_ok!(waits.poll());
}

#[test]
fn a_limit_of_zero_is_an_error_that_names_the_field() {
    assert_eq!(
        ConcurrencyLimitLayer::new(0).unwrap_err().to_string(),
        "invalid concurrency_limit: must be above zero, is 0"
    );
}

/// The first waiter is notified, and is polled only after 5 ms, when its handoff timeout has passed and the next waiter
/// may be notified. If the late poll counted as a new notification and the second waiter were never woken, the second
/// waiter would wait forever.
#[tokio::test(start_paused = true)]
async fn a_late_poll_of_a_notified_waiter_does_not_lose_the_wake_up_of_the_next_one() {
    let (service, limit, mut handle) = limited(3);
    handle.allow(10);
    let mut busy: Vec<_> = (0..3).map(|_| service.clone()).collect();
    let mut running: Vec<_> = busy.iter_mut().map(|service| call!(service, "busy")).collect();
    let mut clones: Vec<_> = (0..3).map(|_| service.clone()).collect();
    let mut waiting: Vec<_> = clones.iter_mut().map(|service| task::spawn(service.ready())).collect();
    waiting.iter_mut().for_each(|ready| assert_pending!(ready.poll()));
    drop(running.pop());
    tokio::time::advance(ms(2)).await;
    drop(running);
    assert_eq!(limit.in_flight(), 0);
    // The clock passes the handoff timeout (5 ms) before any other task can run. Then the first waiter is polled.
    tokio::time::advance(ms(12)).await;
    assert!(waiting[0].is_woken());
    assert_ready_ok!(waiting[0].poll());
    pass(ms(12)).await;
    assert!(waiting[1].is_woken());
    assert_ready_ok!(waiting[1].poll());
    pass(ms(12)).await;
    assert!(waiting[2].is_woken());
}
