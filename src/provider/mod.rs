//! Providers of metered APIs: their rate-limit headers, the tokens their responses report, and estimates of tokens.
//!
//! A provider reports in its responses what is left of a limit, when to retry, and how many tokens a call used. The
//! items of this module read these reports and pass them on to the [limiter](crate::rate):
//!
//! | | |
//! |---|---|
//! | [`Provider::rate_limit_info`] | reads the headers of nine dialects as a [`RateLimitInfo`] |
//! | [`FeedbackLayer`] | applies the headers to a limiter: pauses it, lowers its buckets, adopts or finds its limits |
//! | [`UsageLayer`] | finds the number of tokens used in the body of a response (feature `json`) |
//! | [`CharacterEstimate`], [`AverageEstimate`] | [estimate](#estimates) the tokens of a request (feature `json`) |
//!
//! # Order
//!
//! The layers of this module are only in a stack if they are added to it. A stack with all layers for providers, from
//! the outermost one to the client, is:
//!
//! ```text
//! RetryLayer(RetryPolicy)      above the limits: every attempt takes a permit and is charged to the rate limit
//!   ConcurrencyLimitLayer
//!     RateLimitLayer           with .settle(ByUsage): replaces the estimated charge by the tokens that were used
//!       EventLayer::calling
//!         CheckLayer           fails the call if a collected body is no answer
//!         BodyLayer            streams the body, and ends the call with it     } one of the two,
//!         CollectLayer         or collects the body within the call            } or neither
//!           FeedbackLayer      applies the rate-limit headers to the limiter
//!             UsageLayer       finds the tokens that were used
//!               Reqwest        or another client
//! ```
//!
//! With an [`Executor`](crate::Executor), the layers that this stack has below `EventLayer::calling` (from
//! [`CheckLayer`](crate::body::CheckLayer) to `UsageLayer`) are put around the client that is passed to
//! [`build`](crate::ExecutorBuilder::build). [`build_streaming`](crate::ExecutorBuilder::build_streaming) adds the
//! `BodyLayer` itself. A [`RetryPolicy`](crate::retry::RetryPolicy) in tower's `RetryLayer` is added with
//! [`ExecutorBuilder::layer`](crate::ExecutorBuilder::layer). `UsageLayer` must be *inside* `BodyLayer` or
//! `CollectLayer`: otherwise the call ends, and its estimated charge is settled, before the body was read.
//! [Deadlines](crate::deadline) do not need any of these layers.
//!
//! # Headers
//!
//! Headers are read leniently: a header that is absent, malformed or `-1` (for an unknown number) counts as not sent.
//! The name of the first malformed header of a response, never its value, is logged with `tracing` at level DEBUG,
//! target `tower_outbound`. If a header is sent twice, the first one counts. Times longer than 366 days count as 366
//! days.
//!
//! # Estimates
//!
//! The tokens of a call are charged to the rate limit before the call, when their number is not known yet, so they are
//! estimated. An estimate is passed to [`ExecutorBuilder::cost`](crate::ExecutorBuilder::cost) or
//! [`RateLimitLayer::with_cost`](crate::RateLimitLayer::with_cost). With [`ByUsage`](crate::rate::ByUsage), the charge
//! is corrected when the call ends, to the number of tokens that [`UsageLayer`] has found.
//!
//! A request with the extension [`ApiTokens`](crate::ApiTokens) costs the number of tokens that the extension declares:
//! nothing is estimated. Otherwise the estimate counts the characters of the prompt in the JSON body, in the formats of
//! OpenAI, Anthropic, Gemini and Mistral, and takes four characters as one token. Role names, images and other files
//! are not counted. For a body that is not JSON, or larger than 8 MiB, four bytes count as one token. A body that is
//! [not in memory](crate::body::WholeBody) counts as an empty prompt.

mod adapt;
mod dialect;
#[cfg(feature = "json")]
mod estimate;
pub mod feedback;
mod headers;
mod info;
mod key;
#[cfg(feature = "json")]
pub mod usage;
#[cfg(feature = "json")]
mod usage_report;

pub use dialect::{ParseProviderError, Provider};
#[cfg(feature = "json")]
pub use estimate::{AverageEstimate, CharacterEstimate};
pub use feedback::{Feedback, FeedbackLayer};
#[cfg(feature = "json")]
pub(crate) use headers::parse_go_duration;
pub use info::{RateLimitInfo, Reset, Unit, Window};
pub use key::InvalidKeyError;
#[cfg(feature = "json")]
pub use usage::{MeteredBody, Usage, UsageLayer};
