//! [`Reqwest`]: a reqwest client as a service of http requests.

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

/// A [`reqwest::Client`] as a service from http requests to http responses, for the
/// [`Executor`](crate::Executor) and for every layer that takes one.
///
/// The request's body may be anything that reqwest can send: `String`, `Vec<u8>`, `Bytes`, [`reqwest::Body`]. The
/// response's is a [`reqwest::Body`], which streams.
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
/// Its own, among them a URL that is none. Their texts have the URL in them, which is redacted in events.
#[derive(Clone, Default)]
pub struct Reqwest {
    client: Client,
}

pin_project! {
    /// A call made by reqwest.
    ///
    /// # Cancel safety
    ///
    /// Dropping it ends the call.
    #[must_use = "futures do nothing unless polled"]
    pub struct ResponseFuture {
        #[pin]
        state: State<<Client as Service<reqwest::Request>>::Future>,
    }
}

pin_project! {
    #[project = StateProj]
    enum State<F> {
        /// It is no request.
        Refused { error: Option<Error> },
        Calling { #[pin] future: F },
    }
}

impl Reqwest {
    /// This client.
    #[must_use]
    pub const fn new(client: Client) -> Self {
        Self { client }
    }
}

/// Without the client's default headers, which may be credentials.
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
            Err(error) => State::Refused { error: Some(error) },
        };
        ResponseFuture { state }
    }
}

impl Future for ResponseFuture {
    type Output = Result<Response<Body>, Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project().state.project() {
            StateProj::Refused { error } => {
                let error = error.take().expect("a future is not polled after it was ready");
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
