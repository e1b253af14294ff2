//! How the coordinator builds the requests to the store, and when it sends them.

use super::{Coordinator, PauseReport};
use crate::rate::{
    cost::Cost,
    demand::Demand,
    redis::{
        amounts::Amounts,
        loss::OnStoreLoss,
        wire::{MAX_MICROS, StoreRequest, micros},
    },
};
use tokio::time::{Duration, Instant};

/// How long after the last request to the store corrections are sent, so that further corrections are sent together
/// with them.
const CORRECTION_DELAY: Duration = Duration::from_millis(20);
/// How long after the last request to the store estimates that were right are reported. They change no balance, only
/// the store's sum of unsettled estimates, so they can wait longer than corrections.
const CONFIRMATION_DELAY: Duration = Duration::from_secs(1);
/// How long after its last request a member that has nothing to report sends a request, so that the store keeps
/// counting the member.
const HEARTBEAT: Duration = Duration::from_secs(5);
/// How far into the future reservations are made for whatever member asks first; further ones are shared equally. It is
/// longer than the time between two requests of a member that waits.
const RESERVED_AHEAD: Duration = Duration::from_millis(80);

/// What a request to the store contained, which is needed to interpret the reply.
pub(in crate::rate::redis) struct RequestSnapshot {
    /// When the request was sent: before that, the server has not read its clock.
    pub(in crate::rate::redis) sent_at: Instant,
    /// The sequence numbers and costs of the waiters whose costs are in the request, in the order of the reply.
    pub(super) requested: Vec<(u64, Cost)>,
    pub(super) estimated: Amounts,
    pub(super) lowered: Vec<(usize, u64)>,
    pub(super) pauses: PauseReport,
    /// Whether the request forgives the debts of all estimates that were settled when it was sent.
    pub(super) is_forgiving: bool,
    /// How often this member had set the limits when the request was sent.
    pub(super) changes: u64,
    pub(super) is_leaving: bool,
}

impl Coordinator {
    /// Returns the request to send to the store now; `None` if none is due.
    pub(in crate::rate::redis) fn next_request(&mut self, now: Instant) -> Option<(StoreRequest, RequestSnapshot)> {
        if self.has_left || self.next_request_at(now) > now {
            return None;
        }
        let is_probe = self.breaker.is_open();
        // A probe of a lost store requests no costs: if its reply is lost too, the reservations would be wasted.
        let requested = if is_probe || self.is_leaving {
            Vec::new()
        } else {
            self.take_requestable(now)
        };
        if requested.is_empty() && self.next_request_at(now) > now {
            // No cost may be requested yet, and there is nothing to report to the store, so no request is sent.
            return None;
        }
        self.waiters.on_requested(requested.iter().map(|(seq, _)| *seq));
        self.in_flight.extend(requested.iter().map(|(seq, _)| *seq));
        let mut snapshot = RequestSnapshot {
            sent_at: now,
            estimated: self.reports.estimated(),
            lowered: self.limits.take_lowered(),
            pauses: self.pauses.unreported(),
            is_forgiving: false,
            changes: self.limits.changes(),
            is_leaving: self.is_leaving,
            requested,
        };
        let request = self.build_request(&snapshot, is_probe, now);
        // A debit that is not in the request yet may leave a debt that is to be forgiven, too.
        snapshot.is_forgiving = self.is_forgiving && !is_probe && !self.reports.has_unsent_corrections();
        self.is_claim_dropped = false;
        self.requested_at = Some(now);
        self.counts.requests += 1;
        Some((request, snapshot))
    }

    /// Returns a request that finds out whether the store works. It reserves and reports nothing, and the store does not
    /// keep its sender as a member.
    pub(in crate::rate::redis) fn check_request(&mut self, now: Instant) -> StoreRequest {
        let nothing = RequestSnapshot {
            sent_at: now,
            requested: Vec::new(),
            estimated: Amounts::default(),
            lowered: Vec::new(),
            pauses: PauseReport::default(),
            is_forgiving: false,
            changes: self.limits.changes(),
            is_leaving: true,
        };
        let is_probe = true;
        StoreRequest {
            member: *uuid::Uuid::new_v4().as_bytes(),
            is_leaving: true,
            is_change: false,
            is_forgiving: false,
            ..self.build_request(&nothing, is_probe, now)
        }
    }

