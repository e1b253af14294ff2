//! [`VirtualSchedule`]: the Rust version of the script (`read_state.lua` and `reserve.lua`), in the same steps. Both give exactly equal replies.
//!
//! All buckets of a quota are filled and charged up to one common time, the end of the schedule. This is the time of
//! the last reservation, so it may lie in the future. The next reservation is made at the earliest time from there on
//! at which *all* buckets have enough, and is charged as of that time. So calls are admitted in order, nothing is
//! charged before it is used, and at most `burst + rate x T` is admitted in any window of length T.
//!
//! Only tests use it: one compares the script with it, and others use it in place of a server. Callers pass the time, in
//! microseconds. The schedule holds no lock, clock or timer.

mod windows_left;

use self::windows_left::WindowsLeft;
use super::{
    amounts::Amounts,
    quota_config::{LATENESS, QuotaConfig, buckets},
    wire::{Member, RefusedCost, StoreReply, StoreRequest},
};
use crate::rate::{
    bucket::Bucket,
    budget::Budget,
    cost::PerBudget,
    pause::{PauseSource, Pauses},
};
use std::{collections::HashMap, sync::Arc};

/// A member that has sent no request to the store for this many microseconds is removed: it is no longer counted, and
/// its estimates are no longer refunded.
const MEMBER_EXPIRY: i64 = 15_000_000;
/// The interval at which the schedule looks for expired members to remove, in microseconds.
const SWEEP_INTERVAL: i64 = 1_000_000;
/// If members lost the store at the same time, and one of them has reached it again, all others are assumed to reach it
/// within this many microseconds.
const RETURN_TIME: i64 = 1_500_000;
/// How long a member counts as one with more demand than it was given, in microseconds, after a request of which that
/// was true.
const DEMAND_EXPIRY: i64 = 500_000;
/// How long a claim lasts if its member sends no further request, in microseconds.
const CLAIM_EXPIRY: i64 = 2_500_000;
/// For how long, in microseconds, a member that was given more than its part may be given less than it.
const MAX_SERVED: i64 = 60_000_000;
/// How much longer the state is kept than until its buckets are full and its pause has ended, in milliseconds.
const MIN_RETENTION: i64 = 60_000;

/// The state of one quota, as the store keeps it; empty before the first request.
#[derive(Clone, Debug, Default)]
pub(super) struct VirtualSchedule {
    state: Option<QuotaState>,
}

/// The stored state of a quota, like the list in [`script`](super::script). Times are in microseconds.
#[derive(Clone, Debug)]
struct QuotaState {
    /// Distinguishes this stored state from earlier ones that were lost: the time of its creation, or a larger number.
    incarnation: i64,
    /// How many requests of members this state has served.
    sequence: i64,
    /// What the clock showed at the last request.
    clock: i64,
    /// When the last request arrived that was not a probe (a request that only finds out whether a lost store is back).
    last_contact: i64,
    /// The time that the balances of the buckets stand for: the refills up to this time have been added, and all
    /// reservations have been subtracted. It is the time of the last reservation, so it may lie in the future.
    scheduled_until: i64,
    /// When the pause of each source ends or has ended; 0 if there was none.
    pauses: Pauses<i64>,
    /// The version of the limits in force: a later one is larger.
    config_version: i64,
    /// Whether this state began with full buckets, because the first member to send a request had seen no earlier
    /// state; `false` once a member reports that there was one.
    began_full: bool,
    /// When the schedule last looked for members to remove.
    swept_at: i64,
    /// When the buckets were last emptied; 0 if never.
    emptied_at: i64,
    /// The sum of all unsettled estimates of the members.
    estimated: Amounts,
    config: Arc<QuotaConfig>,
    /// The limits, as a text, that one member was started with: the member that brought the limits in force.
    configured_as: String,
    buckets: Vec<(Budget, Bucket)>,
    /// What was left of the windows of the calendar when this state began, as far as is known.
    began_with: WindowsLeft,
    members: HashMap<Member, MemberEntry>,
    /// How many members have more demand than they were given: those whose `wants_until` is after `swept_at`.
    wanting: i64,
    claim: Claim,
}

