//! [`Batch`]: what a schedule waits for at a limiter that several processes share.
//!
//! A call is charged there by a round trip to the store. If the schedule asked for one call at a time, one call would go in
//! each round trip. So it asks for the calls that would go next as far as it is known here, several at a time, but for no more
//! than the limits bring in two round trips: a call that comes then would wait behind them. What is charged is not bound to a
//! call: it is for the first that costs no more when the charge is there.

use crate::{
    error::AcquireError,
    rate::{Admission, Cost, Demand, Estimate, RateLimiter},
};
use std::{
    task::{Context, Poll},
    time::Duration,
};
use tokio::time::Instant;

/// The charges that are waited for, in the order in which they were asked for. Dropping them gives back what is reserved.
pub(super) struct Batch {
    limiter: RateLimiter,
    waiting: Vec<(Cost, Admission)>,
    demand: Demand,
}

/// The most charges that are waited for at once. At a distance of 20 ms from the store, that is enough for more than 1,000
/// calls a second.
pub(super) const MAX_BATCH: usize = 64;

/// How much longer than two round trips the charges that are waited for may take to come by the rates: timers are late by
/// so much. The charge that is asked for last has to wait for the round trip before its own.
const MARGIN: Duration = Duration::from_millis(5);

impl Batch {
    pub(super) fn new(limiter: RateLimiter) -> Self {
        Self {
            limiter,
            waiting: Vec::new(),
            demand: Demand::default(),
        }
    }

    pub(super) fn is_full(&self) -> bool {
        self.waiting.len() >= MAX_BATCH
    }

    /// Asks for the charges of the calls that go next, as far as they are not asked for yet and will come soon. `most` is how
    /// many calls could go, `head` is what the first of them costs, and `next` returns what so many cost.
    pub(super) fn ask_for(&mut self, most: usize, head: &Cost, next: impl FnOnce(usize) -> Vec<Cost>) {
        // Not for each call on its own, if there are many.
        if self.waiting.len() + (most / 4).max(1) > most {
            return;
        }
        let soon = self.limiter.available_in(self.limiter.round_trip() * 2 + MARGIN);
        let has_room = |batch: &Self, cost: &Cost| {
            batch.waiting.is_empty()
                || soon.iter().all(|(budget, amount)| {
                    batch.demand.of(*budget).saturating_add(cost.of(*budget).into()) <= u128::from(*amount)
                })
        };
        if !has_room(self, head) {
            return;
        }
        let mut unmatched: Vec<_> = self.waiting.iter().map(|(cost, _)| *cost).collect();
        for cost in next(most) {
            if let Some(at) = unmatched.iter().position(|asked| *asked == cost) {
                unmatched.swap_remove(at);
            } else if self.waiting.len() < most && has_room(self, &cost) {
                self.waiting.push((cost, self.limiter.schedule_admission(cost)));
                self.demand += &cost;
            } else {
                return;
            }
        }
    }

    /// Waits for the first charge, and returns it with its cost.
    pub(super) fn poll(
        &mut self,
        now: Instant,
        cx: &mut Context<'_>,
    ) -> Poll<(Cost, Result<Option<Estimate>, AcquireError>)> {
        for (at, (cost, admission)) in self.waiting.iter_mut().enumerate() {
            if let Poll::Ready(charged) = admission.poll_turn(now, cx) {
                let charged = charged.map(|()| admission.estimate());
                let cost = *cost;
                self.waiting.remove(at);
                self.demand -= &cost;
                return Poll::Ready((cost, charged));
            }
        }
        Poll::Pending
    }

    /// Waits for no charge any more.
    pub(super) fn leave(&mut self) {
        self.waiting.clear();
        self.demand = Demand::default();
    }
}
