//! What to record of a request and of what came back: [`Describe`].
//!
//! [`Http`] does it for http requests and responses, [`Nothing`] for any types; your own types are described by your
//! own [`Describe`]. Everything goes through setters that redact, so that no description can record a secret by
//! accident.

use super::{
    record::RequestId,
    value::{Value, redacted_fields},
};
use crate::{
    error::{
        BodyFailed, BodyTooLarge, BoxError, Cancelled, Closed, CostExceedsBurst, DeadlineExceeded, Panicked,
        RetryAfterTooLong, causes,
    },
    redact,
    tokens::{ApiTokens, ApiTokensUsed},
};
use http::{HeaderMap, HeaderName, Method, StatusCode, Uri};
use std::{
    any::type_name,
    collections::BTreeMap,
    fmt::{self, Write as _},
    sync::Arc,
};
use tracing::Span;

/// Tells what to record of a request and its response.
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
    /// What to record of a request, when its event is opened.
    fn request(&self, req: &Req, details: &mut RequestDetails);

    /// What to record of a response, and whether it is a failure.
    fn response(&self, res: &Res, details: &mut ResponseDetails);
}

/// Http requests and responses: method, URL, headers and status code, and what the request's extensions say
/// ([`ApiTokens`], [`RequestId`], [`Metadata`] and [`Payload`]), and the response's ([`ApiTokensUsed`]). Bodies are not
/// recorded.
#[derive(Clone, Debug, Default)]
pub struct Http {
    redacted: Option<Arc<[HeaderName]>>,
    is_failure: Option<fn(StatusCode) -> bool>,
}

/// [`Http`], and the response's body: see [`Http::response_body`].
#[derive(Clone, Debug)]
pub struct HttpWithBody<F> {
    http: Http,
    body: F,
}

/// Requests and responses of any type, of which nothing is recorded.
#[derive(Clone, Copy, Debug, Default)]
pub struct Nothing;

/// Keys and values of the caller's own, for the event: an extension of an http request.
#[derive(Clone, Default, PartialEq)]
pub struct Metadata(pub BTreeMap<String, Value>);

/// The body as it is to be recorded in the event: an extension of an http request.
#[derive(Clone, PartialEq)]
pub struct Payload(pub Value);

/// The request's method is only there because a request has to have one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NoMethod;

/// What is recorded of a request.
#[derive(Default)]
pub struct RequestDetails {
    pub(super) request_id: Option<RequestId>,
    pub(super) method: Option<Method>,
    /// As it came: it is redacted whenever it is snapshot.
    pub(super) url: Option<Uri>,
    pub(super) api_tokens: u64,
    pub(super) rest: Option<Box<RequestRest>>,
}

/// What many requests do not have.
#[derive(Default)]
pub(super) struct RequestRest {
    pub(super) headers: HeaderMap,
    pub(super) payload: Option<Value>,
    pub(super) metadata: BTreeMap<String, Value>,
}

/// What is recorded of a response.
#[derive(Debug, Default)]
pub struct ResponseDetails {
    pub(super) status_code: Option<u16>,
    /// Of one attempt among others only the code is kept.
    code_only: bool,
    pub(super) rest: Option<Box<ResponseRest>>,
}

/// What many responses do not have.
#[derive(Debug, Default)]
pub(super) struct ResponseRest {
    pub(super) headers: HeaderMap,
    pub(super) body: Option<Value>,
    pub(super) api_tokens_used: Option<u64>,
    /// The response counts as a failure.
    pub(super) failure: Option<ErrorDetails>,
}

/// What is recorded of an error.
#[derive(Debug)]
pub(crate) struct ErrorDetails {
    pub(super) kind: String,
    pub(super) kind_is_known: bool,
    pub(super) message: String,
    pub(super) details: Option<String>,
}

/// The number of keys an event keeps; later ones are counted under [`MORE`].
const MOST_METADATA: usize = 1_000;
const MORE: &str = "[more]";

// === impl Http ===

impl Http {
    /// The value of this header is not recorded, in addition to those whose name says that they are secret.
    #[must_use]
    pub fn redact(mut self, header: HeaderName) -> Self {
        self.redacted = Some(self.redacted().iter().cloned().chain([header]).collect());
        self
    }

    /// Responses with such a status make the event FAILED. Default: none does; a response is a response.
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