/// The place at the head of all members of a cost that has to wait for longer than `max_ahead`.
#[derive(Clone, Copy, Debug, Default)]
struct Claim {
    member: Member,
    /// Until when the claim lasts; 0 if there is none.
    until: i64,
    /// When the cost is expected to be admitted.
    admitted_at: i64,
}

/// What the stored state keeps of a member.
#[derive(Clone, Copy, Debug)]
struct MemberEntry {
    /// When the member sent its last request.
    seen_at: i64,
    /// The member's unsettled estimates.
    estimated: Amounts,
    /// The number of the member's last batch of corrections.
    batch: i64,
    /// Up to when the member was given its part of the schedule.
    served_until: i64,
    /// Until when the member counts as one with more demand than it was given.
    wants_until: i64,
}

/// What was reserved for the costs of a request to the store.
struct Reserved {
    amounts: Amounts,
    /// In how many microseconds each reserved cost is admitted. These are the first costs of the request that are not
    /// refused.
    delays: Vec<i64>,
    refused: Vec<RefusedCost>,
    /// In how many microseconds to request the other costs again, if `max_ahead` has prevented their reservation;
    /// otherwise 0.
    retry_in: i64,
}

impl VirtualSchedule {
    /// Serves `request` when the clock shows `now`, in microseconds, and returns the reply.
    pub(super) fn handle(&mut self, request: &StoreRequest, now: i64) -> StoreReply {
        let state = self.state.get_or_insert_with(|| QuotaState::new(request, now));
        state.set_clock(now);
        let is_stale = state.hold_for_lost_state(request);
        state.adopt_limits(request);

        if now > state.scheduled_until {
            state.advance_to(now);
        }
        for source in PauseSource::ALL {
            match request.pauses.of(source) {
                ..0 => {}
                pause if source == PauseSource::Provider && pause > 0 => {
                    state.pauses.extend(source, now + pause, now);
                }
                pause => {
                    state.pauses.set(source, now + pause, now);
                }
            }
        }
        if request.config.text() == state.config.text() {
            for (position, remaining) in &request.lowered {
                state.buckets[*position].1.lower(*remaining);
            }
        }
        state.expire_members();

        let before = state.members.get(&request.member).copied();
        let is_known = before.is_some() && !is_stale;
        let estimated = state.settle(request, before, is_known);
        let demand = before.map_or((now, 0), |before| (before.served_until.max(now), before.wants_until));
        let (mut served_until, mut wants_until) = demand;
        let reserved = state.reserve(request, &mut served_until, &mut wants_until);

        state.sequence += 1;
        if request.is_leaving {
            state.members.remove(&request.member);
        } else {
            let entry = MemberEntry {
                seen_at: now,
                estimated: estimated.saturating_add(reserved.amounts),
                batch: match before {
                    Some(before) if request.is_probe => before.batch,
                    _ => request.batch,
                },
                served_until,
                wants_until,
            };
            state.members.insert(request.member, entry);
        }
        StoreReply {
            sequence: state.sequence,
            incarnation: state.incarnation,
            config_version: state.config_version,
            pauses: state.pauses.map(|until| (until - now).max(0)),
            members: state.members.len() as u64,
            is_known,
            is_claiming: state.claim.until > now && state.claim.member == request.member,
            retention: state.retention(),
            offset: state.scheduled_until - now,
            remaining: state.remaining(request.config.budgets()),
            retry_in: reserved.retry_in,
            now,
            delays: reserved.delays,
            refused: reserved.refused,
            left: state.left(),
            config: (state.config_version != request.config_version).then(|| state.config.text().to_owned()),
        }
    }

    pub(super) fn lose_state(&mut self) {
        self.state = None;
    }
}

