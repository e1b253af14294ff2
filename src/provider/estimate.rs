//! [`CharacterEstimate`] and [`AverageEstimate`]: estimate the API's tokens that a call will use, before the call is
//! made.

use super::request_size::RequestSize;
use crate::{
    body::WholeBody,
    error::BoxError,
    rate::{ByUsage, Cost, RequestCost, UsedCost},
    tokens::ApiTokens,
};
use http::{Request, Response};
use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
};

/// Estimates the tokens of a call as one for every four characters of the prompt, plus the longest answers that the
/// request allows (`max_tokens` and its equivalents, times `n`). OpenAI and Azure charge a call in this way before it
/// has run. The tokens of the prompt and of the answers also count as input and output tokens, for limits that count them
/// apart.
///
/// A request with the extension [`ApiTokens`] costs the number of tokens that the extension declares. How a prompt is
/// counted is described in the [module docs](super#estimates).
///
/// The estimate is passed to [`ExecutorBuilder::cost`](crate::ExecutorBuilder::cost).
///
/// ```
/// use http::Request;
/// use tower_outbound::{Cost, provider::CharacterEstimate, rate::RequestCost};
///
/// let request = Request::new(r#"{"messages": [{"role": "user", "content": "How are you?"}], "max_tokens": 100}"#);
/// assert_eq!(CharacterEstimate::new().cost(&request), Cost::input_output_tokens(3, 100));
/// ```
#[derive(Clone, Copy, Debug)]
pub struct CharacterEstimate {
    default_answer: u64,
}

/// Estimates the tokens of a call as one for every four characters of the prompt, plus the average of the answers of
/// earlier calls, or the longest answers that the request allows if these are shorter. All answers to one call (`n`)
/// count as one. The tokens of the prompt and of the answers also count as input and output tokens.
///
/// The average answer is an exponential moving average: each successful call changes it by 1/16 of the difference
/// between the tokens that the call has used and those that it was charged. The tokens used are read from the extension
/// [`ApiTokensUsed`](crate::ApiTokensUsed) of the response when the call is settled, so the same estimate is passed to
/// both `cost` and `settle`. Clones of the estimate share the average.
///
/// A request with the extension [`ApiTokens`] costs the number of tokens that the extension declares. How a prompt is
/// counted is described in the [module docs](super#estimates).
///
/// ```
/// use tower_outbound::{Executor, provider::AverageEstimate};
/// # use http::{Request, Response};
/// # let client = tower::service_fn(async |_: Request<String>| Ok::<_, tower::BoxError>(Response::new(())));
///
/// let estimate = AverageEstimate::new(500);
/// let executor = Executor::builder().cost(estimate.clone()).settle(estimate).build(client)?;
/// # Ok::<_, tower_outbound::error::InvalidConfig>(())
/// ```
#[derive(Clone)]
pub struct AverageEstimate {
    /// The average answer in tokens, multiplied by [`AVERAGE_LENGTH`].
    scaled_answer: Arc<AtomicI64>,
    settlement: ByUsage,
}

/// The divisor of the moving average: each call changes the average by the difference between the tokens that it has
/// used and was charged, divided by this number. The average is stored multiplied by this number, so that small
/// differences are not lost in the division.
const AVERAGE_LENGTH: i64 = 16;

/// The upper bound for the numbers of tokens that the average answer is computed from. Larger numbers are no real
/// usage, and could overflow the sums.
const MAX_LEARNED_TOKENS: u64 = 1 << 40;

// === impl CharacterEstimate ===

impl CharacterEstimate {
    /// Creates an estimate in which an answer to a request without `max_tokens` counts as zero tokens: see
    /// [`default_answer`](Self::default_answer).
    #[must_use]
    pub const fn new() -> Self {
        Self { default_answer: 0 }
    }

    /// Sets the number of tokens that are estimated for each answer to a request without `max_tokens` or one of its
    /// equivalents. Requests for embeddings have no answer that costs tokens. Default: 0.
    #[must_use]
    pub const fn default_answer(mut self, tokens: u64) -> Self {
        self.default_answer = tokens;
        self
    }
}

impl Default for CharacterEstimate {
    fn default() -> Self {
        Self::new()
    }
}

impl<B: WholeBody> RequestCost<Request<B>> for CharacterEstimate {
    fn cost(&self, req: &Request<B>) -> Cost {
        if let Some(cost) = declared_cost(req) {
            return cost;
        }
        let size = size(req);
        let unbounded = || self.default_answer.saturating_mul(size.answers());
        Cost::input_output_tokens(size.prompt(), size.max_answers().unwrap_or_else(unbounded))
    }
}

// === impl AverageEstimate ===

impl AverageEstimate {
    /// Creates an estimate that starts with an average answer of `answer` tokens.
    #[must_use]
    pub fn new(answer: u32) -> Self {
        Self {
            scaled_answer: Arc::new(AtomicI64::new(i64::from(answer) * AVERAGE_LENGTH)),
            settlement: ByUsage::default(),
        }
    }

    /// Charges nothing for failed calls for whose error `never_sent` returns true, as their requests did not reach the
    /// provider: see [`ByUsage::unless_sent`]. Default: failed calls stay charged.
    #[must_use]
    pub fn unless_sent(mut self, never_sent: fn(&BoxError) -> bool) -> Self {
        self.settlement = self.settlement.unless_sent(never_sent);
        self
    }

    /// Returns the current average answer of the calls, in tokens.
    #[must_use]
    pub fn answer(&self) -> u64 {
        u64::try_from(self.scaled_answer.load(Ordering::Acquire) / AVERAGE_LENGTH).unwrap_or(0)
    }
}

impl<B: WholeBody> RequestCost<Request<B>> for AverageEstimate {
    fn cost(&self, req: &Request<B>) -> Cost {
        if let Some(cost) = declared_cost(req) {
            return cost;
        }
        let size = size(req);
        let average = self.answer();
        let answers = size.max_answers().map_or(average, |max| average.min(max));
        Cost::input_output_tokens(size.prompt(), answers)
    }
}

impl<R> UsedCost<Response<R>> for AverageEstimate {
    fn used(&self, charged: Cost, result: Result<&Response<R>, &BoxError>) -> Option<Cost> {
        let used = self.settlement.used(charged, result);
        if let (Ok(_), Some(used)) = (result, used) {
            let [used, charged] = [used, charged].map(|cost| cost.tokens.min(MAX_LEARNED_TOKENS) as i64);
            let learn = |answer: i64| Some((answer + used - charged).clamp(0, i64::MAX / 2));
            let _ = self
                .scaled_answer
                .fetch_update(Ordering::AcqRel, Ordering::Acquire, learn);
        }
        used
    }
}

impl fmt::Debug for AverageEstimate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AverageEstimate")
            .field("answer", &self.answer())
            .finish_non_exhaustive()
    }
}

// === Requests ===

/// Returns the cost that a request declares with its extension [`Cost`] or [`ApiTokens`].
pub(super) fn declared_cost<B>(req: &Request<B>) -> Option<Cost> {
    let extensions = req.extensions();
    let tokens = || extensions.get::<ApiTokens>().map(|tokens| Cost::from(*tokens));
    extensions.get::<Cost>().copied().or_else(tokens)
}

/// Returns the size of a request. A body that is not in memory counts as an empty prompt.
pub(super) fn size<B: WholeBody>(req: &Request<B>) -> RequestSize {
    RequestSize::read(req.uri(), req.body().whole().unwrap_or_default())
}
