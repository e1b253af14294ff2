//! Calls made by closures: the body of the request is a [`Closure`], which [`ClosureClient`] calls.

use crate::{error::BoxError, event};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode};
use std::{
    any::type_name,
    collections::{BTreeMap, HashMap},
    fmt,
    future::Future,
    marker::PhantomData,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};
use tower_service::Service;

type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// A closure that makes a call and returns its response: the body of a request to a [`ClosureClient`].
///
/// Clones share one closure, which is called once for each attempt.
pub struct Closure<R> {
    call: Arc<dyn Fn() -> BoxFuture<Result<Response<R>, BoxError>> + Send + Sync>,
}

/// A client for requests whose body is a [`Closure`]: it calls the closure and returns the closure's response.
pub struct ClosureClient<R> {
    response: PhantomData<fn() -> R>,
}

/// A value that a closure may return: `(status, headers, body)`, `(status, body)` or an [`http::Response`].
///
/// The status is a number or a [`StatusCode`]. The headers are a [`HeaderMap`], or pairs of name and value in an array,
/// a vector or a map.
pub trait IntoHttpResponse<R> {
    /// Converts the value into a response.
    ///
    /// # Errors
    ///
    /// Returns [`http::Error`] if the status code, or the name or value of a header, is invalid.
    fn into_http_response(self) -> Result<Response<R>, http::Error>;
}

/// Headers that a closure may return: a [`HeaderMap`], or pairs of name and value in an array, a vector or a map.
pub trait IntoHeaderMap {
    /// Converts the value into a header map.
    ///
    /// # Errors
    ///
    /// Returns [`http::Error`] if the name or the value of a header is invalid.
    fn into_header_map(self) -> Result<HeaderMap, http::Error>;
}

// === impl Closure ===

impl<R> Closure<R> {
    pub(super) fn new<F, Fut, T, E>(call: F) -> Self
    where
        F: Fn() -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<T, E>> + Send + 'static,
        T: IntoHttpResponse<R>,
        E: Into<BoxError> + 'static,
    {
        let call = move || -> BoxFuture<Result<Response<R>, BoxError>> {
            let future = call();
            Box::pin(async move { future.await.map_err(boxed)?.into_http_response().map_err(boxed) })
        };
        Self { call: Arc::new(call) }
    }
}

impl<R> Clone for Closure<R> {
    fn clone(&self) -> Self {
        Self {
            call: self.call.clone(),
        }
    }
}

impl<R> fmt::Debug for Closure<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Closure")
    }
}

/// Boxes an error that a closure returned. Records the name of the error's type in the current event, because the box
/// hides the type.
fn boxed<E: Into<BoxError> + 'static>(error: E) -> BoxError {
    if let Some(event) = event::current() {
        event.set_error_type(type_name::<E>());
    }
    error.into()
}

// === impl ClosureClient ===

impl<R> ClosureClient<R> {
    /// Creates a client that calls closures. It has no settings.
    #[must_use]
    pub const fn new() -> Self {
        Self { response: PhantomData }
    }
}

impl<R> Service<Request<Closure<R>>> for ClosureClient<R> {
    type Response = Response<R>;
    type Error = BoxError;
    type Future = BoxFuture<Result<Response<R>, BoxError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, req: Request<Closure<R>>) -> Self::Future {
        (req.body().call)()
    }
}

impl<R> Clone for ClosureClient<R> {
    fn clone(&self) -> Self {
        Self::new()
    }
}

impl<R> Default for ClosureClient<R> {
    fn default() -> Self {
        Self::new()
    }
}

impl<R> fmt::Debug for ClosureClient<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClosureClient")
    }
}

// === impl IntoHttpResponse ===

impl<R> IntoHttpResponse<R> for Response<R> {
    fn into_http_response(self) -> Result<Self, http::Error> {
        Ok(self)
    }
}

impl<S, R> IntoHttpResponse<R> for (S, R)
where
    S: TryInto<StatusCode, Error: Into<http::Error>>,
{
    fn into_http_response(self) -> Result<Response<R>, http::Error> {
        (self.0, HeaderMap::new(), self.1).into_http_response()
    }
}

impl<S, H, R> IntoHttpResponse<R> for (S, H, R)
where
    S: TryInto<StatusCode, Error: Into<http::Error>>,
    H: IntoHeaderMap,
{
    fn into_http_response(self) -> Result<Response<R>, http::Error> {
        let (status, headers, body) = self;
        let mut response = Response::new(body);
        *response.status_mut() = status.try_into().map_err(Into::into)?;
        *response.headers_mut() = headers.into_header_map()?;
        Ok(response)
    }
}

// === impl IntoHeaderMap ===

impl IntoHeaderMap for HeaderMap {
    fn into_header_map(self) -> Result<HeaderMap, http::Error> {
        Ok(self)
    }
}

impl<K, V, const N: usize> IntoHeaderMap for [(K, V); N]
where
    K: TryInto<HeaderName, Error: Into<http::Error>>,
    V: TryInto<HeaderValue, Error: Into<http::Error>>,
{
    fn into_header_map(self) -> Result<HeaderMap, http::Error> {
        collect(self)
    }
}

impl<K, V> IntoHeaderMap for Vec<(K, V)>
where
    K: TryInto<HeaderName, Error: Into<http::Error>>,
    V: TryInto<HeaderValue, Error: Into<http::Error>>,
{
    fn into_header_map(self) -> Result<HeaderMap, http::Error> {
        collect(self)
    }
}

impl<K, V, S> IntoHeaderMap for HashMap<K, V, S>
where
    K: TryInto<HeaderName, Error: Into<http::Error>>,
    V: TryInto<HeaderValue, Error: Into<http::Error>>,
{
    fn into_header_map(self) -> Result<HeaderMap, http::Error> {
        collect(self)
    }
}

impl<K, V> IntoHeaderMap for BTreeMap<K, V>
where
    K: TryInto<HeaderName, Error: Into<http::Error>>,
    V: TryInto<HeaderValue, Error: Into<http::Error>>,
{
    fn into_header_map(self) -> Result<HeaderMap, http::Error> {
        collect(self)
    }
}

fn collect<K, V>(pairs: impl IntoIterator<Item = (K, V)>) -> Result<HeaderMap, http::Error>
where
    K: TryInto<HeaderName, Error: Into<http::Error>>,
    V: TryInto<HeaderValue, Error: Into<http::Error>>,
{
    let mut headers = HeaderMap::new();
    for (name, value) in pairs {
        headers.append(
            name.try_into().map_err(Into::into)?,
            value.try_into().map_err(Into::into)?,
        );
    }
    Ok(headers)
}
