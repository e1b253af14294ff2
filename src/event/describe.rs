//! [`Describe`]: what an event records of a request and of a response.
//!
//! [`Http`] describes http requests and responses, and [`Nothing`] records nothing of requests and responses of any
//! type. For requests and responses of your own types, implement [`Describe`].

use super::{
    details::{RequestDetails, ResponseDetails},
    request_id::RequestId,
    value::{Value, redacted_fields},
};
use crate::{
    error::BoxError,
    tokens::{ApiTokens, ApiTokensUsed},
};
use http::{HeaderName, StatusCode};
use std::{collections::BTreeMap, fmt, sync::Arc};

/// Chooses what an event records of a request and of its response.
///
/// The functions of [`Describe`] are called while a call is being made or polled, so they should not block. Secrets in
/// what they record are redacted.
///
/// ```
/// use tower_outbound::event::{Describe, EventLayer, RequestDetails, ResponseDetails};
///
/// struct Prompt(String);
///
/// #[derive(Clone)]
/// struct Prompts;
///
/// impl Describe<Prompt, String> for Prompts {
///     fn request(&self, prompt: &Prompt, details: &mut RequestDetails) {
///         details.payload(prompt.0.as_str());
///     }
///     fn response(&self, answer: &String, details: &mut ResponseDetails) {
///         details.body(answer.as_str());
///     }
/// }
///
/// let layer = EventLayer::queued().describe(Prompts);
/// ```
pub trait Describe<Req, Res> {
    /// Records a request, when its event is opened.
    fn request(&self, req: &Req, details: &mut RequestDetails);

    /// Records a response, and whether it counts as a failure. Called for the response to each attempt, and again for
    /// the response with which the call ends.
    fn response(&self, res: &Res, details: &mut ResponseDetails);

    /// Records the response that an error was made of. Called for the error of each attempt, and again for the error
    /// with which the call ends. Default: records nothing.
    fn error(&self, error: &BoxError, details: &mut ResponseDetails) {
        let _ = (error, details);
    }
}

/// Describes http requests and responses: method, URL, headers and status code. Bodies are not recorded.
///
/// Of an error that has a response ([`BadResponse`](crate::error::BadResponse),
/// [`RetryAfterTooLong`](crate::error::RetryAfterTooLong)), the headers and the status code are recorded as of any
/// response (feature `http`).
///
/// Extensions are recorded too: [`ApiTokens`], [`RequestId`], [`Metadata`], [`Payload`] and [`Model`] of the request, and
/// [`ApiTokensUsed`] of the response.
#[derive(Clone, Debug, Default)]
pub struct Http {
    redacted: Option<Arc<[HeaderName]>>,
    is_failure: Option<fn(StatusCode) -> bool>,
}

/// Describes http requests and responses as [`Http`] does, and records the response's body too: see
/// [`Http::response_body`].
#[derive(Clone, Debug)]
pub struct HttpWithBody<F> {
    http: Http,
    body: F,
}

/// Describes requests and responses of any type, and records nothing of them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Nothing;

/// Metadata of a call: keys and values that the caller chooses for its event. An extension of an http request.
///
/// An event keeps at most 1,000 metadata keys. Further keys are only counted, under the key `[more]`.
#[derive(Clone, Default, PartialEq)]
pub struct Metadata(pub BTreeMap<String, Value>);

/// What the event records as the request's body: an extension of an http request.
#[derive(Clone, PartialEq)]
pub struct Payload(pub Value);

/// The name of the model that a call is for, such as `gpt-4o`: an extension of an http request, which the call's event keeps
/// for [observers](super::Observer). It is not secret, and is not redacted.
///
/// ```
/// use tower_outbound::{Call, event::Model};
///
/// let mut request = http::Request::new("{}");
/// request.extensions_mut().insert(Model::from("gpt-4o"));
/// let call = Call::from(request);
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Model(pub(super) Arc<str>);

/// Marks a request that has a method only because an [`http::Request`] must have one, so that the method is not
/// recorded. An extension of the request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NoMethod;

// === impl Http ===

impl Http {
    /// Redacts the values of `header`, in addition to those of headers whose name suggests a credential.
    #[must_use]
    pub fn redact(mut self, header: HeaderName) -> Self {
        self.redacted = Some(self.redacted().iter().cloned().chain([header]).collect());
        self
    }

    /// Makes a response count as a failure if `is_failure` returns true for its status code: the event then ends as
    /// FAILED. Default: no response is a failure, and the event ends as COMPLETED with any status code.
    ///
    /// ```
    /// use tower_outbound::event::{EventLayer, Http};
    ///
    /// let layer = EventLayer::processing().describe(Http::default().fail_on(|status| status.is_server_error()));
    /// ```
    #[must_use]
    pub const fn fail_on(mut self, is_failure: fn(StatusCode) -> bool) -> Self {
        self.is_failure = Some(is_failure);
        self
    }

