//! What a metered API over http needs: clients, bodies, usage, providers' headers, retries.
//!
//! All of it is made of layers, and none is on unless it is used. Around the client, from the wire outwards:
//!
//! ```text
//! your limits          RateLimitLayer::settle(ByUsage): what was charged is corrected by what was used
//!   EventLayer::calling
//!     BodyLayer        a call ends when its body does          } one of the two,
//!     CollectLayer     or: the body as a whole, with a bound   } or neither
//!       FeedbackLayer  429s pause everybody; what is left, and the limits, are made known to the limiter
//!         UsageLayer   what the response says was used
//!           Reqwest    or hyper's client, as it is
//! ```
//!
//! and around the limits, with [`ExecutorBuilder::layer`](crate::ExecutorBuilder::layer): [`RetryPolicy`] in tower's
//! `RetryLayer`. [Deadlines](crate::deadline) are there without any of this.
//!
//! | | |
//! |---|---|
//! | [`Reqwest`] | a reqwest client as a service of http requests (feature `reqwest`) |
//! | [`BodyLayer`], [`StreamLayer`] | [streams](#streams) |
//! | [`CollectLayer`] | the whole body inside the call, up to a size, and recorded if asked |
//! | [`UsageLayer`] | how many tokens were used, found in the body as it passes (feature `json`) |
//! | [`CharacterEstimate`], [`AverageEstimate`] | how many tokens a request will take (feature `json`) |
//! | [`FeedbackLayer`], [`Provider`] | what a provider's headers say, in nine dialects |
//! | [`RetryPolicy`] | which calls are made again, and when |
//!
//! # StreamService
//!
//! A call ends with its response's head, as in all of Tower; the body comes after, and holds nothing. With
//! [`Executor::builder().build_streaming(client)`](crate::ExecutorBuilder::build_streaming), or with a [`BodyLayer`] around
//! the client and a [`StreamLayer`] on top of a stack of one's own, the caller has the response as soon as there is a
//! head, and the *call* goes on until the body was read to its end, failed, or was dropped. Until then its permit is held
//! and its event open, a graceful stop waits for it, and a deadline, a cancel or an immediate stop breaks the body off.
//! The event tells the time to the first byte and to the last.
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # use http_body_util::{BodyExt, Full};
//! # use tower_outbound::Executor;
//! # let client = tower::service_fn(async |_: http::Request<String>| {
//! #     Ok::<_, tower::BoxError>(http::Response::new(Full::new(bytes::Bytes::from("word by word"))))
//! # });
//! let executor = Executor::builder().concurrency_limit(5).build_streaming(client)?;
//! executor.start()?;
//!
//! let call = executor.submit(http::Request::new(String::from("{}"))).await?;
//! let event = call.event().clone();
//! let mut body = call.await?.into_body();
//! while let Some(frame) = body.frame().await {
//!     println!("{:?}", frame.map_err(|error| error.to_string())?);
//! }
//! assert_eq!(event.finished().await.response_bytes, Some(12));
//! # Ok(())
//! # }
//! ```

pub mod collect;
pub mod stream;
mod stream_body;
mod whole;

pub use collect::{Collect, CollectLayer};
pub use stream::{BodyLayer, BodyService, StreamLayer, StreamService};
pub use stream_body::StreamBody;
pub use whole::WholeBody;

pub(crate) use stream::{is_delivered, open_early_response};
