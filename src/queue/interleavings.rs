//! Loom tests of the queue: every order in which threads can push, cancel and run calls and close the queue, with up to
//! two preemptions.

use super::{call_set::CallSet, channel::Channel, message::Message, service_lock::ServiceLock, worker::Worker};
use crate::{
    error::{BoxError, Cancelled},
    event::Scope,
    semaphore::Semaphore,
    sync::model,
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

fn channel() -> Arc<Channel<u32, u32>> {
    Channel::new(Semaphore::new(4))
}

/// Pushes a call with the request `req`. Returns the call, or `None` if the queue was closed.
fn push(channel: &Arc<Channel<u32, u32>>, req: u32) -> Option<Call> {
    let place = channel.places().acquire().try_acquire().ok()??;
    channel.push(&mut Some(req), Scope::capture(), place).ok()
}

fn response(call: &Call) -> Result<u32, BoxError> {
    block_on(poll_fn(|cx| call.poll_response(cx)))
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

/// Runs a worker on a new thread until the channel is closed and empty.
fn work(
    service_lock: &ServiceLock<Echo>,
    is_only_worker: bool,
    channel: &Arc<Channel<u32, u32>>,
) -> thread::JoinHandle<()> {
    let mut worker = Worker::new(service_lock, is_only_worker, channel);
    thread::spawn(move || block_on(poll_fn(move |cx| worker.poll(cx))))
}

#[test]
fn every_accepted_call_is_made_once_by_either_worker() {
    model(2, || {
        let (channel, made) = (channel(), Arc::new(AtomicUsize::new(0)));
        let service_lock = ServiceLock::new(Echo(made.clone()));
        let workers = [(); 2].map(|()| work(&service_lock, false, &channel));
        let calls = [1, 2].map(|req| push(&channel, req).unwrap());
        channel.close();
        assert_eq!(calls.map(|call| response(&call).unwrap()), [1, 2]);
        for worker in workers {
            worker.join().unwrap();
        }
        assert_eq!(made.load(Ordering::Relaxed), 2);
        assert!(channel.is_ended());
        assert_eq!((channel.in_flight(), channel.places().held()), (0, 0));
    });
}

#[test]
fn a_call_pushed_while_the_queue_closes_is_refused_or_made() {
    model(2, || {
        let (channel, made) = (channel(), Arc::new(AtomicUsize::new(0)));
        let worker = work(&ServiceLock::new(Echo(made.clone())), true, &channel);
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
        worker.join().unwrap();
        assert_eq!(made.load(Ordering::Relaxed), accepted);
        assert_eq!((channel.in_flight(), channel.places().held()), (0, 0));
    });
}

#[test]
fn a_call_pushed_while_the_last_worker_is_dropped_is_refused_or_cancelled() {
    model(2, || {
        let (channel, made) = (channel(), Arc::new(AtomicUsize::new(0)));
        let worker = Worker::new(&ServiceLock::new(Echo(made.clone())), true, &channel);
        let drops = thread::spawn(move || drop(worker));
        if let Some(call) = push(&channel, 7) {
            assert!(response(&call).unwrap_err().is::<Cancelled>());
        }
        drops.join().unwrap();
        assert_eq!(made.load(Ordering::Relaxed), 0);
        assert_eq!(channel.places().held(), 0);
    });
}

#[test]
fn a_call_that_is_cancelled_while_it_is_made_has_one_outcome_and_frees_its_place() {
    model(2, || {
        let (channel, made) = (channel(), Arc::new(AtomicUsize::new(0)));
        let worker = work(&ServiceLock::new(Echo(made.clone())), true, &channel);
        let call = push(&channel, 7).unwrap();
        let cancels = thread::spawn({
            let (channel, call) = (channel.clone(), call.clone());
            move || channel.cancel(&call)
        });
        match response(&call) {
            Ok(response) => assert_eq!((response, made.load(Ordering::Relaxed)), (7, 1)),
            Err(error) => assert!(error.is::<Cancelled>()),
        }
        cancels.join().unwrap();
        channel.close();
        worker.join().unwrap();
        assert_eq!((channel.in_flight(), channel.places().held()), (0, 0));
    });
}

/// A future that is ready when both flags are set, and that stores its waker for the test.
#[derive(Default)]
struct Both {
    flags: Option<Arc<[AtomicUsize; 2]>>,
    waker: Option<Arc<std::sync::Mutex<Option<Waker>>>>,
}

impl Future for Both {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if let Some(waker) = &self.waker {
            waker.lock().unwrap().get_or_insert_with(|| cx.waker().clone());
        }
        match &self.flags {
            // The ordering is relaxed on purpose: the slot's waker itself has to make a flag visible to the poll that
            // it causes.
            Some(flags) if flags.iter().any(|flag| flag.load(Ordering::Relaxed) == 0) => Poll::Pending,
            _ => Poll::Ready(()),
        }
    }
}

#[test]
fn no_wake_up_is_lost_while_its_slot_is_polled() {
    model(2, || {
        let flags = Arc::new([AtomicUsize::new(0), AtomicUsize::new(0)]);
        let waker = Arc::new(std::sync::Mutex::new(None));
        let mut call_set = CallSet::<Both>::new();
        let slot = call_set.insert(|mut call| {
            call.flags = Some(flags.clone());
            call.waker = Some(waker.clone());
            Poll::Pending
        });
        call_set.poll_slot(slot.unwrap());
        let waker: Waker = waker.lock().unwrap().take().unwrap();
        let threads = [0, 1].map(|thread| {
            let (flags, waker) = (flags.clone(), waker.clone());
            thread::spawn(move || {
                flags[thread].store(1, Ordering::Relaxed);
                waker.wake_by_ref();
            })
        });
        block_on(poll_fn(|cx| {
            call_set.poll(cx);
            if call_set.is_empty() {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        }));
        for thread in threads {
            thread.join().unwrap();
        }
    });
}
