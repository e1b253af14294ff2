//! Every order in which callers, workers and those who stop a queue can meet.

use super::{backlog::Backlog, baton::Baton, running::Running, slot::Slot, worker::Worker};
use crate::{
    error::{BoxError, Cancelled},
    event::Scope,
    line::count::Count,
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

type Call = Arc<Slot<u32, u32>>;

fn backlog() -> Arc<Backlog<u32, u32>> {
    Backlog::new(Count::new(4))
}

/// Accepted, if the queue is still open.
fn push(backlog: &Arc<Backlog<u32, u32>>, req: u32) -> Option<Call> {
    let place = backlog.places().turn().try_take().ok()??;
    backlog.push(&mut Some(req), Scope::capture(), place).ok()
}

fn response(call: &Call) -> Result<u32, BoxError> {
    block_on(poll_fn(|cx| call.poll_response(cx)))
}

/// Answers with what it is asked, and counts.
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

/// A worker on a thread of its own, until the backlog is closed and empty.
fn work(baton: &Baton<Echo>, is_alone: bool, backlog: &Arc<Backlog<u32, u32>>) -> thread::JoinHandle<()> {
    let mut worker = Worker::new(baton, is_alone, backlog);
    thread::spawn(move || block_on(poll_fn(move |cx| worker.poll(cx))))
}

#[test]
fn every_accepted_call_is_made_once_whichever_worker_has_the_service() {
    model(2, || {
        let (backlog, made) = (backlog(), Arc::new(AtomicUsize::new(0)));
        let baton = Baton::new(Echo(made.clone()));
        let workers = [(); 2].map(|()| work(&baton, false, &backlog));
        let calls = [1, 2].map(|req| push(&backlog, req).unwrap());
        backlog.close();
        assert_eq!(calls.map(|call| response(&call).unwrap()), [1, 2]);
        for worker in workers {
            worker.join().unwrap();
        }
        assert_eq!(made.load(Ordering::Relaxed), 2);
        assert!(backlog.is_ended());
        assert_eq!((backlog.in_flight(), backlog.places().held()), (0, 0));
    });
}

#[test]
fn a_call_pushed_while_the_queue_closes_is_refused_or_made() {
    model(2, || {
        let (backlog, made) = (backlog(), Arc::new(AtomicUsize::new(0)));
        let worker = work(&Baton::new(Echo(made.clone())), true, &backlog);
        let closes = thread::spawn({
            let backlog = backlog.clone();
            move || backlog.close()
        });
        let call = push(&backlog, 7);
        let accepted = usize::from(call.is_some());
        if let Some(call) = call {
            assert_eq!(response(&call).unwrap(), 7);
        }
        closes.join().unwrap();
        worker.join().unwrap();
        assert_eq!(made.load(Ordering::Relaxed), accepted);
        assert_eq!((backlog.in_flight(), backlog.places().held()), (0, 0));
    });
}

#[test]
fn a_call_pushed_while_the_last_worker_dies_is_refused_or_cancelled() {
    model(2, || {
        let (backlog, made) = (backlog(), Arc::new(AtomicUsize::new(0)));
        let worker = Worker::new(&Baton::new(Echo(made.clone())), true, &backlog);
        let dies = thread::spawn(move || drop(worker));
        if let Some(call) = push(&backlog, 7) {
            assert!(response(&call).unwrap_err().is::<Cancelled>());
        }
        dies.join().unwrap();
        assert_eq!(made.load(Ordering::Relaxed), 0);
        assert_eq!(backlog.places().held(), 0);
    });
}

#[test]
fn a_call_that_is_cancelled_while_it_is_made_has_one_outcome_and_gives_its_place_back() {
    model(2, || {
        let (backlog, made) = (backlog(), Arc::new(AtomicUsize::new(0)));
        let worker = work(&Baton::new(Echo(made.clone())), true, &backlog);
        let call = push(&backlog, 7).unwrap();
        let cancels = thread::spawn({
            let (backlog, call) = (backlog.clone(), call.clone());
            move || backlog.cancel(&call)
        });
        match response(&call) {
            Ok(response) => assert_eq!((response, made.load(Ordering::Relaxed)), (7, 1)),
            Err(error) => assert!(error.is::<Cancelled>()),
        }
        cancels.join().unwrap();
        backlog.close();
        worker.join().unwrap();
        assert_eq!((backlog.in_flight(), backlog.places().held()), (0, 0));
    });
}

/// Ready when all that it listens to has been said.
#[derive(Default)]
struct Listener {
    said: Option<Arc<[AtomicUsize; 2]>>,
    waker: Option<Arc<std::sync::Mutex<Option<Waker>>>>,
}

impl Future for Listener {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if let Some(waker) = &self.waker {
            waker.lock().unwrap().get_or_insert_with(|| cx.waker().clone());
        }
        match &self.said {
            // Relaxed: the bell alone has to see to it that what was said before it rang is heard.
            Some(said) if said.iter().any(|said| said.load(Ordering::Relaxed) == 0) => Poll::Pending,
            _ => Poll::Ready(()),
        }
    }
}

#[test]
fn no_bell_is_lost_while_its_seat_is_served() {
    model(2, || {
        let said = Arc::new([AtomicUsize::new(0), AtomicUsize::new(0)]);
        let waker = Arc::new(std::sync::Mutex::new(None));
        let mut running = Running::<Listener>::new();
        let seat = running.seat(|mut call| {
            call.said = Some(said.clone());
            call.waker = Some(waker.clone());
            Poll::Pending
        });
        running.serve(seat.unwrap());
        let waker: Waker = waker.lock().unwrap().take().unwrap();
        let ringers = [0, 1].map(|ringer| {
            let (said, waker) = (said.clone(), waker.clone());
            thread::spawn(move || {
                said[ringer].store(1, Ordering::Relaxed);
                waker.wake_by_ref();
            })
        });
        block_on(poll_fn(|cx| {
            running.poll(cx);
            if running.is_empty() {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        }));
        for ringer in ringers {
            ringer.join().unwrap();
        }
    });
}
