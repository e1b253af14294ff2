//! [`Start`]: what a limiter that follows a provider sends before the first response.
//!
//! Before the first response, nothing is known about the provider's buckets. Other clients of the account may have used
//! them up, so each call of a full bucket could be rejected. The first calls therefore take what the rate adds in a
//! second, and no more until a response is there, for at most [`HOLD`]. What this costs is at most that time, and only
//! where responses take longer: a provider that tells what is left has the rest used at once, and one that tells nothing
//! gets the rate from then on.
//!
//! This limits rates of at most a minute without an initial fill: requests, or a tenth of the burst of other budgets if
//! requests are not limited.

use super::{buckets::Buckets, budget::Budget, followed::LONGEST_CAUTIOUS, limits::Rate};
use crate::clock::LazyNow;

/// How long, in nanoseconds, the first calls wait at most for the first response.
const HOLD: u64 = 2_000_000_000;

/// How far the first calls are.
#[derive(Clone, Copy, Debug, Default)]
pub(super) enum Start {
    /// No call was sent.
    #[default]
    Idle,
    /// Calls were sent, and there are more that may be sent before the first response.
    Sending { until: u64 },
    /// No more may be sent until this time, or until the first response. The buckets were lowered by what they gain by
    /// then.
    Holding { until: u64 },
    /// The first response has come, or has not come in time.
    Over,
}

impl Buckets {
    /// Lowers the buckets to what the first calls may take before the first response. `is_new` adds the first request to
    /// an empty bucket, so that the first call can ask.
    pub(super) fn lower_to_start(&mut self, is_new: bool) {
        for (amount, (budget, bucket)) in self.start_amounts().into_iter().zip(&mut self.buckets) {
            if is_new && *budget == Budget::Requests && bucket.balance() < bucket.unit() as i128 {
                bucket.shift(bucket.unit() as i128 - bucket.balance());
            }
            if let Some(amount) = amount {
                bucket.lower(amount);
            }
        }
    }

    /// Called when a call is sent at `now`.
    pub(super) fn follow_start(&mut self, now: u64) {
        let start = self.followed.as_ref().map_or(Start::Over, |followed| followed.start);
        let until = match start {
            Start::Idle => {
                // The buckets have filled since the limiter was created.
                self.lower_to_start(false);
                now.saturating_add(HOLD)
            }
            Start::Sending { until } | Start::Holding { until } => until,
            Start::Over => return,
        };
        let next = match start {
            _ if now >= until => Start::Over,
            Start::Holding { .. } => start,
            _ if self.is_start_used() => {
                self.shift_held(|gain| -gain, until - now);
                Start::Holding { until }
            }
            _ => Start::Sending { until },
        };
        self.set_start(next);
    }

    /// Called at the first response. The buckets get back what was kept from them until then.
    pub(super) fn end_start(&mut self, now: &mut LazyNow) {
        let now = self.fill_for_following(now);
        if let Some(Start::Holding { until }) = self.followed.as_ref().map(|followed| followed.start) {
            self.shift_held(|gain| gain, until.saturating_sub(now));
        }
        self.set_start(Start::Over);
    }

    fn set_start(&mut self, start: Start) {
        if let Some(followed) = &mut self.followed {
            followed.start = start;
        }
    }

    /// Returns whether a bucket that is limited at the start holds less than one request or token.
    fn is_start_used(&self) -> bool {
        let mut buckets = self.start_amounts().into_iter().zip(&self.buckets);
        buckets.any(|(amount, (_, bucket))| amount.is_some() && bucket.balance() < bucket.unit() as i128)
    }

    /// Shifts the buckets that are limited at the start by what `units` returns for their gain in this time.
    fn shift_held(&mut self, units: impl Fn(i128) -> i128, time: u64) {
        for (amount, (_, bucket)) in self.start_amounts().into_iter().zip(&mut self.buckets) {
            if amount.is_some() {
                bucket.shift(units(bucket.gain(time)));
            }
        }
    }

    /// Returns for each rate what the first calls may take. `None` if that is not limited.
    fn start_amounts(&self) -> Vec<Option<u64>> {
        let is_cautious = |rate: &Rate| rate.period() <= LONGEST_CAUTIOUS && rate.initial.is_none();
        let mut requests = self.limits().rates().filter(|(budget, _)| *budget == Budget::Requests);
        let has_requests = requests.any(|(_, rate)| is_cautious(&rate));
        let amounts = self.limits().rates().map(|(budget, rate)| match budget {
            _ if !is_cautious(&rate) => None,
            Budget::Requests => Some((rate.amount() / rate.period().as_secs_f64()).max(1.0) as u64),
            _ if !has_requests => Some((rate.burst_amount() / 10.0).max(1.0) as u64),
            _ => None,
        });
        amounts.collect()
    }
}
