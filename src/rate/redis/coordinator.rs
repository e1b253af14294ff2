//! [`Coordinator`]: what a member knows, who waits there, and what it will say next. It decides; the [driver](super::driver)
//! carries. It is told the time and holds no lock, timer or connection.

use super::{
    adjustments::{Adjustments, Amounts, NONE, add, amounts, less},
    fallback::LocalFallback,
    loss::{CircuitBreaker, OnStoreLoss},
    quota_config::QuotaConfig,
    store::StoreError,
    waiters::{LATE, Reservation, Stage, Waiters},
    wire::{Member, StoreReply, StoreRequest},
};
use crate::{
    error::{AcquireError, CostExceedsBurst, StoreUnavailable},
    rate::{
        Bursts,
        limits::{Budget, Cost},
    },
};
use std::{sync::Arc, task::Waker};
use tokio::time::{Duration, Instant};

/// The most that is asked for at once.
const MOST_COSTS: usize = 1_000;
/// Corrections are told this soon, together with those that come meanwhile.
const CORRECTED_WITHIN: Duration = Duration::from_millis(20);
/// That estimates were right is told this soon.
const CONFIRMED_WITHIN: Duration = Duration::from_secs(1);
/// A member that has nothing to say says so.
const HEARTBEAT: Duration = Duration::from_secs(5);
/// All members together reserve so far ahead, if each of them has at least so much.
const RESERVED: Duration = Duration::from_millis(250);
const RESERVED_EACH: Duration = Duration::from_millis(40);
/// For so long a member is new, and behaves as if there were so many.
const NEWCOMER: Duration = Duration::from_secs(1);
const NEWCOMERS: u64 = 8;
/// 285 years: more than a time can be away.
pub(super) const MOST_MICROS: i64 = 1 << 52;

/// What does not change.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    pub(super) member: Member,
    pub(super) on_loss: OnStoreLoss,
    pub(super) ahead: Duration,
    /// At least so many members there are.
    pub(super) members: u64,
    pub(super) patience: Option<Duration>,
}

pub(super) struct Coordinator {
    settings: Settings,
    seats: Waiters,
    pub(super) counts: Counts,
    breaker: CircuitBreaker,
    problem: StoreError,
    ledger: Adjustments,

    /// Corrections that are being told, until they are heard.
    batch: Option<AdjustmentBatch>,
    batches: i64,
    /// Taken by our own share, and not in a batch yet.
    spent: Amounts,
    spent_since: Option<Instant>,

    // The limits.
    bursts: Arc<Bursts>,
    config: Arc<QuotaConfig>,
    base: String,
    stamp: i64,
    /// How often they were changed here; and of that, how often it was told.
    changed: (u64, u64),
    lower: Vec<(usize, u64)>,
    paused: Option<Instant>,
    /// A pause that was begun here and is to be told.
    pause: Option<Instant>,

    // What is known of the store.
    birth: i64,
    seq: i64,
    members: u64,
    left: [Option<u64>; 2],
    frontier: Option<Instant>,
    /// Until when it remembers us.
    kept: Option<Instant>,
    /// The last moment that was reserved.
    horizon: Option<Instant>,
    /// When to ask again for those in the queue.
    gate: Option<Instant>,
    asked: Option<Instant>,
    /// How long that takes.
    round_trip: Duration,
    /// When it answered first.
    joined: Option<Instant>,
    /// When it was first asked in vain.
    failing: Option<Instant>,
    /// What it was told is out.
    told: Amounts,

    /// Who is being asked for.
    on_the_way: Vec<u64>,
    share: Option<LocalFallback>,
    is_leaving: bool,
    has_left: bool,
}

/// Corrections, as they are told once or more often.
#[derive(Clone, Copy)]
struct AdjustmentBatch {
    credit: Amounts,
    debit: Amounts,
    spent: Amounts,
    since: Instant,
}

/// Numbers that only grow.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    pub(super) calls: u64,
    pub(super) failures: u64,
    pub(super) losses: u64,
    pub(super) forgotten: u64,
    pub(super) degraded: u64,
    pub(super) late: u64,
}