impl QuotaState {
    /// Creates the state when its first request arrives. The buckets begin as the limits define, but empty if the
    /// member has seen an earlier state, which must have been lost.
    fn new(request: &StoreRequest, now: i64) -> Self {
        let is_first = request.incarnation == 0;
        let mut state = Self {
            incarnation: if is_first {
                now
            } else {
                now.max(request.incarnation + 1)
            },
            sequence: 0,
            clock: now,
            last_contact: 0,
            scheduled_until: now,
            pauses: Pauses::default(),
            config_version: if request.config_version == 0 {
                now
            } else {
                request.config_version
            },
            began_full: is_first,
            swept_at: now,
            emptied_at: 0,
            estimated: Amounts::default(),
            config: request.config.clone(),
            configured_as: request.configured_as.clone(),
            buckets: buckets(&request.config.specs_with(&request.left), now),
            began_with: WindowsLeft::default(),
            members: HashMap::new(),
            wanting: 0,
            claim: Claim::default(),
        };
        state.began_with.record(&state.buckets, now);
        if !is_first {
            // How much the other members have taken from the lost state cannot be found out, so the buckets
            // begin empty.
            state.hold(request.max_ahead, true);
        }
        state
    }

    /// Sets the clock. If it went back since the last request, all stored times are moved back with it, so that no time
    /// has passed.
    fn set_clock(&mut self, now: i64) {
        let back = self.clock - now;
        if back > 0 {
            self.scheduled_until -= back;
            self.pauses = self.pauses.map(|until| (until - back).max(0));
            self.swept_at -= back;
            self.emptied_at -= back;
            self.last_contact -= back;
            for member in self.members.values_mut() {
                member.seen_at -= back;
                member.served_until -= back;
                member.wants_until -= back;
            }
            self.claim.until -= back;
            self.claim.admitted_at -= back;
            for (_, bucket) in &mut self.buckets {
                bucket.step_back(back.unsigned_abs());
            }
        }
        self.clock = now;
    }

    /// Finds out whether the member's last reply came from a state that is lost. If so, returns `true`, and reserves
    /// nothing for the time in which reservations of the lost state may be used.
    fn hold_for_lost_state(&mut self, request: &StoreRequest) -> bool {
        if request.incarnation == 0 {
            return false;
        }
        if request.incarnation != self.incarnation {
            if self.began_full {
                // This state began with full buckets, because the member that created it did not know of the lost
                // state. So the buckets are emptied now.
                self.hold(request.max_ahead, true);
            } else {
                self.hold(request.last_reservation.min(request.max_ahead), false);
            }
            self.began_full = false;
            self.lower_windows(request);
            return true;
        }
        if self.sequence < request.sequence {
            // The server went back to an old snapshot, or to a replica that lagged behind, so that this state is older
            // than the member's last reply.
            self.hold(request.max_ahead, true);
            self.incarnation = self.clock.max(self.incarnation + 1);
            self.began_full = false;
            self.sequence = request.sequence;
            self.forget_members();
            self.began_with.record(&self.buckets, self.scheduled_until);
            self.lower_windows(request);
            return true;
        }
        false
    }

    /// Lowers the buckets of the calendar to what the member has seen of a lost state: by as much as the lost state had
    /// less left than this one began with. What was taken since then stays taken.
    fn lower_windows(&mut self, request: &StoreRequest) {
        if request.config.text() == self.config.text() {
            let specs = request.config.specs_with(&request.left);
            let left: Vec<_> = specs.iter().map(|(_, spec)| spec.initial).collect();
            self.began_with.lower(&mut self.buckets, &left, self.scheduled_until);
        }
    }

