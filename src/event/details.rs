//! What an event records of a request, of a response and of an error.
//!
//! URLs, headers, bodies and metadata are kept as they are given, and redacted by the code that shows them: redacting
//! costs far more than keeping, and most events are never read. Texts of errors are redacted here. The fields are
//! visible in the module `event` only, so an implementation of [`Describe`](super::Describe) can neither record a secret
//! by accident nor read one.

use super::{request_id::RequestId, value::Value};
#[cfg(feature = "json")]
use crate::error::BadResponse;
#[cfg(feature = "http")]
use crate::error::{BodyFailed, BodyTooLarge, RetryAfterTooLong};
use crate::{
    error::{
        BoxError, Cancelled, Closed, CostExceedsBurst, DeadlineExceeded, Exhausted, Panicked, StoreUnavailable,
        TooManyKeys, causes, sources,
    },
    redact::{self, UnredactedHeaders},
    tokens::TokenUsage,
};
use http::{HeaderMap, HeaderName, Method, StatusCode, Uri};
use std::{
    any::type_name,
    collections::BTreeMap,
    fmt::{self, Write as _},
    sync::Arc,
};
use tracing::Span;

/// What an event records of a request.
#[derive(Default)]
pub struct RequestDetails {
    pub(super) request_id: Option<RequestId>,
    pub(super) method: Option<Method>,
    /// The URL of the request, not redacted.
    pub(super) url: Option<Uri>,
    pub(super) headers: UnredactedHeaders,
    pub(super) api_tokens: u64,
    pub(super) extra: Option<Box<RequestExtra>>,
}

/// What an event records of a response.
#[derive(Default)]
pub struct ResponseDetails {
    pub(super) status_code: Option<u16>,
    /// Whether only the status code is recorded, because the response ends one attempt and not the call.
    pub(super) code_only: bool,
    pub(super) headers: UnredactedHeaders,
    pub(super) extra: Option<Box<ResponseExtra>>,
}

/// What an event records of an error. It is passed in a box: most calls do not fail, and a `Result` or an outcome that
/// had room for it would cost each of them a longer copy.
#[derive(Debug)]
pub(crate) struct ErrorDetails {
    pub(super) kind: String,
    /// Whether the name of the error's type is a guess, because the type was lost when the error was boxed.
    pub(super) kind_is_guess: bool,
    /// Whether the error is a [`DeadlineExceeded`], or has one among its sources.
    pub(super) is_deadline_exceeded: bool,
    pub(super) message: String,
    /// The messages of the error's sources, one on each line.
    pub(super) sources: Option<String>,
    /// The response that the error was made of, if it has one.
    pub(super) response: ResponseDetails,
}

/// The details that most requests do not have. They are in a box, which is allocated when the first of them is set.
#[derive(Default)]
pub(super) struct RequestExtra {
    /// The body, not redacted.
    pub(super) payload: Option<Value>,
    pub(super) metadata: MetadataMap,
    /// The name of the model that the call is for.
    pub(super) model: Option<Arc<str>>,
}

/// The details that most responses do not have, in a box like those of [`RequestExtra`].
#[derive(Default)]
pub(super) struct ResponseExtra {
    /// The body, not redacted.
    pub(super) body: Option<Value>,
    pub(super) token_usage: Option<TokenUsage>,
    /// The error to record, if the response counts as a failure.
    pub(super) failure: Option<Box<ErrorDetails>>,
}

/// The caller's metadata keys and values, not redacted, of which at most [`MAX_KEYS`] are kept.
#[derive(Default)]
pub(super) struct MetadataMap(pub(super) BTreeMap<String, Value>);

/// The number of metadata keys that an event keeps. Further keys are only counted, under the key [`FURTHER_KEYS`].
const MAX_KEYS: usize = 1_000;
const FURTHER_KEYS: &str = "[more]";

/// A type name that is read from an error's `Debug` output is accepted only if it has fewer bytes than this.
const MAX_TYPE_NAME: usize = 100;

// === impl RequestDetails ===

impl RequestDetails {
    /// Sets the call's id. Default: a random UUID.
    pub fn request_id(&mut self, id: impl Into<RequestId>) -> &mut Self {
        self.request_id = Some(id.into());
        self
    }

    /// Sets the method of the request.
    pub fn method(&mut self, method: &Method) -> &mut Self {
        self.method = Some(method.clone());
        self
    }

