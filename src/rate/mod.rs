//! Rate limits: how many requests, API tokens and other amounts are admitted per period.
//!
//! A provider limits what an account may use, for example to 500 requests and 30,000 tokens a minute. What it counts
//! are *budgets*: requests, tokens, tokens of prompts and of answers apart, and up to four others that the user
//! [names](Limits::budget), such as images. Each budget may have several [rates](Rate), such as one per minute and one
//! per day. A [`RateLimiter`] keeps one bucket for each rate, which fills continuously, and makes a call wait until *all* buckets
//! hold what the call costs. [`RateLimitLayer`] puts a limiter in front of a service. The buckets are in this process,
//! or several processes share them: see `rate::redis` (feature `redis`). A [`KeyedRateLimiter`] gives each of any number of
//! keys, such as tenants or hosts, the same limits.
//!
//! # Guarantees
//!
//! - **Exact.** In any window of length T, at most `burst + rate x T` is admitted, plus at most `rate x 5 ms` by
//!   [catching up](self#catching-up). The [burst](Rate::burst) is the capacity of the bucket. All counts are integers,
//!   so rounding errors do not add up.
//! - **All or nothing.** A call takes its whole cost from all buckets at one instant. A call that waits for tokens does
//!   not take its request in advance.
//! - **In order.** Calls are admitted in the order in which they began to wait, so calls of low cost do not starve a
//!   call of high cost.
//! - **Nothing is taken before admission.** A call that is dropped while it waits has nothing to give back.
//! - **No endless wait.** A call that costs more than a bucket can ever hold is [rejected at
//!   once](crate::error::CostExceedsBurst).
//!
//! # Catching up
//!
//! A timer is coarse (a millisecond in Tokio), and a woken task may run late. If that time were lost, a small burst
//! would limit the throughput: the bucket of a rate with a burst of 1 is full after one interval and gains nothing more
//! until the waiting call runs. So a waiting call is admitted *as of* the instant at which its cost became available,
//! at most 5 ms ago, and the bucket is filled from that instant on.
//!
//! # Settlement
//!
//! The true number of tokens is often only known after the call. A cost can be charged as an [`Estimate`], which is
//! *settled* when the response is there: the difference to the true cost is refunded or debited at once, which also
//! changes when waiting calls are admitted. [`RateLimitLayer::settle`] settles every call of a service. A debit may
//! leave a bucket in debt (a negative balance). A refund never lets more than `burst + rate x T` of true usage through
//! in a window of length T.
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
//! For requests that are not http requests, or to estimate the tokens from the request, [`RateLimitLayer::with_cost`]
//! takes a function that computes the cost:
//!
//! ```
//! # use tower_outbound::{Cost, Limits, Rate, RateLimitLayer, RateLimiter};
//! # let limiter = RateLimiter::new(Limits::new().tokens(Rate::per_minute(30_000)))?;
//! let layer = RateLimitLayer::with_cost(limiter, |prompt: &String| Cost::tokens(prompt.len() as u64 / 4 + 256));
//! # Ok::<_, tower_outbound::error::InvalidConfig>(())
//! ```

mod admission;
mod amount;
mod available;
mod bucket;
mod buckets;
mod bursts;
mod calendar;
mod charge_request;
mod demand;
mod estimate;
#[cfg(feature = "http")]
mod follow_start;
#[cfg(feature = "http")]
mod followed;
mod granted;
#[cfg(all(test, tower_outbound_loom))]
mod interleavings;
mod key_limits;
mod keyed;
mod kind;
mod layer;
#[cfg(feature = "http")]
mod level_history;
mod limit_wait;
mod limiter;
mod limits;
mod local;
mod pause;
mod plan;
#[cfg(feature = "redis")]
#[cfg_attr(docsrs, doc(cfg(feature = "redis")))]
pub mod redis;
mod saved;
mod used_share;

pub use crate::{
    budget::{Budget, BudgetName},
    cost::Cost,
    tokens::{ApiTokens, ApiTokensUsed, TokenUsage},
};
// The modules below name them as if they were here.
use crate::{budget, cost};
pub(crate) use admission::Admission;
pub use amount::Amount;
pub use available::Available;
pub(crate) use bursts::Bursts;
pub(crate) use demand::Demand;
pub use estimate::Estimate;
pub(crate) use estimate::OnSettled;
#[cfg(feature = "http")]
pub(crate) use followed::Report;
pub(crate) use granted::{
    ChargeAgain, Charged, GrantedCharge, PollCharge, current_again as current_charge_again, grant as grant_charge,
    is_charged, swap as swap_granted_charge,
};
pub(crate) use key_limits::KeyLimits;
pub use keyed::KeyedRateLimiter;
pub use kind::CallKind;
pub use layer::{AsCharged, ByExtension, ByUsage, RateLimit, RateLimitLayer, RequestCost, ResponseFuture, UsedCost};
pub use limiter::RateLimiter;
pub use limits::{Limits, Rate};
pub use pause::{Pause, PauseSource};
pub use plan::{Binding, Plan};
pub use saved::SavedLimits;
