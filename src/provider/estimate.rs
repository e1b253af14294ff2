//! Estimates: how many tokens a request will take, before anybody has counted them.

use crate::body::WholeBody;
use crate::{
    error::BoxError,
    rate::{ByUsage, Cost, RequestCost, UsedCost},
    tokens::ApiTokens,
};
use http::{Request, Response};
use serde_json::Value;
use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
};

/// A quarter of the characters that are asked, and all of the answer that is allowed (`max_tokens`): what the large
/// providers charge before they know better.
///
/// It looks into the request's JSON, in the forms of OpenAI, Anthropic, Gemini and Mistral. A request that says its
/// own tokens, by the extension [`ApiTokens`], costs those.
///
/// ```
/// use http::Request;
/// use tower_outbound::{Cost, provider::CharacterEstimate, rate::RequestCost};
///
/// let request = Request::new(r#"{"messages": [{"role": "user", "content": "How are you?"}], "max_tokens": 100}"#);
/// assert_eq!(CharacterEstimate::new().cost(&request), Cost::tokens(103));
/// ```
#[derive(Clone, Copy, Debug)]
pub struct CharacterEstimate {
    answer: u64,
}

/// A quarter of the characters that are asked, and an answer as long as those before: a moving average of what calls have
/// used beyond their characters.
///
/// It learns from what calls [used](crate::ApiTokensUsed), so it is given to both `cost` and `settle`. Its clones learn together.
///
/// ```
/// use tower_outbound::{Executor, provider::AverageEstimate};
/// # let client = tower::service_fn(async |_: http::Request<String>| Ok::<_, tower::BoxError>(http::Response::new(())));
///
/// let estimate = AverageEstimate::new(500);
/// let executor = Executor::builder().cost(estimate.clone()).settle(estimate).build(client)?;
/// # Ok::<_, tower_outbound::error::InvalidConfig>(())
/// ```
#[derive(Clone)]
pub struct AverageEstimate {
    /// The answer that is expected, [`SLOWLY`] times.
    answer: Arc<AtomicI64>,
    settlement: ByUsage,
}

/// Each call moves the average by this part of what it was off.
const SLOWLY: i64 = 16;

/// What is longer is not looked into.
const MOST: usize = 8 << 20;

// === impl CharacterEstimate ===

impl CharacterEstimate {
    /// Answers without a `max_tokens` are taken to be short of nothing.
    #[must_use]
    pub const fn new() -> Self {
        Self { answer: 0 }
    }

    /// So many tokens for an answer without a `max_tokens`.
    #[must_use]
    pub const fn default_answer(mut self, tokens: u64) -> Self {
        self.answer = tokens;
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
        Cost::tokens(said(req).unwrap_or_else(|| {
            let asked = Asked::read(req.body());
            asked.tokens().saturating_add(asked.answer.unwrap_or(self.answer))
        }))
    }
}

// === impl AverageEstimate ===

impl AverageEstimate {
    /// The first answers are expected to be so long.
    #[must_use]
    pub fn new(answer: u32) -> Self {
        Self {
            answer: Arc::new(AtomicI64::new(i64::from(answer) * SLOWLY)),
            settlement: ByUsage::default(),
        }
    }

    /// Failures for which this is true were never on the wire: see [`ByUsage::unless_sent`].
    #[must_use]
    pub fn unless_sent(mut self, never_sent: fn(&BoxError) -> bool) -> Self {
        self.settlement = self.settlement.unless_sent(never_sent);
        self
    }

    /// How long an answer is expected to be.
    #[must_use]
    pub fn answer(&self) -> u64 {
        u64::try_from(self.answer.load(Ordering::Acquire) / SLOWLY).unwrap_or(0)
    }
}

impl<B: WholeBody> RequestCost<Request<B>> for AverageEstimate {
    fn cost(&self, req: &Request<B>) -> Cost {
        Cost::tokens(said(req).unwrap_or_else(|| {
            let asked = Asked::read(req.body());
            let expected = self.answer();
            let answer = asked.answer.map_or(expected, |most| expected.min(most));
            asked.tokens().saturating_add(answer)
        }))
    }
}

impl<R> UsedCost<Response<R>> for AverageEstimate {
    fn used(&self, charged: Cost, result: Result<&Response<R>, &BoxError>) -> Option<Cost> {
        let used = self.settlement.used(charged, result);
        if let (Ok(_), Some(used)) = (result, used) {
            // What is off by more than anything that is answered teaches nothing.
            const MOST: u64 = 1 << 40;
            let (used, charged) = (used.tokens.min(MOST) as i64, charged.tokens.min(MOST) as i64);
            let learn = |answer: i64| Some((answer + used - charged).clamp(0, i64::MAX / 2));
            let _ = self.answer.fetch_update(Ordering::AcqRel, Ordering::Acquire, learn);
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

fn said<B>(req: &Request<B>) -> Option<u64> {
    req.extensions().get::<ApiTokens>().map(|tokens| tokens.0)
}

/// What a request asks for.
#[derive(Default)]
struct Asked {
    characters: u64,
    /// The longest answer it allows.
    answer: Option<u64>,
}

impl Asked {
    fn read(body: &impl WholeBody) -> Self {
        let Some(body) = body.whole() else {
            return Self::default();
        };
        let json = (body.len() <= MOST)
            .then(|| serde_json::from_slice::<Value>(body).ok())
            .flatten();
        let Some(json) = json else {
            return Self {
                characters: body.len() as u64,
                answer: None,
            };
        };
        // Where each of them has what is read by the model.
        let texts = [
            "messages",
            "input",
            "prompt",
            "system",
            "instructions",
            "contents",
            "systemInstruction",
            "tools",
        ];
        let answers = ["max_completion_tokens", "max_tokens", "max_output_tokens"];
        let of_gemini = || {
            json.pointer("/generationConfig/maxOutputTokens")
                .and_then(Value::as_u64)
        };
        Self {
            characters: texts.iter().filter_map(|field| json.get(field)).map(characters).sum(),
            answer: answers
                .iter()
                .find_map(|field| json.get(field)?.as_u64())
                .or_else(of_gemini),
        }
    }

    fn tokens(&self) -> u64 {
        self.characters.div_ceil(4)
    }
}

/// Fields that no model reads as text: what kind of thing it is, and pictures and the like.
const NO_TEXTS: [&str; 10] = [
    "role",
    "type",
    "id",
    "name",
    "image_url",
    "source",
    "inlineData",
    "inline_data",
    "file_data",
    "input_audio",
];

/// Of all texts in it, however deep. (serde_json refuses what is nested deeper than 128.)
fn characters(value: &Value) -> u64 {
    match value {
        Value::String(text) => text.chars().count() as u64,
        Value::Array(values) => values.iter().map(characters).sum(),
        Value::Object(fields) => fields
            .iter()
            .filter(|(name, _)| !NO_TEXTS.contains(&name.as_str()))
            .map(|(_, value)| characters(value))
            .sum(),
        _ => 0,
    }
}
