//! [`Call`], which is submitted to an executor; [`CallHandle`] and [`TrySubmitError`], which submitting it returns.

use super::{
    call_future::CallFuture,
    closure::{Closure, IntoHttpResponse},
};
use crate::{
    deadline::Deadline,
    error::{BoxError, Error, Refused},
    event::{EventHandle, Metadata, NoMethod, Payload, RequestId, Value},
    rate::Cost,
    schedule::Flow,
    tokens::ApiTokens,
};
use http::{HeaderName, HeaderValue, Method, Request, Response, Uri};
use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

/// A call to submit to an [`Executor`](super::Executor): an http request, with settings for the executor and for the
/// call's event.
///
/// Any [`http::Request`] converts into a `Call`. The settings are kept in the extensions of the request ([`Cost`],
/// [`ApiTokens`], [`Deadline`], [`Metadata`], [`RequestId`], [`Payload`]), and can also be inserted there directly.
///
/// ```
/// use tower_outbound::Call;
///
/// let request = http::Request::post("http://localhost/v1/chat").body(String::from("{}"))?;
/// let call = Call::from(request).tokens(1_200).metadata("task_id", 7).request_id("task-7");
/// # Ok::<_, http::Error>(())
/// ```
///
/// A `Call` can also be created from a closure: see [`Call::new`].
#[must_use = "a call does nothing until it is submitted"]
pub struct Call<B> {
    request: Result<Request<B>, http::Error>,
}

/// A submitted call: a future that resolves to the response. The call's [event](Self::event) can be read at once.
///
/// # Errors
///
/// Awaiting the handle returns the client's error, or an error created by the executor or a layer. These methods
/// recognize errors of the executor: [`is_cancelled`](Error::is_cancelled), [`is_panicked`](Error::is_panicked),
/// [`is_deadline_exceeded`](Error::is_deadline_exceeded) and [`is_store_unavailable`](Error::is_store_unavailable).
///
/// # Panics
///
/// The handle may panic when it is polled after it has completed.
///
/// # Cancel safety
///
/// Dropping the handle lets the call run on, unless [`cancel_on_drop`](Self::cancel_on_drop) was called. [`cancel`](Self::cancel)
/// ends the call.
#[must_use = "a future: await it for the response, or drop it explicitly to let the call run on"]
pub struct CallHandle<B, R> {
    future: CallFuture<B, R>,
}

/// The reason why [`try_submit`](super::Executor::try_submit) did not submit a call.
#[non_exhaustive]
#[allow(clippy::large_enum_variant, reason = "it hands the request back")]
pub enum TrySubmitError<B> {
    /// The queue is full or closed. [`Refused`] holds the request.
    Refused(Refused<Request<B>>),
    /// Any other reason, for example that the executor is not running or that the URL is malformed.
    Other(Error),
}

// === impl Call ===

impl<R> Call<Closure<R>> {
    /// Creates a call that a closure makes, for an executor [built for
    /// closures](super::ExecutorBuilder::build_for_closures).
    ///
    /// The closure returns `(status, headers, body)`, `(status, body)` or an [`http::Response`], or fails with an error
    /// of any type; the call's event records the error's type, message and chain of sources. The closure is called once
    /// for each attempt.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use tower_outbound::{Call, Executor};
    ///
    /// let executor = Executor::builder().build_for_closures::<String>()?;
    /// executor.start()?;
    ///
    /// let fetch = || async {
    ///     Ok::<_, std::io::Error>((200, [("content-type", "text/plain")], String::from("hello")))
    /// };
    /// let call = Call::new(fetch).url("http://localhost/data").method("GET").tokens(5).metadata("task_id", 1);
    /// let response = executor.submit(call).await?.await?;
    /// assert_eq!(response.body(), "hello");
    /// # Ok(())
    /// # }
    /// ```
    pub fn new<F, Fut, T, E>(call: F) -> Self
    where
        F: Fn() -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<T, E>> + Send + 'static,
        T: IntoHttpResponse<R>,
        E: Into<BoxError> + 'static,
    {
        Self::from(Request::new(Closure::new(call))).extension(NoMethod)
    }
}

impl<B> Call<B> {
    /// Sets how many of the API's tokens the call is expected to use. Default: none, unless the executor's [cost
    /// function](super::ExecutorBuilder::cost) estimates them.
    ///
    /// Limits of input tokens and of output tokens are each charged all of them, since either kind may be all of them. Use
    /// [`cost`](Self::cost) to tell them apart.
    pub fn tokens(self, tokens: u64) -> Self {
        self.extension(ApiTokens(tokens))
    }

