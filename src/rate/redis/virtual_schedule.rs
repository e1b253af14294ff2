//! [`VirtualSchedule`]: what `reserve.lua` does, in this process. The two give the same answers to the last unit.
//!
//! All buckets of a quota are settled up to one moment, the *frontier*, which may lie in the future: the moment of the
//! last reservation. The next one is made at the earliest moment from there on at which *all* buckets have what it
//! costs, and is charged then. So admissions are in order, nothing is charged before it is used, and in any window of
//! length T at most `burst + rate x T` is admitted.
//!
//! It is the store of a process that has lost the other one, and the model that the script is tested against. It is
//! told the time, in microseconds, and holds no lock, clock or timer.

use super::{
    quota_config::QuotaConfig,
    wire::{Member, StoreReply, StoreRequest},
};
use crate::rate::{bucket::Bucket, limits::Budget};
use std::{collections::HashMap, sync::Arc};

/// Microseconds after which a member that is not heard of is none.
pub(super) const MEMBER_LAPSES: i64 = 15_000_000;
/// How often members that have lapsed are looked for.
const SWEEP: i64 = 1_000_000;
/// Who was on its own comes back within this time, if all were.
const RETURN: i64 = 1_500_000;
/// The least time that the state is kept, in milliseconds.
const KEPT: i64 = 60_000;

#[derive(Clone, Debug, Default)]
pub(super) struct VirtualSchedule {
    state: Option<State>,
    members: HashMap<Member, Seen>,
}

#[derive(Clone, Debug)]
struct State {
    /// Tells this state from one that came before it or was lost.
    birth: i64,
    /// How often it was asked.
    seq: i64,
    /// The clock when it was asked last.
    at: i64,
    /// When somebody was here who had not lost it.
    used: i64,
    /// Up to when the buckets are settled.
    last: i64,
    pause: i64,
    /// Which limits they are: the newer the larger.
    stamp: i64,
    /// Whether it began full, because nobody knew of one before.
    fresh: bool,
    swept: i64,
    /// When it was emptied last, because members had been on their own.
    emptied: i64,
    /// Requests and tokens that are estimated by all members.
    estimated: [u64; 2],
    config: Arc<QuotaConfig>,
    /// What the member was configured with that brought these limits.
    base: String,
    buckets: Vec<(Budget, Bucket)>,
}

/// What is known of a member.
#[derive(Clone, Copy, Debug)]
struct Seen {
    at: i64,
    estimated: [u64; 2],
    /// Its last corrections.
    batch: i64,
}

const fn index(budget: Budget) -> usize {
    match budget {
        Budget::Requests => 0,
        Budget::Tokens => 1,
    }
}

