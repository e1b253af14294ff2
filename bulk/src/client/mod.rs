//! The client: reqwest as a Tower service, with layers that read the provider's limits, the token usage and the whole
//! body of each response.

mod trust;

use crate::{
    args::{SendArgs, Target},
    limits::LimitFeedback,
};
use anyhow::Context;
use http::{HeaderValue, Request, Response, header};
use hyper::body::Bytes;
use std::{fmt, sync::Arc};
use tower::{BoxError, Service, ServiceBuilder};
use tower_outbound::{
    RateLimiter,
    body::{CheckLayer, CollectLayer},
    client::Reqwest,
    provider::{FeedbackLayer, UsageLayer},
};

/// The certificate of the server is not trusted. Another attempt would meet the same certificate, so the error is none
/// of a lost connection, and is not retried.
#[derive(Debug)]
pub(crate) struct Untrusted(String);

/// Makes a client that collects the body inside the call, so that a call keeps its permit and its event stays open
/// until the body is complete. A 2xx whose body is no answer is an error. The client reports the provider's limits and
/// delays to the limiter, and the result of each attempt to `observe`.
pub(crate) fn service<F>(
    client: reqwest::Client,
    limiter: RateLimiter,
    args: &SendArgs,
    feedback: LimitFeedback,
    observe: F,
) -> impl Service<
    Request<Bytes>,
    Response = Response<Bytes>,
    Error = BoxError,
    Future = impl Future<Output = Result<Response<Bytes>, BoxError>> + Send + use<F>,
> + Clone
+ Send
+ use<F>
where
    F: Fn(&Result<Response<Bytes>, BoxError>) + Clone + Send,
{
    let layer = FeedbackLayer::new(limiter, args.provider()).max_pause(args.max_wait);
    let feedback = match feedback {
        LimitFeedback::Keep => layer,
        LimitFeedback::Adopt => layer.adopt_limits().adapt(),
        LimitFeedback::Follow => layer.follow(),
    };
    ServiceBuilder::new()
        .map_result(move |result| {
            observe(&result);
            result
        })
        .layer(CheckLayer::new())
        .layer(CollectLayer::new(args.max_response))
        .layer(feedback)
        .layer(UsageLayer::new())
        .map_request(with_content_type)
        .map_err(transport_error)
        .service(Reqwest::new(client))
}

/// Adds the content type to a request with a body, unless the line or the command line gives one.
fn with_content_type(mut request: Request<Bytes>) -> Request<Bytes> {
    if !request.body().is_empty() {
        request
            .headers_mut()
            .entry(header::CONTENT_TYPE)
            .or_insert(HeaderValue::from_static("application/json"));
    }
    request
}

/// The URL of a request may hold a key, so an error must not show the URL in results or messages.
fn transport_error(error: reqwest::Error) -> BoxError {
    let error = error.without_url();
    match certificate_error(&error) {
        Some(reason) => Box::new(Untrusted(reason)),
        None => Box::new(error),
    }
}

