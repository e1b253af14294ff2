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
        // The cost may seem to be available only later: to a caller that has read the clock before the one that found it
        // available, and got the lock after it. The buckets then charge it as of that time.
        self.buckets.availability(&request, now);
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

impl Limits {
    /// Checks the values of all rates, for limits that each key has of its own. Their buckets must begin full, because
    /// those of a key that is not used are forgotten once they are full, and begin anew when the key is met again.
    pub(crate) fn check_for_keys(&self) -> Result<(), InvalidConfig> {
        for (budget, spec) in self.bucket_specs()? {
            if spec.initial < spec.capacity {
                return Err(InvalidConfig::new(
                    format!("{}.initial", budget.name()),
                    "must not be below the burst for limits of keys",
                ));
            }
        }
        Ok(())
    }
}

/// Returns the same time for the buckets of one key. A [`LazyNow`] keeps how long the time is after the epoch of the
/// buckets that have asked first, which is another one for each key.
fn own(now: &mut LazyNow) -> LazyNow {
    LazyNow::at(now.get())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rate::Rate;
    use std::time::{Duration, UNIX_EPOCH};

    #[test]
    fn limits_that_are_used_are_full_again_when_the_slowest_is_and_those_of_a_day_when_it_ends() {
        let start = Instant::now().checked_sub(Duration::from_secs(90_000)).unwrap();
        let after = |seconds: u64| LazyNow::at(start + Duration::from_secs(seconds));
        let limits = Limits::new()
            .requests(Rate::per_second(2_u64))
            .tokens(Rate::per_minute(60_u64))
            .budget("quota", Rate::utc_day(10_u64));
        // It is 400 seconds before midnight.
        let mut key = KeyLimits::new(limits, UNIX_EPOCH + Duration::from_secs(86_000), start).unwrap();
        assert_eq!(key.full_at(&mut after(0)), None);
        let mut used = |cost: Cost, seconds: u64| {
            let number = key.charge(&cost, false, &mut after(seconds));
            key.settle(&cost, number, &cost, &mut after(seconds));
            key.full_at(&mut after(seconds))
                .map(|full_at| full_at.duration_since(start))
        };
        assert_eq!(used(Cost::request(), 1), Some(Duration::from_millis(1_500)));
        assert_eq!(used(Cost::tokens(30), 2), Some(Duration::from_secs(32)));
        assert_eq!(used(Cost::none().with("quota", 1), 3), Some(Duration::from_secs(400)));
        assert!(key.full_at(&mut after(399)).is_some());
        assert_eq!(key.full_at(&mut after(400)), None);
    }
}
