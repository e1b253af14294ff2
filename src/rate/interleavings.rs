//! Loom tests of the local limiter with four budgets, one of which refuses calls: every order in which threads can
//! charge, wait, give up, settle and replace the limits, with up to two or three preemptions. Time does not pass, and no
//! bucket refills: what is missing at the end was charged.

use super::{
    budget::Budget,
    cost::Cost,
    estimate::Estimate,
    limits::{Limits, Rate},
    local::LocalLimiter,
};
use crate::{clock, error::Rejected, sync::model};
use loom::{future::block_on, thread};
use std::{
    future::poll_fn,
    task::{Context, Waker},
    time::{Duration, SystemTime},
};
use tokio::runtime;

const BUDGETS: [&str; 4] = ["requests", "input_tokens", "output_tokens", "cents"];

/// Repeats the test for every order of its threads, with so many preemptions. It runs in a Tokio runtime whose clock
/// stands still, because a waiter that waits for a refill has a timer.
fn check(preemptions: usize, test: impl Fn() + Send + Sync + 'static) {
    let runtime = runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    let _entered = runtime.enter();
    model(preemptions, test);
}

/// A rate of each budget, of which so much is available.
fn limits(available: [u64; 4]) -> Limits {
    let rates = BUDGETS.iter().zip(available);
    rates.fold(Limits::new(), |limits, (budget, available)| {
        let rate = match *budget {
            "cents" => Rate::utc_day(100_u64).refuse(),
            _ => Rate::new(1_u64, Duration::from_secs(100 * 365 * 86_400)).burst(100_u64),
        };
        limits.budget(*budget, rate.initial(available))
    })
}

fn limiter(available: [u64; 4]) -> LocalLimiter {
    LocalLimiter::new(limits(available), SystemTime::UNIX_EPOCH).unwrap()
}

fn cost(amounts: [u64; 4]) -> Cost {
    let costs = BUDGETS.iter().zip(amounts);
    costs.fold(Cost::none(), |cost, (budget, amount)| cost.with(*budget, amount))
}

fn available(limiter: &LocalLimiter) -> [Option<u64>; 4] {
    let available = limiter.available();
    BUDGETS.map(|budget| available.of(budget))
}

fn try_charge(limiter: &LocalLimiter, amounts: [u64; 4]) -> bool {
    let mut admission = limiter.admission(cost(amounts), false);
    admission.try_charge(clock::now()).unwrap()
}

fn charge_estimate(limiter: &LocalLimiter, amounts: [u64; 4]) -> Estimate {
    let mut admission = limiter.admission(cost(amounts), true);
    assert!(admission.try_charge(clock::now()).unwrap());
    let (cost, charge) = admission.charge().unwrap();
    Estimate::local(cost, charge)
}

fn acquire(limiter: &LocalLimiter, amounts: [u64; 4]) -> Result<(), Rejected> {
    let mut admission = limiter.admission(cost(amounts), false);
    block_on(poll_fn(|cx| admission.poll_acquire(cx)))
}

#[test]
fn calls_at_the_same_time_are_charged_in_all_budgets_or_in_none() {
    check(3, || {
        let limiter = limiter([9, 9, 3, 9]);
        let threads = [(); 2].map(|()| {
            let limiter = limiter.clone();
            thread::spawn(move || try_charge(&limiter, [1, 2, 2, 3]))
        });
        let mut admitted = usize::from(try_charge(&limiter, [1, 2, 2, 3]));
        for thread in threads {
            admitted += usize::from(thread.join().unwrap());
        }
        assert_eq!(admitted, 1);
        assert_eq!(available(&limiter), [8, 7, 1, 6].map(Some));
    });
}

