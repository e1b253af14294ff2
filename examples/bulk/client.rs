//! A reqwest client as a Tower service.

use http::{HeaderMap, HeaderValue, Request, Response, Uri, header};
use hyper::body::Bytes;
use std::time::Duration;
use tower::Service;

/// A client that collects the body inside the call, so that a call's permit and its event last until the answer is
/// whole.
pub(crate) fn service(
    client: reqwest::Client,
) -> impl Service<
    Request<Bytes>,
    Response = Response<Bytes>,
    Error = reqwest::Error,
    Future = impl Future<Output = Result<Response<Bytes>, reqwest::Error>> + Send,
> + Clone
+ Send {
    tower::service_fn(move |request: Request<Bytes>| {
        let client = client.clone();
        async move {
            // Results and messages are no place for a URL: there may be a key in it.
            send(&client, request).await.map_err(reqwest::Error::without_url)
        }
    })
}

async fn send(client: &reqwest::Client, request: Request<Bytes>) -> reqwest::Result<Response<Bytes>> {
    let response = client.execute(request.try_into()?).await?;
    let (status, headers) = (response.status(), response.headers().clone());
    let mut whole = Response::new(response.bytes().await?);
    *whole.status_mut() = status;
    *whole.headers_mut() = headers;
    Ok(whole)
}

/// The client itself. `headers` go with every request; the executor never sees them.
pub(crate) fn reqwest(
    mut headers: HeaderMap,
    timeout: Duration,
    url: &Uri,
    local: bool,
) -> reqwest::Result<reqwest::Client> {
    headers
        .entry(header::CONTENT_TYPE)
        .or_insert(HeaderValue::from_static("application/json"));
    let mut client = reqwest::Client::builder()
        .user_agent(concat!("tower-outbound-bulk/", env!("CARGO_PKG_VERSION")))
        .default_headers(headers)
        .timeout(timeout)
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
