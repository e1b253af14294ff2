//! How much memory a limit takes. A program may have thousands of them: one for each key, tenant or host.

use allocation_counter::measure;
use std::{future::pending, hint::black_box, time::Duration};
use tokio::time::sleep;
use tokio_test::{assert_pending, task};
use tower::{Layer, ServiceExt, service_fn};
use tower_outbound::{Concurrency, ConcurrencyLimitLayer, Cost, Limits, Rate, RateLimiter};

fn limiter() -> RateLimiter {
    let limits = Limits::new()
        .requests(Rate::per_second(10).burst(1))
        .tokens(Rate::per_minute(30_000));
    RateLimiter::new(limits).unwrap()
}

/// Returns how many bytes of heap the value that `make` returns takes.
fn size<T>(make: impl FnOnce() -> T) -> u64 {
    let mut kept = None;
    let counted = measure(|| kept = Some(black_box(make())));
    drop(kept);
    u64::try_from(counted.bytes_current).unwrap()
}

#[test]
fn a_rate_limit_takes_at_most_744_bytes() {
    let size = size(limiter);
    assert!(size <= 744, "{size}");
}

#[tokio::test(start_paused = true)]
async fn neither_a_cost_nor_an_estimate_allocates_whatever_its_budgets() {
    let limits = Limits::new()
        .requests(Rate::per_second(1_000))
        .input_tokens(Rate::per_second(100_000))
        .output_tokens(Rate::per_second(100_000))
        .budget("images", Rate::per_second(1_000))
        .budget("seconds", Rate::per_second(1_000));
    let limiter = RateLimiter::new(limits).unwrap();
    let built_in = || Cost::input_output_tokens(20, 10);
    let named = || built_in().with("images", 2).with("seconds", 1);
    for make in [&built_in as &dyn Fn() -> Cost, &named] {
        let rounds = 10;
        let estimates = |limiter: &RateLimiter| {
            for _ in 0..rounds {
                let estimate = limiter.try_acquire_estimate(make()).unwrap();
                estimate.settle(black_box(built_in()));
            }
        };
        // The first estimate of a budget creates the limiter's record of what estimates use.
        estimates(&limiter);
        let counted = measure(|| {
            for _ in 0..rounds {
                let cost = black_box(make());
                let copy = black_box(cost);
                assert_eq!((cost, cost.amounts().count() >= 4), (copy, true));
                limiter.check(cost).unwrap();
                limiter.try_acquire(cost).unwrap();
                let mut acquire = std::pin::pin!(limiter.acquire(copy));
                let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
                assert!(std::future::Future::poll(acquire.as_mut(), &mut cx).is_ready());
            }
        });
        assert_eq!(counted.count_total, 0);
        let counted = measure(|| estimates(&limiter));
        assert_eq!(counted.count_total, 0);
        assert_eq!(counted.bytes_current, 0);
    }
}

#[test]
fn a_concurrency_limit_takes_at_most_160_bytes() {
    let size = size(|| Concurrency::new(10).unwrap());
    assert!(size <= 160, "{size}");
}

#[tokio::test(start_paused = true)]
async fn a_limit_takes_no_more_memory_after_calls_have_waited_for_it() {
    let limiter = limiter();
    let concurrency = ConcurrencyLimitLayer::new(1).unwrap();
    let service = concurrency.layer(service_fn(|()| pending::<Result<(), ()>>()));
    // The runtime takes memory for itself in the first round, and keeps it.
    for round in 0..2 {
        let counted = measure(|| {
            limiter.try_acquire(Cost::request()).ok();
            let mut running = task::spawn(service.clone().oneshot(()));
            assert_pending!(running.poll());
            let mut waiting: Vec<_> = (0..100).map(|_| task::spawn(service.clone().oneshot(()))).collect();
            waiting.iter_mut().for_each(|call| assert_pending!(call.poll()));
            let mut acquires: Vec<_> = (0..100)
                .map(|_| task::spawn(limiter.acquire(Cost::request())))
                .collect();
            acquires.iter_mut().for_each(|acquire| assert_pending!(acquire.poll()));
        });
        if round == 1 {
            assert_eq!(counted.bytes_current, 0);
        }
        sleep(Duration::from_secs(1)).await;
    }
}
