//! [`Estimate`]: a cost that a rate limiter has charged before the true cost of the call is available.

use super::{budget::Budget, cost::Cost, local::LocalCharge};
use std::{
    fmt,
    panic::{RefUnwindSafe, UnwindSafe},
    sync::Arc,
};

/// A cost that a rate limiter has charged as an estimate, to be [settled](Self::settle) when the true cost of the call
/// is available.
///
/// An estimate that is dropped without being settled becomes the final charge.
#[must_use = "an estimate that is dropped becomes the final charge: if that is intended, use `acquire`"]
pub struct Estimate {
    cost: Cost,
    charge: Charge,
    /// Is told what the call has used.
    receipt: Option<Arc<dyn OnSettled>>,
}

/// Is told what a call has used when its estimate is settled, or that it counts as charged.
pub(crate) trait OnSettled: Send + Sync {
    fn settled(&self, used: &Cost);
}

/// The charge of an estimate. That of a limiter in this process is stored in the estimate, so that estimates allocate
/// nothing.
enum Charge {
    Local(LocalCharge),
    Boxed(Box<dyn Settle>),
}

/// Corrects a charge. Implemented by the handle of the shared limiter, or of the key, that made the charge.
pub(super) trait Settle: Send + Sync {
    /// Replaces the cost `charged` by the cost that the call really `used`.
    fn settle(&self, charged: Cost, used: Cost);
}

/// Logs that a call has `used` so much of `budget` that the debt is cut off. The caller must hold no lock, because a
/// subscriber of the log is user code.
pub(super) fn warn_of_cut_off(budget: Budget, used: Cost) {
    tracing::warn!(
        target: "tower_outbound",
        budget = budget.name(),
        used = used.of(budget),
        "A call has used so much more than it was charged that a part is forgotten: the debt of a rate is at its bound"
    );
}

// === impl Estimate ===

impl Estimate {
    pub(super) const fn local(cost: Cost, charge: LocalCharge) -> Self {
        Self {
            cost,
            charge: Charge::Local(charge),
            receipt: None,
        }
    }

    pub(super) fn new(cost: Cost, charge: impl Settle + 'static) -> Self {
        Self {
            cost,
            charge: Charge::Boxed(Box::new(charge)),
            receipt: None,
        }
    }

    /// Tells `receipt` what the call has used, when that is known.
    pub(super) fn tell(&mut self, receipt: Arc<dyn OnSettled>) {
        self.receipt = Some(receipt);
    }

    /// Returns the estimated cost, which was charged.
    #[must_use]
    pub const fn cost(&self) -> Cost {
        self.cost
    }

    /// Gives back what was charged above `cost`, because another call goes than the one that was expected.
    pub(crate) fn lower_to(&mut self, cost: Cost) {
        self.charge.settle(self.cost.above(&cost), Cost::none());
        self.cost = cost;
    }

    /// Replaces the charge by what the call really `used`: refunds what was not used, or debits what was used in
    /// addition.
    ///
    /// See [`RateLimiter::settle`](super::RateLimiter::settle) for the debt that a debit may leave, and for the part
    /// that is not refunded.
    pub fn settle(mut self, used: Cost) {
        self.charge.settle(self.cost, used);
        if let Some(receipt) = self.receipt.take() {
            receipt.settled(&used);
        }
        // `drop` settles an estimate as used in full unless its cost is zero. Setting the cost to zero keeps `drop`
        // from settling this estimate a second time.
        self.cost = Cost::default();
    }
}

impl Charge {
    fn settle(&self, charged: Cost, used: Cost) {
        match self {
            Self::Local(local) => local.settle_and_warn(charged, used),
            Self::Boxed(boxed) => boxed.settle(charged, used),
        }
    }
}

impl Drop for Estimate {
    fn drop(&mut self) {
        if self.cost != Cost::default() {
            self.charge.settle(self.cost, self.cost);
        }
        if let Some(receipt) = self.receipt.take() {
            receipt.settled(&self.cost);
        }
    }
}

/// A limiter changes its state only under a lock and runs no user code there, so a panic that is caught cannot leave it
/// half changed. The compiler does not see that through the lock and the trait object.
impl UnwindSafe for Estimate {}
impl RefUnwindSafe for Estimate {}

impl fmt::Debug for Estimate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Estimate")
            .field("cost", &self.cost)
            .finish_non_exhaustive()
    }
}
