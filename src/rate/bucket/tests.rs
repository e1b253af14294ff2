//! Tests of the arithmetic of one bucket.

use super::*;

/// Returns a full bucket that holds `burst` tokens and gains 3 tokens in 7 ticks. A unit is a seventh of a token.
fn sevenths(burst: i128) -> Bucket {
    Bucket::new(BucketSpec {
        fill: 3,
        unit: 7,
        capacity: burst * 7,
        initial: burst * 7,
        max_debt: 1 << 126,
        second: 1_000_000_000,
        kind: BucketKind::default(),
    })
}

/// Returns a full bucket that holds 10 tokens and gains one token in `unit` ticks.
fn bucket_of_ten(unit: u128) -> Bucket {
    let capacity = 10 * unit as i128;
    Bucket::new(BucketSpec {
        fill: 1,
        unit,
        capacity,
        initial: capacity,
        max_debt: 1 << 126,
        second: 1_000_000_000,
        kind: BucketKind::default(),
    })
}

#[test]
fn the_time_until_an_amount_is_available_is_exact() {
    // Each step: elapsed ticks, an amount of tokens, the expected ticks until that amount can be taken.
    let steps = [
        (0, 5, 0),  // takes the whole burst
        (0, 1, 3),  // 7 units missing, at 3 a tick, rounded up
        (3, 1, 0),  // 9 units: one token, 2 units left
        (0, 1, 2),  // 5 units missing
        (2, 1, 0),  // 1 unit left
        (0, 5, 12), // 34 units missing
        (12, 5, 0), // 2 units left
        (1_000, 5, 0),
        (0, 1, 3), // the bucket held no more than the burst
    ];
    let mut bucket = sevenths(5);
    for (step, (elapsed, amount, wait)) in steps.into_iter().enumerate() {
        bucket.advance(elapsed);
        assert_eq!(bucket.time_until(amount), wait, "step {step}");
        if wait == 0 {
            bucket.take(amount, false);
        }
    }
}

#[test]
fn an_amount_of_zero_never_waits_even_in_debt() {
    let mut bucket = sevenths(5);
    bucket.take(5, true);
    bucket.settle(5, 10, 0);
    assert_eq!((bucket.available(), bucket.time_until(0)), (0, 0));
    // A debt of 35 units has to be filled, and then the 7 units of one token. A tick adds 3 units, so this takes 14
    // ticks.
    assert_eq!(bucket.time_until(1), 14);
}

#[test]
fn the_example_of_the_module_docs() {
    for taken_before in [false, true] {
        let mut bucket = bucket_of_ten(1);
        bucket.take(8, true);
        bucket.advance(5);
        assert_eq!((bucket.balance, bucket.withheld()), (7, 5));
        if taken_before {
            bucket.take(7, false);
        }
        bucket.settle(8, 0, 0);
        assert_eq!(bucket.balance, if taken_before { 3 } else { 10 });
    }
}

const ROUNDS: usize = if cfg!(miri) { 20 } else { 2_000 };

#[test]
fn no_window_admits_more_than_the_burst_and_the_fill() {
    let mut rng = fastrand::Rng::with_seed(1);
    for _ in 0..ROUNDS {
        let burst = rng.u64(1..=20);
        let mut bucket = sevenths(burst.into());
        let mut now = 0_u64;
        let mut taken: Vec<(u64, u64)> = Vec::new();
        for _ in 0..60 {
            let elapsed = rng.u64(0..30);
            now += elapsed;
            bucket.advance(elapsed);
            let amount = rng.u64(1..=burst);
            if bucket.time_until(amount) == 0 {
                bucket.take(amount, false);
                taken.push((now, amount));
            }
        }
        for first in 0..taken.len() {
            let mut sum = 0;
            for (at, amount) in &taken[first..] {
                sum += amount;
                let filled = (at - taken[first].0) * 3;
                assert!(sum * 7 <= burst * 7 + filled, "{taken:?}");
            }
        }
    }
}

