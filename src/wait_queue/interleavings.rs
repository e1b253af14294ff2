//! Loom tests of the wait queue: every order in which threads can acquire, release, wait for and give up permits, with
//! up to three preemptions. The tests use a [`Semaphore`], whose fast path has to agree with the queue.

use crate::{
    error::Closed,
    semaphore::{Acquire, Permit, Semaphore},
    sync::model,
};
use loom::{
    future::block_on,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};
use std::{
    future::poll_fn,
    sync::Arc,
    task::{Context, Poll, Waker},
};

fn acquire(semaphore: &Semaphore) -> Result<Permit, Closed> {
    let mut acquire = Some(semaphore.acquire());
    block_on(poll_fn(|cx| Acquire::poll_acquire(&mut acquire, cx)))
}

/// Asserts that no permit is held, and that a permit can be taken on the semaphore's fast path and released.
fn assert_unused(semaphore: &Semaphore) {
    assert_eq!(semaphore.held(), 0);
    assert!(
        semaphore
            .acquire()
            .poll_ready(&mut Context::from_waker(Waker::noop()))
            .is_ready()
    );
    let permit = semaphore.acquire().try_acquire().unwrap();
    assert_eq!(semaphore.held(), 1);
    drop(permit);
    assert_eq!(semaphore.held(), 0);
}

#[test]
fn a_waiter_gets_a_released_permit_and_no_more_permits_are_held_than_there_are() {
    model(3, || {
        let semaphore = Semaphore::new(1);
        let in_use = Arc::new(AtomicUsize::new(0));
        let threads = [(); 2].map(|()| {
            let (semaphore, in_use) = (semaphore.clone(), in_use.clone());
            thread::spawn(move || {
                let permit = acquire(&semaphore).unwrap();
                assert_eq!(in_use.fetch_add(1, Ordering::Relaxed), 0);
                in_use.fetch_sub(1, Ordering::Relaxed);
                drop(permit);
            })
        });
        drop(acquire(&semaphore).unwrap());
        for thread in threads {
            thread.join().unwrap();
        }
        assert_unused(&semaphore);
    });
}

#[test]
fn a_waiter_that_gives_up_does_not_block_the_next_one() {
    model(3, || {
        let semaphore = Semaphore::new(1);
        let permit = acquire(&semaphore).unwrap();
        let gives_up = thread::spawn({
            let semaphore = semaphore.clone();
            move || {
                let mut acquire = Some(semaphore.acquire());
                drop(Acquire::poll_acquire(
                    &mut acquire,
                    &mut Context::from_waker(Waker::noop()),
                ));
                drop(acquire);
            }
        });
        let waits = thread::spawn({
            let semaphore = semaphore.clone();
            move || drop(acquire(&semaphore).unwrap())
        });
        drop(permit);
        gives_up.join().unwrap();
        waits.join().unwrap();
        assert_unused(&semaphore);
    });
}

#[test]
fn an_acquirer_that_is_dropped_after_it_was_notified_passes_the_permit_on() {
    model(3, || {
        let semaphore = Semaphore::new(1);
        let permit = acquire(&semaphore).unwrap();
        let is_dropped = thread::spawn({
            let semaphore = semaphore.clone();
            move || {
                let mut acquire = semaphore.acquire();
                block_on(poll_fn(|cx| acquire.poll_ready(cx))).unwrap();
            }
        });
        let waits = thread::spawn({
            let semaphore = semaphore.clone();
            move || drop(acquire(&semaphore).unwrap())
        });
        drop(permit);
        is_dropped.join().unwrap();
        waits.join().unwrap();
        assert_unused(&semaphore);
    });
}

#[test]
fn a_raised_total_admits_the_waiters() {
    model(3, || {
        let semaphore = Semaphore::new(0);
        let threads = [(); 2].map(|()| {
            let semaphore = semaphore.clone();
            thread::spawn(move || drop(acquire(&semaphore).unwrap()))
        });
        semaphore.set_total(1);
        for thread in threads {
            thread.join().unwrap();
        }
        assert_unused(&semaphore);
    });
}

#[test]
fn closing_rejects_every_acquirer_and_releases_every_permit() {
    model(3, || {
        let semaphore = Semaphore::new(1);
        let threads = [(); 2].map(|()| {
            let semaphore = semaphore.clone();
            thread::spawn(move || drop(acquire(&semaphore)))
        });
        semaphore.close();
        assert!(semaphore.acquire().try_acquire().is_err());
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(semaphore.held(), 0);
        let mut acquire = semaphore.acquire();
        let rejected = acquire.poll_ready(&mut Context::from_waker(Waker::noop()));
        assert!(matches!(rejected, Poll::Ready(Err(_))));
    });
}
