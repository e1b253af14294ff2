//! Loom tests of the queue: every order in which threads can push, end and run calls and close the queue, with up to
//! two preemptions (one where there are too many orders). Each worker is a thread.

use super::{
    CallContext,
    channel::Channel,
    message::{EarlyEnd, Message},
    worker::{SharedService, Worker},
};
use crate::{
    error::{BoxError, Cancelled, Closed},
    event::{Events, Scope, Stage},
    rate::Cost,
    schedule::{Flow, Schedule},
    semaphore::Semaphore,
    sync::{Mutex, model},
};
use loom::{
    future::block_on,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};
use std::{
    future::{Future, Ready, poll_fn, ready},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
};
use tower_service::Service;

type Call = Arc<Message<u32, u32>>;

/// Makes a channel in front of the service.
fn channel<S>(service: S) -> Arc<Channel<u32, u32>>
where
    S: Service<u32, Response = u32, Error = BoxError> + Send + 'static,
    S::Future: Send + 'static,
{
    channel_of(4, None, service)
}

/// Makes a channel with one place and a schedule in front of the service.
fn scheduled<S>(service: S) -> (Arc<Channel<u32, u32>>, Schedule)
where
    S: Service<u32, Response = u32, Error = BoxError> + Send + 'static,
    S::Future: Send + 'static,
{
    let schedule = Schedule::new();
    (channel_of(1, Some(schedule.clone()), service), schedule)
}

fn channel_of<S>(places: usize, schedule: Option<Schedule>, service: S) -> Arc<Channel<u32, u32>>
where
    S: Service<u32, Response = u32, Error = BoxError> + Send + 'static,
    S::Future: Send + 'static,
{
    let service = SharedService::new(Mutex::new(Some(service)));
    Channel::new(Semaphore::new(places), 1, schedule, move |channel, id| {
        let worker = Worker::new(service.clone(), id, channel.clone());
        channel.runtime().spawn(worker);
    })
}

/// Pushes a call with the request `req`. Returns the call, or `None` if the queue was closed.
fn push(channel: &Arc<Channel<u32, u32>>, req: u32) -> Option<Call> {
    push_in(channel, req, Scope::capture())
}

/// Pushes a call with the request `req` and the event of `scope`.
fn push_in(channel: &Arc<Channel<u32, u32>>, req: u32, scope: Scope) -> Option<Call> {
    let place = channel.places().acquire().try_acquire().ok()??;
    let context = CallContext {
        scope,
        deadline: None,
        demand: None,
        scheduled: None,
    };
    channel.push(&mut Some(req), context, place).ok()
}

/// Pushes a call with the request `req`, which waits in the schedule, and for a place if there is none. `None` if the queue
/// was closed.
fn push_scheduled(channel: &Arc<Channel<u32, u32>>, schedule: &Schedule, req: u32) -> Option<Call> {
    let place = channel.places().acquire().try_acquire().ok()?;
    let context = CallContext {
        scope: Scope::capture(),
        deadline: None,
        demand: None,
        scheduled: None,
    };
    let call = schedule.call(&Flow::default(), Cost::request());
    channel.push_scheduled(&mut Some(req), context, place, call).ok()
}

/// Checks that no call waits in the schedule, and that all have been settled.
fn assert_empty(schedule: &Schedule) {
    assert_eq!((schedule.waiting(), schedule.flows(9).len()), (0, 0));
}

fn response(call: &Call) -> Result<u32, BoxError> {
    block_on(poll_fn(|cx| call.poll_response(cx)))
}

/// Waits until the last worker has ended.
fn join(channel: &Arc<Channel<u32, u32>>) {
    channel.runtime().join();
    assert!(channel.is_ended());
    assert_eq!((channel.in_flight(), channel.places().held()), (0, 0));
}

/// A service that responds with the request, and counts its calls.
struct Echo(Arc<AtomicUsize>);

impl Service<u32> for Echo {
    type Response = u32;
    type Error = BoxError;
    type Future = Ready<Result<u32, BoxError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, req: u32) -> Self::Future {
        self.0.fetch_add(1, Ordering::Relaxed);
        ready(Ok(req))
    }
}

/// Something that becomes available once, on another thread.
#[derive(Clone, Default)]
struct Gate(Arc<Mutex<(bool, Option<Waker>)>>);

impl Gate {
    fn open(&self) {
        let waker = {
            let mut gate = self.0.lock().unwrap();
            gate.0 = true;
            gate.1.take()
        };
        waker.into_iter().for_each(Waker::wake);
    }

