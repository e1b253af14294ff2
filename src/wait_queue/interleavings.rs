//! Every order in which threads can take, give back, wait for and give up units.

use super::semaphore::{Acquire, Permit, Semaphore};
use crate::{error::Closed, sync::model};
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

fn take(semaphore: &Semaphore) -> Result<Permit, Closed> {
    let mut acquire = Some(semaphore.acquire());
    block_on(poll_fn(|cx| Acquire::poll_acquire(&mut acquire, cx)))
}

/// All is back, and to be had without the line.
fn assert_unused(semaphore: &Semaphore) {
    assert_eq!(semaphore.held(), 0);
    assert!(
        semaphore
            .acquire()
            .poll_ready(&mut Context::from_waker(Waker::noop()))
            .is_ready()
    );
    let held = semaphore.acquire().try_acquire().unwrap();
    assert_eq!(semaphore.held(), 1);
    drop(held);
    assert_eq!(semaphore.held(), 0);
}

#[test]
fn whoever_waits_gets_what_is_given_back_and_no_more_is_held_than_there_is() {
    model(3, || {
        let semaphore = Semaphore::new(1);
        let at_once = Arc::new(AtomicUsize::new(0));
        let threads = [(); 2].map(|()| {
            let (semaphore, at_once) = (semaphore.clone(), at_once.clone());
            thread::spawn(move || {
                let held = take(&semaphore).unwrap();
                assert_eq!(at_once.fetch_add(1, Ordering::Relaxed), 0);
                at_once.fetch_sub(1, Ordering::Relaxed);
                drop(held);
            })
        });
        drop(take(&semaphore).unwrap());
        for thread in threads {
            thread.join().unwrap();
        }
        assert_unused(&semaphore);
    });
}

#[test]
fn a_waiter_that_gives_up_stands_in_nobodys_way() {
    model(3, || {
        let semaphore = Semaphore::new(1);
        let held = take(&semaphore).unwrap();
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
            move || drop(take(&semaphore).unwrap())
        });
        drop(held);
        gives_up.join().unwrap();
        waits.join().unwrap();
        assert_unused(&semaphore);
    });
}

#[test]
fn a_turn_that_is_not_used_is_passed_on_when_it_is_dropped() {
    model(3, || {
        let semaphore = Semaphore::new(1);
        let held = take(&semaphore).unwrap();
        let looks = thread::spawn({
            let semaphore = semaphore.clone();
            move || {
                let mut acquire = semaphore.acquire();
                block_on(poll_fn(|cx| acquire.poll_ready(cx))).unwrap();
            }
        });
        let waits = thread::spawn({
            let semaphore = semaphore.clone();
            move || drop(take(&semaphore).unwrap())
        });
        drop(held);
        looks.join().unwrap();
        waits.join().unwrap();
        assert_unused(&semaphore);
    });
}

#[test]
fn a_higher_total_reaches_those_who_wait() {
    model(3, || {
        let semaphore = Semaphore::new(0);
        let threads = [(); 2].map(|()| {
            let semaphore = semaphore.clone();
            thread::spawn(move || drop(take(&semaphore).unwrap()))
        });
        semaphore.set_total(1);
        for thread in threads {
            thread.join().unwrap();
        }
        assert_unused(&semaphore);
    });
}

#[test]
fn closing_refuses_everybody_and_loses_nothing() {
    model(3, || {
        let semaphore = Semaphore::new(1);
        let threads = [(); 2].map(|()| {
            let semaphore = semaphore.clone();
            thread::spawn(move || drop(take(&semaphore)))
        });
        semaphore.close();
        assert!(semaphore.acquire().try_acquire().is_err());
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(semaphore.held(), 0);
        let mut acquire = semaphore.acquire();
        let refused = acquire.poll_ready(&mut Context::from_waker(Waker::noop()));
        assert!(matches!(refused, Poll::Ready(Err(_))));
    });
}