#[test]
fn a_settlement_admits_the_waiters_and_corrects_every_budget() {
    check(3, || {
        let limiter = limiter([9, 9, 5, 9]);
        let estimate = charge_estimate(&limiter, [1, 3, 5, 2]);
        let threads = [(); 2].map(|()| {
            let limiter = limiter.clone();
            thread::spawn(move || acquire(&limiter, [1, 1, 2, 1]).unwrap())
        });
        estimate.settle(cost([1, 4, 1, 1]));
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(available(&limiter), [6, 3, 0, 6].map(Some));
    });
}

#[test]
fn estimates_that_are_settled_at_the_same_time_lose_no_correction() {
    check(3, || {
        let limiter = limiter([9; 4]);
        let threads = [[1, 5, 1, 1], [1, 0, 3, 4]].map(|used| {
            let limiter = limiter.clone();
            thread::spawn(move || charge_estimate(&limiter, [1, 2, 2, 2]).settle(cost(used)))
        });
        drop(charge_estimate(&limiter, [1, 2, 2, 2]));
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(available(&limiter), [6, 2, 3, 2].map(Some));
    });
}

#[test]
fn a_waiter_that_a_cap_refuses_takes_nothing_and_the_next_one_is_admitted() {
    check(3, || {
        let limiter = limiter([9, 9, 5, 1]);
        let estimate = charge_estimate(&limiter, [0, 0, 5, 0]);
        let is_refused = thread::spawn({
            let limiter = limiter.clone();
            move || acquire(&limiter, [1, 1, 1, 1])
        });
        let waits = thread::spawn({
            let limiter = limiter.clone();
            move || acquire(&limiter, [1, 1, 1, 0])
        });
        // The settlement gives the tokens back that both wait for, and uses the last cent.
        estimate.settle(cost([0, 0, 0, 1]));
        let Err(Rejected::Exhausted(refused)) = is_refused.join().unwrap() else {
            panic!("the cap is used up")
        };
        assert_eq!(refused.budget(), "cents");
        waits.join().unwrap().unwrap();
        assert_eq!(available(&limiter), [8, 8, 4, 0].map(Some));
    });
}

#[test]
fn a_waiter_that_gives_up_takes_nothing_from_any_budget() {
    check(3, || {
        let limiter = limiter([9, 9, 5, 9]);
        let estimate = charge_estimate(&limiter, [0, 0, 5, 0]);
        let gives_up = thread::spawn({
            let limiter = limiter.clone();
            move || {
                let mut admission = limiter.admission(cost([1, 2, 2, 2]), false);
                let polled = admission.poll_acquire(&mut Context::from_waker(Waker::noop()));
                u64::from(polled.is_ready())
            }
        });
        let waits = thread::spawn({
            let limiter = limiter.clone();
            move || acquire(&limiter, [1, 1, 1, 1]).unwrap()
        });
        estimate.settle(Cost::none());
        let admitted = gives_up.join().unwrap();
        waits.join().unwrap();
        let left = [8, 8, 4, 8].map(Some);
        let left_by_both = [7, 6, 2, 6].map(Some);
        assert_eq!(available(&limiter), if admitted == 1 { left_by_both } else { left });
    });
}

#[test]
fn limits_without_the_budget_that_calls_wait_for_admit_them_and_keep_what_the_others_hold() {
    check(2, || {
        let limiter = limiter([9, 9, 0, 9]);
        let estimate = charge_estimate(&limiter, [1, 5, 0, 5]);
        let threads = [(); 2].map(|()| {
            let limiter = limiter.clone();
            thread::spawn(move || acquire(&limiter, [1, 1, 2, 1]).unwrap())
        });
        let settles = thread::spawn(move || estimate.settle(cost([1, 2, 0, 3])));
        let all = limits([0; 4]);
        let others = all.rates().filter(|(budget, _)| *budget != Budget::OutputTokens);
        let others = others.fold(Limits::new(), |limits, (budget, rate)| limits.budget(budget, rate));
        limiter.set_limits(others).unwrap();
        for thread in threads {
            thread.join().unwrap();
        }
        settles.join().unwrap();
        assert_eq!(available(&limiter), [Some(6), Some(5), None, Some(4)]);
    });
}
