//! Every order in which threads can take, give back, wait for and give up units.

use super::count::{Count, Held, Turn};
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

fn take(count: &Count) -> Result<Held, Closed> {
    let mut stand = Some(count.turn());
    block_on(poll_fn(|cx| Turn::poll_take(&mut stand, cx)))
}

/// All is back, and to be had without the line.
fn assert_unused(count: &Count) {
    assert_eq!(count.held(), 0);
    assert!(
        count
            .turn()
            .poll_turn(&mut Context::from_waker(Waker::noop()))
            .is_ready()
    );
    let held = count.turn().try_take().unwrap();
    assert_eq!(count.held(), 1);
    drop(held);
    assert_eq!(count.held(), 0);
}

#[test]
fn whoever_waits_gets_what_is_given_back_and_no_more_is_held_than_there_is() {
    model(3, || {
        let count = Count::new(1);
        let at_once = Arc::new(AtomicUsize::new(0));
        let threads = [(); 2].map(|()| {
            let (count, at_once) = (count.clone(), at_once.clone());
            thread::spawn(move || {
                let held = take(&count).unwrap();
                assert_eq!(at_once.fetch_add(1, Ordering::Relaxed), 0);
                at_once.fetch_sub(1, Ordering::Relaxed);
                drop(held);
            })
        });
        drop(take(&count).unwrap());
        for thread in threads {
            thread.join().unwrap();
        }
        assert_unused(&count);
    });
}

#[test]
fn a_waiter_that_gives_up_stands_in_nobodys_way() {
    model(3, || {
        let count = Count::new(1);
        let held = take(&count).unwrap();
        let gives_up = thread::spawn({
            let count = count.clone();
            move || {
                let mut stand = Some(count.turn());
                drop(Turn::poll_take(&mut stand, &mut Context::from_waker(Waker::noop())));
                drop(stand);
            }
        });
        let waits = thread::spawn({
            let count = count.clone();
            move || drop(take(&count).unwrap())
        });
        drop(held);
        gives_up.join().unwrap();
        waits.join().unwrap();
        assert_unused(&count);
    });
}

#[test]
fn a_turn_that_is_not_used_is_passed_on_when_it_is_dropped() {
    model(3, || {
        let count = Count::new(1);
        let held = take(&count).unwrap();
        let looks = thread::spawn({
            let count = count.clone();
            move || {
                let mut turn = count.turn();
                block_on(poll_fn(|cx| turn.poll_turn(cx))).unwrap();
            }
        });
        let waits = thread::spawn({
            let count = count.clone();
            move || drop(take(&count).unwrap())
        });
        drop(held);
        looks.join().unwrap();
        waits.join().unwrap();
        assert_unused(&count);
    });
}

#[test]
fn a_higher_total_reaches_those_who_wait() {
    model(3, || {
        let count = Count::new(0);
        let threads = [(); 2].map(|()| {
            let count = count.clone();
            thread::spawn(move || drop(take(&count).unwrap()))
        });
        count.set_total(1);
        for thread in threads {
            thread.join().unwrap();
        }
        assert_unused(&count);
    });
}

#[test]
fn closing_refuses_everybody_and_loses_nothing() {
    model(3, || {
        let count = Count::new(1);
        let threads = [(); 2].map(|()| {
            let count = count.clone();
            thread::spawn(move || drop(take(&count)))
        });
        count.close();
        assert!(count.turn().try_take().is_err());
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(count.held(), 0);
        let mut turn = count.turn();
        let refused = turn.poll_turn(&mut Context::from_waker(Waker::noop()));
        assert!(matches!(refused, Poll::Ready(Err(_))));
    });
}