fn certificate_error(error: &(dyn std::error::Error + 'static)) -> Option<String> {
    causes(error).find_map(|cause| match cause.downcast_ref::<rustls::Error>() {
        Some(error @ (rustls::Error::InvalidCertificate(_) | rustls::Error::NoCertificatesPresented)) => {
            Some(error.to_string())
        }
        _ => None,
    })
}

/// Returns an error and its causes, outermost first, also those that an I/O error wraps.
pub(crate) fn causes<'a>(
    error: &'a (dyn std::error::Error + 'static),
) -> impl Iterator<Item = &'a (dyn std::error::Error + 'static)> {
    let next = |error: &&'a (dyn std::error::Error + 'static)| {
        let wrapped = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        wrapped
            .map(|wrapped| wrapped as &(dyn std::error::Error + 'static))
            .or_else(|| error.source())
    };
    // An error can be its own source.
    std::iter::successors(Some(error), next).take(32)
}

/// Makes the HTTP client. It adds the headers of the target to every request after the executor has recorded the
/// request, so that events do not hold them: they may be keys. A header that the request has is kept.
pub(crate) fn reqwest(target: &Target, args: &SendArgs) -> anyhow::Result<reqwest::Client> {
    // reqwest panics if the process has no default crypto provider. `install_default` fails if there is one already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut client = reqwest::Client::builder()
        .user_agent(concat!("tower-outbound-bulk/", env!("CARGO_PKG_VERSION")))
        .default_headers(target.headers.clone())
        .timeout(args.timeout)
        .connect_timeout(args.connect_timeout)
        // Redirects are not followed, so that one call is exactly one request, as the limits count it, and keys are
        // sent to no host except the given one.
        .redirect(reqwest::redirect::Policy::none());
    if target.is_local() {
        // If the environment names a proxy, the proxy cannot reach a provider inside this process.
        client = client.no_proxy();
    }
    if let Some(proxy) = &args.proxy {
        // The URL of a proxy may hold a password, which the error must not show.
        let proxy = reqwest::Proxy::all(proxy).map_err(|_| anyhow::anyhow!("--proxy is not the URL of a proxy"))?;
        client = client.proxy(proxy);
    }
    if args.http2 {
        client = client.http2_prior_knowledge();
    }
    if args.insecure {
        client = client.tls_danger_accept_invalid_certs(true);
    }
    #[cfg(unix)]
    if let Some(path) = &args.unix_socket {
        client = client.unix_socket(path.clone());
    }
    if let Some(path) = args.ca.as_ref().filter(|_| !args.insecure) {
        let crypto = Arc::new(rustls::crypto::ring::default_provider());
        client = client.tls_backend_preconfigured(trust::config(path, &crypto, args.http2)?);
    } else if target.is_plain_http() && !has_https_proxy(args) {
        // Without installed certificates the client could not be built, although http needs none.
        client = client.tls_certs_only([]);
    }
    client.build().context("cannot make a client")
}

/// Returns whether `--proxy` names a proxy with a certificate of its own.
fn has_https_proxy(args: &SendArgs) -> bool {
    let scheme = args.proxy.as_deref().and_then(|proxy| proxy.split_once("://"));
    scheme.is_some_and(|(scheme, _)| scheme.eq_ignore_ascii_case("https"))
}

impl fmt::Display for Untrusted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the certificate of the server is not trusted: {}", self.0)
    }
}

impl std::error::Error for Untrusted {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Args;
    use clap::Parser;

    fn client(command_line: &[&str]) -> anyhow::Result<reqwest::Client> {
        let args = Args::parse_from([&["bulk"], command_line].concat()).send;
        reqwest(&args.target()?, &args)
    }

    #[tokio::test]
    async fn an_https_request_to_a_closed_port_fails_to_connect() {
        let client = client(&[]).unwrap();
        let error = client.get("https://127.0.0.1:1/").send().await.unwrap_err();
        assert!(error.is_connect(), "{error:?}");
        assert_eq!(certificate_error(&error), None);
    }

    #[test]
    fn the_error_for_a_bad_proxy_does_not_show_it() {
        let error = format!("{:#}", client(&["--proxy", "nothing://user:secret@"]).unwrap_err());
        assert!(error.contains("--proxy") && !error.contains("secret"), "{error}");
    }

    #[test]
    fn the_certificate_of_a_proxy_is_checked_against_those_of_the_system_also_for_http() {
        let is_https = |proxy| has_https_proxy(&Args::parse_from(["bulk", "--proxy", proxy]).send);
        assert!(is_https("https://proxy.example:3128") && is_https("HTTPS://user:pw@proxy.example"));
        assert!(!is_https("http://proxy.example:3128") && !is_https("proxy.example:3128"));
    }

    #[test]
    fn a_content_type_is_added_to_a_body_only() {
        let typed = |request| with_content_type(request).headers().get(header::CONTENT_TYPE).cloned();
        assert_eq!(typed(Request::new(Bytes::new())), None);
        assert_eq!(typed(Request::new("{}".into())).unwrap(), "application/json");
        let text = Request::post("/")
            .header("content-type", "text/plain")
            .body("a".into())
            .unwrap();
        assert_eq!(typed(text).unwrap(), "text/plain");
    }
}
