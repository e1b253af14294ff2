//! Compares `RateLimiter` with a model of it: a list of waiters, and a balance per rate in whole fractions of what its budget counts.
//!
//! The limiter has a lock, a timer task, timers and wakers; the model has none of them. Both get the same steps at the
//! same times, and they must agree to the nanosecond about which calls are admitted, what is left, and how long the
//! next call would wait. Two general rules are checked as well: what the calls that are admitted in any window of time
//! may cost, and that no bucket holds more than if it had been charged the true costs from the start.

mod support;

use proptest::{collection::vec, option, prelude::*, sample::Index};
use std::{future::Future, pin::Pin, task::Poll, time::Duration};
use support::model::{Outcome, check, turns};
use tokio::time::{Instant, advance};
use tokio_test::task::{self, Spawn};
use tower_outbound::{Cost, Limits, Rate, RateLimiter, error::AcquireError, rate::Estimate};

const MS: u64 = 1_000_000;
const MAX_CATCH_UP: u64 = 5 * MS;

// === Steps ===

#[derive(Clone, Copy, Debug)]
struct RateSpec {
    budget: BudgetIndex,
    amount: u64,
    period: u64,
    burst: Option<u64>,
    /// The initial fill of the bucket: a number, or thousandths of the burst.
    initial: Option<Quantity>,
}

/// The budgets of the test: those that are built in, and more others than one limiter can count.
const BUDGETS: [&str; 10] = [
    "requests",
    "tokens",
    "input_tokens",
    "output_tokens",
    "images",
    "seconds",
    "image",
    "cents.usd",
    "image-2",
    "i",
];

/// The number of the first budgets in [`BUDGETS`], which are built in.
const BUILT_IN: usize = 4;

/// The largest number of other budgets that a cost, or the limits of a limiter, can name.
const MAX_NAMED: usize = 4;

/// The index of a budget in [`BUDGETS`].
type BudgetIndex = usize;

/// An amount of a budget: as such, or as thousandths of the largest possible number, which is a burst.
#[derive(Clone, Copy, Debug)]
enum Quantity {
    Absolute(u64),
    Thousandths(u64),
}

/// The cost of a call: an amount of each budget, as thousandths of the smallest burst or as such. `None` for a budget
/// that the cost does not name.
#[derive(Clone, Copy, Debug)]
struct CostSpec([Option<Quantity>; BUDGETS.len()]);

#[derive(Clone, Debug)]
enum Step {
    Acquire(CostSpec),
    /// Acquires an estimate of the first cost. The second cost is the true one, with which the estimate may be settled
    /// later.
    AcquireEstimate(CostSpec, CostSpec),
    TryAcquire(CostSpec),
    /// Like `AcquireEstimate`, without waiting.
    TryAcquireEstimate(CostSpec, CostSpec),
    /// Waits for a cost and takes nothing.
    Ready(CostSpec),
    Cancel(Index),
    /// Polls a waiter that need not have been woken.
    Poll(Index),
    Settle(Index),
    /// Drops an estimate without settling it.
    DropEstimate(Index),
    PauseFor(u64),
    PauseUntil(i64),
    Resume,
    ForgiveDebts,
    SetLimits(Vec<RateSpec>),
    Advance(u64),
    /// Advances the clock to the time at which the first waiter can be admitted, plus this number of nanoseconds, which
    /// may be negative.
    AdvanceToAdmission(i64),
}

#[derive(Clone, Debug)]
struct Case {
    /// The time from a tick of Tokio's timer, which has one each millisecond, to the creation of the limiter, in
    /// nanoseconds.
    phase: u64,
    limits: Vec<RateSpec>,
    steps: Vec<Step>,
    /// Whether the waiter that came last is polled first when several waiters are woken.
    last_first: bool,
}

fn rate_spec() -> impl Strategy<Value = RateSpec> {
    let amount = prop_oneof![
        1..10_u64,
        Just(7),
        Just(100),
        Just(20_000),
        Just(999_983),
        1..1_000_000_u64
    ];
    let period = prop_oneof![
        Just(1_000 * MS),
        Just(13_000 * MS),
        Just(60_000 * MS),
        Just(3_600_000 * MS),
        Just(1_000_003),
        1..50 * MS,
    ];
    let burst = option::of(prop_oneof![Just(1), 1..10_u64, 1..5_000_u64]);
    // Most rates are of a few budgets, so that there are often several rates of one.
    let budget = prop_oneof![3 => 0..2_usize, 2 => 0..5_usize, 1 => 0..BUDGETS.len()];
    (budget, amount, period, burst, option::of(quantity())).prop_map(|(budget, amount, period, burst, initial)| {
        RateSpec {
            budget,
            amount,
            period,
            burst,
            initial,
        }
    })
}

/// The rates of a limiter, of no more budgets than it can count.
fn rate_specs(max: usize) -> impl Strategy<Value = Vec<RateSpec>> {
    vec(rate_spec(), 0..max).prop_map(|mut specs| {
        let mut named = Vec::new();
        specs.retain(|spec| {
            let is_known = spec.budget < BUILT_IN || named.contains(&spec.budget);
            let has_room = named.len() < MAX_NAMED;
            if !is_known && has_room {
                named.push(spec.budget);
            }
            is_known || has_room
        });
        specs
    })
}

fn quantity() -> impl Strategy<Value = Quantity> {
    prop_oneof![
        (0..4_u64).prop_map(Quantity::Absolute),
        (0..=1_000_u64).prop_map(Quantity::Thousandths),
    ]
}

