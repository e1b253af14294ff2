//! [`QuantileEstimate`]: estimates the tokens of an answer by a quantile of the answers of earlier calls to the same
//! model.

use super::{
    answers::Answers,
    estimate::{declared_cost, size},
    request_size::RequestSize,
};
use crate::{
    body::WholeBody,
    error::{BoxError, InvalidConfig},
    rate::{ByUsage, CallKind, Cost, RequestCost, UsedCost},
    sync::Mutex,
    tokens::ApiTokensUsed,
};
use http::{Request, Response};
use std::{
    fmt,
    sync::{Arc, PoisonError},
};

/// Estimates the tokens of a call as one for every four characters of the prompt, plus a quantile of the answers of
/// earlier calls to the same model, or the longest answers that the request allows if these are shorter. All answers to
/// one call (`n`) count as one.
///
/// With a quantile of 0.95, one call in twenty uses more for its answer than it was charged. So calls with a large
/// `max_tokens` and short answers do not wait for tokens that none of them uses, and yet few are charged too little. The
/// quantile is that of the last 128 answers of the model. Until 20 answers have been seen, an answer is estimated as by
/// [`CharacterEstimate`](super::CharacterEstimate).
///
/// The model is what the field `model` of the body names, or the path of the URL (Gemini, Bedrock, Azure OpenAI). The
/// answers of 64 models are kept apart, and all other calls share those of the rest.
///
/// The tokens used are read from the extension [`ApiTokensUsed`] of the response when the call is settled, so the same
/// estimate is passed to both `cost` and `settle`, which
/// [`ExecutorBuilder::estimate`](crate::ExecutorBuilder::estimate) does. Clones of the estimate share the answers. In an
/// executor, a call is charged by the answers that are known when it gets its permit, not by those when it was submitted.
/// If the estimate is called by a cost function of your own, the function tells no model, and all models share one
/// quantile.
///
/// A request with the extension [`Cost`] or [`ApiTokens`](crate::ApiTokens) costs what the extension declares.
/// How a prompt is counted is described in the [module docs](super#estimates).
///
/// ```
/// use tower_outbound::{Executor, provider::QuantileEstimate};
/// # use http::{Request, Response};
/// # let client = tower::service_fn(async |_: Request<String>| Ok::<_, tower::BoxError>(Response::new(())));
///
/// let estimate = QuantileEstimate::new(0.95)?.default_answer(1_000);
/// let executor = Executor::builder().estimate(estimate).build(client)?;
/// # Ok::<_, tower_outbound::error::InvalidConfig>(())
/// ```
#[derive(Clone)]
pub struct QuantileEstimate {
    quantile: f64,
    default_answer: u64,
    settlement: ByUsage,
    answers: Arc<Mutex<Answers>>,
}

/// What was read of a request: an extension of it.
#[derive(Clone, Copy)]
struct Prepared {
    size: RequestSize,
    /// The length of the body that was read. If the body has another length now, it is read again.
    length: usize,
    /// Whether the request declared its cost when it was read. Later, an executor adds the estimate as an `ApiTokens`.
    is_declared: bool,
}

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
            answers: Arc::new(Mutex::new(Answers::default())),
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

    /// Returns the quantile, in tokens, of the answers of calls that tell no model, and of models beyond the 64 that are
    /// kept apart. `None` if fewer than 20 have been seen.
    #[must_use]
    pub fn answer(&self) -> Option<u64> {
        self.quantile(None)
    }

    /// Returns the quantile, in tokens, of the answers of a model: `answer_of(CallKind::of("gpt-4o"))`. `None` if fewer
    /// than 20 have been seen. If none has been kept of the model, it is that of [`answer`](Self::answer).
    #[must_use]
    pub fn answer_of(&self, model: CallKind) -> Option<u64> {
        self.quantile(Some(model))
    }

    fn quantile(&self, model: Option<CallKind>) -> Option<u64> {
        let answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        answers.quantile(model)
    }

    fn estimated(&self, size: &RequestSize) -> Cost {
        let longest = size.max_answers();
        let answers = match self.quantile(size.model()) {
            Some(answer) => longest.map_or(answer, |longest| answer.min(longest)),
            None => longest.unwrap_or_else(|| self.default_answer.saturating_mul(size.answers())),
        };
        Cost::input_output_tokens(size.prompt(), answers)
    }
}

impl<B: WholeBody> RequestCost<Request<B>> for QuantileEstimate {
    fn cost(&self, req: &Request<B>) -> Cost {
        if let Some(cost) = req.extensions().get::<Cost>() {
            return *cost;
        }
        match Prepared::of(req) {
            Some(prepared) if !prepared.is_declared => self.estimated(&prepared.size),
            _ => declared_cost(req).unwrap_or_else(|| self.estimated(&size(req))),
        }
    }

    fn kind(&self, req: &Request<B>) -> Option<CallKind> {
        let size = Prepared::of(req).map_or_else(|| size(req), |prepared| prepared.size);
        size.model()
    }

    fn prepare(&self, req: &mut Request<B>) -> bool {
        if Prepared::of(req).is_none() {
            let before = req.extensions().get::<Prepared>();
            let prepared = Prepared {
                size: size(req),
                length: length(req),
                is_declared: before.map_or_else(|| declared_cost(req).is_some(), |before| before.is_declared),
            };
            req.extensions_mut().insert(prepared);
        }
        true
    }
}

impl<R> UsedCost<Response<R>> for QuantileEstimate {
    fn used(&self, charged: Cost, result: Result<&Response<R>, &BoxError>) -> Option<Cost> {
        self.used_by_kind(None, charged, result)
    }

    fn used_by_kind(
        &self,
        kind: Option<CallKind>,
        charged: Cost,
        result: Result<&Response<R>, &BoxError>,
    ) -> Option<Cost> {
        let usage = result
            .ok()
            .and_then(|response| response.extensions().get::<ApiTokensUsed>()?.usage());
        if let Some(usage) = usage {
            // Of a charge that does not tell the prompt's tokens apart, it is not known what is left for the answer.
            let is_told_apart = charged.output_tokens < charged.tokens || charged.input_tokens < charged.tokens;
            let rest = || Some(usage.counted()?.saturating_sub(charged.input_tokens)).filter(|_| is_told_apart);
            if let Some(answer) = usage.output.or_else(rest) {
                let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
                answers.add(kind, answer, self.quantile);
            }
        }
        self.settlement.used(charged, result)
    }
}

impl fmt::Debug for QuantileEstimate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QuantileEstimate")
            .field("quantile", &self.quantile)
            .field("default_answer", &self.default_answer)
            .finish_non_exhaustive()
    }
}

// === impl Prepared ===

impl Prepared {
    fn of<B: WholeBody>(req: &Request<B>) -> Option<Self> {
        let prepared = req.extensions().get::<Self>().copied();
        prepared.filter(|prepared| prepared.length == length(req))
    }
}

fn length<B: WholeBody>(req: &Request<B>) -> usize {
    req.body().whole().map_or(0, <[u8]>::len)
}
