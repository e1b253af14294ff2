//! [`Followed`]: makes the buckets of a limiter follow those of a provider, which reports what they hold.
//!
//! A report is as of when the provider received the request, and arrives with the response. To be compared with what a
//! bucket holds now, it is carried forward by what was charged since then. Which calls the provider had counted by then
//! is known only within bounds, so the report gives a range: a bucket that holds more than its upper end is lowered, and
//! one that holds less than its lower end is raised. Between the two, nothing is changed.
//!
//! # The reserve
//!
//! The bucket aims at a *reserve* below what the provider holds. What is known at an instant is what the provider held
//! half a round trip ago, and what is sent now arrives half a round trip later. So whatever changes at the provider is
//! answered by calls that arrive a whole round trip after it. What the calls of that time take, at most rate x round
//! trip, has to be there already, or they are rejected. This is the reserve: it covers a limit that falls to any lower
//! one, and a second client that begins to use all of the rate. It is what the rate adds in a second and the cost of a
//! call (calls arrive earlier than evenly spaced ones would), at least what the rate adds in two seconds, and
//! for a client alone with a longer round trip, what the rate adds in that, up to 5 seconds. It falls slowly: if it fell
//! with the limit, the difference would be released at once, into a bucket that is empty by then.
//!
//! Nothing smaller could do: a shorter reserve rejects calls at each change, and a longer one changes nothing but what a
//! short job can use at once. Three and more clients with round trips of more than a second overshoot by more than the
//! reserve, as each answers the others' calls that late; their 429s lower the rates: see `provider::adapt`.
//!
//! The reserve also makes clients that share an account slow down together: each sees what the others have taken, goes
//! into debt for it, and sends again when the provider's bucket has filled above the reserve. All of them see the same
//! bucket and keep the same reserve, so their shares are about equal. Three and more clients whose round trips take a
//! second and more, or differ by as much, do not get equal shares.
//!
//! # Bounds
//!
//! A raise is bounded by what the *most* allows, the limits that the user has configured: a bucket of that rate and
//! burst, which is charged what the calls cost and is never raised. So no window of length T admits more than the
//! configured `burst + rate x T`, whatever a provider reports.
//!
//! A bucket by the calendar is only lowered. It gains nothing before its window ends, so what is gone stays gone, and a
//! raise could admit more than the configured amount in one window.

use super::{
    amount::Amount,
    bucket::Bucket,
    buckets::Buckets,
    budget::Budget,
    follow_start::Start,
    level_history::LevelHistory,
    limits::{Limits, Rate},
};
use crate::clock::LazyNow;
use std::time::Duration;

/// How long, in nanoseconds, calls may overtake each other on their way to the provider: half the time that the
/// response took, within these bounds. A call that was charged by so much earlier may not be counted in a report.
const MIN_SKEW: u64 = 10_000_000;
const MAX_SKEW: u64 = 1_000_000_000;
/// For how long, in nanoseconds, a bucket is raised by half steps at first, and after others have used the provider's
/// bucket, so that two clients that see the same amount do not both take all of it.
const CONTENDED: u64 = 10_000_000_000;
const SECOND: u64 = 1_000_000_000;
/// The least and the longest time, in nanoseconds, whose gain is kept in reserve.
const RESERVE: u64 = 2 * SECOND;
const MAX_RESERVE: u64 = 5 * SECOND;
/// The lowest rate that a provider can set, as a share of the configured one.
const MIN_TOLD: f64 = 0.01;
/// Rates with at most this period begin with little, until the first report.
pub(super) const LONGEST_CAUTIOUS: Duration = Duration::from_secs(60);

/// The state of a limiter whose buckets follow a provider's.
pub(super) struct Followed {
    /// One for each bucket of the limiter, in the same order.
    rates: Vec<FollowedRate>,
    /// The budget and the period of each rate, to tell whether other limits have the same rates.
    keys: Vec<(Budget, Duration)>,
    /// The last time that was recorded, in nanoseconds since the limiter's epoch. Each record has a time of its own.
    last_record: u64,
    pub(super) start: Start,
}

