//! [`CheckLayer`]: makes a successful response whose body is not an answer an error of the call.

use super::{
    WholeBody,
    answer::{Defect, Expected},
    early_response::Delivered,
};
use crate::error::{BadResponse, BadResponseReason, BoxError, Reported};
use bytes::Bytes;
use http::{Request, Response};
use pin_project_lite::pin_project;
use std::{
    fmt,
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
};
use tower_layer::Layer;
use tower_service::Service;

/// Makes the error [`BadResponse`] of a response that has a successful status (2xx), but whose body is not an answer.
/// The layer is placed around a client whose bodies are in memory, such as that of a
/// [`CollectLayer`](super::CollectLayer), and below a retry layer: a [`RetryPolicy`](crate::retry::RetryPolicy) retries
/// those of these calls for which another attempt may succeed.
///
/// Gateways and proxies report failures with the status 200, and a stream has its status before it fails. Without this
/// layer, such a call counts as done.
///
/// # What is not an answer
///
/// - A JSON document that reports an error: an `error` (an object or a text) and no answer beside it, the `type` or
///   `object` `error`, choices that all ended with an error, a response of OpenAI's Responses API that is `failed` or
///   `cancelled`, `errors` beside a `data` that is null. An answer that was cut off at the longest length that the
///   request allows (`incomplete`, `length`, `max_tokens`) is an answer.
/// - A stream of server-sent events, or of JSON documents in lines, with such a document or with an event `error`.
/// - A stream without its end: in OpenAI's chat format, `[DONE]` (or, if the documents do not name their format, a
///   `finish_reason` of each choice that has begun); in that of its Responses API, `response.completed` or
///   `response.incomplete`; in Anthropic's, `message_stop`; in Gemini's, a `finishReason` of each candidate that has
///   begun; in Ollama's, `done`; in Cohere's, `message-end` or `stream-end`. In other formats, the end cannot be told.
/// - A stream with nothing but its end, and a completion without a choice.
/// - A body that breaks off: in the middle of a JSON document, or before its content length.
/// - A body that is not JSON, if its content type says so, or if it has no content type and the request asks for JSON:
///   by its header `accept`, or by having a JSON body itself. If `accept` names nothing but JSON, a text is not an
///   answer, either.
/// - An HTML page, unless the request may ask for one: it has neither a JSON body nor an `accept` without HTML.
/// - An empty body in a response to a `GET` or `POST`, if its content type is JSON, a stream, audio, an image or a
///   video. Without such a content type, if the status is 200, and the request asks for JSON by `accept`, or is a `POST`
///   with a JSON body. The responses 204 and 205 and those to `HEAD` need no body.
///
/// Everything else is an answer: texts, audio, images, and any body with a `content-encoding` that the client has not
/// decoded. A response that is not a success (4xx, 5xx) is passed on, as is a body that is [not in
/// memory](WholeBody), and one that was [streamed](super#streams) to the caller.
///
/// # Example
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use bytes::Bytes;
/// use http::{Request, Response};
/// use tower::{ServiceBuilder, ServiceExt, service_fn};
/// use tower_outbound::{body::CheckLayer, error::{BadResponse, BadResponseReason}};
///
/// // A gateway that reports the failure of the provider behind it with the status 200.
/// let gateway = service_fn(async |_: Request<String>| {
///     let body = r#"{"error":{"message":"Provider returned error","code":502}}"#;
///     Ok::<_, std::io::Error>(Response::new(Bytes::from(body)))
/// });
/// let client = ServiceBuilder::new().layer(CheckLayer::new()).service(gateway);
///
/// let error = client.oneshot(Request::post("/v1/chat/completions").body("{}".to_owned())?).await.unwrap_err();
/// let error = error.downcast_ref::<BadResponse>().expect("no answer");
/// assert_eq!(error.reason(), BadResponseReason::ReportedError);
/// assert_eq!((error.message(), error.is_transient()), (Some("Provider returned error"), true));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct CheckLayer(());

/// The service of [`CheckLayer`].
///
/// # Errors
///
/// Returns the errors of the client, and [`BadResponse`] in place of a successful response that is not an answer.
#[derive(Clone, Debug)]
pub struct Check<S> {
    inner: S,
}

pin_project! {
    /// The future of [`Check`]: makes the call, and checks the body of its response.
    ///
    /// # Panics
    ///
    /// Panics when polled after it has completed.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future ends the call.
    #[must_use = "futures do nothing unless polled"]
    pub struct ResponseFuture<F> {
        #[pin]
        future: F,
        expected: Expected,
        // Tells whether the caller has the response already, and this service only a copy of it without its body.
        delivered: Option<Delivered>,
    }
}

// === impl CheckLayer ===

impl CheckLayer {
    /// Creates the layer, which has no settings.
    #[must_use]
    pub const fn new() -> Self {
        Self(())
    }
}

impl<S> Layer<S> for CheckLayer {
    type Service = Check<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Check { inner }
    }
}

// === impl Check ===

impl<S, B, R> Service<Request<B>> for Check<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    S::Error: Into<BoxError>,
    B: WholeBody,
    R: WholeBody,
{
    type Response = Response<R>;
    type Error = BoxError;
    type Future = ResponseFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, req: Request<B>) -> Self::Future {
        ResponseFuture {
            expected: Expected::of(&req, req.body().whole()),
            delivered: Delivered::of(&req),
            future: self.inner.call(req),
        }
    }
}

// === impl ResponseFuture ===

impl<F, R, E> Future for ResponseFuture<F>
where
    F: Future<Output = Result<Response<R>, E>>,
    E: Into<BoxError>,
    R: WholeBody,
{
    type Output = Result<Response<R>, BoxError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let response = ready!(this.future.poll(cx)).map_err(Into::into)?;
        let is_delivered = this.delivered.as_ref().is_some_and(Delivered::is_set);
        let is_checked = response.status().is_success() && !is_delivered;
        let whole = response.body().whole().filter(|_| is_checked);
        let Some(Err(defect)) = whole.map(|body| this.expected.check(&response, body)) else {
            return Poll::Ready(Ok(response));
        };
        let body = whole.map(Bytes::copy_from_slice).unwrap_or_default();
        Poll::Ready(Err(defect.of(response.map(|_| body)).into()))
    }
}

impl<F> fmt::Debug for ResponseFuture<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("body::check::ResponseFuture").finish_non_exhaustive()
    }
}

// === impl Defect ===

impl Defect {
    /// Returns the error of a response whose body has this defect.
    fn of(self, response: Response<Bytes>) -> BadResponse {
        let (reason, reported) = match self {
            Self::Empty => (BadResponseReason::Empty, Reported::default()),
            Self::Html => (BadResponseReason::Html, Reported::default()),
            Self::NotJson => (BadResponseReason::NotJson, Reported::default()),
            Self::Truncated => (BadResponseReason::Truncated, Reported::default()),
            Self::Reported(error) => {
                let reported = Reported {
                    is_final: !error.is_transient(),
                    code: error.code,
                    message: error.message,
                    status: error.status,
                };
                (BadResponseReason::ReportedError, reported)
            }
        };
        BadResponse::new(reason, reported, response)
    }
}
