//! What only several threads can show.

use crate::{ONE, requests};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};
use tokio::time::Instant;
use tower_outbound::{Cost, KeyedRateLimiter, Limits, Rate};

/// How long the threads call.
const RUN: Duration = Duration::from_millis(600);

#[test]
fn threads_that_call_the_same_keys_never_get_more_than_the_limit() {
    const KEYS: usize = 50;
    let limiter = requests(Rate::per_second(1_000).burst(20)).max_keys(1_000).unwrap();
    let admitted: Arc<Vec<AtomicU64>> = Arc::new((0..KEYS).map(|_| AtomicU64::new(0)).collect());
    let start = Instant::now();
    thread::scope(|scope| {
        for thread in 0..4 {
            let (limiter, admitted) = (limiter.clone(), admitted.clone());
            scope.spawn(move || {
                let mut rng = fastrand::Rng::with_seed(thread);
                while start.elapsed() < RUN {
                    let key = rng.usize(..KEYS);
                    match rng.u8(..8) {
                        // An estimate that is used in full, so that it counts as admitted.
                        0 => {
                            if let Ok(estimate) = limiter.try_acquire_estimate(&(key as u64), ONE) {
                                admitted[key].fetch_add(1, Relaxed);
                                estimate.settle(ONE);
                            }
                        }
                        1 => drop(limiter.len()),
                        2 => {
                            let _ = limiter.try_acquire(&rng.u64(1_000..100_000), ONE);
                        }
                        _ => {
                            if limiter.try_acquire(&(key as u64), ONE).is_ok() {
                                admitted[key].fetch_add(1, Relaxed);
                            }
                        }
                    }
                }
            });
        }
    });
    let most = 20 + start.elapsed().as_millis() as u64;
    for admitted in admitted.iter().map(|admitted| admitted.load(Relaxed)) {
        assert!(admitted <= most, "{admitted} of {most}");
    }
}

#[test]
fn threads_that_wait_cancel_settle_and_change_limits_leave_nothing_and_are_never_over() {
    const KEYS: u64 = 8;
    let limits = |burst: u64| {
        Limits::new()
            .requests(Rate::per_second(2_000).burst(burst))
            .tokens(Rate::per_second(1_000_000))
    };
    let limiter = KeyedRateLimiter::<u64>::new(limits(5)).unwrap();
    let admitted: Arc<Vec<AtomicU64>> = Arc::new((0..KEYS).map(|_| AtomicU64::new(0)).collect());
    let changes = Arc::new(AtomicU64::new(0));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(3)
        .enable_time()
        .build()
        .unwrap();
    let start = Instant::now();
    runtime.block_on(async {
        let mut tasks = tokio::task::JoinSet::new();
        for task in 0..40 {
            let (limiter, admitted, changes) = (limiter.clone(), admitted.clone(), changes.clone());
            tasks.spawn(async move {
                let mut rng = fastrand::Rng::with_seed(task);
                while start.elapsed() < RUN {
                    let key = rng.u64(..KEYS);
                    let count = || admitted[key as usize].fetch_add(1, Relaxed);
                    match rng.u8(..40) {
                        0..=9 => {
                            let wait = limiter.acquire(&key, ONE);
                            if tokio::time::timeout(Duration::from_micros(rng.u64(..3_000)), wait)
                                .await
                                .is_ok()
                            {
                                count();
                            }
                        }
                        10..=19 => {
                            let estimate = limiter.acquire_estimate(&key, Cost::tokens(50)).await.unwrap();
                            count();
                            tokio::task::yield_now().await;
                            estimate.settle(Cost::tokens(rng.u64(..100)));
                        }
                        20 => {
                            changes.fetch_add(1, Relaxed);
                            limiter.set_limits(limits(rng.u64(4..=5))).unwrap();
                        }
                        21 => limiter
                            .pause(&key, Instant::now() + Duration::from_micros(300))
                            .unwrap(),
                        22 => limiter.resume(&key),
                        _ => {
                            limiter.acquire(&key, ONE).await.unwrap();
                            count();
                        }
                    }
                }
            });
        }
        tasks.join_all().await;
    });
    // A key that is full when the burst is raised is full afterwards: one more each time.
    let elapsed = start.elapsed() + Duration::from_millis(5);
    let most = 5 + (elapsed.as_secs_f64() * 2_000.0) as u64 + changes.load(Relaxed);
    let admitted: Vec<_> = admitted.iter().map(|admitted| admitted.load(Relaxed)).collect();
    assert!(
        admitted.iter().all(|admitted| *admitted <= most),
        "{admitted:?} of {most}"
    );
    assert!(
        admitted.iter().all(|admitted| *admitted > most / 10),
        "{admitted:?} of {most}"
    );
    // Real time: the threads have no paused clock. All keys are full again by then.
    thread::sleep(Duration::from_millis(100));
    assert_eq!(limiter.len(), 0);
}
