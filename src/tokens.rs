//! [`ApiTokens`] and [`ApiTokensUsed`]: extensions of http requests and responses that hold the number of API tokens of
//! a call, such as a language model's.

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

/// The number of the API's tokens (such as a language model's) that a call has used. It is an extension of the http
/// response.
///
/// Clones of an `ApiTokensUsed` share one number: a number that is set once the response's body has been read is
/// visible through all of them.
///
/// ```
/// use tower_outbound::ApiTokensUsed;
///
/// let response = http::Response::builder().extension(ApiTokensUsed::new(320)).body(())?;
/// # Ok::<_, http::Error>(())
/// ```
#[derive(Clone)]
pub struct ApiTokensUsed(Arc<AtomicU64>);

/// Stands for a number of tokens that has not been set.
const UNKNOWN: u64 = u64::MAX;

impl ApiTokensUsed {
    /// Creates an `ApiTokensUsed` with this number of tokens.
    #[must_use]
    pub fn new(tokens: u64) -> Self {
        let used = Self::unknown();
        used.set(tokens);
        used
    }

    /// Creates an `ApiTokensUsed` whose number of tokens is set later.
    #[must_use]
    pub fn unknown() -> Self {
        Self(Arc::new(AtomicU64::new(UNKNOWN)))
    }

    /// Sets or replaces the number of tokens, for all clones.
    pub fn set(&self, tokens: u64) {
        self.0.store(tokens.min(UNKNOWN - 1), Ordering::Release);
    }

    /// Returns the number of tokens, or `None` if it has not been set.
    #[must_use]
    pub fn get(&self) -> Option<u64> {
        Some(self.0.load(Ordering::Acquire)).filter(|tokens| *tokens != UNKNOWN)
    }
}

impl fmt::Debug for ApiTokensUsed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ApiTokensUsed").field(&self.get()).finish()
    }
}
