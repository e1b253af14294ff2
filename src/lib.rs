//! Tower middleware for **outbound** API calls: it queues them, caps how many run at once, paces requests *and* API
//! tokens, and keeps a record of every call.
//!
//! Providers of metered APIs, of language models above all, limit an account to a number of requests and a number of
//! tokens per minute. A client that sends too fast gets 429s; one that sends too slowly wastes quota. This crate sends
//! as fast as the limits allow, in order or in fair shares, and loses no call.
//!
//! # A first call
//!
//! ```
//! # #[tokio::main(flavor = "current_thread", start_paused = true)]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use http::{Request, Response};
//! use tower_outbound::{Call, Executor, Rate, Shutdown};
//!
//! // A client is any service from http requests to http responses: reqwest's, hyper's, or a function.
//! let client = tower::service_fn(async |_: Request<String>| Ok::<_, std::io::Error>(Response::new("hello")));
//!
//! let executor = Executor::builder()
//!     .concurrency_limit(5)
//!     .requests(Rate::per_minute(500).burst(10))
//!     .tokens(Rate::per_minute(30_000))
//!     .build(client)?;
//! executor.start()?;
//!
//! let request = Request::post("http://localhost/v1/chat").body(String::from("{}"))?;
//! let call = executor.submit(Call::from(request).tokens(1_200)).await?;
//! let event = call.event().clone();
//! assert_eq!(*call.await?.body(), "hello");
//! assert_eq!(event.status().to_string(), "COMPLETED");
//!
//! executor.stop(Shutdown::Graceful).await;
//! # Ok(())
//! # }
//! ```
//!
//! # What is here
//!
//! An [`Executor`] has all layers behind one handle. [`executor::stack`] shows their order, with a picture and a reason
//! for each. From the caller to the client, the layers are:
//!
//! | | |
//! |---|---|
//! | [`Executor`] | [start, submit, stop](executor) |
//! | [`QueueLayer`] | a bounded [queue]; each call that has left it is a task |
//! | [`Schedule`] | [who goes next](schedule): fair shares of tenants, urgent calls first, limits by key; by default, calls begin in order |
//! | [`EventLayer`] | the [record](event) of each call; used twice: around all layers below, and around the client |
//! | [`DeadlineLayer`] | the [instant by which a call has to end](deadline) |
//! | a layer of your own | [`retry`] (feature `http`), a timeout, or any other Tower layer |
//! | [`ConcurrencyLimitLayer`] | a [cap](concurrency) on calls in flight that can be watched and changed |
//! | [`RateLimitLayer`] | [rates](rate) of requests and tokens, any number at once, kept by a [`RateLimiter`] |
//! | [`KeyedRateLimiter`] | the same rates for each of many keys, without the layers |
//! | [`body`], [`provider`] | streamed bodies, tokens used by a call, providers' rate limit headers (feature `http`) |
//! | your client | [`client::Reqwest`] (feature `reqwest`), hyper's, any service, or a closure |
//!
//! With [`rate::redis`] (feature `redis`), many processes share the rates of one limiter through Redis or Valkey.
//!
//! Each layer also works without the others, in any `tower::ServiceBuilder`. Clones of a layer's service share its
//! limits, and an idle clone holds neither a concurrency permit nor a place in the queue.
//!
//! # Order
//!
//! In a stack of your own, put the concurrency limit *outside* the rate limit; the reverse is an easy mistake. A call
//! is then charged to the rates last, just before it is sent. In the reverse order, calls that have been charged would
//! pile up behind a full concurrency limit and be sent as a burst, faster than the rate.
//!
//! # Questions of the first minutes
//!
//! | | |
//! |---|---|
//! | How do I use it with reqwest, or hyper? | [`client::Reqwest`] (feature `reqwest`) is a client; hyper's is one itself |
//! | What happens to a call if I drop its handle? | It runs on. [`CallHandle::cancel`] ends it, and [`CallHandle::cancel_on_drop`] makes the drop do so. In a Tower stack, dropping the response future cancels the call |
//! | And if I drop the executor? | When the last clone is dropped, all calls are cancelled. [`Executor::stop`] finishes them first |
//! | Why does a call wait? | [`waits`](NetworkRequestEvent::waits) of its event, by cause; for all calls, an [observer](event::Observer) |
//! | What if the queue is full? | [`submit`](Executor::submit) waits for a place, [`try_submit`](Executor::try_submit) hands the request back |
//! | How do I stop waiting? | [`timeout`](ExecutorBuilder::timeout); a call that cannot make it is refused at once, and [`retry_after`](Error::retry_after) says until when |
//! | How do I limit nothing, or only tokens? | [`limits`](ExecutorBuilder::limits) with those that you want; without any setting, it is 10 requests per second |
//! | Does a retry pay again? | Yes: a [`layer`](ExecutorBuilder::layer) stands outside the limits |
//! | How do I test my code? | On Tokio's paused clock, which all waits use |
//!
//! The page `docs/cookbook.md` of the repository starts from the program that you want to write: a gateway, a crawler, an SDK's
//! client, a stack of your own. `docs/testing.md` is about tests.
//!
//! # Features
//!
//! | feature | what it adds |
//! |---|---|
//! | `serde` | events and [`Config`](executor::Config) as JSON, or any other format of serde |
//! | `http` | the modules [`body`], [`provider`] and [`retry`] |
//! | `json` | used tokens, estimates and reasons of failures, read from JSON bodies; includes `http` |
//! | `reqwest` | a reqwest client as a service: [`client`]; includes `http` |
//! | `redis` | limits that many processes share, in Redis or Valkey: [`rate::redis`] |
//! | `redis-tls` | TLS connections to Redis or Valkey, with ring as the default provider of cryptography; includes `redis` |
//! | `metrics` | [metrics] of every call, for any exporter of the crate `metrics`, such as Prometheus |
//! | `full` | all features above |
//!
//! No feature is on by default. The oldest supported version of Rust is `rust-version` in `Cargo.toml`.
#![cfg_attr(docsrs, feature(doc_cfg))]