/// What was said, to be held against the answer.
pub(super) struct RequestSnapshot {
    at: Instant,
    asked: Vec<(u64, Cost)>,
    estimated: Amounts,
    lower: Vec<(usize, u64)>,
    pause: Option<Instant>,
    changed: u64,
    leaves: bool,
}

/// What follows for a waiter.
pub(super) enum WaiterStep {
    /// It has what it came for.
    Go(Reservation),
    /// It has a reservation for then.
    At(Instant),
    /// It is in the queue since now: the driver has something to carry.
    Queued,
    /// It will be woken.
    Wait,
}

impl Coordinator {
    pub(super) fn new(settings: Settings, config: QuotaConfig) -> Self {
        let bursts = Arc::new(Bursts::default());
        set_bursts(&bursts, &config);
        Self {
            members: settings.members,
            settings,
            seats: Waiters::default(),
            counts: Counts::default(),
            breaker: CircuitBreaker::default(),
            problem: StoreError::new("it was not asked yet"),
            ledger: Adjustments::default(),
            batch: None,
            batches: 0,
            spent: NONE,
            spent_since: None,
            bursts,
            base: config.text().to_owned(),
            config: Arc::new(config),
            stamp: 0,
            changed: (0, 0),
            lower: Vec::new(),
            paused: None,
            pause: None,
            birth: 0,
            seq: 0,
            left: [None, None],
            frontier: None,
            kept: None,
            horizon: None,
            gate: None,
            asked: None,
            round_trip: Duration::ZERO,
            joined: None,
            failing: None,
            told: NONE,
            on_the_way: Vec::new(),
            share: None,
            is_leaving: false,
            has_left: false,
        }
    }

    // --- for those who wait

    /// What follows for a newcomer, or for one who comes back with a number.
    pub(super) fn turn(
        &mut self,
        number: &mut Option<u64>,
        cost: Cost,
        waker: Waker,
        now: Instant,
    ) -> Result<WaiterStep, AcquireError> {
        let Some(own) = *number else {
            self.bursts.check(cost)?;
            *number = Some(self.seats.join(cost, waker, now));
            return Ok(WaiterStep::Queued);
        };
        let grant = match self.seats.look(own, waker) {
            Stage::Waiting => return Ok(WaiterStep::Wait),
            Stage::Refused(error) => {
                *number = None;
                self.seats.leave(own);
                return Err(error);
            }
            Stage::Lapsed => {
                self.seats.requeue(own);
                return Ok(WaiterStep::Queued);
            }
            Stage::Granted(grant) => grant,
        };
        if now < grant.at {
            return Ok(WaiterStep::At(grant.at));
        }
        if now > grant.at + LATE || self.paused(now).is_some() {
            // Its moment has passed. Another one, please.
            self.counts.late += 1;
            self.seats.requeue(own);
            self.settle(grant, cost, Cost::default());
            return Ok(WaiterStep::Queued);
        }
        *number = None;
        self.seats.leave(own);
        Ok(WaiterStep::Go(grant))
    }

    /// Somebody will not come for what it waited for.
    pub(super) fn leave(&mut self, number: u64) {
        if let Some((cost, Some(grant))) = self.seats.leave(number) {
            self.settle(grant, cost, Cost::default());
        }
    }

    /// It is known what was used.
    pub(super) fn settle(&mut self, grant: Reservation, reserved: Cost, used: Cost) {
        if grant.shared {
            self.ledger.settle(grant.era, reserved, used);
            return;
        }
        match &mut self.share {
            Some(share) if share.ledger.era() == grant.era => {
                share.ledger.settle(grant.era, reserved, used);
                let (reserved, used) = (amounts(reserved), amounts(used));
                self.spent = less(self.spent, less(reserved, used));
                add(&mut self.spent, less(used, reserved));
            }
            // The store was told.
            _ => self.ledger.settle(u64::MAX, reserved, used),
        }
    }

    // --- the limits

    pub(super) const fn bursts(&self) -> &Arc<Bursts> {
        &self.bursts
    }

    pub(super) const fn config(&self) -> &Arc<QuotaConfig> {
        &self.config
    }

