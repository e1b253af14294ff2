//! What metered APIs over http need.
mod body;
mod collect;
#[cfg(feature = "json")]
mod estimate;
mod failure;
mod feedback;
#[cfg(feature = "json")]
mod report;
#[cfg(feature = "reqwest")]
mod reqwest;
mod retry;
mod stream;
#[cfg(feature = "json")]
mod usage;
mod verdict;
mod whole;
pub use body::StreamBody;
pub use collect::{Collect, CollectFuture, CollectLayer};
#[cfg(feature = "json")]
pub use estimate::{AverageEstimate, CharacterEstimate};
pub use failure::never_sent;
pub use feedback::{
    Feedback, FeedbackFuture, FeedbackLayer, Listens, ParseProviderError, Provider, Reset, Unit, Window,
};
#[cfg(feature = "reqwest")]
pub use reqwest::{Reqwest, ReqwestFuture};
pub use retry::{RetryPolicy, Wait};
pub(crate) use stream::offer;
pub use stream::{Bodies, BodyFuture, BodyLayer, StreamFuture, StreamLayer, Streams};
#[cfg(feature = "json")]
pub use usage::{MeteredBody, Usage, UsageFuture, UsageLayer};
pub use whole::WholeBody;