    /// Records the response's body, which `body` converts to a [`Value`].
    ///
    /// ```
    /// use tower_outbound::event::Http;
    ///
    /// let describe = Http::default().response_body(|body: &String| body.as_str().into());
    /// ```
    #[must_use]
    pub const fn response_body<R, F: Fn(&R) -> Value>(self, body: F) -> HttpWithBody<F> {
        HttpWithBody { http: self, body }
    }

    /// Records the response of an error of this crate that has one.
    #[cfg(feature = "http")]
    fn error_response(&self, error: &BoxError, details: &mut ResponseDetails) {
        use crate::error::{RetryAfterTooLong, transport::find};
        let response = find::<RetryAfterTooLong>(&**error).map(RetryAfterTooLong::response);
        #[cfg(feature = "json")]
        let response = response.or_else(|| Some(find::<crate::error::BadResponse>(&**error)?.response()));
        if let Some(response) = response {
            // Whether the status counts as a failure does not matter: the error is one.
            let plain = Self {
                is_failure: None,
                ..self.clone()
            };
            Describe::<http::Request<()>, _>::response(&plain, response, details);
        }
    }

    #[cfg(not(feature = "http"))]
    const fn error_response(&self, _: &BoxError, _: &mut ResponseDetails) {}

    fn redacted(&self) -> &[HeaderName] {
        self.redacted.as_deref().unwrap_or_default()
    }
}

impl<B, R> Describe<http::Request<B>, http::Response<R>> for Http {
    fn request(&self, req: &http::Request<B>, details: &mut RequestDetails) {
        let extensions = req.extensions();
        if extensions.get::<NoMethod>().is_none() {
            details.method(req.method());
        }
        details.url(req.uri());
        details.headers_redacting(req.headers(), self.redacted());
        if extensions.is_empty() {
            return;
        }
        if let Some(ApiTokens(tokens)) = extensions.get() {
            details.api_tokens(*tokens);
        }
        if let Some(id) = extensions.get::<RequestId>() {
            details.request_id(id.clone());
        }
        if let Some(Metadata(metadata)) = extensions.get() {
            details.metadata(metadata.clone());
        }
        if let Some(Payload(payload)) = extensions.get() {
            details.payload(payload.clone());
        }
        if let Some(model) = extensions.get::<Model>() {
            details.model(model.0.clone());
        }
    }

    fn response(&self, res: &http::Response<R>, details: &mut ResponseDetails) {
        details.status_code(res.status());
        if !details.code_only {
            details.headers_redacting(res.headers(), self.redacted());
            if let Some(used) = res.extensions().get::<ApiTokensUsed>().and_then(ApiTokensUsed::usage) {
                details.token_usage(used);
            }
        }
        if self.is_failure.is_some_and(|is_failure| is_failure(res.status())) {
            details.failure("HttpStatus", res.status().to_string());
        }
    }

    fn error(&self, error: &BoxError, details: &mut ResponseDetails) {
        self.error_response(error, details);
    }
}

impl<B, R, F: Fn(&R) -> Value> Describe<http::Request<B>, http::Response<R>> for HttpWithBody<F> {
    fn request(&self, req: &http::Request<B>, details: &mut RequestDetails) {
        Describe::<_, http::Response<R>>::request(&self.http, req, details);
    }

    fn response(&self, res: &http::Response<R>, details: &mut ResponseDetails) {
        Describe::<http::Request<B>, _>::response(&self.http, res, details);
        if !details.code_only {
            details.body((self.body)(res.body()));
        }
    }

    fn error(&self, error: &BoxError, details: &mut ResponseDetails) {
        self.http.error_response(error, details);
    }
}

// === impl Nothing ===

impl<Req, Res> Describe<Req, Res> for Nothing {
    fn request(&self, _: &Req, _: &mut RequestDetails) {}

    fn response(&self, _: &Res, _: &mut ResponseDetails) {}
}

// === impl Model ===

impl Model {
    /// Returns the name of the model.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl<T: Into<Arc<str>>> From<T> for Model {
    fn from(name: T) -> Self {
        Self(name.into())
    }
}

// === impl Metadata and Payload ===

/// Shows the keys and values as the event records them: with secrets redacted.
impl fmt::Debug for Metadata {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Metadata")
            .field(&redacted_fields(self.0.clone()))
            .finish()
    }
}

/// Shows the body as the event records it: with secrets redacted.
impl fmt::Debug for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Payload").field(&self.0.clone().redacted()).finish()
    }
}
