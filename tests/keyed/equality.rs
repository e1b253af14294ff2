//! A limiter by key decides as one `RateLimiter` for each key does that is never forgotten, under churn.

use std::{collections::HashMap, time::Duration};
use tokio::time::{Instant, advance};
use tokio_test::task;
use tower_outbound::{
    Cost, KeyedRateLimiter, Limits, Rate, RateLimiter,
    error::AcquireError,
    rate::{Budget, Estimate},
};

const KEYS: u64 = 2_000;

/// The limits of which the tests take some by turns: odd rates, several budgets, refusing ones.
fn limits(at: usize) -> Limits {
    let odd = Duration::from_nanos(999_999_937);
    match at {
        0 => Limits::new().requests(Rate::per_second(5).burst(3)),
        1 => Limits::new()
            .requests(Rate::new(7, odd).burst(4))
            .tokens(Rate::new(1_009, Duration::from_millis(701)).burst(97)),
        2 => Limits::new()
            .tokens(Rate::per_second(333).burst(50))
            .requests(Rate::new(11, Duration::from_nanos(777_777_777)).burst(9))
            .requests(Rate::per_minute(100).burst(40)),
        3 => Limits::new()
            .requests(Rate::per_second(6).burst(5))
            .tokens(Rate::new(1, Duration::from_nanos(3)).burst(80))
            .budget("images", Rate::per_second(3).burst(4).refuse()),
        4 => Limits::new()
            .requests(Rate::per_second(6).burst(5).strict())
            .tokens(Rate::per_second(90).burst(80))
            .tokens(Rate::per_minute(9_000).burst(300))
            .input_tokens(Rate::new(13, odd).burst(60))
            .budget("images", Rate::per_second(3).burst(4)),
        _ => Limits::new().requests(Rate::new(2_u64.pow(40), Duration::from_nanos(7)).burst(6)),
    }
}

/// A key from a distribution in which few keys have most of the calls.
fn key(rng: &mut fastrand::Rng) -> u64 {
    (rng.f64() * (KEYS as f64).ln()).exp() as u64
}

fn cost(rng: &mut fastrand::Rng) -> Cost {
    let amount = |rng: &mut fastrand::Rng, most| match rng.u8(..) {
        0 => u64::MAX,
        1..=100 => 0,
        _ => rng.u64(0..=most),
    };
    Cost::tokens(amount(rng, 60))
        .with(Budget::Requests, rng.u64(0..=2))
        .with(Budget::InputTokens, amount(rng, 30))
        .with("images", amount(rng, 2))
}

/// What a decision says, without the wall clock, which the limiters have read at different times.
fn said<T>(decision: &Result<T, AcquireError>) -> String {
    match decision {
        Ok(_) => "admitted".into(),
        Err(AcquireError::Exhausted(cap)) => {
            format!("{} {} {} {:?}", cap.budget(), cap.cost(), cap.left(), cap.retry_after())
        }
        Err(error) => format!("{error:?}"),
    }
}

struct Model {
    limits: usize,
    keys: HashMap<u64, RateLimiter>,
}

impl Model {
    fn of(&mut self, key: u64) -> RateLimiter {
        let new = || RateLimiter::new(limits(self.limits)).unwrap();
        self.keys.entry(key).or_insert_with(new).clone()
    }

    /// Whether all buckets of a key are full.
    fn is_full(limiter: &RateLimiter, limits: &Limits) -> bool {
        let all = limits.rates().fold(Cost::none(), |cost, (budget, rate)| {
            let least = cost.of(budget).max(rate.burst_amount() as u64);
            cost.with(budget, least)
        });
        limits.rates().all(|(budget, rate)| {
            let _ = rate;
            limiter.wait_for(Cost::none().with(budget, all.of(budget))).is_zero()
        })
    }
}

#[tokio::test(start_paused = true)]
async fn each_decision_and_each_wait_is_that_of_a_limiter_of_the_key_that_is_never_forgotten() {
    for at in 0..6 {
        let mut rng = fastrand::Rng::with_seed(at as u64);
        let limiter = KeyedRateLimiter::<u64>::new(limits(at)).unwrap();
        let mut model = Model {
            limits: at,
            keys: HashMap::new(),
        };
        let mut most = 0;
        for step in 0..20_000 {
            advance(Duration::from_nanos(rng.u64(0..=10_000_000))).await;
            let (key, cost) = (key(&mut rng), cost(&mut rng));
            let reference = model.of(key);
            assert_eq!(limiter.check(&key, cost), reference.check(cost));
            // The wait of a cost that never fits depends on when a limiter was used last.
            if reference.check(cost).is_ok() {
                assert_eq!(limiter.wait_for(&key, cost), reference.wait_for(cost), "{at} {step}");
            }
            assert_eq!(
                said(&limiter.try_acquire(&key, cost)),
                said(&reference.try_acquire(cost)),
                "{at} {step}"
            );
            assert_eq!(limiter.available(&key), reference.available());
            if step % 1_000 == 0 {
                most = most.max(limiter.len());
            }
        }
        assert!(most < model.keys.len() / 2, "{most} of {}", model.keys.len());
    }
}