impl VirtualSchedule {
    /// Answers `ask` at `now`, in microseconds.
    pub(super) fn call(&mut self, ask: &StoreRequest, now: i64) -> StoreReply {
        let hold = ask.horizon.max(ask.ahead);
        let mut state = self.state.take().unwrap_or_else(|| {
            self.members.clear();
            State::born(ask, now, hold)
        });

        // A clock that goes back takes the frontier along: no time has passed.
        let back = state.at - now;
        if back > 0 {
            state.last -= back;
            state.pause = (state.pause - back).max(0);
            state.swept -= back;
            state.emptied -= back;
            state.used -= back;
            for seen in self.members.values_mut() {
                seen.at -= back;
            }
        }
        state.at = now;

        // What did this member know that is not here?
        let mut stale = false;
        if ask.birth != 0 && ask.birth != state.birth {
            stale = true;
            state.hold(if state.fresh { hold } else { ask.horizon }, state.fresh);
            state.fresh = false;
        } else if ask.birth != 0 && state.seq < ask.seq {
            stale = true;
            state.hold(hold, true);
            state.birth = now.max(state.birth + 1);
            state.fresh = false;
            state.seq = ask.seq;
            self.members.clear();
            state.set_estimated([0, 0]);
        }

        let theirs = ask.changes
            || ask.stamp > state.stamp
            || (ask.stamp == 0 && ask.base != state.base && ask.config.text() != state.config.text());
        if theirs {
            let stamp = if ask.changes || ask.stamp == 0 {
                now.max(state.stamp + 1)
            } else {
                ask.stamp
            };
            if state.configure(ask, stamp) {
                // What was charged before there was this rate was not charged to it.
                self.members.clear();
                state.set_estimated([0, 0]);
            }
        }

        if now > state.last {
            state.advance_to(now);
        }
        if ask.pause > 0 {
            state.pause = state.pause.max(now + ask.pause);
        }
        if ask.config.text() == state.config.text() {
            for (at, left) in &ask.lower {
                state.buckets[*at].1.lower(*left);
            }
        }

        if now - state.swept >= SWEEP {
            state.swept = now;
            self.members.retain(|_, seen| now - seen.at < MEMBER_LAPSES);
            let all = self.members.values().fold([0, 0], |sum, seen| add(sum, seen.estimated));
            state.set_estimated(all);
        }
        let before = self.members.get(&ask.member).copied();
        let known = before.is_some() && !stale;
        let mut own = before.map_or([0, 0], |seen| seen.estimated);
        let is_heard = ask.probes || (known && before.is_some_and(|seen| seen.batch == ask.batch));
        if !is_heard {
            let began = now - ask.alone;
            if ask.alone > 0 && state.used < began {
                // Nobody was here since it was on its own, so all of them were: what has come in was theirs.
                state.hold(RETURN, true);
            }
            let since = (state.emptied > began).then(|| (now - state.emptied).unsigned_abs());
            for (budget, bucket) in &mut state.buckets {
                let at = index(*budget);
                bucket.debit_share(ask.spent[at], since, ask.shares.unsigned_abs());
                bucket.debit(ask.debit[at]);
                if known {
                    bucket.credit(ask.credit[at].min(own[at]));
                }
            }
        }
        if !ask.probes {
            state.used = now;
        }
        let others = subtract(state.estimated, own);
        own = if known { ask.estimated } else { [0, 0] };
        state.set_estimated(add(others, own));

        let mut goes = Vec::with_capacity(ask.costs.len());
        let mut again = 0;
        for cost in &ask.costs {
            let from = state.last.max(state.pause);
            if from - now > ask.ahead {
                again = from - now - ask.ahead;
                break;
            }
            let of = |budget| [cost.requests, cost.tokens][index(budget)];
            if state
                .buckets
                .iter()
                .any(|(budget, bucket)| of(*budget) > bucket.burst())
            {
                break;
            }
            let waits = state
                .buckets
                .iter()
                .map(|(budget, bucket)| bucket.wait(of(*budget).into()));
            let go = from.max(state.last + waits.fold(0, u64::max) as i64);
            state.advance_to(go);
            let cost = [cost.requests, cost.tokens];
            for (budget, bucket) in &mut state.buckets {
                bucket.take(cost[index(*budget)], false);
            }
            own = add(own, cost);
            state.set_estimated(add(state.estimated, cost));
            goes.push(go - now);
        }

        state.seq += 1;
        if ask.leaves {
            self.members.remove(&ask.member);
        } else {
            let seen = Seen {
                at: now,
                estimated: own,
                batch: match before {
                    Some(before) if ask.probes => before.batch,
                    _ => ask.batch,
                },
            };
            self.members.insert(ask.member, seen);
        }
        let answer = StoreReply {
            seq: state.seq,
            birth: state.birth,
            stamp: state.stamp,
            pause: (state.pause - now).max(0),
            members: self.members.len() as u64,
            known,
            kept: state.kept(now),
            lead: state.last - now,
            left: state.left(),
            again,
            now,
            goes,
            config: (state.stamp != ask.stamp).then(|| state.config.text().to_owned()),
        };
        self.state = Some(state);
        answer
    }

    #[cfg(test)]
    pub(super) fn lose_state(&mut self) {
        self.state = None;
    }

