//! [`StoreView`]: the store as its last reply described it.

use crate::rate::redis::{
    amounts::PerBudget,
    wire::{StoreReply, instant_after},
};
use tokio::time::{Duration, Instant};

#[derive(Default)]
pub(super) struct StoreView {
    /// The state that replied; 0 before the first reply.
    pub(super) incarnation: i64,
    /// How many requests that state had served.
    pub(super) sequence: i64,
    /// How many members it knows; 0 before the first reply.
    pub(super) members: u64,
    /// What is left at the end of the schedule.
    pub(super) left: PerBudget<Option<u64>>,
    /// The end of the schedule; `None` before the first reply.
    pub(super) scheduled_until: Option<Instant>,
    /// The latest reservation of this member.
    pub(super) last_reservation: Option<Instant>,
    /// Until when the store keeps the state.
    kept_until: Option<Instant>,
    /// When it replied first.
    pub(super) joined_at: Option<Instant>,
    /// How long a round trip takes: the longest of the recent ones.
    pub(super) round_trip: Duration,
}

impl StoreView {
    /// Whether the store still has the state that replied last, unless it has lost it.
    pub(super) fn is_kept(&self, now: Instant) -> bool {
        self.kept_until.is_some_and(|until| now < until)
    }

    /// Whether another state replies than before.
    pub(super) const fn is_replaced_by(&self, reply: &StoreReply) -> bool {
        self.incarnation != 0 && reply.incarnation != self.incarnation
    }

    pub(super) fn on_reply(&mut self, reply: &StoreReply, sent_at: Instant, now: Instant) {
        self.joined_at.get_or_insert(now);
        // It rises at once and falls slowly.
        self.round_trip = (self.round_trip * 15 / 16).max(now - sent_at);
        self.incarnation = reply.incarnation;
        self.sequence = reply.sequence;
        self.members = reply.members;
        self.left = reply.left;
        self.kept_until = Some(instant_after(reply.retention.saturating_mul(1_000).max(0), now));
        self.scheduled_until = Some(instant_after(reply.offset, now));
    }
}
