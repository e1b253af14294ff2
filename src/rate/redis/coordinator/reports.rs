//! [`Reports`]: what this member has yet to report to the store: its unsettled estimates, their corrections (true cost
//! minus estimate), and what it admitted without the store.

use crate::rate::{
    budget::Budget,
    redis::{adjustments::Adjustments, amounts::Amounts},
};
use tokio::time::Instant;

#[derive(Default)]
pub(super) struct Reports {
    /// The unsettled estimates, and the corrections, of reservations that the store made.
    adjustments: Adjustments,
    /// What the local fallback has reserved, as far as it is not in a batch of corrections yet.
    fallback_usage: Amounts,
    /// When the local fallback made the first reservation that is counted in `fallback_usage`.
    fallback_since: Option<Instant>,
    /// The batch of corrections that is being reported, until the store confirms it. If a reply is lost, the same batch
    /// is sent again with the same number, so that the store counts it once.
    batch: Option<Batch>,
    /// The number of the last batch of corrections; 0 if there was none.
    batches: i64,
    /// The sum of this member's unsettled estimates when the store last replied.
    reported_estimates: Amounts,
}

/// Corrections that are reported to the store together, under one number.
#[derive(Clone, Copy)]
pub(super) struct Batch {
    pub(super) credit: Amounts,
    pub(super) debit: Amounts,
    pub(super) fallback_usage: Amounts,
    /// When the local fallback made the first reservation in `fallback_usage`.
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

    /// Whether the local fallback has reserved anything that no batch of corrections contains yet.
    pub(super) fn has_fallback_usage(&self) -> bool {
        !self.fallback_usage.is_zero()
    }

    /// Whether the store has yet to confirm a correction of an estimate, or what the local fallback admitted while the
    /// store was lost.
    pub(super) fn has_corrections(&self) -> bool {
        self.batch.is_some() || self.has_unsent_corrections()
    }

    /// Whether there are corrections that no batch contains yet.
    pub(super) fn has_unsent_corrections(&self) -> bool {
        !self.adjustments.is_empty() || self.has_fallback_usage()
    }

    /// Whether this member's unsettled estimates have changed since the store last replied.
    pub(super) fn has_new_estimates(&self) -> bool {
        self.estimated() != self.reported_estimates
    }

    // --- reservations

    pub(super) fn on_reserved(&mut self, cost: Amounts) {
        self.adjustments.on_reserved(cost);
    }

    /// Settles a reservation that the store made: see [`Adjustments::settle`].
    pub(super) fn settle(&mut self, generation: u64, reserved: Amounts, used: Amounts) {
        self.adjustments.settle(generation, reserved, used);
    }

    /// Settles a reservation of a local fallback whose usage was reported to the store already: only what was used on
    /// top of the reservation still has to be charged.
    pub(super) fn settle_reported(&mut self, reserved: Amounts, used: Amounts) {
        // `u64::MAX` stands for estimates that the store does not have, so nothing is refunded: no generation of
        // estimates has this number.
        self.adjustments.settle(u64::MAX, reserved, used);
    }

    pub(super) fn on_fallback_reserved(&mut self, cost: Amounts, now: Instant) {
        self.fallback_usage = self.fallback_usage.saturating_add(cost);
        self.fallback_since.get_or_insert(now);
    }

    /// Settles a reservation of the current local fallback: its call has used `used` instead of what was `reserved`.
    pub(super) fn settle_fallback(&mut self, reserved: Amounts, used: Amounts) {
        let usage = self.fallback_usage.saturating_sub(reserved.saturating_sub(used));
        self.fallback_usage = usage.saturating_add(used.saturating_sub(reserved));
    }

    // --- requests

    /// Returns the batch of corrections for the next request to the store: the one that the store has not confirmed
    /// yet, or a new one; `None` if there is nothing to correct.
    ///
    /// If `is_unlimited`, the local fallback has admitted every call without a limit. Its usage is then charged in full
    /// like a debit, and not as a share of the rates.
    pub(super) fn next_batch(&mut self, is_unlimited: bool, now: Instant) -> Option<Batch> {
        if self.batch.is_none() && self.has_unsent_corrections() {
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

    /// Drops the current batch of corrections, because the store has counted it.
    pub(super) fn on_batch_confirmed(&mut self) {
        self.batch = None;
    }

    /// Begins a new generation of estimates, because the store has lost this member's estimates.
    pub(super) fn on_state_lost(&mut self) {
        self.adjustments.on_state_lost();
    }

    /// Forgets what the new limits do not count.
    pub(super) fn retain(&mut self, budgets: &[Budget]) {
        self.adjustments.retain(budgets);
        self.fallback_usage = self.fallback_usage.retain(budgets);
    }

    /// Records that the store has replied, so that it has all estimates that are unsettled now.
    pub(super) fn on_estimates_reported(&mut self) {
        self.reported_estimates = self.estimated();
    }
}
