//! [`UsageLayer`]: searches the body of a response for the numbers of the API's tokens that the call has used.

use super::{
    unread::UnreadBodies,
    usage_report::{UsageReport, UsageTotals},
};
use crate::{
    body::{EventReader, is_event_stream},
    error::BoxError,
    tokens::{ApiTokensUsed, TokenUsage},
};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, Request, Response, StatusCode, header::CONTENT_LENGTH, response::Parts};
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;
use std::{
    fmt,
    future::Future,
    panic::{RefUnwindSafe, UnwindSafe},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};
use tower_layer::Layer;
use tower_service::Service;

/// Searches the body of each response for the numbers of tokens that the call has used, by kind, and sets them in the
/// response's extension [`ApiTokensUsed`]. There [`ByUsage`](crate::rate::ByUsage) finds it to settle the charge of the
/// call, and the event records it. The layer is placed around the client, inside a
/// [`BodyLayer`](crate::body::BodyLayer) or a [`CollectLayer`](crate::body::CollectLayer).
///
/// The layer reads the formats of OpenAI (chat and responses), Anthropic, Gemini, Mistral, Groq, Bedrock and APIs that
/// copy them, in a JSON document or in a stream of [server-sent
/// events](https://html.spec.whatwg.org/multipage/server-sent-events.html). Mistral's header
/// `x-ratelimit-tokens-query-cost` is read when the head of the response arrives. Tokens that Anthropic and
/// Bedrock read from their caches are not counted, as they do not count towards the limits.
///
/// The body is searched while it is read, and is passed on unchanged. The search finds no number of tokens in:
/// - the body of a response that is not a success (2xx),
/// - a body that fails or is dropped before its end,
/// - a document above 8 MiB,
/// - a stream with an event above 1 MiB.
///
/// A body that is never read, or of which the rest is dropped although more could be read, is most often a mistake in the
/// order of the layers. It is logged as a warning, at most once a minute for the clones of a layer, with the number of
/// such bodies since the last one. A body that is dropped while its reader waits for more is none of these: its call was
/// cancelled, or its deadline has passed. Neither is the body of a response with the status 204 or a `content-length` of
/// 0.
#[derive(Clone)]
pub struct UsageLayer(Arc<Shared>);

/// What the clones of a layer share.
struct Shared {
    reader: Reader,
    unread: UnreadBodies,
}

/// What reads the usage of a document before the formats that the layer knows are tried.
enum Reader {
    None,
    Shared(Box<ReadFn>),
    /// Makes a reader for each response.
    PerResponse(Box<dyn Fn() -> Box<ReadMut> + Send + Sync>),
}

type ReadFn = dyn Fn(&[u8]) -> Option<TokenUsage> + Send + Sync;
type ReadMut = dyn FnMut(&[u8]) -> Option<TokenUsage> + Send + Sync;

/// The service of [`UsageLayer`]. It returns the errors of the client unchanged.
#[derive(Clone)]
pub struct Usage<S> {
    inner: S,
    layer: UsageLayer,
}

pin_project! {
    /// The future of [`Usage`]: a call until the head of its response has arrived.
    ///
    /// # Panics
    ///
    /// May panic when polled after it has completed.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future ends the call.
    #[must_use = "futures do nothing unless polled"]
    pub struct ResponseFuture<F> {
        #[pin]
        future: F,
        layer: UsageLayer,
    }
}

pin_project! {
    /// The body of the responses of [`Usage`]: it is searched for the number of tokens used while it is read.
    pub struct MeteredBody<B> {
        #[pin]
        body: B,
        // The search for the number of tokens. `None` if this body is not searched, and after the search has ended.
        scanner: Option<Scanner>,
        // Whether the reader of the body waits for its next frame.
        is_waiting: bool,
    }

    impl<B> PinnedDrop for MeteredBody<B> {
        fn drop(this: Pin<&mut Self>) {
            let this = this.project();
            if let Some(scanner) = this.scanner.take() {
                if !*this.is_waiting && !std::thread::panicking() {
                    scanner.layer.0.unread.add();
                }
            }
        }
    }
}

/// Searches the body of one response for the number of tokens used.
struct Scanner {
    layer: UsageLayer,
    /// The reader of this response, if the layer makes one for each.
    read: Option<Box<ReadMut>>,
    used: ApiTokensUsed,
    totals: UsageTotals,
    framing: Framing,
}

/// How the body of a response is divided into documents that are parsed, with the part of the current document that has
/// arrived so far.
enum Framing {
    /// The whole body is one document, of which these bytes have arrived.
    Document(Vec<u8>),
    /// The body is a stream of server-sent events.
    Events(EventReader),
}