    /// Takes over the limits of the request if the member sets them or has a newer version of them. A member that has
    /// just started brings its limits too, unless they are in force or were replaced since.
    fn adopt_limits(&mut self, request: &StoreRequest) {
        let is_new = request.config_version == 0
            && request.configured_as != self.configured_as
            && request.config.text() != self.config.text();
        if request.is_change || request.config_version > self.config_version || is_new {
            let version = if request.is_change || request.config_version == 0 {
                self.clock.max(self.config_version + 1)
            } else {
                request.config_version
            };
            if self.configure(request, version) {
                // Earlier estimates were never charged to a new bucket, so they must not be refunded to it.
                self.forget_members();
            }
        }
    }

    /// Replaces the limits by those of the request. Each rate takes over the bucket of the old rate that
    /// [`match_rates`](crate::Limits::match_rates) finds for it. Returns whether a bucket is new, because its budget had
    /// fewer rates before.
    fn configure(&mut self, request: &StoreRequest, version: i64) -> bool {
        let mut new = buckets(&request.config.specs_with(&request.left), self.scheduled_until);
        self.began_with.record(&new, self.scheduled_until);
        let matches = request.config.limits().match_rates(self.config.limits());
        for ((_, new), old) in new.iter_mut().zip(&matches) {
            if let Some(old) = old {
                new.carry_over(&self.buckets[*old].1);
            }
        }
        self.buckets = new;
        self.config = request.config.clone();
        self.configured_as.clone_from(&request.configured_as);
        self.config_version = version;
        self.set_estimated(self.estimated);
        matches.contains(&None)
    }

    /// Removes the members that have sent no request for `MEMBER_EXPIRY`, and their estimates.
    fn expire_members(&mut self) {
        let now = self.clock;
        if now - self.swept_at < SWEEP_INTERVAL {
            return;
        }
        self.swept_at = now;
        self.members.retain(|_, member| now - member.seen_at < MEMBER_EXPIRY);
        let wanting = self.members.values().filter(|member| member.wants_until > now);
        self.wanting = wanting.count() as i64;
        let estimates = self.members.values().map(|member| member.estimated);
        self.set_estimated(estimates.fold(Amounts::default(), Amounts::saturating_add));
    }

    /// Charges and refunds the corrections that the member reports. Returns the member's unsettled estimates.
    fn settle(&mut self, request: &StoreRequest, before: Option<MemberEntry>, is_known: bool) -> Amounts {
        let own = before.map_or(Amounts::default(), |before| before.estimated);
        // If a reply was lost, the member sends the same batch of corrections again with the same number. The batch
        // must be counted only once.
        let is_counted = is_known && before.is_some_and(|before| before.batch == request.batch);
        if !request.is_probe && !is_counted {
            self.settle_corrections(request, own, is_known);
        }
        if request.is_forgiving {
            self.buckets.iter_mut().for_each(|(_, bucket)| bucket.forgive_debt());
        }
        if !request.is_probe {
            self.last_contact = self.clock;
        }
        let others = self.estimated.saturating_sub(own);
        let own = if is_known {
            request.estimated
        } else {
            Amounts::default()
        };
        self.set_estimated(others.saturating_add(own));
        own
    }

    fn settle_corrections(&mut self, request: &StoreRequest, own: Amounts, is_known: bool) {
        let began = self.clock - request.fallback_age;
        if request.fallback_age > 0 && self.last_contact < began {
            // No process that shares the quota has reached the store since this one lost its connection. So all of them
            // admitted calls by their local fallbacks, and have spent what would have refilled the buckets meanwhile.
            // Therefore the buckets start empty.
            self.hold(RETURN_TIME, true);
        }
        // If the buckets were emptied after the member had begun to admit calls locally, what was taken out of them has
        // paid for the member's usage until then. Since then the member can have used no more than its share of the
        // rate, so no more than this share is charged.
        let since_emptied = (self.emptied_at > began).then(|| (self.clock - self.emptied_at).unsigned_abs());
        for (budget, bucket) in &mut self.buckets {
            let usage = request.fallback_usage.of(*budget);
            bucket.debit_share(usage, since_emptied, request.member_count.unsigned_abs());
            bucket.debit(request.debit.of(*budget));
            if is_known {
                bucket.credit(request.credit.of(*budget).min(own.of(*budget)));
            }
        }
    }

