//! `RateLimiter` against a model of it: a list of waiters and a balance per rate, in whole fractions of a token.
//!
//! The limiter has a lock, a driver, timers and wakers; the model has none. It is told what is done and when, and has
//! to agree to the nanosecond about who passes, what is left, and how long the next one would wait. Beside it stand
//! rules that need no model: what any window may see, and what a bucket that had known the truth would hold.

mod support;

use proptest::{collection::vec, option, prelude::*, sample::Index};
use std::{future::Future, pin::Pin, task::Poll, time::Duration};
use support::model::{Outcome, check, turns};
use tokio::time::{Instant, advance};
use tokio_test::task::{self, Spawn};
use tower_outbound::{
    Cost, Limits, Rate, RateLimiter,
    error::CostExceedsBurst,
    rate::{Estimate, TryAcquireError},
};

const MS: u64 = 1_000_000;
const CATCH_UP: u64 = 5 * MS;

// === What is done ===

#[derive(Clone, Copy, Debug)]
struct Spec {
    of_tokens: bool,
    amount: u64,
    period: u64,
    burst: Option<u64>,
    /// Of the burst.
    initial: Option<Share>,
}

/// So many thousandths of what there could be, or just so many.
#[derive(Clone, Copy, Debug)]
enum Share {
    Just(u64),
    Thousandths(u64),
}

#[derive(Clone, Copy, Debug)]
struct Asked {
    requests: Share,
    tokens: Share,
}

#[derive(Clone, Debug)]
enum Step {
    Acquire(Asked),
    /// What is used in truth is known to the test from the start.
    Estimate(Asked, Asked),
    Try(Asked),
    Cancel(Index),
    /// Somebody is polled without having been woken.
    Poll(Index),
    Settle(Index),
    /// Dropped without being settled.
    Forget(Index),
    PauseFor(u64),
    PauseUntil(i64),
    SetLimits(Vec<Spec>),
    Pass(u64),
    /// To the moment at which the first in line may go, or this much before or after it.
    ToTurn(i64),
}

#[derive(Clone, Debug)]
struct Case {
    phase: u64,
    limits: Vec<Spec>,
    steps: Vec<Step>,
    /// Who is polled first when several are woken.
    last_first: bool,
}

fn spec() -> impl Strategy<Value = Spec> {
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
    (any::<bool>(), amount, period, burst, option::of(share())).prop_map(
        |(of_tokens, amount, period, burst, initial)| Spec {
            of_tokens,
            amount,
            period,
            burst,
            initial,
        },
    )
}

fn share() -> impl Strategy<Value = Share> {
    prop_oneof![
        (0..4_u64).prop_map(Share::Just),
        (0..=1_000_u64).prop_map(Share::Thousandths),
    ]
}

fn asked() -> impl Strategy<Value = Asked> {
    let requests = prop_oneof![
        6 => Just(Share::Just(1)),
        1 => Just(Share::Just(0)),
        2 => (0..1_020_u64).prop_map(Share::Thousandths),
    ];
    let tokens = prop_oneof![
        2 => Just(Share::Just(0)),
        2 => (1..4_u64).prop_map(Share::Just),
        6 => (0..1_020_u64).prop_map(Share::Thousandths),
    ];
    (requests, tokens).prop_map(|(requests, tokens)| Asked { requests, tokens })
}

fn later() -> impl Strategy<Value = u64> {
    prop_oneof![
        Just(1),
        Just(MS - 1),
        Just(MS),
        Just(MS + 1),
        Just(CATCH_UP - 1),
        Just(CATCH_UP),
        Just(CATCH_UP + 1),
        1..20 * MS,
        1..2_000 * MS,
        1..100_000 * MS,
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => asked().prop_map(Step::Acquire),
        4 => (asked(), asked()).prop_map(|(charged, used)| Step::Estimate(charged, used)),
        3 => asked().prop_map(Step::Try),
        2 => any::<Index>().prop_map(Step::Cancel),
        3 => any::<Index>().prop_map(Step::Poll),
        3 => any::<Index>().prop_map(Step::Settle),
        1 => any::<Index>().prop_map(Step::Forget),
        1 => later().prop_map(Step::PauseFor),
        1 => (-20..200_i64).prop_map(|ms| Step::PauseUntil(ms * MS as i64 + 7)),
        1 => vec(spec(), 0..4).prop_map(Step::SetLimits),
        5 => later().prop_map(Step::Pass),
        6 => prop_oneof![
            Just(0), Just(-1), Just(1), Just(CATCH_UP as i64), 0..10 * MS as i64
        ].prop_map(Step::ToTurn),
    ]
}

