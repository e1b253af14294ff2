//! One quota for many processes: limits that live in Redis or Valkey.
//!
//! A provider counts per account. When one process is not enough any more, all that share the account have to share its
//! limits, or each of them sends as if it were alone. A [`SharedRateLimiter`] keeps the buckets on a server that you have
//! already; everything else stays as it is, since layers and executors take it like a
//! [`RateLimiter`](crate::RateLimiter):
//!
//! ```no_run
//! # async fn run() -> Result<(), Box<dyn std::error::Error>> {
//! # let client = tower::service_fn(async |_: http::Request<String>| Ok::<_, tower::BoxError>(http::Response::new("")));
//! use tower_outbound::{Executor, Limits, Rate, rate::redis::SharedRateLimiter};
//!
//! let limits = Limits::new().requests(Rate::per_minute(500).burst(10)).tokens(Rate::per_minute(30_000));
//! let limiter = SharedRateLimiter::connect("redis://127.0.0.1/", "openai:gpt-5", limits)?;
//! let executor = Executor::builder().limiter(limiter).build(client)?;
//! # Ok(())
//! # }
//! ```
//!
//! One process alone needs none of this: a [`RateLimiter`](crate::RateLimiter) costs no round trip, and can say at once
//! whether a call may go.
//!
//! # What is promised
//!
//! - **Exact.** On the server's clock, all members together admit at most `burst + rate x T` in any window of length T.
//!   Each call goes at the moment that was reserved for it, or asks again: timers add 5 ms of the rate at most, and what
//!   the network adds on the way to the provider is not ours. (Leave that much headroom if the provider is strict.)
//! - **All or nothing, and in order.** All buckets are charged at one instant. What one member has reserved is not overtaken
//!   by another; no heavy call is starved.
//! - **Fair.** Members with more to do than the limits allow get equal shares, whatever the number of their callers.
//! - **One round trip for all who wait.** Whoever comes while one is on its way goes along with the next.
//! - **Together.** A [pause](SharedRateLimiter::pause_for) holds all members at once, and gives back what they have reserved
//!   for its time; [limits that one sets](SharedRateLimiter::set_limits) hold for all; estimates are
//!   [settled](SharedRateLimiter::settle) for all, and never let more through than `burst + rate x T` of true usage.
//!   A member that is configured with other limits than the others brings them along: the last one to start wins.
//!
//! # When the store is lost
//!
//! It is lost to a member after three round trips in a row that failed, or took longer than the
//! [timeout](Builder::timeout). What was reserved goes; then [`OnStoreLoss`] says what follows. One probe at a time, once
//! a second at most, finds it again. No call waits longer than its deadline, and one line in the log tells of each change;
//! [`SharedRateLimiter::store`] counts.
//!
//! | what happens | what follows | above the limits |
//! |---|---|---|
//! | away at the start, killed, frozen, out of memory, read-only, cut off: for all members | [`LocalShare`](OnStoreLoss::LocalShare): each goes on with its share of the rates and no burst, a [`max_ahead`](Builder::max_ahead) after the loss | nothing, if the number of members is right |
//! | | [`Closed`](OnStoreLoss::Closed): nobody goes until it is back | nothing |
//! | | [`Open`](OnStoreLoss::Open): everybody goes | no bound |
//! | the same, for some of them | `LocalShare`: they go on with their shares | their shares, as long as it lasts |
//! | back from that | shares are accounted for; if all were on their own, the buckets begin empty, and 1.5 s later, when all have come back | nothing |
//! | restarted empty, key deleted or evicted, failed over to an empty node | begins empty, and `max_ahead` later, because some member remembers it | nothing; a burst, if nobody is left who remembers |
//! | rolled back to an old snapshot, or to a replica that lagged | the same | nothing |
//! | failed over | the connection is made anew; as above, by what the new server knows | nothing |
//! | script flushed, connections killed | it is loaded and they are made again, within the same call or the next | nothing |
//! | the server's clock goes back | no time has passed | nothing |
//! | the server's clock goes forward | time has passed | one burst |
//! | a process is killed | what it had reserved is lost; it is no member any more after 15 s | nothing |
//! | a process stands still | reservations whose moment has passed by 5 ms are given back, and made anew | nothing |
//!
//! # Size
//!
//! One key for each quota, of about 450 bytes and 60 more for each member, in one hash slot; it goes when nobody has used
//! it for as long as it takes to fill the buckets, and a minute. A round trip costs the server 20 to 40 µs for one call,
//! about 1 µs for each further one. Two cores, server and client on them:
//!
//! | | |
//! |---|---|
//! | acquires a second over one connection, 64 at once | 100,000 |
//! | the same, 1,000 waiting | 350,000 |
//! | one at a time, compared with a `PING` | about 1.5 times |
//! | round trips a second of a member that waits for its limits, of 4 | about 90 |
//! | of an idle one | one in 5 s |
//!
//! # What to set on the server
//!
//! Redis 6.2 or newer, or Valkey; RESP3 and Lua scripts, which all but a few proxies know. `maxmemory-policy noeviction`
//! (or a `volatile-` one with room), or limits may be evicted. Replication and persistence are not needed: lost state costs
//! `max_ahead` of waiting. A clock that is slewed, not stepped. With access control, allow `EVALSHA`, `SCRIPT LOAD`, `GET`,
//! `SET`, `TIME`, `PUBLISH` and `SUBSCRIBE` on keys and channels that begin with `{tower-outbound:`. For TLS, `rediss://`
//! and the feature `redis-tls`. For a cluster or sentinels, [`Builder::connection`].
//!
//! Whoever can write the key can lift the limits: members trust each other.

mod adjustments;
mod builder;
mod coordinator;
mod driver;
#[cfg(test)]
mod equality;
mod fallback;
mod loss;
mod quota_config;
mod shared;
mod store;
#[cfg(test)]
mod tests;
mod virtual_schedule;
mod waiters;
mod wire;

pub use builder::Builder;
pub use loss::OnStoreLoss;
pub(super) use shared::SharedAdmission;
pub use shared::{SharedRateLimiter, StoreStatus};