    pub(super) fn configure(&mut self, config: QuotaConfig) -> Vec<Waker> {
        self.changed.0 += 1;
        self.take_over(config)
    }

    fn take_over(&mut self, config: QuotaConfig) -> Vec<Waker> {
        set_bursts(&self.bursts, &config);
        self.config = Arc::new(config);
        // That was said of others.
        self.lower.clear();
        let mut wakers = Vec::new();
        self.refuse_too_large(&mut wakers);
        wakers
    }

    /// Refuses those in the queue that can never pass.
    fn refuse_too_large(&mut self, wakers: &mut Vec<Waker>) {
        let bursts = self.bursts.clone();
        self.seats
            .refuse(|seat| bursts.check(seat.cost).err().map(CostExceedsBurst::into), wakers);
    }

    pub(super) fn lower(&mut self, budget: Budget, period: Option<Duration>, left: u64) {
        if let Some(at) = self.config.limits().position(budget, period) {
            self.lower.push((at, left));
        }
    }

    /// Somebody here wants a pause.
    pub(super) fn pause(&mut self, until: Instant) {
        if self.paused.is_none_or(|paused| paused < until) {
            self.pause = Some(until);
            self.paused = Some(until);
        }
    }

    /// Some member has begun a pause.
    pub(super) fn is_paused(&mut self, until: Instant) {
        self.paused = self.paused.max(Some(until));
    }

    pub(super) fn paused(&self, now: Instant) -> Option<Instant> {
        self.paused.filter(|until| *until > now)
    }

    // --- what is known

    pub(super) const fn is_up(&self) -> bool {
        !self.breaker.is_open() && self.asked.is_some() && self.birth != 0
    }

    pub(super) fn members(&self) -> u64 {
        self.members.max(self.settings.members)
    }

    /// What could go at once, by the last answer.
    pub(super) fn left(&self, now: Instant) -> [Option<u64>; 2] {
        let limited = |budget| self.config.sizes().iter().any(|(of, _)| *of == budget);
        let Some(frontier) = self.frontier else {
            // Nobody was asked.
            let initial = |budget| {
                let of = self.config.sizes().iter().filter(|(of, _)| *of == budget);
                of.map(|(_, size)| (size.initial as u128 / size.unit) as u64).min()
            };
            return [initial(Budget::Requests), initial(Budget::Tokens)];
        };
        [Budget::Requests, Budget::Tokens].map(|budget| {
            let left = self.left[budget as usize].unwrap_or(0);
            limited(budget).then_some(if frontier > now { 0 } else { left })
        })
    }

    /// How long a newcomer would wait behind those here, and behind others who are on their way. Other members are not
    /// counted, but for what they have reserved.
    pub(super) fn wait(&self, cost: Cost, ahead: (u128, u128), now: Instant) -> Duration {
        let from = now.max(self.frontier.unwrap_or(now)).max(self.paused.unwrap_or(now));
        let mut queued = [ahead.0, ahead.1];
        for (_, cost) in self.seats.queued() {
            queued[0] += u128::from(cost.requests);
            queued[1] += u128::from(cost.tokens);
        }
        let needed = amounts(cost);
        let waits = self.config.sizes().iter().map(|(budget, size)| {
            let budget = *budget as usize;
            let needed = queued[budget]
                .saturating_add(needed[budget].into())
                .saturating_mul(size.unit);
            // What has come in since then is not counted: it is there, or others have it.
            let there = self.frontier.map_or(size.initial as u128, |frontier| {
                let since = now.saturating_duration_since(frontier).as_micros();
                let left = u128::from(self.left[budget].unwrap_or(0)).saturating_mul(size.unit);
                left.saturating_add(since.saturating_mul(size.fill.into()))
                    .min(size.capacity as u128)
            });
            let micros = needed.saturating_sub(there) / u128::from(size.fill);
            Duration::from_micros(u64::try_from(micros).unwrap_or(u64::MAX))
        });
        (from - now).saturating_add(waits.max().unwrap_or_default())
    }

    // --- for the driver