fn cost_spec() -> impl Strategy<Value = CostSpec> {
    let requests = prop_oneof![
        6 => Just(Quantity::Absolute(1)),
        1 => Just(Quantity::Absolute(0)),
        2 => (0..1_020_u64).prop_map(Quantity::Thousandths),
    ];
    let tokens = prop_oneof![
        2 => Just(Quantity::Absolute(0)),
        2 => (1..4_u64).prop_map(Quantity::Absolute),
        6 => (0..1_020_u64).prop_map(Quantity::Thousandths),
    ];
    let other = prop_oneof![
        4 => Just(None),
        1 => Just(Some(Quantity::Absolute(0))),
        1 => (1..4_u64).prop_map(|amount| Some(Quantity::Absolute(amount))),
        3 => (0..1_020_u64).prop_map(|part| Some(Quantity::Thousandths(part))),
        // Without a rate of the budget, it may be any amount.
        1 => Just(Some(Quantity::Absolute(u64::MAX))),
    ];
    let others = [(); BUDGETS.len() - 2].map(|()| other.clone());
    (requests, tokens, others).prop_map(|(requests, tokens, others)| {
        let mut all = [None; BUDGETS.len()];
        all[0] = Some(requests);
        all[1] = Some(tokens);
        all[2..].copy_from_slice(&others);
        let named = all[BUILT_IN..].iter_mut().filter(|amount| amount.is_some());
        named.skip(MAX_NAMED).for_each(|amount| *amount = None);
        CostSpec(all)
    })
}

fn nanos() -> impl Strategy<Value = u64> {
    prop_oneof![
        Just(1),
        Just(MS - 1),
        Just(MS),
        Just(MS + 1),
        Just(MAX_CATCH_UP - 1),
        Just(MAX_CATCH_UP),
        Just(MAX_CATCH_UP + 1),
        1..20 * MS,
        1..2_000 * MS,
        1..100_000 * MS,
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => cost_spec().prop_map(Step::Acquire),
        4 => (cost_spec(), cost_spec()).prop_map(|(charged, used)| Step::AcquireEstimate(charged, used)),
        3 => cost_spec().prop_map(Step::TryAcquire),
        1 => (cost_spec(), cost_spec()).prop_map(|(charged, used)| Step::TryAcquireEstimate(charged, used)),
        2 => cost_spec().prop_map(Step::Ready),
        2 => any::<Index>().prop_map(Step::Cancel),
        3 => any::<Index>().prop_map(Step::Poll),
        3 => any::<Index>().prop_map(Step::Settle),
        1 => any::<Index>().prop_map(Step::DropEstimate),
        1 => nanos().prop_map(Step::PauseFor),
        1 => (-20..200_i64).prop_map(|ms| Step::PauseUntil(ms * MS as i64 + 7)),
        1 => prop_oneof![Just(Step::Resume), Just(Step::ForgiveDebts)],
        1 => rate_specs(7).prop_map(Step::SetLimits),
        5 => nanos().prop_map(Step::Advance),
        6 => prop_oneof![
            Just(0), Just(-1), Just(1), Just(MAX_CATCH_UP as i64), 0..10 * MS as i64
        ].prop_map(Step::AdvanceToAdmission),
    ]
}

fn case() -> impl Strategy<Value = Case> {
    (0..MS, rate_specs(7), vec(step(), 1..60), any::<bool>()).prop_map(|(phase, limits, steps, last_first)| Case {
        phase,
        limits,
        steps,
        last_first,
    })
}

impl RateSpec {
    fn burst(&self) -> u64 {
        self.burst.unwrap_or(self.amount)
    }

    fn initial(&self) -> u64 {
        self.initial
            .map_or(self.burst(), |quantity| quantity.of(Some(self.burst())))
    }
}

impl Quantity {
    /// Returns the amount if the largest possible one is `whole`, and no more than one above it. Without a largest one,
    /// thousandths are of 1,000.
    fn of(self, whole: Option<u64>) -> u64 {
        match (self, whole) {
            (Self::Absolute(amount), Some(whole)) => amount.min(whole + 1),
            (Self::Absolute(amount), None) => amount,
            (Self::Thousandths(part), whole) => whole.unwrap_or(1_000) * part / 1_000,
        }
    }
}

fn limits(specs: &[RateSpec]) -> Limits {
    specs.iter().fold(Limits::new(), |limits, spec| {
        let mut rate = Rate::new(spec.amount, Duration::from_nanos(spec.period));
        if let Some(burst) = spec.burst {
            rate = rate.burst(burst);
        }
        if spec.initial.is_some() {
            rate = rate.initial(spec.initial().min(spec.burst()));
        }
        limits.budget(BUDGETS[spec.budget], rate)
    })
}

// === The model ===

/// The model of one rate's bucket. It counts in units, which are whole fractions of what the budget counts: one request
/// or token is `unit` units, and each nanosecond adds `fill` units.
#[derive(Clone, Debug)]
struct Bucket {
    budget: BudgetIndex,
    period: u64,
    fill: i128,
    unit: i128,
    capacity: i128,
    balance: i128,
    estimated: i128,
    withheld: i128,
    /// The number of estimates that were charged to this bucket.
    charged: usize,
    /// How many of them were charged before `withheld` last rose from 0; 0 if a forgotten debt is withheld.
    charged_without: usize,
    /// The largest debt: what the rate adds in ten minutes or in one period, or the burst, whichever is the most.
    max_debt: i128,
    /// The balance, in units, that the bucket would have if it had been charged the true costs from the start.
    ideal: i128,
    /// The number of the first estimate that was charged to this bucket. Earlier estimates were charged before the
    /// bucket existed.
    first_estimate: usize,
}

#[derive(Clone, Debug)]
struct Waiting {
    id: usize,
    cost: Cost,
    charge: Charge,
}

/// What a call is charged when it is admitted.
#[derive(Clone, Copy, Debug)]
enum Charge {
    Nothing,
    Cost,
    /// Its cost as an estimate, and later this true cost.
    Estimate(Cost),
}

