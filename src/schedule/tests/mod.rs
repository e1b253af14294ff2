//! Properties of the [`Tree`](super::tree::Tree), each shown over many random decisions, and each with a control: a run
//! that is wrong in one way, in which the check must fail.

mod bounds;
mod churn;
mod fairness;
mod order;
mod settings;
mod speed;
mod storm;
mod upcoming;

use super::{
    fair::Units,
    tree::{NewCall, NewNode, Started, Tree},
};
use crate::{
    clock::LazyNow,
    rate::{Cost, KeyLimits, Limits},
};
use std::{num::NonZeroU32, time::UNIX_EPOCH};
use tokio::time::{Duration, Instant};

const SECOND: u64 = 1_000_000_000;
/// How far back the buckets admit a call that was woken late, in nanoseconds.
const CATCH_UP: u64 = 5_000_000;

/// When a test begins. Ten years ago, so that the present is never before a time of the test: buckets would take that for
/// a clock that was set back.
fn start() -> Instant {
    Instant::now()
        .checked_sub(Duration::from_secs(10 * 365 * 86_400))
        .unwrap()
}

fn at(start: Instant, nanos: u64) -> LazyNow {
    LazyNow::at(start + Duration::from_nanos(nanos))
}

fn nanos(start: Instant, at: Instant) -> u64 {
    u64::try_from((at - start).as_nanos()).unwrap()
}

fn units(cost: u64) -> Units {
    Units::from(cost) << 20
}

fn call(cost: u64, due: u64) -> NewCall {
    NewCall {
        class: 0,
        due,
        cost: Cost::tokens(cost),
        units: units(cost),
        seq: None,
    }
}

fn weight(weight: u32) -> NonZeroU32 {
    NonZeroU32::new(weight).unwrap()
}

fn plain(of: u32) -> NewNode {
    NewNode::of_weight(weight(of))
}

fn key_limits(limits: Limits, now: &mut LazyNow) -> KeyLimits {
    KeyLimits::new(limits, UNIX_EPOCH, now.get()).unwrap()
}

fn limited(limits: Limits, now: Instant) -> NewNode {
    NewNode {
        limits: Some(Box::new(key_limits(limits, &mut LazyNow::at(now)))),
        ..plain(1)
    }
}

fn tree<K: Clone + Eq + std::hash::Hash, T>() -> Tree<K, T> {
    Tree::new([false; 3], usize::MAX)
}

/// Settles calls of a tree with what they were charged.
fn settle<K: Clone + Eq + std::hash::Hash, T>(tree: &mut Tree<K, T>, started: Started, cost: u64, now: &mut LazyNow) {
    tree.settle(started, Cost::tokens(cost), units(cost), now);
}

/// A bucket that is never forgotten and counts what was really used. It can hold what the rate adds in 5 ms above the
/// burst, which is what a call that was woken late may take.
struct TrueBucket {
    amount: i128,
    period: i128,
    capacity: i128,
    balance: i128,
    at: u64,
}

impl TrueBucket {
    fn per_second(amount: u64, burst: u64) -> Self {
        let (amount, period) = (i128::from(amount), i128::from(SECOND));
        let capacity = i128::from(burst) * period + i128::from(CATCH_UP) * amount;
        Self {
            amount,
            period,
            capacity,
            balance: capacity,
            at: 0,
        }
    }

    fn fill(&mut self, now: u64) {
        let gained = i128::from(now - self.at) * self.amount;
        (self.balance, self.at) = ((self.balance + gained).min(self.capacity), now);
    }

    /// Takes `cost`. Returns whether more was used than the burst and what the rate has added.
    fn is_over(&mut self, cost: u64, now: u64) -> bool {
        self.fill(now);
        self.balance -= i128::from(cost) * self.period;
        self.balance < 0
    }

    /// Whether a bucket that cannot hold more than the burst has `cost`.
    fn has(&mut self, cost: u64, now: u64) -> bool {
        self.fill(now);
        self.balance - i128::from(CATCH_UP) * self.amount >= i128::from(cost) * self.period
    }
}