    pub(super) fn wakers(&self) -> Vec<Waker> {
        self.seats.wakers()
    }

    pub(super) fn discarded(&mut self) -> Vec<Waker> {
        self.seats.discarded()
    }

    pub(super) fn leaves(&mut self) {
        self.is_leaving = true;
    }

    /// It has said that it leaves, or there is nobody to say it to.
    pub(super) const fn is_over(&self) -> bool {
        self.is_leaving && (self.has_left || self.birth == 0)
    }

    /// The driver is gone, and with it what it carried. If it has panicked, the next one is not to do so at once.
    pub(super) fn abandoned(&mut self, has_panicked: bool, now: Instant) {
        if has_panicked {
            self.missed(StoreError::new("asking it has panicked"), now);
        }
        for number in std::mem::take(&mut self.on_the_way) {
            self.seats.unanswered(number);
        }
    }

    /// When something is to be done that nobody calls for.
    pub(super) fn due(&self, in_flight: bool, now: Instant) -> Option<Instant> {
        let lapses = self.seats.lapses_at();
        let patience = self.out_of_patience();
        let own = self.share.as_ref().and_then(|share| {
            let serves = self.serves_itself() && !self.seats.is_queue_empty();
            serves.then(|| share.gate.unwrap_or(now))
        });
        let says = if in_flight || self.has_left {
            None
        } else {
            Some(self.says_at(now))
        };
        [lapses, patience, own, says].into_iter().flatten().min()
    }

    /// When there is something to say to the store.
    fn says_at(&self, now: Instant) -> Instant {
        let heartbeat = self.asked.map_or(now, |asked| asked + HEARTBEAT);
        let mut at = heartbeat;
        let asked = self.asked.unwrap_or(now);
        if self.pause.is_some() || self.changed.0 != self.changed.1 || !self.lower.is_empty() || self.is_leaving {
            at = now;
        }
        if !self.ledger.is_even() || self.batch.is_some() || self.spent != NONE {
            at = at.min(asked + CORRECTED_WITHIN);
        }
        if self.ledger.estimated() != self.told {
            at = at.min(asked + CONFIRMED_WITHIN);
        }
        if !self.seats.is_queue_empty() && !self.breaker.is_open() {
            at = at.min(self.gate.unwrap_or(now));
        }
        match self.breaker.next() {
            // A lost store is asked whether it is back, though there is nothing to say.
            Some(next) if self.breaker.is_open() => next,
            Some(next) => at.max(next),
            None => at,
        }
    }

    fn out_of_patience(&self) -> Option<Instant> {
        let patience = self.settings.patience.filter(|_| self.waits_for_store())?;
        Some(self.seats.oldest()? + patience)
    }

    /// Whether those in the queue can only wait.
    fn waits_for_store(&self) -> bool {
        self.breaker.is_open() && self.settings.on_loss == OnStoreLoss::Closed
    }

    fn serves_itself(&self) -> bool {
        self.breaker.is_open() && self.settings.on_loss != OnStoreLoss::Closed
    }

    /// Does what can be done here, without the store.
    pub(super) fn tend(&mut self, now: Instant, wakers: &mut Vec<Waker>) {
        let mut lapsed = Vec::new();
        self.seats.lapse(now, |cost, grant| lapsed.push((cost, grant)));
        for (cost, grant) in lapsed {
            self.counts.late += 1;
            self.settle(grant, cost, Cost::default());
        }
        if let Some(patience) = self.settings.patience.filter(|_| self.waits_for_store()) {
            let problem = self.problem.problem.clone();
            let reason = |since: Instant| {
                let waited = now.saturating_duration_since(since);
                (waited >= patience).then(|| StoreUnavailable::new(problem.clone(), waited))
            };
            self.seats
                .refuse(|seat| reason(seat.since()).map(AcquireError::StoreUnavailable), wakers);
        }
        if self.serves_itself() {
            self.serve(now, wakers);
        }
    }

