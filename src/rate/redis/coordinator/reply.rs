//! How the coordinator handles a reply of the store, or the failure of a request to it.

use super::{Coordinator, LocalFallback, MAX_COSTS, RequestSnapshot};
use crate::{
    error::Exhausted,
    rate::{
        cost::Cost,
        redis::{
            problem::StoreError,
            waiters::Reservation,
            wire::{RefusedCost, StoreReply, instant_after, pause_ends, system_time},
        },
    },
};
use std::task::Waker;
use tokio::time::{Duration, Instant};

/// The smallest number of costs in a request for which the store may reserve as many.
const MIN_COSTS: usize = 16;
/// How long the waiters in the queue wait at most before their costs are requested again, whatever the store has computed:
/// limits, debts, pauses and the stored state may have changed since.
const MAX_RETRY_DELAY: Duration = Duration::from_secs(1);

impl Coordinator {
    /// Handles the reply to the request that `snapshot` describes. Returns the wakers of the waiters that have got a
    /// reservation or are rejected.
    pub(in crate::rate::redis) fn on_reply(
        &mut self,
        snapshot: RequestSnapshot,
        reply: StoreReply,
        now: Instant,
    ) -> Vec<Waker> {
        self.in_flight.clear();
        self.has_left = snapshot.is_leaving;
        let mut wakers = Vec::new();

        if self.breaker.on_success() {
            // The store was lost, so the request was a probe, which carried no corrections to confirm.
            self.loss_log.on_return(reply.members, now);
        } else {
            self.reports.on_batch_confirmed();
        }
        self.is_other_version = false;
        if snapshot.is_forgiving {
            self.is_forgiving = false;
        }
        if self.fallback.take().is_some() {
            self.retry_at = None;
        }

        let is_replaced = self.store.is_replaced_by(&reply);
        if is_replaced || (!reply.is_known && !snapshot.estimated.is_zero()) {
            self.reports.on_state_lost();
        }
        if is_replaced && self.store.is_kept(now) {
            self.counts.state_losses += 1;
            tracing::warn!(
                "The store has lost the state of the shared limits: they begin again, with empty buckets. If the \
                 server was not restarted, check that it does not evict keys"
            );
        }
        self.server_clock.on_reply(reply.now, snapshot.sent_at, now);
        // The times in the reply count from when the server made it.
        let replied_at = self.server_clock.local_of(reply.now, now);
        self.store.on_reply(&reply, snapshot.sent_at, replied_at, now);

        let config = reply.config.as_deref();
        if self.limits.on_reply(snapshot.changes, reply.config_version, config) {
            self.on_limits_replaced(&mut wakers);
        }
        if self
            .pauses
            .on_store(snapshot.pauses, pause_ends(reply.pauses, replied_at))
        {
            self.on_pause_shortened();
        }

        let (requested, reserved) = (snapshot.requested.len(), reply.delays.len() + reply.refused.len());
        let mut delays = reply.delays.into_iter();
        let mut refused = reply.refused.into_iter().peekable();
        self.claim = None;
        self.most_costs = if reserved < requested {
            (2 * reserved + MIN_COSTS).min(MAX_COSTS)
        } else {
            (2 * self.most_costs).min(MAX_COSTS)
        };
        for (position, (seq, cost)) in snapshot.requested.into_iter().enumerate() {
            if let Some(refused) = refused.next_if(|refused| refused.position == position) {
                let held_at = instant_after(refused.held_in, replied_at);
                let exhausted = exhausted(&refused, &cost, held_at.saturating_duration_since(now), reply.now);
                self.waiters.reject_one(seq, exhausted.into(), &mut wakers);
                continue;
            }
            let Some(delay) = delays.next() else {
                self.on_not_reserved(seq, reply.is_claiming && self.claim.is_none());
                continue;
            };
            let reservation = Reservation {
                at: instant_after(delay, replied_at),
                at_store: reply.now + delay,
                is_from_store: true,
                generation: self.reports.generation(),
            };
            self.on_reserved(seq, cost, reservation, &mut wakers);
        }
        if reserved < requested {
            // The limits may have been changed while the request was in flight. So a waiter that is back in the queue
            // may have a cost that exceeds a burst now, and is rejected.
            self.reject_too_large(&mut wakers);
        }
        self.reports.on_estimates_reported();
        if reply.retry_in > 0 {
            let retry_at = instant_after(reply.retry_in, replied_at) + self.retry_delay();
            self.retry_at = Some(retry_at.min(now + MAX_RETRY_DELAY));
        } else if reserved == 0 && !self.waiters.is_queue_empty() && self.retry_at.is_none() {
            // No cost was reserved, perhaps because the store has limits that this member cannot read. The same request
            // would fail again, so it is delayed.
            self.retry_at = Some(now + self.retry_delay());
        }
        wakers
    }

