//! Makes the body of a response a part of the call: streamed to the caller, or collected up to a size.
//!
//! In Tower, a call ends when the head of its response has arrived. The body arrives later, when the permit of the call
//! has already been released and its event is closed. The layers of this module let the call last until its body has
//! ended:
//!
//! | layers | the caller has the response when | the call ends when |
//! |---|---|---|
//! | none | the head has arrived | the head has arrived |
//! | [`CollectLayer`] | the whole body is in memory | the whole body is in memory |
//! | [`BodyLayer`] and [`StreamLayer`] | the head has arrived | the body was read to its end, failed, or was dropped |
//!
//! [`ExecutorBuilder::build_streaming`](crate::ExecutorBuilder::build_streaming) builds an executor that streams bodies
//! as [`BodyLayer`] and [`StreamLayer`] do, without adding these layers. Where the layers of this module are placed
//! among the others around the client is shown in [`provider`](crate::provider#order).
//!
//! # Streams
//!
//! A streamed call works as follows:
//! - The caller has the response, with a [`StreamBody`], as soon as the head of the response has arrived.
//! - The call goes on until that body has ended. Until then the permit of the call is held and its event is open, and a
//!   graceful stop of the executor waits for the call.
//! - A deadline, a cancellation or an immediate stop of the executor ends the call. The next frame of the body is then
//!   the error [`Cancelled`](crate::error::Cancelled).
//! - A body that is dropped before its end cancels the call. A body that fails makes the call fail with
//!   [`BodyFailed`](crate::error::BodyFailed).
//! - The event records the number of bytes of the body, and the times at which the first and the last byte arrived.
//!
//! A streamed response that is neither read nor dropped holds the permit of its call. A
//! [timeout](crate::ExecutorBuilder::timeout) bounds that time.
//!
//! # Answers
//!
//! A successful status (2xx) does not tell that there is an answer. Around a client whose bodies are collected,
//! [`CheckLayer`] makes an error of a response whose body is none: an error document, a page, a stream without its end
//! (feature `json`).
//!
//! # Failures
//!
//! Only a successful response (2xx) is streamed. Any other response is returned through all layers, so that a retry
//! policy can look at it. Its head tells what has failed and when to retry, so the call does not depend on its body:
//! the body is read within the call for at most 15 s ([`failure_timeout`](BodyLayer::failure_timeout)), up to 64 KiB, or
//! up to the limit of a [`CollectLayer`]. What arrives later, or beyond that size, is dropped. A body that breaks off
//! counts as ended. If the time or an error has cut off a body, a note in the event tells so.
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

#[cfg(feature = "json")]
mod answer;
#[cfg(feature = "json")]
#[cfg_attr(docsrs, doc(cfg(feature = "json")))]
pub mod check;
pub mod collect;
mod early_response;
#[cfg(feature = "json")]
mod events;
mod failure;
mod layer;
#[cfg(feature = "json")]
mod outline;
mod read;
#[cfg(feature = "json")]
mod reported_error;
pub mod stream;
mod stream_body;
mod whole;

#[cfg(feature = "json")]
#[cfg_attr(docsrs, doc(cfg(feature = "json")))]
pub use check::{Check, CheckLayer};
pub use collect::{Collect, CollectLayer};
pub use layer::{BodyLayer, BodyService, ResponseFuture};
pub use stream::{StreamLayer, StreamService};
pub use stream_body::StreamBody;
pub use whole::WholeBody;

pub(crate) use early_response::{is_delivered, open_early_response};
#[cfg(feature = "json")]
pub(crate) use events::{EventReader, is_event_stream};