fn case() -> impl Strategy<Value = Case> {
    (0..MS, vec(spec(), 0..4), vec(step(), 1..60), any::<bool>()).prop_map(|(phase, limits, steps, last_first)| Case {
        phase,
        limits,
        steps,
        last_first,
    })
}

impl Spec {
    fn burst(&self) -> u64 {
        self.burst.unwrap_or(self.amount)
    }

    fn initial(&self) -> u64 {
        self.initial.map_or(self.burst(), |share| share.of(self.burst()))
    }
}

impl Share {
    fn of(self, whole: u64) -> u64 {
        match self {
            Self::Just(amount) => amount.min(whole + 1),
            Self::Thousandths(part) => whole * part / 1_000,
        }
    }
}

fn limits(specs: &[Spec]) -> Limits {
    specs.iter().fold(Limits::new(), |limits, spec| {
        let mut rate = Rate::new(spec.amount, Duration::from_nanos(spec.period));
        if let Some(burst) = spec.burst {
            rate = rate.burst(burst);
        }
        if spec.initial.is_some() {
            rate = rate.initial(spec.initial().min(spec.burst()));
        }
        if spec.of_tokens {
            limits.tokens(rate)
        } else {
            limits.requests(rate)
        }
    })
}

// === The model ===

/// One token is `unit` grains, and each nanosecond brings `fill` of them.
#[derive(Clone, Debug)]
struct Bucket {
    of_tokens: bool,
    fill: i128,
    unit: i128,
    capacity: i128,
    balance: i128,
    estimated: i128,
    withheld: i128,
    /// What would be there had the truth been known from the start.
    ideal: i128,
    /// Which estimates it has charged: those from this number on.
    since: usize,
}

#[derive(Clone, Debug)]
struct Waiting {
    id: usize,
    cost: Cost,
    /// The truth, if the cost is an estimate.
    used: Option<Cost>,
}

/// Somebody who was admitted, and when; what it used in truth as far as the limiter can know.
#[derive(Clone, Debug)]
struct Admitted {
    at: u64,
    cost: Cost,
}

#[derive(Debug)]
struct Model {
    buckets: Vec<Bucket>,
    /// The moment up to which the buckets have been filled.
    at: u64,
    now: u64,
    paused: u64,
    /// When a waiter was last admitted, and how late.
    late: (u64, u64),
    line: Vec<Waiting>,
    /// Those admitted since the limits were set.
    admitted: Vec<Admitted>,
    estimates: usize,
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

impl Bucket {
    fn new(spec: &Spec, since: usize) -> Self {
        let divisor = gcd(spec.amount, spec.period);
        let unit = i128::from(spec.period / divisor);
        let initial = i128::from(spec.initial().min(spec.burst())) * unit;
        Self {
            of_tokens: spec.of_tokens,
            fill: i128::from(spec.amount / divisor),
            unit,
            capacity: i128::from(spec.burst()) * unit,
            balance: initial,
            estimated: 0,
            withheld: 0,
            ideal: initial,
            since,
        }
    }

    fn grains(&self, cost: Cost) -> i128 {
        i128::from(if self.of_tokens { cost.tokens } else { cost.requests }) * self.unit
    }

    fn refuses(&self, cost: Cost) -> bool {
        self.grains(cost) > self.capacity
    }

    /// Until so many grains are there.
    fn wait(&self, grains: i128) -> u64 {
        let missing = if grains == 0 { 0 } else { (grains - self.balance).max(0) };
        u64::try_from((missing + self.fill - 1) / self.fill).unwrap()
    }

    fn pass(&mut self, nanos: u64) {
        let gained = i128::from(nanos) * self.fill;
        self.balance = (self.balance + gained).min(self.capacity);
        self.ideal = (self.ideal + gained).min(self.capacity);
        self.withhold();
    }

