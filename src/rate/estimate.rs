//! [`Estimate`]: a cost that was charged before the true one is known.

use super::limits::Cost;
use std::fmt;

/// A cost that was charged as an estimate, to be [settled](Self::settle) when the true cost is known.
///
/// Dropped without that, the estimate stands as the final charge.
#[must_use = "dropped, the estimate stands: use `acquire` if that is what you want"]
pub struct Estimate {
    cost: Cost,
    charge: Box<dyn Charge>,
}

/// A charge that can be corrected by the limiter that made it.
pub(super) trait Charge: Send + Sync {
    /// Replaces the estimate `charged` by what was `used`.
    fn settle(&self, charged: Cost, used: Cost);
}

// === impl Estimate ===

impl Estimate {
    pub(super) fn new(cost: Cost, charge: impl Charge + 'static) -> Self {
        Self {
            cost,
            charge: Box::new(charge),
        }
    }

    /// The cost that was charged.
    #[must_use]
    pub const fn cost(&self) -> Cost {
        self.cost
    }

    /// Corrects the charge to what was really used: see [`RateLimiter::settle`](super::RateLimiter::settle).
    pub fn settle(mut self, used: Cost) {
        self.charge.settle(self.cost, used);
        // Nothing is left for `drop` to settle.
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