/// An admitted call: when it was admitted, and its true cost, or what it was charged if that is less.
#[derive(Clone, Debug)]
struct Admitted {
    at: u64,
    cost: Cost,
}

#[derive(Debug)]
struct Model {
    buckets: Vec<Bucket>,
    /// The time up to which the buckets are filled, in nanoseconds. It may be earlier than `now`.
    filled_to: u64,
    now: u64,
    paused_until: u64,
    /// The time at which a waiter was last admitted, how much earlier it could have been admitted, in nanoseconds, and which
    /// bucket it waited for. Zeros if no bucket is credited.
    last_admission: (u64, u64, usize),
    queue: Vec<Waiting>,
    /// The calls that were admitted since the limits were last set.
    admitted: Vec<Admitted>,
    /// The number of estimates that have been charged.
    estimates: usize,
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

impl Bucket {
    fn new(spec: &RateSpec, first_estimate: usize) -> Self {
        let divisor = gcd(spec.amount, spec.period);
        let unit = i128::from(spec.period / divisor);
        let initial = i128::from(spec.initial().min(spec.burst())) * unit;
        let fill = i128::from(spec.amount / divisor);
        let capacity = i128::from(spec.burst()) * unit;
        Self {
            budget: spec.budget,
            period: spec.period,
            fill,
            unit,
            capacity,
            max_debt: capacity.max(fill * i128::from(spec.period.max(600_000 * MS))),
            balance: initial,
            estimated: 0,
            withheld: 0,
            charged: 0,
            charged_without: 0,
            ideal: initial,
            first_estimate,
        }
    }

    fn units(&self, cost: Cost) -> i128 {
        i128::from(cost.of(BUDGETS[self.budget])) * self.unit
    }

    fn can_never_hold(&self, cost: Cost) -> bool {
        self.units(cost) > self.capacity
    }

    /// Returns the number of nanoseconds until the bucket holds this number of units; 0 for no units, even in debt.
    fn time_until(&self, units: i128) -> u64 {
        let missing = if units == 0 { 0 } else { (units - self.balance).max(0) };
        u64::try_from((missing + self.fill - 1) / self.fill).unwrap()
    }

    fn advance(&mut self, nanos: u64) {
        let gained = i128::from(nanos) * self.fill;
        self.balance = (self.balance + gained).min(self.capacity);
        self.ideal = (self.ideal + gained).min(self.capacity);
        self.update_withheld();
    }

    /// Loses what would overflow within `nanos`, for a call that is admitted as of a time that is so long ago. The bucket
    /// that made the call wait loses nothing, nor does one that cannot hold what comes in `MAX_CATCH_UP`.
    fn overflow(&mut self, nanos: u64, is_binding: bool) {
        let gain = |nanos: u64| i128::from(nanos) * self.fill;
        if is_binding || self.capacity < gain(MAX_CATCH_UP) {
            return;
        }
        let filled = self.balance + gain(nanos);
        let spilled = (filled - self.capacity).max(0);
        let ideal_spilled = (self.ideal + gain(nanos) - self.capacity).max(0);
        self.balance -= spilled;
        self.ideal -= ideal_spilled;
        self.raise_withheld(self.estimated + filled.min(self.capacity) - self.capacity);
    }

    fn take(&mut self, cost: Cost, used: Option<Cost>) {
        let charged = self.units(cost);
        self.balance -= charged;
        self.ideal -= used.map_or(charged, |used| self.units(used).min(charged));
        if used.is_some() {
            self.estimated += charged;
            self.charged += 1;
        }
    }

    /// Replaces the estimate `cost` by the true cost `used`. If `estimate`, its number, is too low, the estimate was
    /// charged before the bucket existed, and the bucket refunds nothing.
    fn settle(&mut self, cost: Cost, used: Cost, estimate: usize) {
        let (charged, used) = (self.units(cost), self.units(used));
        let was_charged = estimate >= self.first_estimate;
        if used > charged {
            let balance = self.balance - (used - charged);
            self.balance = balance.max(-self.max_debt);
            self.withhold_debt(self.balance - balance);
            self.ideal = (self.ideal - (used - charged)).max(-self.max_debt);
        }
        // What the call has used could not have overflowed after it was charged.
        if was_charged && estimate - self.first_estimate < self.charged_without {
            self.withheld = (self.withheld - used.min(charged)).max(0);
        }
        if was_charged && used < charged {
            let refund = charged - used;
            let kept = refund.min(self.withheld);
            self.withheld -= kept;
            self.balance = (self.balance + refund - kept).min(self.capacity);
        }
        if was_charged {
            self.estimated -= charged;
        }
        self.withheld = self.withheld.min(self.estimated);
        self.update_withheld();
    }

    /// Raises `withheld` to the part of the unsettled estimates that would have overflowed by now if all of them had a
    /// true cost of 0.
    fn update_withheld(&mut self) {
        self.raise_withheld(self.estimated + self.balance - self.capacity);
    }

    fn raise_withheld(&mut self, to: i128) {
        if to > self.withheld {
            if self.withheld == 0 {
                self.charged_without = self.charged;
            }
            self.withheld = to;
        }
    }

    /// What is forgotten of a debt is not given back by later refunds.
    fn withhold_debt(&mut self, debt: i128) {
        if debt > 0 {
            self.withheld = (self.withheld + debt).min(self.estimated);
            self.charged_without = 0;
        }
    }