    fn take(&mut self, cost: Cost, used: Option<Cost>) {
        let charged = self.grains(cost);
        self.balance -= charged;
        self.ideal -= used.map_or(charged, |used| self.grains(used).min(charged));
        if used.is_some() {
            self.estimated += charged;
        }
    }

    /// A rate that is younger than the estimate has charged nothing that it could give back.
    fn settle(&mut self, cost: Cost, used: Cost, has_charged: bool) {
        let (charged, used) = (self.grains(cost), self.grains(used));
        if used > charged {
            self.balance -= used - charged;
            self.ideal -= used - charged;
        } else if has_charged {
            let refund = charged - used;
            let kept = refund.min(self.withheld);
            self.withheld -= kept;
            self.balance = (self.balance + refund - kept).min(self.capacity);
        }
        if has_charged {
            self.estimated -= charged;
        }
        self.withheld = self.withheld.min(self.estimated);
        self.withhold();
    }

    /// Of the estimates that are out, this much would be spilled had they been nothing.
    fn withhold(&mut self) {
        self.withheld = self.withheld.max(self.estimated + self.balance - self.capacity);
    }

    fn take_over(&mut self, old: &Self) {
        let convert = |grains: i128| (grains * self.unit).div_euclid(old.unit);
        let (balance, ideal) = (convert(old.balance), convert(old.ideal));
        self.balance = balance.min(self.capacity);
        self.ideal = ideal.min(self.capacity);
        self.estimated = convert(old.estimated);
        // What is there beside what is withheld is rounded down, not each of the two.
        self.withheld = balance - convert(old.balance - old.withheld);
        self.since = old.since;
        self.withhold();
    }
}

impl Model {
    fn new(specs: &[Spec]) -> Self {
        Self {
            buckets: specs.iter().map(|spec| Bucket::new(spec, 0)).collect(),
            at: 0,
            now: 0,
            paused: 0,
            late: (0, 0),
            line: Vec::new(),
            admitted: Vec::new(),
            estimates: 0,
        }
    }

    fn refusal(&self, cost: Cost) -> Option<(bool, u64, u64)> {
        let refusing = self.buckets.iter().find(|bucket| bucket.refuses(cost))?;
        let asked = if refusing.of_tokens { cost.tokens } else { cost.requests };
        let burst = u64::try_from(refusing.capacity / refusing.unit).unwrap();
        Some((refusing.of_tokens, asked, burst))
    }

    /// As of when the first one passes.
    fn turn(&self, cost: Cost) -> u64 {
        let filled = self.buckets.iter().map(|bucket| bucket.wait(bucket.grains(cost)));
        let filled = self.at + filled.max().unwrap_or(0);
        filled.max(self.now.saturating_sub(CATCH_UP)).max(self.paused)
    }

    /// Nobody was waiting: what would have come in is there, but for the lateness of whoever has just been admitted.
    fn idle(&mut self) {
        let (woken, late) = self.late;
        let owed = if self.now - woken <= CATCH_UP {
            late.min(CATCH_UP)
        } else {
            0
        };
        self.fill_to(self.now.saturating_sub(owed));
    }

    fn fill_to(&mut self, at: u64) {
        if at > self.at {
            let passed = at - self.at;
            self.buckets.iter_mut().for_each(|bucket| bucket.pass(passed));
            self.at = at;
        }
    }

    fn admit(&mut self, cost: Cost, used: Option<Cost>) {
        self.fill_to(self.turn(cost));
        let estimate = self.estimates;
        for bucket in &mut self.buckets {
            bucket.take(cost, used);
        }
        if used.is_some() {
            self.estimates = estimate + 1;
        }
        let least = used.unwrap_or(cost);
        self.admitted.push(Admitted {
            at: self.now,
            cost: Cost {
                requests: cost.requests.min(least.requests),
                tokens: cost.tokens.min(least.tokens),
            },
        });
    }

    /// A newcomer; whether it passes.
    fn arrive(&mut self, cost: Cost, used: Option<Cost>) -> bool {
        if !self.line.is_empty() {
            return false;
        }
        self.idle();
        let passes = self.refusal(cost).is_none() && self.turn(cost) <= self.now;
        if passes {
            self.admit(cost, used);
        }
        passes
    }