/// What is known about the provider's bucket of one rate.
#[derive(Default)]
struct FollowedRate {
    /// The lowest and the highest levels of our bucket in the past. The highest are stored as negative numbers.
    lows: LevelHistory,
    highs: LevelHistory,
    /// The level at the last record, without and with settlements. `None` before the first record.
    last: Option<(u64, i128, i128)>,
    /// What a call costs on average, in units.
    cost: f64,
    /// The number of units in one request or token at the last record.
    unit: u128,
    most: Most,
    /// The capacity of the provider's bucket, as far as reports tell it.
    capacity: Option<u64>,
    /// When the bucket was last raised. Calls that were sent before do not raise it again.
    raised: Option<u64>,
    /// Whether the cost of one call was added since, to ask for a report that shows what others have taken meanwhile.
    is_probed: bool,
    /// Until when others are taken to use the provider's bucket, too.
    contended_until: u64,
    /// How long a response takes, in nanoseconds, on average. 0 before the first one.
    round_trip: u64,
    /// What is kept in reserve, in units, and since when.
    reserve: i128,
    reserved_at: u64,
}

/// A bucket with the configured rate and burst, which bounds what a raise may give. In requests or tokens.
#[derive(Default)]
struct Most {
    held: f64,
    burst: f64,
    per_nano: f64,
}

/// What a provider has reported about one of its buckets.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Report {
    /// What the bucket held when the provider received the call.
    pub(crate) remaining: u64,
    /// What the bucket can hold, if that is known.
    pub(crate) capacity: Option<u64>,
    /// The [stamp](Buckets::stamp_sent) of the call.
    pub(crate) stamp: u64,
    /// Whether no other call was on its way when the call was sent.
    pub(crate) is_alone: bool,
}

/// What is known about a provider's bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FollowedLevel {
    pub(crate) level: u64,
    pub(crate) capacity: Option<u64>,
}

// === impl Followed ===

impl Followed {
    fn new(most: &Limits, now: u64) -> Self {
        Self {
            rates: most.rates().map(|(_, rate)| FollowedRate::new(rate)).collect(),
            keys: keys(most),
            last_record: now,
            start: Start::default(),
        }
    }

    /// Called when the limits were replaced by `limits`, with their buckets. The levels are converted to the units of the
    /// new buckets, so that reports about calls in flight are still understood.
    fn on_limits_changed(&mut self, limits: &Limits, buckets: &[(Budget, Bucket)]) {
        if keys(limits) == self.keys {
            for (rate, (_, bucket)) in self.rates.iter_mut().zip(buckets) {
                rate.convert_levels(bucket);
            }
        } else {
            *self = Self::new(limits, self.last_record);
        }
    }

    /// Called when the clock was set back.
    pub(super) fn on_step_back(&mut self) {
        self.last_record = 0;
        for rate in &mut self.rates {
            rate.forget_levels();
            (rate.raised, rate.contended_until) = (None, 0);
        }
    }
}

fn keys(limits: &Limits) -> Vec<(Budget, Duration)> {
    limits.rates().map(|(budget, rate)| (budget, rate.period())).collect()
}

// === impl FollowedRate ===

impl FollowedRate {
    fn new(most: Rate) -> Self {
        let burst = most.burst_amount();
        Self {
            most: Most {
                held: burst,
                burst,
                per_nano: most.amount() / most.period().as_nanos() as f64,
            },
            ..Self::default()
        }
    }

    /// Converts all levels to the units of `bucket`, which has replaced the one of the last record at that time.
    fn convert_levels(&mut self, bucket: &Bucket) {
        let Some((at, flow, _)) = self.last.filter(|_| self.unit > 0) else {
            return;
        };
        let level = bucket.level();
        let new_flow = level.wrapping_sub(bucket.settled());
        let ratio = bucket.unit() as f64 / self.unit as f64;
        let convert = |old: i128, base: i128, new_base: i128| {
            let difference = old.wrapping_sub(base) as f64 * ratio;
            new_base.wrapping_add(difference as i128)
        };
        self.lows.convert(|low| convert(low, flow, new_flow));
        self.highs
            .convert(|high| convert(high, flow.wrapping_neg(), new_flow.wrapping_neg()));
        self.cost *= ratio;
        self.reserve = (self.reserve as f64 * ratio) as i128;
        self.unit = bucket.unit();
        self.last = Some((at, new_flow, level));
    }

