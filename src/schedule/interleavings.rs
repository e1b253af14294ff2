//! Loom tests of what the threads of a schedule share: every order in which calls and further attempts can come, be chosen,
//! be cancelled and end, with up to two or three preemptions. Time does not pass, and no bucket refills: what is missing at
//! the end was not given back.

use super::{CallKey, Chosen, Dispatcher, Eligible, Flow, Schedule, Scheduled, ScheduledCall, Shared, Ticket};
use crate::{
    concurrency::Concurrency,
    error::AcquireError,
    rate::{Cost, Limits, Rate, RateLimiter, swap_granted_charge},
    semaphore::{Acquire, Semaphore, granted::AskAgain},
    sync::{Mutex, model},
};
use loom::{
    future::block_on,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};
use std::{
    future::poll_fn,
    sync::{Arc, PoisonError},
    task::{Context, Poll, Waker},
    time::Duration,
};
use tokio::runtime;

/// How many requests the limiter has at the start. It could hold more, so that what is given back twice shows.
const REQUESTS: u64 = 9;

/// Repeats the test for every order of its threads, with so many preemptions. It runs in a Tokio runtime whose clock
/// stands still, because a waiter that waits for a permit has a timer.
fn check(preemptions: usize, test: impl Fn() + Send + Sync + 'static) {
    let runtime = runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    let _entered = runtime.enter();
    model(preemptions, test);
}

/// The queue of the schedule: its dispatcher is woken when another call may go.
#[derive(Default)]
struct Queue {
    waker: Mutex<Option<Waker>>,
    is_over: AtomicUsize,
}

impl Queue {
    fn wake(&self) {
        let waker = self.waker.lock().unwrap_or_else(PoisonError::into_inner).take();
        waker.into_iter().for_each(Waker::wake);
    }
}

impl Scheduled for Queue {
    fn changed(self: Arc<Self>) {
        self.wake();
    }

    fn refuse(self: Arc<Self>, _: CallKey, error: AcquireError) {
        panic!("{error}");
    }
}

/// A schedule with a permit and a limiter.
struct Setting {
    shared: Arc<Shared>,
    call: Arc<ScheduledCall>,
    permits: Semaphore,
    limiter: RateLimiter,
    queue: Arc<Queue>,
    dispatcher: Dispatcher,
}

fn setting() -> Setting {
    let once = Rate::new(1_u64, Duration::from_secs(100 * 365 * 86_400));
    let limiter = RateLimiter::new(Limits::new().requests(once.burst(100_u64).initial(REQUESTS))).unwrap();
    let concurrency = Concurrency::new(1).unwrap();
    let schedule = Schedule::new()
        .concurrency(concurrency.clone())
        .limiter(limiter.clone());
    let queue = Arc::new(Queue::default());
    let weak = Arc::downgrade(&queue);
    assert!(schedule.set_queue(weak));
    Setting {
        shared: schedule.shared().clone(),
        call: schedule.call(&Flow::default(), Cost::request()),
        permits: concurrency.permits().clone(),
        limiter,
        queue,
        dispatcher: schedule.dispatcher(),
    }
}

impl Setting {
    /// Chooses calls, and gives back what each is granted, until none waits any more and the queue is over. Returns how many
    /// calls were chosen.
    fn dispatch(mut dispatcher: Dispatcher, queue: &Queue, shared: &Shared) -> usize {
        let mut chosen = 0;
        block_on(poll_fn(|cx| {
            *queue.waker.lock().unwrap() = Some(cx.waker().clone());
            loop {
                // Read first: a call may come after it was found that none waits.
                let is_over = queue.is_over.load(Ordering::Acquire) > 0;
                match dispatcher.poll_choose(Eligible::All, cx) {
                    Poll::Ready(Chosen::Call(_, call)) => {
                        chosen += 1;
                        call.give_back(shared);
                    }
                    Poll::Ready(Chosen::Refused(_, error)) => panic!("{error}"),
                    Poll::Ready(Chosen::Nothing) if is_over => return Poll::Ready(()),
                    Poll::Ready(Chosen::Nothing) | Poll::Pending => return Poll::Pending,
                }
            }
        }));
        chosen
    }

    /// Ends the dispatcher when no call waits.
    fn end_dispatch(queue: &Queue) {
        queue.is_over.store(1, Ordering::Release);
        queue.wake();
    }