    /// Puts a waiter back into the queue, whose cost the store has not reserved. If its call was dropped meanwhile, the
    /// claim that the cost may have has to be given up.
    fn on_not_reserved(&mut self, seq: u64, is_claiming: bool) {
        let is_waiting = self.waiters.on_not_reserved(seq);
        if is_claiming {
            self.claim = Some(seq).filter(|_| is_waiting);
            self.is_claim_dropped = !is_waiting;
        }
    }

    fn on_reserved(&mut self, seq: u64, cost: Cost, reservation: Reservation, wakers: &mut Vec<Waker>) {
        self.reports.on_reserved(self.limits.config().amounts(&cost));
        self.store.last_reservation = self.store.last_reservation.max(Some(reservation.at));
        if !self.waiters.on_reserved(seq, reservation, wakers) {
            // The waiter was dropped while the request was in flight, so its reservation is given back.
            self.settle(reservation, cost, Cost::default());
        }
    }

    /// Handles the failure of the request that `snapshot` describes. The store may have served the request if only its
    /// reply was lost.
    pub(in crate::rate::redis) fn on_failure(&mut self, snapshot: RequestSnapshot, error: StoreError, now: Instant) {
        self.in_flight.clear();
        // One attempt to report that the member leaves is enough: the store removes a member that sends no requests.
        self.has_left = snapshot.is_leaving;
        for (seq, _) in &snapshot.requested {
            self.waiters.on_not_reserved(*seq);
        }
        self.limits.on_failure(snapshot.changes, snapshot.lowered);
        self.record_failure(error, now);
    }

    pub(super) fn record_failure(&mut self, error: StoreError, now: Instant) {
        self.counts.failures += 1;
        if error.is_other_version() && !self.is_other_version {
            tracing::error!(problem = %error.problem, "This process cannot share its quota, and rejects its calls");
        }
        self.is_other_version = error.is_other_version();
        if self.breaker.on_failure(self.requested_at.unwrap_or(now), now) {
            self.counts.losses += 1;
            // The local fallback begins after the last reservation that a member may have from the store. If it began
            // earlier, both together could exceed the limits.
            let failing_since = self.breaker.failing_since().unwrap_or(now);
            let reserved_until = (self.store.incarnation != 0).then(|| failing_since + self.settings.max_ahead);
            let begins_at = reserved_until
                .max(self.store.last_reservation)
                .max(self.store.scheduled_until)
                .unwrap_or(now);
            self.fallback = Some(LocalFallback::new(self.counts.losses, begins_at));
        }
        self.last_problem = error.problem;
        if let (true, Some(failing_since)) = (self.breaker.is_open(), self.breaker.failing_since()) {
            let (on_loss, admitted) = (self.settings.on_loss, self.counts.admitted_without_store);
            self.loss_log
                .on_failure(error.problem, on_loss, admitted, failing_since, now);
        }
    }
}

/// Returns the error of a call whose `cost` the store has refused, when its clock showed `store_clock`. The cost is there
/// in the time `retry_after`.
fn exhausted(refused: &RefusedCost, cost: &Cost, retry_after: Duration, store_clock: i64) -> Exhausted {
    let budget = refused.budget;
    let resets_at = system_time(store_clock.saturating_add(refused.held_in));
    // The time is never zero, also if the reply took as long as it.
    let retry_after = retry_after.max(Duration::from_micros(1));
    Exhausted::new(budget.name(), cost.of(budget), refused.left, retry_after, resets_at)
}
