//! Pacing: requests and tokens, both or neither.
//!
//! A provider gives an account so many requests and so many tokens a minute. [`RateLimiter`] keeps both budgets in
//! buckets that fill continuously, and makes callers wait until *all* of them have what a call costs;
//! [`RateLimitLayer`] puts it in front of a service. A [`Limiter`] is that, or one whose buckets many processes share: see
//! `rate::redis` (feature `redis`).
//!
//! # What is promised
//!
//! - **Exact.** In any window of length T at most `burst + rate x T` is admitted (and what a late timer is made up for,
//!   5 ms at most). Integers throughout: no drift.
//! - **All or nothing.** A call that has to wait for tokens takes no request meanwhile.
//! - **In order.** First come, first served. A heavy call is not starved by light ones.
//! - **Nothing is taken before admission**, so a call that is dropped while it waits has nothing to give back.
//! - **Never a hang.** A cost above a burst is [refused at once](crate::error::CostExceedsBurst).
//!
//! # Examples
//!
//! ```
//! # #[tokio::main(flavor = "current_thread", start_paused = true)]
//! # async fn main() -> Result<(), tower::BoxError> {
//! use tower::{Service, ServiceBuilder, ServiceExt, service_fn};
//! use tower_outbound::{ApiTokens, Limits, Rate, RateLimitLayer, RateLimiter};
//!
//! let limiter = RateLimiter::new(
//!     Limits::new().requests(Rate::per_minute(500).burst(10)).tokens(Rate::per_minute(30_000)),
//! )?;
//! let mut service = ServiceBuilder::new()
//!     .layer(RateLimitLayer::new(limiter.clone()))
//!     .service(service_fn(async |_: http::Request<()>| Ok::<_, tower::BoxError>(http::Response::new(()))));
//!
//! let request = http::Request::post("http://localhost/v1/chat").extension(ApiTokens(1_200)).body(())?;
//! service.ready().await?.call(request).await?;
//! assert_eq!(limiter.available().tokens, Some(28_800));
//! # Ok(())
//! # }
//! ```
//!
//! With requests of another type, or to estimate tokens from the request, give the layer a function:
//!
//! ```
//! # use tower_outbound::{Cost, Limits, Rate, RateLimitLayer, RateLimiter};
//! # let limiter = RateLimiter::new(Limits::new().tokens(Rate::per_minute(30_000)))?;
//! let layer = RateLimitLayer::with_cost(limiter, |prompt: &String| Cost::tokens(prompt.len() as u64 / 4 + 256));
//! # Ok::<_, tower_outbound::error::InvalidConfig>(())
//! ```

mod bucket;
mod buckets;
mod estimate;
mod layer;
mod limiter;
mod limits;
mod local;
#[cfg(feature = "redis")]
#[cfg_attr(docsrs, doc(cfg(feature = "redis")))]
pub mod redis;

pub use crate::tokens::{ApiTokens, ApiTokensUsed};
pub use buckets::Available;
pub(crate) use buckets::Bursts;
pub use estimate::Estimate;
pub use layer::{AsCharged, ByExtension, ByUsage, RateLimit, RateLimitLayer, RequestCost, ResponseFuture, UsedCost};
pub use limiter::Limiter;
pub use limits::{Amount, Budget, Cost, Limits, Rate};
pub use local::{RateLimiter, TryAcquireError};