    fn build_request(&mut self, snapshot: &RequestSnapshot, is_probe: bool, now: Instant) -> StoreRequest {
        let is_unlimited = self.settings.on_loss == OnStoreLoss::Open;
        let batch = if is_probe {
            None
        } else {
            self.reports.next_batch(is_unlimited, now)
        };
        let with_usage = batch.filter(|batch| !batch.fallback_usage.is_zero());
        // The request names the state of the last reply only if the store should still have it. If that state has
        // expired by now, nothing is lost, because its buckets would be full.
        let is_remembered = with_usage.is_some() || self.reports.has_fallback_usage() || self.store.is_kept(now);
        let time_to = |instant: Option<Instant>| {
            micros(instant.map_or(Duration::ZERO, |instant| instant.saturating_duration_since(now)))
        };
        StoreRequest {
            member: self.settings.member,
            is_leaving: self.is_leaving,
            is_probe,
            max_ahead: micros(self.settings.max_ahead),
            ahead: micros(self.ahead()),
            lead: micros(self.server_clock.lead().min(self.settings.max_ahead / 2)),
            incarnation: if is_remembered { self.store.incarnation } else { 0 },
            sequence: self.store.sequence,
            last_reservation: time_to(self.store.last_reservation),
            left: if is_remembered && !self.limits.is_changed() {
                self.store.left_at(self.limits.config(), now)
            } else {
                Vec::new()
            },
            config: self.limits.config().clone(),
            configured_as: self.limits.configured_as().to_owned(),
            config_version: self.limits.version(),
            is_change: self.limits.is_changed(),
            batch: self.reports.batch_number(),
            credit: batch.map_or(Amounts::default(), |batch| batch.credit),
            debit: batch.map_or(Amounts::default(), |batch| batch.debit),
            fallback_usage: batch.map_or(Amounts::default(), |batch| batch.fallback_usage),
            fallback_age: with_usage.map_or(0, |batch| {
                micros(now.saturating_duration_since(batch.since)).clamp(1, MAX_MICROS)
            }),
            member_count: i64::try_from(self.members()).unwrap_or(1),
            estimated: snapshot.estimated,
            // A pause that has ended since it was set must not end a pause of another member.
            pauses: snapshot
                .pauses
                .map(|change| change.map_or(-1, |end| end.map_or(0, |_| time_to(end).max(1)))),
            is_forgiving: self.is_forgiving,
            lowered: snapshot.lowered.clone(),
            costs: snapshot.requested.iter().map(|(_, cost)| *cost).collect(),
            is_backlogged: !self.waiters.is_queue_empty(),
        }
    }

    /// Returns when to send the next request to the store.
    pub(super) fn next_request_at(&self, now: Instant) -> Instant {
        let requested_at = self.requested_at.unwrap_or(now);
        let mut at = self.requested_at.map_or(now, |requested_at| requested_at + HEARTBEAT);
        if self.pauses.has_unreported()
            || self.is_forgiving
            || self.limits.has_news()
            || self.is_leaving
            || self.is_claim_dropped
        {
            at = now;
        }
        if self.reports.has_corrections() {
            at = at.min(requested_at + CORRECTION_DELAY);
        }
        if self.reports.has_new_estimates() {
            at = at.min(requested_at + CONFIRMATION_DELAY);
        }
        if !self.waiters.is_queue_empty() && !self.breaker.is_open() {
            at = at.min(self.retry_at.unwrap_or(now));
        }
        match self.breaker.retry_at() {
            // A lost store is probed even if there is nothing to report to it.
            Some(retry_at) if self.breaker.is_open() => retry_at,
            Some(retry_at) => at.max(retry_at),
            None => at,
        }
    }

    /// Returns the waiters in the queue whose costs may be requested from the store now. How many of them are reserved, the
    /// store decides, which knows the demand of all members. But the member requests no more while it holds reservations
    /// that fill the schedule: those that are given back are of use to waiters that have none.
    fn take_requestable(&mut self, now: Instant) -> Vec<(u64, Cost)> {
        if self.waiters.is_queue_empty() || self.retry_at.is_some_and(|retry_at| retry_at > now) {
            return Vec::new();
        }
        let scheduled = self
            .store
            .scheduled_until
            .map(|until| until.saturating_duration_since(now));
        let most = self.ahead().max(scheduled.unwrap_or_default()).as_micros() as f64;
        let config = self.limits.config();
        // Returns how long the rates take to bring `amounts`, in microseconds.
        let duration = |amounts: &Demand| {
            // No reservation waits for a rate that refuses calls, and one by the calendar brings nothing in its window.
            let filling = config.specs().iter().filter(|(_, spec)| !spec.kind.is_allowance());
            let durations =
                filling.map(|(budget, spec)| amounts.of(*budget) as f64 * spec.unit as f64 / spec.fill as f64);
            durations.fold(0.0, f64::max)
        };
        let mut reserved = self.waiters.unused();
        let mut requestable = Vec::new();
        for (seq, cost) in self.waiters.queued().take(self.most_costs) {
            if duration(&reserved) > most {
                break;
            }
            reserved += &cost;
            requestable.push((seq, cost));
        }
        self.retry_at = requestable.is_empty().then(|| now + self.retry_delay());
        requestable
    }

    /// Returns how far into the future the store makes reservations for this member before it counts what all members
    /// have got: long enough for a few round trips, so that the rates are used in full.
    fn ahead(&self) -> Duration {
        RESERVED_AHEAD
            .max(4 * self.store.round_trip)
            .min(self.settings.max_ahead)
    }

    /// Returns how long to wait until some reservations are used and more may be made. The time is random, so that no
    /// member always sends its requests just before another member.
    pub(super) fn retry_delay(&self) -> Duration {
        let delay = (self.ahead() / 3).clamp(Duration::from_millis(2), Duration::from_millis(50));
        delay.mul_f64(0.5 + 0.5 * fastrand::f64())
    }
}
