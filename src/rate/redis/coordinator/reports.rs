//! [`Reports`]: what this member has yet to report of estimates, their corrections, and admissions without the store.

use crate::rate::{
    limits::Cost,
    redis::{adjustments::Adjustments, amounts::Amounts},
};
use tokio::time::Instant;

#[derive(Default)]
pub(super) struct Reports {
    /// Of reservations that the store made.
    adjustments: Adjustments,
    /// What the local fallback has admitted, and no batch contains yet.
    fallback_usage: Amounts,
    /// When it admitted the first of that.
    fallback_since: Option<Instant>,
    /// The corrections that are being reported, until the store confirms them. If a reply is lost, the same batch is
    /// sent again with the same number, so that the store counts it once.
    batch: Option<Batch>,
    /// The number of the last batch.
    batches: i64,
    /// The estimates that the store knows of.
    reported_estimates: Amounts,
}

/// Corrections that are reported together.
#[derive(Clone, Copy)]
pub(super) struct Batch {
    pub(super) credit: Amounts,
    pub(super) debit: Amounts,
    pub(super) fallback_usage: Amounts,
    /// When the first of `fallback_usage` was admitted.
    pub(super) since: Instant,
}

impl Reports {
    pub(super) const fn generation(&self) -> u64 {
        self.adjustments.generation()
    }

    pub(super) const fn estimated(&self) -> Amounts {
        self.adjustments.estimated()
    }

    pub(super) const fn batch_number(&self) -> i64 {
        self.batches
    }

    /// Whether the local fallback has admitted anything that no batch contains yet.
    pub(super) fn has_fallback_usage(&self) -> bool {
        self.fallback_usage != Amounts::ZERO
    }

    /// Whether there is anything to correct.
    pub(super) fn has_corrections(&self) -> bool {
        !self.adjustments.is_empty() || self.batch.is_some() || self.has_fallback_usage()
    }

    /// Whether the store knows other estimates than those that are open.
    pub(super) fn has_new_estimates(&self) -> bool {
        self.estimated() != self.reported_estimates
    }

    // --- reservations

    pub(super) fn on_reserved(&mut self, cost: Cost) {
        self.adjustments.on_reserved(cost);
    }

    /// See [`Adjustments::settle`].
    pub(super) fn settle(&mut self, generation: u64, reserved: Cost, used: Cost) {
        self.adjustments.settle(generation, reserved, used);
    }

    /// Records a reservation of a local fallback whose usage is reported already: only what was used on top of it is
    /// left to charge.
    pub(super) fn settle_reported(&mut self, reserved: Cost, used: Cost) {
        // No generation of estimates has this number, so nothing is refunded.
        self.adjustments.settle(u64::MAX, reserved, used);
    }

    pub(super) fn on_fallback_reserved(&mut self, cost: Cost, now: Instant) {
        self.fallback_usage = self.fallback_usage.saturating_add(cost.into());
        self.fallback_since.get_or_insert(now);
    }

    /// Corrects what the current local fallback has admitted.
    pub(super) fn settle_fallback(&mut self, reserved: Cost, used: Cost) {
        let (reserved, used) = (Amounts::from(reserved), Amounts::from(used));
        let usage = self.fallback_usage.saturating_sub(reserved.saturating_sub(used));
        self.fallback_usage = usage.saturating_add(used.saturating_sub(reserved));
    }

    // --- requests

    /// The corrections for the next request: the batch that is not confirmed yet, or a new one.
    ///
    /// `is_unlimited`: the local fallback admitted every call, so its usage is no share of the rates and is charged in
    /// full.
    pub(super) fn next_batch(&mut self, is_unlimited: bool, now: Instant) -> Option<Batch> {
        if self.batch.is_none() && (!self.adjustments.is_empty() || self.has_fallback_usage()) {
            let (credit, mut debit) = self.adjustments.take();
            let mut fallback_usage = std::mem::take(&mut self.fallback_usage);
            if is_unlimited {
                debit = debit.saturating_add(std::mem::take(&mut fallback_usage));
            }
            self.batches += 1;
            self.batch = Some(Batch {
                credit,
                debit,
                fallback_usage,
                since: self.fallback_since.take().unwrap_or(now),
            });
        }
        self.batch
    }

    /// The store has counted the batch.
    pub(super) fn on_batch_confirmed(&mut self) {
        self.batch = None;
    }

    /// The store does not know this member's estimates any more.
    pub(super) fn on_state_lost(&mut self) {
        self.adjustments.on_state_lost();
    }

    /// The store knows all estimates that are open now.
    pub(super) fn on_estimates_reported(&mut self) {
        self.reported_estimates = self.estimated();
    }
}