    /// Sets what the call takes of each budget that is limited. Replaces [`tokens`](Self::tokens). Default: one request
    /// and those tokens, unless the executor's [cost function](super::ExecutorBuilder::cost) estimates them.
    ///
    /// A cost function of your own is used instead, and may read the cost from the request's extensions.
    ///
    /// ```
    /// use tower_outbound::{Call, Cost};
    ///
    /// let request = http::Request::post("http://localhost/v1/images").body(String::from("{}"))?;
    /// let call = Call::from(request).cost(Cost::input_output_tokens(900, 300).with("images", 2));
    /// # Ok::<_, http::Error>(())
    /// ```
    pub fn cost(self, cost: Cost) -> Self {
        self.extension(cost)
    }

    /// Sets whose call it is, for an executor with a [schedule](super::ExecutorBuilder::schedule): one key for each of its
    /// levels, the outermost first. Default: the call belongs to the flow of all calls that name none.
    pub fn flow(self, flow: impl Into<Flow>) -> Self {
        self.change(|request| {
            let before = request.extensions_mut().remove::<Flow>().unwrap_or_default();
            request.extensions_mut().insert(before.with_keys(flow.into()));
        })
    }

    /// Sets the class of the call, for an executor with a [schedule](super::ExecutorBuilder::schedule). Default: the first
    /// class of the schedule.
    pub fn class(self, class: impl Into<Arc<str>>) -> Self {
        self.change(|request| {
            let flow = request.extensions_mut().remove::<Flow>().unwrap_or_default();
            request.extensions_mut().insert(flow.class(class));
        })
    }

    /// Sets how long the call may take, from when `timeout` is called until the call has ended. Default: the [timeout
    /// of the executor](super::ExecutorBuilder::timeout).
    pub fn timeout(self, timeout: Duration) -> Self {
        self.deadline(Deadline::after(timeout))
    }

    /// Sets the instant by which the call has to end. Replaces a [`timeout`](Self::timeout) set before.
    pub fn deadline(self, deadline: Deadline) -> Self {
        self.extension(deadline)
    }

    /// Adds a key and a value to the metadata of the call's event.
    pub fn metadata(self, key: impl Into<String>, value: impl Into<Value>) -> Self {
        self.change(|request| {
            let Metadata(metadata) = request.extensions_mut().get_or_insert_default();
            metadata.insert(key.into(), value.into());
        })
    }

    /// Sets the id that the call's event has. Default: a random UUID.
    pub fn request_id(self, id: impl Into<RequestId>) -> Self {
        self.extension(id.into())
    }

    /// Sets what the call's event records as the body of the request. Default: nothing.
    pub fn payload(self, payload: impl Into<Value>) -> Self {
        self.extension(Payload(payload.into()))
    }

    /// Sets the URL of the request. If the URL is malformed, submitting the call fails.
    pub fn url<U: TryInto<Uri, Error: Into<http::Error>>>(self, url: U) -> Self {
        self.try_change(|request| {
            *request.uri_mut() = url.try_into().map_err(Into::into)?;
            Ok(())
        })
    }

    /// Sets the http method of the request. If the method is malformed, submitting the call fails.
    pub fn method<M: TryInto<Method, Error: Into<http::Error>>>(self, method: M) -> Self {
        self.try_change(|request| {
            *request.method_mut() = method.try_into().map_err(Into::into)?;
            request.extensions_mut().remove::<NoMethod>();
            Ok(())
        })
    }

    /// Adds a header to the request. If its name or value is malformed, submitting the call fails.
    pub fn header<K, V>(self, name: K, value: V) -> Self
    where
        K: TryInto<HeaderName, Error: Into<http::Error>>,
        V: TryInto<HeaderValue, Error: Into<http::Error>>,
    {
        self.try_change(|request| {
            let (name, value) = (
                name.try_into().map_err(Into::into)?,
                value.try_into().map_err(Into::into)?,
            );
            request.headers_mut().append(name, value);
            Ok(())
        })
    }