    fn carry_over(&mut self, old: &Self) {
        let convert = |units: i128| (units * self.unit).div_euclid(old.unit);
        let (balance, ideal) = (convert(old.balance), convert(old.ideal));
        self.balance = balance.clamp(-self.max_debt, self.capacity);
        self.ideal = ideal.clamp(-self.max_debt, self.capacity);
        self.estimated = convert(old.estimated);
        // The balance minus the withheld part is converted and rounded down, as the limiter does. Rounding the withheld
        // part down by itself could make a later refund one unit too large.
        self.withheld = (balance - convert(old.balance - old.withheld)).min(self.estimated);
        self.first_estimate = old.first_estimate;
        (self.charged, self.charged_without) = (old.charged, old.charged_without);
        self.withhold_debt((-self.max_debt - balance).max(0));
        self.update_withheld();
    }
}

impl Model {
    fn new(specs: &[RateSpec]) -> Self {
        Self {
            buckets: specs.iter().map(|spec| Bucket::new(spec, 0)).collect(),
            filled_to: 0,
            now: 0,
            paused_until: 0,
            last_admission: (0, 0, 0),
            queue: Vec::new(),
            admitted: Vec::new(),
            estimates: 0,
        }
    }

    /// Returns the first burst that the cost exceeds, if any: of which budget it is, the cost, and the burst.
    fn rejection(&self, cost: Cost) -> Option<Rejection> {
        let exceeded = self.buckets.iter().find(|bucket| bucket.can_never_hold(cost))?;
        let budget = BUDGETS[exceeded.budget];
        let burst = u64::try_from(exceeded.capacity / exceeded.unit).unwrap();
        Some((budget, cost.of(budget), burst))
    }

    /// Returns the time as of which a first waiter with this cost is admitted: when its cost is available and no pause
    /// is in force, or `MAX_CATCH_UP` before the present if that is later.
    fn time_of_admission(&self, cost: Cost) -> u64 {
        let waits = self.buckets.iter().map(|bucket| bucket.time_until(bucket.units(cost)));
        let available = self.filled_to + waits.max().unwrap_or(0);
        available
            .max(self.now.saturating_sub(MAX_CATCH_UP))
            .max(self.paused_until)
    }

    /// Returns which bucket holds the cost last, if it does not hold it already.
    fn binding(&self, cost: Cost) -> Option<usize> {
        let waits = self.buckets.iter().map(|bucket| bucket.time_until(bucket.units(cost)));
        let waits: Vec<_> = waits.collect();
        let longest = *waits.iter().max()?;
        waits.iter().position(|wait| *wait == longest && longest > 0)
    }

    /// Fills the buckets while no call waits. They are filled up to the present, unless a waiter was admitted late
    /// within the last `MAX_CATCH_UP`. Then they stay behind the present by as much as that waiter was late, up to
    /// `MAX_CATCH_UP`.
    fn fill_idle(&mut self) {
        let (admitted, lateness, _) = self.last_admission;
        let behind = if self.now - admitted <= MAX_CATCH_UP {
            lateness.min(MAX_CATCH_UP)
        } else {
            0
        };
        self.fill_to(self.now.saturating_sub(behind));
    }

    fn fill_to(&mut self, time: u64) {
        if time > self.filled_to {
            let elapsed = time - self.filled_to;
            self.buckets.iter_mut().for_each(|bucket| bucket.advance(elapsed));
            self.filled_to = time;
        }
    }

    fn admit(&mut self, cost: Cost, charge: Charge, waited: bool) {
        let used = match charge {
            Charge::Nothing => return,
            Charge::Cost => None,
            Charge::Estimate(used) => Some(used),
        };
        let at = self.time_of_admission(cost);
        // A call that need not wait is admitted as of the time up to which the buckets are filled, because of the call
        // before it.
        let is_behind = !waited && at == self.filled_to;
        let binding = if is_behind {
            Some(self.last_admission.2)
        } else {
            self.binding(cost)
        };
        self.fill_to(at);
        let late = self.now - at;
        for (index, bucket) in self.buckets.iter_mut().enumerate().filter(|_| late > 0) {
            bucket.overflow(late, binding == Some(index));
        }
        if waited {
            let credited = binding.filter(|_| late > 0);
            self.last_admission = credited.map_or((0, 0, 0), |binding| (self.now, late, binding));
        }
        let estimate = self.estimates;
        for bucket in &mut self.buckets {
            bucket.take(cost, used);
        }
        if used.is_some() {
            self.estimates = estimate + 1;
        }
        let used = used.unwrap_or(cost);
        let least = |sum: Cost, budget: &str| match cost.of(budget).min(used.of(budget)) {
            0 => sum,
            amount => sum.with(budget, amount),
        };
        self.admitted.push(Admitted {
            at: self.now,
            cost: BUDGETS.into_iter().fold(Cost::none(), least),
        });
    }

    /// Models the arrival of a call, and returns whether the call is admitted at once.
    fn arrive(&mut self, cost: Cost, charge: Charge) -> bool {
        if !self.queue.is_empty() {
            return false;
        }
        self.fill_idle();
        let is_admitted = self.rejection(cost).is_none() && self.time_of_admission(cost) <= self.now;
        if is_admitted {
            self.admit(cost, charge, false);
        }
        is_admitted
    }

    /// Models a poll of the waiter with this number, and returns whether the waiter is admitted.
    fn poll(&mut self, id: usize) -> bool {
        let first = self.queue[0].clone();
        let is_admitted = first.id == id && self.time_of_admission(first.cost) <= self.now;
        if is_admitted {
            self.admit(first.cost, first.charge, true);
            self.queue.remove(0);
        }
        is_admitted
    }

    fn leave(&mut self, id: usize) {
        self.queue.retain(|waiting| waiting.id != id);
    }