    fn forget_levels(&mut self) {
        (self.lows, self.highs) = Default::default();
        (self.last, self.cost) = (None, 0.0);
    }

    /// Records the level of the bucket at the time `at`, to which `pending` units are still to be filled. Returns the
    /// level without settlements.
    fn record(&mut self, bucket: &Bucket, pending: i128, at: u64) -> i128 {
        let level = bucket.level().wrapping_add(pending);
        let flow = level.wrapping_sub(bucket.settled());
        let mut highest = flow;
        if let Some((last, last_flow, last_level)) = self.last {
            let elapsed = at - last;
            let gained = bucket.gain(elapsed);
            // Between the two records, the level was highest if all charges came last.
            let possible = last_flow.wrapping_add(gained);
            if possible.wrapping_sub(flow) > 0 {
                highest = possible;
            }
            let charged = possible.wrapping_sub(flow).max(0) as f64;
            self.cost += (charged - self.cost) * if self.cost > 0.0 { 0.125 } else { 1.0 };
            let used = last_level.wrapping_add(gained).wrapping_sub(level) as f64 / bucket.unit() as f64;
            let filled = self.most.held + elapsed as f64 * self.most.per_nano;
            self.most.held = (filled.min(self.most.burst) - used).min(self.most.burst);
        }
        self.unit = bucket.unit();
        self.lows.record(at, flow);
        self.highs.record(at, highest.wrapping_neg());
        self.last = Some((at, flow, level));
        flow
    }

    /// Returns how much of the provider's bucket is kept in reserve, in units.
    fn reserve(&self, bucket: &Bucket) -> i128 {
        let capacity = self
            .capacity
            .map_or(bucket.capacity(), |capacity| bucket.units(capacity));
        self.reserve.min(capacity.min(bucket.capacity()) / 4)
    }

    /// Sets the reserve to what it should be at the time `now`. It rises at once, and falls slowly.
    fn update_reserve(&mut self, bucket: &Bucket, now: u64) {
        let cost = (self.cost as i128).max(bucket.unit() as i128);
        // Clients with different round trips would otherwise keep different reserves, and take unequal shares.
        let is_contended = now < self.contended_until;
        let trip = if is_contended {
            0
        } else {
            self.round_trip.min(MAX_RESERVE)
        };
        let target = bucket.gain(RESERVE).max(bucket.gain(trip.max(SECOND)) + cost);
        let fall = bucket.gain(now.saturating_sub(self.reserved_at)) / 4;
        self.reserve = target.max(self.reserve.saturating_sub(fall));
        self.reserved_at = now;
    }

