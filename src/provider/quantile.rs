//! [`QuantileEstimate`]: estimates the tokens of an answer by a quantile of the answers of earlier calls.

use super::estimate::{declared_cost, size};
use crate::{
    body::WholeBody,
    error::{BoxError, InvalidConfig},
    rate::{ByUsage, Cost, RequestCost, UsedCost},
    sync::Mutex,
    tokens::ApiTokensUsed,
};
use http::{Request, Response};
use std::{
    fmt,
    sync::{Arc, PoisonError},
};

/// Estimates the tokens of a call as one for every four characters of the prompt, plus a quantile of the answers of
/// earlier calls, or the longest answers that the request allows if these are shorter. All answers to one call (`n`)
/// count as one.
///
/// With a quantile of 0.95, one call in twenty uses more for its answer than it was charged. So calls with a large
/// `max_tokens` and short answers do not wait for tokens that none of them uses, and yet few are charged too little. The
/// quantile is that of the last 128 answers of any model: calls to models whose answers differ much need an estimate for
/// each. Until 20 answers have been seen, an answer is estimated as by [`CharacterEstimate`](super::CharacterEstimate).
///
/// The tokens used are read from the extension [`ApiTokensUsed`] of the response when the call is settled, so the same
/// estimate is passed to both `cost` and `settle`. Clones of the estimate share the answers.
///
/// A request with the extension [`ApiTokens`](crate::ApiTokens) costs the number of tokens that the extension declares.
/// How a prompt is counted is described in the [module docs](super#estimates).
///
/// ```
/// use tower_outbound::{Executor, provider::QuantileEstimate};
/// # use http::{Request, Response};
/// # let client = tower::service_fn(async |_: Request<String>| Ok::<_, tower::BoxError>(Response::new(())));
///
/// let estimate = QuantileEstimate::new(0.95)?.default_answer(1_000);
/// let executor = Executor::builder().cost(estimate.clone()).settle(estimate).build(client)?;
/// # Ok::<_, tower_outbound::error::InvalidConfig>(())
/// ```
#[derive(Clone)]
pub struct QuantileEstimate {
    quantile: f64,
    default_answer: u64,
    settlement: ByUsage,
    answers: Arc<Mutex<Answers>>,
}

/// The last answers, in tokens.
struct Answers {
    ring: [u64; RING],
    /// Where the next answer is put.
    next: usize,
    /// How many answers there are in the ring.
    seen: usize,
    /// The quantile of the answers in the ring. `None` until there are enough.
    estimate: Option<u64>,
}

/// The number of answers that are kept.
const RING: usize = 128;
/// The number of answers from which on the quantile is used.
const ENOUGH: usize = 20;

// === impl QuantileEstimate ===

impl QuantileEstimate {
    /// Creates an estimate by this quantile, a number above 0 and at most 1: with 1, the longest of the last 128 answers
    /// counts.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`] if `quantile` is not such a number.
    pub fn new(quantile: f64) -> Result<Self, InvalidConfig> {
        if !(quantile > 0.0 && quantile <= 1.0) {
            return Err(InvalidConfig::new(
                "quantile",
                format!("must be above 0 and at most 1, is {quantile}"),
            ));
        }
        Ok(Self {
            quantile,
            default_answer: 0,
            settlement: ByUsage::default(),
            answers: Arc::new(Mutex::new(Answers {
                ring: [0; RING],
                next: 0,
                seen: 0,
                estimate: None,
            })),
        })
    }

    /// Sets the number of tokens that are estimated for each answer to a request without `max_tokens` or one of its
    /// equivalents, until enough answers have been seen. Default: 0.
    #[must_use]
    pub const fn default_answer(mut self, tokens: u64) -> Self {
        self.default_answer = tokens;
        self
    }

    /// Settles calls as `settlement` says, for example with a [price](ByUsage::price). Default: `ByUsage::default()`.
    #[must_use]
    pub fn settlement(mut self, settlement: ByUsage) -> Self {
        self.settlement = settlement;
        self
    }

    /// Returns the quantile of the answers in tokens, or `None` if fewer than 20 have been seen.
    #[must_use]
    pub fn answer(&self) -> Option<u64> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner).estimate
    }
}

impl<B: WholeBody> RequestCost<Request<B>> for QuantileEstimate {
    fn cost(&self, req: &Request<B>) -> Cost {
        if let Some(cost) = declared_cost(req) {
            return cost;
        }
        let size = size(req);
        let longest = size.max_answers();
        let answers = match self.answer() {
            Some(answer) => longest.map_or(answer, |longest| answer.min(longest)),
            None => longest.unwrap_or_else(|| self.default_answer.saturating_mul(size.answers())),
        };
        Cost::input_output_tokens(size.prompt(), answers)
    }
}

impl<R> UsedCost<Response<R>> for QuantileEstimate {
    fn used(&self, charged: Cost, result: Result<&Response<R>, &BoxError>) -> Option<Cost> {
        let usage = result
            .ok()
            .and_then(|response| response.extensions().get::<ApiTokensUsed>()?.usage());
        if let Some(usage) = usage {
            let rest = || Some(usage.counted()?.saturating_sub(charged.input_tokens));
            if let Some(answer) = usage.output.or_else(rest) {
                let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
                answers.add(answer, self.quantile);
            }
        }
        self.settlement.used(charged, result)
    }
}

impl fmt::Debug for QuantileEstimate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QuantileEstimate")
            .field("quantile", &self.quantile)
            .field("answer", &self.answer())
            .finish_non_exhaustive()
    }
}

// === impl Answers ===

impl Answers {
    fn add(&mut self, answer: u64, quantile: f64) {
        self.ring[self.next] = answer;
        self.next = (self.next + 1) % RING;
        self.seen = (self.seen + 1).min(RING);
        let seen = self.seen;
        if seen >= ENOUGH {
            let mut answers = self.ring;
            let answers = &mut answers[..seen];
            let rank = (quantile * seen as f64).ceil() as usize;
            let (_, estimate, _) = answers.select_nth_unstable(rank.clamp(1, seen) - 1);
            self.estimate = Some(*estimate);
        }
    }
}