    /// Returns after which time a call of this cost should be retried if it is not admitted at once.
    fn retry_after(&self, cost: Cost) -> Duration {
        let waits = self.buckets.iter().map(|bucket| {
            let ahead: i128 = self.queue.iter().map(|waiting| bucket.units(waiting.cost)).sum();
            bucket.time_until(ahead + bucket.units(cost))
        });
        let admission = (self.filled_to + waits.max().unwrap_or(0)).max(self.paused_until);
        match admission.saturating_sub(self.now) {
            0 => Duration::from_millis(1),
            wait => Duration::from_nanos(wait),
        }
    }

    /// Sets the end of the pause. An end that has passed ends the pause now, and changes nothing without a pause.
    fn pause(&mut self, until: u64) {
        if until.max(self.paused_until) > self.now {
            self.paused_until = until.max(self.now);
        }
    }

    fn fill_unless_waiting(&mut self) {
        // While a call with a cost waits, the buckets are not filled, because the call may still be admitted as of a
        // time in the past.
        if self.queue.iter().all(|waiting| waiting.cost == Cost::default()) {
            self.fill_idle();
        }
    }

    fn forgive_debts(&mut self) {
        self.fill_unless_waiting();
        for bucket in &mut self.buckets {
            let debt = (-bucket.balance).max(0);
            bucket.balance += debt;
            bucket.withhold_debt(debt);
            bucket.ideal = bucket.ideal.max(0);
        }
    }

    fn settle(&mut self, estimate: usize, cost: Cost, used: Cost) {
        self.fill_unless_waiting();
        for bucket in &mut self.buckets {
            bucket.settle(cost, used, estimate);
        }
    }

    fn set_limits(&mut self, specs: &[RateSpec]) {
        self.fill_to(self.now);
        self.last_admission = (0, 0, 0);
        let mut new: Vec<_> = specs.iter().map(|spec| Bucket::new(spec, self.estimates)).collect();
        // Each new bucket takes over the old one of the same period, or else the first old one that is left over.
        let mut old: Vec<_> = self.buckets.drain(..).map(Some).collect();
        let mut has_old = vec![false; new.len()];
        for same_period in [true, false] {
            for (new, has_old) in new.iter_mut().zip(&mut has_old).filter(|(_, has_old)| !**has_old) {
                let found = old.iter_mut().find(|old| {
                    old.as_ref().is_some_and(|old: &Bucket| {
                        old.budget == new.budget && (!same_period || old.period == new.period)
                    })
                });
                if let Some(old) = found.and_then(Option::take) {
                    new.carry_over(&old);
                    *has_old = true;
                }
            }
        }
        self.buckets = new;
        self.admitted.clear();
    }

    fn available(&self, budget: BudgetIndex) -> Option<u64> {
        let elapsed = self.now.saturating_sub(self.filled_to);
        let buckets = self.buckets.iter().filter(|bucket| bucket.budget == budget);
        let left = buckets.map(|bucket| {
            let mut bucket = bucket.clone();
            bucket.advance(elapsed);
            u64::try_from(bucket.balance.max(0) / bucket.unit).unwrap()
        });
        left.min()
    }

    /// Returns the largest amount of a budget that one call may cost: the smallest burst, or `None` without a rate.
    fn max_cost(&self, budget: BudgetIndex) -> Option<u64> {
        let buckets = self.buckets.iter().filter(|bucket| bucket.budget == budget);
        let bursts = buckets.map(|bucket| u64::try_from(bucket.capacity / bucket.unit).unwrap());
        bursts.min()
    }

    fn cost(&self, spec: CostSpec) -> Cost {
        let amounts = (0..)
            .zip(spec.0)
            .filter_map(|(budget, quantity)| Some((budget, quantity?)));
        amounts.fold(Cost::none(), |cost, (budget, quantity)| {
            cost.with(BUDGETS[budget], quantity.of(self.max_cost(budget)))
        })
    }

    /// Checks that no bucket holds more than if the true costs had been charged from the start.
    fn check_true_usage(&self) -> Outcome {
        for bucket in &self.buckets {
            prop_assert!(
                bucket.balance <= bucket.ideal,
                "more than the true usage allows: {bucket:?}"
            );
        }
        Ok(())
    }