#[cfg(feature = "http")]
#[cfg_attr(docsrs, doc(cfg(feature = "http")))]
pub mod body;
mod budget;
#[cfg(feature = "reqwest")]
#[cfg_attr(docsrs, doc(cfg(feature = "reqwest")))]
pub mod client;
mod clock;
pub mod concurrency;
mod coop;
mod cost;
pub mod deadline;
pub mod error;
pub mod event;
pub mod executor;
#[cfg(feature = "metrics")]
#[cfg_attr(docsrs, doc(cfg(feature = "metrics")))]
pub mod metrics;
mod on_turn;
mod panic;
#[cfg(feature = "http")]
#[cfg_attr(docsrs, doc(cfg(feature = "http")))]
pub mod provider;
pub mod queue;
pub mod rate;
mod redact;
#[cfg(feature = "http")]
#[cfg_attr(docsrs, doc(cfg(feature = "http")))]
pub mod retry;
pub mod schedule;
mod semaphore;
mod sync;
mod tokens;
mod wait_queue;

// The executor and its layers, with the types that most programs name when they use these. All other public items are
// reached through their modules, also the layers of the modules `body`, `provider` and `retry`.
pub use concurrency::{Concurrency, ConcurrencyLimit, ConcurrencyLimitLayer};
pub use deadline::{Deadline, DeadlineLayer, DeadlineService};
pub use error::{BoxError, Error, InvalidConfig};
pub use event::{EventHandle, EventLayer, EventService, Events, NetworkRequestEvent, RequestId, RequestStatus};
pub use executor::{Call, CallHandle, Executor, ExecutorBuilder, Monitor, Shutdown, StopReport, TrySubmitError};
pub use queue::{Queue, QueueLayer};
pub use rate::{
    ApiTokens, ApiTokensUsed, Cost, KeyedRateLimiter, Limits, Rate, RateLimit, RateLimitLayer, RateLimiter, TokenUsage,
};
pub use schedule::Schedule;

/// Compiles and runs the README's examples as tests.
#[cfg(all(doctest, feature = "full"))]
#[doc = include_str!("../README.md")]
struct Readme;

/// Compiles and runs the page's examples as tests.
#[cfg(doctest)]
#[doc = include_str!("../docs/schedule.md")]
struct SchedulePage;

/// Compiles and runs the page's examples as tests.
#[cfg(doctest)]
#[doc = include_str!("../docs/cookbook.md")]
struct CookbookPage;
