//! [`ApiTokens`], [`TokenUsage`] and [`ApiTokensUsed`]: the number of API tokens of a call, such as a language model's,
//! and the extensions of http requests and responses that hold it.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

/// The number of the API's tokens (such as a language model's) that an http request is expected to cost. It is an
/// extension of the http request.
///
/// ```
/// use tower_outbound::ApiTokens;
///
/// let request = http::Request::get("http://localhost/").extension(ApiTokens(750)).body(())?;
/// # Ok::<_, http::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ApiTokens(pub u64);

/// The tokens that a call has used, by kind. `None` stands for a number that is not known.
///
/// `total`, `input` and `output` are what the provider counts towards its limits.
///
/// ```
/// use tower_outbound::TokenUsage;
///
/// let usage = TokenUsage::input_output(1_200, 80);
/// assert_eq!(usage.counted(), Some(1_280));
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct TokenUsage {
    /// The tokens of the prompt. Tokens that the provider has read from its cache are among them if the provider counts
    /// them towards its limits, as OpenAI and Gemini do, and are not if it does not, as Anthropic and Bedrock.
    pub input: Option<u64>,
    /// The tokens of the answer, with those of the reasoning that led to it.
    pub output: Option<u64>,
    /// The tokens of the prompt that the provider has read from its cache: a part of `input`, or beside it, as told
    /// there.
    pub cached_input: Option<u64>,
    /// The part of `output` that was used for reasoning.
    pub reasoning: Option<u64>,
    /// The tokens that count towards a limit of tokens of any kind. If it is `None`, the sum of `input` and `output`
    /// counts: see [`counted`](Self::counted).
    pub total: Option<u64>,
}

/// The API's tokens (such as a language model's) that a call has used. It is an extension of the http response.
///
/// Clones of an `ApiTokensUsed` share the numbers: what is set once the response's body has been read is visible through
/// all of them. If several tasks set the numbers at the same time, the kinds may come from different ones.
///
/// ```
/// use tower_outbound::ApiTokensUsed;
///
/// let response = http::Response::builder().extension(ApiTokensUsed::new(320)).body(())?;
/// # Ok::<_, http::Error>(())
/// ```
#[derive(Clone)]
pub struct ApiTokensUsed(Arc<Cells>);

#[derive(Debug)]
struct Cells {
    total: AtomicU64,
    input: AtomicU64,
    output: AtomicU64,
    cached_input: AtomicU64,
    reasoning: AtomicU64,
}

/// Stands for a number of tokens that has not been set.
const UNKNOWN: u64 = u64::MAX;

// === impl TokenUsage ===

impl TokenUsage {
    /// Creates a usage of so many tokens, of which the kinds are not known.
    #[must_use]
    pub const fn total(tokens: u64) -> Self {
        Self {
            total: Some(tokens),
            ..Self::none()
        }
    }

    /// Creates a usage of so many tokens in the prompt and in the answer.
    #[must_use]
    pub const fn input_output(input: u64, output: u64) -> Self {
        Self {
            input: Some(input),
            output: Some(output),
            ..Self::none()
        }
    }

    /// Returns how many tokens count towards a limit of tokens of any kind: the `total`, or else the sum of `input` and
    /// `output`. `None` if none of them is known.
    #[must_use]
    pub fn counted(&self) -> Option<u64> {
        match (self.total, self.input, self.output) {
            (Some(total), _, _) => Some(total),
            (None, None, None) => None,
            (None, input, output) => Some(input.unwrap_or(0).saturating_add(output.unwrap_or(0))),
        }
    }

    const fn none() -> Self {
        Self {
            input: None,
            output: None,
            cached_input: None,
            reasoning: None,
            total: None,
        }
    }
}

impl From<u64> for TokenUsage {
    /// Does what [`TokenUsage::total`] does.
    fn from(tokens: u64) -> Self {
        Self::total(tokens)
    }
}

// === impl ApiTokensUsed ===

impl ApiTokensUsed {
    /// Creates an `ApiTokensUsed` with this number of tokens.
    #[must_use]
    pub fn new(tokens: u64) -> Self {
        let used = Self::unknown();
        used.set(tokens);
        used
    }

    /// Creates an `ApiTokensUsed` whose numbers of tokens are set later.
    #[must_use]
    pub fn unknown() -> Self {
        let unknown = || AtomicU64::new(UNKNOWN);
        Self(Arc::new(Cells {
            total: unknown(),
            input: unknown(),
            output: unknown(),
            cached_input: unknown(),
            reasoning: unknown(),
        }))
    }

    /// Sets or replaces the number of tokens that count towards the limits, for all clones. The numbers by kind stay as
    /// they are.
    pub fn set(&self, tokens: u64) {
        self.0.total.store(tokens.min(UNKNOWN - 1), Ordering::Release);
    }

    /// Returns the number of tokens that count towards the limits, or `None` if it has not been set.
    #[must_use]
    pub fn get(&self) -> Option<u64> {
        load(&self.0.total, Ordering::Acquire)
    }

    /// Sets or replaces all numbers of tokens, for all clones. The number that [`get`](Self::get) returns becomes
    /// [`TokenUsage::counted`].
    pub fn set_usage(&self, usage: TokenUsage) {
        let store = |cell: &AtomicU64, tokens: Option<u64>, ordering| {
            cell.store(tokens.map_or(UNKNOWN, |tokens| tokens.min(UNKNOWN - 1)), ordering);
        };
        store(&self.0.input, usage.input, Ordering::Relaxed);
        store(&self.0.output, usage.output, Ordering::Relaxed);
        store(&self.0.cached_input, usage.cached_input, Ordering::Relaxed);
        store(&self.0.reasoning, usage.reasoning, Ordering::Relaxed);
        // The last one, with `Release`: a thread that reads this total also reads the kinds that belong to it.
        store(&self.0.total, usage.counted(), Ordering::Release);
    }

    /// Returns the numbers of tokens by kind, with `total` as [`get`](Self::get) returns it. `None` if none has been
    /// set.
    #[must_use]
    pub fn usage(&self) -> Option<TokenUsage> {
        let total = self.get();
        let usage = TokenUsage {
            total,
            input: load(&self.0.input, Ordering::Relaxed),
            output: load(&self.0.output, Ordering::Relaxed),
            cached_input: load(&self.0.cached_input, Ordering::Relaxed),
            reasoning: load(&self.0.reasoning, Ordering::Relaxed),
        };
        (usage != TokenUsage::none()).then_some(usage)
    }
}

fn load(cell: &AtomicU64, ordering: Ordering) -> Option<u64> {
    Some(cell.load(ordering)).filter(|tokens| *tokens != UNKNOWN)
}

impl fmt::Debug for ApiTokensUsed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ApiTokensUsed").field(&self.get()).finish()
    }
}