    /// Records the response's body as `body` tells it, too.
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
        details.headers_without(req.headers(), self.redacted());
        if extensions.is_empty() {
            return;
        }
        if let Some(ApiTokens(tokens)) = extensions.get() {
            details.api_tokens = *tokens;
        }
        if let Some(id) = extensions.get::<RequestId>() {
            details.request_id = Some(id.clone());
        }
        if let Some(Metadata(metadata)) = extensions.get() {
            details.metadata(metadata.clone());
        }
        if let Some(Payload(payload)) = extensions.get() {
            details.payload(payload.clone());
        }
    }

    fn response(&self, res: &http::Response<R>, details: &mut ResponseDetails) {
        details.status_code(res.status());
        if !details.code_only {
            details.headers_without(res.headers(), self.redacted());
            if let Some(used) = res.extensions().get::<ApiTokensUsed>().and_then(ApiTokensUsed::get) {
                details.api_tokens_used(used);
            }
        }
        if self.is_failure.is_some_and(|is_failure| is_failure(res.status())) {
            details.failure("HttpStatus", res.status().to_string());
        }
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
}

impl<Req, Res> Describe<Req, Res> for Nothing {
    fn request(&self, _: &Req, _: &mut RequestDetails) {}

    fn response(&self, _: &Res, _: &mut ResponseDetails) {}
}

// === impl Metadata and Payload ===

/// Told as they will be recorded.
impl fmt::Debug for Metadata {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Metadata")
            .field(&redacted_fields(self.0.clone()))
            .finish()
    }
}

impl fmt::Debug for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Payload").field(&self.0.clone().redacted()).finish()
    }
}

// === impl RequestDetails ===

impl RequestDetails {
    /// The call's name. Default: a random one.
    pub fn request_id(&mut self, id: impl Into<RequestId>) -> &mut Self {
        self.request_id = Some(id.into());
        self
    }

    /// The method.
    pub fn method(&mut self, method: &Method) -> &mut Self {
        self.method = Some(method.clone());
        self
    }

    /// The URL; user info and secret query values are left out.
    pub fn url(&mut self, url: &Uri) -> &mut Self {
        let is_default = url.host().is_none() && url.path() == "/" && url.query().is_none();
        self.url = (!is_default).then(|| url.clone());
        self
    }

    /// The headers; values of secret ones are left out.
    pub fn headers(&mut self, headers: &HeaderMap) -> &mut Self {
        self.headers_without(headers, &[]);
        self
    }

    fn headers_without(&mut self, headers: &HeaderMap, redacted: &[HeaderName]) {
        if !headers.is_empty() || self.rest.is_some() {
            self.rest().headers = redact::headers(headers, redacted);
        }
    }

    /// The body; values of secret fields are left out.
    pub fn payload(&mut self, payload: impl Into<Value>) -> &mut Self {
        self.rest().payload = Some(payload.into().redacted());
        self
    }

    /// How many of the API's tokens it will need.
    pub fn api_tokens(&mut self, tokens: u64) -> &mut Self {
        self.api_tokens = tokens;
        self
    }

    /// Keys and values of the caller's own; values of secret fields are left out. Beyond a thousand keys, further ones
    /// are only counted, under the key `[more]`.
    pub fn metadata(&mut self, metadata: BTreeMap<String, Value>) -> &mut Self {
        self.rest().keep(redacted_fields(metadata));
        self
    }

    pub(super) fn rest(&mut self) -> &mut RequestRest {
        self.rest.get_or_insert_default()
    }

    pub(super) fn span(&mut self) -> Span {
        let span = tracing::info_span!(
            target: "tower_outbound",
            "outbound_call",
            request_id = tracing::field::Empty,
            "http.request.method" = tracing::field::Empty,
            "server.address" = tracing::field::Empty,
            "http.response.status_code" = tracing::field::Empty,
            "error.type" = tracing::field::Empty,
            status = tracing::field::Empty,
        );
        if !span.is_disabled() {
            let id = self.request_id.get_or_insert_with(RequestId::random);
            span.record("request_id", tracing::field::display(&*id));
            if let Some(method) = &self.method {
                span.record("http.request.method", method.as_str());
            }
            if let Some(host) = self.url.as_ref().and_then(Uri::host) {
                span.record("server.address", host);
            }
        }
        span
    }
}

impl fmt::Debug for RequestDetails {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RequestDetails")
            .field("request_id", &self.request_id)
            .field("method", &self.method)
            .field("url", &self.url.as_ref().map(redact::uri))
            .field("api_tokens", &self.api_tokens)
            .finish_non_exhaustive()
    }
}

impl RequestRest {
    /// Adds metadata, and changes what is there.
    pub(super) fn keep(&mut self, metadata: BTreeMap<String, Value>) {
        for (key, value) in metadata {
            if self.metadata.len() < MOST_METADATA || self.metadata.contains_key(&key) {
                self.metadata.insert(key, value);
            } else {
                let more = self.metadata.entry(MORE.into()).or_insert(Value::Integer(0));
                *more = Value::from(more.as_i64().unwrap_or(0).saturating_add(1));
            }
        }
    }
}

// === impl ResponseDetails ===

impl ResponseDetails {
    pub(super) fn of<Req, Res>(describe: &impl Describe<Req, Res>, res: &Res, code_only: bool) -> Self {
        let mut details = Self {
            code_only,
            ..Self::default()
        };
        describe.response(res, &mut details);
        details
    }

