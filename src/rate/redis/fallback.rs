//! [`LocalFallback`]: the schedule by which a member admits calls without the store, while the store is lost.

use super::{
    quota_config::QuotaConfig,
    virtual_schedule::VirtualSchedule,
    wire::{StoreRequest, instant_after, micros},
};
use crate::rate::{cost::Cost, pause::Pauses};
use std::sync::Arc;
use tokio::time::{Duration, Instant};

/// How far into the future the local fallback makes reservations, in microseconds.
const MAX_AHEAD: i64 = 100_000;
/// What the local fallback's clock shows at its `epoch`, in microseconds. It is above 0, because a time or an
/// incarnation of 0 in a request means that there is none.
const FIRST_MICRO: i64 = 1;

/// Admits calls at one of several equal shares of the rates. The fallback saves nothing up: its buckets are emptied
/// before each use.
pub(super) struct LocalFallback {
    schedule: VirtualSchedule,
    generation: u64,
    epoch: Instant,
    /// When the fallback begins to admit calls. Until then members may use reservations that the store made before it
    /// was lost.
    begins_at: Instant,
    config: Option<Arc<QuotaConfig>>,
    incarnation: i64,
    sequence: i64,
    /// When to make reservations for the waiters in the queue again; `None` if that may be done at once.
    pub(super) retry_at: Option<Instant>,
}

impl LocalFallback {
    /// `generation` is a number that no earlier fallback of this member had. Reservations carry it, so that each is
    /// settled with the fallback that made it.
    pub(super) fn new(generation: u64, begins_at: Instant, now: Instant) -> Self {
        Self {
            schedule: VirtualSchedule::default(),
            generation,
            epoch: now,
            begins_at,
            config: None,
            // The first request to the schedule names an earlier state, so that the buckets begin empty and not with a
            // burst.
            incarnation: FIRST_MICRO,
            sequence: 0,
            retry_at: None,
        }
    }

    pub(super) const fn generation(&self) -> u64 {
        self.generation
    }

    /// Reserves `costs` in order, until the schedule reaches further than 100 ms into the future, and returns when each
    /// of the reserved ones is admitted.
    ///
    /// `config` is this member's share of the limits. `pause` is how much longer the current pause lasts; 0 if there is
    /// none.
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
            pauses: Pauses::new(micros(pause), -1),
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
