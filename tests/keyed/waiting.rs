//! Calls that wait for their key: their order, their times, and what is left of them.

use crate::{ONE, requests, secs, support::ms};
use std::sync::{Arc, Mutex};
use tokio::time::{Instant, advance, sleep, timeout};
use tokio_test::{assert_pending, assert_ready_err, assert_ready_ok, task};
use tower_outbound::{Cost, KeyedRateLimiter, Limits, Rate, error::AcquireError};

#[tokio::test(start_paused = true)]
async fn calls_of_a_key_are_admitted_in_the_order_in_which_they_came() {
    let limiter = requests(Rate::per_second(10).burst(1));
    let order = Arc::new(Mutex::new(Vec::new()));
    let mut calls = tokio::task::JoinSet::new();
    for call in 0..60_u64 {
        let (limiter, order) = (limiter.clone(), order.clone());
        calls.spawn(async move {
            limiter.acquire(&(call % 3), ONE).await.unwrap();
            order.lock().unwrap().push((call % 3, call));
        });
        tokio::task::yield_now().await;
    }
    let start = Instant::now();
    calls.join_all().await;
    assert_eq!(start.elapsed(), ms(1_900));
    for key in 0..3 {
        let order = order.lock().unwrap();
        let of_key: Vec<_> = order
            .iter()
            .filter(|(of, _)| *of == key)
            .map(|(_, call)| *call)
            .collect();
        assert!(of_key.is_sorted() && of_key.len() == 20, "{of_key:?}");
    }
    sleep(ms(100)).await;
    assert_eq!(limiter.len(), 0);
}

#[tokio::test(start_paused = true)]
async fn an_exhausted_key_delays_others_by_nothing() {
    let limiter = requests(Rate::per_second(1).burst(1));
    let mut exhausted: Vec<_> = (0..200).map(|_| task::spawn(limiter.acquire(&0, ONE))).collect();
    assert_ready_ok!(exhausted[0].poll());
    exhausted[1..].iter_mut().for_each(|call| assert_pending!(call.poll()));
    let start = Instant::now();
    for key in 1..1_000 {
        limiter.acquire(&key, ONE).await.unwrap();
    }
    assert_eq!(start.elapsed(), ms(0));
}

#[tokio::test(start_paused = true)]
async fn calls_that_are_dropped_while_they_wait_take_nothing_and_leave_nothing() {
    let limiter = requests(Rate::per_second(10).burst(2));
    limiter.try_acquire(&1, ONE.with("requests", 2)).unwrap();
    {
        let mut calls: Vec<_> = (0..100).map(|_| task::spawn(limiter.acquire(&1, ONE))).collect();
        calls.iter_mut().for_each(|call| assert_pending!(call.poll()));
        let _never_polled = limiter.acquire(&2, ONE);
        assert_eq!(limiter.len(), 1);
    }
    let waits = limiter.try_acquire(&1, ONE).unwrap_err();
    assert_eq!(waits.retry_after(), Some(ms(100)));
    advance(ms(200)).await;
    assert_eq!((limiter.available(&1).requests, limiter.len()), (Some(2), 0));
}

#[tokio::test(start_paused = true)]
async fn a_timeout_around_a_wait_gives_the_place_to_the_next_call() {
    let limiter = requests(Rate::per_second(1).burst(1));
    limiter.try_acquire(&1, ONE).unwrap();
    let first = limiter.clone();
    let first = tokio::spawn(async move { timeout(ms(500), first.acquire(&1, ONE)).await.is_err() });
    tokio::task::yield_now().await;
    let start = Instant::now();
    limiter.acquire(&1, ONE).await.unwrap();
    assert_eq!((start.elapsed(), first.await.unwrap()), (secs(1), true));
}

#[tokio::test(start_paused = true)]
async fn calls_that_have_waited_catch_up_on_the_time_by_which_they_were_woken_late() {
    let limiter = requests(Rate::per_second(20_000).burst(1));
    let start = Instant::now();
    let mut calls = tokio::task::JoinSet::new();
    for key in 0..3_u64 {
        for _ in 0..4 {
            let limiter = limiter.clone();
            calls.spawn(async move {
                let mut admitted = 0;
                while start.elapsed() < secs(1) {
                    limiter.acquire(&key, ONE).await.unwrap();
                    admitted += 1;
                    tokio::task::yield_now().await;
                }
                admitted
            });
        }
    }
    let admitted: u32 = calls.join_all().await.into_iter().sum();
    // The timer ticks once in a millisecond, which is the time of 20 calls.
    assert!((3 * 19_900..=3 * 20_101).contains(&admitted), "{admitted}");
}

#[tokio::test(start_paused = true)]
async fn a_call_that_has_not_waited_is_never_admitted_as_of_an_earlier_time() {
    let limiter = requests(Rate::per_second(1_000).burst(1));
    let mut admitted = 0;
    for _ in 0..10_000 {
        advance(std::time::Duration::from_micros(1_500)).await;
        admitted += u32::from(limiter.try_acquire(&1, ONE).is_ok());
        assert!(limiter.try_acquire(&1, ONE).is_err());
    }
    assert_eq!(admitted, 10_000);
}

