//! [`LocalFallback`]: the buckets by which a member admits calls without the store, while the store is lost.

use super::{
    quota_config::{LATENESS, QuotaConfig},
    wire::{instant_after, micros, system_time},
};
use crate::{
    error::Exhausted,
    rate::{bucket::Bucket, budget::Budget, cost::Cost},
};
use tokio::time::{Duration, Instant};

/// How far into the future the local fallback makes reservations.
const MAX_AHEAD: Duration = Duration::from_millis(100);

/// Admits calls at one of several equal shares of the rates. The fallback saves nothing up while no call waits, except for
/// rates that refuse calls or count by the calendar: its share of these is used up once.
pub(super) struct LocalFallback {
    generation: u64,
    /// The buckets of this member's share of the limits; they count time in microseconds.
    buckets: Vec<(Budget, Bucket)>,
    share: Option<LocalShare>,
    /// The time that the balances stand for, which is the time of the last reservation, or later. The fallback begins to
    /// admit calls at the first one: until then members may use reservations that the store made before it was lost.
    scheduled_until: Instant,
    /// Whether a call waits for the buckets to fill.
    is_filling: bool,
    /// When to make reservations for the waiters in the queue again; `None` if that may be done at once.
    pub(super) retry_at: Option<Instant>,
}

/// One member's share of the limits.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct LocalShare {
    pub(super) limits: QuotaConfig,
    /// What the store's clock showed at its last reply, in microseconds since 1970, and when that was here. What is left
    /// of the windows of the calendar is that of this time.
    pub(super) clock: (i64, Instant),
}

impl LocalFallback {
    /// `generation` is a number that no earlier fallback of this member had. Reservations carry it, so that each is
    /// settled with the fallback that made it.
    pub(super) const fn new(generation: u64, begins_at: Instant) -> Self {
        Self {
            generation,
            buckets: Vec::new(),
            share: None,
            scheduled_until: begins_at,
            is_filling: false,
            retry_at: None,
        }
    }

    pub(super) const fn generation(&self) -> u64 {
        self.generation
    }

    /// Reserves `costs` in order, but nothing further than 100 ms into the future, and returns when each of the reserved
    /// ones is admitted, or why a rate refuses it.
    ///
    /// `share` is this member's share of the limits. No call is admitted before `paused_until`.
    pub(super) fn reserve(
        &mut self,
        share: LocalShare,
        costs: &[Cost],
        paused_until: Option<Instant>,
        now: Instant,
    ) -> Vec<Result<Instant, Exhausted>> {
        self.set_share(share);
        if now > self.scheduled_until {
            self.advance_to(now);
            if !self.is_filling {
                let buckets = self.buckets.iter_mut().map(|(_, bucket)| bucket);
                buckets.filter(|bucket| !bucket.is_allowance()).for_each(Bucket::empty);
            }
        }
        (self.is_filling, self.retry_at) = (false, None);
        let mut reserved = Vec::new();
        for cost in costs {
            if let Some(exhausted) = self.exhausted(cost, now) {
                reserved.push(Err(exhausted));
                continue;
            }
            let waits = self.buckets.iter();
            let waits = waits.map(|(budget, bucket)| bucket.time_until(cost.of(*budget)));
            let wait = i64::try_from(waits.fold(0, u64::max)).unwrap_or(i64::MAX);
            let filled_at = instant_after(wait, self.scheduled_until);
            let admitted_at = paused_until.map_or(filled_at, |until| filled_at.max(until));
            if admitted_at > now + MAX_AHEAD {
                self.is_filling = true;
                self.retry_at = Some(admitted_at - MAX_AHEAD);
                break;
            }
            self.advance_to(admitted_at);
            for (budget, bucket) in &mut self.buckets {
                bucket.take_reserved(cost.of(*budget), LATENESS as u64);
            }
            reserved.push(Ok(admitted_at));
        }
        reserved
    }

    /// Returns why the share of a rate that refuses calls does not admit one of this cost.
    fn exhausted(&self, cost: &Cost, now: Instant) -> Option<Exhausted> {
        let (shown, at) = self.share.as_ref()?.clock;
        let caps = self.buckets.iter().filter(|(_, bucket)| bucket.refuses());
        let mut waits = caps.map(|(budget, bucket)| (*budget, bucket, bucket.time_until(cost.of(*budget))));
        let (budget, bucket, wait) = waits.find(|(.., wait)| *wait > 0)?;
        let held_at = instant_after(i64::try_from(wait).unwrap_or(i64::MAX), self.scheduled_until);
        let resets_at = shown.saturating_add(micros(held_at.saturating_duration_since(at)));
        Some(Exhausted::new(
            budget.name(),
            cost.of(budget),
            bucket.available(),
            held_at.saturating_duration_since(now).max(Duration::from_micros(1)),
            system_time(resets_at),
        ))
    }

    /// Takes over another share of the limits. What is in the buckets stays there.
    fn set_share(&mut self, share: LocalShare) {
        let is_same = |before: &LocalShare| before.limits == share.limits;
        if self.share.as_ref().is_some_and(is_same) {
            return;
        }
        let (shown, at) = share.clock;
        let mut new = share.limits.buckets(shown);
        let since = micros(self.scheduled_until.saturating_duration_since(at));
        new.iter_mut().for_each(|(_, bucket)| bucket.skip(since.unsigned_abs()));
        if let Some(before) = &self.share {
            let matches = share.limits.limits().match_rates(before.limits.limits());
            for ((_, new), old) in new.iter_mut().zip(matches) {
                if let Some(old) = old {
                    new.carry_over(&self.buckets[old].1);
                }
            }
        }
        (self.buckets, self.share) = (new, Some(share));
    }

    fn advance_to(&mut self, time: Instant) {
        // Whole microseconds are added, and the rest is left for the next time.
        let elapsed = micros(time.saturating_duration_since(self.scheduled_until));
        self.buckets
            .iter_mut()
            .for_each(|(_, bucket)| bucket.advance(elapsed.unsigned_abs()));
        self.scheduled_until = instant_after(elapsed, self.scheduled_until);
    }
}