    fn poll(&self, cx: &Context<'_>) -> Poll<()> {
        let mut gate = self.0.lock().unwrap();
        if gate.0 {
            return Poll::Ready(());
        }
        gate.1 = Some(cx.waker().clone());
        Poll::Pending
    }
}

/// A service that is ready once its gate is open.
struct ReadyAtGate(Gate);

impl Service<u32> for ReadyAtGate {
    type Response = u32;
    type Error = BoxError;
    type Future = Ready<Result<u32, BoxError>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.0.poll(cx).map(Ok)
    }

    fn call(&mut self, req: u32) -> Self::Future {
        ready(Ok(req))
    }
}

/// A service whose calls wait for the gate.
struct WaitsAtGate(Gate);

struct AtGate(Gate, u32);

impl Service<u32> for WaitsAtGate {
    type Response = u32;
    type Error = BoxError;
    type Future = AtGate;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, req: u32) -> Self::Future {
        AtGate(self.0.clone(), req)
    }
}

impl Future for AtGate {
    type Output = Result<u32, BoxError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.poll(cx).map(|()| Ok(self.1))
    }
}

#[test]
fn every_accepted_call_is_made_once() {
    model(2, || {
        let made = Arc::new(AtomicUsize::new(0));
        let channel = channel(Echo(made.clone()));
        let calls = [1, 2].map(|req| push(&channel, req).unwrap());
        channel.close();
        assert_eq!(calls.map(|call| response(&call).unwrap()), [1, 2]);
        join(&channel);
        assert_eq!(made.load(Ordering::Relaxed), 2);
    });
}

#[test]
fn a_call_pushed_while_the_queue_closes_is_refused_or_made() {
    model(2, || {
        let made = Arc::new(AtomicUsize::new(0));
        let channel = channel(Echo(made.clone()));
        let closes = thread::spawn({
            let channel = channel.clone();
            move || channel.close()
        });
        let call = push(&channel, 7);
        let accepted = usize::from(call.is_some());
        if let Some(call) = call {
            assert_eq!(response(&call).unwrap(), 7);
        }
        closes.join().unwrap();
        join(&channel);
        assert_eq!(made.load(Ordering::Relaxed), accepted);
    });
}

#[test]
fn a_call_that_is_cancelled_while_it_is_made_has_one_outcome_and_frees_its_place() {
    model(2, || {
        let made = Arc::new(AtomicUsize::new(0));
        let channel = channel(Echo(made.clone()));
        let call = push(&channel, 7).unwrap();
        let cancels = thread::spawn({
            let (channel, call) = (channel.clone(), call.clone());
            move || channel.end_early(&call, EarlyEnd::Cancelled)
        });
        match response(&call) {
            Ok(response) => assert_eq!((response, made.load(Ordering::Relaxed)), (7, 1)),
            Err(error) => assert!(error.is::<Cancelled>()),
        }
        cancels.join().unwrap();
        channel.close();
        join(&channel);
    });
}

#[test]
fn a_call_that_waits_is_reached_by_its_cancellation() {
    model(2, || {
        let channel = channel(WaitsAtGate(Gate::default()));
        let call = push(&channel, 7).unwrap();
        channel.end_early(&call, EarlyEnd::Cancelled);
        assert!(response(&call).unwrap_err().is::<Cancelled>());
        channel.close();
        join(&channel);
    });
}

#[test]
fn calls_go_on_when_the_service_becomes_ready() {
    model(2, || {
        let gate = Gate::default();
        let channel = channel(ReadyAtGate(gate.clone()));
        let opens = thread::spawn(move || gate.open());
        let calls = [1, 2].map(|req| push(&channel, req).unwrap());
        assert_eq!(calls.map(|call| response(&call).unwrap()), [1, 2]);
        opens.join().unwrap();
        channel.close();
        join(&channel);
    });
}

#[test]
fn an_abort_ends_a_call_that_waits_for_the_service() {
    model(2, || {
        let channel = channel(ReadyAtGate(Gate::default()));
        let call = push(&channel, 7).unwrap();
        channel.abort();
        assert!(response(&call).unwrap_err().is::<Cancelled>());
        join(&channel);
    });
}

#[test]
fn an_abort_ends_a_call_that_begins_or_waits() {
    model(2, || {
        let channel = channel(WaitsAtGate(Gate::default()));
        let call = push(&channel, 7).unwrap();
        channel.abort();
        assert!(response(&call).unwrap_err().is::<Cancelled>());
        join(&channel);
    });
}