#[test]
fn a_refund_never_leaves_more_than_charging_the_true_costs_would_have() {
    let mut rng = fastrand::Rng::with_seed(2);
    let mut refunded = 0;
    for _ in 0..ROUNDS {
        let burst = rng.u64(5..25);
        let mut bucket = sevenths(burst.into());
        // A bucket that is charged the true costs from the start. The bucket that is charged estimates must never
        // hold more than this ideal one.
        let mut ideal = sevenths(burst.into());
        let mut unsettled: Vec<(u64, u64, u64)> = Vec::new();
        let mut charged = 0;
        for _ in 0..80 {
            let elapsed = rng.u64(0..12);
            bucket.advance(elapsed);
            ideal.advance(elapsed);
            let estimate = rng.u64(1..=burst);
            if bucket.time_until(estimate) == 0 {
                let used = rng.u64(0..=estimate);
                bucket.take(estimate, true);
                ideal.take(used, false);
                unsettled.push((estimate, used, charged));
                charged += 1;
            }
            if !unsettled.is_empty() && rng.bool() {
                let (estimate, used, number) = unsettled.swap_remove(rng.usize(0..unsettled.len()));
                let before = bucket.balance;
                bucket.settle(estimate, used, number);
                refunded += bucket.balance - before;
            }
            assert!(bucket.balance <= ideal.balance, "{bucket:?} {ideal:?}");
        }
    }
    assert!(refunded > 0);
}

#[test]
fn a_new_rate_keeps_tokens_fractions_and_debts() {
    let mut old = sevenths(5);
    old.take(3, false);
    old.advance(1);
    // The balance is 2 tokens and 3 sevenths of a token.
    let mut new = bucket_of_ten(14);
    new.carry_over(&old);
    assert_eq!(new.balance, 2 * 14 + 6);
    old.take(5, true);
    old.settle(5, 6, 0);
    let mut new = bucket_of_ten(14);
    new.carry_over(&old);
    assert_eq!(new.balance, 2 * (2 * 7 + 3 - 6 * 7));
}

#[test]
fn a_new_rate_never_makes_a_refund_larger() {
    // An estimate of 3 tokens was charged, and nothing was used. Without the estimate, the bucket would hold 31
    // units.
    let mut old = sevenths(5);
    old.take(3, true);
    old.advance(3);
    old.take(1, false);
    old.advance(1);
    let mut new = bucket_of_ten(2);
    new.carry_over(&old);
    new.settle(3, 0, 0);
    assert_eq!(new.balance, 31 * 2 / 7);
}

#[test]
fn a_refund_is_exact_if_nothing_was_withheld_when_the_call_was_charged() {
    // Each case: the true cost of an estimate of 8, and the balance that the true cost would have left.
    for (used, balance) in [(0, 10), (3, 10), (6, 9), (8, 7), (12, 3)] {
        let mut bucket = bucket_of_ten(1);
        bucket.take(8, true);
        bucket.advance(5);
        bucket.settle(8, used, 0);
        assert_eq!((bucket.balance, bucket.withheld()), (balance, 0), "{used}");
    }
}

#[test]
fn a_call_that_was_charged_later_gives_back_nothing_that_overflowed_before() {
    let mut bucket = bucket_of_ten(1);
    bucket.take(8, true);
    bucket.advance(5);
    bucket.take(6, true);
    bucket.settle(6, 6, 1);
    assert_eq!((bucket.balance, bucket.withheld()), (1, 5));
    // The first call has used nothing, so a bucket that was charged the true costs would hold 10 - 6.
    bucket.settle(8, 0, 0);
    assert_eq!(bucket.balance, 4);
}

#[test]
fn a_debt_that_was_forgotten_is_withheld_whatever_the_calls_have_used() {
    let mut bucket = bucket_of_ten(1);
    bucket.take(8, true);
    bucket.debit(6);
    bucket.forgive_debt();
    assert_eq!((bucket.balance, bucket.withheld()), (0, 4));
    bucket.settle(8, 3, 0);
    assert_eq!(bucket.balance, 1);
}
