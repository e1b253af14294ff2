//! The client: reqwest as a Tower service, with layers that read the provider's limits, the token usage and the whole
//! body of each response.

use crate::{
    args::SendArgs,
    attempts::{Attempts, AttemptsLayer},
};
use http::{HeaderMap, HeaderValue, Request, Response, Uri, header};
use hyper::body::Bytes;
use std::sync::Arc;
use tower::{BoxError, Service, ServiceBuilder};
use tower_outbound::{
    RateLimiter,
    body::CollectLayer,
    client::Reqwest,
    provider::{FeedbackLayer, Provider, UsageLayer},
};

/// The longest response body that is accepted, in bytes: 64 MiB.
const MAX_BODY: usize = 64 << 20;

/// Makes a client that collects the body inside the call, so that a call keeps its permit and its event stays open
/// until the body is complete. The client reports the provider's limits and delays to the limiter.
pub(crate) fn service(
    client: reqwest::Client,
    limiter: RateLimiter,
    provider: Provider,
    adopts_limits: bool,
    attempts: Arc<Attempts>,
) -> impl Service<
    Request<Bytes>,
    Response = Response<Bytes>,
    Error = BoxError,
    Future = impl Future<Output = Result<Response<Bytes>, BoxError>> + Send,
> + Clone
+ Send {
    let mut feedback = FeedbackLayer::new(limiter, provider);
    if adopts_limits {
        // The limiter adopts the limits that the provider reports. Where the provider reports none, the limiter adapts
        // its rates to the provider's 429s.
        feedback = feedback.adopt_limits().adapt();
    }
    ServiceBuilder::new()
        .layer(AttemptsLayer(attempts))
        .layer(CollectLayer::new(MAX_BODY))
        .layer(feedback)
        .layer(UsageLayer::new())
        // The URL of a request may hold a key, so an error must not show the URL in results or messages.
        .map_err(reqwest::Error::without_url)
        .service(Reqwest::new(client))
}

/// Makes the HTTP client. It adds `headers` to every request after the executor has recorded the request, so that
/// events do not hold the headers, which may be keys.
pub(crate) fn reqwest(
    mut headers: HeaderMap,
    args: &SendArgs,
    url: &Uri,
    local: bool,
) -> reqwest::Result<reqwest::Client> {
    // reqwest panics if the process has no default crypto provider. `install_default` fails if there is one already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    headers
        .entry(header::CONTENT_TYPE)
        .or_insert(HeaderValue::from_static("application/json"));
    let mut client = reqwest::Client::builder()
        .user_agent(concat!("tower-outbound-bulk/", env!("CARGO_PKG_VERSION")))
        .default_headers(headers)
        .timeout(args.timeout)
        // Redirects are not followed, so that one call is exactly one request, as the limits count it, and keys are
        // sent to no host except the given one.
        .redirect(reqwest::redirect::Policy::none());
    if local {
        // If the environment names a proxy, the proxy cannot reach a provider inside this process.
        client = client.no_proxy();
    }
    if url.scheme_str() == Some("http") {
        // Without installed certificates the client could not be built, although http needs none.
        client = client.tls_certs_only([]);
    }
    client.build()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Args;
    use clap::Parser;

    #[tokio::test]
    async fn an_https_request_to_a_closed_port_fails_to_connect() {
        let url = Uri::from_static("https://127.0.0.1:1/");
        let client = reqwest(HeaderMap::new(), &Args::parse_from(["bulk"]).send, &url, true).unwrap();
        let error = client.get(url.to_string()).send().await.unwrap_err();
        assert!(error.is_connect(), "{error:?}");
    }
}