    /// Sets the URL of the request. User info and the values of secret query parameters are redacted. The URL `/`,
    /// which an [`http::Request`] has by default, is not recorded.
    pub fn url(&mut self, url: &Uri) -> &mut Self {
        let is_default = url.path() == "/" && url.authority().is_none() && url.query().is_none();
        self.url = (!is_default).then(|| url.clone());
        self
    }

    /// Sets the headers of the request. The values of secret headers are redacted.
    pub fn headers(&mut self, headers: &HeaderMap) -> &mut Self {
        self.headers_redacting(headers, &[])
    }

    /// Sets the headers of the request. The values of secret headers and of the headers named in `also` are redacted.
    pub(super) fn headers_redacting(&mut self, headers: &HeaderMap, also: &[HeaderName]) -> &mut Self {
        self.headers = UnredactedHeaders::new(headers, also);
        self
    }

    /// Sets the body of the request. The values of secret fields are redacted.
    pub fn payload(&mut self, payload: impl Into<Value>) -> &mut Self {
        self.extra.get_or_insert_default().payload = Some(payload.into());
        self
    }

    /// Sets the name of the model that the call is for: see [`EventHandle::model`](super::EventHandle::model).
    pub fn model(&mut self, name: impl Into<Arc<str>>) -> &mut Self {
        self.extra.get_or_insert_default().model = Some(name.into());
        self
    }

    /// Sets the number of the API's tokens that the request is expected to cost. Default: 0.
    pub fn api_tokens(&mut self, tokens: u64) -> &mut Self {
        self.api_tokens = tokens;
        self
    }

    /// Adds metadata: keys and values that the caller chose. The values of secret keys are redacted.
    ///
    /// An event keeps at most 1,000 metadata keys. Further keys are only counted, under the key `[more]`.
    pub fn metadata(&mut self, metadata: BTreeMap<String, Value>) -> &mut Self {
        self.extra.get_or_insert_default().metadata.add(metadata);
        self
    }

    /// Opens the tracing span of the call.
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

// === impl ResponseDetails ===

impl ResponseDetails {
    /// Sets the status code of the response.
    pub fn status_code(&mut self, code: StatusCode) -> &mut Self {
        self.status_code = Some(code.as_u16());
        self
    }

    /// Sets the headers of the response. The values of secret headers are redacted.
    pub fn headers(&mut self, headers: &HeaderMap) -> &mut Self {
        self.headers_redacting(headers, &[])
    }

    /// Sets the headers of the response. The values of secret headers and of the headers named in `also` are redacted.
    pub(super) fn headers_redacting(&mut self, headers: &HeaderMap, also: &[HeaderName]) -> &mut Self {
        self.headers = UnredactedHeaders::new(headers, also);
        self
    }

    /// Sets the body of the response. The values of secret fields are redacted.
    pub fn body(&mut self, body: impl Into<Value>) -> &mut Self {
        self.extra.get_or_insert_default().body = Some(body.into());
        self
    }

    /// Sets the number of the API's tokens that the call used, of which the kinds are not known.
    pub fn api_tokens_used(&mut self, tokens: u64) -> &mut Self {
        self.token_usage(TokenUsage::total(tokens))
    }

    /// Sets the numbers of the API's tokens that the call used, by kind.
    pub fn token_usage(&mut self, usage: TokenUsage) -> &mut Self {
        self.extra.get_or_insert_default().token_usage = Some(usage);
        self
    }

    /// Makes the response count as a failure: the call's event ends as FAILED, with this error.
    pub fn failure(&mut self, error_type: impl Into<String>, message: impl AsRef<str>) -> &mut Self {
        self.extra.get_or_insert_default().failure = Some(Box::new(ErrorDetails {
            kind: redact::text(&error_type.into()).into_owned(),
            kind_is_guess: false,
            is_deadline_exceeded: false,
            message: redact::text(message.as_ref()).into_owned(),
            sources: None,
            response: Self::default(),
        }));
        self
    }

    pub(super) fn is_failure(&self) -> bool {
        self.extra.as_ref().is_some_and(|extra| extra.failure.is_some())
    }
}

impl fmt::Debug for ResponseDetails {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let extra = self.extra.as_deref();
        f.debug_struct("ResponseDetails")
            .field("status_code", &self.status_code)
            .field("headers", &self.headers)
            .field("token_usage", &extra.and_then(|extra| extra.token_usage))
            .field("failure", &extra.and_then(|extra| extra.failure.as_ref()))
            .finish_non_exhaustive()
    }
}

// === impl MetadataMap ===

