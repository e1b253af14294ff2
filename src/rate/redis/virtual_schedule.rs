//! [`VirtualSchedule`]: what `reserve.lua` does, in this process and in the same steps. Both give the same replies to
//! the last unit.
//!
//! All buckets of a quota are settled up to one time, the end of the schedule. This is the time of the last
//! reservation, so it may lie in the future. The next reservation is made at the earliest time after it when *all*
//! buckets have enough, and is charged at that time. So admissions are in order, nothing is charged before it is used,
//! and at most `burst + rate x T` is admitted in any window of length T.
//!
//! The schedule serves a process that has lost the store ([`LocalFallback`](super::fallback)), and it is the model that
//! the script is tested against. Its callers pass the time, in microseconds. It holds no lock, clock or timer.

use super::{
    amounts::{Amounts, PerBudget},
    quota_config::QuotaConfig,
    wire::{Member, StoreReply, StoreRequest},
};
use crate::rate::{bucket::Bucket, limits::Budget};
use std::{collections::HashMap, sync::Arc};

/// A member that has sent no request for this many microseconds is no longer counted, and its estimates are final.
const MEMBER_EXPIRY: i64 = 15_000_000;
/// How often expired members are looked for, in microseconds.
const SWEEP_INTERVAL: i64 = 1_000_000;
/// Members that lost the store at the same time reach it again within this many microseconds of each other.
const RETURN_TIME: i64 = 1_500_000;
/// The least time for which the state is kept after a request, in milliseconds.
const MIN_RETENTION: i64 = 60_000;

/// The state of one quota, as the store keeps it.
#[derive(Clone, Debug, Default)]
pub(super) struct VirtualSchedule {
    state: Option<State>,
}

/// What the store keeps: see the list in [`script`](super::script). Times are in microseconds.
#[derive(Clone, Debug)]
struct State {
    /// Distinguishes this state from earlier ones: the time of its creation, or more.
    incarnation: i64,
    /// How many requests it has served.
    sequence: i64,
    /// The clock at the last request.
    clock: i64,
    /// The last request that was no probe.
    last_contact: i64,
    /// Up to when the buckets are settled: the end of the schedule.
    scheduled_until: i64,
    paused_until: i64,
    /// The version of the limits: a later one is larger.
    config_version: i64,
    /// Whether it began with full buckets, because its first member knew no earlier state.
    began_full: bool,
    /// When expired members were last looked for.
    swept_at: i64,
    /// When the buckets were last emptied; 0 if never.
    emptied_at: i64,
    /// The estimates of all members that are not settled.
    estimated: Amounts,
    config: Arc<QuotaConfig>,
    /// What the member was configured with that set these limits.
    configured_as: String,
    buckets: Vec<(Budget, Bucket)>,
    members: HashMap<Member, MemberEntry>,
}

/// What the state keeps of a member.
#[derive(Clone, Copy, Debug)]
struct MemberEntry {
    /// The time of its last request.
    seen_at: i64,
    /// Its estimates that are not settled.
    estimated: Amounts,
    /// The number of its last corrections.
    batch: i64,
}

/// What was reserved for a request.
struct Reserved {
    amounts: Amounts,
    /// When each of the first costs is admitted, in microseconds from now.
    delays: Vec<i64>,
    /// When to request the others again, in microseconds from now; 0 if all were reserved.
    retry_in: i64,
}

impl VirtualSchedule {
    /// Serves `request` at `now`, in microseconds.
    pub(super) fn handle(&mut self, request: &StoreRequest, now: i64) -> StoreReply {
        let state = self.state.get_or_insert_with(|| State::new(request, now));
        state.set_clock(now);
        let is_stale = state.make_up_for_lost_state(request);
        state.adopt_limits(request);

        if now > state.scheduled_until {
            state.advance_to(now);
        }
        if request.pause > 0 {
            state.paused_until = state.paused_until.max(now + request.pause);
        }
        if request.config.text() == state.config.text() {
            for (position, left) in &request.lowered {
                state.buckets[*position].1.lower(*left);
            }
        }
        state.expire_members();

        let before = state.members.get(&request.member).copied();
        let is_known = before.is_some() && !is_stale;
        let estimated = state.settle(request, before, is_known);
        let reserved = state.reserve(request);

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
            };
            state.members.insert(request.member, entry);
        }
        StoreReply {
            sequence: state.sequence,
            incarnation: state.incarnation,
            config_version: state.config_version,
            pause: (state.paused_until - now).max(0),
            members: state.members.len() as u64,
            is_known,
            retention: state.retention(),
            offset: state.scheduled_until - now,
            left: state.left(),
            retry_in: reserved.retry_in,
            now,
            delays: reserved.delays,
            config: (state.config_version != request.config_version).then(|| state.config.text().to_owned()),
        }
    }

    /// Empties the buckets at `now`, so that nothing is saved up until then. Debts and reservations stay.
    pub(super) fn drain(&mut self, now: i64) {
        if let Some(state) = &mut self.state {
            if now > state.scheduled_until {
                state.advance_to(now);
                state.empty_buckets();
            }
        }
    }

    #[cfg(test)]
    pub(super) fn lose_state(&mut self) {
        self.state = None;
    }
}