    /// Checks that nothing waits, is open, is held or is charged.
    fn assert_nothing_is_left(shared: &Shared, permits: &Semaphore, limiter: &RateLimiter) {
        assert_eq!((shared.waiting(), permits.held()), (0, 0));
        let (waiting, flows) = shared.inspect(|core, now| (core.waiting(), core.view(9, now)));
        assert_eq!(waiting, 0);
        assert!(
            flows.iter().all(|flow| (flow.waiting, flow.open) == (0, 0)),
            "{flows:?}"
        );
        assert_eq!(limiter.available().of("requests"), Some(REQUESTS));
    }
}

#[test]
fn an_attempt_that_is_given_up_while_it_is_granted_gives_everything_back_once() {
    check(3, || {
        let Setting {
            shared,
            call,
            permits,
            limiter,
            queue,
            dispatcher,
        } = setting();
        let dispatches = thread::spawn({
            let (queue, shared) = (queue.clone(), shared.clone());
            move || Setting::dispatch(dispatcher, &queue, &shared)
        });
        let mut attempt = call.ask_again();
        let mut cx = Context::from_waker(Waker::noop());
        // It has entered the schedule, and may have been granted what it waits for.
        let polled = attempt.poll_permit(&mut cx);
        let mut charge = None;
        swap_granted_charge(&mut charge);
        drop(polled);
        drop(attempt);
        drop(charge);
        Setting::end_dispatch(&queue);
        assert_eq!(dispatches.join().unwrap(), 0);
        Setting::assert_nothing_is_left(&shared, &permits, &limiter);
    });
}

#[test]
fn an_attempt_that_loses_its_permit_before_it_is_polled_waits_again_and_is_charged_once() {
    check(2, || {
        let Setting {
            shared,
            call,
            permits,
            limiter,
            queue,
            dispatcher,
        } = setting();
        let in_use = Arc::new(AtomicUsize::new(0));
        let dispatches = thread::spawn({
            let (queue, shared) = (queue.clone(), shared.clone());
            move || Setting::dispatch(dispatcher, &queue, &shared)
        });
        let attempts = thread::spawn({
            let (in_use, queue) = (in_use.clone(), queue.clone());
            move || {
                let mut attempt = call.ask_again();
                let granted = block_on(poll_fn(|cx| attempt.poll_permit(cx)));
                let mut charge = None;
                swap_granted_charge(&mut charge);
                let (permit, _) = granted.unwrap();
                assert_eq!(in_use.fetch_add(1, Ordering::Relaxed), 0);
                in_use.fetch_sub(1, Ordering::Relaxed);
                drop(permit);
                // What no rate limit has taken is settled as not used.
                assert!(charge.is_some(), "an attempt is charged before it goes");
                drop(charge);
                Setting::end_dispatch(&queue);
            }
        });
        permits.revoke_claims();
        if let Ok(Some(permit)) = Acquire::try_acquire(&mut permits.acquire()) {
            assert_eq!(in_use.fetch_add(1, Ordering::Relaxed), 0);
            in_use.fetch_sub(1, Ordering::Relaxed);
            drop(permit);
        }
        attempts.join().unwrap();
        assert_eq!(dispatches.join().unwrap(), 0);
        Setting::assert_nothing_is_left(&shared, &permits, &limiter);
    });
}

#[test]
fn a_call_that_is_cancelled_while_it_is_chosen_is_either_and_the_count_of_those_that_wait_is_right() {
    check(2, || {
        let Setting {
            shared,
            call,
            permits,
            limiter,
            queue,
            dispatcher,
        } = setting();
        let dispatches = thread::spawn({
            let (queue, shared) = (queue.clone(), shared.clone());
            move || Setting::dispatch(dispatcher, &queue, &shared)
        });
        let key = |index| CallKey {
            index,
            order: index.into(),
        };
        let push = |index| loop {
            let specs = shared.specs(call.path());
            let (pushed, effects) = shared.try_push(&call, None, Ticket::Call(key(index)), &specs);
            shared.carry_out(effects);
            // Without a result, the key of the call was forgotten just now.
            if let Some(pushed) = pushed {
                break pushed.ok().expect("the schedule has room").id;
            }
        };
        let cancelled = push(1);
        let cancels = thread::spawn({
            let shared = shared.clone();
            move || shared.cancel(cancelled, &Ticket::Call(key(1)))
        });
        push(2);
        cancels.join().unwrap();
        Setting::end_dispatch(&queue);
        let chosen = dispatches.join().unwrap();
        assert!((1..=2).contains(&chosen), "{chosen}");
        Setting::assert_nothing_is_left(&shared, &permits, &limiter);
    });
}