impl MetadataMap {
    fn add(&mut self, fields: BTreeMap<String, Value>) {
        for (key, value) in fields {
            if self.0.len() < MAX_KEYS || self.0.contains_key(&key) {
                self.0.insert(key, value);
            } else {
                let count = self.0.entry(FURTHER_KEYS.into()).or_insert(Value::Integer(0));
                *count = Value::from(count.as_i64().unwrap_or(0).saturating_add(1));
            }
        }
    }
}

// === impl ErrorDetails ===

impl ErrorDetails {
    /// Returns the details of an error whose type may have been lost when it was boxed.
    pub(crate) fn of(error: &BoxError) -> Box<Self> {
        Self::with_kind(error, None)
    }

    /// Returns the details of an error that was an `E` before it was boxed. If `E` is [`BoxError`] itself, the type is
    /// guessed.
    pub(super) fn of_type<E: 'static>(error: &BoxError) -> Box<Self> {
        let is_boxed = type_name::<E>() == type_name::<BoxError>();
        Self::with_kind(error, (!is_boxed).then(type_name::<E>))
    }

    pub(super) fn panicked(message: &str) -> Box<Self> {
        Box::new(Self {
            kind: "Panicked".into(),
            kind_is_guess: false,
            is_deadline_exceeded: false,
            message: message.into(),
            sources: None,
            response: ResponseDetails::default(),
        })
    }

    #[cold]
    fn with_kind(error: &BoxError, kind: Option<&'static str>) -> Box<Self> {
        let kind = kind_of_own(error).or(kind);
        let guess = || type_name_from_debug(error).unwrap_or_else(|| "dyn Error".to_owned());
        let texts = causes(&**error);
        Box::new(Self {
            kind: kind.map_or_else(guess, str::to_owned),
            kind_is_guess: kind.is_none(),
            is_deadline_exceeded: error.is::<DeadlineExceeded>()
                || sources(&**error).any(|source| source.is::<DeadlineExceeded>()),
            message: redact::text(&error.to_string()).into_owned(),
            sources: (!texts.is_empty()).then(|| texts.join("\n")),
            response: ResponseDetails::default(),
        })
    }
}

/// Returns the name of the error's type, if it is one of the types of this crate.
fn kind_of_own(error: &BoxError) -> Option<&'static str> {
    let own = [
        (error.is::<Closed>(), "Closed"),
        (error.is::<Cancelled>(), "Cancelled"),
        (error.is::<Panicked>(), "Panicked"),
        (error.is::<CostExceedsBurst>(), "CostExceedsBurst"),
        (error.is::<Exhausted>(), "Exhausted"),
        (error.is::<TooManyKeys>(), "TooManyKeys"),
        (error.is::<DeadlineExceeded>(), "DeadlineExceeded"),
        (error.is::<StoreUnavailable>(), "StoreUnavailable"),
        #[cfg(feature = "http")]
        (error.is::<RetryAfterTooLong>(), "RetryAfterTooLong"),
        #[cfg(feature = "http")]
        (error.is::<BodyFailed>(), "BodyFailed"),
        #[cfg(feature = "http")]
        (error.is::<BodyTooLarge>(), "BodyTooLarge"),
        #[cfg(feature = "json")]
        (error.is::<BadResponse>(), "BadResponse"),
    ];
    own.into_iter().find_map(|(is_type, name)| is_type.then_some(name))
}

/// Returns the name of the error's type, if the error's `Debug` output begins with one as a derived `Debug` does:
/// `Elapsed(…)`, `Error { … }`. The rest of the output is not used.
fn type_name_from_debug(error: &BoxError) -> Option<String> {
    let mut prefix = Prefix(String::new());
    // The error is ignored: `Prefix` collects the start of the output, and returns an error to end the output once the
    // start is long enough.
    let _ = write!(prefix, "{error:?}");
    let text = prefix.0;
    let end = text.find(|letter: char| !letter.is_ascii_alphanumeric() && !"_:".contains(letter))?;
    let (name, rest) = text.split_at(end);
    let is_name = name.starts_with(|letter: char| letter.is_ascii_uppercase()) || name.contains("::");
    (is_name && end < MAX_TYPE_NAME && (rest.starts_with('(') || rest.starts_with(" {"))).then(|| name.to_owned())
}

/// Collects the start of an error's `Debug` output, and ends the output with an error once the start is long enough:
/// the whole output may contain a response's body.
struct Prefix(String);

impl fmt::Write for Prefix {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for letter in text.chars() {
            if self.0.len() > MAX_TYPE_NAME + 2 {
                return Err(fmt::Error);
            }
            self.0.push(letter);
        }
        Ok(())
    }
}