    /// Reserves the costs of the request in order, but nothing further than `max_ahead` into the future. A cost that has to
    /// wait longer claims the next reservation: until it has it, or gives up, no other cost is reserved.
    ///
    /// While the schedule reaches further than `ahead` into the future, each member with more demand than it was given gets
    /// an equal part of it: `served_until` advances by the time that its reservations take, times the number of such
    /// members.
    ///
    /// A cost that a rate which refuses calls does not hold now is refused, whether or not costs before it have to wait. It
    /// takes nothing, and the costs behind it are not affected.
    fn reserve(&mut self, request: &StoreRequest, served_until: &mut i64, wants_until: &mut i64) -> Reserved {
        let now = self.clock;
        let mut reserved = Reserved {
            amounts: Amounts::default(),
            delays: Vec::with_capacity(request.costs.len()),
            refused: Vec::new(),
            retry_in: 0,
        };
        let was_counted = *wants_until > self.swept_at;
        let sharing = self.wanting + i64::from(!was_counted);
        if self.claim.member == request.member && self.claim.until > now {
            self.claim.until = 0;
        }
        let declared = request.config.budgets();
        // If the member does not know that one of the budgets is limited, nothing is reserved. It learns that from the
        // reply, and asks again.
        let is_missing = self.config.budgets().iter().any(|budget| !declared.contains(budget));
        let costs = if is_missing { &[] } else { &request.costs[..] };
        let mut from = self.scheduled_until.max(self.pauses.until()).max(now + request.lead);
        let served_from = *served_until - from * sharing;
        let mut is_blocked = false;
        for (position, cost) in costs.iter().enumerate() {
            let cost = self.config.amounts(cost);
            if let Some(refused) = self.refused(position, cost) {
                reserved.refused.push(refused);
                continue;
            }
            if is_blocked {
                continue;
            }
            is_blocked = true;
            if from - now > request.max_ahead {
                reserved.retry_in = from - now - request.max_ahead;
                continue;
            }
            if self.claim.until > now {
                reserved.retry_in = (self.claim.admitted_at - now - request.max_ahead).max(1);
                continue;
            }
            let too_far = from.min(served_from + from * sharing) - now - request.ahead;
            if too_far > 0 {
                reserved.retry_in = too_far;
                continue;
            }
            if self
                .buckets
                .iter()
                .any(|(budget, bucket)| cost.of(*budget) > bucket.burst())
            {
                // The cost exceeds a burst of the limits in force, which the member does not have yet. It learns them
                // from the reply and rejects the call.
                continue;
            }
            let waits = self.buckets.iter();
            let waits = waits.map(|(budget, bucket)| bucket.time_until(cost.of(*budget)));
            let admitted_at = from.max(self.scheduled_until + waits.fold(0, u64::max) as i64);
            if admitted_at - now > request.max_ahead {
                self.claim = Claim {
                    member: request.member,
                    until: now + CLAIM_EXPIRY,
                    admitted_at,
                };
                reserved.retry_in = admitted_at - now - request.max_ahead;
                continue;
            }
            is_blocked = false;
            self.advance_to(admitted_at);
            from = admitted_at;
            for (budget, bucket) in &mut self.buckets {
                bucket.take_reserved(cost.of(*budget), LATENESS as u64);
            }
            self.set_estimated(self.estimated.saturating_add(cost));
            reserved.amounts = reserved.amounts.saturating_add(cost);
            reserved.delays.push(admitted_at - now);
        }
        if !reserved.delays.is_empty() {
            *served_until = (served_from + from * sharing).min(now + MAX_SERVED);
        }
        if costs.len() > reserved.delays.len() + reserved.refused.len() || request.is_backlogged {
            *wants_until = now + DEMAND_EXPIRY;
            self.wanting += i64::from(!was_counted);
        }
        if request.is_leaving && *wants_until > self.swept_at {
            self.wanting -= 1;
        }
        reserved
    }

