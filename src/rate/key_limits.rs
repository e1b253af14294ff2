//! [`KeyLimits`]: the limits of one node while it lives.

use super::{buckets::Buckets, charge_request::ChargeRequest, cost::Cost, limits::Limits};
use crate::{
    clock::LazyNow,
    error::{InvalidConfig, Rejected},
    wait_queue::{Availability, Resource},
};
use std::time::SystemTime;

/// The buckets of one node, which each call below it is charged to.
pub(crate) struct KeyLimits {
    buckets: Buckets,
    is_waited_for: bool,
}

impl KeyLimits {
    pub(crate) fn new(limits: Limits, wall_clock: SystemTime) -> Result<Self, InvalidConfig> {
        Ok(Self {
            buckets: Buckets::new(limits, wall_clock)?,
            is_waited_for: false,
        })
    }

    /// Returns when a call of this cost can be charged if no other is before, or why it never can.
    pub(crate) fn availability(&mut self, cost: &Cost, now: &mut LazyNow) -> Result<Availability, Rejected> {
        let request = ChargeRequest::new(*cost, false);
        if let Some(rejection) = self.buckets.rejection(&request, now) {
            return Err(rejection);
        }
        Ok(self.buckets.availability(&request, now))
    }

    /// Charges a call whose cost is available. `has_waited` is set if it was not when the call became the first. Returns
    /// the number of the charge, for its settlement.
    pub(crate) fn charge(&mut self, cost: &Cost, has_waited: bool, now: &mut LazyNow) -> u64 {
        let mut request = ChargeRequest::new(*cost, true);
        if self.buckets.availability(&request, now) == Availability::Now {
            self.buckets.try_take(&request, has_waited, now);
        }
        request.take_number().unwrap_or_default()
    }

    /// Tells the buckets whether calls wait for them: while they do, a call may be admitted as of an earlier time.
    pub(crate) fn set_waited_for(&mut self, is_waited_for: bool, now: &mut LazyNow) {
        if self.is_waited_for != is_waited_for {
            self.is_waited_for = is_waited_for;
            let request = ChargeRequest::new(Cost::none(), false);
            if is_waited_for {
                self.buckets.on_idle(now);
                self.buckets.on_enqueue(&request);
            } else {
                self.buckets.on_dequeue(&request);
            }
        }
    }

    /// Corrects the charge with this number: the call has cost `used`.
    pub(crate) fn settle(&mut self, charged: &Cost, number: u64, used: &Cost, now: &mut LazyNow) {
        self.buckets.settle(charged, number, used, now);
    }

    pub(crate) fn set_limits(&mut self, limits: Limits, now: &mut LazyNow) -> Result<(), InvalidConfig> {
        self.buckets.set_limits(limits, now)
    }
}