#[tokio::test(start_paused = true)]
async fn a_cap_that_evicts_anybody_is_noticed_by_the_comparison() {
    // The control of the test above: a key that owes something is forgotten at a cap, by a map of limiters.
    let mut rng = fastrand::Rng::with_seed(0);
    let mut capped = HashMap::new();
    let mut model = Model {
        limits: 1,
        keys: HashMap::new(),
    };
    let mut over = 0;
    for _ in 0..20_000 {
        advance(Duration::from_nanos(rng.u64(0..=10_000_000))).await;
        let (key, cost) = (key(&mut rng), cost(&mut rng));
        if capped.len() == 30 && !capped.contains_key(&key) {
            let evicted = *capped.keys().next().unwrap();
            capped.remove(&evicted);
        }
        let evicting = capped
            .entry(key)
            .or_insert_with(|| RateLimiter::new(limits(1)).unwrap());
        over += usize::from(evicting.try_acquire(cost).is_ok() && model.of(key).try_acquire(cost).is_err());
    }
    assert!(over > 100, "{over}");
}

/// A call that waits, at both limiters.
struct Waiting<'a> {
    key: u64,
    keyed: task::Spawn<Pinned<'a>>,
    reference: task::Spawn<Pinned<'a>>,
}

type Pinned<'a> = std::pin::Pin<Box<dyn Future<Output = Result<Option<Estimate>, AcquireError>> + 'a>>;

#[tokio::test(start_paused = true)]
async fn waits_estimates_pauses_cancelled_calls_and_changed_limits_are_those_of_a_limiter_of_the_key() {
    for seed in 0..6 {
        storm(seed, 20_000).await;
    }
}

/// Makes the same calls at a limiter by key and at a limiter for each key, and compares what comes of them.
async fn storm(seed: u64, steps: usize) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let limiter = KeyedRateLimiter::<u64>::new(limits(seed as usize % 6)).unwrap();
    let mut model = Model {
        limits: seed as usize % 6,
        keys: HashMap::new(),
    };
    let mut waiting: Vec<Waiting<'_>> = Vec::new();
    let mut open: Vec<(u64, Estimate, Estimate)> = Vec::new();
    let mut paused: HashMap<u64, Instant> = HashMap::new();
    let mut admitted = 0;
    for step in 0..steps {
        let most = if rng.u8(..) < 200 { 3_000_000 } else { 200_000_000 };
        advance(Duration::from_nanos(rng.u64(0..=most))).await;
        let (key, cost) = (key(&mut rng) % 200, cost(&mut rng));
        let reference = model.of(key);
        match rng.u8(..) {
            0..=99 => {
                let (keyed, reference) = (limiter.try_acquire(&key, cost), reference.try_acquire(cost));
                assert_eq!(said(&keyed), said(&reference), "{seed} {step}");
            }
            100..=139 => {
                let (keyed, reference) = (
                    limiter.try_acquire_estimate(&key, cost),
                    reference.try_acquire_estimate(cost),
                );
                assert_eq!(said(&keyed), said(&reference), "{seed} {step}");
                open.extend(
                    keyed
                        .ok()
                        .zip(reference.ok())
                        .map(|(keyed, reference)| (key, keyed, reference)),
                );
            }
            140..=189 => {
                let is_estimate = rng.bool();
                let limiter = limiter.clone();
                waiting.push(Waiting {
                    key,
                    keyed: task::spawn(Box::pin(async move {
                        if is_estimate {
                            return limiter.acquire_estimate(&key, cost).await.map(Some);
                        }
                        limiter.acquire(&key, cost).await.map(|()| None)
                    })),
                    reference: task::spawn(Box::pin(async move {
                        if is_estimate {
                            return reference.acquire_estimate(cost).await.map(Some);
                        }
                        reference.acquire(cost).await.map(|()| None)
                    })),
                });
            }
            190..=204 if !waiting.is_empty() => drop(waiting.remove(rng.usize(..waiting.len()))),
            205..=239 if !open.is_empty() => {
                let (_, keyed, reference) = open.remove(rng.usize(..open.len()));
                if rng.bool() {
                    keyed.settle(cost);
                    reference.settle(cost);
                }
            }
            240..=246 => {
                let until = Instant::now() + Duration::from_nanos(rng.u64(0..=500_000_000));
                limiter.pause(&key, until).unwrap();
                reference.pause_until(until);
                paused.insert(key, until);
            }
            247..=250 => {
                limiter.resume(&key);
                reference.resume();
                paused.remove(&key);
            }
            251 => {
                let (old, new) = (model.limits, rng.usize(0..6));
                limiter.set_limits(limits(new)).unwrap();
                model.limits = new;
                let is_used = |key: &u64| {
                    waiting.iter().any(|call| call.key == *key)
                        || open.iter().any(|(of, ..)| of == key)
                        || paused.get(key).is_some_and(|until| *until > Instant::now())
                };
                model
                    .keys
                    .retain(|key, limiter| is_used(key) || !Model::is_full(limiter, &limits(old)));
                for limiter in model.keys.values() {
                    limiter.set_limits(limits(new)).unwrap();
                }
            }
            _ => {
                let available = (limiter.available(&key), model.of(key).available());
                assert_eq!(available.0, available.1, "{seed} {step}");
            }
        }
        let mut still = Vec::new();
        for mut call in waiting {
            match (call.keyed.poll(), call.reference.poll()) {
                (std::task::Poll::Ready(keyed), std::task::Poll::Ready(reference)) => {
                    assert_eq!(said(&keyed), said(&reference), "{seed} {step}");
                    admitted += 1;
                    if let (Ok(Some(keyed)), Ok(Some(reference))) = (keyed, reference) {
                        open.push((call.key, keyed, reference));
                    }
                }
                (std::task::Poll::Pending, std::task::Poll::Pending) => still.push(call),
                (keyed, _) => panic!(
                    "only the limiter {} has decided: {seed} {step}",
                    if keyed.is_ready() { "by key" } else { "of the key" }
                ),
            }
        }
        waiting = still;
    }
    assert!(admitted > steps / 20, "{admitted}");
    drop((waiting, open));
    advance(Duration::from_secs(3_600 * 24)).await;
    assert_eq!(limiter.len(), 0);
}

