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
//! | [`CharacterEstimate`], [`AverageEstimate`], [`QuantileEstimate`] | [estimate](#estimates) the tokens of a request (feature `json`) |
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
//!         BodyLayer            streams the body, and ends the call with it     } one of the two,
//!         CheckLayer           or fails the call if the collected body         } or neither
//!           CollectLayer       is no answer
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
//! A request with the extension [`Cost`](crate::Cost) costs that, and one with the extension
//! [`ApiTokens`](crate::ApiTokens) the number of tokens that the extension declares: nothing is estimated. The parts of
//! prompt and answer are not known then, so limits of input tokens and of output tokens are each charged all of them.
//! Otherwise the estimate reads the JSON body, in the formats of OpenAI, Anthropic, Gemini, Mistral and those who copy them:
//!
//! | in the request | counts as |
//! |---|---|
//! | texts in `messages`, `input`, `prompt`, `system`, `instructions`, `contents` and others, at any depth | a token for every four characters ([OpenAI](https://help.openai.com/en/articles/4936856-what-are-tokens-and-how-to-count-them), [Gemini](https://ai.google.dev/gemini-api/docs/tokens)) |
//! | names, identifiers, signatures | nothing |
//! | `tools`, `functions`, `response_format`, `text`, Gemini's `responseSchema` | a token for every four characters of their JSON |
//! | numbers in a list: token ids | a token each |
//! | an image in OpenAI's format | 765 tokens, or 85 with `detail: low`: 85, and 170 for each tile of 512 pixels of an image of 1024 x 1024 ([OpenAI](https://platform.openai.com/docs/guides/images-vision#calculating-costs)) |
//! | an image in Anthropic's format | 1,600 tokens, as the largest image that is not scaled down ([Anthropic](https://docs.anthropic.com/en/docs/build-with-claude/vision#calculate-image-costs)) |
//! | an image in Gemini's format | 1,032 tokens: 258 for each of 4 tiles ([Gemini](https://ai.google.dev/gemini-api/docs/tokens)) |
//! | audio | a minute: 600 tokens in OpenAI's format ([OpenAI](https://platform.openai.com/docs/guides/realtime-costs)), 1,920 in Gemini's ([Gemini](https://ai.google.dev/gemini-api/docs/tokens)) |
//! | any other file, and a text that looks like one: base64 of 1 KiB and more | 1,500 tokens, as a page of text ([Anthropic](https://docs.anthropic.com/en/docs/build-with-claude/pdf-support#estimate-your-costs)) |
//! | `max_tokens`, `max_completion_tokens`, `max_output_tokens`, `maxOutputTokens` | that many tokens for each answer; without them, [a default](CharacterEstimate::default_answer) |
//! | `n`, `best_of` (the larger), `candidateCount`, a list of prompts | so many answers |
//! | embeddings: a path or `model` with `embed` in it, `encoding_format`, `dimensions`, an `input` that is a list of texts or token ids | no answer |
//!
//! What is not listed is not counted. The sizes of images and files are not known before they are decoded, so each counts
//! as a typical one. For a body that is not a JSON object, four bytes count as one token. A body that is [not in
//! memory](crate::body::WholeBody) counts as an empty prompt.

mod adapt;
#[cfg(feature = "json")]
mod answers;
mod dialect;
#[cfg(feature = "json")]
mod estimate;
pub mod feedback;
mod follow;
mod headers;
mod info;
mod key;
#[cfg(feature = "json")]
mod media;
#[cfg(feature = "json")]
mod model;
#[cfg(feature = "json")]
mod quantile;
#[cfg(feature = "json")]
mod request_size;
mod tries;
#[cfg(feature = "json")]
mod unread;
#[cfg(feature = "json")]
pub mod usage;
#[cfg(feature = "json")]
mod usage_report;

pub use dialect::{ParseProviderError, Provider};
#[cfg(feature = "json")]
pub use estimate::{AverageEstimate, CharacterEstimate};
pub use feedback::{Feedback, FeedbackLayer};
pub use follow::{Learned, Source};
#[cfg(feature = "json")]
pub(crate) use headers::parse_go_duration;
pub use info::{RateLimitInfo, Reset, Unit, Window};
pub use key::InvalidKeyError;
#[cfg(feature = "json")]
pub use quantile::QuantileEstimate;
#[cfg(feature = "json")]
pub use usage::{MeteredBody, Usage, UsageLayer};