    /// Moves the bucket into the range that `report` gives. `now` is the time of the present record, `flow` the level
    /// that it recorded, and `budget` what the bucket counts.
    fn apply(&mut self, bucket: &mut Bucket, pending: i128, flow: i128, now: u64, budget: Budget, report: &Report) {
        let remaining = bucket.units(report.remaining);
        if let Some(capacity) = report.capacity {
            self.capacity = Some(capacity.max(report.remaining));
        }
        let Some(lowest) = self.lows.lowest_since(report.stamp) else {
            // What was charged since is not known, for example because the limits were changed.
            bucket.lower_before(report.remaining, now.saturating_sub(report.stamp));
            return;
        };
        let age = now.saturating_sub(report.stamp);
        let trip = self.round_trip;
        self.round_trip = if trip == 0 { age } else { trip - trip / 8 + age / 8 };
        if bucket.is_by_calendar() {
            // Nothing flows back before the window ends, so what others have taken is gone, and no reserve is needed. A
            // raise could admit more than the configured amount in one window.
            let left = remaining.saturating_add(flow.wrapping_sub(lowest));
            let above = bucket.balance().saturating_sub(left);
            if above > 0 {
                bucket.shift(-above);
            }
            return;
        }
        self.update_reserve(bucket, now);
        let skew = (age / 2).clamp(MIN_SKEW, MAX_SKEW);
        let since = if report.is_alone {
            report.stamp + 1
        } else {
            report.stamp.saturating_sub(skew).max(self.highs.since().unwrap_or(0))
        };
        let highest = self.highs.lowest_since(since).map_or(flow, i128::wrapping_neg);
        let reserve = self.reserve(bucket);
        let upper = remaining
            .saturating_add(flow.wrapping_sub(lowest))
            .saturating_sub(reserve);
        let mut lower = remaining
            .saturating_add(flow.wrapping_sub(highest))
            .saturating_sub(reserve);
        if budget == Budget::OutputTokens {
            // The tokens of an answer are counted when they are there, so the report lacks those of calls in flight.
            lower = lower.saturating_sub(bucket.estimated());
        }
        let balance = bucket.balance().saturating_add(pending);
        if balance > upper {
            bucket.shift(upper.saturating_sub(balance));
            // Rounding and the skew of the calls explain less than half the reserve.
            if balance.saturating_sub(upper) > reserve / 2 {
                self.contended_until = now.saturating_add(CONTENDED);
            }
            return;
        }
        let missing = lower.min(bucket.capacity()).saturating_sub(balance);
        if missing <= 0 || self.raised.is_some_and(|raised| report.stamp <= raised) {
            return;
        }
        // A call that was sent just after a raise was counted before what others have sent at the same time.
        let is_early = self
            .raised
            .is_some_and(|raised| report.stamp < raised.saturating_add(age.min(MAX_SKEW)));
        if is_early && self.is_probed {
            return;
        }
        if self.raised.is_none() {
            // Whether others begin at the same time is not known yet.
            self.contended_until = now.saturating_add(CONTENDED);
        }
        let is_contended = now < self.contended_until;
        let step = match (is_early, is_contended) {
            (true, _) => missing.min((self.cost as i128).max(bucket.unit() as i128)),
            (false, true) => missing - missing / 2,
            (false, false) => missing,
        };
        let most = (self.most.held * bucket.unit() as f64).min(bucket.capacity() as f64) as i128;
        let step = step.min(most.saturating_sub(balance));
        if step > 0 {
            bucket.shift(step);
            self.is_probed = is_early;
            if !is_early {
                self.raised = Some(now);
            }
        }
    }

    /// Lowers the bucket to what the provider's can hold: it gains more only when the provider's does. A bucket of
    /// requests about which nothing is known holds a second's.
    fn trim(&self, bucket: &mut Bucket, pending: i128, (budget, period): (Budget, Duration)) {
        if bucket.is_by_calendar() {
            return;
        }
        let most = match self.capacity {
            Some(capacity) => bucket.units(capacity).saturating_sub(self.reserve(bucket)),
            None if budget == Budget::Requests && period <= LONGEST_CAUTIOUS => {
                bucket.gain(SECOND).max(bucket.unit() as i128)
            }
            None => return,
        };
        let above = bucket.balance().saturating_add(pending).saturating_sub(most);
        if above > 0 {
            bucket.shift(-above);
        }
    }
}

// === impl Limits ===

impl Limits {
    /// Returns these limits with the amount of each rate lowered to what the provider has `told` for it, but not below a
    /// hundredth, so that a wrong report cannot stop all calls. The bursts stay, so that a call that needs one waits and
    /// does not fail.
    pub(crate) fn lowered_to(&self, told: impl IntoIterator<Item = Option<u64>>) -> Self {
        let mut limits = Self::new();
        for ((budget, rate), told) in self.rates().zip(told) {
            let told = told.map(|told| told as f64).filter(|told| *told < rate.amount());
            let rate = told.map_or(rate, |told| {
                let least = rate.amount.scaled(MIN_TOLD);
                let amount = if told < least.value() {
                    least
                } else {
                    Amount::from(told as u64)
                };
                let burst = if rate.amount() < 1.0 {
                    Amount::from(1_u64)
                } else {
                    rate.amount
                };
                // A bucket by the calendar has no burst of its own.
                let burst = rate.kind.calendar.is_none().then(|| rate.burst.unwrap_or(burst));
                Rate { amount, burst, ..rate }
            });
            limits = limits.budget(budget, rate);
        }
        limits
    }
}

// === impl Buckets ===

