//! [`ApiTokens`]: what an http request says of its own cost.

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