    /// A waiter that is polled; whether it passes.
    fn answer(&mut self, id: usize) -> bool {
        let first = self.line[0].clone();
        let passes = first.id == id && self.turn(first.cost) <= self.now;
        if passes {
            let at = self.turn(first.cost);
            self.admit(first.cost, first.used);
            self.late = (self.now, self.now - at);
            self.line.remove(0);
        }
        passes
    }

    fn leave(&mut self, id: usize) {
        self.line.retain(|waiting| waiting.id != id);
    }

    /// How long a newcomer that cannot pass is told to wait.
    fn retry_after(&self, cost: Cost) -> Duration {
        let waits = self.buckets.iter().map(|bucket| {
            let ahead: i128 = self.line.iter().map(|waiting| bucket.grains(waiting.cost)).sum();
            bucket.wait(ahead + bucket.grains(cost))
        });
        let at = (self.at + waits.max().unwrap_or(0)).max(self.paused);
        match at.saturating_sub(self.now) {
            0 => Duration::from_millis(1),
            wait => Duration::from_nanos(wait),
        }
    }

    fn settle(&mut self, estimate: usize, cost: Cost, used: Cost) {
        // While somebody waits for a moment that may have passed, what is given back counts as of before.
        if self.line.iter().all(|waiting| waiting.cost == Cost::default()) {
            self.idle();
        }
        for bucket in &mut self.buckets {
            bucket.settle(cost, used, estimate >= bucket.since);
        }
    }

    fn set_limits(&mut self, specs: &[Spec]) {
        self.fill_to(self.now);
        let mut new: Vec<_> = specs.iter().map(|spec| Bucket::new(spec, self.estimates)).collect();
        for of_tokens in [false, true] {
            let new = new.iter_mut().filter(|bucket| bucket.of_tokens == of_tokens);
            let old = self.buckets.iter().filter(|bucket| bucket.of_tokens == of_tokens);
            new.zip(old).for_each(|(new, old)| new.take_over(old));
        }
        self.buckets = new;
        self.admitted.clear();
    }

    fn available(&self, of_tokens: bool) -> Option<u64> {
        let passed = self.now.saturating_sub(self.at);
        let buckets = self.buckets.iter().filter(|bucket| bucket.of_tokens == of_tokens);
        let left = buckets.map(|bucket| {
            let mut bucket = bucket.clone();
            bucket.pass(passed);
            u64::try_from(bucket.balance.max(0) / bucket.unit).unwrap()
        });
        left.min()
    }

    /// The most a call may ask for.
    fn most(&self, of_tokens: bool) -> u64 {
        let buckets = self.buckets.iter().filter(|bucket| bucket.of_tokens == of_tokens);
        let bursts = buckets.map(|bucket| u64::try_from(bucket.capacity / bucket.unit).unwrap());
        bursts.min().unwrap_or(1_000)
    }

    fn cost(&self, asked: Asked) -> Cost {
        Cost {
            requests: asked.requests.of(self.most(false)),
            tokens: asked.tokens.of(self.most(true)),
        }
    }

    /// No bucket holds more than if it had known the truth from the start.
    fn check_truth(&self) -> Outcome {
        for bucket in &self.buckets {
            prop_assert!(bucket.balance <= bucket.ideal, "more than the truth allows: {bucket:?}");
        }
        Ok(())
    }

