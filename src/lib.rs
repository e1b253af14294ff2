//! Tower middleware for **outbound** API calls: it queues them, caps how many run at once, paces requests *and* API
//! tokens, and keeps a record of every call.
//!
//! Providers of metered APIs, of language models above all, give an account so many requests and so many tokens a
//! minute. Send too fast, and calls come back as 429s; too slowly, and quota is wasted. This crate sends exactly as
//! fast as allowed, in order, and loses nothing:
//!
//! ```text
//!   Executor::submit                  opens the event: PENDING, then QUEUED
//!     QueueLayer                      bounded, first in first out; its workers drive the calls
//!       EventLayer::processing()      PROCESSING on the way in; COMPLETED | FAILED | CANCELLED on the way out
//!         DeadlineLayer               ends a call in time; refuses one that cannot make it
//!         (your layer: retry, timeout, …)
//!           ConcurrencyLimitLayer     at most n in flight
//!             RateLimitLayer          requests and tokens, both or neither
//!               EventLayer::calling() CALLING on the way in; what came back on the way out
//!                 your client         reqwest, hyper, a closure
//! ```
//!
//! # A first call
//!
//! ```
//! # #[tokio::main(flavor = "current_thread", start_paused = true)]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use http::{Request, Response};
//! use tower_outbound::{Call, Executor, Rate, Shutdown};
//!
//! // Any service from http requests to http responses is a client.
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
//! | | |
//! |---|---|
//! | [`Executor`] | the whole stack behind one handle: [start, submit, stop](executor) |
//! | [`QueueLayer`] | a bounded [queue] whose workers drive the calls |
//! | [`ConcurrencyLimitLayer`] | a cap on calls in flight that can be watched and changed: [`concurrency`] |
//! | [`RateLimitLayer`], [`RateLimiter`] | [rates](rate) of requests and tokens, any number at once |
//! | [`SharedRateLimiter`](rate::redis::SharedRateLimiter) | the same for [many processes](rate::redis) (feature `redis`) |
//! | [`EventLayer`], [`EventHandle`] | the [record](event) of each call |
//! | [`DeadlineLayer`], [`Deadline`] | [until when](deadline) a call has to be over |
//! | [`body`], [`provider`], [`retry`], [`client`] | what metered APIs need: streams, usage, providers' headers, retries (feature `http`) |
//!
//! Each layer works alone, in any `tower::ServiceBuilder`. Clones of a service share its limits and hold nothing while
//! they are idle.
//!
//! # Order
//!
//! The order of the layers is written once, in [`executor::stack`], with the reason for each place. The one that is
//! easily got wrong: the concurrency limit stands *outside* the rate limit. The budget is taken last, next to the wire;
//! the other way round, calls that have paid would pile up behind a full limit, and leave as a burst.
//!
//! # Features
//!
//! | feature | what it adds |
//! |---|---|
//! | `serde` | events and [`Config`](executor::Config) as JSON, or any other format of serde |
//! | `http` | bodies, providers' headers, retries: the modules [`body`], [`provider`] and [`retry`] |
//! | `json` | what was used, what is asked for and why it failed, as JSON bodies tell it; includes `http` |
//! | `reqwest` | a reqwest client as a service; includes `http` |
//! | `redis` | limits that many processes share, in Redis or Valkey: [`rate::redis`] |
//! | `redis-tls` | the same over TLS; includes `redis` |
//! | `full` | all of them |
//!
//! No feature is on by default. The oldest Rust that works is named in `Cargo.toml`.
#![cfg_attr(docsrs, feature(doc_cfg))]

#[cfg(feature = "http")]
#[cfg_attr(docsrs, doc(cfg(feature = "http")))]
pub mod body;
#[cfg(feature = "reqwest")]
#[cfg_attr(docsrs, doc(cfg(feature = "reqwest")))]
pub mod client;
mod clock;
pub mod concurrency;
pub mod deadline;
pub mod error;
pub mod event;
pub mod executor;
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
mod semaphore;
mod sync;
mod tokens;
mod wait_queue;

pub use concurrency::{Concurrency, ConcurrencyLimit, ConcurrencyLimitLayer};
pub use deadline::{Deadline, DeadlineLayer};
pub use error::{BoxError, Error};
pub use event::{EventHandle, EventLayer, NetworkRequestEvent, RequestId, RequestStatus};
pub use executor::{Call, CallHandle, Executor, ExecutorBuilder, Shutdown};
pub use queue::{Queue, QueueLayer};
pub use rate::{ApiTokens, ApiTokensUsed, Cost, Limiter, Limits, Rate, RateLimit, RateLimitLayer, RateLimiter};

/// The README's examples are tests.
#[cfg(all(doctest, feature = "full"))]
#[doc = include_str!("../README.md")]
struct Readme;
