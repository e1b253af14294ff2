//! [`LocalFallback`]: what a member gives out by itself, while the store is lost.

use super::{
    adjustments::{Adjustments, NONE},
    coordinator::MOST_MICROS,
    quota_config::QuotaConfig,
    virtual_schedule::VirtualSchedule,
    wire::StoreRequest,
};
use crate::rate::limits::Cost;
use std::sync::Arc;
use tokio::time::{Duration, Instant};

/// How far ahead it is given out.
const AHEAD: i64 = 100_000;
/// The first moment there is.
const FIRST: i64 = 1;

/// One of so many equal shares of the rates. Nothing is saved up in it.
pub(super) struct LocalFallback {
    frontier: VirtualSchedule,
    pub(super) ledger: Adjustments,
    epoch: Instant,
    /// Until then, what was reserved before goes.
    begins: Instant,
    config: Option<Arc<QuotaConfig>>,
    birth: i64,
    seq: i64,
    /// When to ask again.
    pub(super) gate: Option<Instant>,
}

impl LocalFallback {
    /// `losses` tells it from others.
    pub(super) fn new(losses: u64, begins: Instant, now: Instant) -> Self {
        Self {
            frontier: VirtualSchedule::default(),
            ledger: Adjustments::new(losses),
            epoch: now,
            begins,
            config: None,
            birth: FIRST,
            seq: 0,
            gate: None,
        }
    }

    /// Reserves as many of these as may be.
    pub(super) fn reserve(
        &mut self,
        config: QuotaConfig,
        costs: Vec<Cost>,
        pause: Duration,
        now: Instant,
    ) -> Vec<Instant> {
        let micros = |span: Duration| i64::try_from(span.as_micros()).unwrap_or(MOST_MICROS).min(MOST_MICROS);
        // A moment after the epoch, so that no time is negative.
        let clock = FIRST + micros(now - self.epoch);
        self.frontier.drain(clock);
        let config = Arc::new(config);
        let changes = self.config.as_ref().is_some_and(|before| *before != config);
        self.config = Some(config.clone());
        let answer = self.frontier.call(
            &StoreRequest {
                member: [0; 16],
                leaves: false,
                probes: false,
                ahead: AHEAD,
                // It never begins full.
                birth: self.birth,
                seq: self.seq,
                horizon: micros(self.begins.saturating_duration_since(now)),
                base: String::new(),
                stamp: 0,
                config,
                changes,
                batch: 0,
                credit: NONE,
                debit: NONE,
                spent: NONE,
                alone: 0,
                shares: 1,
                estimated: NONE,
                pause: micros(pause),
                lower: Vec::new(),
                costs,
            },
            clock,
        );
        (self.birth, self.seq) = (answer.birth, answer.seq);
        let instant = |micros: i64| now + Duration::from_micros(micros.unsigned_abs());
        self.gate = (answer.again > 0).then(|| instant(answer.again));
        answer.goes.into_iter().map(instant).collect()
    }
}
