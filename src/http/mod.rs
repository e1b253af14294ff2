//! What metered APIs over http need.
mod body;
mod collect;
mod feedback;
#[cfg(feature = "json")]
mod report;
#[cfg(feature = "reqwest")]
mod reqwest;
mod stream;
#[cfg(feature = "json")]
mod usage;
pub use body::StreamBody;
pub use collect::{Collect, CollectFuture, CollectLayer};
pub use feedback::{
    Feedback, FeedbackFuture, FeedbackLayer, Listens, ParseProviderError, Provider, Reset, Unit, Window,
};
#[cfg(feature = "reqwest")]
pub use reqwest::{Reqwest, ReqwestFuture};
pub(crate) use stream::offer;
pub use stream::{Bodies, BodyFuture, BodyLayer, StreamFuture, StreamLayer, Streams};
#[cfg(feature = "json")]
pub use usage::{MeteredBody, Usage, UsageFuture, UsageLayer};