impl Buckets {
    /// Makes the buckets follow those of a provider, up to `most`, which must have the rates of the current limits. With
    /// `is_start`, they are lowered to what the first calls may take: see [`follow_start`](super::follow_start).
    pub(super) fn follow(&mut self, most: &Limits, is_start: bool, now: &mut LazyNow) {
        let now = self.fill_for_following(now);
        self.followed = Some(Box::new(Followed::new(most, now)));
        self.on_limits_changed();
        self.record_levels(now);
        if is_start {
            self.lower_to_start(true);
        }
    }

    /// Records the levels at the time `now`, up to which the buckets are filled, before other limits replace them.
    pub(super) fn before_limits_change(&mut self, now: u64) {
        self.record_levels(now);
    }

    /// Called after the limits and the buckets were replaced.
    pub(super) fn on_limits_changed(&mut self) {
        let limits = self.limits().clone();
        if let Some(followed) = &mut self.followed {
            followed.on_limits_changed(&limits, &self.buckets);
        }
    }

    /// Records that a call is sent now, and returns the stamp of this record, by which [`report`](Self::report) knows
    /// the call.
    pub(super) fn stamp_sent(&mut self, now: &mut LazyNow) -> u64 {
        let now = self.fill_for_following(now);
        self.follow_start(now);
        let stamp = self.record_levels(now);
        let filled_to = self.filled_to;
        if let Some(followed) = &mut self.followed {
            let rates = followed.rates.iter().zip(&followed.keys);
            for ((rate, key), (_, bucket)) in rates.zip(&mut self.buckets) {
                let pending = bucket.gain(now.saturating_sub(filled_to));
                rate.trim(bucket, pending, *key);
            }
        }
        stamp
    }

    /// Moves the bucket of the rate at `index` to what the provider has reported.
    pub(super) fn report(&mut self, index: usize, report: &Report, now: &mut LazyNow) {
        let now = self.fill_for_following(now);
        let at = self.record_levels(now);
        let filled_to = self.filled_to;
        let Some(followed) = &mut self.followed else { return };
        let (Some(rate), Some((budget, bucket))) = (followed.rates.get_mut(index), self.buckets.get_mut(index)) else {
            return;
        };
        let Some((_, flow, _)) = rate.last else { return };
        let pending = bucket.gain(now.saturating_sub(filled_to));
        rate.apply(bucket, pending, flow, at, *budget, report);
    }

    /// Returns what is known about the provider's buckets, in the order of the limits.
    pub(super) fn followed_levels(&mut self, now: &mut LazyNow) -> Vec<FollowedLevel> {
        let now = self.fill_for_following(now);
        let filled_to = self.filled_to;
        let Some(followed) = &self.followed else {
            return Vec::new();
        };
        let levels = followed.rates.iter().zip(&self.buckets).map(|(rate, (_, bucket))| {
            let pending = bucket.gain(now.saturating_sub(filled_to));
            let level = bucket
                .balance()
                .saturating_add(pending)
                .saturating_add(rate.reserve(bucket));
            let level = u64::try_from(level.max(0) as u128 / bucket.unit()).unwrap_or(u64::MAX);
            FollowedLevel {
                level: rate.capacity.map_or(level, |capacity| level.min(capacity)),
                capacity: rate.capacity,
            }
        });
        levels.collect()
    }

    /// Fills the buckets if no call waits, and returns the time. While calls wait, what the buckets have gained since
    /// they were filled is pending.
    pub(super) fn fill_for_following(&mut self, now: &mut LazyNow) -> u64 {
        self.fill_if_idle(now);
        self.time(now).max(self.filled_to)
    }

    /// Records the levels of all buckets at the time `now`, and returns the stamp of the record: `now`, or a time just
    /// after it that no other record has.
    fn record_levels(&mut self, now: u64) -> u64 {
        let filled_to = self.filled_to;
        let Some(followed) = &mut self.followed else { return now };
        let stamp = now.max(followed.last_record.saturating_add(1));
        followed.last_record = stamp;
        for (rate, (_, bucket)) in followed.rates.iter_mut().zip(&self.buckets) {
            let pending = bucket.gain(now.saturating_sub(filled_to));
            rate.record(bucket, pending, stamp);
        }
        stamp
    }
}