    /// In no window was more admitted than the burst, what came in meanwhile, and what catching up allows.
    fn check_windows(&self) -> Outcome {
        for bucket in &self.buckets {
            for (first, from) in self.admitted.iter().enumerate() {
                let mut sum = 0;
                for admitted in &self.admitted[first..] {
                    sum += bucket.grains(admitted.cost);
                    let length = i128::from(admitted.at - from.at + CATCH_UP);
                    prop_assert!(
                        sum <= bucket.capacity + bucket.fill * length,
                        "too much from {} to {}: {bucket:?}",
                        from.at,
                        admitted.at
                    );
                }
            }
        }
        Ok(())
    }
}

// === The limiter beside it ===

type Acquiring = Pin<Box<dyn Future<Output = Result<Option<Estimate>, CostExceedsBurst>>>>;

struct Caller {
    id: usize,
    cost: Cost,
    used: Option<Cost>,
    future: Spawn<Acquiring>,
}

struct Charged {
    number: usize,
    estimate: Estimate,
    used: Cost,
}

struct Bench {
    limiter: RateLimiter,
    model: Model,
    start: Instant,
    origin: Instant,
    callers: Vec<Caller>,
    charged: Vec<Charged>,
    next: usize,
    last_first: bool,
}

fn same_refusal(refusal: &CostExceedsBurst, expected: Option<(bool, u64, u64)>) -> Outcome {
    let told = (refusal.budget() == "tokens", refusal.cost(), refusal.burst());
    prop_assert_eq!(Some(told), expected);
    Ok(())
}

impl Bench {
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
            next: 0,
            last_first: case.last_first,
        }
    }

    fn at(&self, nanos: u64) -> Instant {
        self.start + Duration::from_nanos(nanos)
    }

    async fn pass(&mut self, nanos: u64) {
        advance(Duration::from_nanos(nanos)).await;
        self.model.now += nanos;
    }

    /// Does one thing. Returns whether the line was looked at.
    async fn step(&mut self, step: &Step) -> Result<bool, TestCaseError> {
        match step {
            Step::Acquire(asked) => return self.acquire(self.model.cost(*asked), None),
            Step::Estimate(asked, used) => {
                let used = self.model.cost(*used);
                return self.acquire(self.model.cost(*asked), Some(used));
            }
            Step::Try(asked) => {
                let cost = self.model.cost(*asked);
                let expected = self.model.refusal(cost);
                prop_assert_eq!(self.limiter.check(cost).is_err(), expected.is_some());
                let passes = self.model.arrive(cost, None);
                match self.limiter.try_acquire(cost) {
                    Ok(()) => prop_assert!(passes, "passed too early"),
                    Err(TryAcquireError::NotYet(wait)) => {
                        prop_assert!(!passes && expected.is_none(), "should have passed: wait {wait:?}");
                        prop_assert_eq!(wait, self.model.retry_after(cost));
                    }
                    Err(TryAcquireError::CostExceedsBurst(refusal)) => same_refusal(&refusal, expected)?,
                    Err(other) => prop_assert!(false, "{other}"),
                }
                // It is not in line.
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
            Step::Forget(index) if !self.charged.is_empty() => {
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
                self.model.paused = self.model.paused.max(self.model.now + nanos);
            }
            Step::PauseUntil(offset) => {
                let until = self.model.now.saturating_add_signed(*offset);
                self.limiter.pause_until(self.at(until));
                self.model.paused = self.model.paused.max(until);
            }
            Step::SetLimits(specs) => {
                self.limiter.set_limits(limits(specs)).unwrap();
                self.model.set_limits(specs);
            }
            Step::Pass(nanos) => {
                self.pass(*nanos).await;
                return Ok(false);
            }
            Step::ToTurn(offset) => {
                if let Some(first) = self.model.line.first() {
                    let turn = self.model.turn(first.cost).saturating_add_signed(*offset);
                    self.pass(turn.saturating_sub(self.model.now)).await;
                }
                return Ok(false);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn acquire(&mut self, cost: Cost, used: Option<Cost>) -> Result<bool, TestCaseError> {
        let limiter = self.limiter.clone();
        let future: Acquiring = match used {
            Some(_) => Box::pin(async move { limiter.acquire_estimate(cost).await.map(Some) }),
            None => Box::pin(async move { limiter.acquire(cost).await.map(|()| None) }),
        };
        let mut future = task::spawn(future);
        let refusal = self.model.refusal(cost);
        let number = self.model.estimates;
        let passes = self.model.arrive(cost, used);
        let id = self.next;
        self.next += 1;
        match future.poll() {
            Poll::Ready(Ok(estimate)) => {
                prop_assert!(passes, "passed too early");
                self.charge(number, estimate, used);
            }
            Poll::Ready(Err(told)) => same_refusal(&told, refusal)?,
            Poll::Pending => {
                prop_assert!(!passes, "should have passed");
                prop_assert_eq!(refusal, None);
                self.model.line.push(Waiting { id, cost, used });
                self.callers.push(Caller { id, cost, used, future });
                return Ok(true);
            }
        }
        // Who need not wait does not look at the line.
        Ok(false)
    }

    fn charge(&mut self, number: usize, estimate: Option<Estimate>, used: Option<Cost>) {
        if let (Some(estimate), Some(used)) = (estimate, used) {
            self.charged.push(Charged { number, estimate, used });
        }
    }

    fn poll(&mut self, index: usize) -> Outcome {
        let caller = &mut self.callers[index];
        let (id, used) = (caller.id, caller.used);
        let refusal = self.model.refusal(caller.cost);
        let number = self.model.estimates;
        let passes = refusal.is_none() && self.model.answer(id);
        match caller.future.poll() {
            Poll::Ready(Ok(estimate)) => {
                prop_assert!(passes, "passed too early, or before its turn");
                self.charge(number, estimate, used);
                self.callers.remove(index);
            }
            Poll::Ready(Err(told)) => {
                same_refusal(&told, refusal)?;
                self.model.leave(id);
                self.callers.remove(index);
            }
            Poll::Pending => {
                prop_assert!(!passes, "should have passed");
                prop_assert_eq!(refusal, None);
            }
        }
        Ok(())
    }

    /// Polls whoever is woken, until nobody is.
    async fn serve(&mut self) -> Outcome {
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

    fn check(&self, looked: bool) -> Outcome {
        let available = self.limiter.available();
        prop_assert_eq!(available.requests, self.model.available(false));
        prop_assert_eq!(available.tokens, self.model.available(true));
        let paused = (self.model.paused > self.model.now).then(|| self.at(self.model.paused));
        prop_assert_eq!(available.paused_until, paused);
        self.model.check_truth()?;
        if let Some(first) = self.model.line.first() {
            // A timer fires on the first whole millisecond of the clock.
            let turn = self.model.turn(first.cost);
            let since = (self.at(turn) - self.origin).as_nanos().div_ceil(MS.into());
            let fired = (self.at(self.model.now) - self.origin).as_nanos() >= since * u128::from(MS);
            prop_assert!(turn > self.model.now || !(looked || fired), "{first:?} was not woken");
        }
        Ok(())
    }

    /// Whoever still waits is admitted when its time comes, by being woken alone.
    async fn finish(&mut self) -> Outcome {
        while let Some(first) = self.model.line.first() {
            let turn = self.at(self.model.turn(first.cost)) - self.origin;
            let tick = u64::try_from(turn.as_nanos().div_ceil(MS.into())).unwrap() * MS;
            let (tick, waiting) = (self.origin + Duration::from_nanos(tick), self.callers.len());
            let nanos = tick.saturating_duration_since(self.at(self.model.now)).as_nanos();
            self.pass(u64::try_from(nanos).unwrap()).await;
            self.serve().await?;
            self.check(false)?;
            prop_assert!(self.callers.len() < waiting, "nobody was admitted");
        }
        prop_assert!(self.callers.is_empty());
        self.model.check_windows()
    }
}

#[test]
fn the_limiter_does_to_the_nanosecond_what_a_list_and_a_balance_do() {
    check(file!(), &case(), |case| async move {
        let mut bench = Bench::start(&case).await;
        for step in &case.steps {
            if matches!(step, Step::SetLimits(_)) {
                bench.model.check_windows()?;
            }
            let looked = bench.step(step).await?;
            bench.serve().await?;
            bench.check(looked)?;
        }
        bench.finish().await
    });
}

// === Those who sleep ===

/// Somebody whose turn comes and who is not polled is passed over. When exactly is the driver's affair; the rules are:
/// not before the grace is over, nobody else is overtaken, and who comes back goes before all who came later.
#[derive(Clone, Debug)]
enum Nap {
    Acquire(Asked),
    /// Is not polled any more, though it be woken.
    Sleep(Index),
    /// Is polled, and again whenever it is woken.
    Return(Index),
    Cancel(Index),
    Pass(u64),
}

type Answer = Result<(), CostExceedsBurst>;

struct Sleeper {
    cost: Cost,
    asleep_since: Option<u64>,
    future: Spawn<Pin<Box<dyn Future<Output = Answer>>>>,
}

struct Dormitory {
    limiter: RateLimiter,
    /// Only for what it costs, and for the windows.
    model: Model,
    sleepers: Vec<Sleeper>,
}

const GRACE: u64 = 5 * MS;

fn nap() -> impl Strategy<Value = Nap> {
    prop_oneof![
        6 => asked().prop_map(Nap::Acquire),
        3 => any::<Index>().prop_map(Nap::Sleep),
        2 => any::<Index>().prop_map(Nap::Return),
        1 => any::<Index>().prop_map(Nap::Cancel),
        6 => prop_oneof![Just(MS), Just(GRACE), 1..8 * MS, 1..1_000 * MS].prop_map(Nap::Pass),
    ]
}

impl Dormitory {
    async fn step(&mut self, step: &Nap) -> Outcome {
        let now = self.model.now;
        match step {
            Nap::Acquire(asked) => {
                let cost = self.model.cost(*asked);
                if self.model.refusal(cost).is_none() {
                    let limiter = self.limiter.clone();
                    let future = task::spawn(Box::pin(async move { limiter.acquire(cost).await }) as _);
                    self.sleepers.push(Sleeper {
                        cost,
                        asleep_since: None,
                        future,
                    });
                    self.poll(self.sleepers.len() - 1)?;
                }
            }
            Nap::Sleep(index) if !self.sleepers.is_empty() => {
                let index = index.index(self.sleepers.len());
                let sleeper = &mut self.sleepers[index];
                sleeper.asleep_since = sleeper.asleep_since.or(Some(now));
            }
            Nap::Return(index) if !self.sleepers.is_empty() => {
                let index = index.index(self.sleepers.len());
                self.sleepers[index].asleep_since = None;
                self.poll(index)?;
            }
            Nap::Cancel(index) if !self.sleepers.is_empty() => {
                self.sleepers.remove(index.index(self.sleepers.len()));
            }
            Nap::Pass(nanos) => self.pass(*nanos).await,
            _ => {}
        }
        self.serve().await
    }

    async fn pass(&mut self, nanos: u64) {
        advance(Duration::from_nanos(nanos)).await;
        self.model.now += nanos;
    }

    fn poll(&mut self, index: usize) -> Outcome {
        if self.sleepers[index].future.poll().is_pending() {
            return Ok(());
        }
        let passed = self.sleepers.remove(index);
        for before in &self.sleepers[..index] {
            let slept = before.asleep_since.map(|since| self.model.now - since);
            prop_assert!(slept >= Some(GRACE), "overtook one that slept for {slept:?}");
        }
        self.model.admitted.push(Admitted {
            at: self.model.now,
            cost: passed.cost,
        });
        Ok(())
    }

    async fn serve(&mut self) -> Outcome {
        loop {
            turns(2).await;
            let awake = |sleeper: &Sleeper| sleeper.asleep_since.is_none() && sleeper.future.is_woken();
            let Some(index) = self.sleepers.iter().position(awake) else {
                return Ok(());
            };
            self.poll(index)?;
        }
    }

    /// However many sleep, the others are served; and so are these when they come back.
    async fn finish(&mut self) -> Outcome {
        let full = self
            .model
            .buckets
            .iter()
            .map(|bucket| bucket.capacity / bucket.fill + 1);
        let full = u64::try_from(full.max().unwrap_or(0)).unwrap();
        for _ in 0..=self.sleepers.len() {
            self.pass(full).await;
            for _ in 0..=self.sleepers.len() {
                self.serve().await?;
                self.pass(GRACE + 2 * MS).await;
            }
            self.serve().await?;
        }
        prop_assert!(self.sleepers.iter().all(|sleeper| sleeper.asleep_since.is_some()));
        while !self.sleepers.is_empty() {
            // The last first: it is nobody's turn but its own, for the others are silent.
            let last = self.sleepers.len() - 1;
            self.sleepers[last].asleep_since = None;
            self.poll(last)?;
            prop_assert_eq!(self.sleepers.len(), last, "it came back and could not go");
            self.pass(full).await;
        }
        self.model.check_windows()
    }
}

#[test]
fn who_sleeps_through_its_turn_stalls_nobody_and_loses_nothing() {
    let cases = (vec(spec(), 0..3), vec(nap(), 1..50));
    check(file!(), &cases, |(specs, steps)| async move {
        let mut dormitory = Dormitory {
            limiter: RateLimiter::new(limits(&specs)).unwrap(),
            model: Model::new(&specs),
            sleepers: Vec::new(),
        };
        for step in &steps {
            dormitory.step(step).await?;
        }
        dormitory.finish().await
    });
}