/// The size of the largest document that is kept in memory to be parsed, in bytes.
const MAX_DOCUMENT_BYTES: usize = 8 << 20;
/// The size of the largest server-sent event that is kept in memory to be parsed, in bytes.
const MAX_EVENT_BYTES: usize = 1 << 20;
/// Mistral's header with the number of tokens used.
static QUERY_COST: HeaderName = HeaderName::from_static("x-ratelimit-tokens-query-cost");

// === impl UsageLayer ===

impl UsageLayer {
    /// Creates a layer that reads the formats listed at [`UsageLayer`].
    #[must_use]
    pub fn new() -> Self {
        Self::of(Reader::None)
    }

    /// Creates a layer that reads another format first. `read` is called with the whole body, or with the data of each
    /// server-sent event, be it JSON or not, or empty. It returns what the call has used so far: the number of tokens
    /// (a `u64`) or a [`TokenUsage`]. What it returns replaces all that was read before. If `read` returns `None`, the
    /// formats listed at [`UsageLayer`] are tried.
    ///
    /// All responses share the reader. For one that has to keep something from event to event, see
    /// [`with_each`](Self::with_each).
    ///
    /// For example, for an API that reports the number of tokens used as plain text:
    ///
    /// ```
    /// use tower_outbound::provider::UsageLayer;
    ///
    /// // `None` for a text that is not a number, also for the empty one.
    /// let layer = UsageLayer::with(|text| std::str::from_utf8(text).ok()?.trim().parse::<u64>().ok());
    /// ```
    #[must_use]
    pub fn with<U: Into<TokenUsage>>(read: impl Fn(&[u8]) -> Option<U> + Send + Sync + 'static) -> Self {
        Self::of(Reader::Shared(Box::new(move |document| read(document).map(Into::into))))
    }

    /// Creates a layer that reads another format first, as [`with`](Self::with) does, with a reader of its own for each
    /// response. `reader` is called once for each successful response, and returns its reader.
    ///
    /// For example, for an API whose events each report the tokens since the event before:
    ///
    /// ```
    /// use tower_outbound::provider::UsageLayer;
    ///
    /// let layer = UsageLayer::with_each(|| {
    ///     let mut sum = 0;
    ///     move |event: &[u8]| {
    ///         sum += std::str::from_utf8(event).ok()?.trim().parse::<u64>().ok()?;
    ///         Some(sum)
    ///     }
    /// });
    /// ```
    #[must_use]
    pub fn with_each<U, R>(reader: impl Fn() -> R + Send + Sync + 'static) -> Self
    where
        U: Into<TokenUsage>,
        R: FnMut(&[u8]) -> Option<U> + Send + Sync + 'static,
    {
        Self::of(Reader::PerResponse(Box::new(move || {
            let mut read = reader();
            Box::new(move |document: &[u8]| read(document).map(Into::into))
        })))
    }

    fn of(reader: Reader) -> Self {
        Self(Arc::new(Shared {
            reader,
            unread: UnreadBodies::new(),
        }))
    }
}

impl Default for UsageLayer {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for UsageLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("UsageLayer")
    }
}

impl<S> Layer<S> for UsageLayer {
    type Service = Usage<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Usage {
            inner,
            layer: self.clone(),
        }
    }
}

/// A panic of a reader leaves nothing of this crate half changed, and its own state is its author's. The compiler does
/// not see through the trait objects.
impl UnwindSafe for Shared {}
impl RefUnwindSafe for Shared {}

// === impl Usage ===

impl<S, B, R> Service<Request<B>> for Usage<S>
where
    S: Service<Request<B>, Response = Response<R>>,
{
    type Response = Response<MeteredBody<R>>;
    type Error = S::Error;
    type Future = ResponseFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, req: Request<B>) -> Self::Future {
        ResponseFuture {
            future: self.inner.call(req),
            layer: self.layer.clone(),
        }
    }
}

impl<S: fmt::Debug> fmt::Debug for Usage<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Usage")
            .field("inner", &self.inner)
            .finish_non_exhaustive()
    }
}

// === impl ResponseFuture ===

impl<F, R, E> Future for ResponseFuture<F>
where
    F: Future<Output = Result<Response<R>, E>>,
{
    type Output = Result<Response<MeteredBody<R>>, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let (mut parts, body) = ready!(this.future.poll(cx))?.into_parts();
        let used = parts.extensions.get_or_insert_with(ApiTokensUsed::unknown).clone();
        if let Some(cost) = query_cost(&parts.headers) {
            used.set(cost);
        }
        let scanner = may_report(&parts).then(|| Scanner {
            layer: this.layer.clone(),
            read: this.layer.reader_of_response(),
            used,
            totals: UsageTotals::default(),
            framing: Framing::of(&parts.headers),
        });
        let body = MeteredBody {
            body,
            scanner,
            is_waiting: false,
        };
        Poll::Ready(Ok(Response::from_parts(parts, body)))
    }
}

