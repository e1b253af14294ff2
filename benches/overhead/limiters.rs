//! Limiters without a service around them: those of tower-outbound, and the nearest equivalents of its peers.

use crate::{
    contenders::{Contender, UNREACHED, limiter},
    measure::{repeated, repeated_async},
};
use governor::{Quota, RateLimiter as Governor};
use leaky_bucket::RateLimiter as LeakyBucket;
use std::{hint::black_box, num::NonZeroU32};
use tokio::time::Instant;
use tower_outbound::Cost;

pub(crate) const TRY_ACQUIRE: Contender = Contender {
    name: "try-acquire",
    run: |_| {
        let limiter = limiter();
        Box::pin(async move {
            repeated(|| {
                black_box(limiter.try_acquire(Cost::tokens(3)).is_ok());
            })
        })
    },
};

pub(crate) const GOVERNOR_CHECK: Contender = Contender {
    name: "governor-check",
    run: |_| {
        let governor = Governor::direct(quota());
        Box::pin(async move {
            repeated(|| {
                black_box(governor.check().is_ok());
            })
        })
    },
};

pub(crate) const INSTANT_NOW: Contender = Contender {
    name: "tokio-instant-now",
    run: |_| {
        Box::pin(async {
            repeated(|| {
                black_box(Instant::now());
            })
        })
    },
};

pub(crate) const ACQUIRE: Contender = Contender {
    name: "acquire",
    run: |_| {
        let limiter = limiter();
        Box::pin(async move {
            repeated_async(async || {
                black_box(limiter.acquire(Cost::tokens(3)).await.is_ok());
            })
            .await
        })
    },
};

pub(crate) const GOVERNOR_UNTIL_READY: Contender = Contender {
    name: "governor-until-ready",
    run: |_| {
        let governor = Governor::direct(quota());
        Box::pin(async move { repeated_async(async || governor.until_ready().await).await })
    },
};

pub(crate) const LEAKY_BUCKET_ACQUIRE: Contender = Contender {
    name: "leaky-bucket-acquire",
    run: |_| {
        Box::pin(async {
            let rate = usize::try_from(UNREACHED).expect("a usize has 64 bits");
            let bucket = LeakyBucket::builder().initial(rate).max(rate).refill(rate).build();
            repeated_async(async || bucket.acquire_one().await).await
        })
    },
};

fn quota() -> Quota {
    Quota::per_second(NonZeroU32::new(1_000_000_000).expect("above zero"))
}
