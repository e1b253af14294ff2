//! What keys take, and that they give it back.

use crate::{ONE, requests, secs};
use allocation_counter::measure;
use std::{
    hint::black_box,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};
use tokio::time::{Instant, advance};
use tower_outbound::{Cost, KeyedRateLimiter, Limits, Rate};

fn two_budgets() -> Limits {
    Limits::new()
        .requests(Rate::per_minute(500).burst(10))
        .tokens(Rate::per_day(30_000))
}

/// Returns how many bytes a key takes when so many are held.
fn bytes_of_a_key(keys: u64) -> f64 {
    let limiter = KeyedRateLimiter::<u64>::new(two_budgets()).unwrap();
    let counted = measure(|| (0..keys).for_each(|key| limiter.try_acquire(&key, Cost::tokens(100)).unwrap()));
    counted.bytes_current as f64 / keys as f64
}

#[test]
fn a_key_of_eight_bytes_with_two_budgets_takes_at_most_80_bytes() {
    let bytes = bytes_of_a_key(200_000);
    assert!(bytes <= 80.0, "{bytes}");
}

#[test]
#[ignore = "takes a minute: run it with --release --nocapture"]
fn ten_million_keys_take_at_most_80_bytes_each() {
    for keys in [1_000_000, 1_900_000, 4_000_000, 7_500_000, 10_000_000] {
        let bytes = bytes_of_a_key(keys);
        println!("{keys} keys: {bytes:.1} bytes each");
        assert!(bytes <= 80.0, "{bytes}");
    }
}

#[test]
#[ignore = "measures time: run it with --release --nocapture"]
fn the_slowest_insert_of_four_million_keys_takes_at_most_5_ms() {
    let limiter = KeyedRateLimiter::<u64>::new(two_budgets()).unwrap();
    let slowest = (0..4_000_000_u64).map(|key| {
        let start = Instant::now();
        limiter.try_acquire(&key, Cost::tokens(100)).unwrap();
        start.elapsed()
    });
    println!("slowest insert: {:?}", slowest.max());
}

#[test]
fn a_table_that_grows_moves_some_keys_with_each_call_and_loses_none() {
    const HELD: u64 = 700_000;
    let moved = Arc::new(AtomicUsize::new(0));
    let counted = moved.clone();
    let tier_of = move |_: &u64| {
        counted.fetch_add(1, Relaxed);
        0
    };
    let limits = Limits::new().requests(Rate::per_day(10).burst(10));
    let limiter = KeyedRateLimiter::with_tiers([limits], tier_of).unwrap();
    let mut most = 0;
    for key in 0..HELD {
        let before = moved.load(Relaxed);
        limiter.try_acquire(&key, ONE).unwrap();
        most = most.max(moved.load(Relaxed) - before);
    }
    // A key is asked for its tier when it comes and when it moves. A part of the table has 2,700 keys.
    assert!((50..=130).contains(&most), "{most}");
    assert!((0..HELD).all(|key| limiter.available(&key).requests == Some(9)));
    assert_eq!(limiter.len(), HELD as usize);
}

#[tokio::test(start_paused = true)]
async fn a_call_of_a_key_that_is_held_allocates_nothing() {
    let limiter = KeyedRateLimiter::<String>::new(two_budgets()).unwrap();
    limiter.try_acquire("a", Cost::tokens(1)).unwrap();
    let counted = measure(|| {
        for _ in 0..9 {
            black_box(&limiter).try_acquire("a", Cost::tokens(1)).unwrap();
        }
        assert!(black_box(&limiter).try_acquire("a", Cost::tokens(1)).is_err());
        assert!(black_box(&limiter).try_acquire("a", Cost::tokens(u64::MAX)).is_err());
        let _ = black_box(limiter.available("a"));
    });
    assert_eq!(counted.count_total, 0);
}

#[tokio::test(start_paused = true)]
async fn keys_that_are_full_are_forgotten_by_the_calls_that_come_later() {
    let limiter = requests(Rate::per_second(10));
    let counted = measure(|| (0..100_000).for_each(|key| limiter.try_acquire(&key, ONE).unwrap()));
    advance(secs(1)).await;
    let later = measure(|| {
        for call in 0..600_000_u64 {
            let _ = limiter.try_acquire(&(call % 2_500), ONE);
        }
    });
    let left = counted.bytes_current + later.bytes_current;
    assert!(left < counted.bytes_current / 5, "{left} of {}", counted.bytes_current);
}

#[tokio::test(start_paused = true)]
async fn a_new_key_for_each_call_does_not_add_up() {
    let limiter = requests(Rate::per_second(1_000).burst(1));
    let mut most = 0;
    for key in 0..100_000 {
        advance(std::time::Duration::from_micros(100)).await;
        limiter.try_acquire(&key, ONE).unwrap();
        if key % 1_000 == 0 {
            most = most.max(
                format!("{limiter:?}").split(['{', ',']).nth(1).unwrap()[7..]
                    .trim()
                    .parse()
                    .unwrap(),
            );
        }
    }
    // Each part of the table is searched for full keys once it holds a few.
    assert!(most <= 256 * 15, "{most}");
    advance(secs(1)).await;
    assert_eq!(limiter.len(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_key_takes_no_more_after_calls_have_waited_for_it() {
    let limiter = requests(Rate::per_second(10).burst(1));
    for round in 0..3 {
        let counted = measure(|| {
            limiter.try_acquire(&1, ONE).unwrap();
            let mut calls: Vec<_> = (0..10)
                .map(|_| tokio_test::task::spawn(limiter.acquire(&1, ONE)))
                .collect();
            calls
                .iter_mut()
                .for_each(|call| tokio_test::assert_pending!(call.poll()));
            let estimate = limiter.try_acquire_estimate(&2, ONE).unwrap();
            estimate.settle(ONE);
        });
        if round == 2 {
            assert_eq!(counted.bytes_current, 0);
        }
        advance(secs(1)).await;
        assert_eq!(limiter.len(), 0);
    }
}
