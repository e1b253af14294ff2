//! Measures limits by key: tower-outbound's `KeyedRateLimiter` beside governor's keyed limiter and throttle-net's `PerKey`.
//!
//! `cargo bench -p tower-outbound-benches --bench keyed` takes about half a minute. In each round, the limiters are
//! measured in turns, so that other load on the machine affects all of them; a figure is the median of the rounds. Compare
//! the columns, not the figures with those of another machine. The peers have one budget; `ours, 2 budgets` has two.
//!
//! | row | what is measured |
//! |---|---|
//! | `bytes` | heap per key, of so many keys of 8 bytes that owe something |
//! | `warm` | processor time of a `try_acquire` of a key that is held, in random order, never exhausted |
//! | `refused` | the same for keys that are exhausted |
//! | `over` | keys that got more than their limit, of 10,000 keys that call twice in turns, at a cap of 1,000 keys |
//! | `locked out` | keys of these that got nothing |
//! | `lost` | keys that were refused although fewer than 1,000 owed something at any time, at the same cap |

mod common;

use allocation_counter::measure;
use clap::Parser;
use common::{median, thread_cpu_time};
use governor::{DefaultKeyedRateLimiter, Quota};
use std::{collections::HashMap, hint::black_box, num::NonZeroU32, thread, time::Duration};
use throttle_net::{Eviction, PerKey};
use tokio::time::Instant;
use tower_outbound::{Cost, KeyedRateLimiter, Limits, Rate};

/// Limits by key beside governor's and throttle-net's.
#[derive(Parser)]
struct Options {
    /// Measure only this row, such as `warm-10000`; not one of the keys at a cap
    #[arg(long, value_name = "ROW")]
    only: Option<String>,
    /// Passed by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

const ROUNDS: usize = 7;
const CALLS: u32 = 200_000;
const CAP: usize = 1_000;
const HOUR: Duration = Duration::from_secs(3_600);

/// Makes a limiter by key: of one per period, with this burst, and a cap if it has one.
type Make = fn(u32, Duration, Option<usize>) -> Box<dyn Fn(u64) -> bool>;

const LIMITERS: [(&str, Make); 4] = [
    ("ours", |burst, period, cap| {
        ours(Limits::new().requests(rate(burst, period)), cap)
    }),
    ("ours, 2 budgets", |burst, period, cap| {
        let rate = rate(burst, period);
        ours(Limits::new().requests(rate).tokens(rate), cap)
    }),
    ("governor", |burst, period, _| {
        let burst = NonZeroU32::new(burst).expect("the burst is not 0");
        let quota = Quota::with_period(period).expect("the period is not 0");
        let limiter: DefaultKeyedRateLimiter<u64> = DefaultKeyedRateLimiter::keyed(quota.allow_burst(burst));
        Box::new(move |key| limiter.check_key(&key).is_ok())
    }),
    ("throttle-net", |burst, period, cap| {
        let eviction = cap.map_or_else(Eviction::unbounded, Eviction::capacity);
        let limiter = PerKey::<u64>::builder()
            .rate(1, period)
            .burst(burst)
            .eviction(eviction)
            .build();
        Box::new(move |key| limiter.try_acquire(&key))
    }),
];

fn rate(burst: u32, period: Duration) -> Rate {
    Rate::new(1_u64, period).burst(u64::from(burst))
}

fn ours(limits: Limits, cap: Option<usize>) -> Box<dyn Fn(u64) -> bool> {
    let limiter = KeyedRateLimiter::new(limits).expect("the rates are valid");
    let limiter = limiter.max_keys(cap.unwrap_or(usize::MAX)).expect("the cap is not 0");
    Box::new(move |key| limiter.try_acquire(&key, Cost::tokens(1)).is_ok())
}

/// Heap per key.
fn bytes(make: Make, keys: u64) -> f64 {
    let mut kept = None;
    let counted = measure(|| {
        let limiter = make(10, HOUR, None);
        (0..keys).for_each(|key| assert!(limiter(key)));
        kept = Some(limiter);
    });
    counted.bytes_current as f64 / keys as f64
}

/// Processor time of a call in nanoseconds, of keys that have called before.
fn nanos(limiter: &dyn Fn(u64) -> bool, keys: u64, is_admitted: bool) -> f64 {
    let mut rng = fastrand::Rng::with_seed(1);
    let begun = thread_cpu_time();
    for _ in 0..CALLS {
        assert_eq!(black_box(limiter)(rng.u64(..keys)), is_admitted);
    }
    (thread_cpu_time() - begun).as_nanos() as f64 / f64::from(CALLS)
}

/// Keys that got more than their limit, and keys that got nothing.
fn capped(make: Make) -> [f64; 2] {
    let limiter = make(1, HOUR, Some(CAP));
    let mut admitted = HashMap::<u64, u32>::new();
    for _ in 0..2 {
        for key in 0..10_000 {
            *admitted.entry(key).or_default() += u32::from(limiter(key));
        }
    }
    let count = |is: fn(u32) -> bool| admitted.values().filter(|admitted| is(**admitted)).count() as f64;
    [count(|admitted| admitted > 1), count(|admitted| admitted == 0)]
}

/// New keys that were refused, while each owes something for 10 ms and at most 500 do at once.
fn lost(make: Make) -> f64 {
    let limiter = make(1, Duration::from_millis(10), Some(CAP));
    let mut lost = 0;
    for batch in 0..20 {
        let begun = Instant::now();
        lost += (0..500).filter(|key| !limiter(batch * 500 + key)).count();
        thread::sleep(Duration::from_millis(11).saturating_sub(begun.elapsed()));
    }
    lost as f64
}

fn row(name: &str, figures: [f64; 4]) {
    print!("{name:<16}");
    figures.iter().for_each(|figure| print!("{figure:>17.1}"));
    println!();
}

fn main() {
    let options = Options::parse();
    let is_asked_for = |name: &str| options.only.as_deref().is_none_or(|only| name == only);
    print!("{:<16}", "");
    LIMITERS.iter().for_each(|(name, _)| print!("{name:>17}"));
    println!();
    for keys in [10_000, 1_000_000] {
        let name = format!("bytes-{keys}");
        if is_asked_for(&name) {
            row(&name, LIMITERS.map(|(_, make)| bytes(make, keys)));
        }
    }
    for (name, burst, is_admitted) in [("warm", 1_000_000, true), ("refused", 1, false)] {
        for keys in [10_000, 1_000_000] {
            let name = format!("{name}-{keys}");
            if !is_asked_for(&name) {
                continue;
            }
            let limiters = LIMITERS.map(|(_, make)| make(burst, HOUR, None));
            for limiter in &limiters {
                (0..keys).for_each(|key| assert!(limiter(key)));
            }
            let rounds: Vec<_> = (0..ROUNDS)
                .map(|_| [0, 1, 2, 3].map(|at| nanos(&*limiters[at], keys, is_admitted)))
                .collect();
            let medians = [0, 1, 2, 3].map(|at| median(rounds.iter().map(|round| round[at])));
            row(&name, medians);
        }
    }
    if options.only.is_some() {
        return;
    }
    let capped = LIMITERS.map(|(_, make)| capped(make));
    row("over", capped.map(|[over, _]| over));
    row("locked out", capped.map(|[_, locked_out]| locked_out));
    row("lost", LIMITERS.map(|(_, make)| lost(make)));
}
