#![cfg_attr(docsrs, feature(doc_cfg))]
//! x

pub mod concurrency;
pub mod error;
pub mod event;
pub mod executor;
mod line;
pub mod queue;
pub mod rate;
mod redact;
mod tokens;

pub use concurrency::{Concurrency, ConcurrencyLimit, ConcurrencyLimitLayer};
pub use event::{EventHandle, EventLayer, NetworkRequestEvent, RequestId, RequestStatus};
pub use executor::{Call, CallHandle, Executor, ExecutorBuilder, Shutdown};
pub use queue::{Queue, QueueLayer};
pub use rate::{ApiTokens, Cost, Limits, Rate, RateLimit, RateLimitLayer, RateLimiter};