    /// Gives out what there is without the store.
    fn serve(&mut self, now: Instant, wakers: &mut Vec<Waker>) {
        let paused = self.paused(now);
        let Some(share) = &mut self.share else { return };
        if share.gate.is_some_and(|gate| gate > now) {
            return;
        }
        if paused.is_some() && self.settings.on_loss == OnStoreLoss::Open {
            share.gate = paused;
            return;
        }
        let asked: Vec<_> = self.seats.queued().take(MOST_COSTS).collect();
        if asked.is_empty() {
            return;
        }
        let costs: Vec<_> = asked.iter().map(|(_, cost)| *cost).collect();
        let goes = if self.settings.on_loss == OnStoreLoss::Open {
            vec![now; costs.len()]
        } else {
            let pause = paused.map_or(Duration::ZERO, |until| until - now);
            let config = self.config.share(self.members.max(self.settings.members));
            share.reserve(config, costs, pause, now)
        };
        for ((number, cost), at) in asked.into_iter().zip(goes) {
            share.ledger.reserved(cost);
            add(&mut self.spent, amounts(cost));
            self.spent_since.get_or_insert(now);
            self.counts.degraded += 1;
            let grant = Reservation {
                at,
                at_store: 0,
                shared: false,
                era: share.ledger.era(),
            };
            // It was in the queue just now.
            let _ = self.seats.grant(number, grant, wakers);
        }
    }

    /// What to say to the store now, if anything.
    pub(super) fn say(&mut self, now: Instant) -> Option<(StoreRequest, RequestSnapshot)> {
        if self.has_left || self.says_at(now) > now {
            return None;
        }
        // A store that may be lost is not asked for anything that would be lost with it.
        let asked = if self.breaker.is_open() || self.is_leaving {
            Vec::new()
        } else {
            self.fitting(now)
        };
        if asked.is_empty() && self.says_at(now) > now {
            // There was no room, and nothing else to say.
            return None;
        }
        self.seats.asked(asked.iter().map(|(number, _)| *number));
        self.on_the_way.extend(asked.iter().map(|(number, _)| *number));
        let probes = self.breaker.is_open();
        let batch = if probes { None } else { self.corrections(now) };
        let micros = |until: Option<Instant>| {
            let left = until.map_or(Duration::ZERO, |until| until.saturating_duration_since(now));
            i64::try_from(left.as_micros()).unwrap_or(i64::MAX).min(MOST_MICROS)
        };
        let has_spent = batch.is_some_and(|batch| batch.spent != NONE);
        let remembers = has_spent || self.spent != NONE || self.kept.is_some_and(|kept| now < kept);
        let said = RequestSnapshot {
            at: now,
            estimated: self.ledger.estimated(),
            lower: std::mem::take(&mut self.lower),
            pause: self.pause,
            changed: self.changed.0,
            leaves: self.is_leaving,
            asked,
        };
        let ask = StoreRequest {
            member: self.settings.member,
            leaves: self.is_leaving,
            probes,
            ahead: self.ahead(),
            birth: if remembers { self.birth } else { 0 },
            seq: self.seq,
            horizon: micros(self.horizon),
            config: self.config.clone(),
            base: self.base.clone(),
            stamp: self.stamp,
            changes: self.changed.0 != self.changed.1,
            batch: self.batches,
            credit: batch.map_or(NONE, |batch| batch.credit),
            debit: batch.map_or(NONE, |batch| batch.debit),
            spent: batch.map_or(NONE, |batch| batch.spent),
            alone: batch.filter(|_| has_spent).map_or(0, |batch| {
                let alone = now.saturating_duration_since(batch.since).as_micros();
                i64::try_from(alone).unwrap_or(MOST_MICROS).clamp(1, MOST_MICROS)
            }),
            shares: i64::try_from(self.members()).unwrap_or(1),
            estimated: said.estimated,
            pause: micros(self.pause),
            lower: said.lower.clone(),
            costs: said.asked.iter().map(|(_, cost)| *cost).collect(),
        };
        self.asked = Some(now);
        self.counts.calls += 1;
        Some((ask, said))
    }

