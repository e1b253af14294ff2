//! [`KeyedRateLimiter`]: the same limits for each of many keys, such as tenants, hosts or models.
//!
//! From the outside in: [`limiter`] is what users see; [`pinned`] has the guards of keys that are not at rest;
//! [`shards`] locks; [`shard`] decides; [`rows`] is the table of keys;
//! [`migration`] has those that are not in it yet; [`tier`] has the limits, and [`cell`] the arithmetic.

mod cell;
mod context;
mod limiter;
mod migration;
mod pinned;
mod room;
mod rows;
mod shard;
mod shards;
mod tier;

pub use limiter::KeyedRateLimiter;
