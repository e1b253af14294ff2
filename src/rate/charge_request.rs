//! [`ChargeRequest`]: what one waiting call is to be charged.

use super::cost::Cost;
use std::{
    mem,
    sync::atomic::{AtomicU64, Ordering},
};

/// What one waiting call is to be charged.
#[derive(Debug)]
pub(super) struct ChargeRequest {
    pub(super) cost: Cost,
    /// Whether this is the place of a schedule, whose calls take turns at it. It is not counted among what waits: which
    /// call will take it is not known, and that call is counted where it waits in the schedule.
    pub(super) is_of_schedule: bool,
    /// [`FINAL`] if the cost is no estimate. When an estimate is charged, the number of estimates that the limiter had
    /// charged before is stored here, for the settlement. Atomic only because a request is charged through a shared
    /// reference.
    number: AtomicU64,
}

/// In place of the number of an estimate: the cost is not an estimate.
const FINAL: u64 = u64::MAX;

// === impl ChargeRequest ===

impl ChargeRequest {
    #[inline]
    pub(super) fn new(cost: Cost, is_estimate: bool) -> Self {
        Self {
            cost,
            is_of_schedule: false,
            number: AtomicU64::new(if is_estimate { 0 } else { FINAL }),
        }
    }

    /// Returns the request of a schedule, for the call that goes next.
    pub(super) fn of_schedule(cost: Cost) -> Self {
        Self {
            is_of_schedule: true,
            ..Self::new(cost, true)
        }
    }

    /// Returns the same request with another cost.
    pub(super) fn with_cost(&self, cost: Cost) -> Self {
        Self {
            is_of_schedule: self.is_of_schedule,
            ..Self::new(cost, self.is_estimate())
        }
    }

    #[inline]
    pub(super) fn is_estimate(&self) -> bool {
        self.number.load(Ordering::Relaxed) != FINAL
    }

    /// Records that the estimate was charged as the one with this number.
    #[inline]
    pub(super) fn set_number(&self, number: u64) {
        self.number.store(number, Ordering::Relaxed);
    }

    /// Returns the number of the charged estimate, the first time. `None` if the cost is not an estimate.
    pub(super) fn take_number(&mut self) -> Option<u64> {
        let number = mem::replace(self.number.get_mut(), FINAL);
        (number != FINAL).then_some(number)
    }
}

/// The clone is a request of the same cost that has not been charged.
impl Clone for ChargeRequest {
    fn clone(&self) -> Self {
        self.with_cost(self.cost)
    }
}