impl State {
    /// The state that a first request creates: full, unless its member knows of a state that is lost.
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
            scheduled_until: if is_first { now } else { now + hold_time(request) },
            paused_until: 0,
            config_version: if request.config_version == 0 {
                now
            } else {
                request.config_version
            },
            began_full: is_first,
            swept_at: now,
            emptied_at: if is_first { 0 } else { now },
            estimated: Amounts::ZERO,
            config: request.config.clone(),
            configured_as: request.configured_as.clone(),
            buckets: new_buckets(&request.config),
            members: HashMap::new(),
        };
        if !is_first {
            // What others have taken from the lost state is unknown, so nothing may be left.
            state.empty_buckets();
        }
        state
    }

    /// Sets the clock. If it went back, all times move with it, so no time has passed.
    fn set_clock(&mut self, now: i64) {
        let back = self.clock - now;
        if back > 0 {
            self.scheduled_until -= back;
            self.paused_until = (self.paused_until - back).max(0);
            self.swept_at -= back;
            self.emptied_at -= back;
            self.last_contact -= back;
            for member in self.members.values_mut() {
                member.seen_at -= back;
            }
        }
        self.clock = now;
    }

    /// If the member has received a reply that this state has not sent, makes room for what that reply may have
    /// promised. Returns whether this is so.
    fn make_up_for_lost_state(&mut self, request: &StoreRequest) -> bool {
        if request.incarnation == 0 {
            return false;
        }
        if request.incarnation != self.incarnation {
            if self.began_full {
                // It did not know that there was an earlier state.
                self.hold(hold_time(request), true);
            } else {
                self.hold(request.last_reservation, false);
            }
            self.began_full = false;
            return true;
        }
        if self.sequence < request.sequence {
            // The server went back to an old snapshot, or to a replica that lagged behind.
            self.hold(hold_time(request), true);
            self.incarnation = self.clock.max(self.incarnation + 1);
            self.began_full = false;
            self.sequence = request.sequence;
            self.forget_members();
            return true;
        }
        false
    }

    /// Takes over the member's limits if they are newer, or if it was started with limits that this state does not
    /// know.
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
                // What was estimated before was never charged to a new bucket, so it must not be given back to it.
                self.forget_members();
            }
        }
    }

    /// Replaces the limits, and returns whether there is a rate that has no predecessor.
    fn configure(&mut self, request: &StoreRequest, version: i64) -> bool {
        let mut new = new_buckets(&request.config);
        let mut is_any_new = false;
        for budget in [Budget::Requests, Budget::Tokens] {
            let mut old = self.buckets.iter().filter(|(of, _)| *of == budget);
            for (_, new) in new.iter_mut().filter(|(of, _)| *of == budget) {
                match old.next() {
                    Some((_, old)) => new.carry_over(old),
                    None => is_any_new = true,
                }
            }
        }
        self.buckets = new;
        self.config = request.config.clone();
        self.configured_as.clone_from(&request.configured_as);
        self.config_version = version;
        self.set_estimated(self.estimated);
        is_any_new
    }

    /// Removes the members that have sent no request for a while.
    fn expire_members(&mut self) {
        let now = self.clock;
        if now - self.swept_at < SWEEP_INTERVAL {
            return;
        }
        self.swept_at = now;
        self.members.retain(|_, member| now - member.seen_at < MEMBER_EXPIRY);
        let estimates = self.members.values().map(|member| member.estimated);
        self.set_estimated(estimates.fold(Amounts::ZERO, Amounts::saturating_add));
    }

    /// Charges and refunds what the member reports, and returns its estimates that are not settled.
    fn settle(&mut self, request: &StoreRequest, before: Option<MemberEntry>, is_known: bool) -> Amounts {
        let own = before.map_or(Amounts::ZERO, |before| before.estimated);
        // A request is sent again with the same batch number if its reply was lost.
        let is_counted = is_known && before.is_some_and(|before| before.batch == request.batch);
        if !request.is_probe && !is_counted {
            self.settle_corrections(request, own, is_known);
        }
        if !request.is_probe {
            self.last_contact = self.clock;
        }
        let others = self.estimated.saturating_sub(own);
        let own = if is_known { request.estimated } else { Amounts::ZERO };
        self.set_estimated(others.saturating_add(own));
        own
    }

    fn settle_corrections(&mut self, request: &StoreRequest, own: Amounts, is_known: bool) {
        let began = self.clock - request.fallback_age;
        if request.fallback_age > 0 && self.last_contact < began {
            // No member has reached the store since this one lost it. So all of them admitted calls by their local
            // fallbacks, and have used what would be in the buckets now.
            self.hold(RETURN_TIME, true);
        }
        // What the member used before the buckets were emptied was paid for then. Since then it can have used no more
        // than its share of the rate.
        let since_emptied = (self.emptied_at > began).then(|| (self.clock - self.emptied_at).unsigned_abs());
        for (budget, bucket) in &mut self.buckets {
            let usage = request.fallback_usage[*budget];
            bucket.debit_share(usage, since_emptied, request.member_count.unsigned_abs());
            bucket.debit(request.debit[*budget]);
            if is_known {
                bucket.credit(request.credit[*budget].min(own[*budget]));
            }
        }
    }

    /// Reserves the costs in order, as many as `max_ahead` allows.
    fn reserve(&mut self, request: &StoreRequest) -> Reserved {
        let now = self.clock;
        let mut reserved = Reserved {
            amounts: Amounts::ZERO,
            delays: Vec::with_capacity(request.costs.len()),
            retry_in: 0,
        };
        for cost in &request.costs {
            let cost = Amounts::from(*cost);
            let from = self.scheduled_until.max(self.paused_until);
            if from - now > request.max_ahead {
                reserved.retry_in = from - now - request.max_ahead;
                break;
            }
            if self
                .buckets
                .iter()
                .any(|(budget, bucket)| cost[*budget] > bucket.burst())
            {
                // The limits are others than the member's. It learns them from the reply and rejects the call.
                break;
            }
            let waits = self.buckets.iter();
            let waits = waits.map(|(budget, bucket)| bucket.time_until(cost[*budget].into()));
            let admitted_at = from.max(self.scheduled_until + waits.fold(0, u64::max) as i64);
            self.advance_to(admitted_at);
            for (budget, bucket) in &mut self.buckets {
                bucket.take(cost[*budget], false);
            }
            self.set_estimated(self.estimated.saturating_add(cost));
            reserved.amounts = reserved.amounts.saturating_add(cost);
            reserved.delays.push(admitted_at - now);
        }
        reserved
    }

    /// Reserves nothing for `span` microseconds, in which reservations may be used that this state does not know.
    fn hold(&mut self, span: i64, is_emptied: bool) {
        if self.clock > self.scheduled_until {
            self.advance_to(self.clock);
        }
        if is_emptied {
            self.empty_buckets();
            self.emptied_at = self.clock;
        }
        self.scheduled_until = self.scheduled_until.max(self.clock + span);
    }

    fn advance_to(&mut self, time: i64) {
        let elapsed = (time - self.scheduled_until).unsigned_abs();
        self.buckets.iter_mut().for_each(|(_, bucket)| bucket.advance(elapsed));
        self.scheduled_until = time;
    }

    fn empty_buckets(&mut self) {
        self.buckets.iter_mut().for_each(|(_, bucket)| bucket.empty());
    }

    fn set_estimated(&mut self, estimated: Amounts) {
        self.estimated = estimated;
        for (budget, bucket) in &mut self.buckets {
            bucket.set_estimated(estimated[*budget]);
        }
    }

    fn forget_members(&mut self) {
        self.members.clear();
        self.set_estimated(Amounts::ZERO);
    }

    /// How long the state has to be kept, in milliseconds. An expired state is a new one with full buckets, so it must
    /// not expire before they are full.
    fn retention(&self) -> i64 {
        let until_full = self.buckets.iter().map(|(_, bucket)| bucket.until_full());
        let full_at = self.scheduled_until + until_full.fold(0, u64::max) as i64;
        (full_at.max(self.paused_until) - self.clock).div_euclid(1_000) + MIN_RETENTION
    }

    /// What is left at the end of the schedule.
    fn left(&self) -> PerBudget<Option<u64>> {
        PerBudget::from_fn(|budget| {
            let buckets = self.buckets.iter().filter(|(of, _)| *of == budget);
            buckets.map(|(_, bucket)| bucket.available()).min()
        })
    }
}

