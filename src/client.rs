//! [`Reqwest`]: a reqwest client as a Tower service of http requests.

use http::{Request, Response};
use pin_project_lite::pin_project;
use reqwest::{Body, Client, Error};
use std::{
    fmt,
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};
use tower_service::Service;

/// A [`reqwest::Client`] as a Tower service that takes an [`http::Request`] and returns an [`http::Response`], for the
/// [`Executor`](crate::Executor) and for any layer that wraps such a service.
///
/// The body of a request is anything that reqwest can send: `String`, `Vec<u8>`, `Bytes`, [`reqwest::Body`]. The body
/// of a response is a [`reqwest::Body`], which is read from the connection as it is polled.
///
/// Clients other than reqwest's need no adapter if they are already services from [`http::Request`] to
/// [`http::Response`], as hyper's are.
///
/// ```
/// use tower_outbound::{Executor, client::Reqwest};
///
/// let executor = Executor::builder().build_streaming::<_, String, _>(Reqwest::default())?;
/// # Ok::<_, tower_outbound::error::InvalidConfig>(())
/// ```
///
/// # Errors
///
/// The service returns reqwest's errors, also if reqwest cannot send a request, for example because its URL has no
/// host. An error's text contains the URL. Events record the text with the URL's secrets redacted.
#[derive(Clone, Default)]
pub struct Reqwest {
    client: Client,
}

pin_project! {
    /// The response future of [`Reqwest`], which completes when the head of the response has arrived. The body is read
    /// afterwards.
    ///
    /// # Panics
    ///
    /// May panic when polled after it has completed.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future ends the call.
    #[must_use = "futures do nothing unless polled"]
    pub struct ResponseFuture {
        #[pin]
        state: State<<Client as Service<reqwest::Request>>::Future>,
    }
}

pin_project! {
    #[project = StateProj]
    enum State<F> {
        /// The http request cannot be sent by reqwest, for example because its URL has no host.
        Invalid { error: Option<Error> },
        Calling { #[pin] future: F },
    }
}

impl Reqwest {
    /// Creates a service from a reqwest client. Clones of the service share the client's connections.
    #[must_use]
    pub const fn new(client: Client) -> Self {
        Self { client }
    }
}

/// Writes `Reqwest` without the client's default headers, which may contain credentials.
impl fmt::Debug for Reqwest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reqwest").finish_non_exhaustive()
    }
}

impl From<Client> for Reqwest {
    fn from(client: Client) -> Self {
        Self::new(client)
    }
}

impl<B: Into<Body>> Service<Request<B>> for Reqwest {
    type Response = Response<Body>;
    type Error = Error;
    type Future = ResponseFuture;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Service::<reqwest::Request>::poll_ready(&mut self.client, cx)
    }

    fn call(&mut self, req: Request<B>) -> Self::Future {
        let state = match req.try_into() {
            Ok(request) => State::Calling {
                future: Service::<reqwest::Request>::call(&mut self.client, request),
            },
            Err(error) => State::Invalid { error: Some(error) },
        };
        ResponseFuture { state }
    }
}

impl Future for ResponseFuture {
    type Output = Result<Response<Body>, Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project().state.project() {
            StateProj::Invalid { error } => {
                let error = error.take().expect("`ResponseFuture` polled after completion");
                Poll::Ready(Err(error))
            }
            StateProj::Calling { future } => future.poll(cx).map_ok(Response::from),
        }
    }
}

impl fmt::Debug for ResponseFuture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("client::ResponseFuture").finish_non_exhaustive()
    }
}