#[tokio::test(start_paused = true)]
async fn a_paused_key_admits_nothing_until_its_pause_ends_and_others_do() {
    let limiter = requests(Rate::per_second(10));
    let start = Instant::now();
    limiter.pause(&1, start + secs(5)).unwrap();
    assert_eq!(limiter.paused(&1).map(|pause| pause.until()), Some(start + secs(5)));
    assert_eq!((limiter.paused(&2), limiter.len()), (None, 1));
    assert_eq!(limiter.try_acquire(&1, ONE), Err(AcquireError::NotYet(secs(5))));
    limiter.try_acquire(&2, ONE).unwrap();
    assert_eq!(limiter.wait_for(&1, ONE), secs(5));
    limiter.acquire(&1, ONE).await.unwrap();
    assert_eq!(start.elapsed(), secs(5));
    advance(secs(1)).await;
    assert_eq!(limiter.len(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_pause_that_is_ended_or_shortened_lets_waiting_calls_go_on() {
    let limiter = requests(Rate::per_second(10));
    limiter.pause(&1, Instant::now() + secs(3_600)).unwrap();
    let mut call = task::spawn(limiter.acquire(&1, ONE));
    assert_pending!(call.poll());
    limiter.resume(&1);
    assert!(call.is_woken());
    assert_ready_ok!(call.poll());
    limiter.pause(&2, Instant::now() + secs(3_600)).unwrap();
    limiter.pause(&2, Instant::now()).unwrap();
    limiter.try_acquire(&2, ONE).unwrap();
    // To end the pause of a key that has none does not hold the key.
    limiter.resume(&3);
    limiter.pause(&4, Instant::now()).unwrap();
    assert_eq!(limiter.len(), 2);
    advance(secs(1)).await;
    assert_eq!(limiter.len(), 0);
}

#[tokio::test(start_paused = true)]
async fn many_calls_of_a_paused_key_leave_nothing_behind() {
    let limiter = requests(Rate::per_second(10));
    limiter.pause(&1, Instant::now() + secs(3_600)).unwrap();
    for _ in 0..1_000 {
        assert!(limiter.try_acquire(&1, ONE).is_err());
    }
    let counted = allocation_counter::measure(|| {
        for _ in 0..1_000 {
            assert!(limiter.try_acquire(&1, ONE).is_err());
        }
    });
    assert_eq!(counted.bytes_current, 0);
    advance(secs(3_600)).await;
    assert_eq!(limiter.len(), 0);
}

#[tokio::test(start_paused = true)]
async fn an_open_estimate_holds_its_key_and_is_settled_exactly() {
    let limits = Limits::new().tokens(Rate::per_minute(600).burst(100));
    let limiter = KeyedRateLimiter::<String>::new(limits).unwrap();
    let first = limiter.acquire_estimate("a", Cost::tokens(60)).await.unwrap();
    let second = limiter.try_acquire_estimate("a", Cost::tokens(40)).unwrap();
    assert_eq!(limiter.available("a").tokens, Some(0));
    first.settle(Cost::tokens(10));
    assert_eq!(limiter.available("a").tokens, Some(50));
    // What the key would have lost by overflowing is not refunded.
    advance(secs(60)).await;
    assert_eq!((limiter.available("a").tokens, limiter.len()), (Some(100), 1));
    second.settle(Cost::none());
    assert_eq!((limiter.available("a").tokens, limiter.len()), (Some(100), 0));
    // A debt is kept when the key is at rest again.
    let third = limiter.try_acquire_estimate("a", Cost::tokens(10)).unwrap();
    third.settle(Cost::tokens(150));
    assert_eq!(limiter.wait_for("a", Cost::tokens(1)), ms(5_100));
    assert_eq!(limiter.len(), 1);
    advance(secs(15)).await;
    assert_eq!(limiter.len(), 0);
}

#[tokio::test(start_paused = true)]
async fn an_estimate_that_is_dropped_is_the_final_charge_and_frees_its_key() {
    let limiter = requests(Rate::per_second(1).burst(5));
    let estimate = limiter.acquire_estimate(&1, ONE).await.unwrap();
    let free = limiter.acquire_estimate(&2, Cost::none()).await.unwrap();
    drop(estimate);
    assert_eq!((limiter.available(&1).requests, limiter.len()), (Some(4), 2));
    drop(free);
    assert_eq!(limiter.len(), 1);
    // The estimate may outlive the limiter.
    let last = limiter.acquire_estimate(&3, ONE).await.unwrap();
    drop(limiter);
    last.settle(Cost::none());
}

#[tokio::test(start_paused = true)]
async fn a_call_that_waits_is_refused_when_its_turn_has_come_and_a_cap_does_not_hold_its_cost() {
    let limits = Limits::new()
        .requests(Rate::per_second(1).burst(1))
        .budget("money", Rate::per_hour(10).refuse());
    let limiter = KeyedRateLimiter::<u64>::new(limits).unwrap();
    let cost = ONE.with("money", 5);
    limiter.acquire(&1, cost).await.unwrap();
    let mut calls: Vec<_> = (0..2).map(|_| task::spawn(limiter.acquire(&1, cost))).collect();
    calls.iter_mut().for_each(|call| assert_pending!(call.poll()));
    advance(secs(1)).await;
    assert_ready_ok!(calls[0].poll());
    let refused = assert_ready_err!(calls[1].poll());
    assert!(matches!(refused, AcquireError::Exhausted(cap) if cap.budget() == "money"));
}
