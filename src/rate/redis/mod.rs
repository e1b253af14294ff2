//! One quota for many processes: limits that are kept in Redis or Valkey.
//!
//! A provider counts the calls of an account. Processes that share an account also have to share its limits: otherwise
//! each of them sends as much as the account may send in total. A [`RateLimiter`](crate::RateLimiter) that
//! [`connect`] has built keeps its buckets on a Redis or Valkey server:
//!
//! ```no_run
//! # async fn run() -> Result<(), Box<dyn std::error::Error>> {
//! # let client = tower::service_fn(async |_: http::Request<String>| {
//! #     Ok::<_, tower::BoxError>(http::Response::new(""))
//! # });
//! use tower_outbound::{Executor, Limits, Rate, rate::redis};
//!
//! let limits = Limits::new().requests(Rate::per_minute(500).burst(10)).tokens(Rate::per_minute(30_000));
//! let limiter = redis::connect("redis://127.0.0.1/", "openai:gpt-5", limits)?;
//! let executor = Executor::builder().limiter(limiter).build(client)?;
//! # Ok(())
//! # }
//! ```
//!
//! A single process does not need a shared limiter: one that [`RateLimiter::new`](crate::RateLimiter::new) has built
//! costs no round trip, and can decide at once whether a call is admitted.
//!
//! In these docs a *member* is a process (more exactly, a limiter and its clones) that takes part in a
//! quota, and the *store* is the Redis or Valkey server.
//!
//! # Guarantees
//!
//! - **Exact.** By the server's clock, all members together admit at most `burst + rate x T` in any window of length T.
//!   Each call is admitted at the time that was reserved for it, or up to 5 ms later; a call that is later than that
//!   needs a new reservation. By the wall clock, late timers can add what the rates bring in 5 ms. So can
//!   what a process reads the server's clock wrongly by: at most half of the difference between the times that its quickest
//!   request and its quickest reply take. The delay of the network to the provider is not covered: leave some headroom if
//!   the provider is strict.
//! - **All or nothing, and in order.** A call is charged to all of its buckets at the same time. No member overtakes a
//!   reservation of another, and a call with a large cost is not starved by small ones.
//! - **Fair.** Members that have more calls than the limits allow get equal shares, however many callers each member
//!   has, and however far it is from the server. Members that have less demand, are idle or have died take nothing from
//!   them.
//! - **Nothing far ahead.** A call that has to wait for longer than [`max_ahead`](Builder::max_ahead) holds its place at
//!   the head of all members, but no reservation. So changed limits, a forgiven debt, and a call before it that gives up
//!   act at once; a member that does not hear of them from the server asks again within a second.
//! - **Caps, days and months.** Rates that [refuse](crate::Rate::refuse) calls refuse those of all members, in the same
//!   round trip: nothing is taken from any other budget, and the calls behind are not held up.
//!   [Days and months](crate::Rate::utc_day) begin by the server's clock, once for all members. If that clock is set back
//!   over the beginning of a day, the day does not begin again.
//! - **Strict rates.** A reservation of a [strict](crate::Rate::strict) rate may still be used up to 5 ms late, so each
//!   wait for the rate is up to 5 ms longer: by the server's clock, two calls are never closer than the rate says. A rate
//!   whose burst is above what it brings in 5 ms loses no throughput.
//! - **Budgets by name.** All [budgets](crate::rate::Budget) that limits can have are shared. A member whose release keeps
//!   another version of the state in Redis cannot take part: its calls fail with
//!   [`StoreUnavailable`](crate::error::StoreUnavailable), which names both versions, unless it is
//!   [`Open`](OnStoreLoss::Open).
//! - **One round trip for all waiting calls.** Calls that arrive while a round trip is in flight are sent together in
//!   the next one.
//! - **Shared control.** A [pause](crate::RateLimiter::pause_for) holds all members at once, and gives back the
//!   reservations that fall into it. [Limits that one member sets](crate::RateLimiter::set_limits) apply to all members.
//!   An estimate is [settled](crate::RateLimiter::settle) for all members, and a refund never lets more than
//!   `burst + rate x T` of true usage through. A member that starts with other limits than the members before it
//!   replaces the limits in force: the last one to start wins.
//!
//! # When the store is lost
//!
//! The store is lost to a member after three round trips in a row that failed or took longer than the
//! [timeout](Builder::timeout). Calls still use the reservations that the store has already made. What
//! the member does with further calls is set by [`OnStoreLoss`]. The member probes the store with one request at a time
//! until the store replies. The wait before the first probe is 25 to 50 ms. This wait doubles after each failed probe,
//! until it is 0.5 to 1 s. No call waits beyond its deadline. No error outlives the probe after its cause: neither a wrong
//! password nor a missing permission nor a name that cannot be resolved.
//!
//! A loss is logged at the level WARN when it begins, and every 30 s while it lasts, with its cause and how long it has
//! lasted: a member that admits calls by itself otherwise looks as if nothing was wrong. The cause is a
//! [`StoreProblem`](crate::error::StoreProblem), which is also in
//! [`StoreUnavailable`](crate::error::StoreUnavailable) and in
//! [`RateLimiter::store_status`](crate::RateLimiter::store_status).
//! [`RateLimiter::check_store`](crate::RateLimiter::check_store) finds it when the program starts.
//!
//! | what happens | what follows | above the limits |
//! |---|---|---|
//! | the server is down at the start, killed, frozen, out of memory, read-only or cut off, for all members | [`LocalShare`](OnStoreLoss::LocalShare): each member admits its share of the rates, without a burst, starting [`max_ahead`](Builder::max_ahead) after the loss | nothing, if the number of members is right |
//! | | and of rates that refuse calls or count by the calendar, its share of what was left by its last reply; what exceeds it is refused or waits | for these rates, what others were given since that reply, at most 5 s before the loss |
//! | | [`Closed`](OnStoreLoss::Closed): no call is admitted until the store is back | nothing |
//! | | [`Open`](OnStoreLoss::Open): every call is admitted | no bound |
//! | the server is cut off from some members only | `LocalShare`: these members admit their shares | their shares, while it lasts |
//! | the store is back after a loss | what local shares admitted is charged; if no member had the store, the buckets begin empty, 1.5 s later, when all members have come back | nothing |
//! | the server is restarted empty, the key is deleted or evicted, or the server is replaced by an empty one | the buckets begin empty, `max_ahead` later, because some member remembers the lost state | nothing; one burst, if no remaining member remembers it |
//! | the same, for days and months | what was left goes on, by the member that knows of the least; without such a member, they begin anew | what members admit before that member, if it is idle, sends its next request (5 s) |
//! | the server is rolled back to an old snapshot, or replaced by a replica that lagged behind | the buckets begin empty, `max_ahead` later | nothing |
//! | failover to another server | the member reconnects (with sentinels, to the server that they name); what follows depends on whether the new server has the state, an old state or none, as in the rows before | nothing |
//! | a split brain: two servers accept writes, and some members reach only one of them and others only the other | each server admits the whole rate, also under `Closed` | a second rate and a second burst, while it lasts |
//! | the same, and the servers have `min-replicas-to-write 1`, which holds for scripts since Redis 7.0 | the server without its replica refuses writes, and counts as lost | as for members that are cut off; nothing under `Closed`, except for what the server admitted before it noticed (`min-replicas-max-lag`) |
//! | the script is flushed, or connections are killed | the member loads the script and reconnects, within the same round trip or the next | nothing |
//! | the server's clock is set back | members are admitted as if no time had passed | nothing |
//! | the server's clock is set forward | members are admitted as if that time had passed | one burst, and what the rates bring in the 0.25 s for which members reserve ahead |
//! | a process is killed | its reservations are lost, and it is not counted as a member after 15 s | nothing |
//! | a process does not run for a while | its reservations that are more than 5 ms late are given back and made again; their share of the quota may be lost | nothing |
//!
//! # Size and speed
//!
//! Each quota is one key of about 450 bytes, plus 60 for each member, in one hash slot. The key expires at least 30 s
//! after the buckets are full again. A round trip costs the server 20 to 40 µs for the first call in it, and about 1 µs
//! for each further call. On two cores that the server and the client share:
//!
//! | | |
//! |---|---|
//! | acquires per second over one connection, with 64 waiting at once | 100,000 |
//! | acquires per second over one connection, with 1,000 waiting at once | 350,000 |
//! | time of one acquire, without others at the same time, compared with a `PING` | about 1.5 times as long |
//! | round trips per second of each of 4 members that wait for the limits | about 90 |
//! | round trips of an idle member | one every 5 s |
//!
//! # Requirements for the server
//!
//! - Redis 6.2 or newer, or Valkey, with RESP3 and Lua scripts. Some proxies lack one of these. Tested with Redis 6.2, 7.0
//!   and 8.2, and with Valkey 9.1.
//! - `maxmemory-policy noeviction`, or a `volatile-` policy with enough memory: otherwise the server may evict the key
//!   of a quota.
//! - Neither replication nor persistence is needed: if the state is lost, members admit no calls for
//!   [`max_ahead`](Builder::max_ahead), and then go on with empty buckets. For caps of days and months that must hold
//!   although all members have ended meanwhile, the server needs persistence.
//! - A system clock that is adjusted gradually (slewed), not stepped.
//! - With access control, the commands `EVALSHA`, `SCRIPT LOAD`, `GET`, `SET`, `TIME`, `PUBLISH`, `SUBSCRIBE` and
//!   `UNSUBSCRIBE` on keys and channels that begin with `{tower-outbound:`, and `SELECT` if the URL has the number of a
//!   database: `ACL SETUSER app on >password ~{tower-outbound:* resetchannels &{tower-outbound:* +evalsha +script|load
//!   +get +set +time +publish +subscribe +unsubscribe +select`.
//! - For TLS, a `rediss://` URL and the feature `redis-tls`, which uses ring unless the program has installed another
//!   provider of cryptography for rustls. It trusts the roots of the operating system, or
//!   [those that were set](Builder::tls_root_certificates).
//! - For sentinels, [`Builder::sentinels`]. For a cluster, [`Builder::connection`].
//!
//! # Connections
//!
//! The limiters of a runtime that name the same server hold one connection, however many there are. It is made when the
//! first of them needs it, replaced when it is lost, and closed when the last of them is dropped. A limiter that outlives
//! the runtime of its connection gets another one in the runtime in which it is used next.
//!
//! A connection may take 10 s to be made, so a server that is far is found. A request that waits for it meanwhile fails
//! after the timeout, and the connection is made all the same. Then a round trip may take at least twice as long as is
//! usual for this server.
//!
//! Members trust each other: every process that can write the key can lift the limits.

mod adjustments;
mod amounts;
mod builder;
mod channels;
mod coordinator;
mod driver;
mod endpoint;
#[cfg(test)]
mod equality;
mod fallback;
mod goodbye;
mod link;
mod loss;
mod problem;
mod quota_config;
mod round_trips;
mod script;
mod shared;
mod store;
#[cfg(test)]
mod tests;
#[cfg(feature = "redis-tls")]
mod tls;
#[cfg(test)]
mod virtual_schedule;
mod waiters;
mod wire;

pub use builder::{Builder, connect};
pub use loss::OnStoreLoss;
pub use shared::StoreStatus;
pub(super) use shared::{SharedAdmission, SharedLimiter};
