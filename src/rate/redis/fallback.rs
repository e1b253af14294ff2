//! [`LocalFallback`]: what a member admits by itself while the store is lost.

use super::{
    quota_config::QuotaConfig,
    virtual_schedule::VirtualSchedule,
    wire::{StoreRequest, instant_after, micros},
};
use crate::rate::limits::Cost;
use std::sync::Arc;
use tokio::time::{Duration, Instant};

/// How far ahead the fallback reserves, in microseconds.
const MAX_AHEAD: i64 = 100_000;
/// The clock at the `epoch`. Above zero, because zero means "none" in requests.
const FIRST_MICRO: i64 = 1;

/// One of several equal shares of the rates. It saves nothing up: its buckets are emptied before each use.
pub(super) struct LocalFallback {
    schedule: VirtualSchedule,
    generation: u64,
    epoch: Instant,
    /// Until then the reservations that were made before the loss are used.
    begins_at: Instant,
    config: Option<Arc<QuotaConfig>>,
    incarnation: i64,
    sequence: i64,
    /// When to reserve for the waiters again that had to stay in the queue.
    pub(super) retry_at: Option<Instant>,
}

impl LocalFallback {
    /// `generation` is a number that no earlier fallback of this member had.
    pub(super) fn new(generation: u64, begins_at: Instant, now: Instant) -> Self {
        Self {
            schedule: VirtualSchedule::default(),
            generation,
            epoch: now,
            begins_at,
            config: None,
            // An earlier state: the schedule then begins empty, not with a burst.
            incarnation: FIRST_MICRO,
            sequence: 0,
            retry_at: None,
        }
    }

    pub(super) const fn generation(&self) -> u64 {
        self.generation
    }

    /// Reserves the costs in order, as many as fit, and returns when each of them is admitted.
    ///
    /// `config` is this member's share of the limits, and `pause` the rest of a pause.
    pub(super) fn reserve(
        &mut self,
        config: QuotaConfig,
        costs: Vec<Cost>,
        pause: Duration,
        now: Instant,
    ) -> Vec<Instant> {
        let clock = FIRST_MICRO + micros(now - self.epoch);
        self.schedule.drain(clock);
        let config = Arc::new(config);
        let is_change = self.config.as_ref().is_some_and(|before| *before != config);
        self.config = Some(config.clone());
        let request = StoreRequest {
            max_ahead: MAX_AHEAD,
            incarnation: self.incarnation,
            sequence: self.sequence,
            last_reservation: micros(self.begins_at.saturating_duration_since(now)),
            is_change,
            pause: micros(pause),
            costs,
            ..StoreRequest::new([0; 16], config)
        };
        let reply = self.schedule.handle(&request, clock);
        (self.incarnation, self.sequence) = (reply.incarnation, reply.sequence);
        self.retry_at = (reply.retry_in > 0).then(|| instant_after(reply.retry_in, now));
        let delays = reply.delays.into_iter();
        delays.map(|delay| instant_after(delay, now)).collect()
    }
}