    /// What is there now is forgotten, unless it is a debt: nothing may be saved up.
    pub(super) fn drain(&mut self, now: i64) {
        if let Some(state) = &mut self.state {
            if now > state.last {
                state.advance_to(now);
                state.buckets.iter_mut().for_each(|(_, bucket)| bucket.empty());
            }
        }
    }
}

impl State {
    fn born(ask: &StoreRequest, now: i64, hold: i64) -> Self {
        let fresh = ask.birth == 0;
        let mut buckets: Vec<_> = ask
            .config
            .sizes()
            .iter()
            .map(|(budget, size)| (*budget, Bucket::new(*size)))
            .collect();
        if !fresh {
            // What others have taken from a state that was lost is not known: nothing may be left.
            buckets.iter_mut().for_each(|(_, bucket)| bucket.empty());
        }
        Self {
            birth: if fresh { now } else { now.max(ask.birth + 1) },
            seq: 0,
            at: now,
            used: 0,
            last: if fresh { now } else { now + hold },
            pause: 0,
            stamp: if ask.stamp == 0 { now } else { ask.stamp },
            fresh,
            swept: now,
            emptied: if fresh { 0 } else { now },
            estimated: [0, 0],
            config: ask.config.clone(),
            base: ask.base.clone(),
            buckets,
        }
    }

    /// Makes room for reservations that are out and not known here.
    fn hold(&mut self, hold: i64, empty: bool) {
        if self.at > self.last {
            self.advance_to(self.at);
        }
        if empty {
            self.buckets.iter_mut().for_each(|(_, bucket)| bucket.empty());
            self.emptied = self.at;
        }
        self.last = self.last.max(self.at + hold);
    }

    /// Takes over another's limits, and returns whether there are more than before.
    fn configure(&mut self, ask: &StoreRequest, stamp: i64) -> bool {
        let mut new: Vec<_> = ask
            .config
            .sizes()
            .iter()
            .map(|(budget, size)| (*budget, Bucket::new(*size)))
            .collect();
        let mut more = false;
        for budget in [Budget::Requests, Budget::Tokens] {
            let mut old = self.buckets.iter().filter(|(of, _)| *of == budget);
            for (_, new) in new.iter_mut().filter(|(of, _)| *of == budget) {
                match old.next() {
                    Some((_, old)) => new.resize(old),
                    None => more = true,
                }
            }
        }
        self.buckets = new;
        self.config = ask.config.clone();
        self.base.clone_from(&ask.base);
        self.stamp = stamp;
        self.set_estimated(self.estimated);
        more
    }

    fn advance_to(&mut self, at: i64) {
        let elapsed = (at - self.last).unsigned_abs();
        self.buckets.iter_mut().for_each(|(_, bucket)| bucket.advance(elapsed));
        self.last = at;
    }

    fn set_estimated(&mut self, estimated: [u64; 2]) {
        self.estimated = estimated;
        for (budget, bucket) in &mut self.buckets {
            bucket.estimate(estimated[index(*budget)]);
        }
    }

    /// For how long it has to be kept, in milliseconds: until all buckets are full again.
    fn kept(&self, now: i64) -> i64 {
        let full = self.buckets.iter().map(|(_, bucket)| bucket.until_full());
        let ends = (self.last + full.fold(0, u64::max) as i64).max(self.pause);
        (ends - now).div_euclid(1_000) + KEPT
    }

    /// What is left at the frontier, in requests and in tokens; `None` where that is not limited.
    fn left(&self) -> [Option<u64>; 2] {
        [Budget::Requests, Budget::Tokens].map(|budget| {
            let of = self.buckets.iter().filter(|(of, _)| *of == budget);
            of.map(|(_, bucket)| bucket.available()).min()
        })
    }
}

fn add(a: [u64; 2], b: [u64; 2]) -> [u64; 2] {
    [a[0] + b[0], a[1] + b[1]]
}

