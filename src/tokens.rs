//! [`ApiTokens`] and [`ApiTokensUsed`]: extensions of http requests and responses with the API's tokens of one call.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

/// The number of the API's tokens an http request is expected to cost: an extension of the request.
///
/// ```
/// use tower_outbound::ApiTokens;
///
/// let request = http::Request::get("http://localhost/").extension(ApiTokens(750)).body(())?;
/// # Ok::<_, http::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ApiTokens(pub u64);

/// The number of the API's tokens a call has used: an extension of the http response.
///
/// Clones share one value: a number that is set once the response's body has been read is visible through all of them.
///
/// ```
/// use tower_outbound::ApiTokensUsed;
///
/// let response = http::Response::builder().extension(ApiTokensUsed::new(320)).body(())?;
/// # Ok::<_, http::Error>(())
/// ```
#[derive(Clone)]
pub struct ApiTokensUsed(Arc<AtomicU64>);

/// Marks a number that has not been set.
const UNKNOWN: u64 = u64::MAX;

impl ApiTokensUsed {
    /// Creates a value with this number of tokens.
    #[must_use]
    pub fn new(tokens: u64) -> Self {
        let used = Self::unknown();
        used.set(tokens);
        used
    }

    /// Creates a value whose number is not set yet.
    #[must_use]
    pub fn unknown() -> Self {
        Self(Arc::new(AtomicU64::new(UNKNOWN)))
    }

    /// Sets or replaces the number of tokens.
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