    /// The status code.
    pub fn status_code(&mut self, code: StatusCode) -> &mut Self {
        self.status_code = Some(code.as_u16());
        self
    }

    /// The headers; values of secret ones are left out.
    pub fn headers(&mut self, headers: &HeaderMap) -> &mut Self {
        self.headers_without(headers, &[]);
        self
    }

    fn headers_without(&mut self, headers: &HeaderMap, redacted: &[HeaderName]) {
        if !headers.is_empty() || self.rest.is_some() {
            self.rest().headers = redact::headers(headers, redacted);
        }
    }

    /// The body; values of secret fields are left out.
    pub fn body(&mut self, body: impl Into<Value>) -> &mut Self {
        self.rest().body = Some(body.into().redacted());
        self
    }

    /// How many of the API's tokens the call used.
    pub fn api_tokens_used(&mut self, tokens: u64) -> &mut Self {
        self.rest().api_tokens_used = Some(tokens);
        self
    }

    /// The response counts as a failure: the event will be FAILED, with this error.
    pub fn failure(&mut self, error_type: impl Into<String>, message: impl AsRef<str>) -> &mut Self {
        self.rest().failure = Some(ErrorDetails {
            kind: redact::text(&error_type.into()).into_owned(),
            kind_is_known: true,
            message: redact::text(message.as_ref()).into_owned(),
            details: None,
        });
        self
    }

    pub(super) fn is_failure(&self) -> bool {
        self.rest.as_ref().is_some_and(|rest| rest.failure.is_some())
    }

    fn rest(&mut self) -> &mut ResponseRest {
        self.rest.get_or_insert_default()
    }
}

// === impl ErrorDetails ===

impl ErrorDetails {
    /// Of an error whose type may have been lost in a box.
    pub(crate) fn of(error: &BoxError) -> Self {
        Self::with_kind(error, None)
    }

    /// Of an error that was an `E`, which may itself be a box.
    pub(super) fn of_type<E: 'static>(error: &BoxError) -> Self {
        let boxed = type_name::<E>() == type_name::<BoxError>();
        Self::with_kind(error, (!boxed).then(type_name::<E>))
    }

    pub(super) fn panicked(message: &str) -> Self {
        Self {
            kind: "Panicked".into(),
            kind_is_known: true,
            message: message.into(),
            details: None,
        }
    }

    fn with_kind(error: &BoxError, kind: Option<&'static str>) -> Self {
        let own = [
            (error.is::<Closed>(), "Closed"),
            (error.is::<Cancelled>(), "Cancelled"),
            (error.is::<Panicked>(), "Panicked"),
            (error.is::<CostExceedsBurst>(), "CostExceedsBurst"),
            (error.is::<DeadlineExceeded>(), "DeadlineExceeded"),
            (error.is::<RetryAfterTooLong>(), "RetryAfterTooLong"),
            (error.is::<BodyFailed>(), "BodyFailed"),
            (error.is::<BodyTooLarge>(), "BodyTooLarge"),
        ];
        let own = own.into_iter().find_map(|(is, name)| is.then_some(name));
        let kind = own.or(kind);
        let snapshot = kind.is_none().then(|| type_name_from_debug(error)).flatten();

        let causes = causes(&**error);
        Self {
            kind: kind
                .map(str::to_owned)
                .or(snapshot)
                .unwrap_or_else(|| "dyn Error".to_owned()),
            kind_is_known: kind.is_some(),
            message: redact::text(&error.to_string()).into_owned(),
            details: (!causes.is_empty()).then(|| causes.join("\n")),
        }
    }
}

/// The type's name as a derived `Debug` begins with it: `Elapsed(…)`, `Error { … }`. Nothing else of that text is used.
fn type_name_from_debug(error: &BoxError) -> Option<String> {
    let mut head = Head(String::new());
    // Fails when there is enough.
    let _ = write!(head, "{error:?}");
    let text = head.0;
    let end = text.find(|letter: char| !letter.is_ascii_alphanumeric() && !"_:".contains(letter))?;
    let (name, rest) = text.split_at(end);
    let is_name = name.starts_with(|letter: char| letter.is_ascii_uppercase()) || name.contains("::");
    (is_name && end < MOST_NAME && (rest.starts_with('(') || rest.starts_with(" {"))).then(|| name.to_owned())
}

/// Longer ones are no names of types.
const MOST_NAME: usize = 100;

/// The beginning of a text that may be very long: a body, say, that stands in an error.
struct Head(String);

impl fmt::Write for Head {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for letter in text.chars() {
            if self.0.len() > MOST_NAME + 2 {
                return Err(fmt::Error);
            }
            self.0.push(letter);
        }
        Ok(())
    }
}
