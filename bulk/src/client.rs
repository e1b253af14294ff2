//! The client: reqwest as a Tower service, listened to, metered, and read to the last byte.

use crate::args::Args;
use http::{HeaderMap, HeaderValue, Request, Response, Uri, header};
use hyper::body::Bytes;
use tower::{BoxError, Service, ServiceBuilder};
use tower_outbound::{
    RateLimiter,
    body::CollectLayer,
    client::Reqwest,
    provider::{FeedbackLayer, Provider, UsageLayer},
};

/// No answer is longer.
const MOST_BYTES: usize = 64 << 20;

/// A client that collects the body inside the call, so that a call's permit and its event last until the answer is whole;
/// and that tells the limiter what the provider says.
pub(crate) fn service(
    client: reqwest::Client,
    limiter: RateLimiter,
    provider: Provider,
    adopts_limits: bool,
) -> impl Service<
    Request<Bytes>,
    Response = Response<Bytes>,
    Error = BoxError,
    Future = impl Future<Output = Result<Response<Bytes>, BoxError>> + Send,
> + Clone
+ Send {
    let mut feedback = FeedbackLayer::new(limiter, provider);
    if adopts_limits {
        // As it tells them; and where it does not, as its 429s show them.
        feedback = feedback.adopt_limits().adapt();
    }
    ServiceBuilder::new()
        .layer(CollectLayer::new(MOST_BYTES))
        .layer(feedback)
        .layer(UsageLayer::new())
        // Results and messages are no place for a URL: there may be a key in it.
        .map_err(reqwest::Error::without_url)
        .service(Reqwest::new(client))
}

/// The client itself. `headers` go with every request; the executor never sees them.
pub(crate) fn reqwest(mut headers: HeaderMap, args: &Args, url: &Uri, local: bool) -> reqwest::Result<reqwest::Client> {
    // The client panics without a provider of cryptography. An error means that the process has one already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    headers
        .entry(header::CONTENT_TYPE)
        .or_insert(HeaderValue::from_static("application/json"));
    let mut client = reqwest::Client::builder()
        .user_agent(concat!("tower-outbound-bulk/", env!("CARGO_PKG_VERSION")))
        .default_headers(headers)
        .timeout(args.timeout)
        // One call is one request, which is what is metered; and keys stay with the host they are meant for.
        .redirect(reqwest::redirect::Policy::none());
    if local {
        // A proxy from the environment could not reach a provider inside this process.
        client = client.no_proxy();
    }
    if url.scheme_str() == Some("http") {
        // Where no certificates are installed, only https needs to fail for it.
        client = client.tls_certs_only([]);
    }
    client.build()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[tokio::test]
    async fn an_https_request_to_a_closed_port_fails_to_connect() {
        let url = Uri::from_static("https://127.0.0.1:1/");
        let client = reqwest(HeaderMap::new(), &Args::parse_from(["bulk"]), &url, true).unwrap();
        let error = client.get(url.to_string()).send().await.unwrap_err();
        assert!(error.is_connect(), "{error:?}");
    }
}
