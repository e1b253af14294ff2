//! Waiters of a rate limiter.

use crate::{
    FEW_ROUNDS, Scale,
    common::median,
    measure::{ThreadTime, current_thread},
    table::Table,
};
use allocation_counter::measure;
use std::{
    iter,
    task::{Context, Waker},
};
use tower_outbound::{Cost, Limits, Rate, RateLimiter};

pub(crate) fn slow_rate() -> Rate {
    Rate::per_hour(1).burst(1)
}

/// Measures waiters in the wait queue of a rate limiter. Their bytes are those of the wait queue, without the futures,
/// which the callers allocate.
pub(crate) fn wait_queue(scale: &Scale, table: &mut Table) {
    let runtime = current_thread();
    for n in scale.sizes {
        let round = || runtime.block_on(async { join_and_leave(n) });
        let rounds: Vec<_> = iter::repeat_with(round).take(FEW_ROUNDS + 1).skip(1).collect();
        for (figure, column) in ["bytes", "join-ns", "leave-ns"].into_iter().enumerate() {
            table.add(column, n, median(rounds.iter().map(|round| round[figure] / n as f64)));
        }
    }
}

/// Lets `n` waiters join the wait queue of a rate limiter and leave it. Returns for all of them together the bytes, the
/// nanoseconds to join, and the nanoseconds to leave.
fn join_and_leave(n: usize) -> [f64; 3] {
    let limiter = RateLimiter::new(Limits::new().requests(slow_rate())).expect("the rate is valid");
    limiter
        .try_acquire(Cost::request())
        .expect("the bucket holds the cost of the first call");
    let wait = || Box::pin(limiter.acquire(Cost::request()));
    let mut waiters: Vec<_> = iter::repeat_with(wait).take(n).collect();

    let begun = ThreadTime::now();
    let counted = measure(|| {
        let mut cx = Context::from_waker(Waker::noop());
        for waiter in &mut waiters {
            assert!(waiter.as_mut().poll(&mut cx).is_pending());
        }
    });
    let joined = begun.elapsed();
    let begun = ThreadTime::now();
    drop(waiters);
    let left = begun.elapsed();
    [
        counted.bytes_current as f64,
        joined.as_nanos() as f64,
        left.as_nanos() as f64,
    ]
}