    /// Returns why a rate that refuses calls does not hold the cost at `position` in a request. `None` if all of them hold
    /// it, or if one of them never can.
    fn refused(&self, position: usize, cost: Amounts) -> Option<RefusedCost> {
        let caps = self.buckets.iter().filter(|(_, bucket)| bucket.refuses());
        let mut lacking = caps.filter(|(budget, bucket)| {
            let amount = cost.of(*budget);
            amount <= bucket.burst() && bucket.time_until(amount) > 0
        });
        lacking.next().map(|(budget, bucket)| RefusedCost {
            position,
            budget: *budget,
            left: bucket.available(),
            held_in: self.scheduled_until - self.clock + bucket.time_until(cost.of(*budget)) as i64,
        })
    }

    /// Reserves nothing for `span` microseconds, in which members may use reservations of a lost state. Also empties
    /// the buckets if `is_emptied`.
    fn hold(&mut self, span: i64, is_emptied: bool) {
        if self.clock > self.scheduled_until {
            self.advance_to(self.clock);
        }
        if is_emptied {
            self.empty_buckets();
            self.emptied_at = self.clock;
        }
        let until = self.scheduled_until.max(self.clock + span);
        for (_, bucket) in &mut self.buckets {
            bucket.skip((until - self.scheduled_until).unsigned_abs());
        }
        self.scheduled_until = until;
    }

    fn advance_to(&mut self, time: i64) {
        let elapsed = (time - self.scheduled_until).unsigned_abs();
        self.buckets.iter_mut().for_each(|(_, bucket)| bucket.advance(elapsed));
        self.scheduled_until = time;
    }

    /// Empties the buckets, except for those of the calendar: what was taken out of these is known from the members, which
    /// report what was left, and what they have used since.
    fn empty_buckets(&mut self) {
        let buckets = self.buckets.iter_mut().map(|(_, bucket)| bucket);
        let filling = buckets.filter(|bucket| bucket.until_window_ends().is_none());
        filling.for_each(Bucket::empty);
    }

    fn set_estimated(&mut self, estimated: Amounts) {
        self.estimated = estimated;
        for (budget, bucket) in &mut self.buckets {
            bucket.set_estimated(estimated.of(*budget));
        }
    }

    fn forget_members(&mut self) {
        self.members.clear();
        self.wanting = 0;
        self.claim.until = 0;
        self.set_estimated(Amounts::default());
    }

    /// Returns how long the state has to be kept, in milliseconds. After a state has expired, the next one begins with
    /// full buckets, so a state must not expire before its own buckets are full.
    fn retention(&self) -> i64 {
        let until_full = self.buckets.iter().map(|(_, bucket)| bucket.until_full());
        let full_at = self.scheduled_until + until_full.fold(0, u64::max) as i64;
        (full_at.max(self.pauses.until()) - self.clock).div_euclid(1_000) + MIN_RETENTION
    }

    /// Returns what is left in the buckets that refuse calls or count by the calendar, after all reservations.
    fn left(&self) -> Vec<u64> {
        let allowances = self.buckets.iter().filter(|(_, bucket)| bucket.is_allowance());
        allowances.map(|(_, bucket)| bucket.available()).collect()
    }

    /// Returns what remains in the buckets at the end of the schedule, after all reservations.
    fn remaining(&self, budgets: &[Budget]) -> PerBudget<Option<u64>> {
        let mut remaining = PerBudget::default();
        for budget in budgets {
            let buckets = self.buckets.iter().filter(|(of, _)| of == budget);
            if let Some(least) = remaining.entry(*budget) {
                *least = buckets.map(|(_, bucket)| bucket.available()).min();
            }
        }
        remaining
    }
}

#[cfg(test)]
mod tests;
