//! Providers of metered APIs: their rate-limit headers, the tokens their responses report, and estimates of tokens.
//!
//! A provider reports in its responses what is left of a limit, when to retry, and how many tokens a call used. The
//! items of this module read that and pass it on to the [limiter](crate::rate):
//!
//! | | |
//! |---|---|
//! | [`Provider::rate_limit_info`] | reads the headers of nine dialects as a [`RateLimitInfo`] |
//! | [`FeedbackLayer`] | applies them to a limiter: pauses it, lowers its buckets, adopts or finds its limits |
//! | [`UsageLayer`] | finds the number of tokens used in the body of a response (feature `json`) |
//! | [`CharacterEstimate`], [`AverageEstimate`] | [estimate](#estimates) the tokens of a request (feature `json`) |
//!
//! # Order
//!
//! None of these layers is part of the stack unless it is added. From the outermost to the client:
//!
//! ```text
//! RetryLayer(RetryPolicy)      around the limits: every attempt takes its own permit and pays its own rate
//!   ConcurrencyLimitLayer
//!     RateLimitLayer           with .settle(ByUsage): replaces the estimated charge by the tokens that were used
//!       EventLayer::calling
//!         BodyLayer            streams the body, and ends the call with it     } one of the two,
//!         CollectLayer         or collects the body within the call            } or neither
//!           FeedbackLayer      applies the rate-limit headers to the limiter
//!             UsageLayer       finds the tokens that were used
//!               Reqwest        or another client
//! ```
//!
//! With an [`Executor`](crate::Executor), the layers below `EventLayer::calling` are put around the client that is
//! given to [`build`](crate::ExecutorBuilder::build); [`build_streaming`](crate::ExecutorBuilder::build_streaming) adds
//! the `BodyLayer` itself. A [`RetryPolicy`](crate::retry::RetryPolicy) in tower's `RetryLayer` is added with
//! [`ExecutorBuilder::layer`](crate::ExecutorBuilder::layer). `UsageLayer` must be *inside* `BodyLayer` or
//! `CollectLayer`: otherwise the call ends, and is settled, before the body was read. [Deadlines](crate::deadline) need
//! none of these layers.
//!
//! # Headers
//!
//! Headers are read leniently and applied carefully. A header that is absent, malformed or `-1` (for an unknown number)
//! counts as not sent. The name of the first malformed header of a response, never its value, is logged with `tracing`
//! at level DEBUG, target `tower_outbound`. Of a header that is sent twice, the first one counts. Times longer than 366
//! days count as 366 days.
//!
//! # Estimates
//!
//! The number of tokens of a call is charged before the call, when it is not known yet. An estimate is given to
//! [`ExecutorBuilder::cost`](crate::ExecutorBuilder::cost) or
//! [`RateLimitLayer::with_cost`](crate::RateLimitLayer::with_cost). With [`ByUsage`](crate::rate::ByUsage) the charge
//! is corrected to what [`UsageLayer`] has found when the call ends.
//!
//! A request with the extension [`ApiTokens`](crate::ApiTokens) costs the number of tokens declared by it: nothing is
//! estimated. Otherwise the estimate counts the characters of the prompt in the JSON body, in the formats of OpenAI,
//! Anthropic, Gemini and Mistral, four to a token. Role names, images and other files are not counted. A body that is
//! not JSON, or larger than 8 MiB, counts with its bytes, four to a token. A body that is
//! [not in memory](crate::body::WholeBody) counts as an empty prompt.

mod adapt;
mod dialect;
#[cfg(feature = "json")]
mod estimate;
pub mod feedback;
mod headers;
mod info;
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
#[cfg(feature = "json")]
pub use usage::{MeteredBody, Usage, UsageLayer};