    /// What there is to correct: the batch that was not heard yet, or a new one.
    fn corrections(&mut self, now: Instant) -> Option<AdjustmentBatch> {
        if self.batch.is_none() && (!self.ledger.is_even() || self.spent != NONE) {
            let (credit, mut debit) = self.ledger.corrections();
            let mut spent = std::mem::take(&mut self.spent);
            if self.settings.on_loss == OnStoreLoss::Open {
                // That was no share: it is paid in full.
                add(&mut debit, std::mem::take(&mut spent));
            }
            self.batches += 1;
            self.batch = Some(AdjustmentBatch {
                credit,
                debit,
                spent,
                since: self.spent_since.take().unwrap_or(now),
            });
        }
        self.batch
    }

    fn ahead(&self) -> i64 {
        i64::try_from(self.settings.ahead.as_micros()).unwrap_or(MOST_MICROS)
    }

    /// Those in the queue that may be asked for: each member has so much reserved that all of them together reach as
    /// far ahead as they may. So nobody takes what others wait for, and each gets the same.
    fn fitting(&mut self, now: Instant) -> Vec<(u64, Cost)> {
        if self.seats.is_queue_empty() || self.gate.is_some_and(|gate| gate > now) {
            return Vec::new();
        }
        let share = self.fair_share(now).as_micros() as f64;
        let worth = |pending: Amounts| {
            let sizes = self.config.sizes().iter();
            let worths =
                sizes.map(|(budget, size)| pending[*budget as usize] as f64 * size.unit as f64 / size.fill as f64);
            worths.fold(0.0, f64::max)
        };
        let mut pending = self.seats.pending();
        let mut fitting = Vec::new();
        for (number, cost) in self.seats.queued().take(MOST_COSTS) {
            if worth(pending) > share {
                break;
            }
            add(&mut pending, amounts(cost));
            fitting.push((number, cost));
        }
        self.gate = fitting.is_empty().then(|| now + self.pace(now));
        fitting
    }

    /// How far ahead we may reserve, as if all of the rate were ours: enough for a few round trips, and no more, so that
    /// what members reserve is well mixed.
    fn fair_share(&self, now: Instant) -> Duration {
        // A newcomer does not know yet who else is new.
        let is_new = self.joined.is_none_or(|joined| now < joined + NEWCOMER);
        let least = if is_new { NEWCOMERS } else { 1 };
        let members = u32::try_from(self.members().max(least)).unwrap_or(u32::MAX);
        (RESERVED / members)
            .max(RESERVED_EACH)
            .max(4 * self.round_trip)
            .min(self.settings.ahead / members)
    }

    /// How long to wait for room. Scattered, so that no member is always just before another.
    fn pace(&self, now: Instant) -> Duration {
        let pace = (self.fair_share(now) / 4).clamp(Duration::from_millis(2), Duration::from_millis(50));
        pace.mul_f64(0.5 + 0.5 * fastrand::f64())
    }

