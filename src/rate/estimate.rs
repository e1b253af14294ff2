//! [`Estimate`]: a cost that was charged before the true cost is known.

use super::limits::Cost;
use std::fmt;

/// A cost that was charged as an estimate, to be [settled](Self::settle) when the true cost is known.
///
/// An estimate that is dropped without being settled becomes the final charge.
#[must_use = "an estimate that is dropped becomes the final charge: if that is intended, use `acquire`"]
pub struct Estimate {
    cost: Cost,
    charge: Box<dyn Settle>,
}

/// A charge that the limiter which made it can correct.
pub(super) trait Settle: Send + Sync {
    /// Replaces the estimate `charged` by what was `used`.
    fn settle(&self, charged: Cost, used: Cost);
}

// === impl Estimate ===

impl Estimate {
    pub(super) fn new(cost: Cost, charge: impl Settle + 'static) -> Self {
        Self {
            cost,
            charge: Box::new(charge),
        }
    }

    /// Returns the cost that was charged.
    #[must_use]
    pub const fn cost(&self) -> Cost {
        self.cost
    }

    /// Replaces the charge by what was `used`: refunds what was not used, or debits what was used in addition.
    ///
    /// See [`RateLimiter::settle`](super::RateLimiter::settle).
    pub fn settle(mut self, used: Cost) {
        self.charge.settle(self.cost, used);
        // Keeps `drop` from settling again.
        self.cost = Cost::default();
    }
}

impl Drop for Estimate {
    fn drop(&mut self) {
        if self.cost != Cost::default() {
            self.charge.settle(self.cost, self.cost);
        }
    }
}

impl fmt::Debug for Estimate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Estimate")
            .field("cost", &self.cost)
            .finish_non_exhaustive()
    }
}