/// For how long members may have reservations from a state that is lost.
fn hold_time(request: &StoreRequest) -> i64 {
    request.last_reservation.max(request.max_ahead)
}

fn new_buckets(config: &QuotaConfig) -> Vec<(Budget, Bucket)> {
    let sizes = config.sizes().iter();
    sizes.map(|(budget, size)| (*budget, Bucket::new(*size))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rate::limits::{Cost, Limits, Rate};
    use std::time::Duration;

    const RATE: i64 = 3;
    const BURST: i64 = 40;

    /// A member that reports the truth, and records what it used and when.
    struct HonestMember {
        request: StoreRequest,
        open: Vec<OpenReservation>,
    }

    /// A reservation that is not settled yet.
    struct OpenReservation {
        admitted_at: i64,
        reserved: u64,
        /// What the call will turn out to use.
        used: u64,
    }

    impl HonestMember {
        fn new(number: u8) -> Self {
            // Three in eleven microseconds.
            let limits = Limits::new().tokens(Rate::new(RATE, Duration::from_micros(11)).burst(BURST));
            let config = Arc::new(QuotaConfig::new(limits).unwrap());
            let request = StoreRequest {
                max_ahead: 300,
                configured_as: config.text().to_owned(),
                ..StoreRequest::new([number; 16], config)
            };
            Self {
                request,
                open: Vec::new(),
            }
        }

        /// Sends a request at `now` by the server's clock. Returns what was used and when, by the clock `real`, which
        /// never jumps.
        fn call(
            &mut self,
            schedule: &mut VirtualSchedule,
            rng: &mut fastrand::Rng,
            now: i64,
            real: i64,
        ) -> Vec<(i64, u64)> {
            let mut used = Vec::new();
            let mut credit = 0;
            self.open.retain(|open| {
                let is_over = open.admitted_at < real && rng.bool();
                if is_over {
                    credit += open.reserved - open.used;
                    used.push((open.admitted_at, open.used));
                }
                !is_over
            });
            let request = &mut self.request;
            request.batch += 1;
            request.credit.tokens = credit;
            request.estimated.tokens = self.open.iter().map(|open| open.reserved).sum();
            let last = self.open.iter().map(|open| open.admitted_at).max().unwrap_or(real);
            request.last_reservation = (last - real).max(0);
            let costs = (0..rng.usize(0..4)).map(|_| Cost {
                requests: 0,
                tokens: rng.u64(1..=20),
            });
            request.costs = costs.collect();
            let reply = schedule.handle(request, now);
            if request.incarnation != 0 && request.incarnation != reply.incarnation {
                // The store does not know these estimates any more and gives nothing back for them.
                used.extend(self.open.drain(..).map(|open| (open.admitted_at, open.reserved)));
            }
            request.incarnation = reply.incarnation;
            request.sequence = reply.sequence;
            request.config_version = reply.config_version;
            for (delay, cost) in reply.delays.iter().zip(&request.costs) {
                // Some calls are cancelled and use nothing.
                let is_cancelled = rng.u8(0..4) == 0;
                self.open.push(OpenReservation {
                    admitted_at: real + delay,
                    reserved: cost.tokens,
                    used: if is_cancelled { 0 } else { rng.u64(0..=cost.tokens) },
                });
            }
            used
        }
    }

    #[test]
    fn no_window_sees_more_true_usage_than_the_burst_and_what_came_in() {
        let mut rng = fastrand::Rng::with_seed(7);
        let (mut admitted, mut steps_back, mut lost) = (0, 0, 0);
        for _ in 0..if cfg!(miri) { 3 } else { 400 } {
            let mut schedule = VirtualSchedule::default();
            let mut members = [HonestMember::new(1), HonestMember::new(2), HonestMember::new(3)];
            let (mut now, mut real) = (1_000_000_i64, 0_i64);
            let mut used = Vec::new();
            for _ in 0..200 {
                let passed = rng.i64(0..60);
                real += passed;
                now += passed;
                match rng.u32(0..60) {
                    0 => {
                        now -= rng.i64(0..100_000);
                        steps_back += 1;
                    }
                    1 if members.iter().all(|member| member.request.incarnation != 0) => {
                        schedule.lose_state();
                        lost += 1;
                    }
                    _ => {}
                }
                let member = rng.usize(0..3);
                used.extend(members[member].call(&mut schedule, &mut rng, now, real));
            }
            for member in &mut members {
                used.extend(member.open.drain(..).map(|open| (open.admitted_at, open.used)));
            }
            used.sort_unstable();
            // Replays the usage through an exact bucket, in elevenths of a token.
            let (mut level, mut last) = (0_i64, 0);
            for (at, tokens) in used {
                level = (level - (at - last) * RATE).max(0) + tokens as i64 * 11;
                last = at;
                assert!(level <= BURST * 11, "{} elevenths over at {at}", level - BURST * 11);
                admitted += 1;
            }
        }
        assert!(admitted > 10_000 || cfg!(miri), "{admitted}");
        assert!((steps_back > 100 && lost > 100) || cfg!(miri), "{steps_back} {lost}");
    }
}