fn subtract(a: [u64; 2], b: [u64; 2]) -> [u64; 2] {
    [a[0].saturating_sub(b[0]), a[1].saturating_sub(b[1])]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rate::limits::{Cost, Limits, Rate};

    const RATE: i64 = 3;
    const BURST: i64 = 40;

    /// A member that says what is true, and remembers what it used when.
    struct Honest {
        ask: StoreRequest,
        /// When a reservation goes, what was reserved, and what of it will be used.
        out: Vec<(i64, u64, u64)>,
    }

    impl Honest {
        fn new(number: u8) -> Self {
            // Three in eleven microseconds.
            let limits = Limits::new().tokens(Rate::new(RATE, std::time::Duration::from_micros(11)).burst(BURST));
            let config = Arc::new(QuotaConfig::new(limits).unwrap());
            let ask = StoreRequest {
                member: [number; 16],
                leaves: false,
                probes: false,
                ahead: 300,
                birth: 0,
                seq: 0,
                horizon: 0,
                base: config.text().to_owned(),
                config,
                stamp: 0,
                changes: false,
                batch: 0,
                credit: [0, 0],
                debit: [0, 0],
                spent: [0, 0],
                alone: 0,
                shares: 1,
                estimated: [0, 0],
                pause: 0,
                lower: Vec::new(),
                costs: Vec::new(),
            };
            Self { ask, out: Vec::new() }
        }

        /// Asks, by the server's clock and by one that never jumps, and returns what it used when.
        fn call(
            &mut self,
            frontier: &mut VirtualSchedule,
            rng: &mut fastrand::Rng,
            now: i64,
            real: i64,
        ) -> Vec<(i64, u64)> {
            let mut used = Vec::new();
            self.ask.credit = [0, 0];
            self.out.retain(|(go, reserved, uses)| {
                let is_over = *go < real && rng.bool();
                if is_over {
                    self.ask.credit[1] += reserved - uses;
                    used.push((*go, *uses));
                }
                !is_over
            });
            self.ask.batch += 1;
            self.ask.estimated = [0, self.out.iter().map(|(_, reserved, _)| reserved).sum()];
            let last = self.out.iter().map(|(go, ..)| *go).max().unwrap_or(real);
            self.ask.horizon = (last - real).max(0);
            let costs: Vec<_> = (0..rng.usize(0..4)).map(|_| rng.u64(1..=20)).collect();
            self.ask.costs = costs
                .iter()
                .map(|tokens| Cost {
                    requests: 0,
                    tokens: *tokens,
                })
                .collect();
            let answer = frontier.call(&self.ask, now);
            if self.ask.birth != 0 && self.ask.birth != answer.birth {
                // Those that are out are not known any more: nothing is given back for them.
                used.extend(self.out.drain(..).map(|(go, reserved, _)| (go, reserved)));
            }
            (self.ask.birth, self.ask.seq, self.ask.stamp) = (answer.birth, answer.seq, answer.stamp);
            for (go, reserved) in answer.goes.iter().zip(costs) {
                // Some are cancelled and use nothing.
                let uses = if rng.u8(0..4) == 0 { 0 } else { rng.u64(0..=reserved) };
                self.out.push((real + go, reserved, uses));
            }
            used
        }
    }

    #[test]
    fn no_window_sees_more_true_usage_than_the_burst_and_what_came_in() {
        let mut rng = fastrand::Rng::with_seed(7);
        let (mut admitted, mut steps_back, mut lost) = (0, 0, 0);
        for _ in 0..if cfg!(miri) { 3 } else { 400 } {
            let mut frontier = VirtualSchedule::default();
            let mut members = [Honest::new(1), Honest::new(2), Honest::new(3)];
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
                    1 if members.iter().all(|member| member.ask.birth != 0) => {
                        frontier.lose_state();
                        lost += 1;
                    }
                    _ => {}
                }
                let member = rng.usize(0..3);
                used.extend(members[member].call(&mut frontier, &mut rng, now, real));
            }
            for member in &mut members {
                used.extend(member.out.drain(..).map(|(go, _, uses)| (go, uses)));
            }
            used.sort_unstable();
            // Replayed in elevenths of a token.
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