impl<F> fmt::Debug for ResponseFuture<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("provider::usage::ResponseFuture")
            .finish_non_exhaustive()
    }
}

/// Whether the response is a success with a body.
fn may_report(head: &Parts) -> bool {
    let is_empty =
        head.status == StatusCode::NO_CONTENT || head.headers.get(CONTENT_LENGTH).is_some_and(|length| length == "0");
    head.status.is_success() && !is_empty
}

fn query_cost(headers: &HeaderMap) -> Option<u64> {
    headers.get(&QUERY_COST)?.to_str().ok()?.trim().parse().ok()
}

// === impl MeteredBody ===

impl<B> Body for MeteredBody<B>
where
    B: Body<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let mut this = self.project();
        let poll = this.body.as_mut().poll_frame(cx);
        *this.is_waiting = poll.is_pending();
        let frame = ready!(poll);
        match &frame {
            Some(Ok(frame)) => {
                if let (Some(scanner), Some(data)) = (this.scanner.as_mut(), frame.data_ref()) {
                    if scanner.observe(data).is_err() {
                        *this.scanner = None;
                    }
                }
                if this.body.is_end_stream() {
                    finish(this.scanner);
                }
            }
            // The numbers of tokens that arrived before the body failed may be too low. The search ends without a
            // result, so the call stays charged as it was estimated.
            Some(Err(_)) => *this.scanner = None,
            None => finish(this.scanner),
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl<B> fmt::Debug for MeteredBody<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MeteredBody").finish_non_exhaustive()
    }
}

/// Ends the search, and records the number of tokens that it has found. Does nothing if the search has ended before.
fn finish(scanner: &mut Option<Scanner>) {
    if let Some(scanner) = scanner.take() {
        scanner.finish();
    }
}

// === impl Scanner ===

/// The error of a document or an event that is too large to be kept in memory. It ends the search of the body.
struct TooLarge;

impl Scanner {
    /// Searches the next bytes of the body for the number of tokens.
    fn observe(&mut self, bytes: &[u8]) -> Result<(), TooLarge> {
        let Self {
            layer,
            read,
            totals,
            framing,
            ..
        } = self;
        match framing {
            Framing::Document(document) => {
                document.extend_from_slice(bytes);
                if document.len() > MAX_DOCUMENT_BYTES {
                    return Err(TooLarge);
                }
                Ok(())
            }
            Framing::Events(events) => events
                .push(bytes, |event| layer.read_document(read, event.data, totals))
                .map_err(|_| TooLarge),
        }
    }

    /// Reads the document of a body that has ended, or the last event if neither an empty line has ended it nor a `\n`
    /// its last line. Then records the number of tokens used, if any was found.
    fn finish(self) {
        let Self {
            layer,
            mut read,
            used,
            mut totals,
            framing,
        } = self;
        match framing {
            Framing::Document(document) if document.is_empty() => {}
            Framing::Document(document) => layer.read_document(&mut read, &document, &mut totals),
            Framing::Events(events) => {
                if events
                    .finish(|event| layer.read_document(&mut read, event.data, &mut totals))
                    .is_err()
                {
                    return;
                }
            }
        }
        if let Some(usage) = totals.usage() {
            used.set_usage(usage);
        }
    }
}

impl UsageLayer {
    /// Makes the reader of one response, if the layer has one for each.
    fn reader_of_response(&self) -> Option<Box<ReadMut>> {
        match &self.0.reader {
            Reader::PerResponse(make) => Some(make()),
            Reader::None | Reader::Shared(_) => None,
        }
    }

    /// Reads the numbers of tokens in a whole document, or in the data of one server-sent event. `read` is the reader of
    /// the response, if it has one of its own.
    fn read_document(&self, read: &mut Option<Box<ReadMut>>, document: &[u8], totals: &mut UsageTotals) {
        let used = match (read, &self.0.reader) {
            (Some(read), _) => read(document),
            (None, Reader::Shared(read)) => read(document),
            (None, _) => None,
        };
        match used {
            Some(used) => *totals = UsageTotals::of(used),
            None => totals.update(&UsageReport::read(document)),
        }
    }
}

impl Framing {
    /// Returns the framing of a body with the content type in `headers`. Any body that is not an event stream is one
    /// document.
    fn of(headers: &HeaderMap) -> Self {
        if is_event_stream(headers) {
            Self::Events(EventReader::new(MAX_EVENT_BYTES))
        } else {
            Self::Document(Vec::new())
        }
    }
}
