//! [`KeyLimits`]: the limits of one key.

use super::{buckets::Buckets, charge_request::ChargeRequest, cost::Cost, limits::Limits};
use crate::{
    clock::LazyNow,
    error::{InvalidConfig, Rejected},
    wait_queue::{Availability, Resource},
};
use std::time::SystemTime;
use tokio::time::Instant;

/// The buckets of one key, which each call of this key is charged to.
pub(crate) struct KeyLimits {
    buckets: Buckets,
    is_waited_for: bool,
}

impl KeyLimits {
    /// Creates buckets that are full at `now`, when the wall clock shows `wall_clock`.
    ///
    /// # Errors
    ///
    /// If a rate is invalid, or begins with less than its burst.
    pub(crate) fn new(limits: Limits, wall_clock: SystemTime, now: Instant) -> Result<Self, InvalidConfig> {
        limits.check_for_keys()?;
        Ok(Self {
            buckets: Buckets::beginning_at(now, limits, wall_clock)?,
            is_waited_for: false,
        })
    }

    /// Returns why a call of this cost may not wait, if it may not.
    pub(crate) fn rejection(&mut self, cost: &Cost, now: &mut LazyNow) -> Option<Rejected> {
        self.buckets.rejection(&ChargeRequest::new(*cost, false), &mut own(now))
    }

    /// Returns when a call of this cost can be charged if no other is before, or why it never can.
    pub(crate) fn availability(&mut self, cost: &Cost, now: &mut LazyNow) -> Result<Availability, Rejected> {
        let (request, now) = (ChargeRequest::new(*cost, false), &mut own(now));
        match self.buckets.rejection(&request, now) {
            Some(rejection) => Err(rejection),
            None => Ok(self.buckets.availability(&request, now)),
        }
    }

    /// Charges a call whose cost is available. `has_waited` is set if it was not when the call became the first. Returns
    /// the number of the charge, for its settlement.
    pub(crate) fn charge(&mut self, cost: &Cost, has_waited: bool, now: &mut LazyNow) -> u64 {
        let (mut request, now) = (ChargeRequest::new(*cost, true), &mut own(now));
        let availability = self.buckets.availability(&request, now);
        debug_assert_eq!(
            availability,
            Availability::Now,
            "only a call whose cost is available is charged"
        );
        self.buckets.try_take(&request, has_waited, now);
        request.take_number().unwrap_or_default()
    }

    /// Tells the buckets whether calls wait for them: while they do, a call may be admitted as of an earlier time.
    pub(crate) fn set_waited_for(&mut self, is_waited_for: bool, now: &mut LazyNow) {
        if self.is_waited_for != is_waited_for {
            self.is_waited_for = is_waited_for;
            let request = ChargeRequest::new(Cost::none(), false);
            if is_waited_for {
                self.buckets.on_idle(&mut own(now));
                self.buckets.on_enqueue(&request);
            } else {
                self.buckets.on_dequeue(&request);
            }
        }
    }

    /// Corrects the charge with this number: the call has cost `used`.
    pub(crate) fn settle(&mut self, charged: &Cost, number: u64, used: &Cost, now: &mut LazyNow) {
        self.buckets.settle(charged, number, used, &mut own(now));
    }

    /// Replaces the limits. Each rate takes over what the bucket of the rate before held.
    ///
    /// # Errors
    ///
    /// If a rate is invalid, or begins with less than its burst. Nothing changes then.
    pub(crate) fn set_limits(&mut self, limits: Limits, now: &mut LazyNow) -> Result<(), InvalidConfig> {
        limits.check_for_keys()?;
        self.buckets.set_limits(limits, &mut own(now))
    }

    /// Returns when the buckets will not differ from new ones, so that they can be forgotten. `None` if that is now.
    /// No call may wait, and all charges must be settled.
    pub(crate) fn full_at(&mut self, now: &mut LazyNow) -> Option<Instant> {
        self.buckets.full_at(&mut own(now))
    }
}

/// Returns the same time for the buckets of one key. A [`LazyNow`] keeps how long the time is after the epoch of the
/// buckets that have asked first, which is another one for each key.
fn own(now: &mut LazyNow) -> LazyNow {
    LazyNow::at(now.get())
}