    /// Checks that the calls admitted in any window of time cost no more than the burst plus what the rate adds in the
    /// length of the window and in `MAX_CATCH_UP`.
    fn check_windows(&self) -> Outcome {
        for bucket in &self.buckets {
            for (first, from) in self.admitted.iter().enumerate() {
                let mut sum = 0;
                for admitted in &self.admitted[first..] {
                    sum += bucket.units(admitted.cost);
                    let length = i128::from(admitted.at - from.at + MAX_CATCH_UP);
                    prop_assert!(
                        sum <= bucket.capacity + bucket.fill * length,
                        "too much was admitted from {} to {}: {bucket:?}",
                        from.at,
                        admitted.at
                    );
                }
            }
        }
        Ok(())
    }
}

// === The limiter and the model side by side ===

type Acquiring = Pin<Box<dyn Future<Output = Result<Option<Estimate>, AcquireError>>>>;

/// The budget whose burst a cost exceeds, the cost, and the burst.
type Rejection = (&'static str, u64, u64);

struct Caller {
    id: usize,
    cost: Cost,
    charge: Charge,
    future: Spawn<Acquiring>,
}

struct ChargedEstimate {
    /// The number of estimates that were charged before this estimate.
    number: usize,
    estimate: Estimate,
    used: Cost,
}

struct Harness {
    limiter: RateLimiter,
    model: Model,
    /// When the limiter was created, which is time 0 of the model.
    start: Instant,
    /// Time 0 of Tokio's clock. Timers fire at whole milliseconds after it.
    origin: Instant,
    callers: Vec<Caller>,
    charged: Vec<ChargedEstimate>,
    next_id: usize,
    last_first: bool,
}

fn check_rejection(error: &AcquireError, expected: Option<Rejection>) -> Outcome {
    let AcquireError::CostExceedsBurst(rejection) = error else {
        return Err(TestCaseError::fail(error.to_string()));
    };
    let actual = (rejection.budget(), rejection.cost(), rejection.burst());
    prop_assert_eq!(Some(actual), expected);
    Ok(())
}

impl Harness {
    async fn start(case: &Case) -> Self {
        let origin = Instant::now();
        advance(Duration::from_nanos(case.phase)).await;
        Self {
            limiter: RateLimiter::new(limits(&case.limits)).unwrap(),
            model: Model::new(&case.limits),
            start: Instant::now(),
            origin,
            callers: Vec::new(),
            charged: Vec::new(),
            next_id: 0,
            last_first: case.last_first,
        }
    }

    fn at(&self, nanos: u64) -> Instant {
        self.start + Duration::from_nanos(nanos)
    }

    async fn advance(&mut self, nanos: u64) {
        advance(Duration::from_nanos(nanos)).await;
        self.model.now += nanos;
    }

    /// Runs one step with the limiter and with the model. Returns whether the limiter has checked during the step
    /// whether its first waiter is to be woken.
    async fn step(&mut self, step: &Step) -> Result<bool, TestCaseError> {
        match step {
            Step::Acquire(spec) => return self.acquire(self.model.cost(*spec), Charge::Cost),
            Step::Ready(spec) => return self.acquire(self.model.cost(*spec), Charge::Nothing),
            Step::AcquireEstimate(spec, used) => {
                let used = self.model.cost(*used);
                return self.acquire(self.model.cost(*spec), Charge::Estimate(used));
            }
            Step::TryAcquire(spec) | Step::TryAcquireEstimate(spec, _) => {
                let cost = self.model.cost(*spec);
                let expected = self.model.rejection(cost);
                prop_assert_eq!(self.limiter.check(cost).is_err(), expected.is_some());
                let number = self.model.estimates;
                let charge = match step {
                    Step::TryAcquireEstimate(_, used) => Charge::Estimate(self.model.cost(*used)),
                    _ => Charge::Cost,
                };
                let is_admitted = self.model.arrive(cost, charge);
                let admitted = match charge {
                    Charge::Estimate(_) => self.limiter.try_acquire_estimate(cost).map(Some),
                    _ => self.limiter.try_acquire(cost).map(|()| None),
                };
                match admitted {
                    Ok(estimate) => {
                        prop_assert!(is_admitted, "admitted too early");
                        self.charge(number, estimate, charge);
                    }
                    Err(AcquireError::NotYet(wait)) => {
                        prop_assert!(
                            !is_admitted && expected.is_none(),
                            "should have been admitted: retry in {wait:?}"
                        );
                        prop_assert_eq!(wait, self.model.retry_after(cost));
                    }
                    Err(error) => check_rejection(&error, expected)?,
                }
                // `try_acquire` never joins the limiter's queue, so the limiter does not check the queue either.
                return Ok(false);
            }
            Step::Cancel(index) if !self.callers.is_empty() => {
                let caller = self.callers.remove(index.index(self.callers.len()));
                drop(caller.future);
                self.model.leave(caller.id);
            }
            Step::Poll(index) if !self.callers.is_empty() => self.poll(index.index(self.callers.len()))?,
            Step::Settle(index) if !self.charged.is_empty() => {
                let charged = self.charged.swap_remove(index.index(self.charged.len()));
                let cost = charged.estimate.cost();
                self.model.settle(charged.number, cost, charged.used);
                self.limiter.settle(charged.estimate, charged.used);
            }
            Step::DropEstimate(index) if !self.charged.is_empty() => {
                let charged = self.charged.swap_remove(index.index(self.charged.len()));
                let cost = charged.estimate.cost();
                if cost == Cost::default() {
                    return Ok(false);
                }
                self.model.settle(charged.number, cost, cost);
                drop(charged.estimate);
            }
            Step::PauseFor(nanos) => {
                self.limiter.pause_for(Duration::from_nanos(*nanos));
                self.model.pause(self.model.now + nanos);
            }
            Step::PauseUntil(offset) => {
                let until = self.model.now.saturating_add_signed(*offset);
                self.limiter.pause_until(self.at(until));
                self.model.pause(until);
            }
            Step::Resume => {
                self.limiter.resume();
                self.model.pause(0);
            }
            Step::ForgiveDebts => {
                self.limiter.forgive_debts();
                self.model.forgive_debts();
            }
            Step::SetLimits(specs) => {
                self.limiter.set_limits(limits(specs)).unwrap();
                self.model.set_limits(specs);
            }
            Step::Advance(nanos) => {
                self.advance(*nanos).await;
                return Ok(false);
            }
            Step::AdvanceToAdmission(offset) => {
                if let Some(first) = self.model.queue.first() {
                    let time = self.model.time_of_admission(first.cost).saturating_add_signed(*offset);
                    self.advance(time.saturating_sub(self.model.now)).await;
                }
                return Ok(false);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn acquire(&mut self, cost: Cost, charge: Charge) -> Result<bool, TestCaseError> {
        let limiter = self.limiter.clone();
        let future: Acquiring = match charge {
            Charge::Nothing => Box::pin(async move { limiter.ready(cost).await.map(|()| None) }),
            Charge::Estimate(_) => Box::pin(async move { limiter.acquire_estimate(cost).await.map(Some) }),
            Charge::Cost => Box::pin(async move { limiter.acquire(cost).await.map(|()| None) }),
        };
        let mut future = task::spawn(future);
        let rejection = self.model.rejection(cost);
        let number = self.model.estimates;
        let is_admitted = self.model.arrive(cost, charge);
        let id = self.next_id;
        self.next_id += 1;
        match future.poll() {
            Poll::Ready(Ok(estimate)) => {
                prop_assert!(is_admitted, "admitted too early");
                self.charge(number, estimate, charge);
            }
            Poll::Ready(Err(error)) => check_rejection(&error, rejection)?,
            Poll::Pending => {
                prop_assert!(!is_admitted, "should have been admitted");
                prop_assert_eq!(rejection, None);
                self.model.queue.push(Waiting { id, cost, charge });
                self.callers.push(Caller {
                    id,
                    cost,
                    charge,
                    future,
                });
                return Ok(true);
            }
        }
        // The limiter does not check its queue for a call that need not wait.
        Ok(false)
    }

    fn charge(&mut self, number: usize, estimate: Option<Estimate>, charge: Charge) {
        if let (Some(estimate), Charge::Estimate(used)) = (estimate, charge) {
            self.charged.push(ChargedEstimate { number, estimate, used });
        }
    }

    fn poll(&mut self, index: usize) -> Outcome {
        let caller = &mut self.callers[index];
        let (id, charge) = (caller.id, caller.charge);
        let rejection = self.model.rejection(caller.cost);
        let number = self.model.estimates;
        let is_admitted = rejection.is_none() && self.model.poll(id);
        match caller.future.poll() {
            Poll::Ready(Ok(estimate)) => {
                prop_assert!(is_admitted, "admitted too early, or before an earlier waiter");
                self.charge(number, estimate, charge);
                self.callers.remove(index);
            }
            Poll::Ready(Err(error)) => {
                check_rejection(&error, rejection)?;
                self.model.leave(id);
                self.callers.remove(index);
            }
            Poll::Pending => {
                prop_assert!(!is_admitted, "should have been admitted");
                prop_assert_eq!(rejection, None);
            }
        }
        Ok(())
    }

    /// Polls the waiters that were woken, one at a time, until no woken waiter is left.
    async fn poll_woken(&mut self) -> Outcome {
        loop {
            turns(2).await;
            let mut woken = self.callers.iter().enumerate();
            let is_woken = |(index, caller): (usize, &Caller)| caller.future.is_woken().then_some(index);
            let next = if self.last_first {
                woken.rev().find_map(is_woken)
            } else {
                woken.find_map(is_woken)
            };
            let Some(index) = next else { return Ok(()) };
            self.poll(index)?;
        }
    }

    fn check(&self, queue_checked: bool) -> Outcome {
        let available = self.limiter.available();
        for (index, budget) in BUDGETS.into_iter().enumerate() {
            prop_assert_eq!(available.of(budget), self.model.available(index), "{}", budget);
        }
        let paused_until = (self.model.paused_until > self.model.now).then(|| self.at(self.model.paused_until));
        prop_assert_eq!(available.paused_until, paused_until);
        self.model.check_true_usage()?;
        if let Some(first) = self.model.queue.first() {
            // A timer fires at the first whole millisecond of Tokio's clock that is not before the time of admission.
            // The first waiter must have been woken by then, or earlier if the limiter has checked its queue.
            let admission = self.model.time_of_admission(first.cost);
            let tick = (self.at(admission) - self.origin).as_nanos().div_ceil(MS.into());
            let fired = (self.at(self.model.now) - self.origin).as_nanos() >= tick * u128::from(MS);
            prop_assert!(
                admission > self.model.now || !(queue_checked || fired),
                "{first:?} was not woken"
            );
        }
        Ok(())
    }

    /// Checks that every remaining waiter is admitted by the first tick of the timer at which its cost is available, if
    /// waiters are polled only after they were woken.
    async fn finish(&mut self) -> Outcome {
        while let Some(first) = self.model.queue.first() {
            let admission = self.at(self.model.time_of_admission(first.cost)) - self.origin;
            let tick = u64::try_from(admission.as_nanos().div_ceil(MS.into())).unwrap() * MS;
            let (tick, waiting) = (self.origin + Duration::from_nanos(tick), self.callers.len());
            let nanos = tick.saturating_duration_since(self.at(self.model.now)).as_nanos();
            self.advance(u64::try_from(nanos).unwrap()).await;
            self.poll_woken().await?;
            self.check(false)?;
            prop_assert!(self.callers.len() < waiting, "no waiter was admitted");
        }
        prop_assert!(self.callers.is_empty());
        self.model.check_windows()
    }
}

#[test]
fn the_limiter_agrees_with_the_model_to_the_nanosecond() {
    check(file!(), &case(), |case| async move {
        let mut harness = Harness::start(&case).await;
        for step in &case.steps {
            if matches!(step, Step::SetLimits(_)) {
                harness.model.check_windows()?;
            }
            let queue_checked = harness.step(step).await?;
            harness.poll_woken().await?;
            harness.check(queue_checked)?;
        }
        harness.finish().await
    });
}

// === Waiters that are not polled ===

/// A step of a test in which waiters may be woken and not polled. The limiter skips such a waiter; the model does not
/// predict when exactly. The rules are: no waiter is skipped before `HANDOFF_TIMEOUT` is over, no other waiter is
/// overtaken, and a skipped waiter that is polled again is admitted before all that came later.
#[derive(Clone, Debug)]
enum UnpolledStep {
    Acquire(CostSpec),
    /// Stops polling a waiter, even if it is woken.
    StopPolling(Index),
    /// Polls a waiter, and from then on polls it again whenever it is woken.
    ResumePolling(Index),
    Cancel(Index),
    Advance(u64),
}

type Acquired = Result<(), AcquireError>;

struct UnpolledCaller {
    cost: Cost,
    unpolled_since: Option<u64>,
    /// Whether another caller was admitted before this one since this one was last polled. It is skipped until then.
    is_skipped: bool,
    future: Spawn<Pin<Box<dyn Future<Output = Acquired>>>>,
}

struct UnpolledHarness {
    limiter: RateLimiter,
    /// The model, which this test uses only to compute costs, and to check what the calls that are admitted in any
    /// window of time cost. It does not predict when a waiter is admitted.
    model: Model,
    callers: Vec<UnpolledCaller>,
    /// Whether a caller was not polled for 5 ms since the last admission. Then several are notified at once, and the one
    /// that is polled first may overtake callers that are not polled.
    has_timed_out: bool,
}

const HANDOFF_TIMEOUT: u64 = 5 * MS;

fn unpolled_step() -> impl Strategy<Value = UnpolledStep> {
    prop_oneof![
        6 => cost_spec().prop_map(UnpolledStep::Acquire),
        3 => any::<Index>().prop_map(UnpolledStep::StopPolling),
        2 => any::<Index>().prop_map(UnpolledStep::ResumePolling),
        1 => any::<Index>().prop_map(UnpolledStep::Cancel),
        6 => prop_oneof![Just(MS), Just(HANDOFF_TIMEOUT), 1..8 * MS, 1..1_000 * MS].prop_map(UnpolledStep::Advance),
    ]
}

impl UnpolledHarness {
    async fn step(&mut self, step: &UnpolledStep) -> Outcome {
        let now = self.model.now;
        match step {
            UnpolledStep::Acquire(spec) => {
                let cost = self.model.cost(*spec);
                if self.model.rejection(cost).is_none() {
                    let limiter = self.limiter.clone();
                    let future = task::spawn(Box::pin(async move { limiter.acquire(cost).await }) as _);
                    self.callers.push(UnpolledCaller {
                        cost,
                        unpolled_since: None,
                        is_skipped: false,
                        future,
                    });
                    self.poll(self.callers.len() - 1)?;
                }
            }
            UnpolledStep::StopPolling(index) if !self.callers.is_empty() => {
                let index = index.index(self.callers.len());
                let caller = &mut self.callers[index];
                caller.unpolled_since = caller.unpolled_since.or(Some(now));
            }
            UnpolledStep::ResumePolling(index) if !self.callers.is_empty() => {
                let index = index.index(self.callers.len());
                self.callers[index].unpolled_since = None;
                self.poll(index)?;
            }
            UnpolledStep::Cancel(index) if !self.callers.is_empty() => {
                self.callers.remove(index.index(self.callers.len()));
            }
            UnpolledStep::Advance(nanos) => self.advance(*nanos).await,
            _ => {}
        }
        self.poll_woken().await
    }

    async fn advance(&mut self, nanos: u64) {
        advance(Duration::from_nanos(nanos)).await;
        self.model.now += nanos;
        let limit = self.model.now.saturating_sub(HANDOFF_TIMEOUT);
        let is_late = |caller: &UnpolledCaller| caller.unpolled_since.is_some_and(|since| since <= limit);
        self.has_timed_out |= self.callers.iter().any(is_late);
    }

    fn poll(&mut self, index: usize) -> Outcome {
        if self.callers[index].future.poll().is_pending() {
            self.callers[index].is_skipped = false;
            return Ok(());
        }
        let admitted = self.callers.remove(index);
        for before in &mut self.callers[..index] {
            let unpolled = before.unpolled_since.map(|since| self.model.now - since);
            prop_assert!(
                unpolled >= Some(HANDOFF_TIMEOUT) || unpolled.is_some() && (self.has_timed_out || before.is_skipped),
                "overtook a waiter that was not polled for {unpolled:?}"
            );
            before.is_skipped = true;
        }
        self.has_timed_out = false;
        self.model.admitted.push(Admitted {
            at: self.model.now,
            cost: admitted.cost,
        });
        Ok(())
    }

    async fn poll_woken(&mut self) -> Outcome {
        loop {
            turns(2).await;
            let is_due = |caller: &UnpolledCaller| caller.unpolled_since.is_none() && caller.future.is_woken();
            let Some(index) = self.callers.iter().position(is_due) else {
                return Ok(());
            };
            self.poll(index)?;
        }
    }

    /// Checks that all waiters that are polled are admitted, however many others are not polled, and that the others
    /// are admitted when they are polled again.
    async fn finish(&mut self) -> Outcome {
        let full = self
            .model
            .buckets
            .iter()
            .map(|bucket| bucket.capacity / bucket.fill + 1);
        let full = u64::try_from(full.max().unwrap_or(0)).unwrap();
        for _ in 0..=self.callers.len() {
            self.advance(full).await;
            for _ in 0..=self.callers.len() {
                self.poll_woken().await?;
                self.advance(HANDOFF_TIMEOUT + 2 * MS).await;
            }
            self.poll_woken().await?;
        }
        prop_assert!(self.callers.iter().all(|caller| caller.unpolled_since.is_some()));
        while !self.callers.is_empty() {
            // The remaining waiters are polled in reverse order. All waiters that came before the polled one are
            // skipped, so it counts as the first in the limiter's queue and is admitted.
            let last = self.callers.len() - 1;
            self.callers[last].unpolled_since = None;
            self.poll(last)?;
            prop_assert_eq!(self.callers.len(), last, "it was polled again and not admitted");
            self.advance(full).await;
        }
        self.model.check_windows()
    }
}

#[test]
fn a_waiter_that_is_not_polled_stalls_no_other_and_keeps_its_place() {
    let cases = (rate_specs(6), vec(unpolled_step(), 1..50));
    check(file!(), &cases, |(specs, steps)| async move {
        let mut harness = UnpolledHarness {
            limiter: RateLimiter::new(limits(&specs)).unwrap(),
            model: Model::new(&specs),
            callers: Vec::new(),
            has_timed_out: false,
        };
        for step in &steps {
            harness.step(step).await?;
        }
        harness.finish().await
    });
}
