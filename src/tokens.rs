//! [`ApiTokens`] and [`ApiTokensUsed`]: what an http request says of its own cost, and a response of what it was.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

/// How many of the API's tokens an http request will take: an extension of the request.
///
/// ```
/// use tower_outbound::ApiTokens;
///
/// let request = http::Request::get("http://localhost/").extension(ApiTokens(750)).body(())?;
/// # Ok::<_, http::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ApiTokens(pub u64);

/// How many of the API's tokens a call used in the end: an extension of the http response.
///
/// Its clones are one: what is found out later, when the body has gone by, is known to all of them.
///
/// ```
/// use tower_outbound::ApiTokensUsed;
///
/// let response = http::Response::builder().extension(ApiTokensUsed::new(320)).body(())?;
/// # Ok::<_, http::Error>(())
/// ```
#[derive(Clone)]
pub struct ApiTokensUsed(Arc<AtomicU64>);

/// More than anybody can use.
const UNKNOWN: u64 = u64::MAX;

impl ApiTokensUsed {
    /// So many.
    #[must_use]
    pub fn new(tokens: u64) -> Self {
        let used = Self::unknown();
        used.set(tokens);
        used
    }

    /// Not known yet.
    #[must_use]
    pub fn unknown() -> Self {
        Self(Arc::new(AtomicU64::new(UNKNOWN)))
    }

    /// So many, after all.
    pub fn set(&self, tokens: u64) {
        self.0.store(tokens.min(UNKNOWN - 1), Ordering::Release);
    }

    /// How many; `None` if that is not known (yet).
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