    fn extension<T: Clone + Send + Sync + 'static>(self, extension: T) -> Self {
        self.change(|request| {
            request.extensions_mut().insert(extension);
        })
    }

    fn change(mut self, change: impl FnOnce(&mut Request<B>)) -> Self {
        if let Ok(request) = &mut self.request {
            change(request);
        }
        self
    }

    fn try_change(self, change: impl FnOnce(&mut Request<B>) -> Result<(), http::Error>) -> Self {
        let request = self
            .request
            .and_then(|mut request| change(&mut request).map(|()| request));
        Self { request }
    }

    /// Returns the http request of the call, with the call's settings in its extensions.
    ///
    /// # Errors
    ///
    /// The first error from [`url`](Self::url), [`method`](Self::method) or [`header`](Self::header).
    pub fn into_request(self) -> Result<Request<B>, http::Error> {
        self.request
    }
}

impl<B> From<Request<B>> for Call<B> {
    fn from(request: Request<B>) -> Self {
        Self { request: Ok(request) }
    }
}

impl<B> fmt::Debug for Call<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("Call");
        match &self.request {
            Ok(request) => debug
                .field("method", request.method())
                .field("host", &request.uri().host()),
            Err(error) => debug.field("error", error),
        };
        debug.finish_non_exhaustive()
    }
}

// === impl CallHandle ===

impl<B, R> CallHandle<B, R> {
    /// Creates a handle whose drop lets the call run on.
    pub(super) fn new(future: CallFuture<B, R>) -> Self {
        Self {
            future: future.detached(),
        }
    }

    /// Returns the call's event.
    #[must_use]
    pub const fn event(&self) -> &EventHandle {
        self.future.event()
    }

    /// Returns the id of the call, which is also in the call's event.
    #[must_use]
    pub fn request_id(&self) -> RequestId {
        self.event().request_id()
    }

    /// Ends the call. If the call is queued, its place is free at once. If the call is running, it is dropped, and the
    /// next frame of a streamed response body that has not ended is the error [`Cancelled`](crate::error::Cancelled).
    /// The event ends with the status CANCELLED, unless the call had ended before.
    pub fn cancel(&self) {
        self.future.cancel();
    }

    /// Makes dropping this handle [cancel](Self::cancel) the call, instead of letting it run on: for a caller that waits in the
    /// name of another, such as the handler of a server's request, which is dropped when the client goes away. Once the handle
    /// has returned a streamed response, dropping the response's body cancels the call, as it always does.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use tower_outbound::{Call, Executor};
    /// # let executor = Executor::builder().build_for_closures::<String>()?;
    /// # executor.start()?;
    /// let call = Call::new(std::future::pending::<Result<(u16, String), std::io::Error>>);
    /// let call = executor.submit(call).await?.cancel_on_drop();
    /// let event = call.event().clone();
    /// drop(call);
    /// assert_eq!(event.finished().await.status.to_string(), "CANCELLED");
    /// # Ok(())
    /// # }
    /// ```
    pub fn cancel_on_drop(self) -> Self {
        Self {
            future: self.future.attached(),
        }
    }
}

impl<B, R> Future for CallHandle<B, R> {
    type Output = Result<Response<R>, Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.future).poll(cx)
    }
}

impl<B, R> fmt::Debug for CallHandle<B, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CallHandle")
            .field("event", self.event())
            .finish_non_exhaustive()
    }
}

// === impl TrySubmitError ===

impl<B> TrySubmitError<B> {
    /// Whether the call was refused because the queue was full.
    #[must_use]
    pub const fn is_full(&self) -> bool {
        matches!(self, Self::Refused(refused) if refused.is_full())
    }

    /// Returns the time after which a retry may succeed: [`Refused::retry_after`] of a full queue, or
    /// [`Error::retry_after`]. The time is never zero. `None` if a retry cannot help, or if the time is not known.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Refused(refused) => refused.retry_after(),
            Self::Other(error) => error.retry_after(),
        }
    }

    /// Returns the request if the queue refused it, and `None` if the call failed for any other reason.
    #[must_use]
    pub fn into_request(self) -> Option<Request<B>> {
        match self {
            Self::Refused(refused) => Some(refused.into_request()),
            Self::Other(_) => None,
        }
    }
}

impl<B> From<Error> for TrySubmitError<B> {
    fn from(error: Error) -> Self {
        Self::Other(error)
    }
}

impl<B> fmt::Display for TrySubmitError<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(refused) => refused.fmt(f),
            Self::Other(error) => error.fmt(f),
        }
    }
}

impl<B> fmt::Debug for TrySubmitError<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(refused) => f.debug_tuple("Refused").field(refused).finish(),
            Self::Other(error) => f.debug_tuple("Other").field(error).finish(),
        }
    }
}

impl<B> std::error::Error for TrySubmitError<B> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Refused(_) => None,
            Self::Other(error) => error.source(),
        }
    }
}
