//! [`KeyedRateLimiter`]: the same limits for each of many keys, such as tenants, hosts or models.
//!
//! From the outside in: [`limiter`] is what users see; [`pinned`] has the guards of keys that are not at rest;
//! [`shards`] locks; [`shard`] decides; [`rows`] is the table of keys;
//! [`replaced`] has those whose limits were replaced; [`tier`] has the limits, and [`cell`] the arithmetic.

mod cell;
mod context;
mod limiter;
mod pinned;
mod replaced;
mod room;
mod rows;
mod shard;
mod shards;
mod tier;

pub use limiter::KeyedRateLimiter;