    /// The store has answered.
    pub(super) fn answered(&mut self, said: RequestSnapshot, answer: StoreReply, now: Instant) -> Vec<Waker> {
        self.on_the_way.clear();
        self.joined = self.joined.or(Some(now));
        // The longest of late: it falls slowly.
        self.round_trip = (self.round_trip * 15 / 16).max(now - said.at);
        self.failing = None;
        self.has_left = said.leaves;
        let mut wakers = Vec::new();
        let instant = |micros: i64| {
            let far = Duration::from_micros(micros.max(0).unsigned_abs());
            now.checked_add(far).unwrap_or(now)
        };
        let back = self.breaker.succeeded();
        if back {
            tracing::info!(members = answer.members, "the store of the shared limits is back");
        }
        if !back {
            self.batch = None;
        }
        if self.share.take().is_some() {
            self.gate = None;
        }

        let is_another = self.birth != 0 && answer.birth != self.birth;
        if is_another || (!answer.known && said.estimated != NONE) {
            self.ledger.forgotten();
            if is_another && self.kept.is_some_and(|kept| now < kept) {
                self.counts.forgotten += 1;
                tracing::warn!("the store has lost the state of the shared limits: they begin anew, empty");
            }
        }
        (self.birth, self.seq) = (answer.birth, answer.seq);
        self.members = answer.members;
        self.left = answer.left;
        self.kept = Some(instant(answer.kept.saturating_mul(1_000)));
        self.frontier = Some(if answer.lead < 0 {
            now.checked_sub(Duration::from_micros(answer.lead.unsigned_abs()))
                .unwrap_or(now)
        } else {
            instant(answer.lead)
        });

        if said.changed == self.changed.0 {
            self.changed.1 = said.changed;
            self.stamp = answer.stamp;
            if let Some(text) = answer.config {
                self.heard_of(&text, &mut wakers);
            }
        }
        if self.pause == said.pause {
            self.pause = None;
        }
        if answer.pause > 0 {
            self.is_paused(instant(answer.pause));
        } else if self.pause.is_none() {
            self.paused = None;
        }

        let (asked, granted) = (said.asked.len(), answer.goes.len());
        let mut goes = answer.goes.into_iter();
        for (number, cost) in said.asked {
            match goes.next() {
                Some(go) => {
                    let grant = Reservation {
                        at: instant(go),
                        at_store: answer.now + go,
                        shared: true,
                        era: self.ledger.era(),
                    };
                    self.reserved(number, cost, grant, &mut wakers);
                }
                None => self.seats.unanswered(number),
            }
        }
        if granted < asked {
            // Some may have been asked for while the limits were changed.
            self.refuse_too_large(&mut wakers);
        }
        self.told = self.ledger.estimated();
        if answer.again > 0 {
            self.gate = Some(instant(answer.again) + self.pace(now));
        } else if granted == 0 && !self.seats.is_queue_empty() && self.gate.is_none() {
            // Others' limits, perhaps. It is not to be asked the same again at once.
            self.gate = Some(now + self.pace(now));
        }
        wakers
    }

    /// The store has reserved what was asked for.
    fn reserved(&mut self, number: u64, cost: Cost, grant: Reservation, wakers: &mut Vec<Waker>) {
        self.ledger.reserved(cost);
        self.horizon = self.horizon.max(Some(grant.at));
        if !self.seats.grant(number, grant, wakers) {
            // It has left meanwhile.
            self.ledger.settle(grant.era, cost, Cost::default());
        }
    }

    /// Some member has changed the limits.
    fn heard_of(&mut self, text: &str, wakers: &mut Vec<Waker>) {
        if text == self.config.text() {
            return;
        }
        match QuotaConfig::read(text) {
            Some(config) => {
                tracing::info!(limits = text, "another member has set the shared limits");
                wakers.extend(self.take_over(config));
            }
            None => tracing::warn!(
                limits = text,
                "another member has set shared limits that make no sense here"
            ),
        }
    }

    /// The store has not answered.
    pub(super) fn failed(&mut self, said: RequestSnapshot, error: StoreError, now: Instant) {
        self.on_the_way.clear();
        // It has tried.
        self.has_left = said.leaves;
        for (number, _) in &said.asked {
            self.seats.unanswered(*number);
        }
        if said.changed == self.changed.0 {
            // It is still said of these limits. The least is what counts.
            self.lower.extend(said.lower);
        }
        self.missed(error, now);
    }

    /// Once more there was no answer.
    fn missed(&mut self, error: StoreError, now: Instant) {
        self.counts.failures += 1;
        self.failing = self.failing.or(self.asked);
        if self.breaker.failed(now) {
            self.counts.losses += 1;
            tracing::warn!(
                problem = %error.problem,
                until_it_is_back = ?self.settings.on_loss,
                "the store of the shared limits is lost"
            );
            // What others may have reserved goes first.
            let reserved = (self.birth != 0).then(|| self.failing.unwrap_or(now) + self.settings.ahead);
            let begins = reserved.max(self.horizon).max(self.frontier).unwrap_or(now);
            self.share = Some(LocalFallback::new(self.counts.losses, begins, now));
        }
        self.problem = error;
    }
}

fn set_bursts(bursts: &Bursts, config: &QuotaConfig) {
    let sizes = config.sizes().iter();
    bursts.set(&sizes.map(|(budget, size)| (*budget, size.burst())));
}