#[test]
fn a_stop_that_finishes_what_is_on_the_wire_ends_a_call_that_never_gets_there() {
    model(2, || {
        let events = Events::new();
        let channel = channel(WaitsAtGate(Gate::default()));
        let (event, span) = events.open(|_| (), Stage::Queued, false);
        let call = push_in(&channel, 7, Scope::capture_with(event, span)).unwrap();
        channel.finish_sent();
        assert!(response(&call).unwrap_err().is::<Cancelled>());
        join(&channel);
        assert_eq!(events.totals().cancelled, 1);
    });
}

#[test]
fn an_abort_during_a_stop_ends_the_calls_that_the_stop_would_finish() {
    model(2, || {
        let channel = channel(WaitsAtGate(Gate::default()));
        // A call without an event counts as on the wire once it has begun.
        let call = push(&channel, 7).unwrap();
        let finishes = thread::spawn({
            let channel = channel.clone();
            move || channel.finish_sent()
        });
        channel.abort();
        assert!(response(&call).unwrap_err().is::<Cancelled>());
        finishes.join().unwrap();
        join(&channel);
    });
}

#[test]
fn a_call_whose_service_becomes_ready_during_a_stop_has_one_outcome() {
    model(2, || {
        let gate = Gate::default();
        let channel = channel(ReadyAtGate(gate.clone()));
        let call = push(&channel, 7).unwrap();
        let opens = thread::spawn(move || gate.open());
        channel.finish_sent();
        match response(&call) {
            Ok(response) => assert_eq!(response, 7),
            Err(error) => assert!(error.is::<Cancelled>()),
        }
        opens.join().unwrap();
        join(&channel);
    });
}

#[test]
fn every_scheduled_call_is_made_once_whether_or_not_it_has_had_to_wait_for_a_place() {
    model(2, || {
        let made = Arc::new(AtomicUsize::new(0));
        let (channel, schedule) = scheduled(Echo(made.clone()));
        let calls = [1, 2].map(|req| push_scheduled(&channel, &schedule, req).unwrap());
        assert_eq!(calls.map(|call| response(&call).unwrap()), [1, 2]);
        channel.close();
        join(&channel);
        assert_eq!(made.load(Ordering::Relaxed), 2);
        assert_empty(&schedule);
    });
}

#[test]
fn a_scheduled_call_pushed_while_the_queue_closes_is_refused_ended_or_made() {
    model(2, || {
        let made = Arc::new(AtomicUsize::new(0));
        let (channel, schedule) = scheduled(Echo(made.clone()));
        let closes = thread::spawn({
            let channel = channel.clone();
            move || channel.close()
        });
        let calls = [1, 2].map(|req| push_scheduled(&channel, &schedule, req));
        let mut responses = 0;
        for (req, call) in (1..).zip(calls) {
            match call.map(|call| response(&call)) {
                Some(Ok(response)) => {
                    assert_eq!(response, req);
                    responses += 1;
                }
                // It had no place when the queue was closed.
                Some(Err(error)) => assert!(error.is::<Closed>(), "{error}"),
                None => {}
            }
        }
        closes.join().unwrap();
        join(&channel);
        assert_eq!(made.load(Ordering::Relaxed), responses);
        assert_empty(&schedule);
    });
}

#[test]
fn a_scheduled_call_that_is_cancelled_while_it_is_chosen_has_one_outcome_and_leaves_its_place_to_the_next() {
    model(1, || {
        let made = Arc::new(AtomicUsize::new(0));
        let (channel, schedule) = scheduled(Echo(made.clone()));
        let call = push_scheduled(&channel, &schedule, 7).unwrap();
        let cancels = thread::spawn({
            let (channel, call) = (channel.clone(), call.clone());
            move || channel.end_early(&call, EarlyEnd::Cancelled)
        });
        let next = push_scheduled(&channel, &schedule, 8).unwrap();
        match response(&call) {
            Ok(response) => assert_eq!(response, 7),
            Err(error) => assert!(error.is::<Cancelled>()),
        }
        assert_eq!(response(&next).unwrap(), 8);
        cancels.join().unwrap();
        channel.close();
        join(&channel);
        assert_empty(&schedule);
    });
}

#[test]
fn scheduled_calls_go_on_when_the_service_becomes_ready() {
    model(2, || {
        let gate = Gate::default();
        let (channel, schedule) = scheduled(ReadyAtGate(gate.clone()));
        let opens = thread::spawn(move || gate.open());
        let calls = [1, 2].map(|req| push_scheduled(&channel, &schedule, req).unwrap());
        assert_eq!(calls.map(|call| response(&call).unwrap()), [1, 2]);
        opens.join().unwrap();
        channel.close();
        join(&channel);
        assert_empty(&schedule);
    });
}