/// Limits that replace each other in a test: with as many cells, more or fewer, and of keys that cannot be at rest. One
/// rate of each budget, so that [`Model::is_full`] is exact.
fn replacement(at: usize) -> Limits {
    let odd = Duration::from_nanos(701_000_003);
    match at {
        0 => Limits::new().requests(Rate::per_second(5).burst(3)),
        1 => Limits::new()
            .requests(Rate::per_second(7).burst(6))
            .tokens(Rate::new(1_009, odd).burst(97)),
        2 => Limits::new()
            .tokens(Rate::new(83, odd).burst(150))
            .requests(Rate::per_second(2).burst(2)),
        3 => Limits::new()
            .requests(Rate::per_second(1).burst(9))
            .tokens(Rate::new(307, odd).burst(70))
            .input_tokens(Rate::per_second(13).burst(60))
            .output_tokens(Rate::per_second(13))
            .budget("images", Rate::per_second(3).burst(4)),
        _ => limits(5),
    }
}

#[tokio::test(start_paused = true)]
async fn keys_that_are_met_long_after_several_changes_hold_what_a_limiter_of_the_key_holds() {
    const KEYS: u64 = 5_000;
    for seed in 0..4 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut present = replacement(1);
        let limiter = KeyedRateLimiter::<u64>::new(present.clone()).unwrap();
        let mut model: HashMap<u64, RateLimiter> = HashMap::new();
        // More changes in a row than the limiter keeps apart, now and then.
        for change in 0..30 {
            for _ in 0..[0, 0, 0, 100, 3_000, KEYS][rng.usize(..6)] {
                let (key, cost) = (rng.u64(..KEYS), cost(&mut rng));
                let new = || RateLimiter::new(present.clone()).unwrap();
                let reference = model.entry(key).or_insert_with(new);
                assert_eq!(limiter.available(&key), reference.available(), "{seed} {change}");
                assert_eq!(
                    said(&limiter.try_acquire(&key, cost)),
                    said(&reference.try_acquire(cost)),
                    "{seed} {change}"
                );
                advance(Duration::from_nanos(rng.u64(0..=50_000))).await;
            }
            let next = replacement([0, 1, 1, 2, 2, 3, 3, 4][rng.usize(..8)]);
            limiter.set_limits(next.clone()).unwrap();
            model.retain(|_, limiter| !Model::is_full(limiter, &present));
            for limiter in model.values() {
                limiter.set_limits(next.clone()).unwrap();
            }
            present = next;
            advance(Duration::from_nanos(rng.u64(0..=100_000_000))).await;
        }
        let mut owing = 0;
        for (key, reference) in &model {
            assert_eq!(limiter.available(key), reference.available(), "{seed} {key}");
            owing += usize::from(!Model::is_full(reference, &present));
        }
        assert_eq!(limiter.len(), owing);
    }
}
