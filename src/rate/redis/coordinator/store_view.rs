//! [`StoreView`]: the state of the store, as its last reply to this member described it.

use crate::rate::{
    bucket::{Bucket, BucketSpec},
    cost::PerBudget,
    redis::{
        quota_config::QuotaConfig,
        wire::{StoreReply, instant_after, micros, system_clock},
    },
};
use tokio::time::{Duration, Instant};

/// How much earlier than it replies the store may drop the state, in microseconds: it does not set the time to live of
/// the state with every request. The script has the same number.
const EXPIRY_SLACK: i64 = 30_000_000;

#[derive(Default)]
pub(super) struct StoreView {
    /// Identifies the stored state that the last reply came from; 0 before the first reply.
    pub(super) incarnation: i64,
    /// How many requests of members the stored state had served at the last reply.
    pub(super) sequence: i64,
    /// How many members the store has counted; 0 before the first reply.
    pub(super) members: u64,
    /// What remains in the buckets at `scheduled_until`, after all reservations.
    pub(super) remaining: PerBudget<Option<u64>>,
    /// What is left of each rate that refuses calls or counts by the calendar, in the order of the limits.
    pub(super) left: Vec<u64>,
    /// What the store's clock showed at its last reply, in microseconds since 1970, and when that was here; `None` before
    /// the first reply.
    clock: Option<(i64, Instant)>,
    /// The end of the store's schedule: the time of the last reservation of any member, or of the last reply if that is
    /// later; `None` before the first reply.
    pub(super) scheduled_until: Option<Instant>,
    /// The time of the latest reservation that the store has made for this member.
    pub(super) last_reservation: Option<Instant>,
    /// Until when the store keeps the state if it receives no further request.
    kept_until: Option<Instant>,
    /// How long a round trip to the store takes: about the longest of the recent ones.
    pub(super) round_trip: Duration,
}

impl StoreView {
    /// Whether the store should still have, at `now`, the state that the last reply came from, because this has not
    /// expired. A store that does not have an unexpired state has lost it.
    pub(super) fn is_kept(&self, now: Instant) -> bool {
        self.kept_until.is_some_and(|until| now < until)
    }

    /// Returns what the store's clock showed at its last reply, in microseconds since 1970, and when that was here. Before
    /// the first reply, returns the same of the clock of this process.
    pub(super) fn clock(&self, now: Instant) -> (i64, Instant) {
        self.clock.unwrap_or_else(|| (system_clock(), now))
    }

    /// Returns what is left at `now` of each rate of `config` that refuses calls or counts by the calendar, by the last
    /// reply. Empty if that is not known.
    pub(super) fn left_at(&self, config: &QuotaConfig, now: Instant) -> Vec<u64> {
        let (shown, at) = self.clock(now);
        let specs = config.specs_with(&self.left);
        let allowances = specs.iter().filter(|(_, spec)| spec.kind.is_allowance());
        if allowances.clone().count() != self.left.len() {
            return Vec::new();
        }
        let elapsed = micros(now.saturating_duration_since(at)).unsigned_abs();
        let left = allowances.map(|(_, spec)| {
            let mut bucket = Bucket::new_at(*spec, shown.unsigned_abs());
            bucket.skip(elapsed);
            bucket.available()
        });
        left.collect()
    }

    /// Returns how long it takes until a bucket of the calendar that was left with `left` at the last reply, or is new
    /// before that, holds `amount`.
    pub(super) fn time_until(&self, spec: &BucketSpec, left: Option<u64>, amount: u128, now: Instant) -> Duration {
        let (shown, at) = self.clock(now);
        let left = left.filter(|_| self.clock.is_some());
        let initial = left.map_or(spec.initial, |left| i128::from(left) * spec.unit as i128);
        let mut bucket = Bucket::new_at(BucketSpec { initial, ..*spec }, shown.unsigned_abs());
        bucket.skip(micros(now.saturating_duration_since(at)).unsigned_abs());
        Duration::from_micros(bucket.time_until_sum(amount))
    }

    /// Whether `reply` comes from another stored state than the last reply.
    pub(super) const fn is_replaced_by(&self, reply: &StoreReply) -> bool {
        self.incarnation != 0 && reply.incarnation != self.incarnation
    }

    pub(super) fn on_reply(&mut self, reply: &StoreReply, sent_at: Instant, replied_at: Instant, now: Instant) {
        // The round trip time rises at once, and falls slowly: by a sixteenth with each reply.
        self.round_trip = (self.round_trip * 15 / 16).max(now - sent_at);
        self.incarnation = reply.incarnation;
        self.sequence = reply.sequence;
        self.members = reply.members;
        self.remaining = reply.remaining;
        self.left.clone_from(&reply.left);
        self.clock = Some((reply.now, replied_at));
        let kept = reply.retention.saturating_mul(1_000) - EXPIRY_SLACK;
        self.kept_until = Some(instant_after(kept.max(0), replied_at));
        self.scheduled_until = Some(instant_after(reply.offset, replied_at));
    }
}
